"""The vectors of a whole table as Parquet files, block by block: `itemvec embed-table`.

    OUT/_embedding.json      the model and the table that they are of
    OUT/part-000000.parquet  id, embedding: rows 0 to BLOCK - 1 of the table, and so on

A file is there whole or not at all, so the same command goes on after a kill with the blocks that are left. Actors of
Ray Data encode them, on this machine or on all of a cluster that reach OUT and the registry. An actor loads the model
once, is told which rows to encode, and reads them from the mapped copy, so that no row passes through Ray.
"""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet
import torch

from itemvec.check import id_errors, require_columns
from itemvec.errors import ConfigError, InvalidItem, ItemvecError, SchemaMismatch
from itemvec.registry import Registry
from itemvec.table import BATCH
from itemvec.version import ModelVersion
from training import cluster as ray_cluster
from training.config import ClusterConfig
from training.items import Items, opened, written_whole

BLOCK: Final = BATCH
"""Rows of a file."""

ALONE: Final = 500_000
"""Rows up to which one process is done before actors have started."""

QUIET: Final = {"RAY_BACKEND_LOG_LEVEL": "fatal"}
"""Ray calls it an error that its own actors of Ray Data can be started again."""

ABOUT: Final = "_embedding.json"
COPY: Final = "_copy"
"""Readers of a folder of Parquet pass over names that begin so."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a process needs to know to embed a part of the table."""

    copy: Path
    """The mapped copy of the table."""

    start: int
    """Its first row."""

    rows: int
    """How many there are."""

    path: Path
    """The file to write."""


@dataclass(frozen=True, slots=True)
class Embedded:
    model: str
    items: int
    done_before: int
    """Items whose file an earlier run wrote."""

    seconds: float
    """Of encoding and writing the others."""


def embed_table(
    table: str, registry: Registry, ref: str, out: Path, workers: int | None = None, address: str | None = None,
    told: Callable[[int, int], None] = lambda _done, _all: None,
) -> Embedded:  # fmt: skip
    """By `workers` actors, one a core if not said otherwise, on the Ray cluster at `address` or on a Ray of our own; a
    small table without an address by this process.

    `told` hears how many items of how many are done. Raises ConfigError where `out` holds the vectors of another model
    or table, SchemaMismatch where the table is not one that the model reads.
    """
    name, version = registry.resolve(ref)
    model = registry.load(f"{name}@{version}")
    items = Items.read(table, model.schema, (), out / COPY, address)
    about = {"model": model.ref, "fingerprint": model.fingerprint, "table": items.digest, "rows_per_file": BLOCK}
    try:
        _check(items.table, model, table)
        _claim(out, about)
    except ItemvecError:
        shutil.rmtree(out / COPY, ignore_errors=True)  # a run that is cut short leaves it to the next one
        raise
    blocks = [
        Block(
            items.copy.resolve(),
            start,
            min(BLOCK, items.table.num_rows - start),
            out.resolve() / f"part-{n:06d}.parquet",
        )
        for n, start in enumerate(range(0, items.table.num_rows, BLOCK))
    ]
    left = [block for block in blocks if not block.path.exists()]
    before = items.table.num_rows - sum(block.rows for block in left)
    began, done = time.monotonic(), before
    told(done, items.table.num_rows)
    alone = address is None and items.table.num_rows <= ALONE
    here = (_write(block, model) for block in left)
    for count in here if alone else _on_ray(left, registry, model, workers, address):
        done += count
        told(done, items.table.num_rows)
    shutil.rmtree(out / COPY, ignore_errors=True)
    return Embedded(model.ref, done, before, time.monotonic() - began)


def _check(table: pa.Table, model: ModelVersion, source: str) -> None:
    schema = model.schema
    require_columns(table, [schema.id, *(feature.name for feature in schema.features)])
    if errors := id_errors(table, schema.id):
        raise SchemaMismatch(source, errors)


def _claim(out: Path, about: dict[str, Any]) -> None:
    path = out / ABOUT
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != about:
        there = json.loads(path.read_text(encoding="utf-8"))
        raise ConfigError(
            f"{out} holds the vectors of {there['model']} ({there['fingerprint'][:12]}) on a table with digest "
            f"{there['table'][:12]}, and not of {about['model']} on this one: name another folder, or remove it"
        )
    if not path.exists():
        with written_whole(path) as part:
            part.write_text(json.dumps(about, indent=1), encoding="utf-8")


def _on_ray(
    blocks: Sequence[Block], registry: Registry, model: ModelVersion, workers: int | None, address: str | None
) -> Iterator[int]:
    """How many items each block has, as it is done. What a lost machine had is done again elsewhere."""
    if not blocks:
        return
    import ray  # noqa: PLC0415 - takes seconds
    import ray.data  # noqa: PLC0415

    url = registry.url if "://" in registry.url else str(Path(registry.url).resolve())
    told = [{"copy": str(b.copy), "start": b.start, "rows": b.rows, "path": str(b.path)} for b in blocks]
    with ray_cluster.environment(QUIET), ray_cluster.connected(ClusterConfig(address=address)):
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False  # ours counts items, and not blocks
        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        size = min(workers or max(cores, 1), len(blocks))
        done = ray.data.from_items(told, override_num_blocks=len(told)).map_batches(
            _Embedder, fn_constructor_args=(url, model.ref), batch_size=1, num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=size),
        )  # fmt: skip
        yield from (row["items"] for row in done.iter_rows())


class _Embedder:
    def __init__(self, registry: str, ref: str) -> None:
        torch.set_num_threads(1)  # there is an actor a core
        self._model = Registry(registry).load(ref)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        """Of one block."""
        [copy], [start], [rows], [path] = (batch[name].tolist() for name in ("copy", "start", "rows", "path"))
        return {"items": [_write(Block(Path(copy), start, rows, Path(path)), self._model)]}


def _write(block: Block, model: ModelVersion) -> int:
    schema = model.schema
    rows = opened(block.copy, block.start, block.rows)
    try:
        vectors = model.encode_arrow(rows.select([feature.name for feature in schema.features])).vectors
    except InvalidItem as invalid:
        raise SchemaMismatch(f"rows from {block.start}", [str(error) for error in invalid.errors[:5]]) from None
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    ids = rows.column(schema.id).cast(pa.string()).combine_chunks()
    about = {"model": model.ref, "fingerprint": model.fingerprint}
    with written_whole(block.path) as part:
        pa.parquet.write_table(pa.table({"id": ids, "embedding": embedding}).replace_schema_metadata(about), part)
    return block.rows
