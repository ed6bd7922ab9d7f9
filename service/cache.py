"""EncodeCache: what the encoder made of an item, kept by the item's content and the version's fingerprint.

In this process the last `entries` items; with the mode "redis" also in Redis, for all replicas. An item that several
requests bring at once is encoded by one of them. Nothing here can fail a request: without Redis there is no second
level, and what cannot be kept is encoded.
"""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson

from itemvec.errors import InvalidItem, StoreUnavailable
from itemvec.features import Status
from itemvec.version import Encoding, ModelVersion
from service.index import Vectors
from service.keys import cache_key
from service.metrics import Metrics
from service.store import Store

CacheMode = Literal["off", "local", "redis"]
Item = Mapping[str, Any]
Key = tuple[str, bytes]
"""Fingerprint and digest of the item."""

Compute = Callable[[Sequence[Item], str], Awaitable[tuple[Encoding, float]]]
"""(items, pointer) -> the encoding, and the seconds that it waited for its turn."""

CACHED_ITEMS = 32
"""A request of more items is not looked up. Those are tables on their way through, mostly new: each item would pay for
the look, and together they would push out what single requests ask for again and again."""

KEPT_SECONDS = 86_400.0
"""In Redis."""

RESULTS = ("local", "redis", "miss")

WRITES = 32
"""Writes to Redis on their way; beyond, new ones are left out."""


class Entry(NamedTuple):
    vector: Vectors
    status: dict[str, Status]

    def to_bytes(self) -> bytes:
        return self.vector.astype("<f4", copy=False).tobytes() + (orjson.dumps(self.status) if self.status else b"")

    @classmethod
    def from_bytes(cls, value: bytes, dim: int) -> "Entry":
        status = value[4 * dim :]
        return cls(np.frombuffer(value[: 4 * dim], "<f4"), orjson.loads(status) if status else {})


class EncodeCache:
    def __init__(self, store: Store, mode: CacheMode, entries: int, metrics: Metrics | None = None) -> None:
        """`entries`: items kept in this process."""
        self._store, self._mode, self._limit, self._metrics = store, mode, entries, metrics
        self._kept: OrderedDict[Key, Entry] = OrderedDict()
        self._flying: dict[Key, asyncio.Future[None]] = {}
        """What a request is encoding now; another that brings the same item waits for it."""

        self._writes: set[asyncio.Task[None]] = set()

    async def encode(
        self, version: ModelVersion, items: Sequence[Item], pointer: str, compute: Compute
    ) -> tuple[Encoding, float]:
        """As `compute` would give it. Raises what `compute` raises."""
        digests = None if self._mode == "off" or len(items) > CACHED_ITEMS else _digests(items)
        if digests is None:
            return await compute(items, pointer)
        keys = [(version.fingerprint, digest) for digest in digests]
        if len(keys) == 1 and self._mode == "local":
            return await self._encode_one(version, items, keys[0], pointer, compute)
        found: list[Entry | None] = [None] * len(items)
        waited, tally = 0.0, dict.fromkeys(RESULTS, 0)
        while missing := [i for i, entry in enumerate(found) if entry is None]:
            for i in missing:
                found[i] = self._get(keys[i])
            missing = [i for i in missing if found[i] is None]
            if mine := [i for i in missing if keys[i] not in self._flying]:
                waited += await self._find(version, items, keys, found, mine, tally, pointer, compute)
            elif missing:  # another request is at it, and leaves it in memory; if it fails, it is ours to try
                await asyncio.shield(self._flying[keys[missing[0]]])
        tally["local"] = len(items) - tally["redis"] - tally["miss"]
        for result, count in tally.items():
            self._count(version, result, count)
        entries = [entry for entry in found if entry is not None]
        return Encoding(np.array([entry.vector for entry in entries]), [entry.status for entry in entries]), waited

    async def _encode_one(
        self, version: ModelVersion, items: Sequence[Item], key: Key, pointer: str, compute: Compute
    ) -> tuple[Encoding, float]:
        """The same of one item, which nearly every request is, and no other level: half of the work."""
        while (entry := self._get(key)) is None and (other := self._flying.get(key)) is not None:
            await asyncio.shield(other)
        if entry is not None:
            self._count(version, "local", 1)
            return Encoding(entry.vector[None], [entry.status]), 0.0
        self._flying[key] = flying = asyncio.get_running_loop().create_future()
        try:
            encoding, waited = await compute(items, pointer)
        finally:
            del self._flying[key]
            flying.set_result(None)
        self._keep(key, Entry(encoding.vectors[0].copy(), encoding.statuses[0]))
        self._count(version, "miss", 1)
        return encoding, waited

    def _count(self, version: ModelVersion, result: str, items: int) -> None:
        if self._metrics is not None:
            self._metrics.cache(version.ref, result, items)

    def _get(self, key: Key) -> Entry | None:
        entry = self._kept.get(key)
        if entry is not None:
            self._kept.move_to_end(key)
        return entry

    def _keep(self, key: Key, entry: Entry) -> None:
        self._kept[key] = entry
        if len(self._kept) > self._limit:
            self._kept.popitem(last=False)

    async def _find(
        self,
        version: ModelVersion,
        items: Sequence[Item],
        keys: Sequence[Key],
        found: list[Entry | None],
        mine: Sequence[int],
        tally: dict[str, int],
        pointer: str,
        compute: Compute,
    ) -> float:
        """Reads from Redis or encodes the items `mine`, which no other request is at; fills them into `found`."""
        flying = asyncio.get_running_loop().create_future()
        here = dict.fromkeys([keys[i] for i in mine], flying)
        self._flying |= here
        made: dict[Key, Entry] = {}
        waited = 0.0
        try:
            if self._mode == "redis":
                made = await self._fetch(version, list(here))
                tally["redis"] += sum(keys[i] in made for i in mine)
            if unknown := [*{keys[i]: i for i in mine if keys[i] not in made}.values()]:
                tally["miss"] += len(unknown)
                encoding, waited = await self._compute(items, unknown, pointer, compute)
                # Copies, since a row of a large array would keep all of it in memory.
                new = {keys[i]: Entry(encoding.vectors[n].copy(), encoding.statuses[n]) for n, i in enumerate(unknown)}
                made |= new
                self._send(new)
        finally:
            for key in here:
                del self._flying[key]
            flying.set_result(None)
        for key, entry in made.items():
            self._keep(key, entry)
        for i in mine:
            found[i] = made[keys[i]]
        return waited

    async def _compute(
        self, items: Sequence[Item], unknown: Sequence[int], pointer: str, compute: Compute
    ) -> tuple[Encoding, float]:
        if len(unknown) == len(items):
            return await compute(items, pointer)
        try:
            return await compute([items[i] for i in unknown], pointer)
        except InvalidItem:
            await compute(items, pointer)  # raises it again, with the places that the caller knows
            raise

    async def _fetch(self, version: ModelVersion, keys: Sequence[Key]) -> dict[Key, Entry]:
        try:
            values = await self._store.cache.read([cache_key(*key) for key in keys])
        except StoreUnavailable:
            return {}
        return {
            key: Entry.from_bytes(value, version.dim)
            for key, value in zip(keys, values, strict=True)
            if value is not None
        }

    def _send(self, made: Mapping[Key, Entry]) -> None:
        """To Redis; nobody waits for it."""
        if self._mode == "redis" and self._store.available and len(self._writes) < WRITES:
            task = asyncio.create_task(self._write({cache_key(*key): entry.to_bytes() for key, entry in made.items()}))
            self._writes.add(task)
            task.add_done_callback(self._writes.discard)

    async def _write(self, values: Mapping[str, bytes]) -> None:
        with contextlib.suppress(StoreUnavailable):
            await self._store.cache.write(values, KEPT_SECONDS)


def _digests(items: Sequence[Item]) -> list[bytes] | None:
    """Of each item, the same for the same columns and values; None if one cannot be written as JSON."""
    try:
        return [blake2b(orjson.dumps(item, option=orjson.OPT_SORT_KEYS), digest_size=16).digest() for item in items]
    except TypeError:
        return None
