"""What an embedding says of its item: the most likely value of each column, read back by the model's decoder.

The heads are those that training had: a nominal column is a choice among its rows (softmax), a label of a set is there
or not (sigmoid each), an ordinal column answers "is it above this label?" label by label, and a dense one gives its
scaled floats. Text that was hashed has no words left to read, so those columns are not in the answer.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from itemvec.features import FIRST, MISSING, BagSlot
from itemvec.version import ModelVersion

SCORES = 1 << 22
"""Scores that are computed at once: 16 MB."""

LIKELY = 0.5
"""From this probability on a label belongs to the set that is answered."""

LARGEST_SET = 100


def decode(version: ModelVersion, vectors: npt.NDArray[np.float32], top: int) -> list[dict[str, dict[str, Any]]]:
    """(n, dim) unit vectors -> for each its columns: `value`, `missing` (the probability that there is none), and for
    labels the `top` most likely `candidates`, best first, with their probabilities where it is not missing."""
    answers: list[dict[str, dict[str, Any]]] = [{} for _ in vectors]
    step = max(1, SCORES // max(version.transform.layout.table_rows, 1))
    with torch.inference_mode():
        for start in range(0, len(vectors), step):
            hidden = version.decoder(torch.from_numpy(np.ascontiguousarray(vectors[start : start + step])))
            _read_labels(version, hidden, top, answers[start : start + step])
            _read_dense(version, hidden, answers[start : start + step])
    names = [feature.name for feature in version.schema.features]
    return [{name: answer[name] for name in names if name in answer} for answer in answers]


def _read_labels(version: ModelVersion, hidden: Tensor, top: int, answers: Sequence[dict[str, dict[str, Any]]]) -> None:
    for slot in version.transform.layout.bags:
        if slot.kind == "text":
            continue
        labels = _labels(version, slot)
        missing, chances = _chances(slot, version.decoder.rows(hidden, slice(slot.base, slot.base + slot.rows)))
        count = max(top, LARGEST_SET) if slot.kind == "multi" else top
        best = chances[:, : len(labels)].topk(min(count, len(labels)))  # after the labels come rows that labels share
        for answer, absent, likely, places in zip(
            answers, missing.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
        ):
            candidates = [
                {"value": labels[place], "probability": chance} for place, chance in zip(places, likely, strict=True)
            ]
            value: Any = candidates[0]["value"] if candidates else None
            if slot.kind == "multi":
                value = [one["value"] for one in candidates if one["probability"] >= LIKELY]
            answer[slot.name] = {"value": value, "missing": absent, "candidates": candidates[:top]}


def _chances(slot: BagSlot, scores: Tensor) -> tuple[Tensor, Tensor]:
    """(n, rows) -> (n,) that the column is missing, (n, rows - FIRST) of each label where it is not"""
    if slot.kind == "nominal":
        missing = scores.softmax(1)[:, MISSING]
        there = scores.clone()
        there[:, MISSING] = -torch.inf
        return missing, there.softmax(1)[:, FIRST:]
    chance = scores.sigmoid()
    if slot.kind != "ordinal":
        return chance[:, MISSING], chance[:, FIRST:]
    # Above label j, for the first K - 1 labels; above a later one is never likelier than above an earlier one.
    above = chance[:, FIRST + 1 :].cummin(1).values
    ends = above.new_ones(len(above), 1), above.new_zeros(len(above), 1)
    return chance[:, MISSING], torch.cat([ends[0], above], 1) - torch.cat([above, ends[1]], 1)


def _labels(version: ModelVersion, slot: BagSlot) -> Sequence[Any]:
    """The labels of the slot's rows, in their order from row FIRST on."""
    column: Any = version.transform.column(slot.name)
    return column.feature.order if slot.kind == "ordinal" else column.vocabulary.labels  # type: ignore[no-any-return]


def _read_dense(version: ModelVersion, hidden: Tensor, answers: Sequence[dict[str, dict[str, Any]]]) -> None:
    floats = version.decoder.dense(hidden)
    for slot in version.transform.layout.dense:
        column: Any = version.transform.column(slot.name)
        read = floats[:, slot.start : slot.start + slot.targets].numpy()
        missing = floats[:, slot.flag].sigmoid().tolist()
        for answer, row, absent in zip(answers, read, missing, strict=True):
            if (value := column.decode(row)) is not None:
                answer[slot.name] = {"value": value, "missing": absent}
