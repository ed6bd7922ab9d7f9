"""How well the columns of items can be read back from their embeddings, and from what else could answer."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from itemvec.features import FIRST, MISSING, BagSlot, DenseSlot
from training import losses
from training.baselines import Recalled
from training.judged import Floats, Judged, Rows, Views, floats_of, one_hot, plain_blocks
from training.objectives import constant_losses, dense_loss, ordinal_loss

CELLS = 8_000_000
"""Scores of a column held at once: few items where there are a million labels."""


def read_back(views: Views, measured: int, fitted_on: Rows | None = None) -> dict[str, dict[str, Any]]:
    """Per column, over the first `measured` items of `views`: the metric's name; its `score`, and `inferred` with the
    column hidden; `majority`, the best constant answer; `pca`, principal components of the same dim fitted on the
    items `fitted_on`; and the decoder's loss against the constant's. None where no item has the column.

    Sets also have `r_precision` with the same four: of the labels that are scored highest, as many as the item has, the
    share that it has (Manning et al. 2008). Where labels are many and rare no single one reaches a probability of one
    half, so micro-F1 is near 0 however well they are ranked.
    """
    model, items = views.model, views.items[:measured]
    answerers: dict[str, Any] = {
        "score": _Decoder(model, views.whole[:measured]),
        "majority": _Majority(model),
    }
    if fitted_on is not None:
        answerers["pca"] = _Components(model, fitted_on, items)
    constant = constant_losses(model.layout, model.marginals)
    out: dict[str, dict[str, Any]] = {}
    for slot in model.slots:
        answerers["inferred"] = _Decoder(model, views.without(slot.name)[:measured])
        tallies = {name: _Tally(slot) for name in answerers}
        loss = 0.0
        for part in _parts(slot, measured):
            truth = _truth(model, slot, items[part])
            for name, answerer in answerers.items():
                answer = answerer(slot, part)
                tallies[name].add(answer, truth)
                if name == "score":
                    loss += float(_losses(slot, answer, truth).sum())
        out[slot.name] = {
            "kind": slot.kind,
            "metric": _METRICS.get(slot.kind, "R2" if isinstance(slot, DenseSlot) else "micro-F1"),
            "loss": loss / measured / max(constant[slot.name], 1e-6),
            **{name: tally.score() for name, tally in tallies.items()},
        }
        if slot.kind in SETS:
            out[slot.name]["r_precision"] = {name: tally.r_precision() for name, tally in tallies.items()}
    return out


def prefix_losses(views: Views, measured: int, sizes: Sequence[int]) -> dict[int, float]:
    """Per size, what the decoder makes of so many first numbers when the others are 0: over the first `measured` items,
    the mean over the columns of its loss against the constant's."""
    model, dim = views.model, views.model.encoder.config.dim
    items, constant = views.items[:measured], constant_losses(model.layout, model.marginals)
    found = {}
    for size in sizes:
        kept = functional.normalize(views.whole[:measured, :size], dim=1)
        answerer = _Decoder(model, functional.pad(kept, (0, dim - size)))
        losses_of = []
        for slot in model.slots:
            loss = sum(
                float(_losses(slot, answerer(slot, part), _truth(model, slot, items[part])).sum())
                for part in _parts(slot, measured)
            )
            losses_of.append(loss / measured / max(constant[slot.name], 1e-6))
        found[size] = float(np.mean(losses_of))
    return found


def _parts(slot: BagSlot | DenseSlot, measured: int) -> Iterator[slice]:
    """The measured items, as many at once as the column allows."""
    at_once = max(1, CELLS // (slot.rows if isinstance(slot, BagSlot) else slot.width))
    for start in range(0, measured, at_once):
        yield slice(start, min(start + at_once, measured))


SETS = frozenset({"multi", "text"})
_METRICS = {"nominal": "accuracy", "ordinal": "mean error in steps"}


def _truth(model: Judged, slot: BagSlot | DenseSlot, items: Rows) -> Tensor:
    if isinstance(slot, BagSlot):
        return torch.from_numpy(one_hot(model, slot, items).toarray())
    return torch.from_numpy(floats_of(model, slot, items))


def _losses(slot: BagSlot | DenseSlot, answer: Tensor, truth: Tensor) -> Tensor:
    if isinstance(slot, DenseSlot):
        return dense_loss(replace(slot, start=0), answer, truth)
    if slot.kind == "nominal":
        return losses.nominal(answer, truth.argmax(1))
    return ordinal_loss(answer, truth) if slot.kind == "ordinal" else losses.multi(answer, truth)


# Who answers: (slot, which of the measured items) -> a number for each of the column's rows, above 0 for yes; or the
# column's floats.


class _Decoder:
    def __init__(self, model: Judged, embeddings: Tensor) -> None:
        self._decoder, self._hidden = model.decoder, model.decoder(embeddings)

    def __call__(self, slot: BagSlot | DenseSlot, part: slice) -> Tensor:
        if isinstance(slot, DenseSlot):
            return self._decoder.dense(self._hidden[part])[:, slot.start : slot.start + slot.width]
        return self._decoder.rows(self._hidden[part], slice(slot.base, slot.base + slot.rows))


class _Majority:
    """The most frequent label; the labels that most items have; the middle number."""

    def __init__(self, model: Judged) -> None:
        self._marginals = model.marginals

    def __call__(self, slot: BagSlot | DenseSlot, part: slice) -> Tensor:
        if isinstance(slot, DenseSlot):
            constant = self._marginals.centre[slot.start : slot.start + slot.width]
        else:
            count = self._marginals.count[slot.base : slot.base + slot.rows]
            there = count[FIRST] if slot.kind == "ordinal" else self._marginals.n  # all that have a rank have step one
            constant = count / max(there, 1) - 0.5
        return constant.expand(part.stop - part.start, -1)


class _Components:
    def __init__(self, model: Judged, fitted_on: Rows, items: Rows) -> None:
        self._recalled = Recalled.fit(plain_blocks(model, fitted_on), model.encoder.config.dim)
        self._codes = self._recalled.codes(plain_blocks(model, items))

    def __call__(self, slot: BagSlot | DenseSlot, part: slice) -> Tensor:
        answer: Floats = self._recalled.column(self._codes[part], slot.name)
        return torch.from_numpy(answer) - (0.5 if isinstance(slot, BagSlot) else 0.0)


class _Tally:
    """Adds up what a column's metric needs, part by part."""

    def __init__(self, slot: BagSlot | DenseSlot) -> None:
        self._slot = slot
        self._n = self._right = self._guessed = self._there = 0.0
        self._precision, self._sets = 0.0, 0
        self._sum, self._squares = np.zeros(1), np.zeros(1)

    def add(self, answer: Tensor, truth: Tensor) -> None:
        if isinstance(self._slot, DenseSlot):
            self._numbers(answer, truth, self._slot)
        elif self._slot.kind == "nominal":
            self._nominal(answer, truth)
        elif self._slot.kind == "ordinal":
            self._ordinal(answer, truth)
        else:
            self._set(answer[:, FIRST:], truth[:, FIRST:])

    def score(self) -> float | None:
        if isinstance(self._slot, DenseSlot):
            spread = float((self._squares - self._sum**2 / max(self._n, 1)).sum())
            return 1 - self._right / spread if spread > 1e-9 else None
        if self._slot.kind in SETS:
            return _ratio(2 * self._right, self._guessed + self._there)
        return _ratio(self._right, self._n)

    def r_precision(self) -> float | None:
        return _ratio(self._precision, self._sets)

    def _nominal(self, answer: Tensor, truth: Tensor) -> None:
        label = truth.argmax(1)
        known = label != MISSING  # which label, given that there is one
        answer = answer.clone()
        answer[:, MISSING] = -math.inf
        self._n += int(known.sum())
        self._right += int((answer.argmax(1) == label)[known].sum())

    def _ordinal(self, answer: Tensor, truth: Tensor) -> None:
        rank = truth[:, FIRST:].sum(1) - 1
        known = rank >= 0
        self._n += int(known.sum())
        self._right += float(((answer[:, FIRST + 1 :] > 0).sum(1) - rank)[known].abs().sum())

    def _set(self, answer: Tensor, truth: Tensor) -> None:
        named = answer > 0
        self._there += float(truth.sum())
        self._right += float(truth[named].sum())
        self._guessed += float(named.sum())
        has = truth.sum(1).long()
        if len(has) and int(has.max()):
            best = answer.topk(int(has.max()), dim=1).indices
            hits = truth.gather(1, best) * (torch.arange(best.shape[1]) < has[:, None])
            self._precision += float((hits.sum(1) / has.clamp(min=1)).sum())
            self._sets += int((has > 0).sum())

    def _numbers(self, answer: Tensor, truth: Tensor, slot: DenseSlot) -> None:
        present = truth[:, slot.width - 1] == 0
        value = truth[present, : slot.targets].double().numpy()
        self._n += len(value)
        self._sum = self._sum + value.sum(0)
        self._squares = self._squares + (value**2).sum(0)
        self._right += float(((answer[present, : slot.targets].numpy() - value) ** 2).sum())


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
