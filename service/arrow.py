"""Arrow IPC streams in and out, for requests of many items: columns instead of an object an item.

A stream is read as strictly as JSON is. It comes from outside, and what it says of its own lengths is not to be
believed before it is checked: rows without any bytes behind them, a dictionary of one long text that a million rows
point to, compressed buffers that unpack to gigabytes. What is left afterwards are columns of plain types, of bounded
size, that can be turned into Python objects.
"""

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
"""How many times its bytes a dictionary-encoded column may take when it is written out."""

UNIT: Final = 1e-3
"""By how much the length of a ready vector may differ from 1."""

STATUSES: Final = pa.map_(pa.string(), pa.string())
ERRORS: Final = pa.list_(pa.struct([("pointer", pa.string()), ("detail", pa.string())]))
FIRST_SECOND, LAST_SECOND = -62_135_596_800, 253_402_300_799
"""Since 1970, of the years 1 to 9999, which is all that Python and ISO 8601 can tell."""

PER_SECOND: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def read_table(body: bytes, limits: Limits, pointer: str) -> pa.Table:
    """The stream as one table of plain columns.

    Raises `MalformedRequest` for what is no such stream, `InvalidRequest` with `pointer`/column for a column of a type
    that no item has, and with `pointer`/row/column for a value beyond a limit.
    """
    table = _table(body, limits, pointer)
    if not 1 <= len(table) <= limits.rows:
        raise InvalidRequest.at(pointer, f"has {len(table)} rows; a stream takes 1 to {limits.rows}")
    return within(table, limits, pointer, len(body))


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
    plain = {}
    for name, column in zip(names, table.columns, strict=True):
        try:
            plain[name] = _plain(column, limits, SPREAD * size)
        except _Wrong as wrong:
            row = "" if wrong.row is None else f"/{wrong.row}"
            errors.append(FieldError(f"{pointer}{row}/{escaped(name)}", str(wrong)))
    if errors:
        raise InvalidRequest(errors)
    return pa.table(plain, metadata=table.schema.metadata)


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
    """The ids and the other columns: `id`, or the column that the schema calls so."""
    features = {feature.name for feature in schema.features}
    for name in dict.fromkeys((schema.id, "id")):
        if name in table.column_names and name not in features:
            return table.column(name), table.drop_columns([name])
    return None, table


def read_items(
    body: bytes, schema: FeatureSchema, limits: Limits, pointer: str
) -> tuple[pa.ChunkedArray | None, pa.Table]:
    """The ids, where there are any, and the columns. Raises what `read_table` raises."""
    return without_ids(read_table(body, limits, pointer), schema)


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
    try:
        if any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(pa.py_buffer(body))):
            raise MalformedRequest("the Arrow stream has compressed buffers: send it uncompressed, as is the default")
        batches, rows = [], 0
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            for batch in reader:
                rows += batch.num_rows
                if rows > limits.rows:
                    detail = f"has {rows} rows or more; a stream takes 1 to {limits.rows}"
                    raise InvalidRequest.at(pointer, detail)
                batch.validate(full=True)  # offsets and texts that lie outside of what was sent
                batches.append(batch)
            _ = reader.schema.names  # raises where one is no text
            return pa.Table.from_batches(batches, reader.schema)
    except (pa.ArrowException, OSError, struct.error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MalformedRequest(f"the body is not an Arrow IPC stream: {reason}") from None


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


def _plain(column: pa.ChunkedArray, limits: Limits, room: int) -> pa.ChunkedArray:
    """The column as strings, booleans, numbers, moments or lists of them; raises `_Wrong`."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return _lists(column, limits, room)
    if pa.types.is_dictionary(kind):
        return _values(_decoded(column, room), limits)
    return _values(column, limits)


def _values(column: pa.ChunkedArray, limits: Limits) -> pa.ChunkedArray:
    kind, types = column.type, pa.types
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        column = column.cast(pa.large_string()) if types.is_string_view(kind) else column
        if (pc.max(pc.binary_length(column)).as_py() or 0) > limits.string:  # bytes are counted faster than characters
            lengths = pc.utf8_length(column)
            if (longest := pc.max(lengths).as_py()) > limits.string:
                detail = f"has {longest} characters; a string takes up to {limits.string}"
                raise _Wrong(detail, pc.index(lengths, longest).as_py())
        return column
    if types.is_timestamp(kind):
        return _moments(column)
    if types.is_date(kind):
        _moments(column.cast(pa.timestamp("ms" if types.is_date64(kind) else "s")))
        return column
    if types.is_float16(kind):
        return column.cast(pa.float32())
    if types.is_decimal(kind):
        return column.cast(pa.float64())
    if not (types.is_null(kind) or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)):
        raise _Wrong(f"has the Arrow type {kind}; an item has strings, numbers, booleans, dates, and lists of them")
    return column


def _moments(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """In microseconds, which would wrap around if they were made of moments that are not looked at before."""
    ends, scale = pc.min_max(column.cast(pa.int64())).as_py(), PER_SECOND[column.type.unit]
    if ends["min"] is not None and (ends["min"] < FIRST_SECOND * scale or ends["max"] >= (LAST_SECOND + 1) * scale):
        raise _Wrong("has a moment beyond the years 1 to 9999")
    return column.cast(pa.timestamp("us", column.type.tz and "UTC"), safe=False)


def _lists(column: pa.ChunkedArray, limits: Limits, room: int) -> pa.ChunkedArray:
    lengths = None if pa.types.is_fixed_size_list(column.type) else pc.list_value_length(column)
    longest = column.type.list_size if lengths is None else pc.max(lengths).as_py() or 0
    if longest > limits.labels:
        row = 0 if lengths is None else pc.index(lengths, longest).as_py()
        raise _Wrong(f"has {longest} entries; a column takes up to {limits.labels}", row)
    inner = column.type.value_type
    if pa.types.is_nested(inner):
        raise _Wrong(f"has the Arrow type {column.type}; an item has lists of strings, numbers, booleans and dates")
    values = pa.chunked_array([pc.list_flatten(chunk) for chunk in column.chunks], inner)
    try:
        plain = _values(_decoded(values, room) if pa.types.is_dictionary(inner) else values, limits)
    except _Wrong as wrong:
        if wrong.row is None:
            raise
        parents = pa.chunked_array([pc.list_parent_indices(column.combine_chunks())])
        raise _Wrong(str(wrong), parents[wrong.row].as_py()) from None
    return column.cast(pa.large_list(plain.type))


def _decoded(column: pa.ChunkedArray, room: int) -> pa.ChunkedArray:
    """Written out, if that is not far more than what was sent."""
    inner = column.type.value_type
    if pa.types.is_nested(inner) or pa.types.is_dictionary(inner):
        raise _Wrong(f"has the Arrow type {column.type}; an item has strings, numbers, booleans, dates, and lists")
    if pa.types.is_string(inner) or pa.types.is_large_string(inner):
        sizes = (
            pc.sum(pc.take(pc.binary_length(chunk.dictionary), chunk.indices)).as_py() or 0 for chunk in column.chunks
        )
        if sum(sizes) > room:
            raise _Wrong(f"is {SPREAD} times larger than the whole request when its dictionary is written out")
    return column.cast(inner)


def finite(table: pa.Table) -> pa.Table:
    """The same without numbers that JSON has no word for: they are missing."""
    for place, (name, column) in enumerate(zip(table.column_names, table.columns, strict=True)):
        if pa.types.is_floating(column.type):
            table = table.set_column(place, name, pc.if_else(pc.is_finite(column), column, None))
    return table


def items_of(table: pa.Table) -> list[dict[str, Any]]:
    """Items as they would have come in JSON, without what is null; of a table of finite numbers."""
    names = table.column_names
    columns = [_json_values(column) for column in table.columns]
    return [
        {name: value for name, value in zip(names, row, strict=True) if value is not None}
        for row in zip(*columns, strict=True)
    ]


def _json_values(column: pa.ChunkedArray) -> list[Any]:
    if pa.types.is_temporal(column.type):
        return [None if moment is None else moment.isoformat() for moment in column.to_pylist()]
    values: list[Any] = column.to_pylist()
    return values
