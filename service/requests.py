"""Request bodies: bytes -> checked values, by hand, since this runs for every request.

Each `read_...` function takes a body and answers with a small dataclass, or raises `MalformedRequest` (no JSON) or
`InvalidRequest` with a JSON pointer per value. What an item's columns mean is not decided here: only that an item is an
object of bounded size. A field that a request does not have is an error, never ignored: a misspelt `exclude` must not
give the very neighbors it was to leave out.
"""

import binascii
import math
from base64 import b64decode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes

import numpy as np
import numpy.typing as npt
import orjson

from itemvec.errors import FieldError
from itemvec.values import MAX_ID_BYTES
from service.problems import MAX_ERRORS, InvalidRequest, MalformedRequest, escaped, expected

Item = dict[str, Any]

MAX_COLUMNS = 1000
MAX_DIM = 65_536
DEFAULT_TOP = 5
MAX_FINGERPRINT = 64
ALIASES = ("previous", "challenger")
"""What a promotion may name in place of a number: the version before, for a rollback, and the one that is to come."""

ABSENT = object()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may ask for. Beyond any of them the answer is 413 or 422 and names the limit."""

    items: int
    rows: int
    """Of an Arrow stream."""

    labels: int
    string: int
    k: int
    exclude: int
    queries: int
    examples: int
    filter: int


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    items: list[Item]
    model: str | None
    base64: bool
    dimensions: int | None


@dataclass(frozen=True, slots=True)
class BulkRequest:
    entries: list["Entry | RefusedEntry"]
    """In the order they came."""

    model: str | None


class Entry(NamedTuple):
    id: str
    item: Item
    raw: bytes
    """The item as it is stored."""


@dataclass(frozen=True, slots=True)
class RefusedEntry:
    id: str | None
    errors: list[FieldError]


def read_embeddings(body: bytes, limits: Limits) -> EmbeddingsRequest:
    fields = read_object(body, {"input", "model", "encoding_format", "dimensions", "user"})
    errors: list[FieldError] = []
    items = fields.get("input")
    if "input" not in fields:
        errors.append(FieldError("/input", "is missing: send a list of items, each an object of columns"))
    elif not isinstance(items, list):
        errors.append(expected("/input", "a list of items", items))
    elif not 1 <= len(items) <= limits.items:
        errors.append(FieldError("/input", f"has {len(items)} items; a request takes 1 to {limits.items}"))
    else:
        errors += items_errors(items, "/input", limits, len(body))
    encoding_format = fields.get("encoding_format")
    if not is_format(encoding_format):
        errors.append(expected("/encoding_format", '"float" or "base64"', encoding_format))
    dimensions = fields.get("dimensions")
    if not is_size(dimensions):
        errors.append(expected("/dimensions", "a whole number from 1", dimensions))
    model = read_model(fields, errors)
    if errors:
        raise InvalidRequest(errors)
    return EmbeddingsRequest(fields["input"], model, encoding_format == "base64", dimensions)


def read_embeddings_query(query: Mapping[str, str]) -> tuple[str | None, int | None]:
    """`model` and `dimensions` of a stream, whose body has no room for them."""
    errors: list[FieldError] = []
    dimensions = query.get("dimensions")
    if dimensions is not None and not (dimensions.isascii() and dimensions.isdigit() and 0 < len(dimensions) < 10):
        errors.append(expected("/dimensions", "a whole number from 1", dimensions))
    elif dimensions is not None and int(dimensions) < 1:
        errors.append(expected("/dimensions", "a whole number from 1", int(dimensions)))
    model = read_model(query, errors)
    if errors:
        raise InvalidRequest(errors)
    return model, None if dimensions is None else int(dimensions)


@dataclass(frozen=True, slots=True)
class DecodeRequest:
    vectors: list[npt.NDArray[np.float32]]
    pointers: list[str]
    """Where in the request each vector was."""

    top: int
    model: str | None
    fingerprint: str | None
    """Of what made the vectors."""


def read_decode(body: bytes, limits: Limits) -> DecodeRequest:
    fields = read_object(body, {"embedding", "embeddings", "top", "model", "fingerprint"})
    errors: list[FieldError] = []
    vectors: list[npt.NDArray[np.float32]] = []
    pointers: list[str] = []
    if ("embedding" in fields) == ("embeddings" in fields):
        errors.append(FieldError("", "send either embedding or embeddings"))
    elif "embedding" in fields:
        pointers = ["/embedding"]
        vectors = [v for v in [read_vector(fields["embedding"], "/embedding", errors)] if v is not None]
    elif not isinstance(fields["embeddings"], list):
        errors.append(expected("/embeddings", "a list of vectors", fields["embeddings"]))
    elif not 1 <= len(fields["embeddings"]) <= limits.queries:
        detail = f"has {len(fields['embeddings'])} vectors; a request takes 1 to {limits.queries}"
        errors.append(FieldError("/embeddings", detail))
    else:
        pointers = [f"/embeddings/{i}" for i in range(len(fields["embeddings"]))]
        read = (read_vector(value, at, errors) for value, at in zip(fields["embeddings"], pointers, strict=True))
        vectors = [vector for vector in read if vector is not None]
    top = fields.get("top", DEFAULT_TOP)
    if not is_int(top) or not 1 <= top <= limits.k:
        errors.append(expected("/top", f"a whole number from 1 to {limits.k}", top))
    model, fingerprint = read_model(fields, errors), read_fingerprint(fields, errors)
    if errors:
        raise InvalidRequest(errors)
    return DecodeRequest(vectors, pointers, top, model, fingerprint)


def read_item(body: bytes, item_id: str, limits: Limits) -> Entry:
    """The columns of one item. Its id may stand among them, as in a table's row, but not another one."""
    item = read_object(body, None)
    errors = item_errors(item, "", limits, len(body))
    if "id" in item and item.pop("id") != item_id:
        errors.append(FieldError("/id", "is not the id in the path"))
    raw = _raw(item, "", errors)
    if errors:
        raise InvalidRequest(errors)
    return Entry(item_id, item, raw)


def read_bulk(body: bytes, limits: Limits) -> BulkRequest:
    """A wrong entry is refused alone; a wrong list, as a whole."""
    fields = read_object(body, {"items", "model"})
    errors: list[FieldError] = []
    items = fields.get("items")
    if "items" not in fields:
        errors.append(FieldError("/items", "is missing: send a list of items, each an object with its id and columns"))
    elif not isinstance(items, list):
        errors.append(expected("/items", "a list of items", items))
    elif not 1 <= len(items) <= limits.items:
        errors.append(FieldError("/items", f"has {len(items)} items; a request takes 1 to {limits.items}"))
    model = read_model(fields, errors)
    if errors:
        raise InvalidRequest(errors)
    items = fields["items"]
    ids = [item.pop("id", ABSENT) if isinstance(item, dict) else None for item in items]
    return BulkRequest(read_entries(items, ids, limits, len(body)), model)


def read_entries(items: list[Any], ids: list[Any], limits: Limits, size: int) -> list[Entry | RefusedEntry]:
    """`ids` is parallel to `items`, which hold everything else."""
    entries: list[Entry | RefusedEntry] = []
    last = {item_id: i for i, item_id in enumerate(ids) if isinstance(item_id, str)}
    # Each character takes a byte and each entry of a list two: so short a text holds nothing beyond these limits.
    short = min(limits.string, 2 * limits.labels)
    for i, (item, given) in enumerate(zip(items, ids, strict=True)):
        errors: list[FieldError] = []
        pointer, item_id = f"/items/{i}", None
        raw = _raw(item, pointer, errors) if type(item) is dict else b""
        if not 0 < len(raw) < short or len(item) > MAX_COLUMNS:
            errors = item_errors(item, pointer, limits, size) + errors
        if given is ABSENT:
            errors.append(FieldError(f"{pointer}/id", "is missing: every item needs its id"))
        elif type(item) is dict:
            item_id = read_item_id(given, f"{pointer}/id", errors)
            if item_id is not None and last[item_id] != i:
                errors.append(
                    FieldError(f"{pointer}/id", f"comes again at /items/{last[item_id]}: the last one counts")
                )
        if errors or item_id is None:
            entries.append(RefusedEntry(item_id, errors))
        else:
            entries.append(Entry(item_id, item, raw))
    return entries


def _raw(item: Item, pointer: str, errors: list[FieldError]) -> bytes:
    try:
        return orjson.dumps(item)
    except TypeError:  # it reads 1024 levels and writes 254
        errors.append(FieldError(pointer, "is nested too deeply to be stored"))
        return b""


def read_version(body: bytes) -> int | str:
    """The version that is to be served, or filled: its number, or the alias that names it."""
    version = read_object(body, {"version"}).get("version")
    if type(version) is int and 1 <= version < 2**31:
        return version
    if isinstance(version, str) and version in ALIASES:
        return version
    raise InvalidRequest([expected("/version", f"a version number, from 1, or one of {', '.join(ALIASES)}", version)])


def read_path_segment(raw: bytes) -> str:
    """One percent-encoded segment of a path. Decoding anything but UTF-8 leniently would let two ids become one."""
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise MalformedRequest(f"the path segment {raw[:80]!r} is not percent-encoded UTF-8") from None


def read_path_id(raw: bytes) -> str:
    errors: list[FieldError] = []
    item_id = read_item_id(read_path_segment(raw), "/id", errors)
    if item_id is None:
        raise InvalidRequest(errors)
    return item_id


def read_object(body: bytes, known: set[str] | None) -> dict[str, Any]:
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidRequest([expected("", "an object", value)])
    if known is not None and not value.keys() <= known:
        raise InvalidRequest(unknown_fields(value, known, ""))
    return value


def unknown_fields(value: Mapping[str, Any], known: set[str], pointer: str) -> list[FieldError]:
    detail = f"is not a field of this request; its fields are {', '.join(sorted(known))}"
    return [FieldError(f"{pointer}/{escaped(name)}", detail) for name in islice(value.keys() - known, MAX_ERRORS)]


def read_model(fields: Mapping[str, Any], errors: list[FieldError]) -> str | None:
    model = fields.get("model")
    if not is_model_name(model):
        errors.append(expected("/model", "a name such as movies, movies@7 or movies@champion", model))
    return model


def read_fingerprint(fields: Mapping[str, Any], errors: list[FieldError]) -> str | None:
    fingerprint = fields.get("fingerprint")
    if fingerprint is not None and not (isinstance(fingerprint, str) and 0 < len(fingerprint) <= MAX_FINGERPRINT):
        errors.append(expected("/fingerprint", "the fingerprint that an answer named", fingerprint))
        return None
    return fingerprint


def is_model_name(value: Any) -> bool:
    return value is None or (isinstance(value, str) and 0 < len(value) <= 200)


def is_format(value: Any) -> bool:
    return value in (None, "float", "base64")


def is_size(value: Any) -> bool:
    """Of a vector that is wanted shorter than it is; null for all of it."""
    return value is None or (is_int(value) and value >= 1)


def read_item_id(value: Any, pointer: str, errors: list[FieldError]) -> str | None:
    if not isinstance(value, str):
        errors.append(expected(pointer, "an item id, as a string", value))
    elif not value:
        errors.append(FieldError(pointer, "an item id cannot be empty"))
    elif len(value) > MAX_ID_BYTES // 4 and len(value.encode()) > MAX_ID_BYTES:
        errors.append(FieldError(pointer, f"the id is longer than {MAX_ID_BYTES} bytes in UTF-8"))
    else:
        return value
    return None


def items_errors(items: list[Any], pointer: str, limits: Limits, size: int) -> list[FieldError]:
    # A body this small cannot hold a set or a string beyond the limits, so most requests skip the look at each value.
    if size < min(limits.string, 2 * limits.labels, 4 * MAX_COLUMNS):
        return [
            expected(f"{pointer}/{i}", "an item, as an object", x) for i, x in enumerate(items) if type(x) is not dict
        ]
    if _within(items, limits):
        return []
    return [error for i, item in enumerate(items) for error in item_errors(item, f"{pointer}/{i}", limits, size)]


def _within(items: list[Any], limits: Limits) -> bool:
    """Whether all are items and none is beyond a limit, for most requests; seen without a step of Python a label."""
    if set(map(type, items)) != {dict} or max(map(len, items)) > MAX_COLUMNS:
        return False
    values = list(chain.from_iterable(map(dict.values, items)))
    lists = [value for value in values if type(value) is list]
    strings = [value for value in values if type(value) is str]
    try:
        longest = max(map(len, chain(strings, chain.from_iterable(lists))), default=0)
    except TypeError:  # numbers in a list have no length
        return False
    return longest <= limits.string and max(map(len, lists), default=0) <= limits.labels


def item_errors(item: Any, pointer: str, limits: Limits, size: int) -> list[FieldError]:
    if type(item) is not dict:
        return [expected(pointer, "an item, as an object", item)]
    if len(item) > MAX_COLUMNS:
        return [FieldError(pointer, f"has {len(item)} columns; an item takes up to {MAX_COLUMNS}")]
    if size < min(limits.string, 2 * limits.labels):
        return []
    errors = []
    for name, value in item.items():
        if type(value) is str:
            if len(value) > limits.string:
                errors.append(_too_long(f"{pointer}/{escaped(name)}", value, limits))
        elif type(value) is list and value:
            if len(value) > limits.labels:
                detail = f"has {len(value)} entries; a column takes up to {limits.labels}"
                errors.append(FieldError(f"{pointer}/{escaped(name)}", detail))
            elif size >= limits.string and (j := _too_long_at(value, limits.string)) is not None:
                errors.append(_too_long(f"{pointer}/{escaped(name)}/{j}", value[j], limits))
    return errors


def _too_long_at(values: list[Any], limit: int) -> int | None:
    try:
        if max(map(len, values)) <= limit:  # several times faster than looking at each: nearly always the answer
            return None
    except TypeError:  # something without a length
        pass
    return next((j for j, value in enumerate(values) if type(value) is str and len(value) > limit), None)


def _too_long(pointer: str, value: str, limits: Limits) -> FieldError:
    return FieldError(pointer, f"has {len(value)} characters; a string takes up to {limits.string}")


def read_vector(value: Any, pointer: str, errors: list[FieldError]) -> npt.NDArray[np.float32] | None:
    """A vector as numbers, or as the base64 that /v1/embeddings gives. Its size is the model's to judge."""
    if isinstance(value, str):
        try:
            packed = b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            errors.append(FieldError(pointer, "is a string, but not base64"))
            return None
        if len(packed) % 4:
            errors.append(FieldError(pointer, f"holds {len(packed)} bytes, which is no number of float32"))
            return None
        return _unit(np.frombuffer(packed, "<f4").astype(np.float64), pointer, errors)
    if not isinstance(value, list):
        errors.append(expected(pointer, "a list of numbers, or their float32 as base64", value))
        return None
    if len(value) > MAX_DIM:
        errors.append(FieldError(pointer, f"has {len(value)} numbers; no model has more than {MAX_DIM}"))
        return None
    wrong = [(i, x) for i, x in enumerate(value) if type(x) is not float and type(x) is not int]
    if wrong:
        errors += [expected(f"{pointer}/{i}", "a number", x) for i, x in wrong[:MAX_ERRORS]]
        return None
    return _unit(np.array(value, np.float64), pointer, errors)


def _unit(vector: npt.NDArray[np.float64], pointer: str, errors: list[FieldError]) -> npt.NDArray[np.float32] | None:
    """The vector at unit length. Neither an endless nor a zero-length one has a direction, so no neighbors."""
    peak = float(np.abs(vector).max(initial=0.0))
    if not math.isfinite(peak):
        errors.append(FieldError(pointer, "holds a number that is not finite"))
    elif peak == 0.0:
        errors.append(FieldError(pointer, "has length 0, so no direction to find neighbors in"))
    else:
        scaled = vector / peak  # so that no square is too large or too small for a float
        return (scaled / np.linalg.norm(scaled)).astype(np.float32)
    return None


def is_int(value: Any) -> bool:
    return type(value) is int  # a bool is an int to Python, not to JSON


def moved(errors: Iterable[FieldError], prefix: str, pointer: str) -> list[FieldError]:
    """Errors of a list of items, as those of the one item that was its only member: `/0/genres` -> `/item/genres`."""
    return [FieldError(pointer + e.pointer.removeprefix(prefix), e.detail) for e in errors]
