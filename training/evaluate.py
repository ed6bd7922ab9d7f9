"""How good an encoder is on rows that it was not trained on, beside what needs no learning: the content of
`evaluation.json`.

rows                train, validation, test: how many; measured: how many test rows the figures are of
columns.NAME        metric: accuracy (nominal), micro-F1 (multi, text), mean error in steps (ordinal; lower is better),
                    R2 (numeric, timestamp)
                    score: of what the decoder reads back from the embedding of the whole item
                    inferred: the same, where the column was hidden and must follow from the others
                    majority: of the most frequent answer
                    loss: of the decoder on the whole item; 1 is the best constant answer, 0 is perfect
retrieval           columns.NAME: precision@10, the share of the ten nearest items that have a label of a hidden column
                    in common with the item (the column is hidden from all of them); pca, pca_unit_variance: the same by
                    principal components of the other columns, of the same dim; base_rate: by chance. mean: over columns
                    A floor, not a ceiling: it proves that nothing was lost.
out_of_vocabulary   columns.NAME: the share of rows whose labels in the column are all new to the model; share: of rows
                    with such a column; precision: the mean of retrieval over those rows; precision_of_others
space               norm_mean, norm_std: of the vectors before their length is made 1; effective_rank: how many
                    dimensions are in use (exp of the entropy of the spectrum); mean_cosine: of random pairs, near 0
training            best_epoch (kept), epochs, history: losses of each, parameters
seconds             of each phase: read, encode, ray, workers (start), loop, evaluate
gate                written by `itemvec retrain`: the champion it was compared with, and the checks
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional

from itemvec.encoder import Decoder, ItemEncoder
from itemvec.features import FIRST, MISSING, OOV, BagSlot, DenseSlot, Layout
from training import losses
from training.baselines import ColumnPCA
from training.data import TEST, TRAIN, EncodedTable, Marginals, Prepared
from training.objectives import constant_losses, dense_loss, ordinal_loss

MEASURED = 1_000
"""Test rows that are measured at most; chosen by their place, so the same for every version of a model."""

SEARCHED = 2_000
"""Items that retrieval searches in at most, the measured ones first."""

K = 10
RETRIEVAL_COLUMNS = 12
CHUNK = 512

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Judged:
    """A trained encoder with its decoder and the table as its own transform encodes it."""

    encoder: ItemEncoder
    decoder: Decoder
    layout: Layout
    table: EncodedTable
    marginals: Marginals


def judged(data: Prepared, encoder: ItemEncoder, decoder: Decoder) -> Judged:
    return Judged(encoder.eval(), decoder.eval(), data.layout, data.table, data.marginals)


def measured_rows(fold: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """The measured rows: of the test fold, or of the training fold where the table is so small that none fell into
    it."""
    rows = np.flatnonzero(fold == TEST)
    rows = rows if len(rows) >= 2 else np.flatnonzero(fold == TRAIN)
    return rows[:: -(-len(rows) // MEASURED)]


@torch.inference_mode()
def evaluate(model: Judged, fold: npt.NDArray[np.int8]) -> dict[str, Any]:
    measured = torch.from_numpy(measured_rows(fold))
    retrieval, by_item = retrieve(model, searched_rows(fold), len(measured), truth_of(model.layout, model.table))
    unseen = _only_unseen(model, measured)
    any_unseen = np.any([*unseen.values(), np.zeros(len(measured), bool)], axis=0)
    return {
        "rows": {
            "train": int((fold == TRAIN).sum()), "validation": int((fold == 1).sum()), "test": int((fold ==
            TEST).sum()), "measured": len(measured),
        },
        "columns": read_back(model, measured),
        "retrieval": retrieval,
        "out_of_vocabulary": {
            "columns": {name: float(rows.mean()) for name, rows in unseen.items()},
            "share": float(any_unseen.mean()),
            "precision": _mean(by_item[any_unseen]),
            "precision_of_others": _mean(by_item[~any_unseen]),
        },
        "space": space(model, measured),
    }  # fmt: skip


def searched_rows(fold: npt.NDArray[np.int8]) -> Tensor:
    """The measured rows, and after them training rows up to SEARCHED in all."""
    measured, train = measured_rows(fold), np.flatnonzero(fold == TRAIN)
    train = np.setdiff1d(train, measured)
    room = max(SEARCHED - len(measured), SEARCHED // 2)
    return torch.from_numpy(np.concatenate([measured, train[:: max(1, -(-len(train) // room))]]))


# --- what the decoder reads back --------------------------------------------------------------------------------------


def read_back(model: Judged, items: Tensor) -> dict[str, dict[str, Any]]:
    """Per column: loss, score, inferred, majority and the name of their metric."""
    slots: list[BagSlot | DenseSlot] = [*model.layout.bags, *model.layout.dense]
    whole, hidden = ({slot.name: _Tally(slot, model) for slot in slots} for _ in range(2))
    for part in torch.split(items, CHUNK):
        dense, indices, _, lengths = model.table.clean(part)
        full = model.decoder(embed(model, part))
        for slot in slots:
            truth = _multi_hot(model, slot, indices, lengths) if isinstance(slot, BagSlot) else dense
            whole[slot.name].add(_answers(model, slot, full), truth)
            hidden[slot.name].add(_answers(model, slot, model.decoder(embed(model, part, slot.name))), truth)
    constant = constant_losses(model.layout, model.marginals)
    out: dict[str, dict[str, Any]] = {}
    for slot in slots:
        metric, score, majority = whole[slot.name].score()
        out[slot.name] = {
            "kind": slot.kind,
            "metric": metric,
            "loss": whole[slot.name].loss / len(items) / max(constant[slot.name], 1e-6),
            "score": score,
            "inferred": hidden[slot.name].score()[1],
            "majority": majority,
        }
    return out


def embed(model: Judged, items: Tensor, without: str | None = None) -> Tensor:
    """(B, dim), with the column `without` missing in all of them."""
    bags = items[:, None].repeat(1, model.table.bag_count)
    dense = items[:, None].repeat(1, model.table.dense_slots)
    for names, source in (([s.name for s in model.layout.bags], bags), ([s.name for s in model.layout.dense], dense)):
        if without in names:
            source[:, names.index(without)] = model.table.all_missing
    vectors: Tensor = model.encoder(*model.table.gather(bags, dense))
    return vectors


def _answers(model: Judged, slot: BagSlot | DenseSlot, hidden: Tensor) -> Tensor:
    if isinstance(slot, DenseSlot):
        return model.decoder.dense(hidden)
    return model.decoder.rows(hidden, slice(slot.base, slot.base + slot.rows))


def _multi_hot(model: Judged, slot: BagSlot, indices: Tensor, lengths: Tensor) -> Tensor:
    bag = torch.repeat_interleave(torch.arange(lengths.numel()), lengths.reshape(-1))
    mine = bag % lengths.shape[1] == model.layout.bags.index(slot)
    truth = torch.zeros(len(lengths), slot.rows)
    truth[bag[mine] // lengths.shape[1], indices[mine] - slot.base] = 1.0
    return truth


class _Tally:
    """Adds up what a column's metric needs, chunk by chunk."""

    def __init__(self, slot: BagSlot | DenseSlot, model: Judged) -> None:
        self.slot, self.loss = slot, 0.0
        self.n = self.right = self.guessed = self.there = 0.0
        self.majority_right = self.majority_guessed = 0.0
        if isinstance(slot, BagSlot):
            self.share = model.marginals.count[slot.base : slot.base + slot.rows] / max(model.marginals.n, 1)
        else:
            self.centre = model.marginals.centre[slot.start]

    def add(self, answer: Tensor, truth: Tensor) -> None:
        kind = self.slot.kind
        if isinstance(self.slot, DenseSlot):
            self._dense(answer, truth, self.slot)
        elif kind == "nominal":
            self._nominal(answer, truth)
        elif kind == "ordinal":
            self._ordinal(answer, truth)
        else:
            self._multi(answer, truth)

    def score(self) -> tuple[str, float | None, float | None]:
        """The metric's name, the answer's score, the majority's; None where no row has the column."""
        if isinstance(self.slot, DenseSlot):
            right, usual = self.there - self.right, self.there - self.majority_right
            return "R2", _ratio(right, self.there), _ratio(usual, self.there)
        if self.slot.kind == "nominal":
            return "accuracy", _ratio(self.right, self.n), _ratio(self.majority_right, self.n)
        if self.slot.kind == "ordinal":
            return "mean error in steps", _ratio(self.right, self.n), _ratio(self.majority_right, self.n)
        f1 = _ratio(2 * self.right, self.guessed + self.there)
        return "micro-F1", f1, _ratio(2 * self.majority_right, self.majority_guessed + self.there)

    def _nominal(self, answer: Tensor, truth: Tensor) -> None:
        label = truth.argmax(1)
        self.loss += float(losses.nominal(answer, label).sum())
        known = label != MISSING  # which label, given that there is one
        answer, usual = answer.clone(), self.share.clone()
        answer[:, MISSING], usual[MISSING] = -math.inf, -math.inf
        self.n += int(known.sum())
        self.right += int((answer.argmax(1) == label)[known].sum())
        self.majority_right += int((label == usual.argmax())[known].sum())

    def _multi(self, answer: Tensor, truth: Tensor) -> None:
        self.loss += float(losses.multi(answer, truth).sum())
        known, named, usual = truth.clone(), answer > 0, self.share > 0.5
        known[:, :FIRST], named[:, :FIRST], usual[:FIRST] = 0.0, False, False  # labels that can be named
        self.there += float(known.sum())
        self.right += float(known[named].sum())
        self.guessed += float(named.sum())
        self.majority_right += float(known[:, usual].sum())
        self.majority_guessed += float(usual.sum()) * len(truth)

    def _ordinal(self, answer: Tensor, truth: Tensor) -> None:
        self.loss += float(ordinal_loss(answer, truth).sum())
        rank = truth[:, FIRST:].sum(1) - 1
        known = rank >= 0
        usual = float((self.share[FIRST + 1 :] / self.share[FIRST].clamp(min=1e-9) > 0.5).sum())
        self.n += int(known.sum())
        self.right += float(((answer[:, FIRST + 1 :] > 0).sum(1) - rank)[known].abs().sum())
        self.majority_right += float((usual - rank)[known].abs().sum())

    def _dense(self, answer: Tensor, truth: Tensor, slot: DenseSlot) -> None:
        self.loss += float(dense_loss(slot, answer, truth).sum())
        present = truth[:, slot.flag] == 0
        value = truth[present, slot.start].double()
        # Standardised over the training rows: the spread around 0 is the variance that R2 is a share of.
        self.there += float((value**2).sum())
        self.right += float(((answer[present, slot.start] - value) ** 2).sum())
        self.majority_right += float(((self.centre - value) ** 2).sum())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


# --- whether neighbors share what was hidden --------------------------------------------------------------------------


def truth_of(layout: Layout, table: EncodedTable) -> dict[str, sp.csr_matrix]:
    """Per column of labels (n, labels): who has which. The judge of retrieval, also of a model with another
    vocabulary."""
    return {
        slot.name: one_hot(table, f, slot)[:, FIRST:]
        for f, slot in enumerate(layout.bags)
        if slot.kind in {"nominal", "multi"}
    }


def one_hot(table: EncodedTable, f: int, slot: BagSlot) -> sp.csr_matrix:
    """(n, rows) of one bag column."""
    starts = table.starts[f :: table.bag_count][: table.n].numpy()
    ends = table.starts[f + 1 :: table.bag_count][: table.n].numpy()
    lengths = ends - starts
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    at = np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])
    rows = table.rows.numpy()[at] - slot.base
    return sp.csr_matrix((np.ones(len(rows), np.float32), rows, bounds), shape=(table.n, slot.rows))


def retrieve(
    model: Judged, items: Tensor, queries: int, truth: Mapping[str, sp.csr_matrix], baselines: bool = True
) -> tuple[dict[str, Any], Floats]:
    """Precision@10 per hidden column, for the first `queries` of `items` among all of them; and its mean per query."""
    columns = [slot.name for slot in model.layout.bags if slot.name in truth][:RETRIEVAL_COLUMNS]
    dim = model.encoder.config.dim
    pca = {}
    if baselines:
        blocks = _blocks(model, items)
        pca = {
            "pca": ColumnPCA(blocks, unit_variance=False),
            "pca_unit_variance": ColumnPCA(blocks, unit_variance=True),
        }
    out: dict[str, dict[str, float]] = {}
    by_item: list[Floats] = []
    for name in columns:
        labels = truth[name][items.numpy()]
        asked = np.flatnonzero(np.asarray(labels[:queries].sum(1)).ravel() > 0)
        if len(asked) == 0 or len(items) <= K:
            continue
        shares = (labels[asked] @ labels.T).toarray() > 0  # (queries, items)
        shares[np.arange(len(asked)), asked] = False
        vectors = np.concatenate([embed(model, part, name).numpy() for part in torch.split(items, CHUNK)])
        precision = _precision(vectors, asked, shares)
        out[name] = {
            "precision": _mean(precision) or 0.0,
            "base_rate": float(shares.sum() / (len(asked) * (len(items) - 1))),
        }
        out[name] |= {
            key: _mean(_precision(_unit(p.embedding(dim, name)), asked, shares)) or 0.0 for key, p in pca.items()
        }
        row = np.full(queries, np.nan, np.float32)
        row[asked] = precision
        by_item.append(row)
    keys = ["precision", "base_rate", *pca]
    mean = {key: float(np.mean([column[key] for column in out.values()])) for key in keys} if out else {}
    counted = np.stack(by_item) if by_item else np.zeros((1, queries), np.float32)
    there = ~np.isnan(counted)
    per_item = np.where(there, counted, 0).sum(0) / np.maximum(there.sum(0), 1)
    return {"k": K, "columns": out, "mean": mean}, per_item.astype(np.float32)


def _precision(vectors: Floats, queries: npt.NDArray[np.int64], shares: npt.NDArray[np.bool_]) -> Floats:
    items, asked = torch.from_numpy(vectors), torch.from_numpy(queries)
    scores = items[asked] @ items.T
    scores[torch.arange(len(asked)), asked] = -torch.inf
    precision: Floats = torch.from_numpy(shares).gather(1, scores.topk(K, dim=1).indices).float().mean(1).numpy()
    return precision


def _blocks(model: Judged, items: Tensor) -> dict[str, Any]:
    blocks: dict[str, Any] = {
        slot.name: one_hot(model.table, f, slot)[items.numpy()] for f, slot in enumerate(model.layout.bags)
    }
    dense = model.table.dense[items].numpy()
    return blocks | {slot.name: dense[:, slot.start : slot.start + slot.width] for slot in model.layout.dense}


def _unit(vectors: Floats) -> Floats:
    scaled: Floats = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled


# --- the space itself -------------------------------------------------------------------------------------------------


def space(model: Judged, items: Tensor) -> dict[str, float]:
    centred = torch.cat(
        [model.encoder.uncentred(*model.table.clean(part)) - model.encoder.mean for part in torch.split(items, CHUNK)]
    )
    norm = centred.norm(dim=1)
    unit = functional.normalize(centred, dim=1)
    n = len(unit)
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


def _only_unseen(model: Judged, items: Tensor) -> dict[str, npt.NDArray[np.bool_]]:
    """Per column of labels (n,): whether the item has labels there, and training knew none of them."""
    starts = model.table.starts
    lengths = starts.diff().view(-1, model.table.bag_count)[items]
    first = model.table.rows[starts[:-1].view(-1, model.table.bag_count)[items]]
    return {
        slot.name: ((lengths[:, f] == 1) & (first[:, f] == slot.base + OOV)).numpy()
        for f, slot in enumerate(model.layout.bags)
        if slot.kind != "text"
    }


def _mean(values: Iterable[float] | Floats) -> float | None:
    array = np.asarray(list(values), np.float64)
    return float(array.mean()) if len(array) else None
