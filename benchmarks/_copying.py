"""A table of several Parquet files on its way to the mapped copy that training reads: by the driver alone, by tasks of
the Ray cluster, and by Ray Data, whose tasks write the same files."""

import logging
import shutil
import statistics
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import click
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks._large import write_films
from itemvec.schema import FeatureSchema
from itemvec.table import table_digest
from training import cluster
from training.config import ClusterConfig
from training.items import Items, opened

FILES = 10


def copy(films: Path, schema: FeatureSchema, rows: int, rounds: int, folder: Path) -> dict[str, float]:
    """Median seconds of each way, the digest of the table included; the ways take turns, and the first is not counted.
    Raises AssertionError where they do not give the same rows in the same order."""
    source = folder / "copied"
    source.mkdir()
    write_films(pq.read_table(films), rows // FILES, source / "0.parquet")
    for n in range(1, FILES):
        shutil.copyfile(source / "0.parquet", source / f"{n}.parquet")

    def ours(address: str | None) -> pa.Table:
        return Items.read(str(source), schema, (), _fresh(folder), address).table

    def ray_data() -> pa.Table:
        table_digest(str(source))
        return _by_ray_data(str(source), [schema.id, *(feature.name for feature in schema.features)], _fresh(folder))

    ways: dict[str, Callable[[], pa.Table]] = {
        "driver": lambda: ours(None), "tasks": lambda: ours("auto"), "Ray Data": ray_data,
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with cluster.connected(ClusterConfig()):
        for turn in range(rounds + 1):
            made = {}
            for name, way in ways.items():
                began = time.perf_counter()
                made[name] = way()
                if turn:
                    seconds[name].append(time.perf_counter() - began)
            if not turn:
                assert all(table.equals(made["driver"]) for table in made.values())
            shutil.rmtree(folder / "copies")
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, found in medians.items():
        click.echo(f"{name:10} {found:6.1f} s   {rows / found:12,.0f} rows/s")
    return medians


def _fresh(folder: Path) -> Path:
    made = folder / "copies" / uuid.uuid4().hex
    made.mkdir(parents=True)
    return made


def _by_ray_data(source: str, columns: list[str], folder: Path) -> pa.Table:
    import ray.data  # noqa: PLC0415 - takes seconds

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.execution_options.preserve_order = False, True

    def write(block: pa.Table) -> pa.Table:
        path = folder / f"{uuid.uuid4().hex}.part"
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, block.schema) as writer:
            writer.write_table(block)
        return pa.table({"path": [str(path)], "rows": [len(block)]})

    first = 0
    read = ray.data.read_parquet(source, columns=columns)
    for part in read.map_batches(write, batch_size=None, batch_format="pyarrow").iter_rows():
        Path(part["path"]).rename(folder / f"{first:012d}.arrow")
        first += part["rows"]
    return opened(folder)
