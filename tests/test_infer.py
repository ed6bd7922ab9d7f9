import datetime

import pyarrow as pa
import pytest

from itemvec.errors import TableError
from itemvec.infer import infer_schema
from itemvec.schema import FeatureSchema

N = 40
IDS = [f"t{i}" for i in range(N)]


def kind_of(column):
    """What is inferred of one column beside an id and a numeric one."""
    inferred = infer_schema(pa.table({"id": IDS, "n": list(range(N)), "x": column}), "t")
    return next(choice for choice in inferred.choices if choice.column == "x")


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        (["a", "b"] * 20, "nominal"),
        ([True, False] * 20, "nominal"),
        ([["a", "b"], ["b"]] * 20, "multi"),
        (["Drama, War", "Drama"] * 20, "multi"),
        (pa.array(["a", "b"] * 20, pa.string_view()), "nominal"),
        (pa.array([["a", "b"], ["b"]] * 20, pa.list_(pa.string_view())), "multi"),
        (["a|b", "b|c", "c"] * 13 + ["a"], "multi"),
        ([float(i % 7) for i in range(N)], "numeric"),
        ([datetime.date(2000, 1, 1 + i % 28) for i in range(N)], "timestamp"),
        ([f"2000-01-{1 + i % 28:02d}" for i in range(N)], "timestamp"),
        ([f"the story of number {i} and its friend, told well" for i in range(N)], "text"),
    ],
)
def test_the_kind_is_read_off_the_values(column, kind):
    choice = kind_of(column)
    assert choice.feature is not None and choice.feature.kind == kind
    assert choice.reason


def test_a_separator_is_found():
    assert kind_of(["Drama, War", "Drama"] * 20).feature.separator == ", "


def test_an_amount_over_orders_of_magnitude_is_logarithmic():
    assert kind_of([float(10 ** (i % 6)) for i in range(N)]).feature.scale == "log"


def test_what_is_not_a_number_is_missing():
    choice = kind_of([float("nan") if i % 4 == 0 else float(10 ** (i % 6)) for i in range(N)])
    assert choice.feature.scale == "log" and choice.reason.startswith("1 to 100000, 6 different, 25 % missing")
    assert kind_of([float("nan")] * N).reason == "every value is missing"


@pytest.mark.parametrize(
    ("column", "kind", "why"),
    [
        (
            [[float(i + j) for j in range(16)] for i in range(N)],
            "vector",
            "lists of 16 numbers each: a ready embedding",
        ),
        (pa.array([[0.5, i] for i in range(N)], pa.list_(pa.float32(), 2)), "vector", "lists of 2 numbers each"),
        ([[float(i + j) for j in range(12)] for i in range(N)], "series", "lists of 12 numbers each"),
        ([[1.5] * (1 + i % 5) for i in range(N)], "series", "lists of 1 to 5 numbers"),
        ([[3, 3, i % 7] for i in range(N)], "series", "lists of 3 numbers each"),
        ([[i, 100 + i * i] for i in range(N)], "series", "lists of 2 numbers each"),
        ([[i % 7, 7 + i % 5] for i in range(N)], "multi", "2.0 labels each, 12 different"),
        ([[float(i)] * 15 + [None] for i in range(N)], "series", "lists of 16 numbers each"),
    ],
)
def test_lists_of_numbers_are_series_or_vectors_and_sets_where_whole_numbers_are_shared(column, kind, why):
    choice = kind_of(column)
    assert choice.feature.kind == kind and why in choice.reason
    if kind == "vector":
        assert choice.feature.size == len(column[0])


def test_a_series_over_orders_of_magnitude_is_logarithmic():
    assert kind_of([[10.0 ** (i % 6)] for i in range(N)]).feature.scale == "log"


def test_whole_numbers_named_like_a_code_are_labels():
    table = pa.table({"id": IDS, "shop_id": [i % 4 for i in range(N)]})
    [choice] = infer_schema(table, "t").choices
    assert (choice.feature.kind, choice.feature.dtype) == ("nominal", "integer")


@pytest.mark.parametrize(
    ("column", "why"),
    [
        ([None] * N, "every value is missing"),
        (["same"] * N, "one value only"),
        ([f"https://e.x/{i}" for i in range(N)], "nothing two items share"),
        ([[], [None]] * 20, "every list is empty"),
        ([[0.5, float("inf")]] * N, "some numbers are infinite"),
        ([[b"x"]] * N, "a list of binary is not read"),
        ([b"x", b"y"] * 20, "no kind reads binary"),
        ([{"a": 1}, {"a": 2}] * 20, "no kind reads struct"),
        ([1.0, float("inf")] * 20, "infinite"),
    ],
)
def test_what_cannot_be_learned_from_is_left_out_with_the_reason(column, why):
    choice = kind_of(column)
    assert choice.feature is None and why in choice.reason


def test_the_written_file_is_the_schema_with_a_reason_on_each_line():
    inferred = infer_schema(pa.table({"key": IDS, "genre": ["a", "b"] * 20, "url": [f"u{i}" for i in range(N)]}), "t")
    text = inferred.to_yaml()
    assert FeatureSchema.from_yaml(text) == inferred.schema
    assert "genre: {kind: nominal}  # 2 different labels on 40 rows" in text
    assert "#   url: " in text


def test_the_id_is_the_column_named_so_or_the_first_that_can_be_one():
    assert (
        infer_schema(pa.table({"n": list(range(N)), "item_id": IDS, "x": ["a", "b"] * 20}), "t").schema.id == "item_id"
    )
    assert infer_schema(pa.table({"x": ["a", "b"] * 20, "isbn": IDS}), "t").schema.id == "isbn"
    with pytest.raises(TableError, match="--id"):
        infer_schema(pa.table({"x": ["a", "b"] * 20}), "t")
    with pytest.raises(TableError, match="no column 'key'"):
        infer_schema(pa.table({"x": ["a", "b"] * 20}), "t", id_column="key")


def test_names_that_yaml_would_read_otherwise_are_quoted():
    inferred = infer_schema(pa.table({"#id": IDS, "a: b": ["a", "b"] * 20, "new\nline": ["same"] * N}), "2024")
    assert FeatureSchema.from_yaml(inferred.to_yaml()) == inferred.schema


def test_a_name_that_cannot_be_a_models_is_refused():
    with pytest.raises(TableError, match="--name"):
        infer_schema(pa.table({"id": IDS, "x": ["a", "b"] * 20}), "Bad Name")


def test_a_table_without_rows_says_so():
    with pytest.raises(TableError, match="no rows"):
        infer_schema(pa.table({"id": pa.array([], pa.string())}), "t")


def test_a_table_with_nothing_to_learn_is_refused():
    with pytest.raises(TableError, match="no column can be learned from"):
        infer_schema(pa.table({"id": IDS, "x": ["same"] * N}), "t")


def test_a_column_that_would_hide_the_id_over_http_is_left_out_with_the_way_out():
    table = pa.table({"sku": IDS, "id": ["a", "b"] * 20, "n": list(range(N))})
    inferred = infer_schema(table, "t", id_column="sku")
    assert [feature.name for feature in inferred.schema.features] == ["n"]
    assert "#   id: over HTTP every item has its id under this name: rename the column" in inferred.to_yaml()
