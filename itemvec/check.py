"""What is wrong with an item table, column by column, before anything is trained on it."""

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from itemvec.errors import SchemaMismatch
from itemvec.schema import Feature, FeatureSchema, Multi, Nominal, Numeric, Ordinal, Text, Timestamp
from itemvec.values import MAX_ID_BYTES, PYTHON_TYPES, canonical, unix_seconds


@dataclass(frozen=True, slots=True)
class Finding:
    column: str
    level: Literal["ok", "warning", "error"]
    text: str


def check_table(table: pa.Table, schema: FeatureSchema) -> list[Finding]:
    """At least one finding per column that the schema names; errors are what training would refuse."""
    findings = [Finding(schema.id, level, text) for level, text in _check_id(table, schema.id)]
    for feature in schema.features:
        said = [Finding(feature.name, level, text) for level, text in _check_feature(table, feature)]
        if not any(finding.level == "error" for finding in said):
            said.insert(0, Finding(feature.name, "ok", _summary(undictionaried(table.column(feature.name)), feature)))
        findings += said
    return findings


def require_columns(table: pa.Table, names: Sequence[str]) -> None:
    """Raises SchemaMismatch for columns that the table lacks, with what it has."""
    lacking = [f"{name}: {absent(name, table.column_names)}" for name in names if name not in table.column_names]
    if lacking:
        raise SchemaMismatch("the table", lacking)


def require_fit(table: pa.Table, schema: FeatureSchema, source: str = "the table") -> None:
    """Raises SchemaMismatch with every error that `check_table` finds."""
    errors = [f"{f.column}: {f.text}" for f in check_table(table, schema) if f.level == "error"]
    if errors:
        raise SchemaMismatch(source, errors)


Said = Iterator[tuple[Literal["ok", "warning", "error"], str]]


def absent(name: str, present: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, present, n=1)
    guess = f", did you mean {close[0]!r}?" if close else "."
    return f"the table has no such column{guess} It has {', '.join(present)}"


def _check_id(table: pa.Table, name: str) -> Said:
    if name not in table.column_names:
        yield "error", absent(name, table.column_names)
        return
    column = table.column(name)
    if not (_is_text(column.type) or pa.types.is_integer(column.type)):
        yield "error", f"an id is text or a whole number, this column is {column.type}"
        return
    if len(column) == 0:
        yield "error", "the table has no rows"
        return
    if column.null_count:
        yield "error", f"{column.null_count} of {len(column)} rows have no id"
    counts = pc.value_counts(column.drop_null())
    twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(twice):
        yield "error", f"{len(twice)} ids stand on more than one row: {_examples(twice)}"
    if _is_text(column.type):
        too_long = column.filter(pc.greater(pc.binary_length(column), MAX_ID_BYTES))
        if len(too_long):
            yield (
                "error",
                f"{len(too_long)} ids are longer than {MAX_ID_BYTES} bytes, {str(too_long[0])[:40]!r}...",
            )
        if pc.any(pc.equal(column, "")).as_py():
            yield "error", "an id is the empty string"
    yield "ok", f"{len(column)} ids"


def _check_feature(table: pa.Table, feature: Feature) -> Said:
    if feature.name not in table.column_names:
        yield "error", absent(feature.name, table.column_names)
        return
    column = undictionaried(table.column(feature.name))
    if problem := _wrong_type(column.type, feature):
        yield "error", problem
        return
    if column.null_count == len(column):
        yield "error", "every value is missing: there is nothing to learn"
        return
    if column.null_count > len(column) / 2:
        yield "warning", f"{100 * column.null_count / len(column):.0f} % of the values are missing"
    yield from _KIND_CHECKS[type(feature)](column, feature)


def _check_labels(column: pa.ChunkedArray, feature: Any) -> Said:
    if isinstance(feature, Multi):
        column = flat_labels(column, feature)
    if len(column.drop_null()) == 0:
        yield "error", "every set is empty: there is nothing to learn"
        return
    counts = pc.value_counts(column.drop_null())
    kept = pc.greater_equal(counts.field("counts"), feature.min_count)
    labels, shared = len(counts), pc.sum(kept).as_py() or 0
    if shared == 0:
        yield (
            "error",
            f"none of its {labels} labels occurs {feature.min_count} times (min_count): there is nothing to learn",
        )
        return
    if labels == 1:
        yield (
            "warning",
            f"its only label is {counts.field('values')[0].as_py()!r}: it tells no two items apart",
        )
    rare = 1 - pc.sum(counts.filter(kept).field("counts")).as_py() / pc.sum(counts.field("counts")).as_py()
    if rare > 0.2:
        yield (
            "warning",
            f"{100 * rare:.0f} % of the labels given are rarer than min_count {feature.min_count} and share one row",
        )


def _check_ordinal(column: pa.ChunkedArray, feature: Ordinal) -> Said:
    order = {canonical(label) for label in feature.order}
    counts = pc.value_counts(column.drop_null())
    strange = [v for v in counts.field("values").to_pylist() if canonical(v) not in order]
    if len(strange) == len(counts):
        yield (
            "error",
            f"none of its labels stands in the order {list(feature.order)}: it has {_examples(strange)}",
        )
    elif strange:
        yield (
            "warning",
            f"{len(strange)} labels are not in the order and count as out-of-vocabulary: {_examples(strange)}",
        )


def _check_numeric(column: pa.ChunkedArray, feature: Numeric) -> Said:
    values = column.cast(pa.float64(), safe=False).drop_null()
    infinite = pc.sum(pc.is_inf(values)).as_py() or 0
    if infinite:
        yield "error", f"{infinite} values are infinite"
        return
    extent = pc.min_max(values.filter(pc.invert(pc.is_nan(values))))
    low, high = extent["min"].as_py(), extent["max"].as_py()
    if low is None:
        yield "error", "every value is missing: there is nothing to learn"
    elif feature.scale == "log" and low < 0:
        yield "error", f"scale: log needs values >= 0, the smallest is {low:g}"
    elif low == high:
        yield "warning", f"every value is {low:g}: it tells no two items apart"


def _check_timestamp(column: pa.ChunkedArray, feature: Timestamp) -> Said:
    if pa.types.is_floating(column.type):
        yield from _check_numeric(column, Numeric(name=feature.name))
    if not _is_text(column.type):
        return
    unread = []
    for value in column.drop_null().unique().to_pylist():
        try:
            seconds = unix_seconds(value)
        except ValueError:
            unread.append(value)
            continue
        if seconds is not None and not math.isfinite(seconds):
            unread.append(value)
    if unread:
        yield "error", f"{len(unread)} values are not ISO 8601 times: {_examples(unread)}"


def _check_text(column: pa.ChunkedArray, feature: Text) -> Said:
    empty = pc.sum(pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)).as_py() or 0
    if empty + column.null_count == len(column):
        yield "error", "every text is empty: there is nothing to learn"


_KIND_CHECKS: dict[type[Feature], Any] = {
    Nominal: _check_labels,
    Multi: _check_labels,
    Ordinal: _check_ordinal,
    Numeric: _check_numeric,
    Timestamp: _check_timestamp,
    Text: _check_text,
}


def undictionaried(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values themselves where a column holds codes (pandas' categories)."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def flat_labels(column: pa.ChunkedArray, feature: Multi) -> pa.ChunkedArray:
    """All labels of a multi column, one after the other."""
    if _is_text(column.type) and feature.separator is not None:
        column = pc.split_pattern(column, feature.separator)
    return pc.list_flatten(column)


def _wrong_type(arrow: pa.DataType, feature: Feature) -> str | None:
    if isinstance(feature, Nominal):
        fits = _is_dtype(arrow, feature.dtype)
        wants = f"{feature.dtype} labels"
    elif isinstance(feature, Multi):
        fits = _is_list(arrow) and _is_dtype(arrow.value_type, feature.dtype)
        fits = fits or (feature.separator is not None and _is_text(arrow))
        wants = f"a list of {feature.dtype} labels" + (
            "" if _is_list(arrow) else ", or a string with its separator named"
        )
    elif isinstance(feature, Ordinal):
        dtypes = {name for name, t in PYTHON_TYPES.items() if any(type(label) is t for label in feature.order)}
        fits = any(_is_dtype(arrow, dtype) for dtype in dtypes)
        wants = f"{' or '.join(sorted(dtypes))} labels as in its order"
    elif isinstance(feature, Numeric):
        fits = pa.types.is_integer(arrow) or pa.types.is_floating(arrow) or pa.types.is_decimal(arrow)
        wants = "numbers"
    elif isinstance(feature, Timestamp):
        moments = pa.types.is_date(arrow) or pa.types.is_timestamp(arrow)
        fits = moments or _is_text(arrow) or pa.types.is_integer(arrow) or pa.types.is_floating(arrow)
        wants = "dates, times, ISO 8601 text or Unix seconds"
    else:
        fits = _is_text(arrow)
        wants = "text"
    return None if fits else f"kind {feature.kind} wants {wants}, this column is {arrow}"  # type: ignore[attr-defined]


def _is_text(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow))


def _is_list(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_list(arrow) or pa.types.is_large_list(arrow) or pa.types.is_fixed_size_list(arrow))


def _is_dtype(arrow: pa.DataType, dtype: str) -> bool:
    if dtype == "string":
        return _is_text(arrow)
    return bool(pa.types.is_integer(arrow) if dtype == "integer" else pa.types.is_boolean(arrow))


def _summary(column: pa.ChunkedArray, feature: Any) -> str:
    present = len(column) - column.null_count
    text = f"{feature.kind}, {present} of {len(column)} present"
    if isinstance(feature, Nominal | Multi):
        labels = flat_labels(column, feature) if isinstance(feature, Multi) else column
        text += f", {pc.count_distinct(labels).as_py()} labels"
    return text


def _examples(values: Any) -> str:
    shown = [v.as_py() if isinstance(v, pa.Scalar) else v for v in values[:3]]
    return ", ".join(repr(v) for v in shown) + (", ..." if len(values) > 3 else "")
