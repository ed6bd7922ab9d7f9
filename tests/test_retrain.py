import json
import shutil
import signal
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import serving
from click.testing import CliRunner
from films import SCHEMA, table
from forked import itemvec
from liveservice import LiveService
from realservice import eventually
from test_run import SMALL, films

from itemvec.bulk import load_items
from itemvec.cli import cli
from itemvec.client import Client, ServiceUnreachable
from itemvec.errors import ConfigError, TableError
from itemvec.registry import Registry
from itemvec.runs import Lease, LeaseTaken, Run, Runs
from training.gate import GateRefused
from training.retrain import RetrainConfig, newest, too_old


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


def runs(folder: Path) -> list[Run]:
    return Runs(Registry(folder / "registry")).of("films")


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
    for run, files in {"films-0a": {"refused": "films"}, "films-0b": {}, "shows-0c": {"refused": "shows"}}.items():
        (workplace / "runs" / run).mkdir()
        for name, content in files.items():
            (workplace / "runs" / run / name).write_text(content)
    done = retrain(workplace, "--gate", "retrieval=1", "--gate", "column=1")
    assert done.exit_code == 0, done.output
    assert aliases(workplace) == {"champion": 2, "previous": 1}
    old, new = (Registry(workplace / "registry").manifest("films", v) for v in (1, 2))
    assert new.lineage.config == old.lineage.config and new.lineage.parent == 1 and new.lineage.table_rows == 300
    [run, first] = runs(workplace)
    assert (run.state, run.champion, run.version) == ("promoted", 1, 2) and first.state == "promoted"
    assert [step.name for step in run.steps] == ["read", "check", "train", "gate", "publish", "promote", "clean up"]
    assert {"rows", "columns kept", "retrieval precision@10", "effective rank", "neighbor overlap@10"} <= {
        check["name"] for check in run.checks
    }
    gate = json.loads((workplace / "registry/films/versions/2/evaluation.json").read_text())["gate"]
    assert gate == {"run": run.id, "champion": 1, "checks": run.checks}
    left = {folder.name for folder in (workplace / "runs").iterdir()}
    assert left == {"tables", "films-0b", "shows-0c"}, (
        "what was refused before goes; interrupted and other models' stay"
    )


@pytest.mark.slow
def test_a_worse_version_is_refused_and_the_champion_stays(workplace):
    grow(workplace)
    # Two dimensions, and steps that go nowhere.
    bad = ["--dim", "2", "--set", "optimizer.learning_rate=1e-9", "--set", "optimizer.table_learning_rate=1e-9"]
    done = retrain(workplace, *bad, "--epochs", "1", "--gate", "column=0", "--gate", "retrieval=0")
    assert isinstance(done.exception, GateRefused) and done.exception.exit_status == 3
    assert "films@1 stays the champion" in str(done.exception) and "is short by" in str(done.exception)
    assert aliases(workplace) == {"champion": 1} and Registry(workplace / "registry").versions("films") == [1]
    [kept] = (workplace / "runs").glob("films-*")
    assert (kept / "refused").read_text() == "films", "to be removed by the next run"
    again = retrain(workplace, *bad, "--epochs", "1", "--gate", "column=0", "--gate", "retrieval=0")
    assert isinstance(again.exception, GateRefused) and str(again.exception) == str(done.exception)
    assert "nothing changed since" in again.output and "starting Ray" not in again.output
    [run, *_] = runs(workplace)
    assert (run.state, run.tries, run.reason) == ("refused", 2, str(done.exception))


@pytest.mark.slow
def test_a_table_that_was_cut_short_is_refused(workplace):
    grow(workplace, 100)
    done = retrain(workplace)
    assert isinstance(done.exception, GateRefused)
    assert "rows 100 (champion 240, least 120) is short by 20" in str(done.exception)
    assert "starting Ray" not in done.output, "what can be told before is told before"


@pytest.mark.slow
def test_a_column_of_the_champion_must_not_go_unless_the_gate_lets_it(workplace):
    text = (workplace / "films.yaml").read_text().replace("kind: nominal", "kind: multi")
    (workplace / "changed.yaml").write_text(text)
    done = retrain(workplace, "--schema", str(workplace / "changed.yaml"))
    assert isinstance(done.exception, GateRefused)
    assert "columns kept 6 (champion 7, least 7) is short by 1: provider was nominal and is multi" in str(
        done.exception
    )


@pytest.mark.slow
def test_two_retrainings_do_not_run_at_once(workplace):
    grow(workplace)
    with Lease(Registry(workplace / "registry"), "films"):
        done = retrain(workplace)
    assert isinstance(done.exception, LeaseTaken) and "films is being retrained" in str(done.exception)


@pytest.mark.slow
def test_with_when_drift_new_rows_alone_are_no_reason_to_train_and_moved_values_are(workplace):
    grow(workplace)
    (workplace / "retrain.yaml").write_text("when: drift\ngate: {least_rows: 1000}\n")
    for tries in (1, 2):
        done = retrain(workplace, "--config", str(workplace / "retrain.yaml"))
        assert done.exit_code == 0 and "starting Ray" not in done.output
        [run, _] = runs(workplace)
        assert (run.state, run.tries) == ("skipped", tries) and "no column has drifted" in run.reason
        assert [step.name for step in run.steps] == ["read", "drift"] and run.steps[1].figures["year"] < 0.1
    films = table(300)
    later = pc.add(films["year"], 10)
    pq.write_table(films.set_column(films.column_names.index("year"), "year", later), workplace / "films.parquet")
    done = retrain(workplace, "--config", str(workplace / "retrain.yaml"))
    # It would train now; the gate says before that the table is too small.
    assert isinstance(done.exception, GateRefused) and "number of rows 300 (least 1000)" in str(done.exception)
    assert runs(workplace)[0].steps[1].said.startswith("most in year")


HELD = [
    ("load", lambda path, _: path == "POST /v1/items"),
    ("backfill", lambda path, _: path.endswith("/backfill")),
    ("backfill", lambda path, _: path.startswith("GET /v1/jobs/")),
    ("shadow", lambda path, before: path == "POST /v1/similar" and before.count(path) == 7),
    ("promote", lambda path, _: path.endswith("/aliases/champion")),
    ("promote", lambda path, before: path.startswith("GET /v1/jobs/") and any("aliases" in p for p in before)),
]
"""A step, and the request of it that is never answered."""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_job_that_is_killed_or_fails_in_any_step_goes_on_there_and_ends_with_one_new_version(workplace, empty_redis):
    tolerant = [word for name in ("retrieval", "column", "rank", "overlap") for word in ("--gate", f"{name}=off")]
    with LiveService(workplace / "registry", empty_redis, model="films").up() as service:
        words = [str(workplace / "films.parquet"), "--registry", str(workplace / "registry"), "--url", service.url]
        with Client(service.url) as client:
            load_items(client, table(), client.call("GET", "/v1/models/films"))
            client.call("PUT", "/v1/items/by-api", {"genres": ["Drama"]})
        grow(workplace)

        def killed_when(reached) -> None:
            process = itemvec("retrain", *words, *tolerant)
            eventually(lambda: reached() or not process.is_alive(), 120)
            process.kill()
            process.join()
            assert process.exitcode == -signal.SIGKILL

        killed_when(lambda: list((workplace / "runs").glob("films-*/prepared")))
        [run, _] = runs(workplace)
        assert (run.state, run.steps[-1].name) == ("interrupted", "train")
        for step, held in HELD:
            service.hold(held)
            if step == "load":  # the training itself on the Ray that the tests share
                done = retrain(workplace, "--url", "http://127.0.0.1:9", *tolerant)
                assert "taking up an earlier run" in done.output and isinstance(done.exception, ServiceUnreachable)
                assert aliases(workplace) == {"champion": 1, "challenger": 2}
                [failed, _] = runs(workplace)
                assert (failed.state, failed.steps[-1].name, failed.steps[-1].state) == ("failed", "load", "failed")
                # And as if the kill had come when the version was published, but this was not written down yet.
                [run, _] = runs(workplace)
                steps = [one for one in run.steps if one.name not in {"publish", "load"}]
                store = Runs(Registry(workplace / "registry"))
                store.save(run.model_copy(update={"version": None, "steps": steps}))
            killed_when(service.reached.is_set)
            [now, _] = runs(workplace)
            assert (now.id, now.state, now.steps[-1].name) == (run.id, "interrupted", step)
        done = retrain(workplace, "--url", service.url, *tolerant)
        assert done.exit_code == 0 and "was published by an earlier try" in done.output, done.output
        [run, _] = runs(workplace)
        # Three tries before the service was up to it, then one for each request that was held but the first two.
        assert (run.state, run.tries, run.version) == ("promoted", 3 + len(HELD), 2)
        assert aliases(workplace) == {"champion": 2, "previous": 1}
        assert Registry(workplace / "registry").versions("films") == [1, 2]
        with Client(service.url) as client:
            eventually(lambda: client.call("GET", "/v1/models/films")["model"] == "films@2")
            assert client.call("GET", "/v1/models/films")["items"] == 301
            found = client.similar({"item": {"genres": ["Drama"]}, "k": 300}, "films")
            assert len(found["neighbors"]) == 300
        assert "nothing to do" in retrain(workplace, "--url", service.url, *tolerant).output


def test_without_a_champion_a_schema_is_needed(tmp_path):
    pq.write_table(table(), tmp_path / "films.parquet")
    done = retrain(tmp_path)
    assert isinstance(done.exception, ConfigError) and "--schema" in str(done.exception)
    done = retrain(tmp_path, "--name", SCHEMA.name)
    assert isinstance(done.exception, ConfigError) and "no champion" in str(done.exception)


def test_of_a_pattern_the_last_name_in_the_alphabet_is_the_newest(tmp_path):
    for day in ("2026-11-22", "2026-11-23", "2026-11-09"):
        (tmp_path / f"items-{day}.csv").touch()
    assert newest(f"{tmp_path}/items-*.csv") == f"{tmp_path}/items-2026-11-23.csv"
    assert newest("s3://bucket/items.csv") == "s3://bucket/items.csv"
    with pytest.raises(TableError, match="no table matches"):
        newest(f"{tmp_path}/films-*.csv")


def test_a_url_pattern_gives_a_url():
    import fsspec

    for day in (22, 23):
        fsspec.filesystem("memory").pipe_file(f"/exports/items-{day}.csv", b"id")
    assert newest("memory://exports/items-*.csv").endswith("exports/items-23.csv")
    assert newest("memory://exports/items-*.csv").startswith("memory://")


def test_what_is_too_old_is_neither_new_nor_named_nor_a_parent_nor_pinned(tmp_path):
    registry = Registry(tmp_path)
    for seed in range(1, 9):
        serving.publish(registry, seed)
    registry.promote("toys", 3)
    registry.promote("toys", 5)
    assert too_old(registry, "toys", keep=2) == [1, 2, 4, 6]
    assert too_old(registry, "toys", keep=2, pinned=(4,)) == [1, 2, 6]
    assert too_old(registry, "toys", keep=9) == []
    shutil.rmtree(registry.path("toys", 3))  # by hand, while it is the previous one
    assert too_old(registry, "toys", keep=2) == [1, 2, 4, 6]


def test_the_command_line_goes_over_the_file_of_a_retraining(tmp_path):
    (tmp_path / "retrain.yaml").write_text("table: a.csv\nkeep: 3\ngate: {column: 0.2, latency: off}\n")
    config = RetrainConfig.load(tmp_path / "retrain.yaml", {"table": "b.csv", "gate.column": 0.3})
    assert (config.table, config.keep, config.gate.column, config.gate.latency) == ("b.csv", 3, 0.3, None)
    with pytest.raises(ConfigError, match="overlapp: no such setting"):
        RetrainConfig.load(None, {"shadow.overlapp": 1})


def test_without_a_table_it_says_where_to_name_one():
    done = CliRunner().invoke(cli, ["retrain"])
    assert isinstance(done.exception, ConfigError) and "which table?" in str(done.exception)
