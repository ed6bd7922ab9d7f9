"""Films that are new into the item store: over HTTP, by the store alone, and by Redis alone that takes the same writes.

Redis alone is sent two HSETs an item with all that the store keeps of it, in pipelines of 512: by redis-py, as whoever
writes Python would, and as bytes that were packed before, which is what the server can take. Each way has four requests
under way, and an index of its own that grows as those of the others do: a graph takes longer the more films it has.
"""

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import hiredis
import numpy as np
import orjson
import pyarrow as pa
from redis.asyncio import Redis

from benchmarks._load import Caller, Target
from itemvec.version import ModelVersion
from service import attributes
from service.arrow import STREAM
from service.index import Mode
from service.keys import Space, bucket_of
from service.redis_server import EmbeddedRedis
from service.store import Encoded, Store

BULK: Final = 1024
"""Films a request."""

BATCHES: Final = 16
"""Requests of a round."""

PIPELINE: Final = 512
"""Films of one pipeline of Redis alone."""

AT_ONCE: Final = 4
PATH: Final = "/v1/items"
Row = dict[str, Any]
Round = Callable[[int], float]
"""Writes all films under ids of this round; gives the seconds it took."""


class Films:
    def __init__(self, version: ModelVersion, items: Sequence[Row], columns: pa.Table) -> None:
        self.version = version
        self._columns = columns.slice(0, BULK * BATCHES)
        self._items = items[: BULK * BATCHES]
        self._raws = [orjson.dumps(item) for item in self._items]
        self._vectors = version.encode_arrow(self._columns).vectors
        self._fields = attributes.fields(attributes.filterable(version.schema), self._items)

    def __len__(self) -> int:
        return len(self._items)

    def ids(self, number: int, start: int, size: int) -> list[str]:
        return [f"{number} {i}" for i in range(start, min(start + size, len(self)))]

    def json_bodies(self, number: int) -> list[bytes]:
        bodies = []
        for start in range(0, len(self), BULK):
            keyed = zip(self.ids(number, start, BULK), self._items[start : start + BULK], strict=True)
            bodies.append(json.dumps({"items": [{**item, "id": key} for key, item in keyed]}).encode())
        return bodies

    def arrow_bodies(self, number: int) -> list[bytes]:
        bodies = []
        for start in range(0, len(self), BULK):
            ids = pa.array(self.ids(number, start, BULK))
            bodies.append(stream_of(self._columns.slice(start, BULK).append_column("id", ids)))
        return bodies

    async def put(self, store: Store, number: int, start: int) -> None:
        part = slice(start, start + BULK)
        encoded = Encoded(self._vectors[part], attributes=self._fields[part])
        ids = self.ids(number, start, BULK)
        await store.put(self.version.name, ids, self._raws[part], {self.version.fingerprint: encoded})

    def commands(self, number: int, start: int) -> list[Sequence[Any]]:
        """What Redis alone is sent for one pipeline."""
        space, found = Space(self.version.name), list[Sequence[Any]]()
        for i, item_id in enumerate(self.ids(number, start, PIPELINE), start):
            key, fields = item_id.encode(), self._fields[i]
            bucket = bucket_of(key)
            found.append(("HSET", space.item_prefix(bucket) + key, "raw", self._raws[i], "rev", f"{number}.{i}"))
            kept: list[Any] = ["v", self._vectors[i].tobytes(), "a", orjson.dumps(fields)]
            for pair in fields.items():
                kept += pair
            found.append(("HSET", space.vector_prefix(self.version.fingerprint, bucket) + key, *kept))
        return found

    async def index(self, store: Store) -> None:
        name, fingerprint, dim = self.version.name, self.version.fingerprint, self.version.dim
        await store.indexes.ensure(name, fingerprint, dim, fields=attributes.index_fields(self.version.schema))
        await store.mark_live(name, fingerprint, self.version.ref)


def stream_of(table: pa.Table) -> bytes:
    """As an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def over_http(films: Films, port: int, content_type: str) -> Round:
    target = Target(port, PATH, content_type)

    def send(bodies: Sequence[bytes]) -> None:
        with Caller(target) as caller:
            for body in bodies:
                assert caller.post(body) is not None, "a bulk upsert was refused"

    bodies = films.arrow_bodies if content_type == STREAM.decode() else films.json_bodies
    send(bodies(-1)[:1])  # to warm it
    return lambda number: _timed(send, bodies(number))


@contextmanager
def by_store(films: Films, mode: Mode) -> Iterator[Round]:
    with _redis(films, mode) as url:

        async def writes(number: int) -> float:
            async with Store(url, index=mode) as store:
                await store.live(films.version.name)
                return await _awaited(lambda start: films.put(store, number, start), range(0, len(films), BULK))

        yield lambda number: asyncio.run(writes(number))


@contextmanager
def by_redis_py(films: Films, mode: Mode) -> Iterator[Round]:
    with _redis(films, mode) as url:

        async def writes(number: int) -> float:
            async with Redis.from_url(url, protocol=3) as client:
                await client.ping()

                async def send(commands: Sequence[Sequence[Any]]) -> None:
                    pipe = client.pipeline(transaction=False)
                    for command in commands:
                        pipe.execute_command(*command)
                    await pipe.execute()

                all_of_them = [films.commands(number, start) for start in range(0, len(films), PIPELINE)]
                return await _awaited(send, all_of_them)

        yield lambda number: asyncio.run(writes(number))


@contextmanager
def packed(films: Films, mode: Mode) -> Iterator[Round]:
    with _redis(films, mode) as url:

        def send(pipelines: Sequence[tuple[int, bytes]]) -> None:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(url.removeprefix("unix://"))
                for count, commands in pipelines:
                    connection.sendall(commands)
                    answers = 0
                    while answers < count:
                        received = connection.recv(1 << 16)
                        assert received and b"-" not in received, received[:200]  # each is a number on its own line
                        answers += received.count(b"\n")

        def once(number: int) -> float:
            pipelines = [films.commands(number, start) for start in range(0, len(films), PIPELINE)]
            return _timed(send, [(len(some), b"".join(map(hiredis.pack_command, some))) for some in pipelines])

        yield once


def compared(films: Films, mode: Mode, rounds: int, http: dict[str, Round]) -> list[Row]:
    """Films a second by each way, medians of rounds in which they take turns, and what share that is of Redis alone."""
    with ExitStack() as stack:
        ways = {f"HTTP, {title}, encoded and stored": once for title, once in http.items()}
        ways["store, ready vectors"] = stack.enter_context(by_store(films, mode))
        ways["Redis alone, redis-py"] = stack.enter_context(by_redis_py(films, mode))
        ways["Redis alone, packed before"] = stack.enter_context(packed(films, mode))
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for number in range(rounds):
            for way, once in ways.items():
                rates[way].append(len(films) / once(number))
    alone = {title: np.array(rates[f"Redis alone, {title}"]) for title in ("redis-py", "packed before")}
    return [
        {"index": mode, "way": way, "items/s": float(np.median(found))}
        | {f"share of {title}": float(np.median(np.array(found) / rate)) for title, rate in alone.items()}
        for way, found in rates.items()
    ]


@contextmanager
def _redis(films: Films, mode: Mode) -> Iterator[str]:
    """The URL of a server of its own, with an empty index."""

    async def prepare(url: str) -> None:
        async with Store(url, index=mode) as store:
            await films.index(store)

    with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
        asyncio.run(prepare(server.url))
        yield server.url


def _timed(send: Callable[[Sequence[Any]], None], parts: Sequence[Any]) -> float:
    """Seconds of sending all, by so many at once."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        began = time.perf_counter()
        for _ in pool.map(send, [parts[i::AT_ONCE] for i in range(AT_ONCE)]):
            pass
        return time.perf_counter() - began


async def _awaited(send: Callable[[Any], Awaitable[None]], parts: Sequence[Any]) -> float:
    async def some(mine: Sequence[Any]) -> None:
        for part in mine:
            await send(part)

    began = time.perf_counter()
    await asyncio.gather(*(some(parts[i::AT_ONCE]) for i in range(AT_ONCE)))
    return time.perf_counter() - began
