import datetime
import os
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest

from itemvec.errors import TableError
from itemvec.table import Piece, batches_of, pieces_of, read_table, rows, table_digest

ITEMS = pa.table({"id": ["a", "b"], "year": [1999, None], "genres": [["Drama"], []]})


def test_three_formats_read_the_same_labels(tmp_path):
    pa.parquet.write_table(ITEMS, tmp_path / "t.parquet")
    (tmp_path / "t.csv").write_text("id,year\na,1999\nb,\n")
    (tmp_path / "t.tsv").write_text("id\tyear\na\t1999\nb\t\n")
    (tmp_path / "t.jsonl").write_text('{"id": "a", "year": 1999}\n{"id": "b", "year": null}\n')
    for name in ("t.parquet", "t.csv", "t.tsv", "t.jsonl"):
        table = read_table(str(tmp_path / name), ["id", "year", "not there"])
        assert table.to_pydict() == {"id": ["a", "b"], "year": [1999, None]}, name


def test_any_fsspec_url_is_read():
    with fsspec.open("memory://items.jsonl", "wb") as file:
        file.write(b'{"id": "a"}\n')
    assert read_table("memory://items.jsonl").to_pydict() == {"id": ["a"]}
    assert len(table_digest("memory://items.jsonl")) == 64


def test_rows_are_what_a_caller_would_send_as_json():
    table = pa.table(
        {
            "id": [1, 2],
            "day": [datetime.date(1999, 3, 31), None],
            "price": [Decimal("1.50"), None],
            "score": [float("nan"), 0.5],
            "course": [[0.5, None, float("nan")], None],
            "counts": [[1, 2], []],
            "prices": pa.array([None, [Decimal("1.50"), None]], pa.list_(pa.decimal128(5, 2))),
            "seen": pa.array([1_999, None], pa.timestamp("ns")),
        }
    )
    [(ids, items)] = rows(table, "id", [*table.column_names[1:], "absent"])
    assert ids == ["1", "2"]
    assert items == [
        {
            "day": "1999-03-31",
            "price": 1.5,
            "course": [0.5, None, None],
            "counts": [1, 2],
            "seen": "1970-01-01T00:00:00.000001",
        },
        {"score": 0.5, "counts": [], "prices": [1.5, None]},
    ]


def test_rows_come_in_batches():
    table = pa.table({"id": list("abcde")})
    assert [ids for ids, _ in rows(table, "id", [], batch_size=2)] == [["a", "b"], ["c", "d"], ["e"]]


def test_numbers_with_leading_zeros_are_text(tmp_path):
    (tmp_path / "t.csv").write_text("id,zip,n,country\n007,01234,7,NA\n008,99999,8,\n")
    assert read_table(str(tmp_path / "t.csv")).to_pydict() == {
        "id": ["007", "008"],
        "zip": ["01234", "99999"],
        "n": [7, 8],
        "country": ["NA", None],
    }


def test_a_row_without_an_id_is_refused_and_not_named_none():
    for ids in (pa.array([1, None]), pa.array([1.5, 2.5])):
        with pytest.raises(TableError, match="must be text or whole numbers on every row"):
            list(rows(pa.table({"id": ids, "x": [1, 2]}), "id", ["x"]))


def test_a_table_with_none_of_the_columns_gives_empty_items():
    assert list(rows(pa.table({"id": ["a", "b"]}), "id", ["x"])) == [(["a", "b"], [{}, {}])]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.xlsx", b"", "cannot tell the format"),
        ("t.parquet", b"not parquet", "is not Parquet"),
        ("t.jsonl", b"{", "is not JSON Lines"),
        ("t.csv", b"a,b\n1,2,3\n", "is not CSV"),
        ("t.csv", b"id,a,a\n1,2,3\n", "columns named twice: a"),
        ("t.csv", b"\xff\xfe,a\n1,2\n", "is not CSV"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TableError, match=said):
        read_table(str(tmp_path / name))


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(TableError, match=r"no table at .*none\.csv"):
        read_table(str(tmp_path / "none.csv"))
    with pytest.raises(TableError, match="cannot read nowhere"):
        read_table("nowhere://t.csv")


def test_equal_bytes_have_equal_digests(tmp_path):
    for name, content in (("a.csv", b"id\n1\n"), ("b.csv", b"id\n1\n"), ("c.csv", b"id\n2\n")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (table_digest(str(tmp_path / n)) for n in ("a.csv", "b.csv", "c.csv"))
    assert a == b != c


def test_the_digest_of_a_large_table_elsewhere_follows_what_the_storage_says_of_it(tmp_path, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text("id\na\n")
    content = table_digest(str(path))
    assert table_digest(f"file://{path}") == content
    monkeypatch.setattr("itemvec.table.HASHED_BYTES", 0)
    before = table_digest(f"file://{path}")
    assert before == table_digest(f"file://{path}") != content
    os.utime(path, (1, 1))
    assert table_digest(f"file://{path}") != before
    assert table_digest(str(path)) == content  # on this disk it is read


def test_storage_that_says_nothing_of_a_file_is_read(monkeypatch):
    monkeypatch.setattr("itemvec.table.HASHED_BYTES", 0)
    digests = []
    for text in (b"id\na\n", b"id\nb\n"):
        fsspec.filesystem("memory").pipe("/t.csv", text)
        digests.append(table_digest("memory://t.csv"))
    assert digests[0] != digests[1]


def test_a_folder_of_several_formats_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id\na\n")
    (tmp_path / "b.jsonl").write_text('{"id": "b"}')
    with pytest.raises(TableError, match=r"several formats: CSV, JSON Lines"):
        read_table(str(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "b.txt")
    assert read_table(str(tmp_path)).to_pydict() == {"id": ["a"]}


def test_row_groups_are_read_by_themselves_as_the_rows_before_say(tmp_path):
    for name, year in (("a", pa.array([1, 2, 3, 4])), ("b", pa.array([5.0, 6.0, 7.0, 8.0]))):
        pa.parquet.write_table(
            pa.table({"id": list("abcd"), "year": year}), tmp_path / f"{name}.parquet", row_group_size=2
        )
    a, b = (str(tmp_path / f"{name}.parquet") for name in "ab")
    size = Path(a).stat().st_size
    assert pieces_of(a) == [Piece(a, 0, size // 2), Piece(a, 1, size // 2)]
    [one, two] = batches_of([pieces_of(a)[1], pieces_of(b)[0]], ["year"], {})
    assert one.schema == two.schema and [*one["year"].to_pylist(), *two["year"].to_pylist()] == [3, 4, 5, 6]
    [cast] = batches_of(pieces_of(a)[:1], ["year"], {}, pa.schema({"year": pa.string()}))
    assert cast["year"].to_pylist() == ["1", "2"]


def test_what_is_no_parquet_and_what_has_no_row_groups_is_one_piece(tmp_path):
    for name in ("t.csv", "t.parquet"):
        (tmp_path / name).write_text("id\na\n")
        assert pieces_of(str(tmp_path / name)) == [Piece(str(tmp_path / name), None, 5)]


def test_a_page_that_is_damaged_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    ids = pa.table({"id": [f"film {i}" for i in range(10_000)]})
    pa.parquet.write_table(ids, path, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[1000:2000] = bytes(1000)
    path.write_bytes(content)
    with pytest.raises(TableError, match=r"t\.parquet is not Parquet that can be read: .*corrupt"):
        read_table(str(path))
    with pytest.raises(TableError, match=r"t\.parquet is not a Parquet table that can be read.*corrupt"):
        list(batches_of(pieces_of(str(path)), ["id"], {}))
