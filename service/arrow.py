"""Arrow IPC streams in and out, for requests of many items: columns instead of an object an item.

A stream is read as strictly as JSON is. It comes from outside, and what it says of its own lengths is not to be
believed before it is checked: rows without any bytes behind them, one long text that a million rows point to (through
a dictionary or as views), compressed buffers that unpack to gigabytes. What is left afterwards are columns of plain
types, of bounded size, that can be turned into Python objects.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.errors import FieldError
from itemvec.notes import WORDS, Status, Statuses
from itemvec.schema import FeatureSchema
from service.problems import InvalidRequest, MalformedRequest, escaped
from service.requests import MAX_COLUMNS, Limits

STREAM: Final = b"application/vnd.apache.arrow.stream"

SPREAD: Final = 8
"""How many times its own bytes a body may take, when all that it only points to is written out."""

SPREAD_ANYWAY: Final = 8 << 20
"""Bytes that it may take however few were sent: no more than JSON has that says the same."""

IGNORED: Final = 16 << 20
"""Bytes that an answer may take to name, item by item, the columns that the schema does not. In JSON who wants to hear
so much has to send almost as much; an Arrow stream names a column once, and a boolean of it is a bit."""

UNIT: Final = 1e-3
"""By how much the length of a ready vector may differ from 1."""

STATUSES: Final = pa.map_(pa.string(), pa.string())
ERRORS: Final = pa.list_(pa.struct([("pointer", pa.string()), ("detail", pa.string())]))
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799
"""Since 1970, of the years 1 to 9999, which is all that Python and ISO 8601 can tell."""

PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def read_table(body: bytes, schema: FeatureSchema, limits: Limits, pointer: str) -> pa.Table:
    """The stream as one table of plain columns.

    Raises `MalformedRequest` for what is no such stream, `InvalidRequest` with `pointer`/column for a column of a type
    that no item has, with `pointer`/row/column for a value beyond a limit, and with `pointer` for more columns that the
    schema does not name than an answer has room for.
    """
    table = _table(body, limits, pointer)
    if not 1 <= len(table) <= limits.rows:
        raise InvalidRequest.at(pointer, f"has {len(table)} rows; a stream takes 1 to {limits.rows}")
    table = within(table, limits, pointer, len(body))
    _require_room_to_name(table, schema, pointer)
    return table


def _require_room_to_name(table: pa.Table, schema: FeatureSchema, pointer: str) -> None:
    ignored = set(table.column_names) - {schema.id, "id", *(feature.name for feature in schema.features)}
    size = len(table) * sum(len(f'"{name}":"ignored",'.encode()) for name in ignored)
    if size > IGNORED:
        detail = f"has {len(ignored)} columns that the model {schema.name!r} does not use; to name them item by item"
        detail = f"{detail} takes {size} bytes, of up to {IGNORED}: leave them out, or send fewer rows"
        raise InvalidRequest.at(pointer, detail)


def within(table: pa.Table, limits: Limits, pointer: str, size: int) -> pa.Table:
    """The same table with plain columns, none of them beyond a limit; it came as so many bytes."""
    if table.num_columns > MAX_COLUMNS:
        detail = f"has {table.num_columns} columns; an item takes up to {MAX_COLUMNS}"
        raise InvalidRequest.at(pointer, detail)
    names = table.column_names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest.at(f"{pointer}/{escaped(twice)}", "is the name of two columns")
    errors: list[FieldError] = []
    plain, room, spread = {}, max(SPREAD * size, SPREAD_ANYWAY), 0
    for name, column in zip(names, table.columns, strict=True):
        try:
            _require_plain(column.type)
            spread += _spread(column)
            if spread > room:
                detail = f"takes {spread} bytes, with the columns before it, when what it points to is written out"
                detail = f"{detail}; a body of {size} may take {room}: send fewer rows"
                raise InvalidRequest.at(f"{pointer}/{escaped(name)}", detail)
            plain[name] = _plain(column, limits)
        except _Wrong as wrong:
            row = "" if wrong.row is None else f"/{wrong.row}"
            errors.append(FieldError(f"{pointer}{row}/{escaped(name)}", str(wrong)))
    if errors:
        raise InvalidRequest(errors)
    return pa.table(plain, metadata=table.schema.metadata) if plain else table


def ready_vectors(
    table: pa.Table, schema: FeatureSchema, fingerprint: str, dim: int
) -> tuple[npt.NDArray[np.float32] | None, pa.Table]:
    """The vectors that came with the items (n, dim), and the other columns: `embedding`, where the schema has no such
    column and the stream's metadata names the fingerprint of what made them.

    Raises `InvalidRequest` for those of another fingerprint, or of another length than 1.
    """
    made = (table.schema.metadata or {}).get(b"fingerprint")
    if made is None or "embedding" not in table.column_names or any(f.name == "embedding" for f in schema.features):
        return None, table
    if made.decode("utf-8", "replace") != fingerprint:
        detail = f"is of fingerprint {made[:64].decode('utf-8', 'replace')!r}; what is served has {fingerprint}"
        raise InvalidRequest.at("/items/embedding", detail)
    column = table.column("embedding").combine_chunks()
    floats = pa.types.is_large_list(column.type) and pa.types.is_floating(column.type.value_type)
    if not floats or set(pc.unique(pc.list_value_length(column)).to_pylist()) != {dim}:
        raise InvalidRequest.at("/items/embedding", f"expected a list of {dim} floats on each row")
    vectors = column.flatten().cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, dim)
    wrong = np.flatnonzero(~(np.abs(np.linalg.norm(vectors, axis=1) - 1.0) < UNIT))
    if wrong.size:
        raise InvalidRequest.at(f"/items/{wrong[0]}/embedding", "is not of length 1, as vectors of a model are")
    return vectors, table.drop_columns(["embedding"])


def without_ids(table: pa.Table, schema: FeatureSchema) -> tuple[pa.ChunkedArray | None, pa.Table]:
    """The ids, of `id` or the column that the schema calls so, and the other columns: where there is none, one of
    nulls, since Arrow forgets how many rows a table without columns has."""
    features = [feature.name for feature in schema.features]
    ids = None
    for name in dict.fromkeys((schema.id, "id")):
        if name in table.column_names and name not in features:
            ids, table = table.column(name), table.drop_columns([name])
            break
    return ids, table if table.num_columns else table.append_column(features[0], pa.nulls(len(table)))


def read_items(
    body: bytes, schema: FeatureSchema, limits: Limits, pointer: str
) -> tuple[pa.ChunkedArray | None, pa.Table]:
    """The ids, where there are any, and the columns. Raises what `read_table` raises."""
    return without_ids(read_table(body, schema, limits, pointer), schema)


def embeddings(
    ids: pa.ChunkedArray | None,
    vectors: npt.NDArray[np.float32],
    statuses: Sequence[Mapping[str, Status]],
    metadata: Mapping[str, str],
) -> bytes:
    """A stream of one row an item: id (if there was one), embedding (a list of dim float32), columns (a map)."""
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    columns = {
        "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        "columns": _map(statuses),
    }
    return _stream(pa.table(columns if ids is None else {"id": ids, **columns}), metadata)


def outcomes(
    entries: Sequence[Mapping[str, Any]], statuses: Sequence[Mapping[str, Status]], metadata: Mapping[str, str]
) -> bytes:
    """What became of each item: id, status, columns (a map), errors (pointer and detail; null where it was taken)."""
    problems = [entry.get("problem") for entry in entries]
    table = pa.table(
        {
            "id": pa.array([entry["id"] for entry in entries], pa.string()),
            "status": pa.array([entry["status"] for entry in entries], pa.string()),
            "columns": _map(statuses),
            "errors": pa.array([None if p is None else p["errors"] for p in problems], ERRORS),
        }
    )
    return _stream(table, metadata)


def _map(statuses: Sequence[Mapping[str, Status]]) -> pa.MapArray:
    items, columns, codes, names = Statuses.of(statuses).marks
    offsets = np.zeros(len(statuses) + 1, np.int32)
    np.cumsum(np.bincount(items, minlength=len(statuses)), out=offsets[1:])
    keys = pa.array(names, pa.string()).take(pa.array(columns))
    return pa.MapArray.from_arrays(pa.array(offsets), keys, pa.array(WORDS, pa.string()).take(pa.array(codes - 1)))


def _stream(table: pa.Table, metadata: Mapping[str, str]) -> bytes:
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata(dict(metadata))
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _table(body: bytes, limits: Limits, pointer: str) -> pa.Table:
    source = pa.BufferReader(body)
    try:
        if any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(source)):
            raise MalformedRequest("the Arrow stream has compressed buffers: send it uncompressed, as is the default")
        if behind := len(body) - source.tell():
            raise MalformedRequest(
                f"{behind} bytes stand behind the end of the Arrow stream: send one stream a request"
            )
        batches, rows, entries = [], 0, 0
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            for batch in reader:
                rows += batch.num_rows
                if rows > limits.rows:
                    detail = f"has {rows} rows or more; a stream takes 1 to {limits.rows}"
                    raise InvalidRequest.at(pointer, detail)
                entries += sum(map(_entries, batch.columns))  # each batch is checked with the whole of its dictionaries
                if entries > (room := SPREAD * len(body)):
                    detail = f"has dictionaries of {entries} entries, each counted in every batch; of {len(body)} bytes"
                    raise InvalidRequest.at(pointer, f"{detail} {room} are taken: send fewer, larger batches")
                batch.validate(full=True)  # offsets and texts that lie outside of what was sent
                batches.append(batch)
            _ = reader.schema.names  # raises where one is no text
            return pa.Table.from_batches(batches, reader.schema)
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MalformedRequest(f"the body is not an Arrow IPC stream: {reason}") from None


def _entries(column: pa.Array) -> int:
    """Of its dictionary, also of one inside of lists."""
    while column.type.id in _LISTS:
        column = column.values
    return len(column.dictionary) if pa.types.is_dictionary(column.type) else 0


def _is_compressed(message: pa.ipc.Message) -> bool:
    """Is there a `compression` in the message's header? PyArrow unpacks without asking, to whatever size it says.

    The header is a flatbuffer (Arrow's format, Message.fbs): tables whose fields are found through their vtables.
    """
    metadata = message.metadata.to_pybytes()
    (root,) = struct.unpack_from("<I", metadata)
    batch = _field(metadata, root, number=2)
    if batch is not None and message.type == "dictionary":
        batch = _field(metadata, batch, number=1)
    return batch is not None and message.type != "schema" and _field(metadata, batch, number=3) is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """Where the table lies that is field `number` of the one at `table`; None where it is absent."""
    (back,) = struct.unpack_from("<i", data, table)
    vtable = table - back
    (size,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * number >= size:
        return None
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    if offset == 0:
        return None
    (forward,) = struct.unpack_from("<I", data, table + offset)
    return int(table + offset + forward)


class _Wrong(Exception):
    def __init__(self, detail: str, row: int | None = None) -> None:
        super().__init__(detail)
        self.row = row


def _ids(*kinds: pa.DataType) -> frozenset[int]:
    return frozenset(kind.id for kind in kinds)


_LISTS: Final = _ids(pa.list_(pa.null()), pa.large_list(pa.null()), pa.list_(pa.null(), 1))
_TEXTS: Final = _ids(pa.string(), pa.large_string(), pa.string_view())
_VALUES: Final = _TEXTS | _ids(
    pa.null(), pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(),
    pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal32(1), pa.decimal64(1), pa.decimal128(1),
    pa.decimal256(1), pa.date32(), pa.date64(), pa.timestamp("s"),
)  # fmt: skip
_SENT: Final = _VALUES - _ids(pa.null(), pa.string_view())
"""Whose bytes were sent, each for itself."""


def _require_plain(kind: pa.DataType) -> None:
    inner = kind.value_type if kind.id in _LISTS else kind
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    if inner.id not in _VALUES:
        raise _Wrong(f"has the Arrow type {kind}; an item has strings, numbers, booleans, dates, and lists of them")


def _spread(column: pa.ChunkedArray) -> int:
    """The bytes of what the column only points to, or makes of none, each as often as it stands there."""
    kind = column.type
    if kind.id in _LISTS:
        return 0 if kind.value_type.id in _SENT else _spread(_inside(column))
    if pa.types.is_null(kind):
        return len(column)
    if pa.types.is_string_view(kind):
        return sum(pc.sum(_lengths(chunk)).as_py() or 0 for chunk in column.chunks)
    if pa.types.is_dictionary(kind) and kind.value_type.id in _TEXTS:
        parts = [(_lengths(chunk.dictionary), chunk.indices) for chunk in column.chunks]
        return sum(pc.sum(lengths.take(indices)).as_py() or 0 for lengths, indices in parts)
    return 0


def _lengths(texts: pa.Array) -> pa.Array:
    """In bytes. Arrow's own function knows no views: each is 16 bytes, of which the first four are the length."""
    if not pa.types.is_string_view(texts.type):
        return pc.binary_length(texts)
    validity, views, *_ = texts.buffers()
    numbers = pa.Array.from_buffers(pa.int32(), 4 * (texts.offset + len(texts)), [None, views])
    fours = pa.Array.from_buffers(
        pa.list_(pa.int32(), 4), len(texts), [validity], offset=texts.offset, children=[numbers]
    )
    return pc.list_element(fours, 0)


def _plain(column: pa.ChunkedArray, limits: Limits) -> pa.ChunkedArray:
    """The column as strings, booleans, numbers, moments or lists of them; raises `_Wrong`."""
    return _lists(column, limits) if column.type.id in _LISTS else _values(_decoded(column), limits)


def _values(column: pa.ChunkedArray, limits: Limits) -> pa.ChunkedArray:
    kind, types = column.type, pa.types
    if kind.id in _TEXTS:
        column = column.cast(pa.large_string()) if types.is_string_view(kind) else column
        if (pc.max(pc.binary_length(column)).as_py() or 0) > limits.string:  # bytes are counted faster than characters
            lengths = pc.utf8_length(column)
            if (longest := pc.max(lengths).as_py()) > limits.string:
                detail = f"has {longest} characters; a string takes up to {limits.string}"
                raise _Wrong(detail, pc.index(lengths, longest).as_py())
        return column
    if types.is_timestamp(kind):
        _require_years(column)
        return column.cast(pa.timestamp("us", kind.tz and "UTC"), safe=False)
    if types.is_date(kind):
        _require_years(column.cast(pa.timestamp("ms" if types.is_date64(kind) else "s")))
        return column
    if types.is_decimal(kind):
        return column.cast(pa.float64())
    if types.is_floating(kind):
        return _finite(column.cast(pa.float32()) if types.is_float16(kind) else column)
    return column


def _finite(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Without numbers that JSON has no word for: they are missing."""
    if math.isfinite(pc.sum(column).as_py() or 0.0):  # so all of them are, and this is faster than a look at each
        return column
    return pc.if_else(pc.is_finite(column), column, None)


def _require_years(moments: pa.ChunkedArray) -> None:
    """Before they become microseconds, when what is far beyond would wrap around."""
    ends, scale = pc.min_max(moments.cast(pa.int64())).as_py(), PER_SECOND[moments.type.unit]
    if ends["min"] is not None and (ends["min"] < FIRST_SECOND * scale or ends["max"] >= (LAST_SECOND + 1) * scale):
        raise _Wrong("has a moment beyond the years 1 to 9999")


def _lists(column: pa.ChunkedArray, limits: Limits) -> pa.ChunkedArray:
    counts, mask = pc.list_value_length(column), None
    if column.null_count:
        counts, mask = counts.fill_null(0), column.is_null().combine_chunks()
    lengths = counts.to_numpy()
    longest = column.type.list_size if pa.types.is_fixed_size_list(column.type) else lengths.max(initial=0)
    if longest > limits.labels:
        detail = f"has {longest} entries; a column takes up to {limits.labels}"
        raise _Wrong(detail, int(lengths.argmax()))
    ends = np.zeros(len(lengths) + 1, np.int64)
    lengths.cumsum(out=ends[1:])
    try:
        inside = _values(_decoded(_inside(column)), limits)
    except _Wrong as wrong:
        if wrong.row is None:
            raise
        raise _Wrong(str(wrong), int(np.searchsorted(ends, wrong.row, "right")) - 1) from None
    return pa.chunked_array([pa.LargeListArray.from_arrays(ends, inside.combine_chunks(), mask=mask)])


def _inside(lists: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([pc.list_flatten(chunk) for chunk in lists.chunks], lists.type.value_type)


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Values in place of codes."""
    if not pa.types.is_dictionary(column.type):
        return column
    inner = column.type.value_type
    if not pa.types.is_string_view(inner):
        return column.cast(inner)
    return pa.chunked_array([_taken(chunk.dictionary, chunk.indices) for chunk in column.chunks], inner)


def _taken(texts: pa.Array, indices: pa.Array) -> pa.Array:
    """Arrow's own `take` knows no views, but what is as long: 16 bytes each."""
    validity, views, *data = texts.buffers()
    taken = pa.Array.from_buffers(pa.binary(16), len(texts), [validity, views], offset=texts.offset).take(indices)
    return pa.Array.from_buffers(texts.type, len(taken), [*taken.buffers(), *data], offset=taken.offset)


def items_of(table: pa.Table) -> list[dict[str, Any]]:
    """Items as JSON would have brought them, but for moments, which become text when they are stored; without what is
    null."""
    names = table.column_names
    columns = [column.to_pylist() for column in table.columns]
    return [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in zip(*columns, strict=True)
    ]
