"""Bag columns: values of labels and words -> rows of the embedding table that all of them share.

Rows are counted from the column's own base. A column is fitted once, and total ever after: each value becomes a bag of
one row or more. `bag` says what one value becomes; `bags` gives the same for a column of values, without a call each.
"""

import math
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from itertools import chain, compress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.check import label_counts
from itemvec.notes import Notes, Status
from itemvec.schema import AnyFeature, Multi, Nominal, Ordinal, Text
from itemvec.values import PYTHON_TYPES, all_hashed, canonical, hashed
from itemvec.vocabulary import FIRST, MISSING, OOV, Ints, Vocabulary

Part = tuple[Ints, Ints]
"""(nnz,) rows and (n,) lengths: how many of them each of n values has. In any order and repeated; MISSING or nothing
where there is none."""


class BagColumn(ABC):
    """A column whose values become a few rows of the shared table each."""

    feature: AnyFeature
    step: float | None = None
    """What each known row of a bag counts in the bag's sum. None: n rows count 1/sqrt(n) each, so that a long cast does
    not outweigh all else."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows of the table are this column's."""

    @property
    def shared(self) -> int:
        """From this row on, labels that training did not know share rows."""
        return self.rows

    @abstractmethod
    def bag(self, value: Any, i: int, notes: Notes) -> list[int]:
        """Its rows, ascending; what is wrong with it goes to the notes, where `i` is the item's place."""

    def bags(self, values: Sequence[Any], notes: Notes) -> list[Part]:
        """The same of many values, each bag in one part or spread over several, in as few calls as there can be."""
        bags = [self.bag(value, i, notes) for i, value in enumerate(values)]
        return [(np.fromiter(chain.from_iterable(bags), np.int64), np.fromiter(map(len, bags), np.int64, len(bags)))]

    def arrow_bags(self, column: pa.ChunkedArray) -> list[Part] | None:
        """The same of an Arrow column that need not become Python values; None where it has to."""
        return None

    def status(self, bag: Sequence[int]) -> Status:
        """Of a bag with a row that does not stand for one known label."""
        if bag[0] == MISSING:
            return "missing"
        return "partly_oov" if any(FIRST <= row < self.shared for row in bag) else "oov"

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
        self._types = {self._type, type(None)}

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

    @property
    def shared(self) -> int:
        return self.vocabulary.shared

    def state(self) -> dict[str, Any]:
        return {"filled": self.vocabulary.filled}

    def _are_labels(self, values: Collection[Any]) -> bool:
        """Are they all labels of the column's type, or null?"""
        return self._types.issuperset(map(type, values))

    def _arrow_rows(self, labels: pa.Array) -> Ints | None:
        """(len(labels),) their rows; None where they are not of the column's type, or one is no text."""
        if not _ARROW_TYPES[self.feature.dtype](labels.type):
            return None
        try:
            return self.vocabulary.rows_of_arrow(labels)
        except UnicodeDecodeError:
            return None


_ARROW_TYPES = {
    "string": lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind),
    "integer": pa.types.is_integer,
    "boolean": pa.types.is_boolean,
}


class NominalColumn(LabelColumn):
    """One label, one row."""

    def bag(self, value: Any, i: int, notes: Notes) -> list[int]:
        if type(value) is self._type:
            return [self.vocabulary.row(value)]
        if value is not None:
            notes.wrong(i, self.feature.name, f"a label ({self.feature.dtype})", value)
        return [MISSING]

    def bags(self, values: Sequence[Any], notes: Notes) -> list[Part]:
        if not self._are_labels(values):
            return super().bags(values, notes)
        return [(self.vocabulary.rows_of(values), np.ones(len(values), np.int64))]

    def arrow_bags(self, column: pa.ChunkedArray) -> list[Part] | None:
        rows = self._arrow_rows(column.combine_chunks())
        return None if rows is None else [(rows, np.ones(len(rows), np.int64))]


SETS = list, tuple, set, frozenset


class MultiColumn(LabelColumn):
    """A set of labels, a row each. One without labels says nothing and is missing. Rows are sorted: the order of a set
    must not move a single bit."""

    feature: Multi

    def bag(self, value: Any, i: int, notes: Notes) -> list[int]:
        separator = self.feature.separator
        bag: list[int] = []
        if isinstance(value, SETS):
            bag = self._rows(value, i, notes)
        elif separator is not None and isinstance(value, str):
            bag = self._rows(value.split(separator), i, notes)
        elif value is not None:
            notes.wrong(i, self.feature.name, f"a list of labels ({self.feature.dtype})", value)
        return bag or [MISSING]

    def _rows(self, labels: Collection[Any], i: int, notes: Notes) -> list[int]:
        if not self._are_labels(labels):
            at, wrong = next((at, x) for at, x in enumerate(labels) if x is not None and type(x) is not self._type)
            # The item is refused anyway: one error a column bounds what a hostile body can make us say.
            notes.wrong(i, self.feature.name, f"a label ({self.feature.dtype})", wrong, at)
            return []
        bag = self.vocabulary.distinct_rows(labels)
        bag.discard(MISSING)
        return sorted(bag)

    def bags(self, values: Sequence[Any], notes: Notes) -> list[Part]:
        if separator := self.feature.separator:
            values = [value.split(separator) if type(value) is str else value for value in values]
        if not set(map(type, values)) <= {list, type(None)}:
            return super().bags(values, notes)
        sets = [value or () for value in values]
        labels = list(chain.from_iterable(sets))
        if not self._are_labels(labels):
            return super().bags(values, notes)
        return [(self.vocabulary.rows_of(labels), np.fromiter(map(len, sets), np.int64, len(sets)))]

    def arrow_bags(self, column: pa.ChunkedArray) -> list[Part] | None:
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
            return None
        sets = column.combine_chunks()
        rows = self._arrow_rows(sets.flatten())
        if rows is None:
            return None
        return [(rows, pc.list_value_length(sets).fill_null(0).to_numpy().astype(np.int64))]


class OrdinalColumn(BagColumn):
    """The r-th label of an order is the sum of its first r rows (a thermometer): each row is a step to the next."""

    def __init__(self, feature: Ordinal) -> None:
        self.feature: Ordinal = feature
        self._ranks = {(type(label), canonical(label)): rank for rank, label in enumerate(feature.order, 1)}
        self._types = tuple({type(label) for label in feature.order})
        self.step = 1.0 / math.sqrt(len(feature.order))

    @classmethod
    def fit(cls, feature: Ordinal, column: pa.ChunkedArray) -> "OrdinalColumn":
        return cls(feature)

    @property
    def rows(self) -> int:
        return FIRST + len(self.feature.order)

    def bag(self, value: Any, i: int, notes: Notes) -> list[int]:
        label = canonical(value)
        if label is None:
            return [MISSING]
        if type(label) not in self._types:
            notes.wrong(i, self.feature.name, "one of the ordered labels", value)
            return [MISSING]
        rank = self._ranks.get((type(label), label), 0)
        return [*range(FIRST, FIRST + rank)] or [OOV]


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

    def bag(self, value: Any, i: int, notes: Notes) -> list[int]:
        setting, words = self.feature, list[str]()
        if isinstance(value, str):
            words = self._split(value)
        elif value is not None:
            notes.wrong(i, setting.name, "text", value)
        packed = b"".join(map(_word_rows(*self._of_words), words))
        bag = set(memoryview(packed).cast("q"))
        for n in range(2, setting.words + 1):
            bag.update(FIRST + hashed(" ".join(words[j : j + n]), setting.buckets) for j in range(len(words) - n + 1))
        return sorted(bag) or [MISSING]

    def bags(self, values: Sequence[Any], notes: Notes) -> list[Part]:
        if not set(map(type, values)) <= {str, type(None)}:
            return super().bags(values, notes)
        setting = self.feature
        texts = [self._split(value) if value else [] for value in values]
        words, counts = list(chain.from_iterable(texts)), np.fromiter(map(len, texts), np.int64)
        ends = np.cumsum(counts)
        packed = [*map(_word_rows(*self._of_words), words)]
        until = np.cumsum([0, *map(len, packed)]) >> 3
        parts = [(np.frombuffer(b"".join(packed), np.int64), until[ends] - until[ends - counts])]
        left = np.repeat(ends, counts) - np.arange(len(words))  # words from each one to the end of its text
        for n in range(2, setting.words + 1):
            grams = compress(map(" ".join, zip(*(words[j:] for j in range(n)))), (left >= n).tolist())  # noqa: B905
            parts.append((FIRST + all_hashed(grams, setting.buckets), np.maximum(counts - n + 1, 0)))
        return parts

    def _split(self, text: str) -> list[str]:
        return (canonical(text[: self.feature.max_characters]) or "").casefold().split()


@cache
def _word_rows(shortest: int, longest: int, whole: bool, buckets: int) -> Callable[[str], bytes]:
    """What gives the rows of the character n-grams of a word, and of the word itself where it counts as a `whole`."""

    @lru_cache(maxsize=65_536)
    def rows(word: str) -> bytes:
        marked = f"<{word}>"
        grams = {marked[j : j + n] for n in range(shortest, longest + 1) for j in range(len(marked) - n + 1)}
        # \x00: a character n-gram is not the word it spells
        tokens = [f"\x00{gram}" for gram in grams] + [word] * whole
        return array("q", [FIRST + hashed(token, buckets) for token in tokens]).tobytes()

    return rows
