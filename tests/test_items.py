import json
import os
import re
import socket
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from films import SCHEMA, table
from pyarrow import csv

from itemvec.errors import ConfigError, TableError
from itemvec.schema import FeatureSchema
from itemvec.table import Piece
from training import items as copies
from training.items import Items, forget, opened, taken, written_whole


@pytest.fixture
def items(tmp_path: Path) -> Items:
    pq.write_table(table(600), tmp_path / "films.parquet", row_group_size=100)
    return Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs")


@pytest.mark.slow
def test_a_cluster_copies_what_this_process_would_and_says_what_is_wrong_as_it_does(tmp_path, monkeypatch, ray_cluster):
    films, here, copied = table(90), list[object](), copies._copied
    (tmp_path / "films").mkdir()
    for n, rows in enumerate((0, 60, 0, 30)):
        pq.write_table(films.slice(0 if n < 3 else 60, rows), tmp_path / "films" / f"{n}.parquet", row_group_size=20)
    alone = Items.read(str(tmp_path / "films"), SCHEMA, (), tmp_path / "alone").table
    for name, value in {"ALONE": 0, "PART": 0, "_copied": lambda *given: here.append(given) or copied(*given)}.items():
        monkeypatch.setattr(copies, name, value)
    monkeypatch.chdir(tmp_path)
    many = Items.read("films", SCHEMA, (), tmp_path / "many", "auto")
    assert many.table.equals(alone) and many.table.schema.equals(alone.schema)
    assert [int(file.stem) for file in sorted(many.copy.iterdir())] == [0, 20, 40, 60, 80]
    pq.write_table(films, "films.parquet", row_group_size=50)
    assert Items.read("films.parquet", SCHEMA, (), tmp_path / "many", "auto").table.equals(alone)
    assert len(here) == 2  # of each table what decides the types; tasks have copied the rest
    with fsspec.open("memory://films.parquet", "wb") as file:
        pq.write_table(films.slice(0, 80), file, row_group_size=40)
    mine = Items.read("memory://films.parquet", SCHEMA, (), tmp_path / "many", "auto")
    assert mine.table.equals(alone.slice(0, 80)) and len(here) == 4  # nobody else can read it

    pq.write_table(films.slice(60).drop_columns(["year"]), "films/3.parquet")
    said = []
    for address in (None, "auto"):
        with pytest.raises(TableError) as refused:
            Items.read("films", SCHEMA, (), tmp_path / "wrong", address)
        said.append(str(refused.value))
    assert said[0] == said[1] and re.search(r"films/3\.parquet is not .*year", said[0])
    assert not list((tmp_path / "wrong").rglob("*.arrow*"))


def test_a_machine_that_does_not_mount_the_folder_of_runs_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"^{tmp_path}/not-here is not there on {socket.gethostname()}: .*mount"):
        copies._copied_there([Piece("films.parquet")], ["id"], {}, None, tmp_path / "not-here" / "0.part")


def test_rows_of_a_copy_are_those_of_the_files_that_they_lie_in(tmp_path):
    films = table(50)
    for first, rows in ((0, 20), (20, 5), (25, 25)):
        with pa.ipc.new_file(tmp_path / f"{first:012d}.arrow", films.schema) as writer:
            writer.write_table(films.slice(first, rows))
    for start, rows in ((0, 50), (0, 20), (19, 2), (20, 5), (22, 20), (25, 1), (49, 9)):
        assert opened(tmp_path, start, rows).equals(films.slice(start, rows)), (start, rows)
    assert opened(tmp_path).equals(films) and len(opened(tmp_path, 20, 5).column("id").chunks) == 1


def test_what_one_task_copies_is_of_about_as_many_bytes(monkeypatch):
    pieces = [Piece("a", n, 10) for n in range(5)] + [Piece("b", None, 45), Piece("c", None, 1)]
    monkeypatch.setattr(copies, "PART", 20)
    sizes = [[piece.size for piece in part] for part in copies._parts(pieces)]
    assert sizes == [[10, 10], [10, 10], [10, 45], [1]]
    monkeypatch.setattr(copies, "PARTS", 2)  # 96 bytes: 48 each at least
    assert [len(part) for part in copies._parts(pieces)] == [5, 2]


def test_the_copy_has_the_rows_of_the_table(items):
    assert items.table.equals(table(600).select(items.table.column_names).combine_chunks())


def test_one_changed_byte_is_another_table(items, tmp_path):
    pq.write_table(table(601), tmp_path / "films.parquet")
    other = Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs")
    assert other.copy.parent != items.copy.parent and other.table.num_rows == 601


def test_the_files_of_a_folder_are_one_table(tmp_path):
    films = table(90)
    (tmp_path / "films").mkdir()
    for n in (2, 0, 1):
        pq.write_table(films.slice(30 * n, 30), tmp_path / "films" / f"{n}.parquet")
    (tmp_path / "films" / "_SUCCESS").touch()
    read = Items.read(str(tmp_path / "films"), SCHEMA, (), tmp_path / "runs").table
    assert read.column("id").to_pylist() == films.column("id").to_pylist()


def test_files_whose_columns_differ_are_refused_by_name(tmp_path):
    (tmp_path / "films").mkdir()
    pq.write_table(table(30), tmp_path / "films" / "a.parquet")
    pq.write_table(table(30).drop_columns(["year"]), tmp_path / "films" / "b.parquet")
    with pytest.raises(TableError, match=r"films/b\.parquet .*year"):
        Items.read(str(tmp_path / "films"), SCHEMA, (), tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.arrow*"))


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_large_text_file_is_read_in_pieces_as_the_schema_says(tmp_path, monkeypatch, ending):
    films = pa.table({"id": ["007", "8"], "title": ["1984", "Up"], "year": [1984, 2009], "provider": ["Hulu", None]})
    if ending == "csv":
        csv.write_csv(films, tmp_path / "t.csv")
    else:
        (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in films.to_pylist()))
    monkeypatch.setattr("itemvec.table.STREAMED_BYTES", 0)
    read = Items.read(str(tmp_path / f"t.{ending}"), SCHEMA, (), tmp_path / "runs").table
    assert [{k: v for k, v in row.items() if k in films.column_names} for row in read.to_pylist()] == films.to_pylist()
    # Text are the id 007 and a film called 1984, numbers the years.
    assert read.schema.field("year").type == pa.float64()


def test_a_column_that_becomes_another_kind_is_read_again_as_the_schema_says(tmp_path, monkeypatch):
    (tmp_path / "t.csv").write_text("id,x\na,1\nb,2\n")
    monkeypatch.setattr("itemvec.table.STREAMED_BYTES", 0)
    kinds = [
        Items.read(
            str(tmp_path / "t.csv"),
            FeatureSchema.from_yaml(f"name: t\nid: id\nfeatures: {{x: {{kind: {kind}}}}}"),
            (),
            tmp_path / "runs",
        )
        .table.schema.field("x")
        .type
        for kind in ("nominal", "numeric")
    ]
    assert kinds == [pa.string(), pa.float64()]


def test_columns_of_codes_become_their_values(tmp_path):
    films = table(40)
    coded = films.set_column(2, "provider", films.column("provider").dictionary_encode())
    pq.write_table(coded, tmp_path / "films.parquet", row_group_size=10)
    read = Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs").table
    assert read.column("provider").type == pa.string()
    assert read.column("provider").to_pylist() == films.column("provider").to_pylist()


def test_what_breaks_off_never_stands_under_its_name(tmp_path):
    def break_off() -> None:
        with written_whole(tmp_path / "a") as part:
            part.write_text("half")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        break_off()
    assert not list(tmp_path.iterdir())


def test_the_faster_of_two_processes_writes(tmp_path):
    with written_whole(tmp_path / "a") as part:
        part.write_text("mine")
        (tmp_path / "a").write_text("theirs")
    assert (tmp_path / "a").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_the_tables_last_used_and_those_of_unfinished_runs_are_kept(tmp_path):
    for age in range(4):
        folder = tmp_path / "tables" / f"t{age}"
        folder.mkdir(parents=True)
        os.utime(folder, (1000 - age, 1000 - age))
    (tmp_path / "films-123").mkdir()
    (tmp_path / "films-123" / "encoded").write_text("../tables/t3/key")
    forget(tmp_path, kept=2)
    assert sorted(path.name for path in (tmp_path / "tables").iterdir()) == ["t0", "t1", "t3"]


def test_a_copy_takes_memory_only_where_it_is_read(items):
    before = pa.total_allocated_bytes()
    read = opened(items.copy)
    assert read.nbytes > 50_000 and pa.total_allocated_bytes() - before < 1_000


def test_rows_are_taken_in_the_order_that_they_are_named(items):
    rows = np.array([317, 0, 599, 317])
    assert taken(items.table, rows) == items.table.take(pa.array(rows))
    assert taken(items.table, []) == items.table.slice(0, 0)
