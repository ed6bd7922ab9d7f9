import math
import time

import numpy as np
import pyarrow as pa
import pytest
from fitting import dense, fitted, status, table
from hypothesis import given
from hypothesis import strategies as st

from itemvec.errors import InvalidItem
from itemvec.schema import Series

SALES = [[1.0, 2.0, 3.0, 4.0], [4.0, 2.0], [], None, [0.0, 8.0, None, 2.0]]


def figures(numbers, points=2, **settings):
    """What a series is summed up in, not standardised."""
    from itemvec.lists import SeriesColumn

    feature = Series(name="x", points=points, **settings)
    bare = SeriesColumn(feature, -1e9, 1e9, [0.0] * (points + 5), [1.0] * (points + 5))
    return bare._figures(np.array(numbers, float)).tolist()


# --- series ---


def test_the_course_of_a_series_is_the_means_of_equal_parts():
    assert figures([1, 2, 3, 4])[:2] == [1.5, 3.5]
    assert figures([1, 2, 3, 4], points=4)[:4] == [1, 2, 3, 4]
    # Three numbers in two parts: the second belongs to both, by half. (1 + 2/2) / 1.5 and (2/2 + 3) / 1.5
    assert figures([1, 2, 3])[:2] == pytest.approx([2 / 1.5, 4 / 1.5])
    assert figures([5], points=3)[:3] == pytest.approx([5, 5, 5])


def test_behind_its_course_come_newest_mean_deviation_slope_and_length():
    # 1, 2, 3, 4: mean 2.5, variance (2.25 + 0.25) / 2 = 1.25; from one end to the other it rises by 3.
    assert figures([1, 2, 3, 4])[2:] == pytest.approx([4, 2.5, math.sqrt(1.25), 3, math.log(4)])
    assert figures([7])[2:] == pytest.approx([7, 7, 0, 0, 0])


def test_gaps_are_bridged_in_the_course_and_left_out_elsewhere():
    nan = math.nan
    assert figures([1, nan, 3, 4], points=4)[:4] == [1, 2, 3, 4]
    assert figures([nan, 2, 4, nan], points=4)[:4] == [2, 2, 4, 4]
    newest, mean, deviation, slope, length = figures([nan, 2, 4, nan])[2:]
    assert (newest, mean, deviation) == (4, 3, 1)
    assert slope == pytest.approx(6) and length == pytest.approx(math.log(4))  # 2 a step, and three steps


def test_a_series_on_a_log_scale_is_the_series_of_its_logarithms():
    assert figures([0, 9, 99], scale="log") == pytest.approx(figures(np.log1p([0, 9, 99])))


def test_each_figure_has_mean_0_and_variance_1_over_the_training_rows():
    numbers = fitted("kind: series, points: 3", SALES).transform_table(table(SALES)).dense
    present = numbers[numbers[:, -1] == 0]
    assert len(present) == 3
    np.testing.assert_allclose(present[:, :-1].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(present[:, :-1].std(0), 1, atol=1e-6)


def test_a_series_without_a_number_is_missing():
    sales = fitted("kind: series", SALES)
    for nothing in (None, [], [None, None], [float("nan")]):
        assert dense(sales, nothing) == [0.0] * 13 + [1.0] and status(sales, nothing) == "missing"


def test_numbers_beyond_those_of_the_training_rows_are_clipped_and_reported():
    sales = fitted("kind: series", SALES)
    assert dense(sales, [1, 1e300]) == dense(sales, [1, 8]) and dense(sales, [float("-inf")]) == dense(sales, [0])
    assert [status(sales, s) for s in ([1, 9], [1, 8], [None, 8])] == ["clipped", None, None]


def test_of_a_long_series_the_newest_numbers_are_read():
    sales = fitted("kind: series, max_length: 4", [*SALES, [9.0, 9.0, 1.0, 2.0, 3.0, 4.0]])
    assert dense(sales, [9, 9, 1, 2, 3, 4]) == dense(sales, [1, 2, 3, 4])
    assert dense(sales, ["never read", 1, 2, 3, 4]) == dense(sales, [1, 2, 3, 4])


def test_a_series_of_ten_thousand_takes_milliseconds():
    sales = fitted("kind: series", SALES)
    long = [float(i % 8) for i in range(10_000)]
    began = time.thread_time()
    assert np.isfinite(dense(sales, long)).all()
    assert time.thread_time() - began < 0.5  # 1 ms on a quiet machine
    assert dense(sales, long * 3) == dense(sales, long)  # 10,000 is a multiple of 8


@pytest.mark.parametrize(
    ("wrong", "pointer", "said"),
    [
        (7, "/0/x", "expected a list of numbers, got the number 7"),
        ("1, 2", "/0/x", "expected a list of numbers, got the string '1, 2'"),
        ([1, "2", "3"], "/0/x/1", "expected a number, got the string '2'"),
        ([1, None, True], "/0/x/2", "expected a number, got the boolean True"),
        ([[1, 2]], "/0/x/0", "expected a number, got a list of 2"),
        ([1, 10**400], "/0/x/1", "expected a number, got a whole number of 1329 bits"),
    ],
)
def test_what_is_no_series_is_refused_with_its_place(wrong, pointer, said):
    with pytest.raises(InvalidItem) as caught:
        dense(fitted("kind: series", SALES), wrong)
    [error] = caught.value.errors
    assert error.pointer == pointer and said in error.detail


def test_a_wrong_number_of_a_long_series_has_its_place_in_the_whole():
    with pytest.raises(InvalidItem) as caught:
        dense(fitted("kind: series, max_length: 3", SALES), [1, 2, 3, 4, "5"])
    assert caught.value.errors[0].pointer == "/0/x/4"


def test_a_series_is_decoded_to_its_course_in_its_own_unit():
    for scale in ("standard", "log"):
        transform = fitted(f"kind: series, points: 2, scale: {scale}", [[1.0, 2.0, 3.0, 4.0], [2.0, 8.0]])
        read = np.array(dense(transform, [2, 2, 6, 6])[:-1])
        assert transform.column("x").decode(read) == pytest.approx([2, 6], rel=1e-4)
        assert transform.column("x").decode(read + 1e9) == [8, 8]


numbers = st.none() | st.floats() | st.integers(-(10**300), 10**300)


@given(st.lists(numbers, max_size=40))
def test_every_series_becomes_as_many_finite_floats(series):
    floats = dense(fitted("kind: series, points: 5", SALES), series)
    assert len(floats) == 5 + 5 + 1 and np.isfinite(floats).all()


# --- vector ---


def test_vectors_keep_their_angles_on_the_scale_that_they_have_in_common():
    # Means 2 and 20; variances 4 / 2 and 400 / 2 of (0, 0), (4, 40) are 4 and 400, on average 202.
    vectors = fitted("kind: vector, size: 2", [[0.0, 0.0], [4.0, 40.0]])
    assert dense(vectors, [4, 40]) == pytest.approx([2 / math.sqrt(202), 20 / math.sqrt(202), 0])
    assert dense(vectors, None) == [0, 0, 1] and status(vectors, None) == "missing"


def test_a_number_beyond_those_of_the_training_rows_is_clipped():
    vectors = fitted("kind: vector, size: 2", [[0.0, 0.0], [4.0, 40.0]])
    assert dense(vectors, [1e300, 3]) == dense(vectors, [40, 3]) and status(vectors, [41, 3]) == "clipped"
    assert status(vectors, [40, 3]) is None


@pytest.mark.parametrize(
    ("wrong", "pointer", "said"),
    [
        ([1.0], "/0/x", "expected a list of 2 numbers, got a list of 1"),
        ([], "/0/x", "expected a list of 2 numbers, got a list of 0"),
        ("ab", "/0/x", "got the string 'ab'"),
        ({"0": 1, "1": 2}, "/0/x", "got an object of 2"),
        ([1.0, "2"], "/0/x/1", "expected a number, got the string '2'"),
        ([True, 1.0], "/0/x/0", "got the boolean True"),
        ([1.0, None], "/0/x/1", "expected a finite number, got null"),
        ([float("nan"), 1.0], "/0/x/0", "expected a finite number"),
        ([1.0, float("inf")], "/0/x/1", "expected a finite number"),
    ],
)
def test_what_is_no_vector_of_the_size_is_refused_with_its_place(wrong, pointer, said):
    with pytest.raises(InvalidItem) as caught:
        dense(fitted("kind: vector, size: 2", [[0.0, 0.0], [4.0, 40.0]]), wrong)
    [error] = caught.value.errors
    assert error.pointer == pointer and said in error.detail


def test_a_vector_is_decoded_to_its_own_unit():
    transform = fitted("kind: vector, size: 2", [[0.0, 0.0], [4.0, 40.0]])
    assert transform.column("x").decode(np.array(dense(transform, [3, 30])[:-1])) == pytest.approx([3, 30], rel=1e-5)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float32(), 3)])
def test_arrow_lists_of_every_type_are_read_alike_and_like_items(kind):
    rows = [[0.5, 1.5, 2.5], None, [1.0, 0.0, 4.0]]
    column = pa.array(rows, kind)
    # A slice begins within its buffer, and a table may be in chunks.
    chunked = pa.chunked_array([pa.array([[9.0] * 3, *rows[:1]], kind).slice(1), pa.array(rows[1:], kind)])
    for settings in ("kind: vector, size: 3", "kind: series, points: 2"):
        transform = fitted(settings, column)
        items = transform.transform([{} if row is None else {"x": row} for row in rows]).batch.dense
        np.testing.assert_array_equal(transform.transform_table(table(column)).dense, items)
        np.testing.assert_array_equal(transform.transform_table(table(chunked)).dense, items)
        assert fitted(settings, chunked).digest() == transform.digest()


def test_a_null_inside_a_vector_of_a_table_is_refused_with_its_row():
    transform = fitted("kind: vector, size: 2", [[0.0, 0.0], [4.0, 40.0]])
    with pytest.raises(InvalidItem, match="/1/x/1"):
        transform.transform_arrow(table(pa.array([[0.0, 1.0], [0.0, None]])))


def test_arrays_are_lists_too():
    vectors = fitted("kind: vector, size: 2", [[0.0, 0.0], [4.0, 40.0]])
    assert dense(vectors, np.array([3, 4], np.float32)) == dense(vectors, [3, 4]) == dense(vectors, (3, 4))
    for wrong in (np.zeros((1, 2)), np.array(["a", "b"])):
        with pytest.raises(InvalidItem):
            dense(vectors, wrong)


def test_scales_are_fitted_on_rows_evenly_spaced_over_the_table(monkeypatch):
    monkeypatch.setattr("itemvec.lists.FITTED", 2)
    rows = [[float(i)] for i in range(4)]
    transform = fitted("kind: vector, size: 1", rows)  # of rows 0 and 2 the mean is 1, the deviation 1
    assert dense(transform, [3.0]) == [2.0, 0.0]


def test_series_are_fitted_on_those_that_hold_a_number_however_few(monkeypatch):
    monkeypatch.setattr("itemvec.lists.FITTED", 2)
    few = fitted("kind: series, points: 1", [*[[]] * 8, [1.0], [3.0]])
    assert dense(few, [1.0])[0] == -1 and dense(few, [3.0])[0] == 1
    hidden = fitted("kind: series, points: 1, max_length: 1", [[5.0, None], [None]])  # nothing but a gap is read
    assert np.isfinite(dense(hidden, [5.0])).all()
