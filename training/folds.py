"""Which rows are trained on, which decide when to stop, and which nothing is fitted or chosen on."""

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

TRAIN: Final = 0
VALIDATION: Final = 1
TEST: Final = 2


def fold_of(ids: Iterable[str], test: float, validation: float) -> npt.NDArray[np.int8]:
    """(n,) 0 train, 1 validation, 2 test; by a hash of the id alone, so a row keeps its fold in every version of the
    table.

    >>> fold_of(["tt0133093", "tt0234215", "tt0084787"], test=0.5, validation=0.25)
    array([1, 1, 2], dtype=int8)
    """
    return fold_at(hashed_ids(ids), test, validation)


def hashed_ids(ids: Iterable[str]) -> npt.NDArray[np.uint64]:
    """(n,) the first 8 bytes of the SHA-256 of each."""
    digests = (hashlib.sha256(i.encode("utf-8", "surrogatepass")).digest()[:8] for i in ids)
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def fold_at(hashes: npt.NDArray[np.uint64], test: float, validation: float) -> npt.NDArray[np.int8]:
    """(n,) `fold_of` the ids with these hashes."""
    place = hashes.astype(np.float64) / 2.0**64
    return np.where(place < test, 2, np.where(place < test + validation, 1, 0)).astype(np.int8)


def some(rows: npt.NDArray[np.int64], most: int) -> npt.NDArray[np.int64]:
    """`most` of `rows` at most, evenly spaced.

    >>> some(np.arange(7), 3)
    array([0, 3, 6])
    """
    return rows[:: max(1, -(-len(rows) // most))]
