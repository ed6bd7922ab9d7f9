from collections import Counter

import numpy as np
import pytest

from itemvec.notes import FEW, WORDS, Notes, Statuses


def notes(n: int) -> Notes:
    """Of n items with two columns: the first has a missing year and a column that nobody knows."""
    notes = Notes(n, ["color", "year"], "/input")
    notes.mark("year", "missing", 0)
    notes.mark_all("color", "oov", np.arange(n) == 2)
    notes.mark_all("year", "clipped", np.arange(n) == 2)
    notes.mark("runtime", "ignored", 0)
    notes.mark("runtime", "ignored", 1)
    return notes


DICTS = [{"year": "missing", "runtime": "ignored"}, {"runtime": "ignored"}, {"color": "oov", "year": "clipped"}]
few_or_many = pytest.mark.parametrize("more", [0, FEW])


@few_or_many
def test_what_is_noted_reads_as_a_dict_an_item(more):
    statuses, dicts = notes(3 + more).statuses, DICTS + [{}] * more
    assert statuses == dicts and [*statuses] == dicts and len(statuses) == 3 + more
    assert statuses[2] == DICTS[2] and statuses[:2] == DICTS[:2] and repr(statuses[:3]) == repr(DICTS)
    assert statuses != dicts[1:]


@few_or_many
def test_marks_are_the_same_item_by_item_without_the_dicts(more):
    def told(statuses):
        items, columns, codes, names = Statuses.of(statuses).marks
        return [*zip(items, (names[c] for c in columns), (WORDS[code - 1] for code in codes), strict=True)]

    expected = [(i, *mark) for i, item in enumerate(DICTS) for mark in item.items()]
    assert told(notes(3 + more).statuses) == told(DICTS) == expected
    assert told([{}] * more) == told(Notes(more, ["color"], "").statuses) == []


@few_or_many
def test_a_tally_counts_each_status_of_each_column(more):
    counted = Counter({("year", "missing"): 1, ("color", "oov"): 1, ("year", "clipped"): 1, ("runtime", "ignored"): 2})
    assert Statuses.of(notes(3 + more).statuses).tally() == Statuses.of(DICTS).tally() == counted


def test_columns_that_share_a_name_and_columns_that_nobody_knows_keep_their_own_places():
    notes = Notes(2, ["a", "x", "x", "b"], "")
    notes.put(["a", "b"], np.array([[1, 0], [0, 3]], np.int8))
    notes.mark("y", "ignored", 0)
    notes.mark("b", "ignored", 0)
    assert notes.statuses == [{"a": "oov", "y": "ignored", "b": "ignored"}, {"b": "missing"}]
    assert notes.statuses.tally() == {("a", "oov"): 1, ("y", "ignored"): 1, ("b", "ignored"): 1, ("b", "missing"): 1}
