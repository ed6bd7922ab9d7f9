from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from itemvec.values import canonical, hashed, unix_seconds


@given(st.text())
def test_canonical_labels_are_canonical(text):
    once = canonical(text)
    assert once is None or canonical(once) == once


def test_an_accent_may_be_written_in_two_ways():
    assert canonical("Ame\u0301lie") == canonical("Am\u00e9lie ")


def test_thirty_marks_on_a_letter_are_put_in_order_and_more_are_left_as_they_are():
    below, above = "\u0323", "\u0301"
    assert canonical("x" + (above + below) * 15) == "x" + below * 15 + above * 15
    assert canonical("x" + (above + below) * 30_000) == "x" + (above + below) * 30_000


@given(st.text(), st.integers(1, 2**24))
def test_every_text_has_a_bucket(text, buckets):
    assert 0 <= hashed(text, buckets) < buckets


def test_texts_spread_evenly_over_buckets():
    counts = [0] * 64
    for i in range(64 * 100):
        counts[hashed(f"actor {i}", 64)] += 1
    assert sum((n - 100) ** 2 / 100 for n in counts) < 104  # chi-square of 63 degrees: below 104 in 999 of 1,000


def test_one_moment_in_many_forms():
    day = 86_400.0  # 1970-01-02 00:00 UTC
    in_paris = datetime(1970, 1, 2, 1, tzinfo=timezone(timedelta(hours=1)))
    forms = [
        "1970-01-02",
        "1970-01-02T00:00:00Z",
        "1970-01-02 01:00+01:00",
        date(1970, 1, 2),
        datetime(1970, 1, 2, tzinfo=UTC),
        in_paris,
    ]
    assert {unix_seconds(form) for form in [*forms, datetime(1970, 1, 2), day]} == {day}


def test_text_that_is_no_time_is_refused_and_empty_text_is_none():
    assert unix_seconds(" ") is None
    with pytest.raises(ValueError, match="yesterday"):
        unix_seconds("yesterday")
