"""Notes: what was not plain about the columns of each item, and which values had the wrong type."""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from itemvec.errors import FieldError

Status = Literal["oov", "partly_oov", "missing", "clipped", "ignored"]


class Notes:
    """Collects, over one call, what the columns of each item were, and what was wrong with them."""

    def __init__(self, n: int, pointer: str) -> None:
        self.statuses: list[dict[str, Status]] = [{} for _ in range(n)]
        """Per item, only the columns that were not plain."""
        self.errors: list[FieldError] = []
        self._pointer = pointer

    def mark(self, column: str, status: Status, items: npt.NDArray[np.bool_]) -> None:
        """The column's status for those of the (n,) items that are True."""
        for i in np.flatnonzero(items).tolist():
            self.statuses[i][column] = status

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
    dict: "the object",
}


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, pa.Scalar):
        return f"an Arrow {value.type} that cannot be read"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 256:  # thousands of digits are not even written by Python
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return f"{_JSON_NAMES.get(type(value), type(value).__name__)} {text if len(text) <= 60 else text[:57] + '...'}"
