"""Bag columns: values of labels and words -> rows of the embedding table that all of them share.

Rows are counted from the column's own base. A column is fitted once, and total ever after: each value becomes a bag of
one row or more.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa

from itemvec.check import flat_labels
from itemvec.notes import Notes
from itemvec.schema import AnyFeature, Multi, Nominal, Ordinal, Text
from itemvec.values import PYTHON_TYPES, canonical, hashed
from itemvec.vocabulary import FIRST, MISSING, OOV, Vocabulary


@dataclass(frozen=True, slots=True)
class Bags:
    """The bags of one column for n values."""

    rows: list[int]
    """(nnz,) value by value"""
    lengths: list[int]
    """(n,)"""
    weights: list[float]
    """(n,) what each row of a bag counts in the bag's sum"""


class BagColumn(ABC):
    """A column whose values become a few rows of the shared table each."""

    feature: AnyFeature

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows of the table are this column's."""

    @abstractmethod
    def encode(self, values: Sequence[Any], notes: Notes) -> Bags: ...

    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON; a vocabulary's labels aside."""
        return {}


class LabelColumn(BagColumn):
    """A column with a vocabulary."""

    feature: Nominal | Multi

    def __init__(self, feature: Nominal | Multi, vocabulary: Vocabulary) -> None:
        self.feature = feature
        self.vocabulary = vocabulary

    @classmethod
    def fit(cls, feature: Nominal | Multi, column: pa.ChunkedArray) -> "LabelColumn":
        labels = flat_labels(column, feature) if isinstance(feature, Multi) else column
        fitted = Vocabulary.fit(
            labels, feature.min_count, feature.max_labels, feature.labels, hash_buckets=feature.hash_buckets
        )
        return cls(feature, fitted)

    @property
    def rows(self) -> int:
        return self.vocabulary.rows

    def state(self) -> dict[str, Any]:
        return {"filled": self.vocabulary.filled}


def _is_label(value: Any, dtype: str) -> bool:
    return type(value) is PYTHON_TYPES[dtype]


class NominalColumn(LabelColumn):
    """One label, one row."""

    def encode(self, values: Sequence[Any], notes: Notes) -> Bags:
        name, dtype, row_of, shared = self.feature.name, self.feature.dtype, self.vocabulary.row, self.vocabulary.shared
        rows = []
        for i, value in enumerate(values):
            row = MISSING
            if _is_label(value, dtype):
                row = row_of(value)
            elif value is not None:
                notes.wrong(i, name, f"a label ({dtype})", value)
            if not FIRST <= row < shared:
                notes.statuses[i][name] = "missing" if row == MISSING else "oov"
            rows.append(row)
        return Bags(rows, [1] * len(rows), [1.0] * len(rows))


class MultiColumn(LabelColumn):
    """A set of n labels: n rows, each counting 1/sqrt(n), so that a long cast does not outweigh all else.

    A set without labels says nothing and is missing. Rows are sorted: the order of a set must not move a single bit.
    """

    feature: Multi

    def encode(self, values: Sequence[Any], notes: Notes) -> Bags:
        name, separator, shared = self.feature.name, self.feature.separator, self.vocabulary.shared
        rows: list[int] = []
        lengths, weights = [], []
        for i, value in enumerate(values):
            bag: list[int] = []
            if isinstance(value, list | tuple | set | frozenset):
                bag = self._bag(value, i, notes)
            elif separator is not None and isinstance(value, str):
                bag = self._bag(value.split(separator), i, notes)
            elif value is not None:
                notes.wrong(i, name, f"a list of labels ({self.feature.dtype})", value)
            if not bag:
                bag = [MISSING]
                notes.statuses[i][name] = "missing"
            elif bag[0] == OOV or bag[-1] >= shared:
                known = any(FIRST <= row < shared for row in bag)
                notes.statuses[i][name] = "partly_oov" if known else "oov"
            rows += bag
            lengths.append(len(bag))
            weights.append(1.0 / math.sqrt(len(bag)))
        return Bags(rows, lengths, weights)

    def _bag(self, labels: Iterable[Any], i: int, notes: Notes) -> list[int]:
        dtype, row_of = self.feature.dtype, self.vocabulary.row
        bag = set()
        for at, label in enumerate(labels):
            if _is_label(label, dtype):
                bag.add(row_of(label))
            elif label is not None:
                notes.wrong(i, self.feature.name, f"a label ({dtype})", label, at)
                break  # the item is refused anyway: one error a column bounds what a hostile body can make us say
        bag.discard(MISSING)
        return sorted(bag)


class OrdinalColumn(BagColumn):
    """The r-th label of an order is the sum of its first r rows (a thermometer): each row is a step to the next."""

    def __init__(self, feature: Ordinal) -> None:
        self.feature: Ordinal = feature
        self._ranks = {(type(label), canonical(label)): rank for rank, label in enumerate(feature.order, 1)}
        self._types = tuple({type(label) for label in feature.order})

    @classmethod
    def fit(cls, feature: Ordinal, column: pa.ChunkedArray) -> "OrdinalColumn":
        return cls(feature)

    @property
    def rows(self) -> int:
        return FIRST + len(self.feature.order)

    def encode(self, values: Sequence[Any], notes: Notes) -> Bags:
        name = self.feature.name
        weight = 1.0 / math.sqrt(len(self.feature.order))
        rows: list[int] = []
        lengths, weights = [], []
        for i, value in enumerate(values):
            rank = 0
            label = canonical(value)
            if label is not None and type(label) in self._types:
                rank = self._ranks.get((type(label), label), 0)
            elif label is not None:
                notes.wrong(i, name, "one of the ordered labels", value)
                label = None
            if rank:
                rows += range(FIRST, FIRST + rank)
            else:
                rows.append(MISSING if label is None else OOV)
                notes.statuses[i][name] = "missing" if label is None else "oov"
            lengths.append(rank or 1)
            weights.append(weight if rank else 1.0)
        return Bags(rows, lengths, weights)


class TextColumn(BagColumn):
    """A text is the set of its word and character n-grams, each hashed into a row; n of them count 1/sqrt(n)."""

    def __init__(self, feature: Text) -> None:
        self.feature: Text = feature

    @classmethod
    def fit(cls, feature: Text, column: pa.ChunkedArray) -> "TextColumn":
        return cls(feature)

    @property
    def rows(self) -> int:
        return FIRST + self.feature.buckets

    def encode(self, values: Sequence[Any], notes: Notes) -> Bags:
        name = self.feature.name
        rows: list[int] = []
        lengths, weights = [], []
        for i, value in enumerate(values):
            bag: set[int] = set()
            if isinstance(value, str):
                bag = self._bag(value)
            elif value is not None:
                notes.wrong(i, name, "text", value)
            if not bag:
                bag = {MISSING}
                notes.statuses[i][name] = "missing"
            rows += sorted(bag)
            lengths.append(len(bag))
            weights.append(1.0 / math.sqrt(len(bag)))
        return Bags(rows, lengths, weights)

    def _bag(self, text: str) -> set[int]:
        setting = self.feature
        words = (canonical(text[: setting.max_characters]) or "").casefold().split()
        bag: set[int] = set()
        for word in words:
            if setting.characters is not None:
                bag.update(_character_rows(word, *setting.characters, setting.buckets))
        for n in range(1, setting.words + 1):
            bag.update(FIRST + hashed(" ".join(words[j : j + n]), setting.buckets) for j in range(len(words) - n + 1))
        return bag


@lru_cache(maxsize=65_536)
def _character_rows(word: str, shortest: int, longest: int, buckets: int) -> tuple[int, ...]:
    marked = f"<{word}>"
    grams = {marked[j : j + n] for n in range(shortest, longest + 1) for j in range(len(marked) - n + 1)}
    # \x00: a character n-gram is not the word it spells
    return tuple({FIRST + hashed(f"\x00{gram}", buckets) for gram in grams})
