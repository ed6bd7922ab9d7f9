"""Vocabulary: the labels of one column, and the row of the shared embedding table that each of them has."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from itemvec.schema import Label
from itemvec.values import PLAIN, canonical, hashed

Ints = npt.NDArray[np.int64]

OOV, MISSING, FIRST = 0, 1, 2
"""Every bag column's own rows begin with these two; its labels follow from row `FIRST`."""

SEARCHED, LARGEST = 4, 32_768
"""Arrow looks labels up in a vocabulary of up to so many times their number, and of up to so many labels. Each time
it begins with a hash table of all of them, in 1.5 ms at most, and then is faster than Python, which has one already:
twice as fast where as many labels are sent as there are. Python is faster where that table outgrows the processor's
cache, or most labels are the same few."""


class Vocabulary:
    """Maps the labels of one column to rows of its part of the embedding table.

    Row 0 is kept for labels unseen in training and row 1 for missing values, so that both always find a row:

    >>> color = Vocabulary.fit(["red", "blue", "red", "green"], min_count=1)
    >>> color.labels
    ['red', 'blue', 'green']
    >>> [color.row("blue"), color.row("violet")]
    [3, 0]

    Rare labels share the out-of-vocabulary row, so that training teaches it something:

    >>> Vocabulary.fit(["red", "blue", "red"], min_count=2).labels
    ['red']

    With hash buckets (Weinberger et al. 2009) they share that many rows behind the labels instead. Only the buckets
    that a training label fell into have a trained row: what falls into another one is out of vocabulary as before.

    >>> color = Vocabulary.fit(["red", "blue", "red", "green"], min_count=2, hash_buckets=8)
    >>> [color.row("red"), color.row("blue"), color.row("violet")], color.rows
    ([2, 10, 0], 11)
    """

    def __init__(
        self, labels: Sequence[Label], counts: Sequence[int], hash_buckets: int = 0, filled: Iterable[int] = ()
    ) -> None:
        self.labels = list(labels)
        """Most frequent first, or in the order that the schema names; the label of row r is labels[r - FIRST]."""
        self.counts = np.asarray(counts, np.int64)
        """(len(labels),) how often training saw each of them."""
        self.hash_buckets = hash_buckets
        self._rows: dict[Label, int] = {label: row for row, label in enumerate(self.labels, FIRST)}
        self._filled = bytearray(hash_buckets)
        for bucket in filled:
            self._filled[bucket] = 1
        self._first_bucket = FIRST + len(self.labels)
        self.shared = self._first_bucket if self.labels else self.rows
        """From this row on, labels that the vocabulary does not know share rows. A column that is only hashed knows no
        label by name, so there sharing is the plain case."""

    @classmethod
    def fit(
        cls,
        values: Iterable[Label],
        min_count: int,
        max_labels: int = 1_000_000,
        labels: Sequence[Label] | None = None,
        hash_buckets: int = 0,
    ) -> "Vocabulary":
        """Of the settings of a nominal column; `labels` named beforehand are all kept, in their order."""
        return cls.of_counts(Counter(values).items(), min_count, max_labels, labels, hash_buckets)

    @classmethod
    def of_counts(
        cls,
        counted: Iterable[tuple[Label, int]],
        min_count: int,
        max_labels: int,
        labels: Sequence[Label] | None,
        hash_buckets: int,
    ) -> "Vocabulary":
        """The same of labels that are counted already."""
        counts: dict[Label, int] = {}
        for label, count in counted:
            if (key := canonical(label)) is not None:
                counts[key] = counts.get(key, 0) + int(count)
        if labels is not None:
            kept = [canonical(label) for label in labels]
        else:
            kept = sorted(label for label, count in counts.items() if count >= min_count)
            kept.sort(key=counts.__getitem__, reverse=True)
            del kept[max_labels:]
        filled: set[int] = set()
        if hash_buckets:
            filled = {hashed(str(label), hash_buckets) for label in counts.keys() - set(kept)}
        return cls(kept, [counts.get(label, 0) for label in kept], hash_buckets, filled)

    @property
    def rows(self) -> int:
        return FIRST + len(self.labels) + self.hash_buckets

    @property
    def filled(self) -> list[int]:
        """The buckets that a training label fell into."""
        return [bucket for bucket, full in enumerate(self._filled) if full]

    def row(self, label: Label) -> int:
        """The label's row: OOV if training knew neither it nor its bucket, MISSING for a string of white space."""
        row = self._rows.get(label)
        return self._row_of_unknown(label) if row is None else row

    def rows_of(self, labels: Sequence[Label | None]) -> Ints:
        """(len(labels),) the rows of labels of the column's own type, MISSING for None."""
        row_of: Any = self._rows.get
        rows = np.fromiter(map(row_of, labels, repeat(-1)), np.int64, len(labels))
        if len(unknown := np.flatnonzero(rows < 0)):
            rows[unknown] = [self._row_of_unknown(labels[i]) for i in unknown.tolist()]
        return rows

    def rows_of_arrow(self, labels: pa.Array) -> Ints:
        """The same of labels that come as an Arrow array of the column's type. Raises UnicodeDecodeError for text that
        is not UTF-8."""
        text = pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type)
        if not text or self.hash_buckets or len(self.labels) > min(LARGEST, SEARCHED * len(labels)):
            coded = labels.dictionary_encode()
            each = np.append(self.rows_of(coded.dictionary.to_pylist()), MISSING)
            taken: Ints = each[coded.indices.fill_null(len(each) - 1).to_numpy()]
            return taken
        rows: Ints = (
            pc.index_in(labels.cast(pa.large_string()), self._by_row).fill_null(OOV).to_numpy().astype(np.int64)
        )
        unknown = np.flatnonzero(rows == OOV)
        if len(unknown):
            as_sent = labels.take(pa.array(unknown))
            odd = ~pc.match_substring_regex(as_sent, PLAIN).to_numpy(zero_copy_only=False)
            if odd.any():
                rows[unknown[odd]] = [self._row_of_unknown(text) for text in as_sent.filter(pa.array(odd)).to_pylist()]
        return rows

    @cached_property
    def _by_row(self) -> pa.Array:
        """The label of each row: the empty one, which is none, in the place of those that are unknown."""
        return pa.array(["", None, *self.labels], pa.large_string())

    def distinct_rows(self, labels: Collection[Label | None]) -> set[int]:
        """Those that `rows_of` gives, of a few labels: without numpy, whose calls take longer than so little work."""
        row_of: Any = self._rows.get
        rows = set(map(row_of, labels))
        if None in rows:
            rows.remove(None)
            rows.update(self._row_of_unknown(label) for label in labels if row_of(label) is None)
        return rows

    def _row_of_unknown(self, label: Label | None) -> int:
        """Of what is no label of the vocabulary as it stands; written in its canonical form it may be one."""
        key = canonical(label)
        if key is None:
            return MISSING
        if key is not label and (row := self._rows.get(key)) is not None:
            return row
        if self.hash_buckets and self._filled[bucket := hashed(str(key), self.hash_buckets)]:
            return self._first_bucket + bucket
        return OOV
