import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from films import SCHEMA, table
from pyarrow import csv

from itemvec.errors import SchemaMismatch, TableError
from itemvec.features import FeatureTransform
from training import ingest
from training.config import ContrastConfig, TrainConfig
from training.data import TENSORS, EncodedTable, Prepared
from training.folds import TRAIN, fold_of
from training.ingest import Items, encode, encoded_at, forget, opened, taken, written_whole


@pytest.fixture
def items(tmp_path: Path) -> Items:
    pq.write_table(table(600), tmp_path / "films.parquet", row_group_size=100)
    return Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs")


def prepared(items: Items, folder: Path, spread: bool = False, **settings) -> Prepared:
    return Prepared.make(items.table, SCHEMA, TrainConfig(**settings), folder, "films", items.copy, spread)


def at_once(films: pa.Table) -> tuple[FeatureTransform, EncodedTable]:
    """What the whole table in memory gives."""
    fold = fold_of([str(i) for i in films.column("id").to_pylist()], 0.1, 0.05)
    transform = FeatureTransform.fit(films.take(pa.array(np.flatnonzero(fold == TRAIN))), SCHEMA)
    return transform, EncodedTable.of(transform.transform_table(films), transform.layout)


def same(one: EncodedTable, other: EncodedTable) -> bool:
    pairs = [(getattr(one, name), getattr(other, name)) for name in TENSORS]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "by", ["this process", *(pytest.param(others, marks=pytest.mark.slow) for others in ("processes", "a cluster"))]
)
def test_a_table_in_pieces_gives_the_very_bits_of_the_table_at_once(items, tmp_path, monkeypatch, request, by):
    monkeypatch.setattr(ingest, "BLOCK", 130)  # 600 rows: four blocks and a rest
    if by != "this process":
        monkeypatch.setattr(ingest, "ALONE", 0)
    if by == "a cluster":
        request.getfixturevalue("ray_cluster")
    data = prepared(items, tmp_path / "run", spread=by == "a cluster")
    transform, encoded = at_once(table(600))
    assert data.transform.digest() == transform.digest()
    assert same(data.table, encoded)


@pytest.mark.slow
def test_a_cluster_says_what_is_wrong_as_this_process_would(items, tmp_path, monkeypatch, ray_cluster):
    data, place = prepared(items, tmp_path / "run"), encoded_at(items.copy, SCHEMA, 0.1, 0.05)
    lacking = items.table.drop_columns(["genres"])
    with written_whole(tmp_path / "lacking.arrow") as path, pa.ipc.new_file(path, lacking.schema) as writer:
        writer.write_table(lacking)
    monkeypatch.setattr(ingest, "ALONE", 0)
    with pytest.raises(SchemaMismatch, match="genres"):
        list(encode(lacking, data.transform, place, tmp_path / "lacking.arrow", spread=True))


def test_the_copy_has_the_rows_of_the_table(items):
    assert items.table.equals(table(600).select(items.table.column_names).combine_chunks())


def test_a_second_run_with_other_settings_uses_what_the_first_encoded(items, tmp_path, monkeypatch):
    first = prepared(items, tmp_path / "runs" / "one")

    def not_again(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(Prepared, "_encode", not_again)
    again = Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs")
    second = prepared(again, tmp_path / "runs" / "two", epochs=1, seed=7, contrast=ContrastConfig(weight=0.5))
    assert same(first.table, second.table)
    with pytest.raises(AssertionError, match="encoded again"):  # other rows are held out
        prepared(again, tmp_path / "runs" / "three", test=0.2)


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


def test_columns_of_codes_become_their_values(tmp_path):
    films = table(40)
    coded = films.set_column(2, "provider", films.column("provider").dictionary_encode())
    pq.write_table(coded, tmp_path / "films.parquet", row_group_size=10)
    read = Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs").table
    assert read.column("provider").type == pa.string()
    assert read.column("provider").to_pylist() == films.column("provider").to_pylist()


def test_all_that_is_wrong_with_a_table_is_said_at_once(tmp_path):
    films = table(40).drop_columns(["provider"])
    films = films.set_column(0, "id", pa.array(["film-0", *films.column("id").to_pylist()[:-1]]))
    pq.write_table(films, tmp_path / "films.parquet")
    items = Items.read(str(tmp_path / "films.parquet"), SCHEMA, (), tmp_path / "runs")
    with pytest.raises(SchemaMismatch) as refused:
        prepared(items, tmp_path / "run")
    said = str(refused.value)
    assert "1 ids stand on more than one row: 'film-0'" in said and "provider: the table has no such column" in said
    assert not list(items.copy.parent.glob("*.part"))


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


def test_pages_that_are_let_go_of_are_read_again(items, tmp_path, monkeypatch):
    encoded = prepared(items, tmp_path / "run").table
    before = encoded.clean(torch.arange(600))
    monkeypatch.setattr("training.data.RESIDENT", 0)
    monkeypatch.setattr("training.data.TOUCHED", 1)
    assert all(torch.equal(a, b) for a, b in zip(before, encoded.clean(torch.arange(600)), strict=True))


def test_a_place_has_one_name_for_what_decides_what_is_encoded(items):
    place = encoded_at(items.copy, SCHEMA, 0.1, 0.05)
    assert place == encoded_at(items.copy, SCHEMA, 0.1, 0.05) != encoded_at(items.copy, SCHEMA, 0.1, 0.06)


def test_rows_are_taken_in_the_order_that_they_are_named(items):
    rows = np.array([317, 0, 599, 317])
    assert taken(items.table, rows) == items.table.take(pa.array(rows))
    assert taken(items.table, []) == items.table.slice(0, 0)
