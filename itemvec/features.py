"""FeatureTransform: rows of an item table -> numbers for the encoder. Fit once, saved with the model.

Strict at `fit`, total at `transform`: fitting refuses a table that makes no sense; transforming never fails on a value.
A label unseen in training falls into the column's out-of-vocabulary row, a missing value into its missing row, a number
beyond the training range onto the range's end; a status per item and column says so. Only a value of the wrong *type*
is an error (`InvalidItem`), since it is the caller's mistake and not the world's.

Two shapes of numbers come out, whatever the kinds are:

- *bags*: nominal, ordinal, multi and text columns become rows of one embedding table that all of them share, so that a
  single look-up embeds them all;
- *dense* columns: numeric and timestamp columns become a few floats each.
"""

import hashlib
import json
import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from itemvec.check import flat_labels, require_columns, require_fit, undictionaried
from itemvec.errors import FieldError, InvalidItem, SchemaMismatch, VersionCorrupt
from itemvec.schema import Feature, FeatureSchema, Label, Multi, Nominal, Numeric, Ordinal, Text, Timestamp
from itemvec.values import PYTHON_TYPES, canonical, unix_seconds

Status = Literal["oov", "partly_oov", "missing", "clipped", "ignored"]

OOV, MISSING, FIRST = 0, 1, 2
"""Every bag column's own rows begin with these two; its labels follow from row `FIRST`."""


@dataclass(frozen=True, slots=True)
class Batch:
    """n items as numbers: F bag columns, D dense columns."""

    dense: npt.NDArray[np.float32]
    """(n, D)"""

    indices: npt.NDArray[np.int64]
    """(nnz,) rows of the shared embedding table, item by item, and within an item bag by bag."""

    weights: npt.NDArray[np.float32]
    """(nnz,) what each row counts in its bag's sum."""

    lengths: npt.NDArray[np.int32]
    """(n, F) rows in each bag; they add up to nnz, and none is 0."""

    def __len__(self) -> int:
        return len(self.dense)

    @staticmethod
    def concatenate(batches: Sequence["Batch"]) -> "Batch":
        return Batch(
            np.concatenate([b.dense for b in batches]),
            np.concatenate([b.indices for b in batches]),
            np.concatenate([b.weights for b in batches]),
            np.concatenate([b.lengths for b in batches]),
        )


@dataclass(frozen=True, slots=True)
class Encoded:
    batch: Batch
    statuses: list[dict[str, Status]]
    """Per item, only the columns that were not plain."""


@dataclass(frozen=True, slots=True)
class BagSlot:
    """Where a bag column lives in the shared table: rows `base` to `base + rows - 1`, OOV and missing first."""

    name: str
    kind: str
    base: int
    rows: int


@dataclass(frozen=True, slots=True)
class DenseSlot:
    """Where a column lives among the dense ones: `start` to `start + width - 1`; the last is 1 where it is missing."""

    name: str
    kind: str
    start: int
    width: int

    targets: int
    """How many of its floats, from the first, the decoder reads back; those between them and the flag say the same in
    another way."""

    @property
    def flag(self) -> int:
        """The place of the missing flag."""
        return self.start + self.width - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """All that the encoder and the decoder need to know of a transform."""

    bags: tuple[BagSlot, ...]
    dense: tuple[DenseSlot, ...]

    @property
    def table_rows(self) -> int:
        return sum(bag.rows for bag in self.bags)

    @property
    def dense_width(self) -> int:
        return sum(slot.width for slot in self.dense)


class _Notes:
    """Collects, over one call, what the columns of each item were, and what was wrong with them."""

    def __init__(self, n: int, pointer: str) -> None:
        self.statuses: list[dict[str, Status]] = [{} for _ in range(n)]
        self.errors: list[FieldError] = []
        self._pointer = pointer

    def wrong(self, row: int, column: str, expected: str, value: Any, at: int | None = None) -> None:
        where = f"{self._pointer}/{row}/{column.replace('~', '~0').replace('/', '~1')}"
        self.errors.append(
            FieldError(where if at is None else f"{where}/{at}", f"expected {expected}, got {_shown(value)}")
        )


_JSON_NAMES = {
    str: "the string",
    bool: "the boolean",
    int: "the number",
    float: "the number",
    list: "the list",
    dict: "the object",
}


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{_JSON_NAMES.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"


class Vocabulary:
    """Maps the labels of one column to rows of its part of the embedding table.

    Row 0 is kept for labels unseen in training and row 1 for missing values, so that both always find a row:

    >>> color = Vocabulary.fit(["red", "blue", "red", "green"], min_count=1)
    >>> color.labels
    ['red', 'blue', 'green']
    >>> [color.row("blue"), color.row("violet")]
    [3, 0]

    Rare labels share the out-of-vocabulary row, so that training teaches it something:

    >>> Vocabulary.fit(["red", "blue", "red"], min_count=2).labels
    ['red']
    """

    def __init__(self, labels: Sequence[Label], counts: Sequence[int]) -> None:
        self.labels = list(labels)
        """Most frequent first; the label of row r is labels[r - FIRST]."""
        self.counts = list(counts)
        """How often training saw each of them."""
        self._rows: dict[Any, int] = {label: row for row, label in enumerate(self.labels, FIRST)}

    @classmethod
    def fit(
        cls, values: Iterable[Label] | pa.ChunkedArray, min_count: int, max_labels: int = 1_000_000
    ) -> "Vocabulary":
        array = values if isinstance(values, pa.ChunkedArray) else pa.chunked_array([pa.array(values)])
        counted = pc.value_counts(array.drop_null())
        counts: dict[Any, int] = {}
        for label, count in zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True):
            if (key := canonical(label)) is not None:
                counts[key] = counts.get(key, 0) + count
        kept = sorted((label for label, count in counts.items() if count >= min_count), key=lambda x: (-counts[x], x))
        return cls(kept[:max_labels], [counts[label] for label in kept[:max_labels]])

    @property
    def rows(self) -> int:
        return FIRST + len(self.labels)

    def row(self, label: Label) -> int:
        """The label's row: OOV if training did not know it, MISSING for a string of white space."""
        row = self._rows.get(label)
        if row is not None:
            return row
        key = canonical(label)
        return MISSING if key is None else self._rows.get(key, OOV)


# --- bag columns: values -> rows of the shared table, counted from the column's own base -----------------------------


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

    feature: Feature

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows of the table are this column's."""

    @abstractmethod
    def encode(self, values: Sequence[Any], notes: _Notes) -> Bags: ...


def _is_label(value: Any, dtype: str) -> bool:
    return type(value) is PYTHON_TYPES[dtype]


class NominalColumn(BagColumn):
    """One label, one row."""

    def __init__(self, feature: Nominal, vocabulary: Vocabulary) -> None:
        self.feature: Nominal = feature
        self.vocabulary = vocabulary

    @classmethod
    def fit(cls, feature: Nominal, column: pa.ChunkedArray) -> "NominalColumn":
        return cls(feature, Vocabulary.fit(column, feature.min_count, feature.max_labels))

    @property
    def rows(self) -> int:
        return self.vocabulary.rows

    def encode(self, values: Sequence[Any], notes: _Notes) -> Bags:
        name, dtype, row_of = self.feature.name, self.feature.dtype, self.vocabulary.row
        rows = []
        for i, value in enumerate(values):
            row = MISSING
            if _is_label(value, dtype):
                row = row_of(value)
            elif value is not None:
                notes.wrong(i, name, f"a label ({dtype})", value)
            if row < FIRST:
                notes.statuses[i][name] = "missing" if row == MISSING else "oov"
            rows.append(row)
        return Bags(rows, [1] * len(rows), [1.0] * len(rows))


class MultiColumn(BagColumn):
    """A set of n labels: n rows, each counting 1/sqrt(n), so that a long cast does not outweigh all else.

    A set without labels says nothing and is missing. Rows are sorted: the order of a set must not move a single bit.
    """

    def __init__(self, feature: Multi, vocabulary: Vocabulary) -> None:
        self.feature: Multi = feature
        self.vocabulary = vocabulary

    @classmethod
    def fit(cls, feature: Multi, column: pa.ChunkedArray) -> "MultiColumn":
        return cls(feature, Vocabulary.fit(flat_labels(column, feature), feature.min_count, feature.max_labels))

    @property
    def rows(self) -> int:
        return self.vocabulary.rows

    def encode(self, values: Sequence[Any], notes: _Notes) -> Bags:
        name, separator = self.feature.name, self.feature.separator
        rows: list[int] = []
        lengths, weights = [], []
        for i, value in enumerate(values):
            bag: set[int] = set()
            if isinstance(value, list | tuple | set | frozenset):
                bag = self._bag(value, i, notes)
            elif separator is not None and isinstance(value, str):
                bag = self._bag(value.split(separator), i, notes)
            elif value is not None:
                notes.wrong(i, name, f"a list of labels ({self.feature.dtype})", value)
            if not bag:
                bag = {MISSING}
                notes.statuses[i][name] = "missing"
            elif OOV in bag:
                notes.statuses[i][name] = "oov" if len(bag) == 1 else "partly_oov"
            rows += sorted(bag)
            lengths.append(len(bag))
            weights.append(1.0 / math.sqrt(len(bag)))
        return Bags(rows, lengths, weights)

    def _bag(self, labels: Iterable[Any], i: int, notes: _Notes) -> set[int]:
        dtype, row_of = self.feature.dtype, self.vocabulary.row
        bag = set()
        for at, label in enumerate(labels):
            if _is_label(label, dtype):
                bag.add(row_of(label))
            elif label is not None:
                notes.wrong(i, self.feature.name, f"a label ({dtype})", label, at)
                break  # the item is refused anyway: one error a column bounds what a hostile body can make us say
        bag.discard(MISSING)
        return bag


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

    def encode(self, values: Sequence[Any], notes: _Notes) -> Bags:
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

    def encode(self, values: Sequence[Any], notes: _Notes) -> Bags:
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
            bag.update(_bucket(" ".join(words[j : j + n]), setting.buckets) for j in range(len(words) - n + 1))
        return bag


def _bucket(token: str, buckets: int) -> int:
    """CRC-32 is the same in every process and version; the multiplication mixes it into the high bits, which choose."""
    mixed = (zlib.crc32(token.encode("utf-8", "surrogatepass")) * 0x9E3779B1) & 0xFFFFFFFF
    return FIRST + (mixed * buckets >> 32)


@lru_cache(maxsize=65_536)
def _character_rows(word: str, shortest: int, longest: int, buckets: int) -> tuple[int, ...]:
    marked = f"<{word}>"
    grams = {marked[j : j + n] for n in range(shortest, longest + 1) for j in range(len(marked) - n + 1)}
    return tuple(
        {_bucket(f"\x00{gram}", buckets) for gram in grams}
    )  # \x00: a character n-gram is not the word it spells


# --- dense columns: values -> a few floats ----------------------------------------------------------------------------


class DenseColumn(ABC):
    """A column whose values become `width` floats each, the last of which is 1 where the value is missing."""

    feature: Feature
    width: int

    @property
    def targets(self) -> int:
        """How many of them, from the first, the decoder reads back."""
        return self.width - 1

    @abstractmethod
    def encode(self, values: Sequence[Any], notes: _Notes) -> npt.NDArray[np.float32]:
        """(n, width)"""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON."""

    def _numbers(
        self,
        values: Sequence[Any],
        read: Callable[[Any], float | None],
        expected: str,
        low: float,
        high: float,
        notes: _Notes,
    ) -> npt.NDArray[np.float64]:
        """(n,) the values within [low, high], NaN where missing; what was done to each is noted."""
        name = self.feature.name
        numbers = np.empty(len(values))
        for i, value in enumerate(values):
            number = None
            if value is not None:
                try:
                    number = read(value)
                except (TypeError, ValueError, OverflowError):
                    notes.wrong(i, name, expected, value)
            if number is None or number != number:
                number = math.nan
                notes.statuses[i][name] = "missing"
            elif not low <= number <= high:
                number = low if number < low else high
                notes.statuses[i][name] = "clipped"
            numbers[i] = number
        return numbers


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError
    return float(value)


QUANTILES = 257
"""Knots of `scale: quantile`; between them ranks are interpolated."""


class NumericColumn(DenseColumn):
    """A number brought to mean 0 and variance 1 over the training items; 0 and a flag where it is missing."""

    width = 2

    def __init__(
        self, feature: Numeric, low: float, high: float, mean: float, std: float, knots: Sequence[float] = ()
    ) -> None:
        self.feature: Numeric = feature
        self.low, self.high, self.mean, self.std = low, high, mean, std
        self.knots = list(knots)

    @classmethod
    def fit(cls, feature: Numeric, column: pa.ChunkedArray) -> "NumericColumn":
        values = column.cast(pa.float64(), safe=False).drop_null().to_numpy()  # beyond 2^53 rounded
        values = values[~np.isnan(values)]
        knots: list[float] = []
        if feature.scale == "quantile":
            knots = np.unique(np.quantile(values, np.linspace(0, 1, QUANTILES))).tolist()
        fitted = cls(feature, float(values.min()), float(values.max()), 0.0, 1.0, knots)
        scaled = fitted._scaled(values)
        std = float(scaled.std())
        return cls(feature, fitted.low, fitted.high, float(scaled.mean()), std if std > 0 else 1.0, knots)

    def _scaled(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        if self.feature.scale == "log":
            return np.log1p(values)
        if self.feature.scale == "quantile":
            return np.interp(values, self.knots, np.linspace(0, 1, len(self.knots)))
        return values

    def encode(self, values: Sequence[Any], notes: _Notes) -> npt.NDArray[np.float32]:
        numbers = self._numbers(values, _number, "a number", self.low, self.high, notes)
        out = np.zeros((len(values), 2), np.float32)
        present = ~np.isnan(numbers)
        out[present, 0] = (self._scaled(numbers[present]) - self.mean) / self.std
        out[:, 1] = ~present
        return out

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "mean": self.mean, "std": self.std, "knots": self.knots}


YEAR = 365.2425 * 86_400
_PERIODS = {"year": YEAR, "week": 7 * 86_400.0, "day": 86_400.0}


class TimestampColumn(DenseColumn):
    """A moment as its age before the newest training item (mean 0, variance 1) and a point on a circle per cycle."""

    def __init__(self, feature: Timestamp, low: float, high: float, mean: float, std: float) -> None:
        self.feature: Timestamp = feature
        self.low, self.high, self.mean, self.std = low, high, mean, std
        self.width = 2 + 2 * len(feature.cycles)

    @classmethod
    def fit(cls, feature: Timestamp, column: pa.ChunkedArray) -> "TimestampColumn":
        read = (unix_seconds(value) for value in column.drop_null().to_pylist())
        seconds = np.array([s for s in read if s is not None and s == s])
        high = float(seconds.max())
        years = (high - seconds) / YEAR
        return cls(feature, float(seconds.min()), high, float(years.mean()), float(years.std()) or 1.0)

    def encode(self, values: Sequence[Any], notes: _Notes) -> npt.NDArray[np.float32]:
        expected = "an ISO 8601 time or Unix seconds"
        seconds = self._numbers(values, _moment, expected, self.low, self.high, notes)
        out = np.zeros((len(values), self.width), np.float32)
        present = ~np.isnan(seconds)
        out[present, 0] = ((self.high - seconds[present]) / YEAR - self.mean) / self.std
        for c, cycle in enumerate(self.feature.cycles):
            angle = 2 * np.pi * np.mod(seconds[present] / _PERIODS[cycle], 1.0)
            out[present, 1 + 2 * c], out[present, 2 + 2 * c] = np.sin(angle), np.cos(angle)
        out[:, -1] = ~present
        return out

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "mean": self.mean, "std": self.std}


def _moment(value: Any) -> float | None:
    if isinstance(value, bool | list | dict):
        raise TypeError
    return unix_seconds(value)


# --- the transform ----------------------------------------------------------------------------------------------------

Column = NominalColumn | MultiColumn | OrdinalColumn | TextColumn | NumericColumn | TimestampColumn
_COLUMNS: dict[str, Any] = {
    "nominal": NominalColumn,
    "multi": MultiColumn,
    "ordinal": OrdinalColumn,
    "text": TextColumn,
    "numeric": NumericColumn,
    "timestamp": TimestampColumn,
}
CHUNK = 65_536  # rows turned into Python objects at once when a whole table is transformed


class FeatureTransform:
    """All columns of a schema, fitted. The one way from items to numbers, for training and serving alike."""

    FORMAT: ClassVar[int] = 1

    def __init__(self, schema: FeatureSchema, columns: Sequence[Column]) -> None:
        self.schema = schema
        self.columns = list(columns)
        self._bags = [c for c in columns if isinstance(c, BagColumn)]
        self._dense = [c for c in columns if isinstance(c, DenseColumn)]
        self.layout = self._lay_out()
        self._known = {schema.id, *(f.name for f in schema.features)}
        self._bases = np.array([slot.base for slot in self.layout.bags], np.int64)

    def _lay_out(self) -> Layout:
        bags, dense, base, start = [], [], 0, 0
        for bag in self._bags:
            bags.append(BagSlot(bag.feature.name, bag.feature.kind, base, bag.rows))
            base += bag.rows
        for column in self._dense:
            dense.append(DenseSlot(column.feature.name, column.feature.kind, start, column.width, column.targets))
            start += column.width
        return Layout(tuple(bags), tuple(dense))

    @classmethod
    def fit(cls, table: pa.Table, schema: FeatureSchema, source: str = "the table") -> "FeatureTransform":
        """Raises SchemaMismatch, with every error that `itemvec schema check` would show."""
        require_fit(table, schema, source)
        return cls(schema, [_COLUMNS[f.kind].fit(f, undictionaried(table.column(f.name))) for f in schema.features])

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.feature.name == name)

    def transform(self, items: Sequence[Mapping[str, Any]], pointer: str = "") -> Encoded:
        """Total on values; raises InvalidItem with `pointer`/row/column for each value of the wrong type.

        A column that an item lacks is missing; one that the schema does not name is reported as ignored.
        """
        notes = _Notes(len(items), pointer)
        batch = self._encode(
            {f.name: [item.get(f.name) for item in items] for f in self.schema.features}, len(items), notes
        )
        if notes.errors:
            raise InvalidItem(notes.errors)
        for item, status in zip(items, notes.statuses, strict=True):
            if not item.keys() <= self._known:
                status.update(dict.fromkeys(item.keys() - self._known, "ignored"))
        return Encoded(batch, notes.statuses)

    def transform_table(self, table: pa.Table) -> Batch:
        """The same numbers for a whole table, chunk by chunk. Raises SchemaMismatch (absent column, wrong type)."""
        require_columns(table, [f.name for f in self.schema.features])
        batches = []
        for start in range(0, max(len(table), 1), CHUNK):
            chunk = table.slice(start, CHUNK)
            notes = _Notes(len(chunk), "")
            values = {f.name: chunk.column(f.name).to_pylist() for f in self.schema.features}
            batches.append(self._encode(values, len(chunk), notes))
            if notes.errors:
                raise SchemaMismatch("the table", [f"row {e.pointer[1:]}: {e.detail}" for e in notes.errors[:5]])
        return Batch.concatenate(batches)

    def _encode(self, values: Mapping[str, Sequence[Any]], n: int, notes: _Notes) -> Batch:
        bags = [column.encode(values[column.feature.name], notes) for column in self._bags]
        dense = [column.encode(values[column.feature.name], notes) for column in self._dense]
        together = np.concatenate(dense, axis=1) if dense else np.zeros((n, 0), np.float32)
        return Batch(together, *self._interleave(bags, n))

    def _interleave(
        self, bags: Sequence[Bags], n: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """From column by column to item by item."""
        if not bags:
            return np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((n, 0), np.int32)
        sizes = [len(b.rows) for b in bags]
        by_column = np.concatenate([np.array(b.rows, np.int64) for b in bags]) + np.repeat(self._bases, sizes)
        lengths = np.array([b.lengths for b in bags], np.int64)  # (F, n)
        weights = np.array([b.weights for b in bags], np.float32).T.ravel()
        starts = (
            (np.cumsum(lengths) - lengths.ravel()).reshape(lengths.shape).T.ravel()
        )  # of each bag, where it lies now
        lengths = lengths.T
        flat = lengths.ravel()
        ends = np.cumsum(flat)
        order = np.repeat(starts - (ends - flat), flat) + np.arange(len(by_column))
        return by_column[order], np.repeat(weights, flat), lengths.astype(np.int32)

    # what is saved: transform.json for numbers, labels.parquet for vocabularies (any tool can read both)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "transform.json").write_text(json.dumps(self._state(), indent=1), encoding="utf-8")
        features, labels, counts = [], [], []
        for name, vocabulary in self._vocabularies():
            features += [name] * len(vocabulary.labels)
            labels += [str(label) for label in vocabulary.labels]
            counts += vocabulary.counts
        table = pa.table(
            {
                "feature": pa.array(features, pa.string()),
                "label": pa.array(labels, pa.string()),
                "count": pa.array(counts, pa.int64()),
            }
        )
        pa.parquet.write_table(table, folder / "labels.parquet", compression="zstd")

    @classmethod
    def load(cls, folder: Path, schema: FeatureSchema) -> "FeatureTransform":
        """Raises VersionCorrupt where the folder does not hold what the schema needs."""
        try:
            state = json.loads((folder / "transform.json").read_text(encoding="utf-8"))
            table = pa.parquet.read_table(folder / "labels.parquet")
        except (OSError, ValueError) as error:
            raise VersionCorrupt(str(folder), f"its transform cannot be read: {error}") from None
        if state.get("format") != cls.FORMAT:
            raise VersionCorrupt(
                str(folder),
                f"its transform has format {state.get('format')}, this itemvec reads {cls.FORMAT}",
            )
        fitted = state["columns"]
        columns: list[Column] = []
        for feature in schema.features:
            if feature.name not in fitted:
                raise VersionCorrupt(str(folder), f"its transform lacks column {feature.name!r}")
            kind = _COLUMNS[feature.kind]
            if isinstance(feature, Nominal | Multi):
                mine = table.filter(pc.equal(table.column("feature"), feature.name))
                labels = [_as_dtype(label, feature.dtype) for label in mine.column("label").to_pylist()]
                columns.append(kind(feature, Vocabulary(labels, mine.column("count").to_pylist())))
            else:
                columns.append(kind(feature, **fitted[feature.name]))
        return cls(schema, columns)

    def digest(self) -> str:
        """sha256 over all that was fitted, whatever the version of the file formats."""
        sha = hashlib.sha256(json.dumps(self._state(), sort_keys=True).encode())
        for name, vocabulary in self._vocabularies():
            sha.update(json.dumps([name, *vocabulary.labels]).encode())
        return sha.hexdigest()

    def _state(self) -> dict[str, Any]:
        columns = {c.feature.name: c.state() if isinstance(c, DenseColumn) else {} for c in self.columns}
        return {"format": self.FORMAT, "columns": columns}

    def _vocabularies(self) -> list[tuple[str, Vocabulary]]:
        return [(c.feature.name, c.vocabulary) for c in self.columns if isinstance(c, NominalColumn | MultiColumn)]


def _as_dtype(label: str, dtype: str) -> Label:
    return label if dtype == "string" else int(label) if dtype == "integer" else label == "True"
