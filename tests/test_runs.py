"""Run records and the lease: one retraining at a time, whatever happens to the process that does it."""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import serving
from click.testing import CliRunner

from itemvec import runs
from itemvec.cli import cli
from itemvec.errors import RegistryError, RunNotFound, RunUnreadable
from itemvec.registry import Registry
from itemvec.runs import KEPT, Lease, LeaseLost, LeaseTaken, Run, Runs, Step, new_run_id


@pytest.fixture(params=["folder", "object store"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> Registry:
    kept = Registry(tmp_path if request.param == "folder" else f"memory://{tmp_path.name}")
    serving.publish(kept, 1, "champion")
    return kept


def run_of(token: int, run_id: str = "20261123-031700-000000-0a1b") -> Run:
    now = datetime(2026, 11, 23, 3, 17, tzinfo=UTC)
    return Run(
        id=run_id, model="toys", state="running", table="toys.csv", champion=1, started_at=now, updated_at=now,
        by="here:1", token=token, steps=[Step(name="read", state="done", started_at=now, seconds=1.5, said="40 rows")],
    )  # fmt: skip


def test_a_lease_is_held_once_and_says_by_whom(registry: Registry) -> None:
    with Lease(registry, "toys") as lease:
        with pytest.raises(LeaseTaken, match=f"toys is being retrained .by .*:{os.getpid()}.; wait"):
            Lease(registry, "toys").__enter__()
        lease.check()
    with Lease(registry, "toys") as next_one:
        assert next_one.token == lease.token + 1


def test_of_many_that_come_at_once_one_gets_the_lease(registry: Registry) -> None:
    start, answers = threading.Barrier(8), queue.Queue[str]()
    all_came = threading.Event()

    def come() -> None:
        start.wait()
        try:
            with Lease(registry, "toys"):
                answers.put("taken")
                all_came.wait()
        except LeaseTaken:
            answers.put("refused")

    threads = [threading.Thread(target=come) for _ in range(8)]
    for thread in threads:
        thread.start()
    counted = Counter(answers.get(timeout=30) for _ in threads)
    all_came.set()
    for thread in threads:
        thread.join()
    assert counted == {"taken": 1, "refused": 7}


def test_who_stood_still_for_too_long_finds_that_another_took_over(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LEASE_SECONDS", 0.0)  # it is too late as soon as it is written
    with Lease(registry, "toys") as slow:
        monkeypatch.undo()
        with Lease(registry, "toys") as quick:
            quick.check()
            with pytest.raises(LeaseLost, match="another process took over the retraining of toys"):
                slow.check()


def test_a_registry_that_did_not_answer_once_costs_nobody_the_lease(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LEASE_SECONDS", 0.06)  # a beat each 10 ms
    beats, well = [], threading.Event()

    class Flaky:
        """The registry's root, of which every other beat is lost."""

        def __getattr__(self, name: str) -> Any:
            return getattr(registry.root, name)

        def replace(self, name: str, file: str, content: bytes) -> None:
            beats.append(file)
            if len(beats) % 2:
                raise RegistryError("cannot use the registry: it did not answer in time")
            registry.root.replace(name, file, content)
            if len(beats) > 4:
                well.set()

    with Lease(registry, "toys") as lease:
        monkeypatch.setattr(lease, "_root", Flaky())
        assert well.wait(30)
        lease.check()


def test_the_lease_of_a_killed_process_of_this_machine_is_free_at_once(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    serving.publish(registry, 1, "champion")
    holds = (
        "import sys, time; from itemvec.registry import Registry; from itemvec.runs import Lease\n"
        "with Lease(Registry(sys.argv[1]), 'toys'): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", holds, str(tmp_path)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(LeaseTaken, match=str(holder.pid)):
            Lease(registry, "toys").__enter__()
        holder.kill()
        holder.wait()
    with Lease(registry, "toys") as lease:
        assert lease.token == 2


def test_a_holder_of_another_machine_is_waited_for(registry: Registry) -> None:
    claim = {"by": "elsewhere:7", "place": "elsewhere", "pid": 7, "until": 4e9}
    registry.root.replace("toys", "lease/7.json", json.dumps(claim).encode())
    with pytest.raises(LeaseTaken, match="elsewhere:7"):
        Lease(registry, "toys").__enter__()
    registry.root.replace("toys", "lease/7.json", json.dumps(claim | {"until": 1e9}).encode())
    with Lease(registry, "toys") as lease:
        assert lease.token == 8
        assert registry.root.files("toys", "lease") == ["8.json"]


def test_a_record_is_read_as_it_was_written_and_one_whose_process_is_gone_is_interrupted(registry: Registry) -> None:
    store = Runs(registry)
    with Lease(registry, "toys") as lease:
        run = run_of(lease.token)
        store.save(run)
        assert store.get(run.id) == run
    found = store.get(run.id)
    assert (found.state, found.steps) == ("interrupted", run.steps)
    with pytest.raises(RunNotFound, match="itemvec runs list"):
        store.get("20261123-031700-000000-ffff")
    with pytest.raises(RunNotFound):
        store.get("../aliases")


def test_a_record_that_cannot_be_read_hides_no_other(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    runs, spoilt = Runs(registry), "20261123-031700-000000-0a1c"
    runs.save(run_of(1))
    registry.root.replace("toys", f"runs/{spoilt}.json", b"{}")
    assert [run.id for run in runs.newest()] == [run_of(1).id]
    assert f"the run record toys/runs/{spoilt}.json cannot be read: id Field required" in caplog.text
    with pytest.raises(RunUnreadable, match=spoilt):
        runs.get(spoilt)


def test_the_newest_records_are_kept(registry: Registry) -> None:
    store = Runs(registry)
    ids = [f"20261123-{i:06d}-0000" for i in range(KEPT + 2)]
    for run_id in ids:
        store.save(run_of(1, run_id))
    store.forget("toys")
    assert [run.id for run in store.of("toys")] == ids[:1:-1]
    assert [run.id for run in store.newest(2)] == ids[:-3:-1]


def test_ids_are_in_the_order_of_time_and_no_two_are_alike() -> None:
    ids = [new_run_id() for _ in range(20)]
    assert len(set(ids)) > 1 and [i[:15] for i in ids] == sorted(i[:15] for i in ids)


def test_the_commands_list_and_show_runs(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    serving.publish(registry, 1, "champion")
    words = ["--registry", str(tmp_path)]
    nothing = CliRunner().invoke(cli, ["runs", "list", *words])
    assert nothing.exit_code == 1 and "itemvec retrain" in nothing.output
    Runs(registry).save(run := run_of(1))
    listed = CliRunner().invoke(cli, ["runs", "list", *words])
    assert listed.exit_code == 0 and run.id in listed.output and "interrupted" in listed.output
    shown = CliRunner().invoke(cli, ["runs", "show", run.id, *words])
    assert "40 rows" in shown.output and "1.5" in shown.output
    as_json = CliRunner().invoke(cli, ["runs", "show", run.id, "--json", *words])
    assert json.loads(as_json.output)["steps"][0]["said"] == "40 rows"


def test_a_version_that_an_alias_names_cannot_be_removed_and_a_removed_number_is_not_used_again(
    registry: Registry,
) -> None:
    serving.publish(registry, 2)
    serving.publish(registry, 3)
    with pytest.raises(runs.RegistryError, match="toys@1 is the champion"):
        registry.remove("toys", 1)
    registry.remove("toys", 3)
    assert registry.versions("toys") == [1, 2]
    assert serving.publish(registry, 4) == 4
