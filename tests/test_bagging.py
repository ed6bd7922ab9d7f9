"""Many items at once become the very numbers that they become one by one."""

import tracemalloc

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from itemvec.features import FEW, FeatureTransform
from itemvec.schema import FeatureSchema

SCHEMA = FeatureSchema.from_yaml("""
name: films
id: id
features:
  color: {kind: nominal, min_count: 1}
  genres: {kind: multi, min_count: 1}
  cast: {kind: multi, min_count: 2, hash_buckets: 3}
  rated: {kind: ordinal, order: [G, PG, R]}
  title: {kind: text, buckets: 16}
""")
TABLE = pa.table(
    {
        "id": ["1", "2", "3"],
        "color": ["red", "blue", None],
        "genres": [["Drama", "War"], ["Drama"], ["Comedy"]],
        "cast": [["Ann", "Bob"], ["Ann"], ["Eve"]],
        "rated": ["G", "PG", "R"],
        "title": ["One", "Two words", "One more"],
    }
)
TRANSFORM = FeatureTransform.fit(TABLE, SCHEMA)
FIELDS = ("dense", "indices", "weights", "lengths")

labels = st.sampled_from(["Drama", "War", "Ann", "Bob", "Eve", "unseen", " ", "é"])
sets = st.none() | st.lists(st.none() | labels, max_size=6)
item = st.fixed_dictionaries(
    {},
    optional={
        "color": st.none() | st.sampled_from(["red", "blue", "green", " red"]),
        "genres": sets,
        "cast": sets,
        "rated": st.none() | st.sampled_from(["G", "R", "X"]),
        "title": st.none() | st.sampled_from(["", "One", "two WORDS, and more"]),
        "runtime": st.just(90),
    },
)


def assert_as_one_by_one(items):
    many = TRANSFORM.transform(items)
    alone = [TRANSFORM.transform([item]) for item in items]
    for field in FIELDS:
        parts = [getattr(one.batch, field) for one in alone]
        np.testing.assert_array_equal(getattr(many.batch, field), np.concatenate(parts))
    assert many.statuses == [one.statuses[0] for one in alone]


@given(st.lists(item, min_size=FEW, max_size=FEW + 8))
def test_many_items_become_what_each_of_them_becomes_alone(items):
    assert_as_one_by_one(items)


def test_a_set_of_thousands_among_small_ones_takes_no_room_for_the_others():
    small = {"genres": ["War", "Drama", "War"], "cast": ["Eve"]}
    large = {"genres": ["War", *(f"unseen {i}" for i in range(5000))], "cast": [f"{i}" for i in range(700)]}
    items = [small] * 1500 + [large] + [small] * 1000 + [large]
    assert_as_one_by_one(items)
    tracemalloc.start()
    TRANSFORM.transform(items)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < len(items) * 5000  # one byte of a line that has room for the largest set


def test_many_columns_that_are_mostly_empty_become_what_each_item_becomes_alone():
    names = [f"c{i}" for i in range(100)]
    kinds = "".join(f"  {name}: {{kind: multi, min_count: 1}}\n" for name in names)
    schema = FeatureSchema.from_yaml(f"name: wide\nid: id\nfeatures:\n{kinds}")
    wide = FeatureTransform.fit(pa.table({"id": ["1", "2"], **{name: [["a"], ["b"]] for name in names}}), schema)
    items = [{names[i]: ["b", "a", "b"]} for i in range(FEW)]
    alone = [wide.transform([item]).batch for item in items]
    for field in FIELDS:
        np.testing.assert_array_equal(
            getattr(wide.transform(items).batch, field), np.concatenate([getattr(one, field) for one in alone])
        )


def test_the_last_row_of_a_column_and_the_first_of_the_next_lie_side_by_side_and_stay_apart():
    # An unseen genre is the row behind the last color: the same number as an empty place of the colors.
    [color, genres, *_] = TRANSFORM.layout.bags
    assert genres.base == color.base + color.rows
    batch = TRANSFORM.transform([{"color": "red", "genres": ["unseen"]}] * FEW).batch
    assert batch.indices[:2].tolist() == [color.base + color.rows - 1, genres.base]
