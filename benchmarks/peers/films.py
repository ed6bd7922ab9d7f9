"""What all peers share: the request of the examples' films, and the encoder."""

import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel

from itemvec.bags import MultiColumn, NominalColumn
from itemvec.features import FIRST, MISSING, OOV, Batch
from itemvec.notes import Notes
from itemvec.version import ModelVersion


class Film(BaseModel):
    title: str | None = None
    release_year: int | None = None
    age_rating: str | None = None
    runtime_minutes: float | None = None
    genres: list[str] | None = None
    directors: list[str] | None = None
    writers: list[str] | None = None
    cast: list[str] | None = None
    languages: list[str] | None = None
    countries: list[str] | None = None
    studios: list[str] | None = None


class Films(BaseModel):
    input: list[Film]


class Encoder:
    """The version of the variable VERSION, which a server's workers inherit; `Plain` where ENCODER is `plain`."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self._version = ModelVersion.load(Path(os.environ["VERSION"]))
        self._names = [feature.name for feature in self._version.schema.features]
        self._plain = Plain(self._version) if os.environ.get("ENCODER") == "plain" else None

    def encode(self, films: list[Film]) -> list[list[float]]:
        items = [{name: film[name] for name in self._names} for film in map(vars, films)]
        vectors = self._plain(items) if self._plain else self._version.encode(items).vectors
        rows: list[list[float]] = vectors.tolist()
        return rows


class Plain:
    """The same vectors as one gets them in an afternoon: labels from a dict one by one, and the layers run by torch.

    Of nominal, multi, text and dense columns without hash buckets or separators, and labels in canonical form.
    """

    def __init__(self, version: ModelVersion) -> None:
        self._encoder, transform = version.encoder, version.transform
        self._bags = [(slot.name, _bag_of(slot.base, transform.column(slot.name))) for slot in transform.layout.bags]
        self._dense = [(slot.name, transform.column(slot.name)) for slot in transform.layout.dense]

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> npt.NDArray[np.float32]:
        """(n, dim)"""
        bags = [bag(item[name]) for item in items for name, bag in self._bags]
        lengths = np.array([len(bag) for bag in bags], np.int32)
        rows = np.array([row for bag in bags for row in bag], np.int64)
        notes = Notes(len(items), [name for name, _ in self._dense], "")
        dense = [column.encode([item[name] for item in items], notes) for name, column in self._dense]
        weights = np.repeat(1.0 / np.sqrt(lengths.astype(np.float32)), lengths)
        numbers = np.concatenate([*dense, np.zeros((len(items), 0), np.float32)], 1)
        return self._encoder.encode(Batch(numbers, rows, weights, lengths.reshape(len(items), len(self._bags))))


def _bag_of(base: int, column: Any) -> Callable[[Any], Collection[int]]:
    """What gives the rows of the shared table that a value has."""
    feature = column.feature
    if feature.kind == "ordinal" or getattr(feature, "hash_buckets", 0) or getattr(feature, "separator", None):
        raise ValueError(f"the plain encoder does not know columns such as {feature.name!r}")
    if not isinstance(column, NominalColumn | MultiColumn):
        return lambda value: [base + row for row in column.bag(value, 0, Notes(1, [], ""))]
    rows = {label: row for row, label in enumerate(column.vocabulary.labels, base + FIRST)}
    unknown, missing = base + OOV, [base + MISSING]
    if isinstance(column, NominalColumn):
        return lambda label: missing if label is None else [rows.get(label, unknown)]
    return lambda labels: {rows.get(label, unknown) for label in labels} if labels else missing


def arguments() -> int:
    """The port; leaves the folder in the environment."""
    port, os.environ["VERSION"] = sys.argv[1:3]
    return int(port)


def workers() -> int:
    """Processes that encode."""
    return int(os.environ["WORKERS"])
