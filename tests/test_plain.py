"""The plain encodings: on the four shows of examples/, where every number can be checked by eye, and on odd values."""

import doctest
import json
import re
import shlex
from datetime import date
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from films import SCHEMA as FILMS
from films import table as films
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

import itemvec.cli
import itemvec.plain
from itemvec.errors import ConfigError, SchemaMismatch, TableError
from itemvec.features import FIRST, FeatureTransform
from itemvec.plain import PlainEncoding, bags, folded, label_names, read_sparse, write_encoding
from itemvec.schema import FeatureSchema
from itemvec.sparse import Csr
from itemvec.table import read_table
from itemvec.values import hashed

ROOT = Path(__file__).parents[1]
SHOWS = read_table(str(ROOT / "examples" / "shows.csv"))
SHOWS_SCHEMA = FeatureSchema.load(ROOT / "examples" / "shows.schema.yaml")
PROVIDERS = ["Netflix", "Prime Video", "HBO Max", "Hulu"]
GENRES = [
    "Action", "Comedy", "Short", "Western", "Drama", "Horror", "Music", "Thriller", "Animation", "Adventure", "Family",
    "Fantasy", "Sport", "Romance", "Crime", "Sci-Fi", "Biography", "Musical", "Mystery", "History", "Documentary",
    "Film-Noir", "News", "Game-Show", "Reality-TV", "War", "Talk-Show", "Adult",
]  # fmt: skip


def schema(text: str) -> FeatureSchema:
    return FeatureSchema.from_yaml(f"name: t\nid: id\nfeatures:\n{text}")


LABELS = schema(
    """
  color: {kind: nominal, labels: [red, blue]}
  tags: {kind: multi, labels: [a, b, c], separator: "|"}
"""
)


def table(**columns: list) -> pa.Table:
    return pa.table({"id": [str(i) for i in range(len(next(iter(columns.values()))))], **columns})


COLORS = table(color=["red", "blue"], tags=["a|b", "c"])


# --- the classic table ------------------------------------------------------------------------------------------------


def test_the_four_shows_as_integers():
    # Drama, Fantasy, Horror are the 5th, 12th and 6th genre of the schema, and so on.
    encoded = PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, "integer").columns(SHOWS)
    assert encoded.to_pydict() == {
        "title": ["Stranger Things", "Cocomelon", "100 Foot Waves", "I, Tonya"],
        "provider": [1, 2, 3, 4],
        "genres": [[5, 6, 12], [2, 9, 11], [13, 21], [2, 5, 17]],
        "release year": [2016, 2019, 2021, 2017],
        "rating": [8.7, 4.7, 8.1, 7.5],
    }


def test_the_four_shows_as_34_columns():
    encoding = PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, "one-hot")
    encoded = encoding.columns(SHOWS)
    names = [f"provider={p}" for p in PROVIDERS] + [f"genres={g}" for g in GENRES] + ["release year", "rating"]
    assert len(names) == 34 and list(encoding.names) == names and encoded.column_names == ["title", *names]
    groups = [encoded.select(range(at, end)).to_pylist() for at, end in ((0, 1), (1, 5), (5, 33), (33, 35))]
    shown = [" | ".join(" ".join(map(str, cells.values())) for cells in row) for row in zip(*groups, strict=True)]
    assert shown == [
        "Stranger Things | 1 0 0 0 | 0 0 0 0 1 1 0 0 0 0 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 2016 8.7",
        "Cocomelon | 0 1 0 0 | 0 1 0 0 0 0 0 0 1 0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 | 2019 4.7",
        "100 Foot Waves | 0 0 1 0 | 0 0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 | 2021 8.1",
        "I, Tonya | 0 0 0 1 | 0 1 0 0 1 0 0 0 0 0 0 0 0 0 0 0 1 0 0 0 0 0 0 0 0 0 0 0 | 2017 7.5",
    ]
    assert encoded.schema.field("provider=Hulu").type == pa.uint8()


def test_the_matrix_has_the_same_34_columns():
    encoding = PlainEncoding.fit(SHOWS, SHOWS_SCHEMA)
    columns = np.array([column.to_pylist() for column in encoding.columns(SHOWS).columns[1:]], np.float32).T
    assert np.array_equal(encoding.matrix(SHOWS).toarray(), columns)


def test_one_hot_and_multi_hot_are_one_encoding():
    one, multi = (PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, how).columns(SHOWS) for how in ("one-hot", "multi-hot"))
    assert one.equals(multi)


# --- labels -----------------------------------------------------------------------------------------------------------


def test_an_unseen_label_is_0_or_sets_no_column_and_a_missing_one_is_null():
    strange = table(color=["green", None, " blue "], tags=["x|b", None, ""])
    codes = PlainEncoding.fit(COLORS, LABELS, "integer").columns(strange)
    assert codes["color"].to_pylist() == [0, None, 2]  # white space around a label is not part of it
    assert codes["tags"].to_pylist() == [[0, 2], None, None]
    ones = PlainEncoding.fit(COLORS, LABELS).matrix(strange).toarray()
    assert ones.tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]]


def test_rare_labels_count_as_unseen_unless_the_schema_says_otherwise():
    rare = table(color=["red", "red", "blue"])
    assert PlainEncoding.fit(rare, schema("  color: {kind: nominal}")).names == ("color=red",)
    assert PlainEncoding.fit(rare, schema("  color: {kind: nominal, min_count: 1}")).names == (
        "color=red",
        "color=blue",
    )


def test_hash_buckets_of_the_schema_are_columns_behind_the_labels():
    buckets = schema("  color: {kind: nominal, labels: [red], hash_buckets: 2}")
    encoding = PlainEncoding.fit(COLORS, buckets)
    assert encoding.names == ("color=red", "color#0", "color#1")
    expected = [0, 0, 0]
    expected[1 + hashed("blue", 2)] = 1
    assert encoding.matrix(COLORS).toarray().tolist() == [[1, 0, 0], expected]


def test_labels_of_whole_numbers_and_booleans_are_labels():
    typed = schema(
        "  n: {kind: nominal, dtype: integer, labels: [7, 5]}\n  b: {kind: nominal, dtype: boolean, min_count: 1}"
    )
    encoding = PlainEncoding.fit(rows := table(n=[5, 7], b=[True, True]), typed)
    assert encoding.names == ("n=7", "n=5", "b=True")
    assert encoding.matrix(rows).toarray().tolist() == [[0, 1, 1], [1, 0, 1]]


a_set = st.none() | st.lists(st.none() | st.sampled_from("abcd") | st.text(max_size=3), max_size=5)


@given(st.lists(a_set, max_size=5), st.randoms())
def test_any_set_of_labels_is_encoded_and_its_order_says_nothing(sets, random):
    lists = schema("  tags: {kind: multi, labels: [a, b, c]}")
    fitted = pa.table({"id": ["0"], "tags": [["a"]]})
    shuffled = [None if s is None else random.sample(s, len(s)) for s in sets]
    rows, others = (
        pa.table(
            {
                "id": pa.array([str(i) for i in range(len(sets))], pa.string()),
                "tags": pa.array(x, pa.list_(pa.string())),
            }
        )
        for x in (sets, shuffled)
    )
    for how in ("integer", "one-hot", "hashing"):
        encoding = PlainEncoding.fit(fitted, lists, how, buckets=16)
        encoded = encoding.columns(rows)
        assert encoded.num_rows == len(sets) and encoded.schema == encoding.columns(fitted).schema
        assert encoded.equals(encoding.columns(others))


# --- hashing ----------------------------------------------------------------------------------------------------------


def test_a_label_counts_plus_or_minus_1_in_the_bucket_that_its_hash_chooses():
    # Of 12 places an even one is +1 in bucket place // 2, an odd one -1: red and b are +1 in bucket 2, a is +1 in
    # bucket 0; blue is -1 in bucket 4, c +1 in bucket 2.
    tokens = ["color=red", "tags=a", "tags=b", "color=blue", "tags=c"]
    assert [hashed(token, 12) for token in tokens] == [4, 0, 4, 9, 4]
    encoding = PlainEncoding.fit(COLORS, LABELS, "hashing", buckets=6)
    assert encoding.names == ("#0", "#1", "#2", "#3", "#4", "#5")
    assert encoding.matrix(COLORS).toarray().tolist() == [[1, 0, 2, 0, 0, 0], [0, 0, 1, 0, -1, 0]]


def test_a_label_that_the_fit_never_saw_hashes_as_if_it_had():
    narrow = PlainEncoding.fit(table(color=["blue"], tags=["c"]), LABELS, "hashing")
    wide = PlainEncoding.fit(COLORS, LABELS, "hashing")
    strange = table(color=["green"], tags=["x|y"])
    assert np.array_equal(narrow.matrix(strange).toarray(), wide.matrix(strange).toarray())
    assert len(narrow.matrix(strange).data) == 3


def test_signs_keep_inner_products_right_on_average():
    # 200 pairs of rows that share 5 of 40 labels each, in 32 buckets. Without signs collisions alone would add
    # 40 * 40 / 32 = 50 to the inner product of 5; with them they add 0, give or take sqrt(50 / 200) = 0.5.
    rows = [[*range(80 * p, 80 * p + 40)] for p in range(200)] + [
        [*range(80 * p + 35, 80 * p + 75)] for p in range(200)
    ]
    matrix = folded(Csr.of_rows(rows, 16_000), [f"label={i}" for i in range(16_000)], 32).toarray()
    assert (matrix[:200] * matrix[200:]).sum(1).mean() == pytest.approx(5, abs=1.5)


def test_what_cancels_in_a_bucket_is_not_kept():
    plus = next(t for t in map(str, range(99)) if hashed(t, 2) == 0)
    minus = next(t for t in map(str, range(99)) if hashed(t, 2) == 1)
    assert len(folded(Csr.of_rows([[0, 1]], 2), [plus, minus], 1).data) == 0


def test_text_takes_part_in_hashing_alone():
    text = schema("  title: {kind: text, words: 1, characters: null, buckets: 64}\n  year: {kind: numeric}")
    rows = table(title=["The Matrix", None], year=[1999, 2003])
    assert PlainEncoding.fit(rows, text).names == ("year",)
    matrix = PlainEncoding.fit(rows, text, "hashing", 1024).matrix(rows)
    assert np.diff(matrix.indptr).tolist() == [3, 1]  # two words and the year, and the year
    with pytest.raises(ConfigError, match="only text"):
        PlainEncoding.fit(rows, schema("  title: {kind: text}"), "one-hot")


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = schema(
    """
  n: {kind: numeric}
  at: {kind: timestamp}
  grade: {kind: ordinal, order: [low, mid, high]}
"""
)
MEASURED = pa.table(
    {
        "id": ["a", "b", "c"],
        "n": [1, 3, None],
        "at": [date(1970, 1, 2), None, date(1970, 1, 4)],
        "grade": ["high", "low", "strange"],
    }
)


@pytest.mark.parametrize("how", ["integer", "one-hot", "hashing"])
def test_numbers_stay_numbers_in_every_encoding(how):
    columns = PlainEncoding.fit(MEASURED, NUMBERS, how, buckets=1).columns(MEASURED)
    assert columns["n"].to_pylist() == [1, 3, None] and columns["n"].type == pa.int64()
    assert columns["at"].to_pylist() == [86_400, None, 259_200]  # seconds of 1 and of 3 days
    assert columns["grade"].to_pylist() == [3, 1, None]


def test_scaled_numbers_have_mean_0_and_variance_1_and_the_mean_where_missing():
    # n: mean 2, deviation 1; days: mean 2, deviation 1; ranks: mean 2, deviation 1
    scaled = PlainEncoding.fit(MEASURED, NUMBERS, scale="standard").matrix(MEASURED).toarray()
    assert scaled.tolist() == [[-1, -1, 1], [1, 0, -1], [0, 1, 0]]


def test_decimals_are_numbers_and_nan_is_missing():
    odd = schema("  a: {kind: numeric}\n  b: {kind: numeric}")
    rows = table(a=[Decimal("1.5"), Decimal("2.5")], b=[float("nan"), 4.0])
    assert PlainEncoding.fit(rows, odd).columns(rows).to_pylist()[0] == {"id": "0", "a": 1.5, "b": None}
    matrix = PlainEncoding.fit(rows, odd).matrix(rows).toarray()
    assert np.isnan(matrix[0, 1]) and matrix[1].tolist() == [2.5, 4.0]


def test_kinds_of_several_numbers_are_the_numbers_that_the_model_reads():
    image = schema("  image: {kind: vector, size: 2}")
    rows = table(image=[[1.0, 0.0], [0.0, 1.0], None])
    encoding = PlainEncoding.fit(rows, image)
    assert encoding.names == ("image[0]", "image[1]")
    read = FeatureTransform.fit(rows, image).transform_table(rows).dense[:, :2]
    found = encoding.matrix(rows).toarray()
    assert np.array_equal(found[:2], read[:2]) and np.isnan(found[2]).all()
    assert PlainEncoding.fit(rows, image, scale="standard").matrix(rows).toarray()[2].tolist() == [0, 0]


# --- blocks for baselines ---------------------------------------------------------------------------------------------


def test_the_bags_of_a_batch_are_the_one_hot_blocks_of_the_table():
    rows = films(60)
    transform = FeatureTransform.fit(rows, FILMS)
    found = bags(transform.layout, transform.transform_table(rows))
    encoding = PlainEncoding(transform)
    whole = encoding.matrix(rows).toarray()
    for name in ("provider", "genres", "cast"):
        names = label_names(transform, name)
        columns = [encoding.names.index(column) for column in names]
        assert np.array_equal(found[name].tail(FIRST).toarray(), whole[:, columns])
    assert label_names(transform, "rating") == ["rating=G", "rating=PG", "rating=PG-13", "rating=R"]
    assert len(label_names(transform, "title")) == found["title"].width - FIRST == 64


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_sparse_file_gives_back_ids_matrix_and_names(tmp_path):
    write_encoding(PlainEncoding.fit(SHOWS, SHOWS_SCHEMA), SHOWS, tmp_path / "s.parquet", "sparse")
    ids, matrix, names = read_sparse(tmp_path / "s.parquet")
    assert ids == SHOWS["title"].to_pylist()
    # 100 Foot Waves is row 2: HBO Max, Sport and Documentary (columns 2, 4 + 12, 4 + 20), year and rating
    third = slice(matrix.indptr[2], matrix.indptr[3])
    assert matrix.indices[third].tolist() == [2, 16, 24, 32, 33]
    assert matrix.data[third].tolist() == pytest.approx([1, 1, 1, 2021, 8.1])
    assert [names[i] for i in matrix.indices[third]][:2] == ["provider=HBO Max", "genres=Sport"]


@pytest.mark.parametrize("how", ["integer", "one-hot", "hashing"])
def test_a_file_written_in_many_chunks_is_the_whole_table(tmp_path, monkeypatch, how):
    rows = films(50)
    encoding = PlainEncoding.fit(rows, FILMS, how, buckets=8)
    whole = encoding.columns(rows)
    monkeypatch.setattr(itemvec.plain, "CHUNK", 7)
    seen = []
    write_encoding(encoding, rows, tmp_path / "c.parquet", "columns", seen.append)
    assert seen == [7] * 7 + [1]
    assert parquet.read_table(tmp_path / "c.parquet").equals(whole)
    if how != "integer":
        write_encoding(encoding, rows, tmp_path / "s.parquet", "sparse")
        chunked = read_sparse(tmp_path / "s.parquet").matrix.toarray()
        monkeypatch.undo()
        assert np.array_equal(chunked, encoding.matrix(rows).toarray(), equal_nan=True)


def test_integer_codes_say_in_the_file_which_label_each_is(tmp_path):
    write_encoding(PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, "integer"), SHOWS, tmp_path / "i.parquet", "columns")
    about = parquet.read_schema(tmp_path / "i.parquet").metadata[b"itemvec"]
    assert json.loads(about)["labels"] == {"provider": PROVIDERS, "genres": GENRES}


def test_what_cannot_be_written_says_why_and_leaves_no_file(tmp_path):
    out = tmp_path / "x.parquet"
    with pytest.raises(ConfigError, match="take them as columns"):
        write_encoding(PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, "integer"), SHOWS, out, "sparse")
    with pytest.raises(ConfigError, match="20,000 columns are too many"):
        write_encoding(PlainEncoding.fit(COLORS, LABELS, "hashing", 20_000), COLORS, out, "columns")
    with pytest.raises(SchemaMismatch, match="expected a label"):
        write_encoding(PlainEncoding.fit(COLORS, LABELS), table(color=[1], tags=["a"]), out, "columns")
    marked = pa.table({"values": ["0"], "color": ["red"], "tags": ["a"]})
    encoding = PlainEncoding.fit(marked, LABELS.model_copy(update={"id": "values"}))
    with pytest.raises(ConfigError, match="named 'values'"):
        write_encoding(encoding, marked, out, "sparse")
    twins = schema("  a: {kind: nominal, labels: [b=c]}\n  a=b: {kind: nominal, labels: [c]}")
    rows = pa.table({"id": ["0"], "a": ["b=c"], "a=b": ["c"]})
    with pytest.raises(ConfigError, match="'a=b=c'"):
        write_encoding(PlainEncoding.fit(rows, twins), rows, out, "columns")
    assert list(tmp_path.iterdir()) == []


def test_only_a_sparse_file_is_read_as_one(tmp_path):
    parquet.write_table(SHOWS, tmp_path / "t.parquet")
    for file in ("t.parquet", "none.parquet"):
        with pytest.raises(TableError, match="not a sparse file of itemvec encode"):
            read_sparse(tmp_path / file)


def test_an_encoding_that_does_not_exist_names_those_that_do():
    with pytest.raises(ConfigError, match="no plain encoding 'ordinal'; there is integer, one-hot"):
        PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, "ordinal")
    with pytest.raises(ConfigError, match="at least one bucket"):
        PlainEncoding.fit(SHOWS, SHOWS_SCHEMA, "hashing", buckets=0)


# --- the command ------------------------------------------------------------------------------------------------------


def encode(*words):
    return CliRunner().invoke(itemvec.cli.cli, ["encode", *map(str, words)])


def test_the_command_never_overwrites_by_itself(tmp_path):
    out = tmp_path / "o.parquet"
    examples = ROOT / "examples"
    words = (examples / "shows.csv", "--schema", examples / "shows.schema.yaml", "--as", "integer", "--out", out)
    assert encode(*words).exit_code == 0
    done = encode(*words)
    assert done.exit_code == 1 and "--force" in done.output
    assert encode(*words, "--force").exit_code == 0
    assert "no folder" in encode(*words[:-1], tmp_path / "none" / "o.parquet").output


def test_a_new_table_gets_the_columns_of_the_one_that_was_fitted(tmp_path):
    parquet.write_table(COLORS, tmp_path / "old.parquet")
    parquet.write_table(table(color=["green", "blue"], tags=["c", "x"]), tmp_path / "new.parquet")
    LABELS.save(tmp_path / "s.yaml")
    where = ("--schema", tmp_path / "s.yaml", "--as", "one-hot", "--out", tmp_path / "o.parquet")
    done = encode(tmp_path / "new.parquet", *where, "--fit", tmp_path / "old.parquet")
    assert "2 rows, 5 columns" in done.stdout
    assert list(parquet.read_table(tmp_path / "o.parquet").to_pydict().values())[1:] == [
        [0, 0],
        [0, 1],
        [0, 0],
        [0, 0],
        [1, 0],
    ]


# --- docs/encodings.md ------------------------------------------------------------------------------------------------


def test_every_option_is_documented_with_its_default():
    page = (ROOT / "docs" / "encodings.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(--[a-z]+)` \| (.*?) ?\|", page, re.MULTILINE))
    options = {p.opts[0]: p for p in itemvec.cli.cli.commands["encode"].params if p.param_type_name == "option"}
    assert documented.keys() == options.keys()
    assert documented["--buckets"] == str(options["--buckets"].default) == str(itemvec.plain.BUCKETS)
    assert documented["--scale"] == options["--scale"].default


def test_the_walk_in_the_docs_prints_what_it_says(tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "encodings.md").read_text(encoding="utf-8")
    runner, names, ran = doctest.DocTestRunner(verbose=False), dict[str, object](), 0
    for kind, block in re.findall(r"^```(console|pycon)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        if kind == "console":
            command, said = block.split("\n", 1)
            words = shlex.split(command.removeprefix("$ itemvec "))
            assert CliRunner().invoke(itemvec.cli.cli, words).stdout == said, command
        else:
            test = doctest.DocTestParser().get_doctest(block, names, f"block {ran}", "encodings.md", 0)
            assert runner.run(test, clear_globs=False).failed == 0
            names = test.globs
        ran += 1
    assert ran == 11
