"""The values of an item: when two labels are the same, which bucket a text falls into, and how a moment is read."""

import re
import unicodedata
import zlib
from collections.abc import Iterable
from datetime import UTC, date, datetime
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_ID_BYTES = 512

PYTHON_TYPES: dict[str, type] = {"string": str, "integer": int, "boolean": bool}


def canonical(label: Any) -> Any:
    """The form in which labels are compared: Unicode NFC, no white space around; an empty string is no label (None).

    >>> canonical(" Cafe\\u0301 ") == "Caf\\u00e9", canonical("  ")
    (True, None)
    """
    if isinstance(label, str):
        if label.isascii():  # which is NFC as it is
            return label.strip() or None
        if len(label) > MARKS and _many_marks().search(label):
            return label.strip() or None
        return unicodedata.normalize("NFC", label).strip() or None
    return label


MARKS = 30
"""Combining marks in a row beyond which a text is none of any language (Unicode Standard Annex 15, stream-safe text
format). It is left as it is: the time to order them grows with the square of their number."""


@cache
def _many_marks() -> re.Pattern[str]:
    marks = "".join(char for char in map(chr, range(0x20000)) if unicodedata.combining(char))
    return re.compile(f"[{re.escape(marks)}]{{{MARKS + 1}}}")


PLAIN = r"^[!-~\x{C0}-\x{17F}]([ -~\x{C0}-\x{17F}]*[!-~\x{C0}-\x{17F}])?$"
"""For Arrow: text of ASCII and accented Latin letters (U+00C0 to U+017F) without spaces around it. All of it is in
its canonical form, and most texts that are, are such."""

FIBONACCI = 0x9E3779B1
"""2^32 divided by the golden ratio."""


def hashed(token: str, buckets: int) -> int:
    """The token's bucket, 0 to buckets - 1: the same in every process, on every machine, in every version.

    CRC-32 alone keeps tokens that differ in their last letter close together; the multiplication (Fibonacci hashing,
    Knuth 1973) mixes them into the high bits, which choose.

    >>> hashed("Drama", 100), hashed("Drame", 100)
    (95, 36)
    """
    mixed = (zlib.crc32(token.encode("utf-8", "surrogatepass")) * FIBONACCI) & 0xFFFFFFFF
    return mixed * buckets >> 32


def all_hashed(tokens: Iterable[str], buckets: int) -> npt.NDArray[np.int64]:
    """The same of many tokens.

    >>> all_hashed(["Drama", "Drame"], 100)
    array([95, 36])
    """
    sums = np.fromiter((zlib.crc32(token.encode("utf-8", "surrogatepass")) for token in tokens), np.uint64)
    mixed = (sums * np.uint64(FIBONACCI)) & np.uint64(0xFFFFFFFF)
    return (mixed * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


def unix_seconds(value: str | float | date) -> float | None:
    """A moment as Unix seconds; a time without a zone is UTC. None for empty text; ValueError for text that is no time.

    >>> unix_seconds("1970-01-02"), unix_seconds("1970-01-01T01:00:00+01:00")
    (86400.0, 0.0)
    """
    if isinstance(value, str):
        if not (text := value.strip()):
            return None
        value = datetime.fromisoformat(text)
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    return float(value)
