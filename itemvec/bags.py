"""Bag columns: values of labels and words -> rows of the embedding table that all of them share.

Rows are counted from the column's own base. A column is fitted once, and total ever after: each value becomes a bag of
one row or more. `bag` says what one value becomes; `bags` gives the same for a column of values, without a call each.
"""

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, compress, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.check import label_counts
from itemvec.notes import Notes
from itemvec.schema import AnyFeature, Multi, Nominal, Ordinal, Text
from itemvec.values import PYTHON_TYPES, all_hashed, canonical, hashed
from itemvec.vocabulary import FIRST, MISSING, OOV, Ints, Vocabulary

EMPTY = 4
"""Empty places that the table of a batch of sets may have for each row in it, beyond SHORT places for each set. As a
table, set under set, they are sorted twenty times as fast as otherwise; not where one is far longer than the rest."""

SHORT = 64

NOTHING = np.iinfo(np.int64).max
"""In an empty place: behind every row."""


@dataclass(frozen=True, slots=True)
class Bags:
    """The bags of one column for n values."""

    rows: Ints
    """(nnz,) value by value, ascending within a bag"""
    lengths: Ints
    """(n,)"""
    weights: npt.NDArray[np.float64]
    """(n,) what each row of a bag counts in the bag's sum"""


class BagColumn(ABC):
    """A column whose values become a few rows of the shared table each."""

    feature: AnyFeature

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows of the table are this column's."""

    @abstractmethod
    def bag(self, value: Any, i: int, notes: Notes) -> tuple[list[int], float]:
        """Its rows, ascending, and what each of them counts; `i` is the item's place in the notes."""

    def bags(self, values: Sequence[Any], notes: Notes) -> Bags:
        """The bags of all values, in as few calls as there can be."""
        bags = [self.bag(value, i, notes) for i, value in enumerate(values)]
        rows = np.fromiter(chain.from_iterable(rows for rows, _ in bags), np.int64)
        return Bags(rows, np.array([len(rows) for rows, _ in bags], np.int64), np.array([weight for _, weight in bags]))

    def arrow_bags(self, column: pa.ChunkedArray, notes: Notes) -> Bags | None:
        """The same of an Arrow column that need not become Python values; None where it has to."""
        return None

    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON; a vocabulary's labels aside."""
        return {}


class LabelColumn(BagColumn):
    """A column with a vocabulary."""

    feature: Nominal | Multi

    def __init__(self, feature: Nominal | Multi, vocabulary: Vocabulary) -> None:
        self.feature = feature
        self.vocabulary = vocabulary
        self._type: Any = PYTHON_TYPES[feature.dtype]

    @classmethod
    def fit(cls, feature: Nominal | Multi, column: pa.ChunkedArray) -> "LabelColumn":
        return cls.of_counts(feature, label_counts(column, feature))

    @classmethod
    def of_counts(cls, feature: Nominal | Multi, counts: pa.Table) -> "LabelColumn":
        """Of a column whose labels are counted (`check.label_counts`)."""
        counted = zip(counts.column("label").to_pylist(), counts.column("count").to_pylist(), strict=True)
        settings = feature.min_count, feature.max_labels, feature.labels, feature.hash_buckets
        return cls(feature, Vocabulary.of_counts(counted, *settings))

    @property
    def rows(self) -> int:
        return self.vocabulary.rows

    def state(self) -> dict[str, Any]:
        return {"filled": self.vocabulary.filled}

    def _are_labels(self, values: Collection[Any]) -> bool:
        """Are they all labels of the column's type, or null?"""
        return set(map(type, values)) <= {self._type, type(None)}

    def _arrow_rows(self, labels: pa.Array) -> Ints | None:
        """(len(labels),) their rows, each label looked up once; None where they are not of the column's type."""
        if not _ARROW_TYPES[self.feature.dtype](labels.type):
            return None
        coded = labels.dictionary_encode()
        try:
            distinct = coded.dictionary.to_pylist()
        except UnicodeDecodeError:
            return None
        rows = np.append(self.vocabulary.rows_of(distinct), MISSING)
        taken: Ints = rows[coded.indices.fill_null(len(rows) - 1).to_numpy()]
        return taken


_ARROW_TYPES = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "integer": pa.types.is_integer,
    "boolean": pa.types.is_boolean,
}


class NominalColumn(LabelColumn):
    """One label, one row."""

    def bag(self, value: Any, i: int, notes: Notes) -> tuple[list[int], float]:
        row = MISSING
        if type(value) is self._type:
            row = self.vocabulary.row(value)
        elif value is not None:
            notes.wrong(i, self.feature.name, f"a label ({self.feature.dtype})", value)
        if not FIRST <= row < self.vocabulary.shared:
            notes.statuses[i][self.feature.name] = "missing" if row == MISSING else "oov"
        return [row], 1.0

    def bags(self, values: Sequence[Any], notes: Notes) -> Bags:
        if not self._are_labels(values):
            return super().bags(values, notes)
        return self._noted(self.vocabulary.rows_of(values), notes)

    def arrow_bags(self, column: pa.ChunkedArray, notes: Notes) -> Bags | None:
        rows = self._arrow_rows(column.combine_chunks())
        return None if rows is None else self._noted(rows, notes)

    def _noted(self, rows: Ints, notes: Notes) -> Bags:
        name = self.feature.name
        notes.mark(name, "missing", rows == MISSING)
        notes.mark(name, "oov", (rows == OOV) | (rows >= self.vocabulary.shared))
        return Bags(rows, np.ones(len(rows), np.int64), np.ones(len(rows)))


class MultiColumn(LabelColumn):
    """A set of n labels: n rows, each counting 1/sqrt(n), so that a long cast does not outweigh all else.

    A set without labels says nothing and is missing. Rows are sorted: the order of a set must not move a single bit.
    """

    feature: Multi

    def bag(self, value: Any, i: int, notes: Notes) -> tuple[list[int], float]:
        name, separator, shared = self.feature.name, self.feature.separator, self.vocabulary.shared
        bag: list[int] = []
        if isinstance(value, list | tuple | set | frozenset):
            bag = self._rows(value, i, notes)
        elif separator is not None and isinstance(value, str):
            bag = self._rows(value.split(separator), i, notes)
        elif value is not None:
            notes.wrong(i, name, f"a list of labels ({self.feature.dtype})", value)
        if not bag:
            notes.statuses[i][name] = "missing"
            return [MISSING], 1.0
        if bag[0] == OOV or bag[-1] >= shared:
            known = any(FIRST <= row < shared for row in bag)
            notes.statuses[i][name] = "partly_oov" if known else "oov"
        return bag, 1.0 / math.sqrt(len(bag))

    def _rows(self, labels: Collection[Any], i: int, notes: Notes) -> list[int]:
        if not self._are_labels(labels):
            at, wrong = next((at, x) for at, x in enumerate(labels) if x is not None and type(x) is not self._type)
            # The item is refused anyway: one error a column bounds what a hostile body can make us say.
            notes.wrong(i, self.feature.name, f"a label ({self.feature.dtype})", wrong, at)
            return []
        bag = self.vocabulary.distinct_rows(labels)
        bag.discard(MISSING)
        return sorted(bag)

    def bags(self, values: Sequence[Any], notes: Notes) -> Bags:
        if separator := self.feature.separator:
            values = [value.split(separator) if type(value) is str else value for value in values]
        if not set(map(type, values)) <= {list, type(None)}:
            return super().bags(values, notes)
        sets = [value or () for value in values]
        labels = list(chain.from_iterable(sets))
        if not self._are_labels(labels):
            return super().bags(values, notes)
        return self._noted(self.vocabulary.rows_of(labels), np.fromiter(map(len, sets), np.int64), notes)

    def arrow_bags(self, column: pa.ChunkedArray, notes: Notes) -> Bags | None:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            return None
        sets = column.combine_chunks()
        rows = self._arrow_rows(sets.flatten())
        if rows is None:
            return None
        return self._noted(rows, pc.list_value_length(sets).fill_null(0).to_numpy().astype(np.int64), notes)

    def _noted(self, rows: Ints, lengths: Ints, notes: Notes) -> Bags:
        bags = _sets([(rows, lengths)])
        strange = (bags.rows == OOV) | (bags.rows >= self.vocabulary.shared)
        count = np.add.reduceat(strange, np.cumsum(bags.lengths) - bags.lengths, dtype=np.int64)
        name = self.feature.name
        notes.mark(name, "missing", _are_missing(bags))
        notes.mark(name, "oov", count == bags.lengths)
        notes.mark(name, "partly_oov", (count > 0) & (count < bags.lengths))
        return bags


def _sets(parts: Sequence[tuple[Ints, Ints]]) -> Bags:
    """(nnz,) rows and (n,) lengths, one or several, of the parts of n sets, in any order and repeated -> each row once,
    ascending; MISSING where there is none."""
    n, width = len(parts[0][1]), 0
    widths = [max(int(lengths.max(initial=0)), 1) for _, lengths in parts]
    if (sum(widths) - SHORT) * n > EMPTY * sum(len(rows) for rows, _ in parts):
        return _uneven_sets(parts)
    table = np.full((n, sum(widths)), NOTHING)
    for (rows, lengths), widest in zip(parts, widths, strict=True):
        table[:, width : width + widest][np.arange(widest) < lengths[:, None]] = rows
        width += widest
    table[table == MISSING] = NOTHING
    table.sort(axis=1)
    table[:, 1:][table[:, 1:] == table[:, :-1]] = NOTHING
    table[:, 0][table[:, 0] == NOTHING] = MISSING
    kept = table != NOTHING
    counts = kept.sum(1)
    return Bags(table[kept], counts, 1.0 / np.sqrt(counts))


def _uneven_sets(parts: Sequence[tuple[Ints, Ints]]) -> Bags:
    split = [np.split(rows, np.cumsum(lengths)[:-1]) for rows, lengths in parts]
    sets = [sorted(set(np.concatenate(mine).tolist()) - {MISSING}) or [MISSING] for mine in zip(*split, strict=True)]
    counts = np.fromiter(map(len, sets), np.int64)
    return Bags(np.fromiter(chain.from_iterable(sets), np.int64), counts, 1.0 / np.sqrt(counts))


def _are_missing(bags: Bags) -> npt.NDArray[np.bool_]:
    """(n,) Are the bags nothing but the row of missing values?"""
    first = bags.rows.take(np.cumsum(bags.lengths) - bags.lengths)
    return np.equal(first, MISSING)


class OrdinalColumn(BagColumn):
    """The r-th label of an order is the sum of its first r rows (a thermometer): each row is a step to the next."""

    def __init__(self, feature: Ordinal) -> None:
        self.feature: Ordinal = feature
        self._ranks = {(type(label), canonical(label)): rank for rank, label in enumerate(feature.order, 1)}
        self._types = tuple({type(label) for label in feature.order})
        self._weight = 1.0 / math.sqrt(len(feature.order))

    @classmethod
    def fit(cls, feature: Ordinal, column: pa.ChunkedArray) -> "OrdinalColumn":
        return cls(feature)

    @property
    def rows(self) -> int:
        return FIRST + len(self.feature.order)

    def bag(self, value: Any, i: int, notes: Notes) -> tuple[list[int], float]:
        name, rank = self.feature.name, 0
        label = canonical(value)
        if label is not None and type(label) in self._types:
            rank = self._ranks.get((type(label), label), 0)
        elif label is not None:
            notes.wrong(i, name, "one of the ordered labels", value)
            label = None
        if rank:
            return [*range(FIRST, FIRST + rank)], self._weight
        notes.statuses[i][name] = "missing" if label is None else "oov"
        return [MISSING if label is None else OOV], 1.0


class TextColumn(BagColumn):
    """A text is the set of its word and character n-grams, each hashed into a row; n of them count 1/sqrt(n)."""

    def __init__(self, feature: Text) -> None:
        self.feature: Text = feature
        self._of_words = (*(feature.characters or (1, 0)), feature.words > 0, feature.buckets)

    @classmethod
    def fit(cls, feature: Text, column: pa.ChunkedArray) -> "TextColumn":
        return cls(feature)

    @property
    def rows(self) -> int:
        return FIRST + self.feature.buckets

    def bag(self, value: Any, i: int, notes: Notes) -> tuple[list[int], float]:
        setting, words = self.feature, list[str]()
        if isinstance(value, str):
            words = self._split(value)
        elif value is not None:
            notes.wrong(i, setting.name, "text", value)
        packed = b"".join(map(_word_rows, words, *map(repeat, self._of_words)))
        bag = set(memoryview(packed).cast("q"))
        for n in range(2, setting.words + 1):
            bag.update(FIRST + hashed(" ".join(words[j : j + n]), setting.buckets) for j in range(len(words) - n + 1))
        if not bag:
            notes.statuses[i][setting.name] = "missing"
            return [MISSING], 1.0
        return sorted(bag), 1.0 / math.sqrt(len(bag))

    def bags(self, values: Sequence[Any], notes: Notes) -> Bags:
        if not set(map(type, values)) <= {str, type(None)}:
            return super().bags(values, notes)
        setting = self.feature
        texts = [self._split(value) if value else [] for value in values]
        words, counts = list(chain.from_iterable(texts)), np.fromiter(map(len, texts), np.int64)
        ends = np.cumsum(counts)
        packed = [*map(_word_rows, words, *map(repeat, self._of_words))]
        until = np.cumsum([0, *map(len, packed)]) >> 3
        parts = [(np.frombuffer(b"".join(packed), np.int64), until[ends] - until[ends - counts])]
        left = np.repeat(ends, counts) - np.arange(len(words))  # words from each one to the end of its text
        for n in range(2, setting.words + 1):
            grams = compress(map(" ".join, zip(*(words[j:] for j in range(n)))), (left >= n).tolist())  # noqa: B905
            parts.append((FIRST + all_hashed(grams, setting.buckets), np.maximum(counts - n + 1, 0)))
        bags = _sets(parts)
        notes.mark(setting.name, "missing", _are_missing(bags))
        return bags

    def _split(self, text: str) -> list[str]:
        return (canonical(text[: self.feature.max_characters]) or "").casefold().split()


@lru_cache(maxsize=65_536)
def _word_rows(word: str, shortest: int, longest: int, whole: bool, buckets: int) -> bytes:
    """Of the character n-grams of a word, and of the word itself where it counts as a `whole`."""
    marked = f"<{word}>"
    grams = {marked[j : j + n] for n in range(shortest, longest + 1) for j in range(len(marked) - n + 1)}
    # \x00: a character n-gram is not the word it spells
    tokens = [f"\x00{gram}" for gram in grams] + [word] * whole
    return array("q", [FIRST + hashed(token, buckets) for token in tokens]).tobytes()
