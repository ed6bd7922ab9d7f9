"""Store: items and their vectors in Redis, and the neighbors of a vector. `service/keys.py` shows what lies where.

How no write is lost while a new version takes over: the version is marked live first and the items are scanned after
that. A write reads the live fingerprints *after* it has stored the item. If it does not see the new one, then the scan
began later and sees the item; if it sees it, the writer adds that vector before it acknowledges. Vectors that come late
are stored only while the item still has the `rev` they were made from.
"""

import secrets
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import orjson
from numpy.typing import NDArray
from redis import exceptions as errors

from itemvec.errors import ItemNotFound, StoreUnavailable
from itemvec.schema import FeatureSchema
from service import scripts
from service.conditions import Condition, Test, resolve, size
from service.index import (
    Index,
    Neighbor,
    NoColumn,
    NoIndex,
    Vectors,
    WantedMode,
    checked_rows,
    read_neighbors,
    says_no_index,
    search_command,
    to_check,
)
from service.indexes import Indexes
from service.keys import BUCKETS, SCRIPT, Space, bucket_of, chunks, encode_ids, round_trips
from service.leases import Leases
from service.link import Command, Link
from service.shared import SharedCache

HOT_ITEMS = 64
"""Writes and reads of more items than this take the bulk client, so that they cannot hold up a search."""

HOT_NEIGHBORS, HOT_TESTS = 5_000, 100
"""Searches for more neighbors together, or one by a filter of more conditions, take it too: Redis may be at them for
longer than a call in a request's path has time, and would pass for one that hangs."""

GRAPH_SCRIPT = 8
"""`SCRIPT` of an index that is a graph."""


class Item(NamedTuple):
    id: str
    raw: bytes
    rev: bytes


@dataclass(frozen=True, slots=True)
class Encoded:
    """What one version made of some items."""

    vectors: NDArray[np.floating[Any]]
    """(len(rows), dim)"""

    rows: Sequence[int] | None = None
    """Which of the items have a vector; None: all. The others get none, and lose the one they had."""

    attributes: Sequence[Mapping[str, str]] | None = None
    """Parallel to `vectors`: what queries can filter by, as `attributes.fields` gives it."""


@dataclass(frozen=True, slots=True)
class Written:
    """What one `put` did; the lists are parallel to its ids."""

    created: list[bool]
    revs: list[bytes]
    live: dict[str, str]
    """Fingerprint -> version, read after the items were stored. One that the put did not write is owed."""


@dataclass(frozen=True, slots=True)
class Query:
    vector: NDArray[np.floating[Any]]
    """(dim,)"""

    k: int
    exclude: Collection[str] = ()
    where: Condition | None = None


class Store:
    """Items and vectors of every model in one Redis, or one Redis Cluster.

    Use it inside one event loop. Connections are opened by the first call, so it can be made while Redis is down.
    When Redis does not answer, a call raises `StoreUnavailable` within `timeout`, and after some failures in a row at
    once. Nothing has to be restarted when Redis is back.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 0.12,
        bulk_timeout: float = 10.0,
        max_connections: int = 16,
        index: WantedMode = "auto",
        changed: Callable[[bool], None] | None = None,
    ) -> None:
        """`url`: unix://PATH, redis:// or rediss://, of a server or of any node of a cluster.

        `timeout` in seconds for one call; `bulk_timeout` for one that moves many items or builds
        an index. `index`: the mode of new indexes. `changed` is told when the store becomes unavailable (True) and when
        it is back.
        """
        self._hot = Link(url, timeout=timeout, connections=max_connections, changed=changed)
        self._bulk = Link(url, timeout=bulk_timeout, connections=4, scout=self._hot)
        self.address = self._hot.address
        self.leases = Leases(self._hot)
        self.cache = SharedCache(self._hot)
        self.indexes = Indexes(self._hot, self._bulk, index)
        self._last_live: dict[str, frozenset[str]] = {}
        self._script_searches = True
        """Until a server says that its scripts may not."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        self.indexes.close()
        await self._hot.close()
        await self._bulk.close()

    # The server

    @property
    def available(self) -> bool:
        """False after several failures in a row, until a call is answered: where none comes, `ping`."""
        return not self._hot.breaker.is_open

    async def ping(self) -> None:
        """Returns if Redis answers; raises `StoreUnavailable` if not."""
        await self._hot.each_node("PING")

    # Versions

    async def mark_live(self, name: str, fp: str, ref: str) -> None:
        """From now on every write must reach this fingerprint; `ref` is its version, "movies@3"."""
        await self._hot.command("HSET", Space(name).live, fp, ref)

    async def unmark_live(self, name: str, fp: str) -> None:
        """Also takes back that it is ready."""
        space = Space(name)
        await self._hot.command("EVAL", scripts.UNMARK, 2, space.live, space.ready, fp)

    async def live(self, name: str) -> dict[str, str]:
        """Fingerprint -> version of all that are live."""
        return self._note_live(name, await self._hot.command("HGETALL", Space(name).live))

    async def mark_ready(self, name: str, fp: str) -> None:
        """Every item has its vector in the index of this live fingerprint: searches may use it."""
        await self._hot.command("SADD", Space(name).ready, fp)

    async def ready(self, name: str) -> set[str]:
        """The fingerprints that are live and ready. Begins to read the vectors of those whose index is exact."""
        space = Space(name)
        live, ready, indexes = await self._hot.pipeline(
            [("HGETALL", space.live), ("SMEMBERS", space.ready), ("HGETALL", space.indexes)]
        )
        known = self._note_live(name, live).keys()
        self.indexes.keep(name, known)
        for fp, record in indexes.items():
            index = Index.from_bytes(record)
            if index.mode == "exact" and fp.decode() in known:
                self.indexes.exact(name, fp.decode(), index).follow()
        return known & {fp.decode() for fp in ready}

    # Items

    async def put(
        self,
        name: str,
        ids: Sequence[str],
        raws: Sequence[bytes],
        vectors: Mapping[str, Encoded | NDArray[np.floating[Any]]],
    ) -> Written:
        """Creates or replaces items with their vectors, `vectors[fingerprint]`; a bare array is one vector an item.

        An item and its vectors change together. Many items are not one transaction: after an error some may
        be stored, and the same put can be sent again. Of an id that comes twice the last one stays. Raises
        `ValueError` for an id, a vector or a number of them that cannot be stored, before anything is
        written.
        """
        space, keys = Space(name), encode_ids(ids)
        if len(raws) != len(ids):
            raise ValueError(f"{len(ids)} ids but {len(raws)} items")
        if not ids:
            return Written([], [], await self.live(name))
        indexes = {fp: await self.indexes.get(name, fp) for fp in vectors}
        rows = [_rows(f"{name} {fp}", encoded, len(ids), indexes[fp].dim) for fp, encoded in vectors.items()]
        token = secrets.token_hex(8)  # never given twice, also not to an item that was deleted in between
        revs = [f"{token}.{position}".encode() for position in range(len(ids))]

        created = [False] * len(ids)
        link = self._link_for(len(ids) * max(1, len(rows)))
        live: Mapping[bytes, bytes] = {}
        now: Mapping[bytes, bytes] = {}
        then: list[Command] = [("HGETALL", space.live), ("HGETALL", space.indexes)]
        if logged := [fp for fp, index in indexes.items() if index.logged]:
            then.insert(0, ("EVAL", scripts.TICK, 1, space.ticks, *logged))
        for trip in round_trips(keys, _most(indexes.values())):
            commands = []
            for bucket, positions in trip:
                items = [(keys[i], raws[i], revs[i], [row[i] for row in rows]) for i in positions]
                commands.append(_put_command(space, bucket, indexes, items))
            *replies, live, now = await link.pipeline(commands, then)
            for (_, positions), flags in zip(trip, replies, strict=False):
                for i, flag in zip(positions, flags, strict=True):
                    created[i] = bool(flag)
        for fp, index in indexes.items():
            if fp.encode() not in now:
                await self.indexes.remove_late(name, fp, keys)
            elif not index.logged and (record := now.get(fp.encode())) and Index.from_bytes(record).logged:
                self.indexes.forget(name, fp)  # it is about to become exact, and these changes were not noted
                await self.add_vectors(name, fp, ids, revs, vectors[fp])
        return Written(created, revs, self._note_live(name, live))

    async def add_vectors(
        self,
        name: str,
        fp: str,
        ids: Sequence[str],
        revs: Sequence[bytes],
        vectors: Encoded | NDArray[np.floating[Any]],
    ) -> int:
        """Adds vectors of one version to items that still have that `rev`; says how many items had it.

        An item that was written or deleted since its `rev` was read is left as it is: that write brought its
        own vector.
        """
        space, keys = Space(name), encode_ids(ids)
        if len(revs) != len(ids):
            raise ValueError(f"{len(ids)} ids but {len(revs)} revs")
        index = await self.indexes.get(name, fp)
        rows = _rows(f"{name} {fp}", vectors, len(ids), index.dim)
        then: list[Command] = [("EVAL", scripts.TICK, 1, space.ticks, fp)] if index.logged else []
        link, written = self._link_for(len(ids)), 0
        for trip in round_trips(keys, _most([index])):
            commands: list[Command] = []
            for bucket, positions in trip:
                item, vec = space.item_prefix(bucket), space.vector_prefix(fp, bucket)
                names = [space.log(fp, bucket), space.gone(fp, bucket)]
                names += [prefix + keys[i] for i in positions for prefix in (item, vec)]
                values = [value for i in positions for value in (revs[i], *rows[i])]
                head = ("EVAL", scripts.ADD, len(names), *names, "1" if index.logged else "0", len(item) + 1)
                commands.append((*head, *values))
            replies = await link.pipeline(commands, then)
            written += sum(replies[: len(commands)])
        return written

    async def get(self, name: str, item_id: str) -> Item:
        """Raises `ItemNotFound`."""
        [item] = await self.get_many(name, [item_id])
        if item is None:
            raise ItemNotFound(item_id, name)
        return item

    async def get_many(self, name: str, ids: Sequence[str]) -> list[Item | None]:
        """Parallel to `ids`; None where there is no such item."""
        return await self._items(self._link_for(len(ids)), name, ids, encode_ids(ids))

    async def get_vectors(self, name: str, fp: str, ids: Sequence[str]) -> list[Vectors | None]:
        """The vectors (dim,) of one version, parallel to `ids`; None where there is none."""
        space, found = Space(name), list[Vectors | None]()
        keys = [space.vector_prefix(fp, bucket_of(key)) + key for key in encode_ids(ids)]
        for chunk in chunks(len(ids)):
            commands = [("HGET", keys[i], "v") for i in chunk]
            for value in await self._link_for(len(ids)).pipeline(commands):
                found.append(None if value is None else np.frombuffer(value, "<f4"))
        return found

    async def delete(self, name: str, ids: Sequence[str]) -> list[bool]:
        """Removes items with their vectors of all live versions; says of each id whether there was one."""
        space, keys = Space(name), encode_ids(ids)
        if not ids:
            return []
        known = self._last_live.get(name)
        if known is None:
            known = frozenset(await self.live(name))
        link, existed = self._link_for(len(ids)), [False] * len(ids)
        live: Mapping[bytes, bytes] = {}
        then: list[Command] = [("EVAL", scripts.TICK, 1, space.ticks, *known), ("HGETALL", space.live)]
        for trip in round_trips(keys):
            commands: list[Command] = []
            for bucket, positions in trip:
                prefixes = (space.item_prefix(bucket), *(space.vector_prefix(fp, bucket) for fp in known))
                names = [space.count(bucket)]
                for fp in known:
                    names += (space.log(fp, bucket), space.gone(fp, bucket))
                names += [prefix + keys[i] for i in positions for prefix in prefixes]
                commands.append(("EVAL", scripts.DELETE, len(names), *names, len(known), len(prefixes[0]) + 1))
            *replies, live = await link.pipeline(commands, then)
            for (_, positions), flags in zip(trip, replies, strict=False):
                for i, flag in zip(positions, flags, strict=True):
                    existed[i] = bool(flag)
        # A version that went live since `known` was read may have got a vector from its backfill just before
        # the item went; after this point it gets none, because the item's rev is gone.
        for fp in self._note_live(name, live).keys() - known:
            for chunk in chunks(len(ids)):
                await self.indexes.remove_if_orphan(name, fp, [keys[i] for i in chunk])
        return existed

    async def count(self, name: str) -> int:
        space = Space(name)
        replies = await self._hot.pipeline([("GET", space.count(bucket)) for bucket in range(BUCKETS)])
        return sum(int(reply or 0) for reply in replies)

    async def scan(self, name: str, batch: int = 500) -> AsyncIterator[list[Item]]:
        """Every item that exists during the whole scan, at least once; one that is written meanwhile may come
        twice.

        Raises `StoreUnavailable` at the end if Redis was restarted on the way, since items may have been
        missed: the scan must be made again.
        """
        space = Space(name)
        start = len(space.item_prefix(0))
        run_id = (await self._bulk.server_info()).run_id
        waiting: list[bytes] = []
        async for keys in self._bulk.scan(space.every_item):
            waiting += [key[start:] for key in keys]
            while len(waiting) >= batch:
                yield await self._present(name, waiting[:batch])
                del waiting[:batch]
        if waiting:
            yield await self._present(name, waiting)
        if (await self._bulk.server_info()).run_id != run_id:
            raise StoreUnavailable("Redis was restarted during a scan of all items; it has to be made again")

    # Neighbors

    async def search(
        self,
        name: str,
        fp: str,
        vector: NDArray[np.floating[Any]],
        k: int,
        exclude: Collection[str] = (),
        where: Condition | None = None,
        schema: FeatureSchema | None = None,
    ) -> list[Neighbor]:
        """The k items nearest to `vector` (dim,) by cosine, best first, equal scores in the order of their
        ids.

        k results unless fewer items are left after `exclude` and `where`; an item whose score equals that of the last
        one may be the one that is cut off. Exact, except for "hnsw", which is nearly so.
        """
        [neighbors] = await self.search_many(name, fp, [Query(vector, k, exclude, where)], schema)
        return neighbors

    async def search_like(
        self,
        name: str,
        fp: str,
        item_id: str,
        k: int,
        exclude: Collection[str] = (),
        where: Condition | None = None,
        schema: FeatureSchema | None = None,
    ) -> list[Neighbor] | None:
        """As `search` with the vector of a stored item, which is none of its own neighbors; None if it has no vector.

        One round trip where the query engine searches.
        """
        out = {item_id, *exclude}
        if self._script_searches:
            try:
                found = await self._search_like(name, fp, item_id, k + len(out), where, schema)
            except NoColumn:  # as far as this replica has heard
                pass
            except errors.ResponseError as error:  # an index that is no more, and the other way finds the next one
                self._script_searches = "not allowed from script" not in str(error)
            else:
                if found is not None:
                    return [neighbor for neighbor in found if neighbor.id not in out][:k]
        [vector] = await self.get_vectors(name, fp, [item_id])
        return None if vector is None else await self.search(name, fp, vector, k, out, where, schema)

    async def _search_like(
        self, name: str, fp: str, item_id: str, n: int, where: Condition | None, schema: FeatureSchema | None
    ) -> list[Neighbor] | None:
        """None where the index, or a graph that found too few, has to be asked in another way."""
        index = await self.indexes.get(name, fp)
        test = None if where is None else _resolved(where, schema)
        if index.mode == "exact" or not _is_short(test):
            return None
        if test is not None:
            index.check(test)
        space, [key] = Space(name), encode_ids([item_id])
        prefix = space.vector_prefix(fp, bucket_of(key))
        _, *wanted, _ = search_command(space, fp, index, b"", n, test, self._hot.milliseconds)
        reply = await self._hot.command("EVAL", scripts.SEARCH_LIKE, 1, prefix + key, *wanted)
        if not reply:  # it has no vector
            return None
        found = read_neighbors(reply, len(prefix), to_check(index, test))
        return None if index.mode == "hnsw" and len(found) < n else found

    async def search_many(
        self, name: str, fp: str, queries: Sequence[Query], schema: FeatureSchema | None = None
    ) -> list[list[Neighbor]]:
        """As `search`, in one round trip. `schema` is that of the version, needed where a query has a `where`.

        Raises `ValueError` for a `where` that the schema does not allow.
        """
        tests = [None if query.where is None else _resolved(query.where, schema) for query in queries]
        for query in queries:
            if query.k < 1:
                raise ValueError(f"k must be at least 1, not {query.k}")
        try:
            return await self._search(name, fp, queries, tests)
        except (errors.ResponseError, NoIndex, NoColumn):  # it may have been made again in another form: read it again
            if not self.indexes.is_known(name, fp):
                raise
            self.indexes.forget(name, fp)
        try:
            return await self._search(name, fp, queries, tests)
        except errors.ResponseError as error:
            if says_no_index(error):  # it is being removed
                raise NoIndex(name, fp) from error
            raise

    async def _search(
        self, name: str, fp: str, queries: Sequence[Query], tests: Sequence[Test | None]
    ) -> list[list[Neighbor]]:
        if not queries:
            return []
        space, index = Space(name), await self.indexes.get(name, fp)
        what = f"{name} {fp}"
        matrix = [checked_rows(what, np.asarray(query.vector)[np.newaxis], 1, index.dim)[0] for query in queries]
        for test in tests:
            if test is not None:
                index.check(test)
        outs = [frozenset(query.exclude) for query in queries]
        if index.mode == "exact":
            return await self.indexes.exact(name, fp, index).search(
                [
                    (vector, query.k, frozenset(item_id.encode() for item_id in out), test)
                    for vector, query, out, test in zip(matrix, queries, outs, tests, strict=True)
                ]
            )
        ways = [
            (row.tobytes(), query.k + len(out), test)
            for row, query, out, test in zip(matrix, queries, outs, tests, strict=True)
        ]
        found = await self._knn(space, fp, index, ways, exhaustive=False)
        # A graph can miss more than a few: many vectors that are nearly the same may be an island in it, from which
        # nothing else is reached. That shows, and then every vector is compared.
        short = [i for i, (_, n, _) in enumerate(ways) if len(found[i]) < n] if index.mode == "hnsw" else []
        if short:
            whole = await self._knn(space, fp, index, [ways[i] for i in short], exhaustive=True)
            for i, neighbors in zip(short, whole, strict=True):
                found[i] = neighbors
        return [
            [neighbor for neighbor in neighbors if neighbor.id not in out][: query.k]
            for neighbors, query, out in zip(found, queries, outs, strict=True)
        ]

    async def _knn(
        self, space: Space, fp: str, index: Index, ways: Sequence[tuple[bytes, int, Test | None]], exhaustive: bool
    ) -> list[list[Neighbor]]:
        """`ways`: vector, how many, test."""
        parts = _parts([n for _, n, _ in ways])
        link = self._hot if len(parts) == 1 and all(_is_short(test) for _, _, test in ways) else self._bulk
        replies = list[Any]()
        for part in parts:  # one after the other: between them Redis has time for others
            commands = [search_command(space, fp, index, *ways[i], link.milliseconds, exhaustive) for i in part]
            replies += await link.pipeline(commands)
        start = len(space.vector_prefix(fp, 0))
        return [
            read_neighbors(reply, start, None if exhaustive else to_check(index, test))
            for reply, (_, _, test) in zip(replies, ways, strict=True)
        ]

    # Helpers

    def _link_for(self, items: int) -> Link:
        return self._hot if items <= HOT_ITEMS else self._bulk

    async def _items(self, link: Link, name: str, ids: Sequence[str], keys: Sequence[bytes]) -> list[Item | None]:
        space, found = Space(name), list[Item | None]()
        for chunk in chunks(len(ids)):
            commands = [("HMGET", space.item_prefix(bucket_of(keys[i])) + keys[i], "raw", "rev") for i in chunk]
            for i, (raw, rev) in zip(chunk, await link.pipeline(commands), strict=True):
                found.append(None if rev is None else Item(ids[i], raw, rev))
        return found

    async def _present(self, name: str, keys: Sequence[bytes]) -> list[Item]:
        found = await self._items(self._bulk, name, [key.decode() for key in keys], keys)
        return [item for item in found if item is not None]

    def _note_live(self, name: str, reply: Mapping[bytes, bytes]) -> dict[str, str]:
        live = {fp.decode(): ref.decode() for fp, ref in reply.items()}
        self._last_live[name] = frozenset(live)
        return live


def _most(indexes: Collection[Index]) -> int:
    """Items that one script may write: into a graph each takes as long as ten into another index."""
    most = GRAPH_SCRIPT if any(index.mode == "hnsw" for index in indexes) else SCRIPT
    return max(1, most // max(1, len(indexes)))


def _put_command(
    space: Space,
    bucket: int,
    indexes: Mapping[str, Index],
    items: Sequence[tuple[bytes, bytes, bytes, Sequence[tuple[bytes, bytes]]]],
) -> Command:
    """`items`: key, raw, rev, and for each fingerprint the vector and its attributes."""
    item, vectors = space.item_prefix(bucket), [space.vector_prefix(fp, bucket) for fp in indexes]
    names: list[bytes] = [space.count(bucket)]
    for fp, index in indexes.items():
        if index.logged:
            names += (space.log(fp, bucket), space.gone(fp, bucket))
    values: list[object] = ["".join("1" if index.logged else "0" for index in indexes.values()), len(item) + 1]
    for key, raw, rev, rows in items:
        names.append(item + key)
        names += [prefix + key for prefix in vectors]
        values += (raw, rev)
        for row in rows:
            values += row
    return ("EVAL", scripts.PUT, len(names), *names, *values)


def _rows(what: str, encoded: Encoded | NDArray[np.floating[Any]], count: int, dim: int) -> list[tuple[bytes, bytes]]:
    """Of each item its vector and its attributes as Redis keeps them; both empty where it has no vector."""
    if not isinstance(encoded, Encoded):
        encoded = Encoded(encoded)
    places = range(count) if encoded.rows is None else encoded.rows
    data, size = checked_rows(what, encoded.vectors, len(places), dim).tobytes(), 4 * dim
    rows = [(b"", b"")] * count
    attributes = encoded.attributes or [{}] * len(places)
    for n, (place, fields) in enumerate(zip(places, attributes, strict=True)):
        rows[place] = data[n * size : (n + 1) * size], orjson.dumps(fields) if fields else b""
    return rows


def _parts(sizes: Sequence[int]) -> list[range]:
    """Positions in their order, in parts of at most `HOT_NEIGHBORS` together, or one.

    >>> _parts([4000, 1000, 1, 9000])
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    parts, start, total = list[range](), 0, 0
    for i, many in enumerate(sizes):
        if i > start and total + many > HOT_NEIGHBORS:
            parts.append(range(start, i))
            start, total = i, 0
        total += many
    return [*parts, range(start, len(sizes))]


def _is_short(test: Test | None) -> bool:
    return test is None or size(test) <= HOT_TESTS


def _resolved(where: Condition, schema: FeatureSchema | None) -> Test:
    if schema is None:
        raise ValueError("a search with `where` needs the schema of the version")
    return resolve(where, schema)
