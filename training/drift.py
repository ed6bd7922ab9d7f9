"""How far the values of a table have moved from those that a version was trained on: the population stability index.

PSI = sum over bins of (new - old) ln(new / old), of the shares of rows in each bin (Siddiqi 2006). Below 0.1 a column
stands still, from 0.2 on it has moved. Missing values are a bin; of labels, the most frequent ones and the rest; of
numbers and times, ten bins of equally many training rows. Of texts, series and vectors only what is missing counts.
"""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.check import flat_labels, undictionaried
from itemvec.schema import Feature, FeatureSchema, Multi, Nominal, Numeric, Ordinal, Timestamp
from itemvec.values import unix_seconds
from training.items import taken

SAMPLED = 50_000
"""Rows that are looked at."""

LABELS = 30
TENTHS = 10
LEAST = 1e-3
"""A share of 0 counts as this much, or one new label would be an infinite drift."""


def profile(table: pa.Table, schema: FeatureSchema) -> dict[str, dict[str, Any]]:
    """Per column: `bins`, what falls into each (labels, or upper edges of numbers), and `shares`, the last two of them
    the rest and the missing."""
    table = _sampled(table)
    return {f.name: _profile(table, f) for f in schema.features if f.name in table.column_names}


def drift(old: dict[str, dict[str, Any]], table: pa.Table, schema: FeatureSchema) -> dict[str, float]:
    """The index of each column that the profile knows and the table has."""
    table = _sampled(table)
    return {
        f.name: psi(old[f.name]["shares"], _shares(table, f, old[f.name]["bins"]))
        for f in schema.features
        if f.name in old and f.name in table.column_names
    }


def psi(old: list[float], new: list[float]) -> float:
    """
    >>> round(psi([0.5, 0.5], [0.5, 0.5]), 4), round(psi([0.5, 0.5], [0.75, 0.25]), 4)
    (0.0, 0.2747)
    """
    pairs = [(max(p, LEAST), max(q, LEAST)) for p, q in zip(old, new, strict=True)]
    return sum((q - p) * math.log(q / p) for p, q in pairs)


def _profile(table: pa.Table, feature: Feature) -> dict[str, Any]:
    values = _values(table, feature)
    bins: list[Any] = []
    if isinstance(feature, Numeric | Timestamp):
        present = values[~np.isnan(values)]
        if len(present):
            bins = sorted({float(edge) for edge in np.quantile(present, np.arange(1, TENTHS) / TENTHS)})
    elif isinstance(feature, Nominal | Ordinal | Multi):
        counts = pc.value_counts(values.drop_null())
        order = np.argsort(-np.asarray(counts.field("counts")), kind="stable")[:LABELS]
        bins = [str(label) for label in counts.field("values").take(pa.array(order)).to_pylist()]
    return {"bins": bins, "shares": _shares(table, feature, bins)}


def _shares(table: pa.Table, feature: Feature, bins: list[Any]) -> list[float]:
    """Of rows, or of labels where an item has many: in each bin, in none of them, and missing."""
    values = _values(table, feature)
    if isinstance(feature, Numeric | Timestamp):
        missing = int(np.isnan(values).sum())
        there = np.searchsorted(np.array(bins), values[~np.isnan(values)], side="right")
        counts = [*np.bincount(there, minlength=len(bins) + 1)[: len(bins) + 1].tolist(), missing]
        total = len(values)
    else:
        missing = values.null_count
        in_bins = [pc.sum(pc.equal(values, label)).as_py() or 0 for label in bins]
        counts = [*in_bins, len(values) - missing - sum(in_bins), missing]
        total = len(values)
    return [count / max(total, 1) for count in counts]


def _values(table: pa.Table, feature: Feature) -> Any:
    """Numbers as an array with NaN, labels as text; of a set the labels of all items, and a null for an empty one."""
    column = undictionaried(table.column(feature.name))
    if isinstance(feature, Timestamp):
        times = [None if value is None else unix_seconds(value) for value in column.to_pylist()]
        return np.array([np.nan if seconds is None else seconds for seconds in times], np.float64)
    if isinstance(feature, Numeric):
        return np.asarray(column.cast(pa.float64(), safe=False).to_numpy(), np.float64)
    if isinstance(feature, Multi):
        labels = pc.utf8_trim_whitespace(flat_labels(column, feature).cast(pa.string()))
        is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        empty = column.null_count if is_text else len(column) - len(pc.unique(pc.list_parent_indices(column)))
        return pa.concat_arrays([labels.combine_chunks(), pa.nulls(empty, pa.string())])
    if isinstance(feature, Nominal | Ordinal):
        return column.cast(pa.string()).combine_chunks()
    return pc.if_else(pc.is_null(column), pa.scalar(None, pa.string()), "there").combine_chunks()


def _sampled(table: pa.Table) -> pa.Table:
    """SAMPLED rows at most, evenly spaced."""
    step = max(1, -(-table.num_rows // SAMPLED))
    return table if step == 1 else taken(table, range(0, table.num_rows, step))
