"""Whether the nearest items share what was hidden from them: the measure of an embedding where nobody has clicked yet.

Hide a column from all items, embed them, and look at each one's ten nearest: how many have a label of that column in
common with it? The other columns say something of the hidden one, and a good embedding has kept it. A floor, not a
ceiling: a random projection does not do badly, so it proves that nothing was lost rather than that much was learned.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional

from training.baselines import BASELINES, LeaveOneOut
from training.judged import Floats, Labels, Rows, Views, plain_blocks

K = 10
COLUMNS = 12
"""Columns that are hidden in turn at most, the first ones of the schema."""


def retrieve(
    views: Views,
    queries: int,
    truth: Mapping[str, Labels | sp.csr_matrix],
    prefixes: Sequence[int] = (),
    baselines: bool = True,
) -> tuple[dict[str, Any], Floats]:
    """Precision@10 per hidden column, for the first `queries` items of `views` among all of them; and the same per
    query, (columns, queries), NaN where an item has no label to share.

    `prefixes` are sizes at which the embedding is judged too. `truth[column][items]` says who has which label.
    """
    model, items = views.model, views.items
    columns = [slot.name for slot in model.layout.bags if slot.name in truth][:COLUMNS]
    rivals = LeaveOneOut(plain_blocks(model, items), model.encoder.config.dim) if baselines and columns else None
    out: dict[str, dict[str, float]] = {}
    by_prefix: list[list[dict[str, float]]] = []
    by_query: list[Floats] = []
    for name in columns:
        labels = truth[name][items]
        asked = np.flatnonzero(np.asarray(labels[:queries].sum(1)).ravel() > 0)
        if len(asked) == 0 or len(items) <= K:
            continue
        shares = torch.from_numpy((labels[asked] @ labels.T).toarray() > 0)  # (queries, items)
        shares[torch.arange(len(asked)), asked] = False
        vectors = views.without(name)
        precision = precision_at_k(vectors[asked] @ vectors.T, asked, shares)
        out[name] = {
            "precision": float(precision.mean()),
            "base_rate": float(shares.sum() / (len(asked) * (len(items) - 1))),
        }
        if rivals is not None:
            left = rivals.without(name)
            out[name]["one_hot"] = float(precision_at_k(left.one_hot[asked], asked, shares).mean())
            out[name] |= {kind: _of_prefix(c, c.shape[1], asked, shares) for kind, c in left.coordinates.items()}
            of_both = {"precision": vectors, "pca": left.coordinates["pca"]}
            by_prefix.append(
                [{key: _of_prefix(v, size, asked, shares) for key, v in of_both.items()} for size in prefixes]
            )
        row = np.full(queries, np.nan, np.float32)
        row[asked] = precision
        by_query.append(row)
    keys = ["precision", "base_rate", *(BASELINES if baselines else ())]
    result: dict[str, Any] = {
        "k": K,
        "columns": out,
        "mean": {key: float(np.mean([column[key] for column in out.values()])) for key in keys} if out else {},
    }
    if by_prefix:
        result["prefixes"] = {
            str(size): {key: float(np.mean([column[i][key] for column in by_prefix])) for key in ("precision", "pca")}
            for i, size in enumerate(prefixes)
        }
    return result, np.stack(by_query) if by_query else np.zeros((0, queries), np.float32)


def precision_at_k(scores: Tensor, queries: Rows, shares: Tensor) -> npt.NDArray[np.float32]:
    """(q,) the share of the K items of highest score that share something with the query; the query itself aside.

    `scores` and `shares` are (q, items), `queries` (q,) the place of each query among the items.
    """
    scores[torch.arange(len(queries)), queries] = -torch.inf
    precision: Floats = shares.gather(1, scores.topk(K, dim=1).indices).float().mean(1).numpy()
    return precision


def nested_sizes(dim: int, trained: Sequence[int] = ()) -> list[int]:
    """The sizes that prefixes are judged at: those trained for, or else halves of the dim down to 8; and the dim.

    >>> nested_sizes(64)
    [8, 16, 32, 64]
    >>> nested_sizes(48, trained=[12, 24])
    [12, 24, 48]
    """
    halves = [dim >> i for i in range(1, dim.bit_length()) if dim >> i >= 8]
    return [*(trained or reversed(halves)), dim]


def _of_prefix(vectors: Tensor, size: int, asked: Rows, shares: Tensor) -> float:
    unit = functional.normalize(vectors[:, :size], dim=1)
    return float(precision_at_k(unit[asked] @ unit.T, asked, shares).mean())
