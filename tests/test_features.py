import json
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itemvec.errors import InvalidItem, SchemaMismatch, VersionCorrupt
from itemvec.features import FIRST, MISSING, OOV, FeatureTransform, Vocabulary
from itemvec.schema import FeatureSchema

SCHEMA = FeatureSchema.from_yaml("""
name: films
id: tt
features:
  genres: {kind: multi, min_count: 1}
  age: {kind: ordinal, order: [G, PG, R]}
  year: {kind: numeric}
  gross: {kind: numeric, scale: log}
  votes: {kind: numeric, scale: quantile}
  shown: {kind: timestamp, cycles: [year]}
  title: {kind: text, buckets: 32}
  studio: {kind: nominal}
  code: {kind: nominal, dtype: integer, min_count: 1}
  sequel: {kind: nominal, dtype: boolean, min_count: 1}
""")
FILMS = pa.table(
    {
        "tt": ["a", "b", "c", "d"],
        "genres": [["Drama", "War"], ["Drama"], [], None],
        "age": ["G", "R", None, "PG"],
        "year": [1990.0, 2000.0, 2010.0, None],
        "gross": [0.0, 9.0, 99.0, None],
        "votes": [1, 2, 3, 1000],
        "shown": ["2000-01-01", "2001-01-01", "2002-01-01T00:00:00", None],
        "title": ["One", "Two words", "", None],
        "studio": ["Acme", "Acme", "Solo", None],
        "code": [7, 7, 8, None],
        "sequel": [True, False, False, None],
    }
)
TRANSFORM = FeatureTransform.fit(FILMS, SCHEMA)


def bag(transform, item, column):
    """Rows of one item's bag, counted from the column's own base, and their weights."""
    batch = transform.transform([item]).batch
    slots = transform.layout.bags
    at = [slot.name for slot in slots].index(column)
    start = batch.lengths[0, :at].sum()
    part = slice(start, start + batch.lengths[0, at])
    return (batch.indices[part] - slots[at].base).tolist(), batch.weights[part].tolist()


def dense(transform, item, column):
    slot = next(s for s in transform.layout.dense if s.name == column)
    return transform.transform([item]).batch.dense[0, slot.start : slot.start + slot.width].tolist()


# --- labels ---


def test_frequent_labels_come_first_and_ties_in_alphabetical_order():
    assert Vocabulary.fit(["b", "c", "a", "c"], min_count=1).labels == ["c", "a", "b"]


def test_rare_labels_share_the_out_of_vocabulary_row():
    # "Solo" stands on one row only and min_count is 2
    assert bag(TRANSFORM, {"studio": "Acme"}, "studio") == ([FIRST], [1.0])
    assert bag(TRANSFORM, {"studio": "Solo"}, "studio") == ([OOV], [1.0])


def test_a_cap_keeps_the_most_frequent():
    assert Vocabulary.fit(["a", "b", "b", "c", "c", "c"], min_count=1, max_labels=2).labels == ["c", "b"]


def test_white_space_and_unicode_form_do_not_make_a_new_label():
    vocabulary = Vocabulary.fit(["Ame\u0301lie ", "Am\u00e9lie"], min_count=2)
    assert vocabulary.labels == ["Am\u00e9lie"]
    assert vocabulary.row(" Ame\u0301lie") == FIRST


def test_a_blank_label_is_missing():
    assert bag(TRANSFORM, {"studio": "  "}, "studio")[0] == [MISSING]
    assert TRANSFORM.transform([{"studio": "  "}]).statuses[0]["studio"] == "missing"


def test_integers_and_booleans_are_labels_of_their_own_types():
    assert bag(TRANSFORM, {"code": 7}, "code")[0] == [FIRST]
    assert bag(TRANSFORM, {"code": 9}, "code")[0] == [OOV]
    assert bag(TRANSFORM, {"sequel": False}, "sequel")[0] == [FIRST]
    for wrong in ({"code": "7"}, {"code": True}, {"code": 7.0}, {"sequel": 1}, {"sequel": "true"}):
        with pytest.raises(InvalidItem):
            TRANSFORM.transform([wrong])


def test_a_set_of_n_labels_counts_one_over_root_n_each():
    rows, weights = bag(TRANSFORM, {"genres": ["War", "Drama"]}, "genres")
    assert rows == [FIRST, FIRST + 1]  # Drama stands on two rows, War on one
    assert weights == pytest.approx([1 / math.sqrt(2)] * 2)


def test_unseen_labels_of_a_set_fall_into_one_row_and_are_reported():
    assert bag(TRANSFORM, {"genres": ["Opera", "Drama", "Noir"]}, "genres")[0] == [OOV, FIRST]
    statuses = [
        TRANSFORM.transform([{"genres": g}]).statuses[0].get("genres")
        for g in (["Opera", "Drama"], ["Opera"], [], None, ["Drama"], [None, " "])
    ]
    assert statuses == ["partly_oov", "oov", "missing", "missing", None, "missing"]


def test_an_order_is_a_thermometer():
    w = 1 / math.sqrt(3)
    assert bag(TRANSFORM, {"age": "G"}, "age") == ([FIRST], [pytest.approx(w)])
    assert bag(TRANSFORM, {"age": "R"}, "age")[0] == [FIRST, FIRST + 1, FIRST + 2]
    assert bag(TRANSFORM, {"age": "X"}, "age") == ([OOV], [1.0])
    assert bag(TRANSFORM, {}, "age") == ([MISSING], [1.0])


# --- numbers ---


def test_numbers_have_mean_0_and_variance_1_over_the_training_rows():
    # mean 2000, variance (100 + 0 + 100) / 3
    assert dense(TRANSFORM, {"year": 2010}, "year") == pytest.approx([10 / math.sqrt(200 / 3), 0])
    assert dense(TRANSFORM, {"year": None}, "year") == [0, 1]


def test_log_scale_counts_orders_of_magnitude():
    # log1p of 0, 9, 99 is 0, ln 10, 2 ln 10: evenly spaced, so 9 is the mean
    assert dense(TRANSFORM, {"gross": 9}, "gross") == pytest.approx([0, 0], abs=1e-6)


def test_quantile_scale_knows_only_the_rank():
    a, b, c, d = (dense(TRANSFORM, {"votes": v}, "votes")[0] for v in (1, 2, 3, 1000))
    assert b - a == pytest.approx(c - b, abs=0.02) == pytest.approx(d - c, abs=0.02)


def test_a_number_beyond_the_training_range_is_clipped_and_reported():
    assert dense(TRANSFORM, {"year": 2050}, "year") == dense(TRANSFORM, {"year": 2010}, "year")
    assert TRANSFORM.transform([{"year": 2050}]).statuses[0]["year"] == "clipped"
    assert "year" not in TRANSFORM.transform([{"year": 2010}]).statuses[0]


@pytest.mark.parametrize("value", [1e308, -1e308, float("inf"), 10**400 // 10**100, 0])
def test_any_number_is_encoded_finitely(value):
    for column in ("year", "gross", "votes"):
        assert np.isfinite(dense(TRANSFORM, {column: value}, column)).all()


def test_age_counts_from_the_newest_training_row_and_cycles_come_round():
    newest, oldest = (dense(TRANSFORM, {"shown": day}, "shown") for day in ("2002-01-01", "2000-01-01"))
    assert newest[0] < oldest[0]
    # 2000 was a leap year: 366 days are a whole turn of 365.2425 and 0.7575 days more
    assert newest[1:3] == pytest.approx(dense(TRANSFORM, {"shown": "2001-01-01"}, "shown")[1:3], abs=0.03)
    assert dense(TRANSFORM, {}, "shown") == [0, 0, 0, 1]


def test_a_time_that_is_nan_is_missing():
    schema = FeatureSchema.from_yaml("name: a\nid: tt\nfeatures: {t: {kind: timestamp}}")
    transform = FeatureTransform.fit(pa.table({"tt": list("abc"), "t": [0.0, float("nan"), 86_400.0]}), schema)
    assert np.isfinite(transform.transform([{"t": 0.0}, {"t": float("nan")}]).batch.dense).all()
    assert transform.transform([{"t": 0.0}]).batch.dense[0, 0] != 0


# --- text ---


def test_words_and_parts_of_words_are_shared_whatever_the_case():
    transform = FeatureTransform.fit(
        FILMS, FeatureSchema.from_yaml("name: a\nid: tt\nfeatures: {title: {kind: text, buckets: 100000}}")
    )
    matrix, matrices, heat = (
        set(bag(transform, {"title": t}, "title")[0]) for t in ("the Matrix", "THE MATRICES", "Heat")
    )
    assert len(matrix & matrices) > 8
    assert not matrix & heat


def test_text_is_read_up_to_a_limit():
    setting = FeatureSchema.from_yaml("name: a\nid: tt\nfeatures: {title: {kind: text, max_characters: 10}}")
    transform = FeatureTransform.fit(FILMS, setting)
    assert bag(transform, {"title": "ten letter"}, "title") == bag(
        transform, {"title": "ten letters and more"}, "title"
    )


# --- the whole ---


def test_an_item_with_nothing_has_a_status_for_every_column():
    [status] = TRANSFORM.transform([{}]).statuses
    assert status == {f.name: "missing" for f in SCHEMA.features}


def test_columns_that_the_schema_does_not_name_are_reported_but_the_id_is_not():
    [status] = TRANSFORM.transform([{"tt": "a", "color": 1, "year": 2000}]).statuses
    assert status["color"] == "ignored" and "tt" not in status and "year" not in status


def test_every_wrong_type_of_every_item_is_named_by_its_json_pointer():
    items = [
        {},
        {"year": "long", "genres": 7},
        {"genres": ["Drama", 3], "title": 5, "shown": "soon", "age": 2},
    ]
    with pytest.raises(InvalidItem) as caught:
        TRANSFORM.transform(items, pointer="/input")
    assert sorted(e.pointer for e in caught.value.errors) == [
        "/input/1/genres", "/input/1/year", "/input/2/age", "/input/2/genres/1", "/input/2/shown", "/input/2/title",
    ]  # fmt: skip
    assert "expected a number, got the string 'long'" in {e.detail for e in caught.value.errors}


def test_of_a_set_of_wrong_labels_only_the_first_is_named():
    with pytest.raises(InvalidItem) as caught:
        TRANSFORM.transform([{"genres": ["Drama", *range(10_000)]}])
    assert [e.pointer for e in caught.value.errors] == ["/0/genres/1"]


def test_pointers_escape_as_rfc_6901_says():
    schema = FeatureSchema.from_yaml('name: a\nid: tt\nfeatures: {"a/b~c": {kind: numeric}}')
    transform = FeatureTransform.fit(pa.table({"tt": ["x"], "a/b~c": [1.0]}), schema)
    with pytest.raises(InvalidItem) as caught:
        transform.transform([{"a/b~c": "x"}])
    assert caught.value.errors[0].pointer == "/0/a~1b~0c"


def test_a_table_and_its_items_give_the_same_numbers():
    columns = [f.name for f in SCHEMA.features]
    items = [{c: v for c, v in row.items() if c in columns and v is not None} for row in FILMS.to_pylist()]
    one, other = TRANSFORM.transform_table(FILMS), TRANSFORM.transform(items).batch
    for field in ("dense", "indices", "weights", "lengths"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


def test_a_table_in_chunks_gives_the_same_numbers(monkeypatch):
    whole = TRANSFORM.transform_table(FILMS)
    monkeypatch.setattr("itemvec.features.CHUNK", 3)
    parts = TRANSFORM.transform_table(FILMS)
    np.testing.assert_array_equal(whole.indices, parts.indices)
    np.testing.assert_array_equal(whole.dense, parts.dense)


values = st.one_of(st.none(), st.text(max_size=20))
anything = st.fixed_dictionaries(
    {},
    optional={
        "genres": st.none() | st.lists(values, max_size=8),
        "age": values,
        "year": st.none() | st.floats() | st.integers(),
        "gross": st.none() | st.floats() | st.integers(),
        "votes": st.none() | st.floats() | st.integers(),
        "shown": st.none() | st.datetimes().map(lambda t: t.isoformat()) | st.floats(allow_nan=True),
        "title": values,
        "studio": values,
        "code": st.none() | st.integers(),
        "sequel": st.none() | st.booleans(),
        "unknown": values,
    },
)


@given(st.lists(anything, max_size=5))
def test_transform_is_total_and_its_output_always_has_one_form(items):
    encoded = TRANSFORM.transform(items)
    batch, layout = encoded.batch, TRANSFORM.layout
    assert (batch.dense.dtype, batch.indices.dtype, batch.weights.dtype, batch.lengths.dtype) == (
        np.float32,
        np.int64,
        np.float32,
        np.int32,
    )
    assert batch.dense.shape == (len(items), layout.dense_width) and batch.lengths.shape == (
        len(items),
        len(layout.bags),
    )
    assert np.isfinite(batch.dense).all() and np.isfinite(batch.weights).all()
    assert (batch.lengths > 0).all() and batch.lengths.sum() == len(batch.indices) == len(batch.weights)
    owners = np.repeat(np.tile(np.arange(len(layout.bags)), len(items)), batch.lengths.ravel())
    bases, rows = (np.array([getattr(bag, field) for bag in layout.bags]) for field in ("base", "rows"))
    assert ((bases[owners] <= batch.indices) & (batch.indices < (bases + rows)[owners])).all()
    assert len(encoded.statuses) == len(items)


@given(st.lists(st.text(max_size=10), max_size=10), st.randoms())
def test_the_order_and_repetition_of_a_set_say_nothing(labels, random):
    shuffled = labels * 2
    random.shuffle(shuffled)
    one, other = (TRANSFORM.transform([{"genres": g}]).batch for g in (labels, shuffled))
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.weights, other.weights)


@settings(max_examples=25)
@given(st.lists(anything, min_size=1, max_size=5))
def test_a_saved_transform_gives_the_same_numbers_and_digest(tmp_path_factory, items):
    folder = tmp_path_factory.mktemp("transform")
    TRANSFORM.save(folder)
    loaded = FeatureTransform.load(folder, SCHEMA)
    assert loaded.digest() == TRANSFORM.digest() and loaded.layout == TRANSFORM.layout
    one, other = TRANSFORM.transform(items).batch, loaded.transform(items).batch
    np.testing.assert_array_equal(one.indices, other.indices)
    np.testing.assert_array_equal(one.dense, other.dense)


@pytest.mark.parametrize("kind", ["nominal", "multi"])
@given(labels=st.lists(st.text(min_size=1, max_size=10), min_size=2, max_size=30))
@settings(max_examples=30)
def test_every_label_kept_by_fit_has_a_row_of_its_own(kind, labels):
    vocabulary = Vocabulary.fit(labels, min_count=1)
    rows = [vocabulary.row(label) for label in vocabulary.labels]
    assert rows == list(range(FIRST, FIRST + len(rows)))


def test_what_was_fitted_is_in_the_digest():
    other = FeatureTransform.fit(FILMS.slice(0, 3), SCHEMA)
    assert other.digest() != TRANSFORM.digest()


def test_a_saved_transform_of_another_format_is_refused(tmp_path):
    TRANSFORM.save(tmp_path)
    state = json.loads((tmp_path / "transform.json").read_text())
    (tmp_path / "transform.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(VersionCorrupt, match="format 99"):
        FeatureTransform.load(tmp_path, SCHEMA)


def test_fitting_refuses_a_table_that_does_not_fit_with_every_reason():
    with pytest.raises(SchemaMismatch) as caught:
        FeatureTransform.fit(
            FILMS.drop_columns(["year"]).set_column(0, "tt", pa.array([1.5, 2, 3, 4])), SCHEMA, "films.csv"
        )
    assert len(caught.value.problems) == 2 and "films.csv" in str(caught.value)


def test_a_table_without_a_column_is_not_transformed():
    with pytest.raises(SchemaMismatch, match="did you mean 'genre'"):
        TRANSFORM.transform_table(FILMS.rename_columns(["genre" if c == "genres" else c for c in FILMS.column_names]))
