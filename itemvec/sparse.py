"""Csr: a sparse matrix in compressed rows, for the few things that itemvec does with one; scipy stays optional."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Csr:
    """`scipy.sparse.csr_matrix((m.data, m.indices, m.indptr), m.shape)` is the same matrix.

    >>> Csr.of_rows([[2], [], [0, 2]], width=3).toarray()
    array([[0., 0., 1.],
           [0., 0., 0.],
           [1., 0., 1.]], dtype=float32)
    """

    data: npt.NDArray[np.float32]
    """(nnz,)"""

    indices: npt.NDArray[np.int32]
    """(nnz,) the column of each; within a row they rise."""

    indptr: npt.NDArray[np.int64]
    """(rows + 1,) where each row begins, and the last one ends."""

    width: int

    @classmethod
    def of_rows(cls, rows: Sequence[Sequence[int]], width: int) -> "Csr":
        """A 1 in each of the columns that a row names."""
        indices = np.array([column for row in rows for column in row], np.int32)
        return cls(np.ones(len(indices), np.float32), indices, bounds([len(row) for row in rows]), width)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indptr) - 1, self.width

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        """(nnz,) the row of each."""
        return np.repeat(np.arange(self.shape[0]), np.diff(self.indptr))

    def toarray(self) -> npt.NDArray[np.float32]:
        out = np.zeros(self.shape, np.float32)
        out[self.rows, self.indices] = self.data
        return out

    def tail(self, first: int) -> "Csr":
        """The columns from `first` on."""
        kept = self.indices >= first
        lengths = np.bincount(self.rows[kept], minlength=self.shape[0])
        return Csr(self.data[kept], self.indices[kept] - np.int32(first), bounds(lengths), self.width - first)

    @classmethod
    def beside(cls, blocks: Sequence["Csr"]) -> "Csr":
        """Blocks of the same rows, left to right."""
        order = np.argsort(np.concatenate([block.rows for block in blocks]), kind="stable")
        starts = accumulate((block.width for block in blocks), initial=0)
        shifted = [block.indices + np.int32(start) for block, start in zip(blocks, starts, strict=False)]
        return cls(
            np.concatenate([block.data for block in blocks])[order],
            np.concatenate(shifted)[order],
            np.sum([block.indptr for block in blocks], axis=0),
            sum(block.width for block in blocks),
        )

    @classmethod
    def stacked(cls, blocks: Sequence["Csr"]) -> "Csr":
        """Blocks of the same columns, top to bottom."""
        return cls(
            np.concatenate([block.data for block in blocks]),
            np.concatenate([block.indices for block in blocks]),
            bounds(np.concatenate([np.diff(block.indptr) for block in blocks])),
            blocks[0].width,
        )


def bounds(lengths: Any) -> npt.NDArray[np.int64]:
    """(n,) lengths -> (n + 1,) where each begins, and the last one ends."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
