"""What the store costs over Redis alone: `python -m benchmarks.store --out DIR` prints tables and leaves results.json.

Load: items a second of a bulk `Store.put` against plain redis-py that sends the very same writes (two HSETs an item, in
pipelines of 512) to the same server. Search: microseconds of the neighbors of a stored item, against the bare HGET and
FT.SEARCH; with recall@10, a filter that leaves a hundredth, and memory. Medians of rounds in which the two take turns,
vectors of 64 numbers, one client, unix socket. A graph of a million items takes some ten minutes to fill.
"""

import asyncio
import contextlib
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import redis
from numpy.typing import NDArray
from redis.asyncio import Redis

from itemvec.errors import StoreUnavailable
from itemvec.schema import FeatureSchema
from service import attributes
from service.conditions import Eq, resolve
from service.index import Mode, Neighbor, search_command
from service.keys import Space, bucket_of
from service.redis_server import EmbeddedRedis
from service.store import Encoded, Store

DIM = 64
K = 10
BATCH = 4096
ROUNDS = 7
LABELS = 100
QUERIES = 500
SCHEMA = FeatureSchema.from_yaml("{name: m, id: id, features: {label: {kind: nominal, filterable: true}}}")

Vectors = NDArray[np.float32]
RAW = json.dumps(
    {"title": "A film of some years ago", "genres": ["Drama", "Comedy"], "year": 1994, "rating": 7.3}
).encode()


def vectors(count: int) -> Vectors:
    found = np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def like_films(count: int) -> Vectors:
    """What an encoder makes of a catalogue: 17,470 films in 16 of the 64 directions, each many times, with noise."""
    dice = np.random.default_rng(0)
    films = dice.standard_normal((17_470, 16)).astype(np.float32) @ dice.standard_normal((16, DIM)).astype(np.float32)
    films /= np.linalg.norm(films, axis=1, keepdims=True)
    found = films[dice.integers(len(films), size=count)]
    found += 0.05 * dice.standard_normal((count, DIM), np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


async def plain_put(client: "Redis", items: list[str], matrix: Vectors) -> None:
    for start in range(0, len(items), 512):
        pipe = client.pipeline(transaction=False)
        for i in range(start, min(start + 512, len(items))):
            pipe.execute_command("HSET", f"iv:item:{{m.b00}}:{items[i]}", "raw", RAW, "rev", f"0.{i}")
            pipe.execute_command("HSET", f"iv:vec:m:aa:{{m.b00}}:{items[i]}", "v", matrix[i].tobytes())
        await pipe.execute()


async def load(url: str, mode: Mode) -> dict[str, Any]:
    """Items a second, each round into an empty index."""
    matrix, ids = vectors(BATCH), [f"item {i}" for i in range(BATCH)]
    rates: dict[str, list[float]] = {"store": [], "redis": []}
    with redis.Redis.from_url(url) as admin:
        for _ in range(ROUNDS):
            for who, found in rates.items():
                admin.flushall()
                async with Store(url, index=mode) as store, Redis.from_url(url, protocol=3) as client:
                    await store.indexes.ensure("m", "aa", DIM)
                    await store.mark_live("m", "aa", "m@1")
                    await client.ping()
                    began = time.perf_counter()
                    if who == "store":
                        await store.put("m", ids, [RAW] * BATCH, {"aa": matrix})
                    else:
                        await plain_put(client, ids, matrix)
                    found.append(BATCH / (time.perf_counter() - began))
    medians = {who: statistics.median(found) for who, found in rates.items()}
    return {"mode": mode, **medians, "share": medians["store"] / medians["redis"]}


async def fill(store: Store, matrix: Vectors) -> None:
    """Each item has a label, one of a hundred, that a filter can ask for: it has nothing to do with the vector."""
    columns = attributes.filterable(SCHEMA)
    fields = attributes.fields(columns, [{"label": str(label)} for label in range(LABELS)])
    await store.indexes.ensure("m", "aa", DIM, fields=attributes.index_fields(SCHEMA))
    for start in range(0, len(matrix), BATCH):
        some = range(start, min(start + BATCH, len(matrix)))
        encoded = Encoded(matrix[start : start + BATCH], attributes=[fields[i % LABELS] for i in some])
        await store.put("m", [str(i) for i in some], [b"{}"] * len(some), {"aa": encoded})
    while True:  # until an exact index is read into memory
        with contextlib.suppress(StoreUnavailable):
            await store.search("m", "aa", matrix[0], K)
            return
        await asyncio.sleep(0.2)


def nearest(matrix: Vectors, item: int, label: int | None) -> set[str]:
    """By comparing every vector."""
    rows = np.arange(len(matrix)) if label is None else np.arange(label, len(matrix), LABELS)
    rows = rows[rows != item]
    scores = matrix[rows] @ matrix[item]
    return {str(row) for row in rows[np.argpartition(-scores, K)[:K]]}


async def search(url: str, mode: Mode, items: int) -> list[dict[str, Any]]:
    """Microseconds at p50 and p99 of the neighbors of an item by its id, without a filter and with one that leaves a
    hundredth; recall@10 against comparing every vector."""
    matrix, rows = like_films(items), list[dict[str, Any]]()
    async with (
        Store(url, index=mode, timeout=10.0, bulk_timeout=60.0) as store,
        Redis.from_url(url, protocol=3) as bare,
    ):
        began = time.perf_counter()
        await fill(store, matrix)
        filled = time.perf_counter() - began
        memory = (await bare.info("memory"))["used_memory"] / items
        index, space = await store.indexes.get("m", "aa"), Space("m")
        asked = np.random.default_rng(1).integers(items, size=QUERIES).tolist()
        for filtered in (False, True):
            ways = ["store"] if mode == "exact" else ["store", "redis"]
            times: dict[str, list[float]] = {way: [] for way in ways}
            hits = 0
            for item in asked:
                label = (item + 50) % LABELS if filtered else None
                where = None if label is None else Eq("label", str(label))
                test = None if where is None else resolve(where, SCHEMA)
                key = str(item).encode()
                found: list[Neighbor] | None = None
                ways.reverse()  # the second one finds what it needs in the processor's caches
                for way in ways:
                    began = time.perf_counter()
                    if way == "store":
                        found = await store.search_like("m", "aa", str(item), K, where=where, schema=SCHEMA)
                    else:
                        vector = await bare.hget(space.vector_prefix("aa", bucket_of(key)) + key, "v")  # type: ignore[misc]
                        await bare.execute_command(*search_command(space, "aa", index, vector, K + 1, test, 10_000))
                    times[way].append((time.perf_counter() - began) * 1e6)
                hits += len({neighbor.id for neighbor in found or ()} & nearest(matrix, item, label))
            told = {f"{who} p{p}": float(np.percentile(t, p)) for who, t in times.items() for p in (50, 99)}
            row = {
                "mode": mode,
                "items": items,
                "filter": "1 %" if filtered else "none",
                "recall": hits / (K * QUERIES),
            }
            rows.append(row | told | {"bytes an item": memory, "filled in s": filled})
    return rows


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for results.json.")
@click.option("--items", default="10000,100000,1000000", show_default=True, help="Sizes of the store that is searched.")
@click.option("--modes", default="flat,hnsw,exact", show_default=True, help="Of its index.")
@click.option("--load/--no-load", "loads_too", default=True, help="Measure writes too.")
def main(out: Path, items: str, modes: str, loads_too: bool) -> None:
    wanted = [cast("Mode", mode) for mode in modes.split(",")]
    loads: list[dict[str, Any]] = []
    searches: list[dict[str, Any]] = []
    if loads_too:
        with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
            loads = [asyncio.run(load(server.url, mode)) for mode in wanted]
        click.echo("load, items a second\nmode   store    redis    share")
        for row in loads:
            click.echo(f"{row['mode']:6} {row['store']:8.0f} {row['redis']:8.0f} {row['share']:6.0%}")
    click.echo("\nneighbors by id, microseconds")
    for size in map(int, items.split(",")):
        for mode in wanted:
            with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
                rows = asyncio.run(search(server.url, mode, size))
            searches += rows
            for row in rows:
                click.echo(", ".join(f"{n} {v:,.3g}" if isinstance(v, float) else f"{n} {v}" for n, v in row.items()))
    out.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.platform(), "python": platform.python_version(), "redis-py": redis.__version__}
    (out / "results.json").write_text(json.dumps({**machine, "load": loads, "search": searches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
