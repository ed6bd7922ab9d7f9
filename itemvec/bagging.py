"""Bagging: the bags of all columns together, item by item, as rows of the shared table.

A call into numpy costs more than its work on a few items. So a few are bagged one by one, in plain Python; many as one
matrix: a line for each item, and in it a stretch for each column that has room for its longest bag. What is said of
all bags (each row once, ascending; what they count; whether they are known) is then a call, and not one a column.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from itemvec.bags import BagColumn, Part
from itemvec.notes import CODES, Notes
from itemvec.vocabulary import FIRST, MISSING, OOV, Ints

EMPTY, SHORT = 4, 64
"""Empty places that the matrix may have for each row in it, beyond SHORT places a line. Where some bags are far longer
than the others there is none, and all rows are sorted as one list, which takes longer for each."""

Bags = tuple[Ints, npt.NDArray[np.float32], npt.NDArray[np.int32]]
"""Of n items and F columns: (nnz,) rows of the table, item by item, and within an item bag by bag, ascending; (nnz,)
what each counts in its bag's sum; (n, F) lengths, none of them 0."""


class Bagging:
    def __init__(self, columns: Sequence[tuple[int, BagColumn]]) -> None:
        """Each with its base, the first row of its part of the table."""
        self._columns = [column for _, column in columns]
        self._names = [column.feature.name for column in self._columns]
        self._bases = np.array([base for base, _ in columns], np.int64)
        self._each = [(column, column.shared) for _, column in columns]
        self._ends = self._bases + [column.rows for column in self._columns]
        """Behind every row of a column: what stands in its empty places."""
        self._strange = np.zeros(sum(column.rows for column in self._columns), np.bool_)
        """Of each row of the table: does it stand for labels that training did not know?"""
        for base, column in columns:
            self._strange[base + OOV] = True
            self._strange[base + column.shared : base + column.rows] = True
        self._steps = [(f, column.step) for f, column in enumerate(self._columns) if column.step is not None]

    def one_by_one(self, items: Sequence[Sequence[Any]], notes: Notes) -> Bags:
        """Of each item its columns' values."""
        rows: list[int] = []
        weights: list[float] = []
        lengths: list[int] = []
        for i, item in enumerate(items):
            for value, (column, shared) in zip(item, self._each, strict=True):
                bag = column.bag(value, i, notes)
                if bag[0] < FIRST or bag[-1] >= shared:
                    notes.mark(column.feature.name, column.status(bag), i)
                length, step = len(bag), column.step
                rows += bag
                weights.append(1.0 / sqrt(length) if step is None or bag[0] < FIRST else step)
                lengths.append(length)
        by_bag = np.array(lengths, np.int32)
        indices = np.array(rows, np.int64)
        indices += (self._bases if len(items) == 1 else np.tile(self._bases, len(items))).repeat(by_bag)
        return indices, np.array(weights, np.float32).repeat(by_bag), by_bag.reshape(len(items), len(self._each))

    def together(self, columns: Sequence[Sequence[Part]], n: int, notes: Notes) -> Bags:
        """Of each column the parts of n bags."""
        if not columns:
            return np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros((n, 0), np.int32)
        indices, lengths = self._in_order(columns, n)
        ends = np.cumsum(lengths)
        first = indices[ends - lengths.ravel()].reshape(lengths.shape) - self._bases
        weights = 1.0 / np.sqrt(lengths)
        for f, step in self._steps:
            weights[first[:, f] >= FIRST, f] = step
        strange = np.flatnonzero(self._strange.take(indices))
        unknown = np.bincount(np.searchsorted(ends, strange, "right"), minlength=lengths.size).reshape(lengths.shape)
        codes = np.where(first == MISSING, np.int8(CODES["missing"]), np.int8(0))
        codes[unknown > 0] = CODES["partly_oov"]
        codes[unknown == lengths] = CODES["oov"]
        notes.put(self._names, codes)
        return indices, np.repeat(weights.astype(np.float32).ravel(), lengths.ravel()), lengths

    def _in_order(self, columns: Sequence[Sequence[Part]], n: int) -> tuple[Ints, npt.NDArray[np.int32]]:
        """Indices and lengths as `Bags` has them."""
        parts = [part for column in columns for part in column]
        rows = np.concatenate([rows for rows, _ in parts])
        lengths = np.array([lengths for _, lengths in parts])
        widths = np.maximum(lengths.max(1, initial=0), 1)
        if (int(widths.sum()) - len(parts) - SHORT) * n > EMPTY * len(rows):
            return self._in_order_by_sorting(columns, rows, lengths)
        begins = np.cumsum([0, *widths])
        edges = begins[np.cumsum([0, *map(len, columns)])].tolist()
        starts, width = edges[:-1], edges[-1]
        sizes = [sum(len(rows) for rows, _ in column) for column in columns]
        rows = np.where(rows == MISSING, np.repeat(self._ends, sizes), rows + np.repeat(self._bases, sizes))
        empty = np.repeat(self._ends, np.diff(edges))
        matrix = np.empty((n, width), np.int32)
        matrix[:] = empty
        places = (begins[:-1, None] + np.arange(0, n * width, width)).ravel()
        matrix.reshape(-1)[_each(places, lengths.ravel())] = rows
        for start, end in _stretches(edges):
            matrix[:, start:end].sort(axis=1)
        first = matrix[:, starts]
        matrix[:, starts] = np.where(first == self._ends, self._bases + MISSING, first)
        kept = matrix < empty
        kept[:, 1:] &= matrix[:, 1:] != matrix[:, :-1]
        kept[:, starts] = True  # also after an empty place, which looks like the next column's first row
        return matrix[kept].astype(np.int64), np.add.reduceat(kept, starts, axis=1, dtype=np.int32)

    def _in_order_by_sorting(
        self, columns: Sequence[Sequence[Part]], rows: Ints, lengths: Ints
    ) -> tuple[Ints, npt.NDArray[np.int32]]:
        """The same without a matrix, of the rows and lengths of all parts: a bag and a row are one number."""
        n, width = lengths.shape[1], len(columns)
        column = np.repeat(np.arange(width), [len(parts) for parts in columns])
        bags = np.repeat((column[:, None] + np.arange(0, n * width, width)).ravel(), lengths.ravel())[rows != MISSING]
        found = rows[rows != MISSING] + self._bases[bags % width]
        empty = np.flatnonzero(np.bincount(bags, minlength=n * width) == 0)
        missing = self._bases[empty % width] + MISSING
        pairs = np.concatenate([bags << 32 | found, empty << 32 | missing])
        pairs.sort()
        pairs = pairs[np.diff(pairs, prepend=-1) > 0]
        counts = np.bincount(pairs >> 32, minlength=n * width).astype(np.int32)
        return pairs & 0xFFFFFFFF, counts.reshape(n, width)


def _each(places: Ints, lengths: Ints) -> Ints:
    """[10, 20], [3, 2] -> [10, 11, 12, 20, 21]"""
    return np.repeat(places - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _stretches(edges: Sequence[int]) -> list[tuple[int, int]]:
    """What is sorted at once: a column's stretch, or several side by side in up to `SHORT` places. No row or empty
    place of a column is greater than those of the next, so that each stays within its stretch."""
    stretches = [(edges[0], edges[1])]
    for start, end in pairwise(edges[1:]):
        if end - stretches[-1][0] <= SHORT:
            stretches[-1] = stretches[-1][0], end
        else:
            stretches.append((start, end))
    return stretches
