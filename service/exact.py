"""ExactIndex: all vectors of one version in this process, compared one by one; kept as fresh as Redis itself.

For a Redis or Valkey without a query engine, and for a Redis Cluster. A search first asks for one number (`iv:tick`),
which every write of every replica moves on before it is acknowledged. If it moved, the ids that changed since are in
the logs of their buckets, and their vectors are read; so what was acknowledged before a search is in its answer.
"""

import asyncio
import time
from collections.abc import Collection, Sequence
from functools import reduce

import numpy as np
import orjson
from numpy.typing import NDArray

from itemvec.errors import StoreUnavailable
from service.conditions import AllOf, AnyOf, Between, NoneOf, TagIn, Test
from service.index import Neighbor, NoIndex, Vectors, rounded
from service.keys import BUCKETS, Space, bucket_of, chunks
from service.link import Command, Link
from service.scripts import GONE_SECONDS

Mask = NDArray[np.bool_]
ExactQuery = tuple[Vectors, int, frozenset[bytes], Test | None]
"""Vector (dim,), k, excluded ids, test."""

INLINE_NUMBERS = 4_000_000
"""Vectors of so many numbers together are compared in the event loop, in under a millisecond; more in a thread."""

READING_SECONDS = 1.0
"""A search waits so long for what changed since the last one, 100,000 vectors perhaps; it has just heard from Redis."""

RESTART_SECONDS = 10.0
"""A Redis that was restarted may have lost its last second, and then all is read anew. This often it is asked."""


class Table:
    """Vectors with their ids and fields, in memory. A removed row is used again."""

    def __init__(self, dim: int) -> None:
        self._matrix = np.zeros((64, dim), np.float32)
        self._alive: Mask = np.zeros(64, bool)
        self._ids: list[bytes] = []
        self._row: dict[bytes, int] = {}
        self._free: list[int] = []
        self._fields: list[dict[str, str]] = []
        self._rows_of: dict[tuple[str, str], set[int]] = {}
        self._numbers: dict[str, NDArray[np.float64]] = {}

    def __len__(self) -> int:
        return len(self._row)

    @property
    def numbers(self) -> int:
        return len(self._ids) * self._matrix.shape[1]

    def update(self, entries: Sequence[tuple[bytes, bytes, dict[str, str]]]) -> None:
        """Each entry is (key, vector, fields); of a key that comes twice the last stays."""
        if not entries:
            return
        rows = [self._row_for(key, fields) for key, _, fields in entries]
        vectors = np.frombuffer(b"".join(vector for _, vector, _ in entries), "<f4").reshape(len(entries), -1)
        self._matrix[rows] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def remove(self, key: bytes) -> None:
        row = self._row.pop(key, None)
        if row is not None:
            self._forget_fields(row)
            self._fields[row] = {}
            self._alive[row] = False
            self._free.append(row)

    def search(
        self, query: Vectors, k: int, exclude: Collection[bytes] = (), test: Test | None = None
    ) -> list[Neighbor]:
        """As `Store.search`; `query` (dim,) of any length."""
        n = len(self._ids)
        rows: NDArray[np.int64] | None = None
        if test is not None or self._free:
            mask = self._alive[:n] if test is None else self._mask(test) & self._alive[:n]
            rows = np.flatnonzero(mask)
        if rows is not None and len(rows) < n // 4:  # to gather a few rows is cheaper than to compare them all
            scores = self._matrix[rows] @ (query / np.linalg.norm(query))
        else:
            scores = self._matrix[:n] @ (query / np.linalg.norm(query))
            if rows is not None:
                scores = scores[rows]
        take = min(k + len(exclude), len(scores))
        best = np.argpartition(scores, -take)[-take:] if take < len(scores) else np.arange(len(scores))
        found = []
        for place in best.tolist():
            key = self._ids[place if rows is None else rows[place]]
            if key not in exclude:
                found.append(Neighbor(key.decode(), rounded(float(scores[place]))))
        found.sort(key=lambda neighbor: (-neighbor.score, neighbor.id))
        return found[:k]

    def _row_for(self, key: bytes, fields: dict[str, str]) -> int:
        row = self._row.get(key)
        if row is None:
            row = self._new_row(key)
        else:
            self._forget_fields(row)
        self._fields[row] = fields
        for field, text in fields.items():
            if _is_number(text):
                self._column(field)[row] = float(text)
            else:
                for tag in text.split(","):
                    self._rows_of.setdefault((field, tag), set()).add(row)
        return row

    def _new_row(self, key: bytes) -> int:
        if self._free:
            row = self._free.pop()
            self._ids[row] = key
        else:
            row = len(self._ids)
            self._ids.append(key)
            self._fields.append({})
            if row == len(self._matrix):
                self._matrix = np.concatenate([self._matrix, np.zeros_like(self._matrix)])
                self._alive = np.concatenate([self._alive, np.zeros_like(self._alive)])
                for field, column in self._numbers.items():
                    self._numbers[field] = np.concatenate([column, np.full_like(column, np.nan)])
        self._row[key] = row
        self._alive[row] = True
        return row

    def _forget_fields(self, row: int) -> None:
        for field, text in self._fields[row].items():
            if field in self._numbers:
                self._numbers[field][row] = np.nan
            else:
                for tag in text.split(","):
                    rows = self._rows_of[field, tag]
                    rows.discard(row)
                    if not rows:
                        del self._rows_of[field, tag]

    def _column(self, field: str) -> NDArray[np.float64]:
        if field not in self._numbers:
            self._numbers[field] = np.full(len(self._matrix), np.nan)
        return self._numbers[field]

    def _mask(self, test: Test) -> Mask:
        n = len(self._ids)
        match test:
            case TagIn(field, tags):
                mask = np.zeros(n, bool)
                for tag in tags:
                    rows = self._rows_of.get((field, tag), set())
                    mask[np.fromiter(rows, np.int64, len(rows))] = True
                return mask
            case Between(field, low, high, without_low, without_high):
                column = self._column(field)[:n]  # NaN, a missing value, is in no range
                above = column > low if without_low else column >= low
                return above & (column < high if without_high else column <= high)
            case AllOf(parts):
                return reduce(np.logical_and, [self._mask(part) for part in parts])
            case AnyOf(parts):
                return reduce(np.logical_or, [self._mask(part) for part in parts])
            case NoneOf(part):
                return ~self._mask(part)


class ExactIndex:
    """A `Table` that follows what Redis holds of one version."""

    def __init__(self, name: str, fp: str, dim: int, hot: Link, bulk: Link) -> None:
        self._name, self._fp, self._dim = name, fp, dim
        self._space, self._hot, self._bulk = Space(name), hot, bulk
        self._table = Table(dim)
        self._lock = asyncio.Lock()
        self._queued: asyncio.Task[None] | None = None
        """The next reading, not begun yet: it will see all that was acknowledged until now."""

        self._tasks: set[asyncio.Task[None]] = set()
        self._made = b""
        self._tick = 0
        self._after = [0] * BUCKETS
        """Of each bucket, the time of the last change that was read."""

        self._runs: frozenset[str] = frozenset()
        self._looked = self._checked = float("-inf")

    async def search(self, queries: Sequence[ExactQuery]) -> list[list[Neighbor]]:
        """Raises `StoreUnavailable`, also while all vectors are being read."""
        if not await self._is_current():
            reading = self.follow()
            await asyncio.wait({reading}, timeout=READING_SECONDS)
            if not reading.done():
                raise StoreUnavailable(f"the vectors of {self._name} are being read into memory", retry_after=1.0)
            reading.result()

        def compare() -> list[list[Neighbor]]:
            return [self._table.search(*query) for query in queries]

        if self._table.numbers * len(queries) <= INLINE_NUMBERS:
            return compare()
        async with self._lock:  # so that nothing changes under the thread
            return await asyncio.to_thread(compare)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()

    def follow(self) -> "asyncio.Task[None]":
        """Begins to bring the table up to what has been acknowledged by now, unless that is about to begin anyway."""
        if self._queued is None:
            self._queued = task = asyncio.create_task(self._read())
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        return self._queued

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if self._queued is task:  # cancelled before it began
            self._queued = None
        if not task.cancelled():
            task.exception()  # whoever waits for it has it; if nobody does, the next search tries again

    async def _is_current(self) -> bool:
        made, tick = await self._state(self._hot)
        fresh = made == self._made and tick == self._tick and time.monotonic() - self._checked < RESTART_SECONDS
        if fresh:
            self._looked = time.monotonic()
        return fresh

    async def _state(self, link: Link) -> tuple[bytes, int]:
        tick, made = await link.command("HMGET", self._space.ticks, self._fp, f"{self._fp}:made")
        if made is None:
            raise NoIndex(self._name, self._fp)
        return made, int(tick or 0)

    async def _read(self) -> None:
        async with self._lock:
            self._queued = None
            now = time.monotonic()
            made, tick = await self._state(self._bulk)
            runs, checked = self._runs, self._checked
            if now - checked >= RESTART_SECONDS:
                runs, checked = frozenset(str(i["run_id"]) for i in await self._bulk.each_node("INFO", "server")), now
            forgotten = now - self._looked > GONE_SECONDS / 2
            anew = made != self._made or tick < self._tick or runs != self._runs or forgotten
            if anew or tick != self._tick:
                # Beside the old table, which is searched until the new one is whole.
                table, after = (Table(self._dim), [0] * BUCKETS) if anew else (self._table, self._after)
                self._after = await self._read_changes(table, after)
                self._table = table
            self._made, self._tick, self._runs = made, tick, runs
            self._looked, self._checked = now, checked

    async def _read_changes(self, table: Table, after: Sequence[int]) -> list[int]:
        """Returns the times of the last changes that were read."""
        commands: list[Command] = []
        for bucket, time_read in enumerate(after):
            span = (f"({time_read}", "+inf", "WITHSCORES")
            commands.append(("ZRANGEBYSCORE", self._space.log(self._fp, bucket), *span))
            commands.append(("ZRANGEBYSCORE", self._space.gone(self._fp, bucket), *span))
        keys: list[bytes] = []
        latest = list(after)
        for place, changes in enumerate(await self._bulk.pipeline(commands)):
            for key, score in changes:
                keys.append(key)
                latest[place // 2] = max(latest[place // 2], int(score))
        for chunk in chunks(len(keys)):
            some = [keys[i] for i in chunk]
            found = await self._bulk.pipeline(
                [("HMGET", self._space.vector_prefix(self._fp, bucket_of(key)) + key, "v", "a") for key in some]
            )
            entries = []
            for key, (vector, attributes) in zip(some, found, strict=True):
                if vector is None:
                    table.remove(key)
                else:
                    entries.append((key, vector, {} if attributes is None else orjson.loads(attributes)))
            table.update(entries)
        return latest


def _is_number(text: str) -> bool:
    """Tags begin with `t` and names of fields with `f_`."""
    return not text.startswith(("t", "f_"))
