"""Training over two machines, which here are two Ray nodes on one."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from films import SCHEMA, table
from ray.cluster_utils import Cluster

from itemvec.registry import Registry

SMALL = ["--set", "encoder.hidden=[16]", "--set", "encoder.decoder_hidden=[16]", "--dim", "8", "--epochs", "2"]


@pytest.mark.slow
def test_two_workers_train_on_two_nodes_that_share_the_folder_of_runs(tmp_path: Path) -> None:
    """Each node has one CPU and a worker takes most of it, so no node can hold both."""
    pq.write_table(table(), tmp_path / "films.parquet")
    SCHEMA.save(tmp_path / "films.yaml")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        nodes.add_node(num_cpus=1)
        # A process of its own: this one may be connected to another cluster.
        done = subprocess.run(
            [
                sys.executable, "-m", "itemvec", "train", "films.parquet", "--schema", "films.yaml", "--registry", "r",
                "--ray-address", nodes.address, "--workers", "2", "--cpus-per-worker", "0.9", *SMALL,
            ],
            cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
    finally:
        nodes.shutdown()
    assert done.returncode == 0, done.stderr
    assert Registry(tmp_path / "r").load("films").manifest.lineage.table_rows == 240
