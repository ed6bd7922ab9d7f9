import json
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from films import SCHEMA, table
from s3 import BUCKET, s3

from itemvec.cli import cli
from itemvec.errors import ConfigError, ItemvecError
from itemvec.registry import Registry
from training import cluster
from training.config import ClusterConfig, TrainConfig
from training.retrain import job_like_champion
from training.run import locked

__all__ = ["s3"]

SMALL = ["--set", "encoder.hidden=[16]", "--set", "encoder.decoder_hidden=[16]", "--dim", "8", "--epochs", "3"]


def films(folder: Path, rows: int = 240) -> list[str]:
    """The arguments TABLE --schema SCHEMA --registry DIR of a table in `folder`."""
    pq.write_table(table(rows), folder / "films.parquet")
    SCHEMA.save(folder / "films.yaml")
    return [
        str(folder / "films.parquet"),
        "--schema",
        str(folder / "films.yaml"),
        "--registry",
        str(folder / "registry"),
    ]


@pytest.fixture(scope="module")
def published(ray_cluster, tmp_path_factory):
    """What `itemvec train` printed, and the folder it worked in."""
    folder = tmp_path_factory.mktemp("train")
    done = CliRunner().invoke(cli, ["train", *films(folder), *SMALL])
    assert done.exit_code == 0, done.output
    return done.output, folder


@pytest.mark.slow
def test_train_publishes_a_first_champion_that_loads(published):
    output, folder = published
    registry = Registry(folder / "registry")
    assert registry.aliases("films") == {"champion": 1}
    model = registry.load("films")  # verifies every file and replays the golden rows
    assert "published films@1 (champion)" in output
    assert model.dim == 8 and model.manifest.lineage.table_rows == 240
    assert model.manifest.lineage.config["epochs"] == 3
    assert [kept.name for kept in (folder / "runs").iterdir()] == ["tables"], "what a finished run kept is gone"


@pytest.mark.slow
def test_the_terminal_shows_epochs_columns_and_what_is_left(published):
    output, _ = published
    assert all(f"epoch  {n} of 3" in output for n in (1, 2, 3))
    assert "s left" in output and "items/s" in output and "genres" in output


@pytest.mark.slow
def test_a_version_carries_its_evaluation_and_its_report(published):
    _, folder = published
    version = folder / "registry/films/versions/1"
    evaluation = json.loads((version / "evaluation.json").read_text())
    assert set(evaluation) == {
        "rows", "columns", "retrieval", "cold_start", "out_of_vocabulary", "space", "parent", "samples", "training",
        "seconds",
    }  # fmt: skip
    assert set(evaluation["columns"]) == {f.name for f in SCHEMA.features}
    assert len(evaluation["training"]["history"]) == evaluation["training"]["epochs"] <= 3
    assert {"read", "encode", "workers", "loop", "evaluate"} <= set(evaluation["seconds"])
    report = (version / "report.html").read_text()
    assert "<title>films@1: evaluation</title>" in report and "Sum of the objectives" in report
    assert "report.html" in Registry(folder / "registry").load("films").manifest.files


@pytest.mark.slow
def test_a_second_training_is_the_challenger_and_may_go_on_from_a_version(
    published, ray_cluster, s3, tmp_path, monkeypatch
):
    """With the table and the registry in a bucket of a real server."""
    monkeypatch.setenv("HOME", str(tmp_path))  # where versions are fetched to
    folder, at = published[1], f"s3://{BUCKET}/registry"
    registry = Registry(at)
    registry.publish("films", lambda draft, version: _copied(folder / "registry/films/versions/1", draft), "champion")
    _, _, schema_file, *_ = films(tmp_path, 300)
    s3.put_file(tmp_path / "films.parquet", f"{BUCKET}/films.parquet")
    arguments = ["train", f"s3://{BUCKET}/films.parquet", "--schema", schema_file, "--registry", at, *SMALL]
    arguments += ["--runs", str(tmp_path / "runs")]
    done = CliRunner().invoke(cli, [*arguments, "--from", "films@1", "--set", "compatible=1", "--seed", "4"])
    assert done.exit_code == 0 and "going on from films@1" in done.output, done.output
    assert registry.aliases("films") == {"champion": 1, "challenger": 2}
    assert registry.manifest("films", 2).lineage.parent == 1
    parent = registry.load("films@2").evaluation["parent"]
    assert parent["version"] == 1 and 0 < parent["overlap"] <= 1
    assert parent["compatibility"] > 0.9 and 0.5 < parent["cross_recall"] <= 1
    said = CliRunner().invoke(cli, ["models", "show", "films@2", "--registry", at])
    assert json.loads(said.output)["parent"] == parent
    assert "The mean cosine between an item's vector" in (registry.path("films", 2) / "report.html").read_text()

    refused = CliRunner().invoke(cli, [*arguments, "--from", "films@1", "--dim", "4"])
    assert isinstance(refused.exception, ConfigError)
    assert "cannot start --from films@1: encoder.dim was 8 and is 4" in str(refused.exception)
    other = CliRunner().invoke(cli, [*arguments, "--from", "films@1", "--name", "shows"])
    assert isinstance(other.exception, ConfigError) and "is a version of films" in str(other.exception)
    job = job_like_champion(
        str(tmp_path / "films.parquet"), registry, tmp_path / "runs", None, None,
        lambda settings: TrainConfig.load(None, {}, settings), ClusterConfig(),
    )  # fmt: skip
    assert job.follows == job.parent() == 1, "a retraining follows the champion"


def _copied(source: Path, draft: Path) -> None:
    shutil.copytree(source, draft, dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "epoch=3"], "epoch: no such setting; did you mean epochs?"),
        (["--set", "encoder.dimm=3"], "encoder.dimm: no such setting; did you mean dim?"),
        (["--set", "optimizer.xyz=3"], "optimizer.xyz: no such setting; there is method, "),
        (["--set", "gate.size=3"], "gate: no such setting; there is encoder, "),
        (["--set", "optimizer.clip=-1"], "optimizer.clip: Input should be greater than 0"),
        (["--config", "nowhere.yaml"], "no config file at nowhere.yaml"),
        (["--set", "reconstruct.weight=0", "--set", "contrast.weight=0"], "there is nothing to learn"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(tmp_path, arguments, said):
    done = CliRunner().invoke(cli, ["train", *films(tmp_path), *arguments])
    assert isinstance(done.exception, ConfigError) and said in str(done.exception)
    assert "\n" not in str(done.exception)


def test_a_table_that_does_not_fit_ends_before_ray_is_started(tmp_path, monkeypatch):
    monkeypatch.delattr(cluster, "connected")
    arguments = films(tmp_path)
    pq.write_table(table().drop_columns(["genres"]), tmp_path / "films.parquet")
    done = CliRunner().invoke(cli, ["train", *arguments])
    assert isinstance(done.exception, ItemvecError) and "genres" in str(done.exception)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 5\nseed: 3\nencoder: {dim: 12}\n")
    config = TrainConfig.load(tmp_path / "c.yaml", {"epochs": 9, "encoder.hidden": [8]}, {"patience": 2})
    assert (config.epochs, config.seed, config.encoder.dim, config.encoder.hidden) == (9, 3, 12, (8,))
    assert config.patience == TrainConfig().patience, "a file stands in place of the champion's settings"
    assert TrainConfig.load(None, {"epochs": 9}, {"patience": 2}).patience == 2


def test_one_setting_of_a_group_leaves_the_others_at_their_defaults():
    changed = TrainConfig.load(None, {"encoder.dim": 12})
    assert changed.encoder == TrainConfig().encoder.model_copy(update={"dim": 12})


def test_a_lock_is_held_once_and_says_by_whom(tmp_path):
    with locked(tmp_path / "lock", "films is being trained"):
        said = f"films is being trained .process {os.getpid()}"
        with pytest.raises(ItemvecError, match=said), locked(tmp_path / "lock", "films is being trained"):
            pass
    with locked(tmp_path / "lock", "films is being trained"):
        pass
