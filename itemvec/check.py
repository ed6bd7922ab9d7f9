"""What is wrong with an item table, column by column, before anything is trained on it."""

import difflib
import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.errors import SchemaMismatch
from itemvec.schema import (
    Feature,
    FeatureSchema,
    Multi,
    Nominal,
    Numeric,
    Ordinal,
    Series,
    Text,
    Timestamp,
    Vector,
)
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
    errors = [*id_errors(table, schema.id), *(e for f in schema.features for e in column_errors(table, f))]
    if errors:
        raise SchemaMismatch(source, errors)


def id_errors(table: pa.Table, name: str, suspects: pa.ChunkedArray | None = None) -> list[str]:
    """What training would refuse about the id column. `suspects` are the ids that may stand on more than one row, in
    the order of the table, if not all may."""
    return [f"{name}: {text}" for level, text in _check_id(table, name, suspects) if level == "error"]


def column_errors(table: pa.Table, feature: Feature) -> list[str]:
    """What training would refuse about a feature's column."""
    return [f"{feature.name}: {text}" for level, text in _check_feature(table, feature) if level == "error"]


def presence_errors(table: pa.Table, feature: Feature) -> list[str]:
    """Those of them that can be told without a look at the values: no such column, another type, all missing."""
    return [f"{feature.name}: {text}" for level, text in _check_presence(table, feature) if level == "error"]


Said = Iterator[tuple[Literal["ok", "warning", "error"], str]]


def absent(name: str, present: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, present, n=1)
    guess = f", did you mean {close[0]!r}?" if close else "."
    return f"the table has no such column{guess} It has {', '.join(present)}"


def _check_id(table: pa.Table, name: str, suspects: pa.ChunkedArray | None = None) -> Said:
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
    counts = pc.value_counts((column if suspects is None else suspects).drop_null())
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
    said = list(_check_presence(table, feature))
    yield from said
    if not any(level == "error" for level, _ in said):
        yield from _KIND_CHECKS[type(feature)](undictionaried(table.column(feature.name)), feature)


def _check_presence(table: pa.Table, feature: Feature) -> Said:
    if feature.name not in table.column_names:
        yield "error", absent(feature.name, table.column_names)
        return
    column = undictionaried(table.column(feature.name))
    if problem := _wrong_type(column.type, feature):
        yield "error", problem
    elif column.null_count == len(column):
        yield "error", "every value is missing: there is nothing to learn"
    elif column.null_count > len(column) / 2:
        yield "warning", f"{100 * column.null_count / len(column):.0f} % of the values are missing"


def _check_labels(column: pa.ChunkedArray, feature: Any) -> Said:
    yield from _check_counts(label_counts(column, feature), feature)


def count_errors(counts: pa.Table, feature: Nominal | Multi) -> list[str]:
    """What training would refuse about a column whose labels are counted (`label_counts`)."""
    return [f"{feature.name}: {text}" for level, text in _check_counts(counts, feature) if level == "error"]


def _check_counts(counts: pa.Table, feature: Any) -> Said:
    labels, times = counts.column("label"), counts.column("count")
    if len(labels) == 0:
        yield "error", "every set is empty: there is nothing to learn"
        return
    if len(labels) == 1:
        yield "warning", f"its only label is {labels[0].as_py()!r}: it tells no two items apart"
    if feature.labels is not None:
        yield from _check_named(labels.to_pylist(), feature.labels, "labels", feature.hash_buckets > 0)
        return
    if feature.hash_buckets:
        return  # rare labels have rows to share
    kept = pc.greater_equal(times, feature.min_count)
    if not pc.any(kept).as_py():
        yield (
            "error",
            f"none of its {len(labels)} labels occurs {feature.min_count} times (min_count): there is nothing to learn",
        )
        return
    rare = 1 - pc.sum(times.filter(kept)).as_py() / pc.sum(times).as_py()
    if rare > 0.2:
        yield (
            "warning",
            f"{100 * rare:.0f} % of the labels given are rarer than min_count {feature.min_count} and share one row",
        )


def _check_named(present: list[Any], named: Sequence[Any], setting: str, shared: bool = False) -> Said:
    """Labels of a table against those that the schema names."""
    there = {key for label in present if (key := canonical(label)) is not None}
    known = [canonical(label) for label in named]
    strange = sorted(there.difference(known))
    if len(strange) == len(there):
        yield "error", f"none of its labels stands in the {setting} {_examples(named)}: it has {_examples(strange)}"
        return
    if strange:
        become = "share the hash buckets" if shared else "count as out-of-vocabulary"
        yield "warning", f"{len(strange)} labels are not in the {setting} and {become}: {_examples(strange)}"
    if unseen := [label for label in known if label not in there]:
        yield (
            "warning",
            f"{len(unseen)} of the {setting} are on no row, and nothing is learned of them: {_examples(unseen)}",
        )


def _check_ordinal(column: pa.ChunkedArray, feature: Ordinal) -> Said:
    yield from _check_named(column.drop_null().unique().to_pylist(), feature.order, "order")


LARGEST = 1e100
"""The square of a number far beyond is no float any more, and its deviation none either."""


def _check_numeric(column: pa.ChunkedArray, feature: Numeric | Series) -> Said:
    low, high, endless = math.inf, -math.inf, 0
    for chunk in column.chunks:  # one by one: a column may be large, and this looks at a copy
        values = chunk.cast(pa.float64(), safe=False).drop_null().to_numpy()
        endless += int((np.abs(values) > LARGEST).sum())
        low, high = np.fmin.reduce(values, initial=low), np.fmax.reduce(values, initial=high)
    if endless:
        yield "error", f"{endless} values are infinite or beyond {LARGEST:g}"
    elif low > high:
        yield "error", "every value is missing: there is nothing to learn"
    elif feature.scale == "log" and low < 0:
        yield "error", f"scale: log needs values >= 0, the smallest is {low:g}"
    elif low == high:
        yield "warning", f"every value is {low:g}: it tells no two items apart"


def _check_series(column: pa.ChunkedArray, feature: Series) -> Said:
    yield from _check_numeric(pc.list_flatten(column), feature)
    lengths = pc.list_value_length(column)
    longer = pc.sum(pc.greater(lengths, feature.max_length)).as_py() or 0
    if longer:
        yield (
            "warning",
            f"{longer} series are longer than max_length {feature.max_length}: their oldest part is not read",
        )


def _check_vector(column: pa.ChunkedArray, feature: Vector) -> Said:
    sizes = pc.list_value_length(column.drop_null())
    others = sizes.filter(pc.not_equal(sizes, feature.size))
    if len(others):
        yield "error", f"{len(others)} vectors have not the size {feature.size}, but {_examples(others.unique())}"
        return
    inside = pc.list_flatten(column)
    numbers = pc.sum(pc.less_equal(pc.abs(inside.cast(pa.float64(), safe=False)), LARGEST)).as_py() or 0
    if numbers < len(inside):
        yield (
            "error",
            f"{len(inside) - numbers} numbers inside are null, NaN, infinite or beyond {LARGEST:g}; a vector has none",
        )
        return
    extent = pc.min_max(inside)
    if extent["min"] == extent["max"]:
        yield "warning", f"every number is {extent['min'].as_py():g}: it tells no two items apart"


MILLISECONDS = 1e11
"""Unix seconds of the year 5138: a larger number was meant as milliseconds."""


def _check_timestamp(column: pa.ChunkedArray, feature: Timestamp) -> Said:
    if pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        yield from _check_numeric(column, Numeric(name=feature.name))
        largest = pc.max(column.cast(pa.float64(), safe=False)).as_py()
        if largest is not None and MILLISECONDS < largest < float("inf"):
            yield "warning", f"numbers are Unix seconds, and the largest is {largest:g}: are these milliseconds?"
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
    empty = sum(pc.sum(pc.equal(pc.utf8_trim_whitespace(chunk), "")).as_py() or 0 for chunk in column.chunks)
    if empty + column.null_count == len(column):
        yield "error", "every text is empty: there is nothing to learn"
    if feature.sentence_encoder is not None and importlib.util.find_spec("sentence_transformers") is None:
        yield "error", f"sentence_encoder {feature.sentence_encoder!r} wants: pip install sentence-transformers"


_KIND_CHECKS: dict[type[Feature], Any] = {
    Nominal: _check_labels,
    Multi: _check_labels,
    Ordinal: _check_ordinal,
    Numeric: _check_numeric,
    Timestamp: _check_timestamp,
    Text: _check_text,
    Series: _check_series,
    Vector: _check_vector,
}


def undictionaried(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The values themselves where a column holds codes (pandas' categories), or views of texts, which Arrow cannot
    count."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        return undictionaried(column.cast(kind.value_type))
    if pa.types.is_string_view(kind):
        return column.cast(pa.large_string())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_string_view(kind.value_type):
        return column.cast(pa.large_list(pa.large_string()))
    return column


def flat_labels(column: pa.ChunkedArray, feature: Multi) -> pa.ChunkedArray:
    """All labels of a multi column, one after the other."""
    return pc.list_flatten(_sets(column, feature))


def _sets(column: Any, feature: Multi) -> Any:
    """The lists of labels of a multi column."""
    return pc.split_pattern(column, feature.separator) if _is_text(column.type) and feature.separator else column


COUNTED_AT_ONCE = 4_000_000
"""Labels of single chunks whose counts wait to be added up."""


def label_counts(
    column: pa.ChunkedArray, feature: Nominal | Multi, kept: npt.NDArray[np.bool_] | None = None
) -> pa.Table:
    """How often each `label` of a column occurs, its `count`; and of that on the rows `kept` (n,), if given, as `kept`.
    Chunk by chunk, so that a column may be larger than memory as long as its distinct labels are not."""
    start, parts = 0, list[pa.Table]()
    for chunk in column.chunks or [pa.array([], column.type)]:
        parts.append(_counted(chunk, feature, None if kept is None else kept[start : start + len(chunk)]))
        start += len(chunk)
        if sum(map(len, parts)) > COUNTED_AT_ONCE:
            parts = [added_up(parts)]
    return parts[0] if len(parts) == 1 else added_up(parts)


def _counted(chunk: pa.Array, feature: Nominal | Multi, kept: npt.NDArray[np.bool_] | None) -> pa.Table:
    labels = chunk
    if isinstance(feature, Multi):
        sets = _sets(chunk, feature)
        labels = pc.list_flatten(sets)
        kept = None if kept is None else np.repeat(kept, pc.list_value_length(sets).fill_null(0).to_numpy())
    coded = labels.dictionary_encode()
    distinct = len(coded.dictionary)
    codes = coded.indices.fill_null(distinct).to_numpy()
    counts = {"label": coded.dictionary, "count": np.bincount(codes, minlength=distinct)[:distinct]}
    if kept is not None:
        counts["kept"] = np.bincount(codes[kept], minlength=distinct)[:distinct]
    return pa.table(counts)


def added_up(parts: Sequence[pa.Table]) -> pa.Table:
    """The `label_counts` of all rows, of those of parts of them."""
    counted = parts[0].column_names[1:]
    sums = pa.concat_tables(parts).group_by("label", use_threads=False).aggregate([(name, "sum") for name in counted])
    return sums.select(["label", *(f"{name}_sum" for name in counted)]).rename_columns(parts[0].column_names)


def of_kept(counts: pa.Table) -> pa.Table:
    """The `label_counts` of the rows kept alone."""
    return (
        counts.filter(pc.greater(counts.column("kept"), 0)).select(["label", "kept"]).rename_columns(["label", "count"])
    )


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
        fits = _is_number(arrow)
        wants = "numbers"
    elif isinstance(feature, Timestamp):
        moments = pa.types.is_date(arrow) or pa.types.is_timestamp(arrow)
        fits = moments or _is_text(arrow) or pa.types.is_integer(arrow) or pa.types.is_floating(arrow)
        wants = "dates, times, ISO 8601 text or Unix seconds"
    elif isinstance(feature, Series | Vector):
        fits = is_numbers(arrow)
        wants = "a list of numbers"
    else:
        fits = _is_text(arrow)
        wants = "text"
    return None if fits else f"kind {feature.kind} wants {wants}, this column is {arrow}"  # type: ignore[attr-defined]


def _is_text(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow))


def _is_list(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_list(arrow) or pa.types.is_large_list(arrow) or pa.types.is_fixed_size_list(arrow))


def _is_number(arrow: pa.DataType) -> bool:
    return bool(pa.types.is_integer(arrow) or pa.types.is_floating(arrow) or pa.types.is_decimal(arrow))


def is_numbers(arrow: pa.DataType) -> bool:
    """Whether a column of this type holds lists of numbers."""
    return _is_list(arrow) and _is_number(arrow.value_type)


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
