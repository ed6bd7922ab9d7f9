import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from films import SCHEMA, table
from test_run import SMALL, films

from itemvec.cli import cli
from itemvec.client import ServiceUnreachable
from itemvec.errors import ConfigError, ItemvecError
from itemvec.registry import Registry
from training.retrain import Check, GateRefused
from training.run import locked


@pytest.fixture(scope="module")
def champion(ray_cluster, tmp_path_factory) -> Path:
    """A folder with films.parquet, films.yaml and a registry with a first version."""
    folder = tmp_path_factory.mktemp("retrain")
    done = CliRunner().invoke(cli, ["retrain", *films(folder), *SMALL])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def workplace(champion, tmp_path) -> Path:
    return Path(shutil.copytree(champion, tmp_path / "copy"))


def retrain(folder: Path, *arguments: str):
    return CliRunner().invoke(
        cli, ["retrain", str(folder / "films.parquet"), "--registry", str(folder / "registry"), *arguments]
    )


def grow(folder: Path, rows: int = 300) -> None:
    pq.write_table(table(rows), folder / "films.parquet")


def aliases(folder: Path) -> dict[str, int]:
    return Registry(folder / "registry").aliases("films")


@pytest.mark.slow
def test_without_a_champion_the_first_version_is_one(champion):
    assert aliases(champion) == {"champion": 1}


@pytest.mark.slow
def test_nothing_is_trained_when_nothing_changed(workplace):
    done = retrain(workplace)
    assert done.exit_code == 0 and "nothing to do" in done.output
    assert Registry(workplace / "registry").versions("films") == [1]


@pytest.mark.slow
def test_a_new_table_gives_a_new_champion_trained_like_the_old_one(workplace):
    grow(workplace)
    done = retrain(workplace, "--gate", "retrieval=1", "--gate", "column=1")
    assert done.exit_code == 0, done.output
    assert aliases(workplace) == {"champion": 2, "previous": 1}
    old, new = (Registry(workplace / "registry").manifest("films", v) for v in (1, 2))
    assert new.lineage.config == old.lineage.config and new.lineage.parent == 1 and new.lineage.table_rows == 300
    gate = json.loads((workplace / "registry/films/versions/2/evaluation.json").read_text())["gate"]
    assert gate["champion"] == 1 and {"rows", "retrieval precision@10", "effective rank"} <= {
        check["name"] for check in gate["checks"]
    }


@pytest.mark.slow
def test_a_worse_version_is_refused_and_the_champion_stays(workplace):
    grow(workplace)
    # Two dimensions, and steps that go nowhere.
    bad = ["--dim", "2", "--set", "optimizer.learning_rate=1e-9", "--set", "optimizer.table_learning_rate=1e-9"]
    done = retrain(workplace, *bad, "--epochs", "1", "--gate", "column=0", "--gate", "retrieval=0")
    assert isinstance(done.exception, GateRefused) and done.exception.exit_status == 3
    assert "films@1 stays the champion" in str(done.exception) and "is short by" in str(done.exception)
    assert aliases(workplace) == {"champion": 1} and Registry(workplace / "registry").versions("films") == [1]


@pytest.mark.slow
def test_a_table_that_was_cut_short_is_refused(workplace):
    grow(workplace, 100)
    done = retrain(workplace, "--gate", "retrieval=1", "--gate", "column=1", "--gate", "rank=0")
    assert isinstance(done.exception, GateRefused)
    assert "rows 100 (champion 240, least 120) is short by 20" in str(done.exception)


@pytest.mark.slow
def test_two_retrainings_do_not_run_at_once(workplace):
    grow(workplace)
    with locked(workplace / "runs/films.lock", "held by the test"):
        done = retrain(workplace)
    assert isinstance(done.exception, ItemvecError) and "films is being retrained" in str(done.exception)


@pytest.mark.slow
def test_a_switch_that_failed_is_made_up_for_without_training_again(workplace):
    grow(workplace)
    tolerant = ["--gate", "retrieval=1", "--gate", "column=1", "--gate", "rank=0"]
    done = retrain(workplace, "--url", "http://127.0.0.1:9", *tolerant)
    assert isinstance(done.exception, ServiceUnreachable)
    assert aliases(workplace) == {"champion": 1, "challenger": 2}
    done = retrain(workplace, *tolerant)
    assert done.exit_code == 0 and "did not get to switch" in done.output
    assert aliases(workplace) == {"champion": 2, "previous": 1}
    assert Registry(workplace / "registry").versions("films") == [1, 2]


def test_without_a_champion_a_schema_is_needed(tmp_path):
    pq.write_table(table(), tmp_path / "films.parquet")
    done = retrain(tmp_path)
    assert isinstance(done.exception, ConfigError) and "--schema" in str(done.exception)
    done = retrain(tmp_path, "--name", SCHEMA.name)
    assert isinstance(done.exception, ConfigError) and "no champion" in str(done.exception)


def test_a_check_says_by_how_much_it_failed():
    failed = Check("genres micro-F1", new=0.41, champion=0.55, least=0.45)
    assert not failed.passed
    assert str(failed) == "genres micro-F1 0.41 (champion 0.55, least 0.45) is short by 0.04"
    assert Check("rows", 10, 10, 10).passed
