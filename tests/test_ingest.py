from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from films import SCHEMA, table

from itemvec.errors import SchemaMismatch
from itemvec.features import FeatureTransform
from training import ingest
from training.config import ContrastConfig, TrainConfig
from training.data import TENSORS, EncodedTable, Prepared
from training.folds import TRAIN, fold_of
from training.ingest import encode, encoded_at, fit
from training.items import Items


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
    monkeypatch.setattr(ingest, "COUNTED", 250)
    if by != "this process":
        monkeypatch.setattr(ingest, "ALONE", 0)
    if by == "a cluster":
        request.getfixturevalue("ray_cluster")
    data = prepared(items, tmp_path / "run", spread=by == "a cluster")
    transform, encoded = at_once(table(600))
    assert data.transform.digest() == transform.digest()
    assert same(data.table, encoded)
    assert not list((tmp_path / "runs").rglob("counts"))


@pytest.mark.slow
def test_a_cluster_says_what_is_wrong_as_this_process_would(items, tmp_path, monkeypatch, ray_cluster):
    data, place = prepared(items, tmp_path / "run"), encoded_at(items.copy, SCHEMA, 0.1, 0.05)
    lacking = items.table.drop_columns(["genres"]).append_column("genres", pa.array(range(600)))
    lacking = lacking.set_column(0, "id", pa.array(["film-599", *lacking.column("id").to_pylist()[1:]]))
    (tmp_path / "lacking").mkdir()
    for start in (0, 300):
        with pa.ipc.new_file(tmp_path / "lacking" / f"{start}.arrow", lacking.schema) as writer:
            writer.write_table(lacking.slice(start, 300))
    for name, value in {"ALONE": 0, "BLOCK": 130, "COUNTED": 250}.items():
        monkeypatch.setattr(ingest, name, value)
    with pytest.raises(SchemaMismatch, match="genres"):
        list(encode(lacking, data.transform, place, tmp_path / "lacking", spread=True))
    said = []
    for copy in (None, tmp_path / "lacking"):
        with pytest.raises(SchemaMismatch) as refused:
            fit(lacking, SCHEMA, 0.1, 0.05, tmp_path / "fitted", "films", copy, spread=True)
        said.append(str(refused.value))
    assert said[0] == said[1] and "1 ids stand on more than one row: 'film-599'" in said[0]
    assert "genres: kind multi wants a list of string labels" in said[0]


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


def test_pages_that_are_let_go_of_are_read_again(items, tmp_path, monkeypatch):
    encoded = prepared(items, tmp_path / "run").table
    before = encoded.clean(torch.arange(600))
    monkeypatch.setattr("training.data.RESIDENT", 0)
    monkeypatch.setattr("training.data.TOUCHED", 1)
    assert all(torch.equal(a, b) for a, b in zip(before, encoded.clean(torch.arange(600)), strict=True))


def test_a_place_has_one_name_for_what_decides_what_is_encoded(items):
    place = encoded_at(items.copy, SCHEMA, 0.1, 0.05)
    assert place == encoded_at(items.copy, SCHEMA, 0.1, 0.05) != encoded_at(items.copy, SCHEMA, 0.1, 0.06)
