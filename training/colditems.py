"""How well items are recommended that nobody has clicked yet: the task, and the figures that judge it.

Held-out items are cold: whatever was learned from likes, none was of theirs. A user is the mean of the vectors of the
training items that they liked; the cold items are ranked by their cosine to it.

recall     of the cold items that a user liked, the share among the k ranked highest
ndcg       the same with places counted: a hit at place 1 is worth 1, at place r 1 / log2(r + 1); 1 is perfect
           (Jarvelin and Kekalainen 2002)
pm_auc     popularity-matched AUC: how often a liked cold item is ranked above one of nearly the same popularity that
           the user did not like; 0.5 is chance. Guessing that everybody likes hits gains recall, but not this.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from training.folds import TRAIN, some

K = 20
LEAST_WARM, LEAST_COLD = 5, 1
"""Likes of training items that make a user known, and of cold ones that there must be to find."""

USERS, CANDIDATES = 5_000, 5_000
"""Users that are asked, and cold items that are ranked, at most."""

WARM = 50_000
"""Warm items at most, where a table has more: those that users like who are asked, and so many users as like no more.
All are encoded for it, in training after every epoch."""

WINDOW = 10
"""Places in the order of popularity within which two items count as equally popular."""

Rows = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]
Liked = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ColdItems:
    """w warm items, c cold ones, and u users to whom the cold ones are recommended."""

    warm: Rows
    cold: Rows

    profile: sp.csr_matrix
    """(u, w) what each warm item counts in a user's mean"""

    liked: Liked
    """(u, c)"""

    popularity: npt.NDArray[Any]
    """(c,) users that liked it, of all"""

    @classmethod
    def of(cls, likes: sp.csr_matrix, fold: npt.NDArray[np.int8], held: int) -> "ColdItems | None":
        """`likes` (users, n) by the rows of the table; `held` is the fold of the cold ones. None where no user has
        liked enough."""
        likes = (likes > 0).astype(np.float32).tocsr()
        counts = np.asarray(likes.sum(0)).ravel()
        warm = np.flatnonzero((fold == TRAIN) & (counts > 0))
        cold = some(np.flatnonzero((fold == held) & (counts > 0)), CANDIDATES)
        of_warm, of_cold = likes[:, warm], likes[:, cold]
        known = (np.asarray(of_warm.sum(1)).ravel() >= LEAST_WARM) & (np.asarray(of_cold.sum(1)).ravel() >= LEAST_COLD)
        users = some(np.flatnonzero(known), USERS)
        if len(users) == 0:
            return None
        if len(warm) > WARM:
            while (asked := of_warm[users].getnnz(0) > 0).sum() > WARM and len(users) > 1:
                users = users[::2]
            warm, of_warm = warm[asked], of_warm[:, asked]
        profile = of_warm[users]
        profile = (sp.diags(1 / np.asarray(profile.sum(1)).ravel()).astype(np.float32) @ profile).tocsr()
        return cls(warm, cold, profile, of_cold[users].toarray() > 0, counts[cold])

    def ranked(self, cosines: Callable[[Rows, Rows, sp.csr_matrix], Scores]) -> dict[str, float]:
        """The figures, where `cosines` (`baselines.Cosines`) gives sums of those between some of the items, counted
        warm ones first."""
        warm, cold = np.arange(len(self.warm)), np.arange(len(self.cold)) + len(self.warm)
        return self.figures(cosines(warm, cold, self.profile))

    def figures(self, scores: Scores) -> dict[str, float]:
        """(u, c)"""
        recall, ndcg = recall_and_ndcg(scores, self.liked)
        return {"recall": recall, "ndcg": ndcg, "pm_auc": popularity_matched_auc(scores, self.liked, self.popularity)}


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
