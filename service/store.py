"""Keeps items and their vectors in Redis, and finds neighbors; the only module that knows a key.

    iv:item:{name.bNN}:<id>              hash  raw (the item as JSON), rev (new at every write)
    iv:vec:<name>:<fp>:{name.bNN}:<id>   hash  v (float32, little endian); indexed by
    iv:idx:<name>:<fp>                   index over the prefix iv:vec:<name>:<fp>:
    iv:live:{name}                       hash  fingerprint -> version; every write must reach each of them
    iv:count:{name.bNN}                  items in the bucket
    iv:ready:{name}                      set   fingerprints whose index has every item
    iv:switch:{name}                     who switches the model's version now; expires
    iv:job:<id>                          a job's record; expires

NN = crc32(id) % 64. The braces are the hash tag of Redis Cluster: an item, its vectors and its counter share
a slot, so one script changes them together or not at all.

How no write is lost while a new version takes over: the version is marked live first and the items are
scanned after that. A write reads the live fingerprints *after* it has stored the item. If it does not see the
new one, then the scan began later and sees the item; if it sees it, the writer adds that vector before it
acknowledges. Vectors that come late are stored only while the item still has the `rev` they were made from.
"""

import asyncio
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from redis import exceptions as errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from itemvec.errors import ConfigError, ItemNotFound, ItemvecError, StoreUnavailable

T = TypeVar("T")
Vectors = NDArray[np.float32]
Algorithm = Literal["flat", "hnsw"]

BUCKETS = 64
MAX_ID_BYTES = 512

FLAT_UP_TO = 50_000
"""Items up to which an exact scan is fast enough; above it the index is an HNSW graph."""

HOT_ITEMS = 64
"""Writes and reads of more items than this take the bulk client, so that they cannot hold up a search."""

CHUNK = 512  # items a round trip in bulk: beyond it nothing gets faster, and other clients wait longer


class Item(NamedTuple):
    id: str
    raw: bytes
    rev: bytes


class Neighbor(NamedTuple):
    id: str
    score: float


@dataclass(frozen=True, slots=True)
class Written:
    """What one `put` did; the lists are parallel to its ids."""

    created: list[bool]
    revs: list[bytes]
    live: dict[str, str]
    """Fingerprint -> version, read after the items were stored. One that the put did not write is owed."""


@dataclass(frozen=True, slots=True)
class IndexStatus:
    algorithm: Algorithm
    dim: int
    docs: int
    percent_indexed: float
    """0 to 1. Below 1 a search answers with partial rows and no error: do not switch to it yet."""
    failures: int


@dataclass(frozen=True, slots=True)
class ServerInfo:
    version: str
    query_engine: str | None
    """Version of the query engine, None where it is not loaded."""
    run_id: str
    """New at every start of the server."""
    evicts: bool
    """Redis may drop our keys when its memory is full."""


class Store:
    """Items and vectors of every model in one Redis.

    Use it inside one event loop. Connections are opened by the first call, so it can be made while Redis is down.
    When Redis does not answer, a call raises `StoreUnavailable` within `timeout`, and after some failures in a row at
    once. Nothing has to be restarted when Redis is back.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float | None = None,
        bulk_timeout: float = 10.0,
        max_connections: int = 16,
    ) -> None:
        """`url`: unix://PATH, redis:// or rediss://.

        `timeout` in seconds for one call, 0.15 by default; `bulk_timeout` for one that moves many items or builds
        an index.
        """
        timeout = 0.15 if timeout is None else timeout
        self.address = _without_secrets(url)
        self._hot = _Link(url, timeout=timeout, connections=max_connections)
        self._bulk = _Link(url, timeout=bulk_timeout, connections=4)
        self._indexes: dict[tuple[str, str], _Index] = {}
        self._last_live: dict[str, frozenset[str]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._hot.close()
        await self._bulk.close()

    # The server

    @property
    def available(self) -> bool:
        """False after several failures in a row, until a call is answered: where none comes, `ping`."""
        return not self._hot.breaker.is_open

    async def ping(self) -> None:
        """Returns if Redis answers; raises `StoreUnavailable` if not."""
        await self._hot.command("PING")

    async def server_info(self) -> ServerInfo:
        info = await self._bulk.command("INFO", "everything")
        modules = await self._bulk.command("MODULE", "LIST")
        engine = None
        for module in modules:
            if module[b"name"] == b"search":
                # 21005 -> 2.10.5, 80201 -> 8.2.1
                number = int(module[b"ver"])
                engine = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        return ServerInfo(
            version=str(info["redis_version"]),
            query_engine=engine,
            run_id=str(info["run_id"]),
            evicts=bool(info.get("maxmemory")) and str(info.get("maxmemory_policy")).startswith("allkeys"),
        )

    # Indexes and versions

    async def ensure_index(
        self,
        name: str,
        fp: str,
        dim: int,
        items_hint: int = 0,
        algorithm: Literal["auto", "flat", "hnsw"] = "auto",
    ) -> bool:
        """Makes the index of one version if it is not there; True if this call made it.

        Call it before anything of that version is loaded: an index made over existing vectors answers partly
        until it has read them all. `items_hint`: how many items are expected, for "auto". Raises
        `ConfigError` where Redis has no query engine or would evict items, and when the index exists with
        another number of dimensions.
        """
        space = _Space(name)
        try:
            found = await self._read_index(self._bulk, name, fp)
        except _NoIndex:
            pass
        else:
            if found.dim != dim:
                raise ConfigError(
                    f"index {space.index(fp)} in Redis has {found.dim} dimensions, this version {dim}: "
                    "drop that version"
                )
            return False

        server = await self.server_info()
        if server.query_engine is None:
            raise ConfigError(_NO_ENGINE.format(address=self.address))
        if server.evicts:
            raise ConfigError(
                f"Redis at {self.address} evicts keys when its memory is full, and items would vanish from "
                "the results: set its maxmemory-policy to noeviction"
            )
        if not re.fullmatch(r"[A-Za-z0-9_.-]+", fp):
            raise ValueError(f"{fp!r} cannot be a fingerprint")
        if algorithm == "auto":
            algorithm = "flat" if items_hint < FLAT_UP_TO else "hnsw"
        await self._bulk.command("SREM", space.ready, fp)
        await self._remove_orphans(name, fp)
        settings: list[object] = ["TYPE", "FLOAT32", "DIM", dim, "DISTANCE_METRIC", "COSINE"]
        if algorithm == "hnsw":
            settings += ["M", 16, "EF_CONSTRUCTION", 200]
        create: list[object] = ["FT.CREATE", space.index(fp), "ON", "HASH", "PREFIX", 1, space.vectors(fp)]
        create += ["SCHEMA", "v", "VECTOR", algorithm.upper(), len(settings), *settings]
        try:
            await self._bulk.command(*create)
        except errors.ResponseError as error:
            if "already exists" not in str(error):
                raise
            return await self.ensure_index(name, fp, dim, items_hint, algorithm)  # another replica was faster
        return True

    async def index_status(self, name: str, fp: str) -> IndexStatus:
        """Raises `StoreUnavailable` if there is no such index."""
        info = await self._index_info(self._bulk, name, fp)
        index = _index_of(info)
        return IndexStatus(
            algorithm=index.algorithm,
            dim=index.dim,
            docs=int(info[b"num_docs"]),
            percent_indexed=float(info[b"percent_indexed"]),
            failures=int(info[b"hash_indexing_failures"]),
        )

    async def mark_live(self, name: str, fp: str, ref: str) -> None:
        """From now on every write must reach this fingerprint; `ref` is its version, "movies@3"."""
        await self._hot.command("HSET", _Space(name).live, fp, ref)

    async def unmark_live(self, name: str, fp: str) -> None:
        """Also takes back that it is ready."""
        space = _Space(name)
        await self._hot.command("EVAL", _UNMARK, 2, space.live, space.ready, fp)

    async def live(self, name: str) -> dict[str, str]:
        """Fingerprint -> version of all that are live."""
        return self._note_live(name, await self._hot.command("HGETALL", _Space(name).live))

    async def mark_ready(self, name: str, fp: str) -> None:
        """Every item has its vector in the index of this live fingerprint: searches may use it."""
        await self._hot.command("SADD", _Space(name).ready, fp)

    async def ready(self, name: str) -> set[str]:
        """The fingerprints that are live and ready."""
        space = _Space(name)
        live, ready = await self._hot.pipeline([("HGETALL", space.live), ("SMEMBERS", space.ready)])
        return self._note_live(name, live).keys() & {fp.decode() for fp in ready}

    async def drop_version(self, name: str, fp: str) -> None:
        """Removes the index, then the vectors of one version; unmark it first. May be done twice."""
        space = _Space(name)
        self._indexes.pop((name, fp), None)
        try:  # never DD: it blocks the server 173 ms per 100,000 vectors
            await self._bulk.command("FT.DROPINDEX", space.index(fp))
        except errors.ResponseError as error:
            if not _says_no_index(error):
                raise
        async for keys in self._scan(space.vectors(fp) + "*"):
            await self._bulk.pipeline([("UNLINK", *same) for same in _same_slot(keys)])

    # Who switches versions, and how far it is

    async def claim(self, name: str, holder: str, ttl: float) -> str:
        """Takes or renews the right to switch the model's version, for `ttl` seconds; returns who has it."""
        reply = await self._hot.command("EVAL", _CLAIM, 1, _Space(name).switch, holder, int(ttl * 1000))
        return str(reply, "utf-8")

    async def renew(self, name: str, holder: str, ttl: float) -> bool:
        """Keeps that right for another `ttl` seconds. False if it ran out meanwhile: another one may have had it."""
        return bool(await self._hot.command("EVAL", _RENEW, 1, _Space(name).switch, holder, int(ttl * 1000)))

    async def release(self, name: str, holder: str) -> None:
        """Gives that right back; does nothing if another one has it."""
        await self._hot.command("EVAL", _RELEASE, 1, _Space(name).switch, holder)

    async def save_job(self, job_id: str, record: bytes, ttl: float) -> None:
        await self._hot.command("SET", f"iv:job:{job_id}", record, "PX", int(ttl * 1000))

    async def job(self, job_id: str) -> bytes | None:
        record: bytes | None = await self._hot.command("GET", f"iv:job:{job_id}")
        return record

    # Items

    async def put(
        self,
        name: str,
        ids: Sequence[str],
        raws: Sequence[bytes],
        vectors: Mapping[str, NDArray[np.floating[Any]]],
    ) -> Written:
        """Creates or replaces items with their vectors, `vectors[fingerprint]` of shape (len(ids), dim).

        An item and its vectors change together. Many items are not one transaction: after an error some may
        be stored, and the same put can be sent again. Of an id that comes twice the last one stays. Raises
        `ValueError` for an id, a vector or a number of them that cannot be stored, before anything is
        written.
        """
        space, keys = _Space(name), _encode_ids(ids)
        if len(raws) != len(ids):
            raise ValueError(f"{len(ids)} ids but {len(raws)} items")
        if not ids:
            return Written([], [], await self.live(name))
        rows = {fp: await self._checked(name, fp, matrix, len(ids)) for fp, matrix in vectors.items()}
        token = secrets.token_hex(8)  # never given twice, also not to an item that was deleted in between
        revs = [f"{token}.{position}".encode() for position in range(len(ids))]

        def command(bucket: int, positions: Sequence[int]) -> tuple[object, ...]:
            item, vecs = space.item_prefix(bucket), [space.vector_prefix(fp, bucket) for fp in rows]
            names: list[bytes] = [space.count(bucket)]
            values: list[object] = [len(rows)]
            for i in positions:
                names.append(item + keys[i])
                names += [prefix + keys[i] for prefix in vecs]
                values += (raws[i], revs[i])
                values += [vector[i] for vector in rows.values()]
            return ("EVAL", _PUT, len(names), *names, *values)

        created = [False] * len(ids)
        link = self._link_for(len(ids) * max(1, len(rows)))
        live: Mapping[bytes, bytes] = {}
        for chunk in _chunks(len(ids)):
            groups = _by_bucket(keys, chunk)
            commands = [command(bucket, positions) for bucket, positions in groups.items()]
            *replies, live = await link.pipeline([*commands, ("HGETALL", space.live)])
            for positions, flags in zip(groups.values(), replies, strict=True):
                for i, flag in zip(positions, flags, strict=True):
                    created[i] = bool(flag)
        return Written(created, revs, self._note_live(name, live))

    async def add_vectors(
        self,
        name: str,
        fp: str,
        ids: Sequence[str],
        revs: Sequence[bytes],
        vectors: NDArray[np.floating[Any]],
    ) -> int:
        """Adds vectors (len(ids), dim) of one version to items that still have that `rev`; says how many.

        An item that was written or deleted since its `rev` was read is left as it is: that write brought its
        own vector.
        """
        space, keys = _Space(name), _encode_ids(ids)
        if len(revs) != len(ids):
            raise ValueError(f"{len(ids)} ids but {len(revs)} revs")
        rows = await self._checked(name, fp, vectors, len(ids))
        link, written = self._link_for(len(ids)), 0
        for chunk in _chunks(len(ids)):
            commands = []
            for bucket, positions in _by_bucket(keys, chunk).items():
                item, vec = space.item_prefix(bucket), space.vector_prefix(fp, bucket)
                names = [prefix + keys[i] for i in positions for prefix in (item, vec)]
                values = [value for i in positions for value in (revs[i], rows[i])]
                commands.append(("EVAL", _ADD, len(names), *names, *values))
            written += sum(await link.pipeline(commands))
        return written

    async def get(self, name: str, item_id: str) -> Item:
        """Raises `ItemNotFound`."""
        [item] = await self.get_many(name, [item_id])
        if item is None:
            raise ItemNotFound(item_id, name)
        return item

    async def get_many(self, name: str, ids: Sequence[str]) -> list[Item | None]:
        """Parallel to `ids`; None where there is no such item."""
        return await self._items(self._link_for(len(ids)), name, ids, _encode_ids(ids))

    async def get_vectors(self, name: str, fp: str, ids: Sequence[str]) -> list[Vectors | None]:
        """The vectors (dim,) of one version, parallel to `ids`; None where there is none."""
        space, found = _Space(name), list[Vectors | None]()
        keys = [space.vector_prefix(fp, _bucket(key)) + key for key in _encode_ids(ids)]
        for chunk in _chunks(len(ids)):
            commands = [("HGET", keys[i], "v") for i in chunk]
            for value in await self._link_for(len(ids)).pipeline(commands):
                found.append(None if value is None else np.frombuffer(value, "<f4"))
        return found

    async def delete(self, name: str, ids: Sequence[str]) -> list[bool]:
        """Removes items with their vectors of all live versions; says of each id whether there was one."""
        space, keys = _Space(name), _encode_ids(ids)
        if not ids:
            return []
        known = self._last_live.get(name)
        if known is None:
            known = frozenset(await self.live(name))
        link, existed = self._link_for(len(ids)), [False] * len(ids)
        live: Mapping[bytes, bytes] = {}
        for chunk in _chunks(len(ids)):
            groups, commands = _by_bucket(keys, chunk), []
            for bucket, positions in groups.items():
                prefixes = [space.item_prefix(bucket), *(space.vector_prefix(fp, bucket) for fp in known)]
                names = [space.count(bucket), *(prefix + keys[i] for i in positions for prefix in prefixes)]
                commands.append(("EVAL", _DELETE, len(names), *names, len(known)))
            *replies, live = await link.pipeline([*commands, ("HGETALL", space.live)])
            for positions, flags in zip(groups.values(), replies, strict=True):
                for i, flag in zip(positions, flags, strict=True):
                    existed[i] = bool(flag)
        # A version that went live since `known` was read may have got a vector from its backfill just before
        # the item went; after this point it gets none, because the item's rev is gone.
        for fp in self._note_live(name, live).keys() - known:
            for chunk in _chunks(len(ids)):
                await self._remove_if_orphan(name, fp, [keys[i] for i in chunk])
        return existed

    async def count(self, name: str) -> int:
        space = _Space(name)
        replies = await self._hot.pipeline([("GET", space.count(bucket)) for bucket in range(BUCKETS)])
        return sum(int(reply or 0) for reply in replies)

    async def scan(self, name: str, batch: int = 500) -> AsyncIterator[list[Item]]:
        """Every item that exists during the whole scan, at least once; one that is written meanwhile may come
        twice.

        Raises `StoreUnavailable` at the end if Redis was restarted on the way, since items may have been
        missed: the scan must be made again.
        """
        space = _Space(name)
        start = len(space.item_prefix(0))
        run_id = (await self.server_info()).run_id
        waiting: list[bytes] = []
        async for keys in self._scan(space.every_item):
            waiting += [key[start:] for key in keys]
            while len(waiting) >= batch:
                yield await self._present(name, waiting[:batch])
                del waiting[:batch]
        if waiting:
            yield await self._present(name, waiting)
        if (await self.server_info()).run_id != run_id:
            raise StoreUnavailable("Redis was restarted during a scan of all items; it has to be made again")

    # Neighbors

    async def search(
        self, name: str, fp: str, vector: NDArray[np.floating[Any]], k: int, exclude: Collection[str] = ()
    ) -> list[Neighbor]:
        """The k items nearest to `vector` (dim,) by cosine, best first, equal scores in the order of their
        ids.

        k results unless fewer items are left after `exclude`; an item whose score equals that of the last one
        may be the one that is cut off. Exact below `FLAT_UP_TO` items, nearly so above.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        [query] = await self._checked(name, fp, np.asarray(vector)[np.newaxis], 1)
        out = frozenset(exclude)
        try:
            reply = await self._knn(name, fp, query, k + len(out))
        except errors.ResponseError:  # the index was dropped and made again in another form: read it once more
            self._indexes.pop((name, fp), None)
            reply = await self._knn(name, fp, query, k + len(out))
        neighbors = _neighbors(reply, start=len(_Space(name).vector_prefix(fp, 0)))
        return [neighbor for neighbor in neighbors if neighbor.id not in out][:k]

    async def _knn(self, name: str, fp: str, query: bytes, n: int) -> dict[bytes, Any]:
        index = self._indexes.get((name, fp)) or await self._read_index(self._hot, name, fp)
        params: list[object] = ["q", query, "n", n]
        effort = ""
        if index.algorithm == "hnsw":
            effort, params = (
                " EF_RUNTIME $ef",
                [*params, "ef", max(100, n)],
            )  # the server's default of 10: recall .88
        command: list[object] = ["FT.SEARCH", _Space(name).index(fp), f"*=>[KNN $n @v $q{effort} AS d]"]
        command += ["RETURN", 1, "d", "LIMIT", 0, n, "TIMEOUT", self._hot.milliseconds, "DIALECT", 2]
        command += ["PARAMS", len(params), *params]
        reply: dict[bytes, Any] = await self._hot.command(*command)
        return reply

    # Helpers

    def _link_for(self, items: int) -> "_Link":
        return self._hot if items <= HOT_ITEMS else self._bulk

    async def _checked(self, name: str, fp: str, matrix: NDArray[np.floating[Any]], count: int) -> list[bytes]:
        """The rows as the bytes Redis keeps. It would take a wrong one without a word and find nonsense."""
        index = self._indexes.get((name, fp)) or await self._read_index(self._hot, name, fp)
        if matrix.shape != (count, index.dim):
            raise ValueError(f"{name} {fp} takes vectors of shape {(count, index.dim)}, not {matrix.shape}")
        # A length that overflows, or is too small to divide by, is as useless as none.
        matrix = np.ascontiguousarray(matrix, "<f4")
        squares = np.einsum("ij,ij->i", matrix, matrix)
        bad = np.flatnonzero(~(np.isfinite(squares) & (squares > 0)))
        if bad.size:
            raise ValueError(f"vector {bad[0]} for {name} {fp} has no direction: all zero, NaN or infinite")
        data, size = matrix.tobytes(), 4 * index.dim
        return [data[start : start + size] for start in range(0, len(data), size)]

    async def _read_index(self, link: "_Link", name: str, fp: str) -> "_Index":
        index = _index_of(await self._index_info(link, name, fp))
        self._indexes[name, fp] = index
        return index

    async def _index_info(self, link: "_Link", name: str, fp: str) -> dict[bytes, Any]:
        try:
            info: dict[bytes, Any] = await link.command("FT.INFO", _Space(name).index(fp))
        except errors.ResponseError as error:
            if _says_no_index(error):
                raise _NoIndex(name, fp) from error
            raise
        return info

    async def _items(self, link: "_Link", name: str, ids: Sequence[str], keys: Sequence[bytes]) -> list[Item | None]:
        space, found = _Space(name), list[Item | None]()
        for chunk in _chunks(len(ids)):
            commands = [("HMGET", space.item_prefix(_bucket(keys[i])) + keys[i], "raw", "rev") for i in chunk]
            for i, (raw, rev) in zip(chunk, await link.pipeline(commands), strict=True):
                found.append(None if rev is None else Item(ids[i], raw, rev))
        return found

    async def _present(self, name: str, keys: Sequence[bytes]) -> list[Item]:
        found = await self._items(self._bulk, name, [key.decode() for key in keys], keys)
        return [item for item in found if item is not None]

    async def _scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        cursor = b"0"
        while True:
            cursor, keys = await self._bulk.command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
            if keys:
                yield keys
            if int(cursor) == 0:
                return

    async def _remove_orphans(self, name: str, fp: str) -> None:
        """A write that was under way when its version was dropped leaves a vector behind.

        That of an item deleted since must not come back. Only vectors without an item go, so a replica that
        already loads this version loses nothing.
        """
        start = len(_Space(name).vector_prefix(fp, 0))
        async for keys in self._scan(_Space(name).vectors(fp) + "*"):
            await self._remove_if_orphan(name, fp, [key[start:] for key in keys])

    async def _remove_if_orphan(self, name: str, fp: str, keys: Sequence[bytes]) -> None:
        space, commands = _Space(name), []
        for bucket, positions in _by_bucket(keys, range(len(keys))).items():
            prefixes = (space.item_prefix(bucket), space.vector_prefix(fp, bucket))
            names = [prefix + keys[i] for i in positions for prefix in prefixes]
            commands.append(("EVAL", _REMOVE_ORPHANS, len(names), *names))
        await self._bulk.pipeline(commands)

    def _note_live(self, name: str, reply: Mapping[bytes, bytes]) -> dict[str, str]:
        live = {fp.decode(): ref.decode() for fp, ref in reply.items()}
        self._last_live[name] = frozenset(live)
        return live


# The scripts. Redis runs each one alone, from start to end; all keys of a call are in one slot.

_SET_VECTOR = """
-- To index a vector again costs up to 0.5 ms, so one that did not change is left.
local function set_vector(key, vector)
  if redis.call('HGET', key, 'v') ~= vector then redis.call('HSET', key, 'v', vector) end
end
"""

_PUT = (
    _SET_VECTOR
    + """
-- KEYS: counter, then for each item its hash and one vector key for each fingerprint
-- ARGV: number of fingerprints, then for each item raw, rev and the vectors
local vectors, created, key, arg = tonumber(ARGV[1]), {}, 2, 2
local new = 0
while KEYS[key] do
  local added = redis.call('HSET', KEYS[key], 'raw', ARGV[arg], 'rev', ARGV[arg + 1])
  if added > 0 then new = new + 1; created[#created + 1] = 1 else created[#created + 1] = 0 end
  for i = 1, vectors do set_vector(KEYS[key + i], ARGV[arg + 1 + i]) end
  key, arg = key + 1 + vectors, arg + 2 + vectors
end
if new > 0 then redis.call('INCRBY', KEYS[1], new) end
return created
"""
)

_ADD = (
    _SET_VECTOR
    + """
-- KEYS: for each item its hash and its vector key; ARGV: for each item the rev it must have and the vector
local written = 0
for i = 1, #KEYS, 2 do
  if redis.call('HGET', KEYS[i], 'rev') == ARGV[i] then
    set_vector(KEYS[i + 1], ARGV[i + 1])
    written = written + 1
  end
end
return written
"""
)

_DELETE = """
-- KEYS: counter, then for each item its hash and one vector key for each fingerprint
-- ARGV: number of fingerprints
local vectors, existed, key, gone = tonumber(ARGV[1]), {}, 2, 0
while KEYS[key] do
  local was = redis.call('UNLINK', KEYS[key])
  existed[#existed + 1] = was
  gone = gone + was
  for i = 1, vectors do redis.call('UNLINK', KEYS[key + i]) end
  key = key + 1 + vectors
end
if gone > 0 then redis.call('DECRBY', KEYS[1], gone) end
return existed
"""

_REMOVE_ORPHANS = """
-- KEYS: for each item its hash and its vector key
for i = 1, #KEYS, 2 do
  if redis.call('EXISTS', KEYS[i]) == 0 then redis.call('UNLINK', KEYS[i + 1]) end
end
"""


_UNMARK = """
redis.call('HDEL', KEYS[1], ARGV[1])
redis.call('SREM', KEYS[2], ARGV[1])
"""

_CLAIM = """
local holder = redis.call('GET', KEYS[1]) or ARGV[1]
if holder == ARGV[1] then redis.call('SET', KEYS[1], holder, 'PX', ARGV[2]) end
return holder
"""

_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""

_RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""


class _Space:
    """The keys of one model."""

    __slots__ = ("_name", "every_item", "live", "ready", "switch")

    def __init__(self, name: str) -> None:
        # Colons and braces separate the parts of a key; `*` and `[` would be patterns.
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name):
            raise ValueError(f"{name!r} cannot name a model: letters, digits, '_', '.' and '-' only")
        self._name = name
        self.live = f"iv:live:{{{name}}}"
        self.ready = f"iv:ready:{{{name}}}"
        self.switch = f"iv:switch:{{{name}}}"
        self.every_item = f"iv:item:{{{name}.b[0-9][0-9]}}:*"

    def item_prefix(self, bucket: int) -> bytes:
        return f"iv:item:{{{self._name}.b{bucket:02}}}:".encode()

    def vector_prefix(self, fp: str, bucket: int) -> bytes:
        return f"{self.vectors(fp)}{{{self._name}.b{bucket:02}}}:".encode()

    def vectors(self, fp: str) -> str:
        return f"iv:vec:{self._name}:{fp}:"

    def index(self, fp: str) -> str:
        return f"iv:idx:{self._name}:{fp}"

    def count(self, bucket: int) -> bytes:
        return f"iv:count:{{{self._name}.b{bucket:02}}}".encode()


def _encode_ids(ids: Sequence[str]) -> list[bytes]:
    keys = [item_id.encode() for item_id in ids]
    for item_id, key in zip(ids, keys, strict=True):
        if not 1 <= len(key) <= MAX_ID_BYTES:
            raise ValueError(f"an id has 1 to {MAX_ID_BYTES} bytes of UTF-8, {item_id[:40]!r} has {len(key)}")
    return keys


def _bucket(key: bytes) -> int:
    return crc32(key) % BUCKETS


def _by_bucket(keys: Sequence[bytes], positions: Iterable[int]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for position in positions:
        groups.setdefault(_bucket(keys[position]), []).append(position)
    return groups


def _same_slot(keys: Iterable[bytes]) -> Iterable[list[bytes]]:
    groups: dict[bytes, list[bytes]] = {}
    for key in keys:
        groups.setdefault(key[: key.index(b"}")], []).append(key)
    return groups.values()


def _chunks(count: int) -> Iterable[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


@dataclass(frozen=True, slots=True)
class _Index:
    algorithm: Algorithm
    dim: int


def _index_of(info: Mapping[bytes, Any]) -> _Index:
    [field] = info[b"attributes"]
    return _Index("hnsw" if field[b"algorithm"] == b"HNSW" else "flat", int(field[b"dim"]))


def _neighbors(reply: Mapping[bytes, Any], start: int) -> list[Neighbor]:
    """`start`: where the id begins in a key. With a warning, results are missing: not to pass for all."""
    if warnings := reply.get(b"warning"):
        raise StoreUnavailable("the search was cut short: " + b"; ".join(warnings).decode())
    found = []
    for result in reply[b"results"]:
        score = 1.0 - float(result[b"extra_attributes"][b"d"])
        found.append(Neighbor(result[b"id"][start:].decode(), min(1.0, max(-1.0, score))))
    found.sort(key=lambda neighbor: (-neighbor.score, neighbor.id))
    return found


class Breaker:
    """Opens after a row of failures, so that a dead Redis costs nothing; one call a `pause` tries again."""

    def __init__(self, failures: int = 5, pause: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit, self._pause, self._clock = failures, pause, clock
        self._failures = 0
        self._next_try = 0.0

    def enter(self) -> None:
        if not self.is_open:
            return
        wait = self._next_try - self._clock()
        if wait > 0:
            raise StoreUnavailable(f"Redis failed {self._failures} times in a row", retry_after=wait)
        self._next_try = self._clock() + self._pause  # this call is the one that tries

    @property
    def is_open(self) -> bool:
        return self._failures >= self._limit

    def success(self) -> None:
        self._failures = 0

    def failure(self) -> None:
        self._failures += 1
        self._next_try = self._clock() + self._pause


class _Link:
    """One client with its deadline, its second try and its breaker."""

    def __init__(self, url: str, *, timeout: float, connections: int) -> None:
        self._timeout = timeout
        self._address = _without_secrets(url)
        self._connections = connections
        self._slots = asyncio.Semaphore(connections)
        self.breaker = Breaker()
        # One deadline around each call costs less than redis-py's own around each read and write. With its
        # maintenance notifications it would not notice that a pooled connection was closed.
        self._redis = Redis.from_url(
            url,
            protocol=3,
            socket_timeout=None,
            socket_connect_timeout=None,
            retry=Retry(NoBackoff(), 0),
            driver_info=None,  # two round trips fewer for a new connection
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )

    @property
    def milliseconds(self) -> int:
        return max(1, int(self._timeout * 1000))

    async def close(self) -> None:
        await self._redis.aclose()

    async def command(self, *parts: object) -> Any:
        return await self._run(lambda: self._redis.execute_command(*parts))  # type: ignore[no-untyped-call]

    async def pipeline(self, commands: Sequence[Sequence[object]]) -> list[Any]:
        """The replies, in the order of the commands; the first one that failed is raised."""
        if len(commands) == 1:
            return [await self.command(*commands[0])]

        async def send() -> list[Any]:
            pipe = self._redis.pipeline(transaction=False)  # a new one for each try: it is empty after it failed
            for command in commands:
                pipe.execute_command(*command)
            return await pipe.execute()

        return await self._run(send)

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        # Waiting for a connection is not the server's time: many calls at once are no reason to think it dead. If it
        # is, those before us find out, the breaker opens, and nobody waits any longer.
        if self._slots.locked():
            try:
                await _within(max(1.0, self._timeout), self._slots.acquire)
            except TimeoutError:
                raise StoreUnavailable(f"all {self._connections} connections to Redis are busy") from None
        else:
            await self._slots.acquire()  # there is one: this does not wait
        try:
            self.breaker.enter()
            result = await _within(self._timeout, lambda: _once_more(call))
        except (errors.ConnectionError, errors.TimeoutError, OSError) as error:
            self.breaker.failure()
            raise self._unavailable(error) from error
        except errors.ResponseError as error:
            self.breaker.success()
            if (reason := self._refused(error)) is not None:
                raise reason from error
            raise
        finally:
            self._slots.release()
        self.breaker.success()
        return result

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        if isinstance(error, errors.BusyLoadingError):
            return StoreUnavailable(f"Redis at {self._address} is still loading its data", retry_after=5.0)
        if isinstance(error, errors.ConnectionError):
            return StoreUnavailable(f"Redis at {self._address}: {error}")
        return StoreUnavailable(f"Redis at {self._address} did not answer in {self._timeout:g} s")

    def _refused(self, error: errors.ResponseError) -> ItemvecError | None:
        """What the server cannot do at this time; None if the command was wrong, which is a fault of ours."""
        text = str(error)
        if "unknown command" in text and "FT." in text:
            return ConfigError(_NO_ENGINE.format(address=self._address))
        if isinstance(error, errors.OutOfMemoryError) or text.startswith("OOM"):
            return StoreUnavailable(f"Redis at {self._address} is full, raise its maxmemory", retry_after=30.0)
        if isinstance(error, _PASSING) or text.startswith(("MISCONF", "NOREPLICAS", "BUSY")):
            return StoreUnavailable(f"Redis at {self._address}: {text}", retry_after=5.0)
        return None


async def _once_more(call: Callable[[], Awaitable[T]]) -> T:
    """A lost connection may be of a server that is back already. An answer that is late comes no sooner twice."""
    try:
        return await call()
    except errors.ConnectionError:
        await asyncio.sleep(random.uniform(0.0, 0.01))  # noqa: S311 - so that not all callers come back at once
        return await call()


async def _within(seconds: float, call: Callable[[], Awaitable[T]]) -> T:
    """Raises `TimeoutError` if the call takes longer, except by the fault of this process.

    When the event loop itself stood still, for a large request or a model that is loaded, the time is over but the
    answer may be there, unread. Then the call gets a little more time, or all that wait would fail together.
    """
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    timer: asyncio.TimerHandle

    def expire() -> None:
        nonlocal timer
        if loop.time() - due > 0.01:
            timer = loop.call_later(0.05, lambda: limit.reschedule(loop.time()))
        else:
            limit.reschedule(due)

    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(due, expire)
        try:
            return await call()
        finally:
            timer.cancel()


_PASSING = (errors.ReadOnlyError, errors.NoPermissionError, errors.ClusterDownError, errors.TryAgainError)

_NO_ENGINE = (
    "Redis at {address} has no query engine, which finds the neighbors: use Redis 8 or Redis Stack, "
    "or unset REDIS_URL for the embedded server"
)


class _NoIndex(StoreUnavailable):
    def __init__(self, name: str, fp: str) -> None:
        super().__init__(f"{name} has no index for fingerprint {fp}: that version is not loaded", retry_after=5.0)


def _says_no_index(error: errors.ResponseError) -> bool:
    text = str(error).lower()  # "no such index", "unknown index name": the words differ between versions
    return "no such index" in text or "unknown index name" in text or "index not found" in text


def _without_secrets(url: str) -> str:
    """The address for a message: no user, no password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}"
