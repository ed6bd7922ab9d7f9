"""The plain encodings of an item table: integer codes, one-hot and multi-hot, hashing. Nothing is trained.

They are what a learned embedding has to beat, and what models eat that take wide, sparse rows. A `PlainEncoding` is
fitted like a `FeatureTransform`, which reads labels, missing values and wrong types for it. Numbers stay numbers in
all of them: `numeric` as in the table, `timestamp` in Unix seconds, `ordinal` as a rank from 1. What differs is what
becomes of `nominal` and `multi` columns:

- `integer`: a label is its place in the vocabulary, from 1; a set is the list of its labels' places. An unseen label
  is 0;
- `one-hot` and `multi-hot`, which are one encoding: a column of zeros and ones per label. A nominal value has at most
  one 1, hence the first name, a set of n labels has n, hence the second. An unseen label has none;
- `hashing` (Weinberger et al. 2009): each label counts +1 or -1 in one of a fixed number of buckets that all columns
  share, both chosen by its hash. There is no vocabulary, so no label is unseen, and text can take part.

Text has no labels, and is left out of all but hashing. A kind that the model reads as a few numbers (`series`,
`vector`, text with a sentence encoder) is those numbers.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from itemvec.bags import LabelColumn
from itemvec.check import require_columns, undictionaried
from itemvec.dense import moments
from itemvec.errors import ConfigError, TableError
from itemvec.features import FIRST, MISSING, Batch, FeatureTransform, Layout
from itemvec.schema import FeatureSchema, Multi, Nominal, Numeric, Ordinal, Text, Timestamp
from itemvec.sparse import Csr, bounds
from itemvec.values import canonical, hashed, unix_seconds

How = Literal["integer", "one-hot", "multi-hot", "hashing"]
Form = Literal["columns", "sparse"]
Scale = Literal["raw", "standard"]
Number = Numeric | Timestamp | Ordinal
"""Kinds that are one number each in every plain encoding."""

BUCKETS = 1024
WIDE = 1_000
"""Columns above which an encoding is written sparse unless asked: readers of Parquet slow down with every column."""

CHUNK = 32_768
"""Rows that are encoded at once."""

WIDEST = 10_000
"""Columns above which it is not written as columns at all: reading 10,000 of them takes gigabytes, however few the
rows."""

CELLS = 1 << 26
"""Zeros and ones that are held at once where they are written as columns."""


class PlainEncoding:
    """The columns of an item table as numbers.

    >>> table = pa.table({"id": [1, 2], "provider": ["HBO", "Hulu"], "genres": [["War"], ["War", "Drama"]]})
    >>> schema = FeatureSchema.from_yaml('''
    ... name: films
    ... id: id
    ... features:
    ...   provider: {kind: nominal, min_count: 1}
    ...   genres: {kind: multi, min_count: 1}
    ... ''')
    >>> encoding = PlainEncoding.fit(table, schema)
    >>> encoding.names
    ('provider=HBO', 'provider=Hulu', 'genres=War', 'genres=Drama')
    >>> encoding.matrix(table).toarray()
    array([[1., 0., 1., 0.],
           [0., 1., 1., 1.]], dtype=float32)
    """

    def __init__(
        self,
        transform: FeatureTransform,
        how: How = "one-hot",
        buckets: int = BUCKETS,
        scaling: dict[str, tuple[float, float]] | None = None,
    ) -> None:
        """`scaling`: mean and standard deviation of each column of numbers; None leaves them as they are."""
        self.schema = encoded_schema(transform.schema, how)
        self.transform = FeatureTransform(self.schema, [transform.column(f.name) for f in self.schema.features])
        if buckets < 1:
            raise ConfigError(f"hashing needs at least one bucket, not {buckets}")
        self.how, self.buckets = how, buckets
        self._scaling = scaling
        self._dense = {slot.name: slot for slot in self.transform.layout.dense}
        self.names = tuple(self._names())
        """Of the columns of numbers that come out, in their order."""

    @classmethod
    def fit(
        cls, table: pa.Table, schema: FeatureSchema, how: How = "one-hot", buckets: int = BUCKETS, scale: Scale = "raw"
    ) -> "PlainEncoding":
        """`scale="standard"` brings each column of numbers to mean 0 and variance 1, and its missing values to 0.

        Raises SchemaMismatch with every error that `itemvec schema check` would show for the columns that are encoded.
        """
        schema = encoded_schema(schema, how)
        if how == "hashing":  # uses no vocabulary: none is counted, and no label is too rare
            none = {"min_count": 1, "max_labels": 1, "labels": None, "hash_buckets": 0}
            features = [f.model_copy(update=none) if isinstance(f, Nominal | Multi) else f for f in schema.features]
            schema = schema.model_copy(update={"features": tuple(features)})
        transform = FeatureTransform.fit(table, schema)
        scaling = None
        if scale == "standard":
            scaling = {f.name: _spread(_numbers(f, table)) for f in schema.features if isinstance(f, Number)}
        return cls(transform, how, buckets, scaling)

    def matrix(self, table: pa.Table) -> Csr:
        """(rows, columns named by `names`); missing numbers are NaN, or 0 if numbers are scaled.

        Raises SchemaMismatch (absent column, wrong type), ConfigError for integer codes, whose sets fit in no matrix.
        """
        if self.how == "integer":
            raise ConfigError("integer codes of a set are a list, which fits in no matrix: take them as columns")
        return Csr.stacked([Csr.beside([*map(_as_csr, self._parts(chunk))]) for chunk in _chunks(table, CHUNK)])

    def columns(self, table: pa.Table) -> pa.Table:
        """The table's id, and a column for each of `names`: uint8 for zeros and ones, int32 or lists of it for codes.

        A missing number or code is null. Raises SchemaMismatch, and ConfigError where two columns would share a name.
        """
        arrays: list[pa.Array] = []
        for part in self._parts(table):
            arrays += self._as_arrays(part) if isinstance(part, Csr) else part
        return self._with_ids(table, arrays, self.names)

    def sparse(self, table: pa.Table) -> pa.Table:
        """The table's id, and per row the `indices` of the columns that are not 0, with their `values`.

        Raises as `matrix` and `columns` do.
        """
        matrix = self.matrix(table)
        offsets = pa.array(matrix.indptr.astype(np.int32))
        lists = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (matrix.indices, matrix.data)]
        return self._with_ids(table, lists, ["indices", "values"])

    def _with_ids(self, table: pa.Table, arrays: Sequence[pa.Array], names: Sequence[str]) -> pa.Table:
        named = [self.schema.id, *names]
        if len(set(named)) < len(named):
            twice = next(name for name in named if named.count(name) > 1)
            raise ConfigError(f"two columns would be named {twice!r}: rename the table's, or write the other layout")
        require_columns(table, [self.schema.id])
        return pa.Table.from_arrays([table.column(self.schema.id).combine_chunks(), *arrays], names=named)

    def _names(self) -> Iterator[str]:
        if self.how == "hashing":
            yield from (f"#{bucket}" for bucket in range(self.buckets))
        for feature in self.schema.features:
            if isinstance(feature, Number):
                yield feature.name
            elif slot := self._dense.get(feature.name):
                yield from (f"{feature.name}[{i}]" for i in range(slot.targets))
            elif self.how == "integer":
                yield feature.name
            elif self.how != "hashing":
                yield from label_names(self.transform, feature.name)

    def _parts(self, table: pa.Table) -> Iterator[Csr | list[pa.Array]]:
        """Sparse blocks and columns of numbers, side by side in the order of `names`."""
        batch = self.transform.transform_table(table)
        found = bags(self.transform.layout, batch)
        if self.how == "hashing":
            yield self._hashed(table, found)
        for feature in self.schema.features:
            name = feature.name
            if isinstance(feature, Number):
                yield [self._scaled(name, _numbers(feature, table))]
            elif slot := self._dense.get(name):
                missing = (batch.dense[:, slot.flag] == 1) & (self._scaling is None)
                floats = batch.dense[:, slot.start : slot.start + slot.targets]
                yield [pa.array(column, mask=missing) for column in floats.T]
            elif self.how == "integer":
                yield [_codes(found[name], isinstance(feature, Multi))]
            elif self.how != "hashing":
                yield found[name].tail(FIRST)

    def _hashed(self, table: pa.Table, found: dict[str, Csr]) -> Csr:
        blocks, tokens = [Csr.of_rows([[]] * len(table), 0)], list[str]()
        for feature in self.schema.features:
            if isinstance(feature, Nominal | Multi):
                block, names = _labels(feature, table)
            elif isinstance(feature, Text) and feature.name in found:
                block, names = found[feature.name].tail(FIRST), label_names(self.transform, feature.name)
            else:
                continue
            blocks.append(block)
            tokens += names
        return folded(Csr.beside(blocks), tokens, self.buckets)

    def _scaled(self, name: str, numbers: pa.Array) -> pa.Array:
        if self._scaling is None:
            return numbers
        mean, std = self._scaling[name]
        values = numbers.cast(pa.float64(), safe=False).fill_null(mean).to_numpy()
        return pa.array(((values - mean) / std).astype(np.float32))

    def _as_arrays(self, block: Csr) -> list[pa.Array]:
        cells = np.zeros((block.width, block.shape[0]), np.float32 if self.how == "hashing" else np.uint8)
        cells[block.indices, block.rows] = block.data
        return [pa.array(column) for column in cells]


def encoded_schema(schema: FeatureSchema, how: How) -> FeatureSchema:
    """The schema without the columns that the encoding leaves out: text, which has no labels.

    Raises ConfigError for an unknown encoding, and where nothing would be left.
    """
    if how not in get_args(How):
        raise ConfigError(f"no plain encoding {how!r}; there is {', '.join(get_args(How))}")
    kept = tuple(
        f for f in schema.features if how == "hashing" or not isinstance(f, Text) or f.sentence_encoder is not None
    )
    if not kept:
        raise ConfigError(f"schema {schema.name!r} has only text, which has no labels to encode as {how}: use hashing")
    return schema.model_copy(update={"features": kept})


# --- columns of labels ------------------------------------------------------------------------------------------------


def bags(layout: Layout, batch: Batch) -> dict[str, Csr]:
    """Per column of labels or text: (n, rows of its table), a 1 for each row that an item has, whatever its weight.

    The first two columns are for unseen and missing; `.tail(FIRST)` leaves the labels, as `label_names` names them.
    """
    starts = bounds(batch.lengths.ravel())
    found = {}
    for f, slot in enumerate(layout.bags):
        indptr = bounds(batch.lengths[:, f])
        shift = starts[:-1][f :: len(layout.bags)] - indptr[:-1]
        rows = batch.indices[np.repeat(shift, np.diff(indptr)) + np.arange(indptr[-1])] - slot.base
        found[slot.name] = Csr(np.ones(len(rows), np.float32), rows.astype(np.int32), indptr, slot.rows)
    return found


def label_names(transform: FeatureTransform, name: str) -> list[str]:
    """For each row of a column's table after the first two: `provider=Netflix`, or `provider#7` for a bucket."""
    column = transform.column(name)
    slot = next(slot for slot in transform.layout.bags if slot.name == name)
    labels: Sequence[Any] = ()
    if isinstance(column, LabelColumn):
        labels = column.vocabulary.labels
    elif isinstance(column.feature, Ordinal):
        labels = column.feature.order
    return [f"{name}={label}" for label in labels] + [f"{name}#{b}" for b in range(slot.rows - FIRST - len(labels))]


def _codes(bag: Csr, is_set: bool) -> pa.Array:
    """Places in the vocabulary from 1, 0 for an unseen label, null for a missing value."""
    here = bag.indices != MISSING
    codes = np.maximum(bag.indices - np.int32(FIRST - 1), 0)
    if not is_set:
        return pa.array(codes, mask=~here)
    lengths = np.bincount(bag.rows[here], minlength=bag.shape[0])
    offsets = pa.array(bounds(lengths).astype(np.int32))
    return pa.ListArray.from_arrays(offsets, pa.array(codes[here]), mask=pa.array(lengths == 0))


def _labels(feature: Nominal | Multi, table: pa.Table) -> tuple[Csr, list[str]]:
    """All labels of a column, known or not: who has which, and a token for each."""
    places: dict[str, int] = {}
    rows = []
    for value in table.column(feature.name).to_pylist():
        labels = [value] if isinstance(feature, Nominal) else value or []
        if isinstance(labels, str):
            labels = labels.split(feature.separator)  # type: ignore[union-attr]
        known = {canonical(label) for label in labels} - {None}
        rows.append(sorted(places.setdefault(f"{feature.name}={label}", len(places)) for label in known))
    return Csr.of_rows(rows, len(places)), list(places)


# --- hashing ----------------------------------------------------------------------------------------------------------


def folded(matrix: Csr, tokens: Sequence[str], buckets: int) -> Csr:
    """(n, buckets): the columns of `matrix`, which `tokens` name, added up in their buckets (Weinberger et al. 2009).

    Half of the tokens count -1, by their hash: tokens that meet in a bucket cancel as often as they add up, so that
    inner products stay right on average.
    """
    drawn = np.array([hashed(token, 2 * buckets) for token in tokens], np.int64)
    bucket, sign = drawn // 2, (1 - 2 * (drawn % 2)).astype(np.float32)
    places, where = np.unique(matrix.rows * buckets + bucket[matrix.indices], return_inverse=True)
    values = np.bincount(where, matrix.data * sign[matrix.indices], len(places))
    left = values != 0  # +1 and -1 cancel
    places, values = places[left], values[left].astype(np.float32)
    lengths = np.bincount(places // buckets, minlength=matrix.shape[0])
    return Csr(values, (places % buckets).astype(np.int32), bounds(lengths), buckets)


# --- columns of numbers -----------------------------------------------------------------------------------------------


def _numbers(feature: Number, table: pa.Table) -> pa.Array:
    """(n,) numbers of one column; null where missing, and where an ordinal label stands in no order."""
    column = undictionaried(table.column(feature.name))
    if isinstance(feature, Ordinal):
        ranks = {(type(label), canonical(label)): rank for rank, label in enumerate(feature.order, 1)}
        return pa.array([ranks.get((type(v), canonical(v))) for v in column.to_pylist()], pa.int32())
    if isinstance(feature, Timestamp):
        return pa.array([None if v is None else unix_seconds(v) for v in moments(column)], pa.float64())
    column = column.combine_chunks()
    if pa.types.is_integer(column.type):
        return column
    column = column.cast(pa.float64())
    return pc.if_else(pc.is_nan(column), None, column)


def _spread(numbers: pa.Array) -> tuple[float, float]:
    """Mean and standard deviation; 1 for the deviation of a constant."""
    return pc.mean(numbers).as_py() or 0.0, pc.stddev(numbers).as_py() or 1.0


def _as_csr(part: Csr | list[pa.Array]) -> Csr:
    if isinstance(part, Csr):
        return part
    numbers = np.stack([column.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False) for column in part], 1)
    rows, indices = np.nonzero(numbers)
    lengths = np.bincount(rows, minlength=len(numbers))
    return Csr(numbers[rows, indices], indices.astype(np.int32), bounds(lengths), numbers.shape[1])


# --- files ------------------------------------------------------------------------------------------------------------


class SparseFile(NamedTuple):
    ids: list[Any]
    matrix: Csr
    names: list[str]
    """Of the matrix's columns."""


def write_encoding(
    encoding: PlainEncoding,
    table: pa.Table,
    path: str | Path,
    form: Form,
    progress: Callable[[int], object] = lambda rows: None,
) -> None:
    """The table encoded into a Parquet file, chunk by chunk, so that the zeros of a wide table never lie in memory.

    The file's metadata has a key `itemvec` with JSON: `encoding`, `names`, and for integer codes the `labels` of each
    column, whose first has code 1. `progress` is told the rows of each chunk. Nothing is left of a file that fails.
    """
    if form == "columns" and len(encoding.names) > WIDEST:
        raise ConfigError(f"{len(encoding.names):,} columns are too many for one file: write the sparse layout")
    path = Path(path)
    encode = encoding.columns if form == "columns" else encoding.sparse
    rows = CHUNK if form == "sparse" else max(1, min(CHUNK, CELLS // len(encoding.names)))
    about = {b"itemvec": json.dumps(_about(encoding)).encode()}
    part = path.with_name(f".{path.name}.part")
    encoded = (encode(chunk).replace_schema_metadata(about) for chunk in _chunks(table, rows))
    first = next(encoded)
    try:
        with pa.parquet.ParquetWriter(part, first.schema, compression="zstd") as writer:
            for chunk in chain([first], encoded):
                writer.write_table(chunk)
                progress(len(chunk))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_sparse(path: str | Path) -> SparseFile:
    """Ids, matrix and column names of a sparse file that `itemvec encode` wrote. Raises TableError for another file."""
    try:
        table = pa.parquet.read_table(path)
        about = json.loads((table.schema.metadata or {})[b"itemvec"])
        id_column, indices, values = (table.column(i).combine_chunks() for i in (0, "indices", "values"))
    except (OSError, pa.ArrowException, KeyError) as error:
        raise TableError(f"{path} is not a sparse file of itemvec encode: {' '.join(str(error).split())}") from None
    matrix = Csr(
        values.flatten().to_numpy(),
        indices.flatten().to_numpy(),
        bounds(pc.list_value_length(indices).to_numpy()),
        len(about["names"]),
    )
    return SparseFile(id_column.to_pylist(), matrix, about["names"])


def _about(encoding: PlainEncoding) -> dict[str, Any]:
    about: dict[str, Any] = {"encoding": encoding.how, "names": encoding.names}
    if encoding.how == "integer":
        columns = [column for column in encoding.transform.columns if isinstance(column, LabelColumn)]
        about["labels"] = {column.feature.name: column.vocabulary.labels for column in columns}
    return about


def _chunks(table: pa.Table, rows: int) -> Iterator[pa.Table]:
    for start in range(0, max(len(table), 1), rows):
        yield table.slice(start, rows)
