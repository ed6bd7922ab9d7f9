"""Training over two machines, which here are two Ray nodes on one."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from films import table
from ray.cluster_utils import Cluster
from realservice import eventually
from s3 import BUCKET, served
from test_run import films

from itemvec.registry import Registry
from training.cluster import OWN, environment
from training.items import opened

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

EPOCHS = 60
SETTINGS = {
    "epochs": EPOCHS, "patience": EPOCHS, "checkpoint_seconds": 0.2, "batch_size": 64, "encoder.dim": 8,
    "encoder.hidden": [16], "encoder.decoder_hidden": [16],
}  # fmt: skip


READ_BY_ALL = """
from pathlib import Path

from training import items
from itemvec.cli import cli

copied = items._copied

def counted(*given):
    with Path(__file__).with_name("copied-by-the-driver").open("a") as file:
        file.write(".")
    return copied(*given)

items._copied, items.ALONE, items.PART = counted, 0, 0
cli()
"""
"""The command, for which every table is one that all machines copy."""


@pytest.fixture(scope="module")
def bucket() -> Iterator[s3fs.S3FileSystem]:
    with pytest.MonkeyPatch.context() as patch, served(patch) as files:
        yield files


@pytest.fixture(scope="module")
def address(bucket: s3fs.S3FileSystem) -> Iterator[str]:
    """Of a cluster of two nodes with one CPU each, to which this process does not connect."""
    with environment(OWN):
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            nodes.add_node(num_cpus=1)
            yield nodes.address
        finally:
            nodes.shutdown()


def descendants(ancestor: int, name: str) -> list[int]:
    """Processes below `ancestor` whose command line has `name` in it."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if name in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile

    def line(pid: int) -> set[int]:
        return set() if pid not in parents else {pid} | line(parents[pid])

    return [pid for pid in found if ancestor in line(pid)]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_workers_on_two_nodes_go_on_from_their_checkpoint_when_the_driver_or_one_of_them_is_killed(
    address: str, bucket: s3fs.S3FileSystem, tmp_path: Path
) -> None:
    """A worker takes most of a node, so no node can hold both; and after a kill both rooms have to be free again. The
    table lies in a bucket: the driver reads one of its files and tasks the others."""
    (tmp_path / "read_by_all.py").write_text(READ_BY_ALL)
    for n in range(3):
        with bucket.open(f"{BUCKET}/films/{n}.parquet", "wb") as file:
            pq.write_table(table().slice(80 * n, 80), file)
    words = [sys.executable, str(tmp_path / "read_by_all.py"), "train", f"s3://{BUCKET}/films", *films(tmp_path)[1:]]
    words += ["--ray-address", address, "--workers", "2"]
    words += ["--cpus-per-worker", "0.9", *(f"--set={name}={value}" for name, value in SETTINGS.items())]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        saved = "runs/films-*/ray/checkpoint_manager_snapshot.json"
        eventually(lambda: first.poll() is not None or list(tmp_path.glob(saved)), 120)
        first.kill()
        assert first.wait() == -signal.SIGKILL, first.stderr.read()
    [progress] = tmp_path.glob("runs/films-*/progress.jsonl")
    told = tmp_path / "told"
    told.hardlink_to(progress)  # the run's folder is removed at its end

    def epochs() -> list[int]:
        lines = [line for line in told.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [m["epoch"] for m in map(json.loads, lines) if "train" in m]

    before = len(epochs())
    with (tmp_path / "said").open("w+") as said, subprocess.Popen(words, stdout=said, stderr=said) as second:
        eventually(lambda: second.poll() is not None or len(epochs()) > before + 2, 120)
        workers = descendants(os.getpid(), "RayTrainWorker")
        assert len(workers) == 2, (tmp_path / "said").read_text()
        os.kill(workers[0], signal.SIGKILL)
        assert second.wait(200) == 0, (tmp_path / "said").read_text()
    assert "taking up an earlier run that did not end" in (tmp_path / "said").read_text()
    model = Registry(tmp_path / "registry").load("films")
    assert model.manifest.lineage.table_rows == 240
    assert epochs()[-1] == len(model.evaluation["training"]["history"]) == EPOCHS
    [copy] = {file.parent for file in tmp_path.glob("runs/tables/*/*/*.arrow")}
    assert opened(copy).equals(table()) and len(list(copy.iterdir())) == 3
    assert (tmp_path / "copied-by-the-driver").read_text() == "."
    again = [after for one, after in pairwise(epochs()) if after != one + 1]
    assert len(again) in (1, 2) and min(again) > 1, "back to a checkpoint, and never to the beginning"
