"""The vectors of a whole table as Parquet files, block by block: `itemvec embed-table`.

    OUT/_embedding.json      the model and the table that they are of
    OUT/part-000000.parquet  id, embedding: rows 0 to BLOCK - 1 of the table, and so on

A file is there whole or not at all, so the same command goes on after a kill with the blocks that are left. A block is
encoded where a process is free: here, or on any machine of a Ray cluster that reaches OUT and the registry.
"""

import json
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
from itemvec.errors import ConfigError, InvalidItem, SchemaMismatch
from itemvec.registry import Registry
from itemvec.table import BATCH
from itemvec.version import ModelVersion
from training import cluster as ray_cluster
from training.config import ClusterConfig
from training.ingest import ALONE, Items, ahead, opened, processes, written_whole

BLOCK: Final = BATCH
"""Rows of a file."""

ABOUT: Final = "_embedding.json"
COPY: Final = "_copy"
"""Readers of a folder of Parquet pass over names that begin so."""


@dataclass(frozen=True, slots=True)
class Block:
    """What a process needs to know to embed a part of the table."""

    copy: Path
    """The Arrow file of the table."""

    registry: str
    ref: str
    """The model, with its version."""

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
    table: str, registry: Registry, ref: str, out: Path, workers: int = 1, address: str | None = None,
    told: Callable[[int, int], None] = lambda _done, _all: None,
) -> Embedded:  # fmt: skip
    """By `workers` processes of this machine, or on the Ray cluster at `address`; a small table by this one process.

    `told` hears how many items of how many are done. Raises ConfigError where `out` holds the vectors of another model
    or table, SchemaMismatch where the table is not one that the model reads.
    """
    name, version = registry.resolve(ref)
    model = registry.load(f"{name}@{version}")
    items = Items.read(table, model.schema, (), out / COPY)
    _check(items.table, model, table)
    _claim(out, {"model": model.ref, "fingerprint": model.fingerprint, "table": items.digest, "rows_per_file": BLOCK})
    blocks = [
        Block(
            items.copy.resolve(),
            registry.url,
            model.ref,
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
    for count in _embedded(left, model, workers, address, items.table.num_rows):
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


def _embedded(
    blocks: Sequence[Block], model: ModelVersion, workers: int, address: str | None, rows: int
) -> Iterator[int]:
    """How many items each block has, as it is done."""
    if address is not None:
        yield from _on_ray(blocks, address)
    elif workers == 1 or rows <= ALONE:
        yield from (_write(block, model) for block in blocks)
    else:
        with processes(workers) as pool:
            yield from ahead(pool, _write_there, [(block,) for block in blocks])


def _on_ray(blocks: Sequence[Block], address: str) -> Iterator[int]:
    """A task a block, at most two a core waiting; Ray runs those of lost machines again, and each writes whole.

    Tasks and not actors of Ray Data: a worker process keeps the model for the blocks after (`_models`), so it is loaded
    once a process either way; tasks need no size of a pool and take cores as they become free or join; and the blocks
    are read from the mapped copy where they are encoded, while Ray Data would carry them through its object store.
    """
    import ray  # noqa: PLC0415 - takes seconds

    with ray_cluster.connected(ClusterConfig(address=address)):
        task = ray.remote(_write_there)
        most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        waiting: list[Any] = []
        for block in blocks:
            waiting.append(task.remote(block))
            if len(waiting) >= most:
                [first], waiting = ray.wait(waiting)
                yield ray.get(first)
        yield from ray.get(waiting)


_models: dict[tuple[str, str], ModelVersion] = {}


def _write_there(block: Block) -> int:
    key = (block.registry, block.ref)
    if key not in _models:
        torch.set_num_threads(1)  # there is a process a core
        _models[key] = Registry(block.registry).load(block.ref)
    return _write(block, _models[key])


def _write(block: Block, model: ModelVersion) -> int:
    schema = model.schema
    rows = opened(block.copy).slice(block.start, block.rows)
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
