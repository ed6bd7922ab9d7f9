"""The space that the vectors lie in: whether all of it is used, and whether it is where it was."""

import torch
from torch import Tensor
from torch.nn import functional

from training.judged import ENCODED_AT_ONCE, Judged, Rows


def space(model: Judged, items: Rows) -> dict[str, float]:
    """norm_mean, norm_std (before the length is made 1), effective_rank and mean_cosine of the vectors of `items`."""
    parts = torch.split(torch.from_numpy(items), ENCODED_AT_ONCE)
    vectors = torch.cat([model.encoder.unscaled(*model.table.clean(part)) for part in parts])
    norm, unit, n = vectors.norm(dim=1), functional.normalize(vectors, dim=1), len(vectors)
    return {
        "norm_mean": float(norm.mean()),
        "norm_std": float(norm.std(correction=0)),
        "effective_rank": effective_rank(unit),
        "mean_cosine": float((unit.sum(0).square().sum() - n) / max(n * (n - 1), 1)),
    }


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised variances along the principal axes (Roy and Vetterli 2007).

    >>> corners = torch.tensor([[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, -1.0, 0.0]])
    >>> round(effective_rank(corners), 4)    # a square in space: two dimensions, used alike
    2.0
    """
    centred = vectors - vectors.mean(0)
    variance = torch.linalg.svdvals(centred.double()).square()
    share = variance / variance.sum().clamp(min=1e-12)
    return float(torch.exp(-torch.special.xlogy(share, share).sum()))


def neighbor_overlap(vectors: Tensor, others: Tensor, queries: int, k: int) -> float:
    """The mean share of an item's k nearest that two spaces agree on, over the first `queries` items.

    `vectors` (n, dim) and `others` (n, another dim) are of the same items. The order of the k does not count.
    """
    k = min(k, len(vectors) - 1)
    near, others_near = (_nearest(functional.normalize(v, dim=1), queries, k) for v in (vectors, others))
    return float((near[:, :, None] == others_near[:, None, :]).any(2).float().mean())


def cross_recall(vectors: Tensor, others: Tensor, queries: int, k: int) -> float:
    """The mean share of an item's k nearest in the space of `others` that are found when it is asked for there with its
    vector of the space of `vectors`, over the first `queries` items. Both are (n, dim) of the same items."""
    k = min(k, len(vectors) - 1)
    ours, theirs = (functional.normalize(v, dim=1) for v in (vectors, others))
    asked, near = _nearest(ours, queries, k, theirs), _nearest(theirs, queries, k)
    return float((asked[:, :, None] == near[:, None, :]).any(2).float().mean())


def _nearest(unit: Tensor, queries: int, k: int, among: Tensor | None = None) -> Tensor:
    scores = unit[:queries] @ (unit if among is None else among).T
    scores[torch.arange(queries), torch.arange(queries)] = -torch.inf
    return scores.topk(k, dim=1).indices
