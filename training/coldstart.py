"""How well items that nobody has clicked yet are recommended, from their columns alone.

Held-out items are cold: whatever was learned from likes, none was of theirs. A user is the mean of the vectors of the
training items that they liked; the cold items are ranked by their cosine to it.

recall     of the cold items that a user liked, the share among the k ranked highest
ndcg       the same with places counted: a hit at place 1 is worth 1, at place r 1 / log2(r + 1); 1 is perfect
           (Jarvelin and Kekalainen 2002)
pm_auc     popularity-matched AUC: how often a liked cold item is ranked above one of nearly the same popularity that
           the user did not like; 0.5 is chance. Guessing that everybody likes hits gains recall, but not this.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from training.baselines import Cosines, dense_cosines, fitted
from training.folds import TEST, TRAIN
from training.judged import Judged, Rows, Views, plain_blocks, some

K = 20
LEAST_WARM, LEAST_COLD = 5, 1
"""Likes of training items that make a user known, and of cold ones that there must be to find."""

USERS, CANDIDATES = 5_000, 5_000
"""Users that are asked, and cold items that are ranked, at most."""

FITTED = 4_000
"""Training items that the baselines are fitted on at most."""

WINDOW = 10
"""Places in the order of popularity within which two items count as equally popular."""

Scores = npt.NDArray[np.float32]
Liked = npt.NDArray[np.bool_]


def cold_start(model: Judged, likes: sp.csr_matrix, fold: npt.NDArray[np.int8]) -> dict[str, Any] | None:
    """Of `likes`, (users, n) by the rows of the table: how many users, warm and cold items there were, and the three
    figures of the model, of each baseline and of chance. None where no user has liked enough."""
    counts = np.asarray((likes > 0).sum(0)).ravel()
    warm = np.flatnonzero((fold == TRAIN) & (counts > 0))
    cold = some(np.flatnonzero((fold == TEST) & (counts > 0)), CANDIDATES)
    likes = (likes > 0).astype(np.float32).tocsr()
    of_warm, of_cold = likes[:, warm], likes[:, cold]
    known = (np.asarray(of_warm.sum(1)).ravel() >= LEAST_WARM) & (np.asarray(of_cold.sum(1)).ravel() >= LEAST_COLD)
    users = some(np.flatnonzero(known), USERS)
    if len(users) == 0:
        return None
    profile = of_warm[users]
    profile = sp.diags(1 / np.asarray(profile.sum(1)).ravel()).astype(np.float32) @ profile
    liked, popularity = of_cold[users].toarray() > 0, counts[cold]
    items = np.concatenate([warm, cold])
    near, far = np.arange(len(warm)), np.arange(len(warm), len(items))
    return {
        "k": K, "users": len(users), "warm_items": len(warm), "cold_items": len(cold),
        **{
            name: _figures(_ranked(profile, cosines, near, far), liked, popularity)
            for name, cosines in _everyone(model, items, some(near, FITTED))
        },
        "chance": _figures(np.random.default_rng(0).random(liked.shape, np.float32), liked, popularity),
    }  # fmt: skip


def _everyone(model: Judged, items: Rows, fitted_on: Rows) -> Iterator[tuple[str, Cosines]]:
    with torch.inference_mode():
        yield "model", dense_cosines(Views(model, items).whole.numpy())
    yield from fitted(plain_blocks(model, items), fitted_on, model.encoder.config.dim)


def _ranked(profile: sp.csr_matrix, cosines: Cosines, warm: Rows, cold: Rows, at_once: int = 256) -> Scores:
    """(users, cold): the mean cosine of a cold item to those that the user liked."""
    return np.concatenate(
        [profile @ cosines(warm, cold[i : i + at_once]) for i in range(0, len(cold), at_once)], axis=1
    )


def _figures(scores: Scores, liked: Liked, popularity: npt.NDArray[Any]) -> dict[str, float]:
    recall, ndcg = recall_and_ndcg(scores, liked)
    return {"recall": recall, "ndcg": ndcg, "pm_auc": popularity_matched_auc(scores, liked, popularity)}


def recall_and_ndcg(scores: Scores, liked: Liked, k: int = K) -> tuple[float, float]:
    """Means over the users (rows), each of whom likes one item (column) at least."""
    k = min(k, scores.shape[1])
    top = torch.from_numpy(scores).topk(k, dim=1).indices.numpy()
    hits, wanted = np.take_along_axis(liked, top, 1), liked.sum(1)
    gain = 1 / np.log2(np.arange(2, k + 2))
    best = gain.cumsum()[np.minimum(wanted, k) - 1]
    return float((hits.sum(1) / wanted).mean()), float(((hits * gain).sum(1) / best).mean())


def popularity_matched_auc(scores: Scores, liked: Liked, popularity: npt.NDArray[Any], window: int = WINDOW) -> float:
    """Over all users and pairs of items at most `window` places apart in the order of popularity of which the user
    likes just one: how often that one has the higher score; a tie counts half. Equal popularities are ordered by
    chance."""
    order = np.lexsort((np.random.default_rng(0).random(len(popularity)), popularity))
    scores, liked = scores[:, order], liked[:, order]
    won = pairs = 0.0
    for apart in range(1, min(window, len(order) - 1) + 1):
        one, other = liked[:, :-apart], liked[:, apart:]
        just_one = one != other
        lead = np.where(one, 1, -1)[just_one] * (scores[:, :-apart] - scores[:, apart:])[just_one]
        won += float((lead > 0).sum() + 0.5 * (lead == 0).sum())
        pairs += len(lead)
    return won / pairs if pairs else 0.5
