"""Dense columns of lists of numbers: series in time order, and ready vectors."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.check import is_numbers
from itemvec.dense import DenseColumn, Floats, number
from itemvec.notes import Notes
from itemvec.schema import Series, Vector

FITTED = 10_000
"""Training rows at most, evenly spaced, from which means and deviations of wide columns are fitted: more would cost
memory and not change their third digit."""


def spaced(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """FITTED values of the column at most, evenly spaced, none of them null."""
    present = column.drop_null()
    step = -(-len(present) // FITTED)
    return present.take(pa.array(np.arange(0, len(present), step))) if step > 1 else present


def number_lists(column: pa.ChunkedArray) -> Iterator[Floats | Any]:
    """The values of a column of lists of numbers as arrays, with NaN for null inside; of any other column as they are.

    A list of a thousand Python floats takes four times the memory, and a table has many of them.
    """
    if not is_numbers(column.type):
        yield from column.to_pylist()
        return
    for chunk in column.cast(pa.large_list(pa.float64()), safe=False).chunks:
        ends = chunk.offsets.to_numpy()
        inside = chunk.values.to_numpy(zero_copy_only=False)
        for i, there in enumerate(chunk.is_valid().to_pylist()):
            yield inside[ends[i] : ends[i + 1]] if there else None


class _NotANumber(Exception):
    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at


def _array(values: Sequence[Any] | Floats) -> Floats:
    """(len(values),) with NaN for null. Raises _NotANumber with the place of the first value that is none."""
    if isinstance(values, np.ndarray):
        return values.astype(np.float64, copy=False)
    if set(map(type, values)) <= {int, float, type(None)}:
        try:
            return np.array(values, np.float64)
        except OverflowError:  # a whole number of hundreds of digits: which one is found below
            pass
    out = np.empty(len(values))
    for at, value in enumerate(values):
        try:
            out[at] = np.nan if value is None else number(value)
        except (TypeError, OverflowError):
            raise _NotANumber(at) from None
    return out


class ListColumn(DenseColumn):
    """What series and vectors share: each number is clipped to the range of all numbers of the training rows."""

    low: float
    high: float

    def _in_range(self, numbers: Floats, i: int, notes: Notes) -> Floats:
        if (numbers < self.low).any() or (numbers > self.high).any():
            notes.mark(self.feature.name, "clipped", i)
            return numbers.clip(self.low, self.high)
        return numbers

    def _missing(self, out: npt.NDArray[np.float32], i: int, notes: Notes) -> None:
        out[i, -1] = 1.0
        notes.mark(self.feature.name, "missing", i)


def _is_list(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "fiu"
    return isinstance(value, list | tuple)


def _range(column: pa.ChunkedArray) -> tuple[float, float]:
    inside = pc.list_flatten(column).cast(pa.float64(), safe=False)
    extent = pc.min_max(inside.filter(pc.invert(pc.is_nan(inside))))
    return extent["min"].as_py(), extent["max"].as_py()


SUMMARIES = 5
"""Floats of a series behind those of its course: newest value, mean, standard deviation, slope, logarithm of length."""


class SeriesColumn(ListColumn):
    """A series as the means of `points` equal parts of it (piecewise aggregate approximation, Keogh et al. 2001), its
    newest value, mean, standard deviation, slope (of the least-squares line, from one end to the other) and the
    logarithm of its length; each with mean 0 and variance 1 over the training items.

    Gaps inside are bridged by straight lines where the parts are concerned; the other figures leave them out.
    """

    def __init__(self, feature: Series, low: float, high: float, mean: Sequence[float], std: Sequence[float]) -> None:
        self.feature: Series = feature
        self.low, self.high = low, high
        self.mean, self.std = np.array(mean), np.array(std)
        self.width = feature.points + SUMMARIES + 1
        self._ends = np.linspace(0, 1, feature.points + 1)

    @classmethod
    def fit(cls, feature: Series, column: pa.ChunkedArray) -> "SeriesColumn":
        low, high = _range(column)
        bare = cls(feature, low, high, [0.0], [1.0])
        filled = column.filter(pc.greater(pc.list_value_length(column), 0))
        series = (numbers[-feature.max_length :] for numbers in number_lists(spaced(filled)))
        nothing = np.zeros(feature.points + SUMMARIES)  # counts only where all series looked at are gaps
        figures = np.array([bare._figures(numbers) for numbers in series if not np.isnan(numbers).all()] or [nothing])
        std = figures.std(0)
        std[std == 0] = 1.0
        return cls(feature, low, high, figures.mean(0).tolist(), std.tolist())

    def encode(self, values: Sequence[Any] | Floats, notes: Notes) -> npt.NDArray[np.float32]:
        name, newest = self.feature.name, self.feature.max_length
        out = np.zeros((len(values), self.width), np.float32)
        for i, value in enumerate(values):
            if value is None:
                self._missing(out, i, notes)
                continue
            if not _is_list(value):
                notes.wrong(i, name, "a list of numbers", value)
                continue
            try:
                numbers = _array(value[-newest:])
            except _NotANumber as wrong:
                at = max(len(value) - newest, 0) + wrong.at
                notes.wrong(i, name, "a number", value[at], at)
                continue
            if np.isnan(numbers).all():
                self._missing(out, i, notes)
            else:
                out[i, :-1] = (self._figures(self._in_range(numbers, i, notes)) - self.mean) / self.std
        return out

    def _figures(self, numbers: Floats) -> Floats:
        """(points + SUMMARIES,) of numbers of which one at least is no gap."""
        # Sums and slices rather than numpy's mean, std, diff and linspace, which take ten times as long for a few
        # numbers, and this runs for every request.
        if self.feature.scale == "log":
            numbers = np.log1p(numbers)
        n, points = len(numbers), self.feature.points
        at = np.arange(n + 1.0)
        place, present, whole = at[:-1], numbers, numbers
        if (gaps := np.isnan(numbers)).any():
            place, present = place[~gaps], numbers[~gaps]
            whole = np.interp(at[:-1], place, present)
        # The integral of the series as steps, read at the ends of the parts: a part may begin within a step.
        area = np.zeros(n + 1)
        whole.cumsum(out=area[1:])
        ends = np.interp(self._ends * n, at, area)
        out = np.empty(points + SUMMARIES)
        out[:points] = (ends[1:] - ends[:-1]) * (points / n)
        mean = present.sum() / len(present)
        off, along = present - mean, place - place.sum() / len(place)
        spread = along @ along
        slope = (along @ off) / spread * (n - 1) if spread > 0 else 0.0
        out[points:] = present[-1], mean, math.sqrt(off @ off / len(off)), slope, math.log(n)
        return out

    def decode(self, floats: npt.NDArray[np.floating[Any]]) -> list[float]:
        """Its course, as `points` numbers."""
        points = self.feature.points
        course = np.asarray(floats[:points], np.float64) * self.std[:points] + self.mean[:points]
        if self.feature.scale == "log":
            course = np.expm1(course.clip(max=700))  # e^710 is no float any more
        values: list[float] = course.clip(self.low, self.high).tolist()
        return values

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "mean": self.mean.tolist(), "std": self.std.tolist()}


class CommonScale:
    """Vectors centred number by number and divided by one deviation: on average, a number's variance is then 1.

    A deviation for each would stretch the space along the directions that matter least: the angles between the vectors,
    which are what an embedding means, would be others.
    """

    def __init__(self, mean: Sequence[float], std: float) -> None:
        self.mean, self.std = np.array(mean), std

    @classmethod
    def fit(cls, vectors: Floats) -> "CommonScale":
        """(n, size)"""
        return cls(vectors.mean(0).tolist(), float(np.sqrt(vectors.var(0).mean())) or 1.0)

    def scaled(self, vectors: Floats) -> Floats:
        """(n, size) or (size,)"""
        scaled: Floats = (vectors - self.mean) / self.std
        return scaled

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "std": self.std}


class VectorColumn(ListColumn):
    """A vector on the scale that its column has in common."""

    def __init__(self, feature: Vector, low: float, high: float, mean: Sequence[float], std: float) -> None:
        self.feature: Vector = feature
        self.low, self.high = low, high
        self.scale = CommonScale(mean, std)
        self.width = feature.size + 1

    @classmethod
    def fit(cls, feature: Vector, column: pa.ChunkedArray) -> "VectorColumn":
        scale = CommonScale.fit(np.array(list(number_lists(spaced(column)))))
        return cls(feature, *_range(column), **scale.state())

    def encode(self, values: Sequence[Any] | Floats, notes: Notes) -> npt.NDArray[np.float32]:
        name, size = self.feature.name, self.feature.size
        out = np.zeros((len(values), self.width), np.float32)
        for i, value in enumerate(values):
            if value is None:
                self._missing(out, i, notes)
                continue
            if not _is_list(value) or len(value) != size:
                notes.wrong(i, name, f"a list of {size} numbers", value)
                continue
            try:
                numbers = _array(value)
            except _NotANumber as wrong:
                notes.wrong(i, name, "a number", value[wrong.at], wrong.at)
                continue
            unbounded = ~np.isfinite(numbers)
            if unbounded.any():
                at = int(unbounded.argmax())
                notes.wrong(i, name, "a finite number", value[at], at)
                continue
            out[i, :-1] = self.scale.scaled(self._in_range(numbers, i, notes))
        return out

    def decode(self, floats: npt.NDArray[np.floating[Any]]) -> list[float]:
        read = np.asarray(floats, np.float64) * self.scale.std + self.scale.mean
        values: list[float] = read.clip(self.low, self.high).tolist()
        return values

    def state(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, **self.scale.state()}
