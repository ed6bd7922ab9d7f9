"""What the store costs over Redis alone: `python -m benchmarks.store --out DIR` prints tables and leaves results.json.

Load: items a second of a bulk `Store.put` against plain redis-py that sends the very same writes (two HSETs an item, in
pipelines of 512) to the same server. Search: microseconds of the neighbors of a stored item, against the bare HGET and
FT.SEARCH. Medians of rounds in which the two take turns, vectors of 64 numbers, one client, unix socket.
"""

import asyncio
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import redis
from numpy.typing import NDArray
from redis.asyncio import Redis

from service.index import Mode
from service.redis_server import EmbeddedRedis
from service.store import Store

DIM = 64
K = 10
BATCH = 4096
ROUNDS = 7

Vectors = NDArray[np.float32]
RAW = json.dumps(
    {"title": "A film of some years ago", "genres": ["Drama", "Comedy"], "year": 1994, "rating": 7.3}
).encode()


def vectors(count: int) -> Vectors:
    found = np.random.default_rng(0).standard_normal((count, DIM)).astype(np.float32)
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
                    await store.ensure_index("m", "aa", DIM)
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


async def search(url: str, mode: Mode, items: int) -> dict[str, Any]:
    """Microseconds at p50 and p99 of the neighbors of an item by its id."""
    with redis.Redis.from_url(url) as admin:
        admin.flushall()
    matrix = vectors(items)
    async with Store(url, index=mode) as store, Redis.from_url(url, protocol=3) as client:
        await store.ensure_index("m", "aa", DIM)
        await store.put("m", [str(i) for i in range(items)], [b"{}"] * items, {"aa": matrix})
        await store.search("m", "aa", matrix[0], K)  # an exact index is read into memory

        async def by_store(item_id: str) -> None:
            [vector] = await store.get_vectors("m", "aa", [item_id])
            assert vector is not None
            assert len(await store.search("m", "aa", vector, K, exclude=[item_id])) == K

        effort = " EF_RUNTIME 100" if mode == "hnsw" else ""
        keys = [key.decode() async for key in client.scan_iter("iv:vec:*", count=1000)]
        key_of = {key.rpartition(":")[2]: key for key in keys}

        async def bare(item_id: str) -> None:
            vector = await client.execute_command("HGET", key_of[item_id], "v")
            await client.execute_command(
                "FT.SEARCH", "iv:idx:m:aa:1", f"*=>[KNN {K + 1} @v $q{effort} AS d]", "RETURN", 1, "d",
                "LIMIT", 0, K + 1, "DIALECT", 2, "PARAMS", 2, "q", vector,
            )  # fmt: skip

        ways: dict[str, Callable[[str], Awaitable[None]]] = {"store": by_store}
        if mode != "exact":
            ways["redis"] = bare
        times: dict[str, list[float]] = {who: [] for who in ways}
        for number in range(1000):
            for who, way in ways.items():
                began = time.perf_counter()
                await way(str(number % items))
                times[who].append((time.perf_counter() - began) * 1e6)
    told = {f"{who} {p}": float(np.percentile(t, int(p[1:]))) for who, t in times.items() for p in ("p50", "p99")}
    return {"mode": mode, "items": items, **told}


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for results.json.")
@click.option("--items", default=20_000, show_default=True, help="Items in the store that is searched.")
def main(out: Path, items: int) -> None:
    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
        loads = [asyncio.run(load(server.url, mode)) for mode in ("flat", "hnsw", "exact")]
        click.echo("load, items a second\nmode   store    redis    share")
        for row in loads:
            click.echo(f"{row['mode']:6} {row['store']:8.0f} {row['redis']:8.0f} {row['share']:6.0%}")
        searches = [asyncio.run(search(server.url, mode, items)) for mode in ("flat", "hnsw", "exact")]
        click.echo(f"\nneighbors by id among {items:,} items, microseconds")
        for row in searches:
            told = [f"{name} {value:.0f}" for name, value in row.items() if name not in {"mode", "items"}]
            click.echo(f"{row['mode']:6} " + ", ".join(told))
    out.mkdir(parents=True, exist_ok=True)
    machine = {"machine": platform.platform(), "python": platform.python_version(), "redis-py": redis.__version__}
    (out / "results.json").write_text(json.dumps({**machine, "load": loads, "search": searches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
