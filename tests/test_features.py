import json

import numpy as np
import pyarrow as pa
import pytest
from fitting import fitted, table
from hypothesis import given, settings
from hypothesis import strategies as st

from itemvec.errors import InvalidItem, SchemaMismatch, VersionCorrupt
from itemvec.features import Batch, FeatureTransform
from itemvec.schema import FeatureSchema

# --- what holds for every kind ---

words = st.none() | st.text(max_size=20)
amounts = st.none() | st.floats() | st.integers(-(10**300), 10**300)
moments = st.none() | st.datetimes().map(lambda t: t.isoformat()) | st.floats() | st.just(" ")
sets = st.none() | st.lists(words, max_size=8)
series = st.none() | st.lists(amounts, max_size=20)
vectors = st.none() | st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3)

NUMBERS = [1.0, 2.0, 2.0, 1000.0, None]
STUDIOS = ["Acme", "Acme", "Solo", "", None]
GENRES = [["Drama", "War"], ["Drama"], [], None, ["War"]]
CONTRACT = {
    # settings: (training rows, values of the right type)
    "kind: nominal": (STUDIOS, words),
    "kind: nominal, dtype: integer": ([7, 7, 8, None, 8], st.none() | st.integers()),
    "kind: nominal, dtype: boolean, min_count: 1": ([True, False, None, True, True], st.none() | st.booleans()),
    "kind: nominal, labels: [Solo, Acme, New]": (STUDIOS, words),
    "kind: nominal, hash_buckets: 4": (STUDIOS, words),
    "kind: nominal, max_labels: 0, hash_buckets: 4": (STUDIOS, words),
    "kind: multi": (GENRES, sets),
    'kind: multi, separator: "|"': (["Drama|War", "War", "Drama", "", None], sets | words),
    "kind: multi, hash_buckets: 4, min_count: 2": (GENRES, sets),
    "kind: ordinal, order: [G, PG, R]": (["G", "R", None, "X", "PG"], words),
    "kind: ordinal, order: [1, 2, 3]": ([1, 2, 3, None, 4], st.none() | st.integers()),
    "kind: numeric": (NUMBERS, amounts),
    "kind: numeric, scale: log": (NUMBERS, amounts),
    "kind: numeric, scale: quantile, clip: 0.1": (NUMBERS, amounts),
    "kind: numeric, bins: 3": (NUMBERS, amounts),
    "kind: timestamp, cycles: [year, week, day]": (["2000-01-01", "1931-05-06T07:08:09Z", "", None, " "], moments),
    "kind: text, buckets: 32": (["One", "Two words", "", None, "Two"], words),
    "kind: series, points: 3": ([[1.0, None, 3.0], [2.0], [], None, [0.5] * 9], series),
    "kind: series, points: 3, scale: log, max_length: 5": ([[1.0, None, 3.0], [2.0], [], None, [0.5] * 9], series),
    "kind: vector, size: 3": ([[0.0, 1.0, 2.0], [3.0, 4.0, 6.0], None, [0.0] * 3, [1.0] * 3], vectors),
}
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
each_kind = pytest.mark.parametrize("kind", CONTRACT)


@pytest.fixture(scope="module")
def transforms():
    return {kind: fitted(kind, rows) for kind, (rows, _) in CONTRACT.items()}


def assert_of_one_form(batch, layout, n):
    assert (batch.dense.dtype, batch.indices.dtype, batch.weights.dtype, batch.lengths.dtype) == (
        np.float32, np.int64, np.float32, np.int32,
    )  # fmt: skip
    assert batch.dense.shape == (n, layout.dense_width) and batch.lengths.shape == (n, len(layout.bags))
    assert np.isfinite(batch.dense).all() and np.isfinite(batch.weights).all()
    assert (batch.lengths > 0).all() and batch.lengths.sum() == len(batch.indices) == len(batch.weights)
    owners = np.repeat(np.tile(np.arange(len(layout.bags)), n), batch.lengths.ravel())
    bases, rows = (np.array([getattr(bag, field) for bag in layout.bags], int) for field in ("base", "rows"))
    assert ((bases[owners] <= batch.indices) & (batch.indices < (bases + rows)[owners])).all()


def assert_same(one, other):
    for field in ("dense", "indices", "weights", "lengths"):
        np.testing.assert_array_equal(getattr(one, field), getattr(other, field))


@each_kind
@settings(max_examples=30)
@given(data=st.data())
def test_every_value_of_the_right_type_has_numbers_of_one_form(kind, data, transforms):
    transform = transforms[kind]
    values = data.draw(st.lists(CONTRACT[kind][1], max_size=5))
    encoded = transform.transform([{"x": value} for value in values])
    assert_of_one_form(encoded.batch, transform.layout, len(values))
    assert len(encoded.statuses) == len(values)
    for value, status in zip(values, encoded.statuses, strict=True):
        assert value is not None or status == {"x": "missing"}
        assert set(status.values()) <= {"oov", "partly_oov", "missing", "clipped"}


@each_kind
@settings(max_examples=60)
@given(value=json_values)
def test_any_other_value_is_the_callers_mistake_and_nothing_worse(kind, value, transforms):
    transform = transforms[kind]
    try:
        batch = transform.transform([{"x": value}], "/input").batch
    except InvalidItem as invalid:
        [error] = invalid.errors
        assert error.pointer == "/input/0/x" or error.pointer.startswith("/input/0/x/")
        assert error.detail.startswith("expected ") and len(error.detail) < 200
    else:
        assert_of_one_form(batch, transform.layout, 1)


@each_kind
@settings(max_examples=20)
@given(data=st.data())
def test_a_saved_transform_gives_the_same_numbers_to_the_bit(kind, data, transforms, tmp_path_factory):
    transform = transforms[kind]
    folder = tmp_path_factory.mktemp("transform")
    transform.save(folder)
    loaded = FeatureTransform.load(folder, transform.schema)
    assert loaded.digest() == transform.digest() and loaded.layout == transform.layout
    items = [{"x": value} for value in data.draw(st.lists(CONTRACT[kind][1], min_size=1, max_size=5))]
    assert_same(transform.transform(items).batch, loaded.transform(items).batch)


@each_kind
def test_a_table_and_its_items_give_the_same_numbers(kind, transforms):
    rows, transform = CONTRACT[kind][0], transforms[kind]
    items = transform.transform([{} if value is None else {"x": value} for value in rows])
    assert_same(transform.transform_table(table(rows)), items.batch)
    assert transform.transform_arrow(table(rows)).statuses == items.statuses


ARROW = {
    "nothing": pa.nulls(2),
    "years that Python has not": pa.array([2**62, None], pa.timestamp("s")),
    "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
    "time of day": pa.array([1, None], pa.time64("us")),
    "durations": pa.array([1, None], pa.duration("s")),
    "dates": pa.array([2**31 - 1, None], pa.date32()),
    "bytes": pa.array([b"\xff", None]),
    "text that is not UTF-8": pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")),
    "large whole numbers": pa.array([2**63, None], pa.uint64()),
    "half precision": pa.array([np.float16(1.5), None]),
    "structures": pa.array([{"a": 1}, None]),
    "lists of nothing": pa.array([[None], None], pa.list_(pa.null())),
    "lists of lists": pa.array([[[1.0]], None]),
    "lists of large numbers": pa.array([[2**63, 1, 2], None], pa.list_(pa.uint64())),
    "lists of times": pa.array([[2**62], None], pa.list_(pa.timestamp("s"))),
    "views of lists": pa.array([[1.0, 2.0, 3.0], None], pa.list_view(pa.float64())),
    "codes": pa.array(["Drama", None]).dictionary_encode(),
    "text views": pa.array(["Drama", None], pa.string_view()),
}


@each_kind
@pytest.mark.parametrize("column", ARROW.values(), ids=ARROW)
def test_a_column_of_any_arrow_type_is_read_or_refused_row_by_row(kind, column, transforms):
    transform = transforms[kind]
    try:
        encoded = transform.transform_arrow(table(column), "/input")
    except InvalidItem as invalid:
        errors = invalid.errors
        assert all(e.pointer.startswith("/input/0/x") and e.detail.startswith("expected ") for e in errors)
    else:
        assert_of_one_form(encoded.batch, transform.layout, len(column))


@each_kind
@settings(max_examples=20)
@given(data=st.data())
def test_whatever_the_decoder_says_of_a_dense_column_is_a_json_value(kind, data, transforms):
    transform = transforms[kind]
    for slot in transform.layout.dense:
        floats = data.draw(st.lists(st.floats(width=32, allow_nan=False), min_size=slot.targets, max_size=slot.targets))
        json.dumps(transform.column("x").decode(np.array(floats, np.float32)), allow_nan=False)


@pytest.mark.parametrize(
    "kind", ["kind: multi", 'kind: multi, separator: "|"', "kind: multi, hash_buckets: 4, min_count: 2"]
)
@settings(max_examples=30)
@given(labels=st.lists(st.text(max_size=10) | st.sampled_from(["Drama", "War"]), max_size=10), random=st.randoms())
def test_the_order_and_repetition_of_a_set_say_nothing(kind, labels, random, transforms):
    shuffled = labels * 2
    random.shuffle(shuffled)
    assert_same(*(transforms[kind].transform([{"x": x}]).batch for x in (labels, shuffled)))


# --- a schema of several columns ---

SCHEMA = FeatureSchema.from_yaml("""
name: films
id: tt
features:
  genres: {kind: multi, min_count: 1}
  age: {kind: ordinal, order: [G, PG, R]}
  year: {kind: numeric}
  shown: {kind: timestamp, cycles: [year]}
  title: {kind: text, buckets: 32}
  studio: {kind: nominal}
  views: {kind: series, points: 2}
""")
FILMS = pa.table(
    {
        "tt": ["a", "b", "c", "d"],
        "genres": [["Drama", "War"], ["Drama"], [], None],
        "age": ["G", "R", None, "PG"],
        "year": [1990.0, 2000.0, 2010.0, None],
        "shown": ["2000-01-01", "2001-01-01", "2002-01-01T00:00:00", None],
        "title": ["One", "Two words", "", None],
        "studio": ["Acme", "Acme", "Solo", None],
        "views": [[1.0, 2.0], [3.0], [], None],
    }
)
TRANSFORM = FeatureTransform.fit(FILMS, SCHEMA)


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


def test_pointers_escape_as_rfc_6901_says():
    schema = FeatureSchema.from_yaml('name: a\nid: tt\nfeatures: {"a/b~c": {kind: numeric}}')
    transform = FeatureTransform.fit(pa.table({"tt": ["x"], "a/b~c": [1.0]}), schema)
    with pytest.raises(InvalidItem) as caught:
        transform.transform([{"a/b~c": "x"}])
    assert caught.value.errors[0].pointer == "/0/a~1b~0c"


def test_a_table_in_chunks_gives_the_same_numbers(monkeypatch):
    whole = TRANSFORM.transform_table(FILMS)
    monkeypatch.setattr("itemvec.features.CHUNK", 3)
    assert_same(whole, TRANSFORM.transform_table(FILMS))


def test_an_item_alone_gives_the_same_numbers_to_the_bit():
    items = FILMS.to_pylist()
    alone = [TRANSFORM.transform([item]).batch for item in items]
    assert_same(Batch.concatenate(alone), TRANSFORM.transform(items).batch)


def test_a_wrong_value_of_a_table_is_named_with_its_row(monkeypatch):
    monkeypatch.setattr("itemvec.features.CHUNK", 2)
    films = FILMS.set_column(1, "genres", pa.array([[1], [], [], [2]]))
    with pytest.raises(SchemaMismatch, match=r"row 0/genres/0: expected a label \(string\), got the number 1"):
        TRANSFORM.transform_table(films)
    with pytest.raises(SchemaMismatch, match="row 3/genres/0"):
        TRANSFORM.transform_table(films.set_column(1, "genres", pa.array([[], [], [], [2]])))


def test_items_that_come_as_a_table_may_lack_columns_and_have_others():
    films = FILMS.drop_columns(["year"]).append_column("color", pa.array(["red"] * 4))
    encoded = TRANSFORM.transform_arrow(films, "/items")
    items = [{k: v for k, v in row.items() if v is not None} for row in films.to_pylist()]
    assert_same(encoded.batch, TRANSFORM.transform(items).batch)
    assert encoded.statuses == TRANSFORM.transform(items).statuses
    assert encoded.statuses[0] == {"year": "missing", "color": "ignored"}
    with pytest.raises(InvalidItem, match="/items/0/year"):
        TRANSFORM.transform_arrow(pa.table({"year": ["long ago"]}), "/items")


def test_columns_lie_one_behind_the_other_bags_in_the_shared_table_and_dense_ones_among_the_floats():
    # Rows: out-of-vocabulary, missing, and 2 genres; 3 ages; 32 buckets; 1 studio that two films share.
    assert [(bag.name, bag.base, bag.rows) for bag in TRANSFORM.layout.bags] == [
        ("genres", 0, 4), ("age", 4, 5), ("title", 9, 34), ("studio", 43, 3),
    ]  # fmt: skip
    # Floats: value, 16 bins and flag; age, sine, cosine and flag; 2 points, 5 figures and flag.
    assert [(slot.name, slot.start, slot.width) for slot in TRANSFORM.layout.dense] == [
        ("year", 0, 18), ("shown", 18, 4), ("views", 22, 8),
    ]  # fmt: skip
    item = {"genres": ["War"], "age": "PG", "studio": "Acme"}
    assert TRANSFORM.transform([item]).batch.indices.tolist() == [3, 6, 7, 9 + 1, 45]


def test_what_was_fitted_is_in_the_digest():
    other = FeatureTransform.fit(FILMS.slice(0, 2), SCHEMA)
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
