import datetime

import numpy as np
import pyarrow as pa
import pytest

from itemvec import check
from itemvec.check import check_table, label_counts, of_kept, require_fit
from itemvec.errors import SchemaMismatch
from itemvec.schema import FeatureSchema, Multi, Nominal


def findings(column, kind, **more):
    settings = "".join(f", {key}: {value}" for key, value in more.items())
    schema = FeatureSchema.from_yaml(f"name: t\nid: id\nfeatures: {{x: {{kind: {kind}{settings}}}}}")
    table = pa.table({"id": [str(i) for i in range(len(column))], "x": column})
    return [(f.level, f.text) for f in check_table(table, schema) if f.column == "x"]


@pytest.mark.parametrize(
    ("column", "kind", "more", "said"),
    [
        (pa.array([1, 2]), "nominal", {}, "wants string labels, this column is int64"),
        (pa.array(["a", "b"]), "nominal", {"dtype": "integer"}, "wants integer labels"),
        (pa.array(["a", "b"]), "nominal", {}, "none of its 2 labels occurs 2 times"),
        (pa.array(["a|b", "a"]), "multi", {}, "or a string with its separator named"),
        (pa.array([[1.5], [2.5]]), "multi", {}, "wants a list of string labels"),
        (pa.array([[], []], pa.list_(pa.string())), "multi", {}, "every set is empty"),
        (pa.array(["x", "y"]), "ordinal", {"order": "[a, b]"}, "none of its labels stands in the order"),
        (pa.array(["1", "2"]), "numeric", {}, "wants numbers"),
        (pa.array([1.0, float("inf")]), "numeric", {}, "1 values are infinite"),
        (pa.array([1.0, 1e300, -1e300]), "numeric", {}, "2 values are infinite or beyond 1e+100"),
        (pa.array([float("nan")] * 2), "numeric", {}, "every value is missing"),
        (pa.array([-1.0, 1.0]), "numeric", {"scale": "log"}, "the smallest is -1"),
        (pa.array(["2001-01-01", "soon"]), "timestamp", {}, "1 values are not ISO 8601 times: 'soon'"),
        (pa.array([0.0, float("inf")]), "timestamp", {}, "1 values are infinite"),
        (pa.array([datetime.time(1), datetime.time(2)]), "timestamp", {}, "wants dates, times"),
        (pa.array([1, 2]), "text", {}, "wants text"),
        (pa.array(["", " "]), "text", {}, "every text is empty"),
        (pa.array([None, None], pa.string()), "text", {}, "every value is missing"),
        (pa.array(["a", "z"]), "nominal", {"labels": "[b, c]"}, "none of its labels stands in the labels 'b', 'c'"),
        (pa.array([["a"], ["z"]]), "multi", {"labels": "[b]"}, "it has 'a', 'z'"),
        (pa.array([1.0, 2.0]), "series", {}, "wants a list of numbers, this column is double"),
        (pa.array([["1"]]), "series", {}, "wants a list of numbers, this column is list"),
        (pa.array([[], []], pa.list_(pa.float64())), "series", {}, "every value is missing"),
        (pa.array([[1.0], [float("inf")]]), "series", {}, "1 values are infinite"),
        (pa.array([[1.0, -2.0]]), "series", {"scale": "log"}, "the smallest is -2"),
        (pa.array([[1.0, 2.0], [3.0], [4.0]]), "vector", {"size": 2}, "2 vectors have not the size 2, but 1"),
        (pa.array([[1.0, None], [1.0, float("nan")]]), "vector", {"size": 2}, "2 numbers inside are null, NaN"),
        (pa.array([1.0, 2.0]), "vector", {"size": 2}, "wants a list of numbers"),
        (pa.array(["a"]), "text", {"sentence_encoder": "m"}, "pip install sentence-transformers"),
    ],
)
def test_what_training_would_refuse_is_an_error(column, kind, more, said):
    [(level, text)] = findings(column, kind, **more)
    assert level == "error" and said in text


@pytest.mark.parametrize(
    ("column", "kind", "more", "said"),
    [
        (pa.array(["a", "a"]), "nominal", {}, "tells no two items apart"),
        (
            pa.array(["a", "a", "b", "c"]),
            "nominal",
            {},
            "50 % of the labels given are rarer than min_count 2",
        ),
        (pa.array([1.0, 1.0]), "numeric", {}, "every value is 1"),
        (pa.array([1.0, None, None]), "numeric", {}, "67 % of the values are missing"),
        (pa.array(["a", "b", "z"]), "ordinal", {"order": "[a, b]"}, "1 labels are not in the order"),
        (pa.array(["a", "z"]), "nominal", {"labels": "[a, b]"}, "1 labels are not in the labels and count as out-of-"),
        (pa.array(["a", "z"]), "nominal", {"labels": "[a]", "hash_buckets": 4}, "share the hash buckets: 'z'"),
        (pa.array(["a", " "]), "nominal", {"labels": "[a, b]"}, "1 of the labels are on no row"),
        (pa.array([1, 2]), "ordinal", {"order": "[1, 2, 3]"}, "1 of the order are on no row, and nothing is learned"),
        (pa.array([1.6e12, 1.5e12]), "timestamp", {}, "the largest is 1.6e+12: are these milliseconds?"),
        (pa.array([1600000000000, 7]), "timestamp", {}, "are these milliseconds?"),
        (pa.array([[1.0, 1.0], [1.0]]), "series", {}, "every value is 1"),
        (pa.array([[1, 2, 3], [4]]), "series", {"max_length": 2}, "1 series are longer than max_length 2"),
        (pa.array([[3.0, 3.0]]), "vector", {"size": 2}, "every number is 3"),
    ],
)
def test_what_only_wastes_is_a_warning(column, kind, more, said):
    said_of_it = findings(column, kind, **more)
    assert said_of_it[0][0] == "ok"
    assert any(level == "warning" and said in text for level, text in said_of_it)


def test_rare_labels_are_no_waste_where_they_have_buckets():
    assert findings(pa.array(["a", "b", "c"]), "nominal", hash_buckets=4) == [
        ("ok", "nominal, 3 of 3 present, 3 labels")
    ]


def test_named_labels_need_no_minimum_count():
    assert [level for level, _ in findings(pa.array(["a", "b"]), "nominal", labels="[a, b]")] == ["ok"]


def test_lists_of_any_arrow_type_and_numbers_of_any_type_are_vectors_and_series():
    for inner in (pa.float32(), pa.int8(), pa.decimal128(5, 2), pa.uint64()):
        for kind in (pa.list_(inner), pa.large_list(inner), pa.list_(inner, 2)):
            column = pa.array([[1, 2], None, [3, 4]], kind)
            for settings in ({"kind": "series"}, {"kind": "vector", "size": 2}):
                assert findings(column, **settings)[0][0] == "ok"


def test_a_good_column_says_what_it_holds():
    assert findings(pa.array(["a|b", "a", None]), "multi", separator='"|"', min_count=1) == [
        ("ok", "multi, 2 of 3 present, 2 labels")
    ]
    assert findings(pa.array(["a", "a", "b", "b"]).dictionary_encode(), "nominal") == [
        ("ok", "nominal, 4 of 4 present, 2 labels")
    ]


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["a", "a"], "1 ids stand on more than one row: 'a'"),
        (["a", None], "1 of 2 rows have no id"),
        (["a", ""], "the empty string"),
        (["a", "b" * 513], "longer than 512 bytes"),
        ([1.5, 2.5], "an id is text or a whole number"),
    ],
)
def test_ids_are_there_and_distinct(ids, said):
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {x: {kind: numeric}}")
    with pytest.raises(SchemaMismatch, match=said):
        require_fit(pa.table({"id": ids, "x": [1, 2]}), schema)


def test_an_absent_column_is_answered_with_what_the_table_has():
    schema = FeatureSchema.from_yaml("name: t\nid: key\nfeatures: {genres: {kind: multi}}")
    with pytest.raises(SchemaMismatch) as caught:
        require_fit(pa.table({"id": ["a"], "genre": [["x"]]}), schema, "films.csv")
    assert "did you mean 'genre'? It has id, genre" in str(caught.value) and "key" in str(caught.value)


def test_whole_numbers_too_large_for_a_float_are_no_reason_to_refuse():
    assert findings(pa.array([10**17 + 1, 2]), "numeric")[0][0] == "ok"


def test_an_empty_table_is_refused():
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {x: {kind: numeric}}")
    with pytest.raises(SchemaMismatch, match="no rows"):
        require_fit(pa.table({"id": pa.array([], pa.string()), "x": pa.array([], pa.int64())}), schema)


@pytest.mark.parametrize("at_once", [check.COUNTED_AT_ONCE, 1])
def test_labels_are_counted_over_all_chunks_and_of_the_rows_named(monkeypatch, at_once):
    monkeypatch.setattr(check, "COUNTED_AT_ONCE", at_once)
    sets = pa.chunked_array([[["a", "b"], None], [["b"], [], ["b", "c"]], [["a"]]])
    counted = label_counts(sets, Multi(name="x")).sort_by("label").to_pylist()
    assert [tuple(row.values()) for row in counted] == [("a", 2), ("b", 3), ("c", 1)]
    some = label_counts(sets, Multi(name="x"), np.array([True, True, False, True, True, False]))
    assert [tuple(row.values()) for row in some.sort_by("label").to_pylist()] == [("a", 2, 1), ("b", 3, 2), ("c", 1, 1)]
    none = label_counts(sets, Multi(name="x"), np.array([True, True, False, False, False, False]))
    assert of_kept(none).sort_by("label").to_pylist() == [{"label": "a", "count": 1}, {"label": "b", "count": 1}]
    one = label_counts(pa.chunked_array([[7, None], [7]]), Nominal(name="x", dtype="integer"))
    assert one.to_pylist() == [{"label": 7, "count": 2}]
    assert len(label_counts(pa.chunked_array([], pa.string()), Nominal(name="x"))) == 0
