"""What the encode cache costs and saves: `python -m benchmarks.cache --out DIR` prints a table and leaves results.json.

Microseconds of an item, medians of rounds in which the ways take turns, over the films of `examples/` and an untrained
network (weights do not change the time), one thread. `break even` is the share of items that must be found again for
the way to be faster than no cache.
"""

import asyncio
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
import torch

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.schema import FeatureSchema
from itemvec.version import Encoding, Lineage, ModelVersion
from service import cache
from service.cache import CacheMode, EncodeCache
from service.redis_server import EmbeddedRedis
from service.store import Store

EXAMPLES = Path(__file__).parent.parent / "examples"
NETWORKS = {
    "small (2 layers of 128, dim 64)": EncoderConfig(dim=64, hidden=(128,)),
    "large (3 layers of 2048, dim 256)": EncoderConfig(dim=256, hidden=(2048, 2048)),
}
SIZES = (1, 8, 32, 256)
ROUNDS = 15


def make_version(config: EncoderConfig) -> tuple[ModelVersion, list[dict[str, Any]]]:
    table = pq.read_table(EXAMPLES / "movies.parquet")
    schema = FeatureSchema.load(EXAMPLES / "movies.schema.yaml")
    transform = FeatureTransform.fit(table, schema)
    encoder, decoder = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
    lineage = Lineage(table="movies.parquet", table_sha256="0" * 64, table_rows=0, train_rows=0, config={})
    rows = json.loads(json.dumps(table.to_pylist(), default=str))
    names = {feature.name for feature in schema.features}
    items = [{name: value for name, value in row.items() if name in names} for row in rows]
    return ModelVersion.make("movies", 1, transform, encoder, decoder, {}, lineage), items


async def measure(version: ModelVersion, items: Sequence[dict[str, Any]], url: str, size: int) -> dict[str, float]:
    """Microseconds of an item for each way."""

    async def compute(some: Sequence[Any], pointer: str) -> tuple[Encoding, float]:
        return version.encode(some, pointer), 0.0

    batches = [list(items[start : start + size]) for start in range(0, len(items) - size, size)]
    fresh = itertools.count()
    async with Store(url, timeout=5.0) as store:

        def cached(mode: CacheMode) -> EncodeCache:
            return EncodeCache(store, mode, 100_000)

        local, filled = cached("local"), cached("redis")
        for batch in batches:
            await local.encode(version, batch, "", compute)
            await filled.encode(version, batch, "", compute)
        await asyncio.sleep(0.2)

        def unseen(batch: list[Any]) -> list[Any]:
            return [{**item, "a column more": next(fresh)} for item in batch]

        ways: dict[str, tuple[Callable[[list[Any]], list[Any]], Callable[[], EncodeCache]]] = {
            "no cache": (unseen, lambda: cached("off")),
            "local, found": (list, lambda: local),
            "local, not found": (unseen, lambda: local),
            "redis, found there": (list, lambda: cached("redis")),
            "redis, not found": (unseen, lambda: cached("redis")),
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(ROUNDS):
            some = [batches[(number * 7 + i) % len(batches)] for i in range(max(2, 200 // size))]
            for way, (prepared, kept) in ways.items():
                asked = [prepared(batch) for batch in some]
                seconds = await _timed(kept(), version, asked, compute)
                times[way].append(seconds * 1e6 / (len(asked) * size))
    return {way: statistics.median(found) for way, found in times.items()}


async def _timed(kept: EncodeCache, version: ModelVersion, batches: list[Any], compute: cache.Compute) -> float:
    began = time.perf_counter()
    for batch in batches:
        await kept.encode(version, batch, "", compute)
    return time.perf_counter() - began


def break_even(cost: dict[str, float], mode: str, found: str) -> float:
    """The share h of items found at which h * found + (1 - h) * not found equals no cache; above 1 it never pays."""
    missed = cost[f"{mode}, not found"]
    return max(0.0, (missed - cost["no cache"]) / (missed - cost[found])) if missed > cost[found] else float("inf")


async def run(url: str) -> list[dict[str, Any]]:
    rows = []
    for network, config in NETWORKS.items():
        version, items = make_version(config)
        for size in SIZES:
            cost = await measure(version, items, url, size)
            rows.append(
                {
                    "network": network,
                    "items a request": size,
                    **cost,
                    "break even, local": break_even(cost, "local", "local, found"),
                    "break even, redis": break_even(cost, "redis", "redis, found there"),
                }
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    columns = [column for column in rows[0] if column != "network"]
    for network, group in itertools.groupby(rows, key=lambda row: row["network"]):
        click.echo(f"\n{network}: microseconds of an item")
        click.echo(" | ".join(columns))
        for row in group:
            told = [f"{row[c]:.0%}" if c.startswith("break") else f"{row[c]:.4g}" for c in columns]
            click.echo(" | ".join(text.rjust(len(column)) for text, column in zip(told, columns, strict=True)))


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for results.json.")
def main(out: Path) -> None:
    torch.set_num_threads(1)
    cache.CACHED_ITEMS = max(SIZES)  # what is measured is whether more should be looked up
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
        rows = asyncio.run(run(server.url))
    show(rows)
    out.mkdir(parents=True, exist_ok=True)
    found = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    (out / "results.json").write_text(json.dumps({**found, "rounds": ROUNDS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
