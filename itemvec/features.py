"""FeatureTransform: rows of an item table -> numbers for the encoder. Fit once, saved with the model.

Strict at `fit`, total at `transform`: fitting refuses a table that makes no sense; transforming never fails on a value.
A label unseen in training falls into the column's out-of-vocabulary row, a missing value into its missing row, a number
beyond the training range onto the range's end; a status per item and column says so. Only a value of the wrong *type*
is an error (`InvalidItem`), since it is the caller's mistake and not the world's.

Two shapes of numbers come out, whatever the kinds are:

- *bags* (`itemvec.bags`): nominal, ordinal, multi and text columns become rows of one embedding table that all of them
  share, so that a single look-up embeds them all;
- *dense* columns (`itemvec.dense`, `itemvec.lists`, `itemvec.sentences`): numeric, timestamp, series and vector
  columns, and texts with a sentence encoder, become a few floats each.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from itemvec.bagging import Bagging
from itemvec.bags import BagColumn, LabelColumn, MultiColumn, NominalColumn, OrdinalColumn, TextColumn
from itemvec.check import require_columns, require_fit, undictionaried
from itemvec.dense import DenseColumn, NumericColumn, TimestampColumn, moments
from itemvec.errors import FieldError, InvalidItem, SchemaMismatch, VersionCorrupt
from itemvec.lists import SeriesColumn, VectorColumn, number_lists
from itemvec.notes import CODES, Notes, Status, Statuses
from itemvec.schema import (
    AnyFeature,
    Feature,
    FeatureSchema,
    Label,
    Multi,
    Nominal,
    Numeric,
    Series,
    Text,
    Timestamp,
    Vector,
)  # fmt: skip
from itemvec.sentences import SentenceColumn
from itemvec.vocabulary import FIRST, MISSING, OOV, Vocabulary

__all__ = [
    "FIRST", "MISSING", "OOV", "BagSlot", "Batch", "DenseSlot", "Encoded", "FeatureTransform", "Layout", "Status",
    "Vocabulary",
]  # fmt: skip


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


class Encoded(NamedTuple):
    batch: Batch
    statuses: Statuses
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


Floats = npt.NDArray[np.float32]

Column = BagColumn | DenseColumn
_COLUMNS: dict[str, Any] = {
    "nominal": NominalColumn,
    "multi": MultiColumn,
    "ordinal": OrdinalColumn,
    "text": TextColumn,
    "numeric": NumericColumn,
    "timestamp": TimestampColumn,
    "series": SeriesColumn,
    "vector": VectorColumn,
}


def _column_of(feature: AnyFeature) -> Any:
    """The class that encodes such a feature."""
    if isinstance(feature, Text) and feature.sentence_encoder is not None:
        return SentenceColumn
    return _COLUMNS[feature.kind]


FEW = 12
"""So many items are encoded column by column; fewer, item by item: a call into numpy costs more than its work then."""

CHUNK = 16_384
"""Rows of a table that are encoded at once; what they are as Python objects in between has to fit into memory."""


class FeatureTransform:
    """All columns of a schema, fitted. The one way from items to numbers, for training and serving alike."""

    FORMAT: ClassVar[int] = 2

    def __init__(self, schema: FeatureSchema, columns: Sequence[Column]) -> None:
        self.schema = schema
        self.columns = list(columns)
        self._bags = [(c.feature.name, c) for c in columns if isinstance(c, BagColumn)]
        self._dense = [(c.feature.name, c) for c in columns if isinstance(c, DenseColumn)]
        numeric = [(name, c) for name, c in self._dense if isinstance(c, NumericColumn)]
        self._numeric = numeric if len(numeric) == len(self._dense) else None
        """The dense columns, where all of them are numbers."""
        self.layout = self._lay_out()
        self._names = [c.feature.name for c in columns]
        self._known = {schema.id, *self._names}
        self._bagging = Bagging(
            [(slot.base, column) for slot, (_, column) in zip(self.layout.bags, self._bags, strict=True)]
        )

    def _lay_out(self) -> Layout:
        bags, dense, base, start = [], [], 0, 0
        for name, bag in self._bags:
            bags.append(BagSlot(name, bag.feature.kind, base, bag.rows))
            base += bag.rows
        for name, column in self._dense:
            dense.append(DenseSlot(name, column.feature.kind, start, column.width, column.targets))
            start += column.width
        return Layout(tuple(bags), tuple(dense))

    @classmethod
    def fit(cls, table: pa.Table, schema: FeatureSchema, source: str = "the table") -> "FeatureTransform":
        """Raises SchemaMismatch, with every error that `itemvec schema check` would show."""
        require_fit(table, schema, source)
        return cls(schema, [cls.fit_column(f, undictionaried(table.column(f.name))) for f in schema.features])

    @staticmethod
    def fit_column(feature: AnyFeature, values: pa.ChunkedArray) -> Column:
        """One column of a table that was checked."""
        fitted: Column = _column_of(feature).fit(feature, values)
        return fitted

    @staticmethod
    def fit_labels(feature: Nominal | Multi, counts: pa.Table) -> Column:
        """The same of a column whose labels are counted (`check.label_counts`)."""
        fitted: Column = _column_of(feature).of_counts(feature, counts)
        return fitted

    def column(self, name: str) -> Column:
        return next(column for column in self.columns if column.feature.name == name)

    def transform(self, items: Sequence[Mapping[str, Any]], pointer: str = "") -> Encoded:
        """Total on values; raises InvalidItem with `pointer`/row/column for each value of the wrong type.

        A column that an item lacks is missing; one that the schema does not name is reported as ignored.
        """
        n = len(items)
        notes = Notes(n, self._names, pointer)
        if n < FEW:
            bags = self._bagging.one_by_one([[item.get(name) for name, _ in self._bags] for item in items], notes)
        else:
            columns = [column.bags([item.get(name) for item in items], notes) for name, column in self._bags]
            bags = self._bagging.together(columns, n, notes)
        if n == 1 and self._numeric is not None:
            alone = [x for name, column in self._numeric for x in column.floats(items[0].get(name), notes)]
            dense = np.array([alone], np.float32)
        else:
            encoded = [column.encode([item.get(name) for item in items], notes) for name, column in self._dense]
            dense = _side_by_side(encoded, n)
        if notes.errors:
            raise InvalidItem(notes.errors)
        for i, item in enumerate(items):
            if not item.keys() <= self._known:
                for name in item.keys() - self._known:
                    notes.mark(name, "ignored", i)
        return Encoded(Batch(dense, *bags), notes.statuses)

    def transform_arrow(self, table: pa.Table, pointer: str = "") -> Encoded:
        """As `transform`, of items that come as a table."""
        n, present = len(table), set(table.column_names)
        ignored = [name for name in table.column_names if name not in self._known]
        notes = Notes(n, [*self._names, *ignored], pointer)
        for name in ignored:
            notes.put([name], table.column(name).is_valid().to_numpy()[:, None] * np.int8(CODES["ignored"]))
        columns = []
        for name, bag in self._bags:
            arrow = table.column(name) if name in present else pa.chunked_array([pa.nulls(n)])
            columns.append(bag.arrow_bags(arrow) or bag.bags(_values(arrow, bag.feature), notes))
        dense = [
            column.encode(_values(table.column(name), column.feature) if name in present else [None] * n, notes)
            for name, column in self._dense
        ]
        if notes.errors:
            raise InvalidItem(notes.errors)
        return Encoded(Batch(_side_by_side(dense, n), *self._bagging.together(columns, n, notes)), notes.statuses)

    def transform_table(self, table: pa.Table, first: int = 0) -> Batch:
        """The same numbers for a whole table, chunk by chunk. Raises SchemaMismatch (absent column, wrong type), which
        counts rows from `first`."""
        names = [f.name for f in self.schema.features]
        require_columns(table, names)
        batches = []
        for start in range(0, max(len(table), 1), CHUNK):
            try:
                batches.append(self.transform_arrow(table.select(names).slice(start, CHUNK)).batch)
            except InvalidItem as invalid:
                raise SchemaMismatch(
                    "the table", [_of_row(error, first + start) for error in invalid.errors[:5]]
                ) from None
        return Batch.concatenate(batches)

    # what is saved: transform.json for numbers, labels.parquet for vocabularies (any tool can read both)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "transform.json").write_text(json.dumps(self._state()), encoding="utf-8")
        tables = [_NO_LABELS.empty_table()]
        for name, vocabulary in self._vocabularies():
            columns = [[name] * len(vocabulary.labels), [str(x) for x in vocabulary.labels], vocabulary.counts]
            tables.append(pa.table(columns, _NO_LABELS))
        pa.parquet.write_table(pa.concat_tables(tables), folder / "labels.parquet", compression="zstd")

    @classmethod
    def load(cls, folder: Path, schema: FeatureSchema) -> "FeatureTransform":
        """Raises VersionCorrupt where the folder does not hold what the schema needs, SchemaError where a sentence
        encoder that it names cannot be loaded."""
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
            kind, own = _column_of(feature), fitted[feature.name]
            if isinstance(feature, Nominal | Multi):
                mine = table.filter(pc.equal(table.column("feature"), feature.name))
                labels = _as_dtype(mine.column("label").to_pylist(), feature.dtype)
                counts = mine.column("count").to_numpy()
                columns.append(kind(feature, Vocabulary(labels, counts, feature.hash_buckets, **own)))
            else:
                columns.append(kind(feature, **own))
        return cls(schema, columns)

    def digest(self) -> str:
        """sha256 over all that was fitted, whatever the version of the file formats."""
        sha = hashlib.sha256(json.dumps(self._state()["columns"], sort_keys=True).encode())
        for name, vocabulary in self._vocabularies():
            sha.update(json.dumps([name, *vocabulary.labels]).encode())
        return sha.hexdigest()

    def _state(self) -> dict[str, Any]:
        return {"format": self.FORMAT, "columns": {c.feature.name: c.state() for c in self.columns}}

    def _vocabularies(self) -> list[tuple[str, Vocabulary]]:
        return [(c.feature.name, c.vocabulary) for c in self.columns if isinstance(c, LabelColumn)]


def _side_by_side(dense: Sequence[Floats], n: int) -> Floats:
    """(n, D)"""
    return np.concatenate(dense, axis=1) if dense else np.zeros((n, 0), np.float32)


def _of_row(error: FieldError, start: int) -> str:
    """The error in words, where `start` is the first row of the chunk that it counts from."""
    row, where = error.pointer[1:].split("/", 1)
    return f"row {start + int(row)}/{where}: {error.detail}"


_NO_LABELS = pa.schema({"feature": pa.string(), "label": pa.string(), "count": pa.int64()})


def _values(column: pa.ChunkedArray, feature: Feature) -> Any:
    """What `encode` of the feature's column takes: the values of items, or what is quicker and means the same."""
    values: list[Any]
    try:
        if isinstance(feature, Numeric) and (pa.types.is_integer(column.type) or pa.types.is_floating(column.type)):
            return column.cast(pa.float64(), safe=False).to_numpy()  # NaN for null, which is missing too
        if isinstance(feature, Timestamp):
            values = moments(column)
        elif isinstance(feature, Series | Vector):
            values = list(number_lists(column))
        else:
            values = column.to_pylist()
    except (ValueError, OverflowError):  # a time beyond Python's years, text that is not UTF-8: wrong for every kind
        values = [scalar if scalar.is_valid else None for scalar in column]
    return values


def _as_dtype(labels: list[str], dtype: str) -> list[Label]:
    if dtype == "string":
        return [*labels]
    return [int(label) if dtype == "integer" else label == "True" for label in labels]
