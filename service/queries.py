"""The body of `POST /v1/similar`: one query, or many under `queries`.

Whatever a query looks for, it becomes examples: `id`, `item` and `embedding` are one, `positive` and `negative` are
several. Of many queries each is read, and refused, by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from itemvec.errors import FieldError
from service.problems import InvalidRequest, escaped, expected
from service.requests import (
    MAX_COLUMNS,
    Item,
    Limits,
    is_int,
    item_errors,
    read_fingerprint,
    read_item_id,
    read_model,
    read_object,
    read_vector,
    unknown_fields,
)

DEFAULT_K: Final = 10

NEGATIVE_SHARE: Final = 0.5
"""What the mean of the negative examples counts against that of the positive ones, as in Rocchio's formula (1971). At 1
a query between two near twins points away from both; at 0 the negative ones say nothing."""

ONE: Final = ("id", "item", "embedding")
FIELDS: Final = {*ONE, "positive", "negative", "k", "exclude", "filter", "override", "ignore", "explain", "partial"}
OF_REQUEST: Final = {"model", "fingerprint"}


@dataclass(frozen=True, slots=True)
class Example:
    """Something a neighbor is to be near to, or far from if its share is negative."""

    pointer: str
    share: float
    what: str | Item | npt.NDArray[np.float32]
    """The id of a stored item, an item, or a vector of length 1."""


@dataclass(frozen=True, slots=True)
class SimilarQuery:
    pointer: str
    examples: Sequence[Example]
    k: int
    exclude: frozenset[str]
    filter: Any
    """As it was sent; None if it was not. Only the version's schema tells what is wrong with it."""

    override: Item
    ignore: Sequence[str]
    explain: bool
    partial: bool
    """Does what the item lacks say nothing of it?"""


@dataclass(frozen=True, slots=True)
class SimilarRequest:
    queries: list[SimilarQuery | InvalidRequest]
    """In the order they came; what is wrong with one is the error in its place."""

    many: bool
    model: str | None
    fingerprint: str | None
    """Of what made the vectors in it."""


def read_similar(body: bytes, limits: Limits) -> SimilarRequest:
    """Raises `InvalidRequest` for what is wrong with all of it; a single query's mistakes are that."""
    fields = read_object(body, None)
    errors: list[FieldError] = []
    if "queries" not in fields:
        errors = unknown_fields(fields, FIELDS | OF_REQUEST, "")
        model, fingerprint = read_model(fields, errors), read_fingerprint(fields, errors)
        query = _read(fields, "", limits, len(body), errors)
        if isinstance(query, InvalidRequest):
            raise query
        return SimilarRequest([query], False, model, fingerprint)
    errors += unknown_fields(fields, {"queries", *OF_REQUEST}, "")
    model, fingerprint = read_model(fields, errors), read_fingerprint(fields, errors)
    queries = fields["queries"]
    if not isinstance(queries, list):
        errors.append(expected("/queries", "a list of queries", queries))
    elif not 1 <= len(queries) <= limits.queries:
        errors.append(FieldError("/queries", f"has {len(queries)} queries; a request takes 1 to {limits.queries}"))
    if errors:
        raise InvalidRequest(errors)
    read = []
    for i, query in enumerate(queries):
        pointer = f"/queries/{i}"
        if isinstance(query, dict):
            read.append(_read(query, pointer, limits, len(body), unknown_fields(query, FIELDS, pointer)))
        else:
            read.append(InvalidRequest([expected(pointer, "a query, as an object", query)]))
    return SimilarRequest(read, True, model, fingerprint)


def _read(
    fields: dict[str, Any], pointer: str, limits: Limits, size: int, errors: list[FieldError]
) -> SimilarQuery | InvalidRequest:
    k = fields.get("k", DEFAULT_K)
    if not is_int(k) or not 1 <= k <= limits.k:
        errors.append(expected(f"{pointer}/k", f"a whole number from 1 to {limits.k}", k))
    exclude = fields.get("exclude", [])
    if not isinstance(exclude, list):
        errors.append(expected(f"{pointer}/exclude", "a list of item ids", exclude))
    elif len(exclude) > limits.exclude:
        detail = f"has {len(exclude)} ids; a query takes up to {limits.exclude}"
        errors.append(FieldError(f"{pointer}/exclude", detail))
    else:
        for i, left_out in enumerate(exclude):
            read_item_id(left_out, f"{pointer}/exclude/{i}", errors)
    examples = _examples(fields, pointer, limits, size, errors)
    override, ignore, explain, partial = _changes(fields, pointer, limits, size, errors)
    if errors:
        return InvalidRequest(errors)
    where, excluded = fields.get("filter"), frozenset(exclude)
    return SimilarQuery(pointer, examples, k, excluded, where, override, ignore, explain, partial)


def _examples(
    fields: dict[str, Any], pointer: str, limits: Limits, size: int, errors: list[FieldError]
) -> list[Example]:
    given = [name for name in (*ONE, "positive") if name in fields]
    if len(given) != 1:
        seen = " and ".join(given) or "none"
        errors.append(FieldError(pointer, f"send exactly one of id, item, embedding and positive; this one has {seen}"))
        return []
    if given != ["positive"]:
        if "negative" in fields:
            errors.append(FieldError(f"{pointer}/negative", f"goes with positive, not with {given[0]}"))
        what = _what(given[0], fields[given[0]], f"{pointer}/{given[0]}", limits, size, errors)
        return [] if what is None else [Example(f"{pointer}/{given[0]}", 1.0, what)]
    examples = []
    for side, share in (("positive", 1.0), ("negative", -NEGATIVE_SHARE)):
        within, listed = f"{pointer}/{side}", fields.get(side, [])
        if not isinstance(listed, list) or (side == "positive" and not listed):
            errors.append(expected(within, "a list of ids, items and vectors", listed))
            continue
        if len(listed) > limits.examples:
            detail = f"has {len(listed)} examples; a query takes up to {limits.examples} on each side"
            errors.append(FieldError(within, detail))
            continue
        for i, example in enumerate(listed):
            # Text is an id here, so a vector comes as numbers.
            kind = "item" if isinstance(example, dict) else "embedding" if isinstance(example, list) else "id"
            what = _what(kind, example, f"{within}/{i}", limits, size, errors)
            if what is not None:
                examples.append(Example(f"{within}/{i}", share / len(listed), what))
    return examples


def _what(
    kind: str, value: Any, pointer: str, limits: Limits, size: int, errors: list[FieldError]
) -> str | Item | npt.NDArray[np.float32] | None:
    if kind == "id":
        return read_item_id(value, pointer, errors)
    if kind == "embedding":
        return read_vector(value, pointer, errors)
    wrong = item_errors(value, pointer, limits, size)
    errors += wrong
    return None if wrong else dict(value)


def _changes(
    fields: dict[str, Any], pointer: str, limits: Limits, size: int, errors: list[FieldError]
) -> tuple[Item, list[str], bool, bool]:
    """What only a query by one item, stored or sent, can have: it has columns."""
    override, ignore = fields.get("override", {}), fields.get("ignore", [])
    explain, partial = fields.get("explain", False), fields.get("partial", False)
    if "override" in fields:
        errors += item_errors(override, f"{pointer}/override", limits, size)
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        errors.append(expected(f"{pointer}/ignore", "a list of columns", ignore))
    elif len(ignore) > MAX_COLUMNS:
        errors.append(FieldError(f"{pointer}/ignore", f"has {len(ignore)} columns; an item has up to {MAX_COLUMNS}"))
    elif isinstance(override, dict):
        both = [name for name in ignore if name in override]
        errors += [FieldError(f"{pointer}/override/{escaped(name)}", "is ignored too: say one") for name in both]
    for name, value in (("explain", explain), ("partial", partial)):
        if not isinstance(value, bool):
            errors.append(expected(f"{pointer}/{name}", "true or false", value))
    if "id" not in fields and "item" not in fields:
        for name in ("override", "ignore", "explain", "partial"):
            if fields.get(name):
                detail = "needs a query by id or item: a vector has no columns"
                errors.append(FieldError(f"{pointer}/{name}", detail))
    return override, ignore, explain, partial
