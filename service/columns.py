"""JSON bodies of many items, read as columns: by Arrow, without an object an item and outside of Python's lock.

Only what is all as the schema says comes out. Any other body (a value of another type or beyond a limit, a column that
the schema does not name, a key that stands twice, no JSON at all) is left to `service/requests.py`, which reads it item
by item, and says what is wrong with it if anything is.
"""

import re
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from itemvec.schema import Feature, FeatureSchema
from service import arrow
from service.problems import InvalidRequest
from service.requests import Limits, is_format, is_model_name, is_size

TYPES: Final = {"string": pa.string(), "integer": pa.int64(), "boolean": pa.bool_(), "number": pa.float64()}
"""Of JSON Schema's types."""

SETTINGS: Final = [
    ("model", pa.string()),
    ("encoding_format", pa.string()),
    ("dimensions", pa.int64()),
    ("user", pa.string()),
]
AT_THE_ENDS: Final = 1024
"""Bytes of a body's beginning and end, in which a model's name is looked for."""

_MODEL: Final = re.compile(rb'"model"\s*:\s*"([^"\\]{1,200})"')

_NULL: Final = re.compile(rb"\[\s*+null|\}\s*+(?:,\s*+)?null")
"""For an item that is null Arrow makes room in every column, however many there are; and a body that is null, or has it
behind its object, makes it read memory that is not its own, and crash (apache/arrow#47409). White space is passed over
once (`*+`): there may be megabytes of it."""


class NotColumns(Exception):
    """The body has to be read item by item."""


@dataclass(frozen=True, slots=True)
class EmbeddingsColumns:
    """`EmbeddingsRequest` with columns in place of items."""

    table: pa.Table
    model: str | None
    base64: bool
    dimensions: int | None


def model_named(body: bytes) -> str | None:
    """The model that the body seems to name, before or behind its items. A guess, made to know by whose schema to read
    it: `read_embeddings` then tells what it does name."""
    head, _, _ = body[:AT_THE_ENDS].partition(b"[")
    _, _, tail = body[-AT_THE_ENDS:].rpartition(b"]")
    found = _MODEL.search(tail) or _MODEL.search(head)
    return found[1].decode("utf-8", "replace") if found else None


def read_embeddings(body: bytes, schema: FeatureSchema, limits: Limits) -> EmbeddingsColumns:
    """What `requests.read_embeddings` reads, with the schema's columns as a table. Raises NotColumns."""
    row = _row(body, schema, limits)
    model, encoding_format, size, _ = (row.column(name)[0].as_py() for name, _ in SETTINGS)
    items = row.column("input").combine_chunks()
    if not 1 <= len(items.values) <= limits.items or items.values.null_count:
        raise NotColumns
    if not (is_model_name(model) and is_format(encoding_format) and is_size(size)):
        raise NotColumns
    table = pa.Table.from_arrays(items.values.flatten(), names=[field.name for field in items.type.value_type])
    if not all(map(_is_finite, table.columns)):
        raise NotColumns
    try:
        table = arrow.within(table, limits, "/input", len(body))
    except InvalidRequest:
        raise NotColumns from None
    return EmbeddingsColumns(table, model, encoding_format == "base64", size)


def _row(body: bytes, schema: FeatureSchema, limits: Limits) -> pa.Table:
    """The body as the only row of a table."""
    if not body.startswith(b"{") or _NULL.search(body):
        raise NotColumns
    if body.count(b"{") > limits.items + 1:  # Arrow makes room for every column of an item, whatever it has
        raise NotColumns
    item = {schema.id: pa.string()} | {feature.name: _type(feature) for feature in schema.features}
    expected = pa.schema([("input", pa.list_(pa.struct(list(item.items())))), *SETTINGS])
    parsing = pa.json.ParseOptions(expected, unexpected_field_behavior="error")
    reading = pa.json.ReadOptions(use_threads=False, block_size=len(body) + 1)  # in one piece, line breaks and all
    try:
        table = pa.json.read_json(pa.BufferReader(body), reading, parsing)
        table.validate(full=True)  # text that is not UTF-8
    except pa.ArrowException:
        raise NotColumns from None
    if len(table) != 1:
        raise NotColumns
    return table


def _type(feature: Feature) -> pa.DataType:
    """The type that it is read as, and has to be of. Raises NotColumns for labels of several types."""
    json_type: dict[str, Any] = feature.json_type
    if "anyOf" in json_type:  # a moment is a text or a number; labels are a list or, where they may be, one text
        return pa.string()
    kind = json_type["type"]
    if kind == "array":
        inner = json_type["items"]["type"]
        return pa.list_(TYPES[inner if isinstance(inner, str) else inner[0]])
    if isinstance(kind, list):
        if len(kind) > 1:
            raise NotColumns
        (kind,) = kind
    return TYPES[kind]


def _is_finite(column: pa.ChunkedArray) -> bool:
    """Arrow also reads NaN and Infinity, which are no JSON."""
    values = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return not pa.types.is_floating(values.type) or pc.all(pc.is_finite(values), min_count=0).as_py()
