import datetime
import json
import math
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from fitting import dense, fitted, status, table
from hypothesis import given
from hypothesis import strategies as st

from itemvec.errors import InvalidItem
from itemvec.features import FeatureTransform
from itemvec.schema import FeatureSchema

YEARS = [1990.0, 2000.0, 2010.0, None]
DAYS = ["2000-01-01", "2001-01-01", "2002-01-01T00:00:00", None]


# --- numeric ---


def test_numbers_have_mean_0_and_variance_1_over_the_training_rows():
    # mean 2000, variance (100 + 0 + 100) / 3
    year = fitted("kind: numeric, bins: 0", YEARS)
    assert dense(year, 2010) == pytest.approx([10 / math.sqrt(200 / 3), 0])
    assert dense(year, None) == [0, 1] and status(year, float("nan")) == "missing"


def test_log_scale_counts_orders_of_magnitude():
    # log1p of 0, 9, 99 is 0, ln 10, 2 ln 10: evenly spaced, so 9 is the mean
    assert dense(fitted("kind: numeric, scale: log, bins: 0", [0.0, 9.0, 99.0, None]), 9) == pytest.approx(
        [0, 0], abs=1e-6
    )


def test_quantile_scale_knows_only_the_rank():
    votes = fitted("kind: numeric, scale: quantile", [1, 2, 3, 1000])
    a, b, c, d = (dense(votes, v)[0] for v in (1, 2, 3, 1000))
    assert b - a == pytest.approx(c - b, abs=0.02) == pytest.approx(d - c, abs=0.02)


def test_a_number_beyond_the_training_range_is_clipped_and_reported():
    year = fitted("kind: numeric", YEARS)
    assert dense(year, 2050) == dense(year, 2010) and dense(year, float("-inf")) == dense(year, 1990)
    assert status(year, 2050) == "clipped" and status(year, 2010) is None


def test_a_share_of_the_training_values_may_be_clipped_too():
    # Of 0 to 100, the tenth part at each end lies beyond 10 and 90.
    column = fitted("kind: numeric, clip: 0.1", list(range(101)))
    assert dense(column, 90) == dense(column, 100) and status(column, 100) == "clipped"
    assert dense(column, 89) != dense(column, 90) and status(column, 90) is None
    numbers = [min(max(n, 10), 90) for n in range(101)]
    assert dense(column, 90)[0] == pytest.approx((90 - 50) / np.std(numbers))


@pytest.mark.parametrize("bins", [0, 4])
@pytest.mark.parametrize("scale", ["standard", "log", "quantile"])
@given(value=st.none() | st.floats(-1, 12, width=32) | st.integers(-1, 12))
def test_a_number_alone_becomes_what_it_becomes_among_others_to_the_bit(scale, bins, value):
    column = fitted(f"kind: numeric, scale: {scale}, bins: {bins}", [0.0, 1.0, 2.5, 2.5, 4.0, 7.0, 10.0, None])
    name = column.schema.features[0].name
    [alone], [among, _] = (column.transform([{name: v} for v in vs]).batch.dense for vs in ([value], [value, 3.0]))
    assert alone.tolist() == among.tolist()


@pytest.mark.parametrize("value", [1e308, -1e308, float("inf"), 10**400 // 10**100, 0, Decimal("1e300")])
@pytest.mark.parametrize("scale", ["standard", "log", "quantile"])
def test_any_number_is_encoded_finitely(value, scale):
    assert np.isfinite(dense(fitted(f"kind: numeric, scale: {scale}", [0.0, 9.0, 99.0]), value)).all()


def test_piecewise_has_a_float_for_each_bin_that_rises_from_0_to_1_within_it():
    # Quarters of 0, 1, 2, 4, 8 end at 1, 2, 4 and 8.
    column = fitted("kind: numeric, bins: 4", [0, 1, 2, 4, 8])
    assert dense(column, 0)[1:-1] == [0, 0, 0, 0]
    assert dense(column, 3)[1:-1] == [1, 1, 0.5, 0]
    assert dense(column, 6)[1:-1] == [1, 1, 1, 0.5]
    assert dense(column, 8)[1:-1] == [1, 1, 1, 1]
    assert dense(column, 3)[0] == pytest.approx(0)  # and first the value itself: 3 is the mean
    assert dense(column, None) == [0, 0, 0, 0, 0, 1]


def test_of_a_piecewise_number_the_decoder_reads_back_the_value_alone():
    [slot] = fitted("kind: numeric, bins: 4", [0, 1, 2, 4, 8]).layout.dense
    assert (slot.width, slot.targets, slot.flag) == (6, 1, 5)


def test_values_that_many_rows_share_make_fewer_bins():
    column = fitted("kind: numeric, bins: 4", [0, 0, 0, 0, 8])
    assert dense(column, 8)[1:-1] == [1]
    assert dense(fitted("kind: numeric", [7, 7]), 7) == [0, 0]


@given(st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=30), st.floats(-2e9, 2e9), st.floats(0, 1e9))
def test_piecewise_floats_lie_between_0_and_1_and_rise_with_the_value(numbers, value, more):
    column = fitted("kind: numeric, bins: 5", numbers)
    one, other = (np.array(dense(column, v)) for v in (value, value + more))
    assert (one[1:-1] >= 0).all() and (one[1:-1] <= 1).all()
    assert (one <= other).all()


@pytest.mark.parametrize("scale", ["standard", "log", "quantile"])
def test_a_number_is_decoded_to_its_own_unit_and_never_beyond_the_training_range(scale):
    transform = fitted(f"kind: numeric, scale: {scale}", [0.0, 1.0, 5.0, 20.0, 100.0])
    column, [slot] = transform.column("x"), transform.layout.dense
    for value in (0.0, 5.0, 60.0, 100.0):
        read = np.array(dense(transform, value)[: slot.targets])
        assert column.decode(read) == pytest.approx(value, rel=1e-4, abs=1e-4)
    assert column.decode(np.array([1e9])) == 100.0 and column.decode(np.array([-1e9])) == 0.0


# --- timestamp ---


def test_age_counts_from_the_newest_training_row_and_cycles_come_round():
    shown = fitted("kind: timestamp, cycles: [year]", DAYS)
    newest, oldest = dense(shown, "2002-01-01"), dense(shown, "2000-01-01")
    assert newest[0] < oldest[0]
    # 2000 was a leap year: 366 days are a whole turn of 365.2425 and 0.7575 days more
    assert newest[1:3] == pytest.approx(dense(shown, "2001-01-01")[1:3], abs=0.03)
    assert dense(shown, None) == [0, 0, 0, 1]


def test_the_reference_time_is_saved_with_the_model(tmp_path):
    shown = fitted("kind: timestamp", DAYS)
    shown.save(tmp_path)
    state = json.loads((tmp_path / "transform.json").read_text())["columns"]["x"]
    assert state["high"] == 1_009_843_200  # 2002-01-01 00:00 UTC
    assert dense(FeatureTransform.load(tmp_path, shown.schema), "2001-06-01") == dense(shown, "2001-06-01")


def test_one_moment_in_any_zone_or_form_is_one_moment():
    shown = fitted("kind: timestamp, cycles: [day]", DAYS)
    forms = [
        "2001-01-01T00:00:00Z", "2001-01-01", "2000-12-31T19:00:00-05:00", "2001-01-01T05:30:00+05:30", 978_307_200,
        datetime.date(2001, 1, 1), datetime.datetime(2001, 1, 1), datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC),
    ]  # fmt: skip
    assert len({tuple(dense(shown, form)) for form in forms}) == 1


def test_a_turn_of_the_day_ends_where_it_began():
    # A quarter of a day is a quarter of a turn: sin 1, cos 0.
    shown = fitted("kind: timestamp, cycles: [day]", ["2000-01-01", "2000-01-03"])
    assert dense(shown, "2000-01-02T06:00:00")[1:3] == pytest.approx([1, 0], abs=1e-6)
    assert dense(shown, "2000-01-02T00:00:00")[1:3] == dense(shown, "2000-01-03")[1:3] == pytest.approx([0, 1])


def test_times_before_1970_are_times_like_others():
    shown = fitted("kind: timestamp, cycles: []", ["1900-01-01", "1930-01-01", "1960-01-01"])
    old, middle, new = (dense(shown, day)[0] for day in ("1900-01-01", "1930-01-01", "1960-01-01"))
    assert new < middle < old and status(shown, "1930-01-01") is None
    assert status(shown, -1e9) is None  # 1938


@pytest.mark.parametrize("far", ["9999-12-31T23:59:59+00:00", "0001-01-01", 1e300, float("-inf"), 10**30])
def test_a_moment_beyond_the_training_range_is_clipped_and_reported(far):
    shown = fitted("kind: timestamp, cycles: [year, week, day]", DAYS)
    assert status(shown, far) == "clipped"
    assert dense(shown, far) in (dense(shown, "2000-01-01"), dense(shown, "2002-01-01"))


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Kolkata"])
def test_arrow_times_of_every_unit_are_the_moments_that_they_say(unit, zone):
    utc = [datetime.datetime(y, 7, 1, 12, tzinfo=datetime.UTC) for y in (1931, 2000, 2001)]
    moments = [None, *(t if zone else t.replace(tzinfo=None) for t in utc)]
    column = pa.array(moments, pa.timestamp(unit, zone))
    text = [None, *(t.isoformat() for t in utc)]
    one, other = fitted("kind: timestamp", column), fitted("kind: timestamp", text)
    assert one.digest() == other.digest()
    np.testing.assert_array_equal(one.transform_table(table(column)).dense, other.transform_table(table(text)).dense)


def test_nanoseconds_are_cut_to_the_microseconds_that_json_has():
    column = pa.array([1_000_000_001_999, 5_000_000_000_000], pa.timestamp("ns"))
    transform = fitted("kind: timestamp", column)
    assert transform.column("x").low == 1000.000001


def test_arrow_dates_are_midnight():
    days = [datetime.date(1969, 12, 31), datetime.date(2001, 1, 1)]
    for kind in (pa.date32(), pa.date64()):
        assert fitted("kind: timestamp", pa.array(days, kind)).column("x").low == -86_400


def test_a_time_that_is_nan_is_missing():
    transform = fitted("kind: timestamp", [0.0, float("nan"), 86_400.0])
    assert dense(transform, float("nan"))[-1] == 1 and dense(transform, 0.0)[0] != 0


def test_a_time_is_decoded_to_iso_8601_and_never_beyond_the_training_range():
    transform = fitted("kind: timestamp", DAYS)
    column = transform.column("x")
    assert column.decode(np.array(dense(transform, "2000-01-01")[:-1])) == "2000-01-01T00:00:00+00:00"
    assert column.decode(np.array([-1e9, 0, 0, 0, 0])) == "2002-01-01T00:00:00+00:00"
    milliseconds = fitted("kind: timestamp", [1e15, 2e15]).column("x")  # no such year, and still an answer
    assert milliseconds.decode(np.array([-1e9, 0, 0, 0, 0])) == 2e15


@pytest.mark.parametrize(
    ("settings", "column", "wrong"),
    [
        ("kind: numeric", YEARS, ["long", True, [1], {}, 10**400]),
        ("kind: timestamp", DAYS, ["soon", True, ["2001-01-01"], {}, 10**400]),
    ],
)
def test_what_is_no_number_or_time_is_refused(settings, column, wrong):
    transform = fitted(settings, column)
    for value in wrong:
        with pytest.raises(InvalidItem) as caught:
            dense(transform, value)
        assert [e.pointer for e in caught.value.errors] == ["/0/x"]


def test_a_schema_of_numbers_alone_makes_no_bags():
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {x: {kind: numeric}}")
    batch = FeatureTransform.fit(table(YEARS), schema).transform([{"x": 1990}, {}]).batch
    assert batch.lengths.shape == (2, 0) and len(batch.indices) == 0
