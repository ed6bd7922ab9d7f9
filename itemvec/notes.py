"""Notes: what was not plain about the columns of each item, and which values had the wrong type."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import date, datetime
from functools import cached_property
from typing import Any, Literal, NamedTuple, get_args, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from itemvec.errors import FieldError

Status = Literal["oov", "partly_oov", "missing", "clipped", "ignored"]

WORDS: tuple[Status, ...] = get_args(Status)
CODES: dict[Status, int] = {status: code for code, status in enumerate(WORDS, 1)}
"""A status among many; 0 is a plain value."""


Codes = npt.NDArray[np.int8]
Places = npt.NDArray[np.intp]
Mark = tuple[int, str, Status]
"""An item's place, a column of it that was not plain, and what it was."""


class Marks(NamedTuple):
    """The same of all, item by item, as three parallel arrays."""

    items: Places
    columns: Places
    """Which of `names`."""

    codes: Codes
    names: Sequence[str]


class Statuses(Sequence[dict[str, Status]]):
    """Per item, only the columns that were not plain. Looks like a list of dicts, to be read only, and makes them when
    one is asked for: what counts or sends those of a thousand items does without (`marks`, `tally`)."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, n: int, single: Sequence[Mark], names: Sequence[str] = (), codes: Codes | None = None) -> None:
        """Of n items: single ones, and (n, len(names)) codes of many."""
        self._n, self._single, self._names, self._codes = n, single, names, codes
        self._items: list[dict[str, Status]] | None = None

    @cached_property
    def marks(self) -> Marks:
        codes = np.zeros((self._n, 0), np.int8) if self._codes is None else self._codes
        items, columns = np.nonzero(codes)
        found = Marks(items, columns, codes[items, columns], self._names)
        if not self._single:
            return found
        names = [*self._names]
        place = {name: at for at, name in reversed([*enumerate(names)])}
        for _, name, _ in self._single:
            if place.setdefault(name, len(names)) == len(names):
                names.append(name)
        single = np.array([(i, place[name], CODES[status]) for i, name, status in self._single]).T
        together = np.concatenate([np.array(found[:3]), single], axis=1)
        items, columns, all_codes = together[:, np.argsort(together[0], kind="stable")]
        return Marks(items, columns, all_codes.astype(np.int8), names)

    def tally(self) -> Mapping[tuple[str, Status], int]:
        """How often each column had each status."""
        found: dict[tuple[str, Status], int] = {}
        for _, name, status in self._single:
            found[name, status] = found.get((name, status), 0) + 1
        if self._codes is not None:
            for code, word in enumerate(WORDS, 1):
                for name, times in zip(
                    self._names, np.count_nonzero(self._codes == code, axis=0).tolist(), strict=True
                ):
                    if times:
                        found[name, word] = found.get((name, word), 0) + times
        return found

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, at: int) -> dict[str, Status]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Status]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Status] | list[dict[str, Status]]:
        if self._items is None:
            items: list[dict[str, Status]] = [{} for _ in range(self._n)]
            for i, column, status in self._single if self._codes is None else self._each():
                items[i][column] = status
            self._items = items
        return self._items[at]

    def _each(self) -> Iterator[Mark]:
        items, columns, codes, names = self.marks
        for i, column, code in zip(items.tolist(), columns.tolist(), codes.tolist(), strict=True):
            yield i, names[column], WORDS[code - 1]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and [*self] == [*other]

    def __repr__(self) -> str:
        return repr(self[:])

    @classmethod
    def of(cls, statuses: Sequence[Mapping[str, Status]]) -> "Statuses":
        """What they are already, or the same of a list of dicts."""
        if isinstance(statuses, cls):
            return statuses
        return cls(len(statuses), [(i, *mark) for i, status in enumerate(statuses) for mark in status.items()])


FEW = 64
"""Of so many items each is noted by itself: a matrix of codes costs more to begin."""


class Notes:
    """Collects, over one call, what the columns of each item were, and what was wrong with them."""

    def __init__(self, n: int, names: Sequence[str], pointer: str) -> None:
        self.errors: list[FieldError] = []
        self._n, self._names, self._pointer = n, names, pointer
        self._single: list[Mark] = []
        self._codes: Codes | None = None

    @property
    def statuses(self) -> Statuses:
        return Statuses(self._n, self._single, self._names, self._codes)

    def mark(self, column: str, status: Status, item: int) -> None:
        self._single.append((item, column, status))

    def mark_all(self, column: str, status: Status, items: npt.NDArray[np.bool_]) -> None:
        """The column's status for those of the (n,) items that are True."""
        if self._n <= FEW:
            self._single += [(i, column, status) for i in np.flatnonzero(items).tolist()]
        elif items.any():
            self._all_codes()[items, self._names.index(column)] = CODES[status]

    def put(self, columns: Sequence[str], codes: Codes) -> None:
        """(n, len(columns)) codes."""
        self._all_codes()[:, [self._names.index(column) for column in columns]] = codes

    def _all_codes(self) -> Codes:
        if self._codes is None:
            self._codes = np.zeros((self._n, len(self._names)), np.int8)
        return self._codes

    def wrong(self, row: int, column: str, expected: str, value: Any, at: int | None = None) -> None:
        """`at` is the place in a list."""
        where = f"{self._pointer}/{row}/{column.replace('~', '~0').replace('/', '~1')}"
        self.errors.append(
            FieldError(where if at is None else f"{where}/{at}", f"expected {expected}, got {_shown(value)}")
        )


_JSON_NAMES = {
    str: "the string",
    bool: "the boolean",
    int: "the number",
    float: "the number",
}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, pa.Scalar):
        return f"an Arrow {value.type} that cannot be read"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):  # not as text: it may be nested more deeply than Python writes
        return f"an object of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:  # thousands of digits are not even written by Python
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, date):
        return f"the {'time' if isinstance(value, datetime) else 'date'} {value.isoformat()}"
    text = repr(value)
    return f"{_JSON_NAMES.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"
