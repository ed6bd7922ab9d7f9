import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from films import SCHEMA, table

from itemvec.cli import cli
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.errors import ConfigError, SchemaMismatch
from itemvec.features import FeatureTransform
from itemvec.registry import Registry
from itemvec.version import Lineage, ModelVersion
from training import embed_table as embedding
from training.embed_table import embed_table

ROWS = 90
CONFIG = EncoderConfig(dim=8, hidden=(16,), decoder_hidden=(16,))


def published(registry: Registry, seed: int = 0) -> None:
    """One more version of films, with the weights that a network begins with."""
    torch.manual_seed(seed)
    transform = FeatureTransform.fit(table(), SCHEMA)
    networks = ItemEncoder(CONFIG, transform.layout), Decoder(CONFIG, transform.layout)
    lineage = Lineage(table="films", table_sha256="", table_rows=240, train_rows=240, config={})

    def write(folder: Path, version: int) -> None:
        ModelVersion.make("films", version, transform, *networks, {}, lineage).save(folder, [])

    registry.publish("films", write, "champion")


@pytest.fixture
def registry(tmp_path, monkeypatch) -> Registry:
    monkeypatch.setattr(embedding, "BLOCK", 40)  # 90 rows: two files and a rest
    pq.write_table(table(ROWS), tmp_path / "films.parquet")
    registry = Registry(tmp_path / "registry")
    published(registry)
    return registry


def vectors(out: Path) -> dict[str, np.ndarray]:
    read = pq.read_table(out)
    return dict(zip(read["id"].to_pylist(), np.array(read["embedding"].to_pylist(), np.float32), strict=True))


def test_every_item_has_the_vector_that_the_model_gives_it(registry, tmp_path):
    films, out = table(ROWS), tmp_path / "out"
    done = embed_table(str(tmp_path / "films.parquet"), registry, "films", out)
    assert (done.model, done.items, done.done_before) == ("films@1", ROWS, 0)
    found, expected = vectors(out), registry.load("films").encode_arrow(films.drop_columns(["id"])).vectors
    assert list(found) == films["id"].to_pylist()
    assert np.stack(list(found.values())) == pytest.approx(expected, abs=1e-6)


def test_the_files_say_what_they_are_and_nothing_else_stays(registry, tmp_path):
    out = tmp_path / "out"
    embed_table(str(tmp_path / "films.parquet"), registry, "films", out)
    assert sorted(path.name for path in out.iterdir()) == [
        "_embedding.json",
        *(f"part-00000{n}.parquet" for n in "012"),
    ]
    about = pq.read_schema(out / "part-000002.parquet")
    assert about.metadata[b"model"] == b"films@1"
    assert about.metadata[b"fingerprint"].decode() == json.loads((out / "_embedding.json").read_text())["fingerprint"]
    assert str(about.field("embedding").type) == "fixed_size_list<element: float>[8]"


def test_a_run_that_broke_off_goes_on_with_what_is_left(registry, tmp_path):
    out, told = tmp_path / "out", []
    embed_table(str(tmp_path / "films.parquet"), registry, "films", out)
    whole = vectors(out)
    (out / "part-000001.parquet").unlink()
    kept = (out / "part-000000.parquet").stat().st_mtime_ns
    done = embed_table(str(tmp_path / "films.parquet"), registry, "films", out, told=lambda *n: told.append(n))
    assert (done.items, done.done_before) == (90, 50) and told == [(50, 90), (90, 90)]
    assert (out / "part-000000.parquet").stat().st_mtime_ns == kept
    assert all(np.array_equal(vector, whole[item]) for item, vector in vectors(out).items())


def test_vectors_of_two_models_or_tables_do_not_meet_in_one_folder(registry, tmp_path):
    out = tmp_path / "out"
    embed_table(str(tmp_path / "films.parquet"), registry, "films", out)
    published(registry, seed=1)
    with pytest.raises(ConfigError, match=r"holds the vectors of films@1 .* and not of films@2"):
        embed_table(str(tmp_path / "films.parquet"), registry, "films@2", out)
    pq.write_table(table(91), tmp_path / "films.parquet")
    with pytest.raises(ConfigError, match="name another folder"):
        embed_table(str(tmp_path / "films.parquet"), registry, "films@1", out)
    assert not (out / embedding.COPY).exists()


def test_a_table_without_a_column_of_the_model_is_refused_before_anything_is_written(registry, tmp_path):
    pq.write_table(table(ROWS).drop_columns(["genres"]), tmp_path / "films.parquet")
    with pytest.raises(SchemaMismatch, match="genres: the table has no such column"):
        embed_table(str(tmp_path / "films.parquet"), registry, "films", tmp_path / "out")
    assert not list((tmp_path / "out").glob("part*"))


@pytest.mark.slow
def test_actors_write_the_same_vectors_and_tell_of_each_block(ray_cluster, registry, tmp_path, monkeypatch):
    source, told = str(tmp_path / "films.parquet"), []
    embed_table(source, registry, "films", tmp_path / "one")
    monkeypatch.chdir(tmp_path)  # where the actors are not: what they are told of must be absolute
    done = embed_table(source, Registry("registry"), "films", Path("two"), 2, "auto", lambda *n: told.append(n))
    assert told[0] == (0, 90) and told[-1] == (90, 90) and len(told) == 4 and done.items == 90
    one, two = vectors(tmp_path / "one"), vectors(tmp_path / "two")
    assert list(one) == list(two) and np.stack(list(one.values())) == pytest.approx(np.stack(list(two.values())))


def test_the_command_says_what_it_wrote(registry, tmp_path):
    arguments = ["films", str(tmp_path / "films.parquet"), str(tmp_path / "out"), "--registry", registry.url]
    done = CliRunner().invoke(cli, ["embed-table", *arguments])
    assert done.exit_code == 0 and "90 vectors of films@1" in done.output and "90 now" in done.output
    again = CliRunner().invoke(cli, ["embed-table", *arguments])
    assert "90 vectors of films@1" in again.output and "all of them were there" in again.output
