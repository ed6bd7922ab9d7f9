"""Dense columns: values of numbers and times -> a few floats each.

A column is fitted once, and total ever after: every value becomes `width` finite floats.
"""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.notes import Notes
from itemvec.schema import AnyFeature, Numeric, Timestamp
from itemvec.values import unix_seconds

Floats = npt.NDArray[np.float64]


class DenseColumn(ABC):
    """A column whose values become `width` floats each, the last of which is 1 where the value is missing."""

    feature: AnyFeature
    width: int

    @property
    def targets(self) -> int:
        """How many of them, from the first, the decoder reads back."""
        return self.width - 1

    @abstractmethod
    def encode(self, values: Sequence[Any] | Floats, notes: Notes) -> npt.NDArray[np.float32]:
        """(n, width); values that all are numbers may come as an array."""

    @abstractmethod
    def decode(self, floats: npt.NDArray[np.floating[Any]]) -> Any:
        """(targets,) floats as the decoder reads them back -> the value in its own unit, as JSON; within the range of
        the training values. None where nothing can be read back."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """What was fitted, as JSON."""

    def _numbers(
        self,
        values: Sequence[Any] | Floats,
        read: Callable[[Any], float | None],
        expected: str,
        low: float,
        high: float,
        notes: Notes,
    ) -> Floats:
        """(n,) the values within [low, high], NaN where missing; what was done to each is noted."""
        name = self.feature.name
        if len(values) > 1 and (given := _plain(values)) is not None:
            notes.mark_all(name, "missing", np.isnan(given))
            notes.mark_all(name, "clipped", (given < low) | (given > high))
            return np.minimum(np.maximum(given, low), high)
        return np.array([self._number(value, i, read, expected, low, high, notes) for i, value in enumerate(values)])

    def _number(
        self,
        value: Any,
        i: int,
        read: Callable[[Any], float | None],
        expected: str,
        low: float,
        high: float,
        notes: Notes,
    ) -> float:
        """The same of one value; `i` is its item's place."""
        number = None
        if value is not None:
            try:
                number = read(value)
            except (TypeError, ValueError, OverflowError):
                notes.wrong(i, self.feature.name, expected, value)
        if number is None or number != number:
            notes.mark(self.feature.name, "missing", i)
            return math.nan
        if not low <= number <= high:
            notes.mark(self.feature.name, "clipped", i)
            return low if number < low else high
        return number


def _plain(values: Sequence[Any] | Floats) -> Floats | None:
    """(n,) values that are all numbers or null, NaN for null; None where one is not."""
    if isinstance(values, np.ndarray):
        return values
    if set(map(type, values)) <= {int, float, type(None)}:
        with suppress(OverflowError):  # a whole number of hundreds of digits: `number` knows whose
            return np.array(values, np.float64)
    return None


def number(value: Any) -> float:
    """Raises TypeError for what is no number, a boolean included, and OverflowError beyond the largest float."""
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError
    return float(value)


QUANTILES = 257
"""Knots of `scale: quantile`; between them ranks are interpolated."""


class NumericColumn(DenseColumn):
    """A number brought to mean 0 and variance 1 over the training items; 0 and a flag where it is missing.

    Between value and flag stands a float per bin (piecewise linear encoding, Gorishniy et al. 2022): 0 below the bin, 1
    above it, and linear within. A network can then bend at each edge, and even a linear one knows that values are close
    or far; the value itself is what the decoder reads back.
    """

    def __init__(
        self, feature: Numeric, low: float, high: float, mean: float, std: float, knots: Sequence[float] = (),
        edges: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.feature: Numeric = feature
        self.low, self.high, self.mean, self.std = low, high, mean, std
        self.knots, self.edges = np.array(knots), np.array(edges)
        """Quantiles of the training values, each once: where the rank is known, and where the bins meet."""
        self._ranks = np.linspace(0, 1, len(self.knots))
        self.bins = max(len(self.edges) - 1, 0)
        self._bin_widths = np.diff(self.edges)
        self._steps: list[float] = self.edges.tolist()
        self.width = 2 + self.bins

    @property
    def targets(self) -> int:
        return 1

    @classmethod
    def fit(cls, feature: Numeric, column: pa.ChunkedArray) -> "NumericColumn":
        values = column.cast(pa.float64(), safe=False).drop_null().to_numpy()  # beyond 2^53 rounded
        values = values[~np.isnan(values)]
        low, high = (float(end) for end in np.quantile(values, [feature.clip, 1 - feature.clip]))
        values = values.clip(low, high)
        knots = _quantiles(values, QUANTILES) if feature.scale == "quantile" else []
        edges = _quantiles(values, feature.bins + 1) if feature.bins else []
        fitted = cls(feature, low, high, 0.0, 1.0, knots, edges)
        scaled = fitted._scaled(values)
        return cls(feature, low, high, float(scaled.mean()), float(scaled.std()) or 1.0, knots, edges)

    def _scaled(self, values: Any) -> Any:
        """Of an array, or of one number."""
        if self.feature.scale == "log":
            return np.log1p(values)
        if self.feature.scale == "quantile":
            return np.interp(values, self.knots, self._ranks)
        return values

    def encode(self, values: Sequence[Any] | Floats, notes: Notes) -> npt.NDArray[np.float32]:
        if len(values) == 1:
            return np.array([self.floats(values[0], notes)], np.float32)
        numbers = self._numbers(values, number, "a number", self.low, self.high, notes)
        out = np.zeros((len(values), self.width), np.float32)
        out[:, 0] = (self._scaled(numbers) - self.mean) / self.std
        if self.bins:
            parts = (numbers[:, None] - self.edges[:-1]) / self._bin_widths
            out[:, 1:-1] = np.minimum(np.maximum(parts, 0.0, out=parts), 1.0, out=parts)
        missing = np.isnan(numbers)
        if missing.any():
            out[missing] = 0.0
            out[missing, -1] = 1.0
        return out

    def floats(self, value: Any, notes: Notes) -> list[float]:
        """(width,) of a lone item's value. Calls into numpy take three times as long as so little work."""
        value = self._number(value, 0, number, "a number", self.low, self.high, notes)
        if value != value:
            return [0.0] * (self.width - 1) + [1.0]
        full = max(0, min(bisect_right(self._steps, value) - 1, self.bins))
        parts = [1.0] * full + [0.0] * (self.bins - full)
        if full < self.bins:
            parts[full] = max(0.0, (value - self._steps[full]) / (self._steps[full + 1] - self._steps[full]))
        return [float(self._scaled(value) - self.mean) / self.std, *parts, 0.0]

    def decode(self, floats: npt.NDArray[np.floating[Any]]) -> float:
        scaled = float(floats[0]) * self.std + self.mean
        if self.feature.scale == "log":
            scaled = float(np.expm1(min(scaled, 700.0)))  # e^710 is no float any more
        elif self.feature.scale == "quantile":
            scaled = float(np.interp(scaled, self._ranks, self.knots))
        return min(max(scaled, self.low), self.high)

    def state(self) -> dict[str, Any]:
        return {
            "low": self.low, "high": self.high, "mean": self.mean, "std": self.std, "knots": self.knots.tolist(),
            "edges": self.edges.tolist(),
        }  # fmt: skip


def _quantiles(values: Floats, count: int) -> list[float]:
    """Those that lie apart by more than rounding: what divides by their distance stays finite."""
    found = np.unique(np.quantile(values, np.linspace(0, 1, count)))
    apart = np.diff(found, prepend=-np.inf) > 1e-12 * (found[-1] - found[0])
    kept: list[float] = found[apart].tolist()
    return kept


YEAR = 365.2425 * 86_400
_PERIODS = {"year": YEAR, "week": 7 * 86_400.0, "day": 86_400.0}


class TimestampColumn(DenseColumn):
    """A moment as its age before the newest training item (mean 0, variance 1) and a point on a circle per cycle."""

    def __init__(self, feature: Timestamp, low: float, high: float, mean: float, std: float) -> None:
        self.feature: Timestamp = feature
        self.low, self.high, self.mean, self.std = low, high, mean, std
        self.width = 2 + 2 * len(feature.cycles)

    @classmethod
    def fit(cls, feature: Timestamp, column: pa.ChunkedArray) -> "TimestampColumn":
        seconds = np.concatenate([_seconds(chunk) for chunk in column.chunks])
        seconds = seconds[~np.isnan(seconds)]
        high = float(seconds.max())
        years = (high - seconds) / YEAR
        return cls(feature, float(seconds.min()), high, float(years.mean()), float(years.std()) or 1.0)

    def encode(self, values: Sequence[Any] | Floats, notes: Notes) -> npt.NDArray[np.float32]:
        expected = "an ISO 8601 time or Unix seconds"
        seconds = self._numbers(values, _moment, expected, self.low, self.high, notes)
        out = np.zeros((len(values), self.width), np.float32)
        present = ~np.isnan(seconds)
        out[present, 0] = ((self.high - seconds[present]) / YEAR - self.mean) / self.std
        for c, cycle in enumerate(self.feature.cycles):
            angle = 2 * np.pi * np.mod(seconds[present] / _PERIODS[cycle], 1.0)
            out[present, 1 + 2 * c], out[present, 2 + 2 * c] = np.sin(angle), np.cos(angle)
        out[:, -1] = ~present
        return out

    def decode(self, floats: npt.NDArray[np.floating[Any]]) -> str | float:
        """ISO 8601, in UTC; Unix seconds where they are beyond the years that it can write."""
        age = (float(floats[0]) * self.std + self.mean) * YEAR
        seconds = min(max(self.high - age, self.low), self.high)
        try:
            return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
        except (ValueError, OverflowError, OSError):
            return seconds

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "mean": self.mean, "std": self.std}


def _moment(value: Any) -> float | None:
    if isinstance(value, bool | list | dict):
        raise TypeError
    return unix_seconds(value)


def _seconds(column: pa.Array) -> Floats:
    """(n,) Unix seconds, NaN where there are none. What each distinct value says is read once."""
    distinct = column.dictionary_encode()
    read = [unix_seconds(value) for value in moments(pa.chunked_array([distinct.dictionary]))]
    seconds = np.array([math.nan if s is None else s for s in (*read, None)])
    at: npt.NDArray[np.int64] = pc.fill_null(distinct.indices, len(read)).to_numpy(zero_copy_only=False)
    return seconds[at]


def moments(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column of times: Unix seconds where it holds moments, to the microsecond, else as they are."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("ms"))
    if not pa.types.is_timestamp(column.type):
        values: list[Any] = column.to_pylist()
        return values
    units = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e6}
    if column.type.unit == "ns":  # Python's own times, and so the JSON of an item, end at microseconds
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    return [None if count is None else count / units[column.type.unit] for count in column.cast(pa.int64()).to_pylist()]
