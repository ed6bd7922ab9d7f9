"""A first schema for a table, with the reason for each choice: a person reads it, and edits what they know better."""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.types as at
import yaml
from pydantic import ValidationError

from itemvec.check import LARGEST, is_numbers, undictionaried
from itemvec.errors import TableError
from itemvec.schema import AnyFeature, FeatureSchema, Multi, Nominal, Numeric, Series, Text, Timestamp, Vector
from itemvec.values import unix_seconds

SEPARATORS = ("|", ";", ", ", ",", "/")
SAMPLE = 2_000  # values of a column that are looked at where looking at all would cost more than it tells


@dataclass(frozen=True, slots=True)
class Choice:
    column: str
    feature: AnyFeature | None
    """None for a column that is left out."""
    reason: str


@dataclass(frozen=True, slots=True)
class Inferred:
    schema: FeatureSchema
    id_reason: str
    choices: list[Choice]

    def to_yaml(self) -> str:
        """The schema with a reason behind each column; settings that are defaults are not written."""
        lines = [f"name: {_yaml(self.schema.name)}", f"id: {_yaml(self.schema.id)}  # {self.id_reason}", "features:"]
        for choice in self.choices:
            if choice.feature is not None:
                lines.append(f"  {_yaml(choice.column)}: {_flow(choice.feature)}  # {choice.reason}")
        left_out = [c for c in self.choices if c.feature is None]
        if left_out:
            lines += ["", "# Left out:", *(f"#   {_yaml(c.column)}: {c.reason}" for c in left_out)]
        return "\n".join(lines) + "\n"


def infer_schema(table: pa.Table, name: str, id_column: str | None = None) -> Inferred:
    """Raises TableError where no column can be the id or none can be learned from."""
    if table.num_rows == 0:
        raise TableError(f"the table has no rows; its columns are {', '.join(table.column_names) or 'none'}")
    id_column, id_reason = _choose_id(table, id_column)
    others = [column for column in table.column_names if column != id_column]
    choices = [_choose(column, undictionaried(table.column(column))) for column in others]
    features = tuple(c.feature for c in choices if c.feature is not None)
    if not features:
        raise TableError("no column can be learned from: " + "; ".join(f"{c.column}: {c.reason}" for c in choices))
    try:
        schema = FeatureSchema(name=name, id=id_column, features=features)
    except ValidationError:
        known = "up to 64 of a-z, 0-9, _, . and -"
        raise TableError(f"{name!r} cannot be a model's name ({known}); give one with --name") from None
    return Inferred(schema, id_reason, choices)


def _choose_id(table: pa.Table, wanted: str | None) -> tuple[str, str]:
    if wanted is not None:
        if wanted not in table.column_names:
            raise TableError(f"no column {wanted!r} to be the id; the table has {', '.join(table.column_names)}")
        return wanted, "as asked"
    named = [c for c in table.column_names if c.lower() in ("id", "item_id", "itemid") or c.lower().endswith("_id")]
    for column in [*named, *(c for c in table.column_names if c not in named)]:
        values = table.column(column)
        is_label = column and (_is_text(values.type) or at.is_integer(values.type))
        if len(values) and is_label and values.null_count == 0 and pc.count_distinct(values).as_py() == len(values):
            return column, f"{len(values)} values, all there and all different"
    raise TableError(
        "no column can be the id: none is text or whole numbers, never missing and all different; --id names one"
    )


def _choose(name: str, column: pa.ChunkedArray) -> Choice:
    kind = column.type
    if at.is_floating(kind):
        column = pc.if_else(pc.is_nan(column), None, column)  # which is missing too
    present = column.drop_null()
    if not name or len(name) > 200:
        return Choice(name, None, "a column needs a name, of 200 characters at most")
    if name == "id":
        return Choice(name, None, "over HTTP every item has its id under this name: rename the column to use it")
    if len(present) == 0:
        return Choice(name, None, "every value is missing")
    if at.is_list(kind) or at.is_large_list(kind) or at.is_fixed_size_list(kind):
        return _choose_list(name, kind, present)
    if at.is_nested(kind) or at.is_binary(kind) or at.is_large_binary(kind):
        return Choice(name, None, f"no kind reads {kind}")
    distinct = pc.count_distinct(present).as_py()
    if distinct == 1:
        return Choice(name, None, "one value only: it tells no two items apart")
    gaps = _gaps(column)
    if at.is_boolean(kind):
        return Choice(name, Nominal(name=name, dtype="boolean"), f"true or false{gaps}")
    if at.is_date(kind) or at.is_timestamp(kind):
        cycles: tuple[Any, ...] = ("year", "week") if at.is_date(kind) else ("year", "week", "day")
        return Choice(name, Timestamp(name=name, cycles=cycles), f"{kind}{gaps}")
    if at.is_integer(kind) or at.is_floating(kind) or at.is_decimal(kind):
        return _choose_number(name, kind, present, distinct, gaps)
    if _is_text(kind):
        return _choose_text(name, present, distinct, gaps)
    return Choice(name, None, f"no kind reads {kind}")


def _gaps(column: pa.ChunkedArray) -> str:
    if column.null_count == 0:
        return ""
    share = 100 * column.null_count / len(column)
    return f", {share:.0f} % missing" if share >= 1 else f", {column.null_count} missing"


def _choose_list(name: str, kind: pa.DataType, present: pa.ChunkedArray) -> Choice:
    inner, values = kind.value_type, pc.list_flatten(present).drop_null()
    if len(values) == 0:
        return Choice(name, None, "every list is empty")
    if not (_is_text(inner) or is_numbers(kind)):
        return Choice(name, None, f"a list of {inner} is not read")
    distinct = pc.count_distinct(values).as_py()
    if is_numbers(kind) and not (at.is_integer(inner) and distinct <= 0.5 * len(values) and _are_sets(present)):
        return _choose_numbers(name, kind, present, values)
    reason = f"lists, {len(values) / len(present):.1f} labels each, {distinct} different"
    return Choice(name, Multi(name=name, dtype="string" if _is_text(inner) else "integer"), reason)


SMALLEST_VECTOR = 16
"""Lists of numbers of one and the same length: from so many on they are rather an embedding than a course."""


def _choose_numbers(name: str, kind: pa.DataType, present: pa.ChunkedArray, values: pa.ChunkedArray) -> Choice:
    values = values.cast(pa.float64(), safe=False)
    values = values.filter(pc.invert(pc.is_nan(values)))
    if len(values) == 0:
        return Choice(name, None, "every list is empty")
    if pc.any(pc.greater(pc.abs(values), LARGEST)).as_py():
        return Choice(name, None, f"some numbers are infinite or beyond {LARGEST:g}")
    gapless = len(values) == len(pc.list_flatten(present))
    extent = pc.min_max(pc.list_value_length(present))
    shortest, longest = extent["min"].as_py(), extent["max"].as_py()
    if shortest == longest and gapless and (longest >= SMALLEST_VECTOR or at.is_fixed_size_list(kind)):
        return Choice(name, Vector(name=name, size=longest), f"lists of {longest} numbers each: a ready embedding")
    lengths = f"lists of {shortest} to {longest} numbers" if shortest < longest else f"lists of {longest} numbers each"
    if _is_wide(values):
        reason = f"{lengths}, and most of it is in a few large values"
        return Choice(name, Series(name=name, scale="log"), reason)
    return Choice(name, Series(name=name), f"{lengths}, in time order if it is a series")


def _are_sets(present: pa.ChunkedArray) -> bool:
    """Whether none comes twice in a list, as in a set of labels; in a course of amounts many do."""
    lists = [values for values in present.slice(0, SAMPLE).to_pylist() if len(values) > 1]
    return sum(len(set(values)) < len(values) for values in lists) <= 0.1 * len(lists)


def _is_wide(values: pa.ChunkedArray) -> bool:
    """Whether numbers are amounts over orders of magnitude: none negative, the mean far above the median."""
    extent = pc.min_max(values)
    low, high = extent["min"].as_py(), extent["max"].as_py()
    median, mean = pc.quantile(values, 0.5)[0].as_py(), pc.mean(values).as_py()
    return bool(low >= 0 and high > 100 and mean > 2 * median)


def _choose_number(name: str, kind: pa.DataType, present: pa.ChunkedArray, distinct: int, gaps: str) -> Choice:
    values = present.cast(pa.float64(), safe=False)
    if pc.any(pc.greater(pc.abs(values), LARGEST)).as_py():
        return Choice(name, None, f"some values are infinite or beyond {LARGEST:g}")
    extent = pc.min_max(values)
    low, high = extent["min"].as_py(), extent["max"].as_py()
    if at.is_integer(kind) and name.lower().endswith(("_id", "_code", "_key")):
        if distinct > 0.9 * len(present):
            return Choice(name, None, f"{distinct} different numbers named like an id: nothing two items share")
        return Choice(
            name,
            Nominal(name=name, dtype="integer"),
            f"whole numbers named like a code, {distinct} different{gaps}",
        )
    extent_text = f"{low:g} to {high:g}, {distinct} different{gaps}"
    if _is_wide(values):
        return Choice(name, Numeric(name=name, scale="log"), f"{extent_text}, and most of it is in a few large values")
    return Choice(name, Numeric(name=name), extent_text)


def _choose_text(name: str, present: pa.ChunkedArray, distinct: int, gaps: str) -> Choice:
    sample = present.slice(0, SAMPLE).to_pylist()
    if sum(_is_moment(v) for v in sample) > 0.99 * len(sample):
        return Choice(name, Timestamp(name=name), f"ISO 8601 times{gaps}")
    unique = distinct / len(present)
    for separator in SEPARATORS:
        split = pc.split_pattern(present, separator)
        if pc.mean(pc.greater(pc.list_value_length(split), 1)).as_py() > 0.2:
            parts = pc.utf8_trim_whitespace(pc.list_flatten(split))
            labels = pc.count_distinct(parts).as_py()
            if labels < 0.2 * len(parts) and labels <= distinct and pc.mean(pc.utf8_length(parts)).as_py() < 30:
                return Choice(
                    name,
                    Multi(name=name, separator=separator),
                    f"labels between {separator!r}, {labels} different{gaps}",
                )
    words = sum(len(v.split()) for v in sample) / len(sample)
    if unique > (0.2 if words >= 8 else 0.5) and words >= 1.5:
        return Choice(name, Text(name=name), f"{words:.1f} words each, {100 * unique:.0f} % of them different{gaps}")
    if unique > 0.9:
        return Choice(name, None, f"{distinct} different words on {len(present)} rows: nothing two items share")
    return Choice(name, Nominal(name=name), f"{distinct} different labels on {len(present)} rows{gaps}")


def _is_moment(value: str) -> bool:
    try:
        return len(value) >= 8 and unix_seconds(value) is not None
    except ValueError:
        return False


def _is_text(kind: pa.DataType) -> bool:
    return bool(at.is_string(kind) or at.is_large_string(kind) or at.is_string_view(kind))


def _flow(feature: AnyFeature) -> str:
    settings = feature.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
    return "{" + ", ".join(f"{key}: {_yaml(value)}" for key, value in {"kind": feature.kind, **settings}.items()) + "}"


def _yaml(value: Any) -> str:
    """On one line; JSON's strings are YAML's double-quoted ones."""
    if isinstance(value, str) and not value.isprintable():
        return json.dumps(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("\n").removesuffix("...").strip()
