"""The model versions that this replica holds in memory, and the one pointer per model that says which is served.

A version is loaded and verified in a thread beside the served one; then the pointer moves. A request takes its
version once, at its start, and derives every key, index and answer from it, so a switch in between cannot mix two.

Which version is to be served is the registry's to say (alias `champion`); a version is served only once its index of
the stored items is complete, which Redis knows (`Store.ready`). A replica reads both at its start and polls them, so
one that missed a switch follows by itself. Making an index complete is the work of `service/promote.py`.
"""

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import inf
from time import monotonic, perf_counter
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from itemvec.errors import (
    FieldError,
    InvalidItem,
    ItemvecError,
    ModelNotFound,
    RegistryError,
    StoreUnavailable,
    VersionCorrupt,
    VersionNotFound,
)
from itemvec.registry import CHAMPION, PREVIOUS, Registry
from itemvec.version import Encoding, ModelVersion
from service import attributes
from service.breaker import FAILURES
from service.cache import EncodeCache
from service.config import NO_CHAMPION, ServiceConfig
from service.metrics import Metrics
from service.problems import InvalidRequest, NotSearchable
from service.store import Store
from service.together import Read, Together

log = logging.getLogger("itemvec.service")

T = TypeVar("T")

INLINE_ITEMS = 32
"""Up to this many items are encoded in the event loop, where handing them to a thread would cost more than the work.
More would hold up every other request for milliseconds, so they go to a thread."""

INLINE_BYTES = 65_536
"""The same of a body that is read, and of vectors that are written."""

ROWS_AT_ONCE = 2048
"""Of an Arrow stream: some 40 ms of work on films, after which another request has its turn. Fewer cost more each."""

YOUNG_SECONDS, SOON = 10.0, 0.2
"""For so long a replica may answer requests before the others know of it, and tell it of a switch: until then it reads
the registry itself so often."""

REFUSED_SECONDS = 30.0
"""A corrupt version is not read again for so long: reading all its files is work, and polls and callers repeat."""


class LoadedModels:
    """Champions of all models, plus the other versions that were asked for last."""

    def __init__(
        self,
        registry: Registry,
        store: Store,
        config: ServiceConfig,
        metrics: Metrics | None = None,
        read: Read | None = None,
    ) -> None:
        """`read` is what our own listeners have read (`service/listener.py`)."""
        self.registry = registry
        self._store, self._metrics = store, metrics
        self._default, self._keep = config.model, config.versions_kept
        self._poll_seconds = config.registry_poll_seconds
        self._champions: dict[str, ModelVersion] = {}
        self._others: OrderedDict[tuple[str, int], ModelVersion] = OrderedDict()
        self._searchable: dict[str, set[str]] = {}
        self._loading: dict[tuple[str, int], asyncio.Task[ModelVersion]] = {}
        self._refused: dict[tuple[str, int], tuple[VersionCorrupt, float]] = {}
        self._files = ThreadPoolExecutor(1, "itemvec-load")
        self._encoders = ThreadPoolExecutor(config.threads_of_a_replica(), "itemvec-encode")
        self._together = Together(read)
        self._caches = config.cache != "off"
        self._cache = EncodeCache(store, config.cache, config.cache_items, metrics)
        self._behind: Callable[[str, int], Awaitable[None]] | None = None
        self._wake = asyncio.Event()
        self._polling: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Loads the champions and begins to poll; a second call does nothing.

        Raises an `ItemvecError` when no model can be served at all.
        """
        if self._polling is not None:
            return
        failed: ItemvecError | None = None
        for name in await self.in_thread(self.registry.names):
            try:
                await self._begin(name)
            except ItemvecError as error:
                log.warning("model %s is not served: %s", name, error)
                failed = error
        if not self.ready:
            raise failed or RegistryError(NO_CHAMPION.format(self.registry.url))
        self._polling = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._polling is not None:
            self._polling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._polling
            self._polling = None
        self._files.shutdown(wait=False, cancel_futures=True)
        self._encoders.shutdown(wait=False, cancel_futures=True)

    def when_behind(self, act: Callable[[str, int], Awaitable[None]]) -> None:
        """`act(name, version)` is called when the registry's champion is one whose index is not complete."""
        self._behind = act
        self._wake.set()

    # Versions

    @property
    def ready(self) -> bool:
        return bool(self._champions) if self._default is None else self._default in self._champions

    @property
    def serving(self) -> Mapping[str, ModelVersion]:
        return self._champions

    def champion(self, name: str | None = None) -> ModelVersion:
        """The served version; raises `ModelNotFound`."""
        name = self._default_name() if name is None else name
        champion = self._champions.get(name)
        if champion is None:
            raise ModelNotFound(name, sorted(self._champions))
        return champion

    def held(self, ref: str | None) -> ModelVersion | None:
        """The same as `get`, of a version that is loaded; None where a file would have to be read."""
        name, at, which = (self._default_name() if ref is None else ref).partition("@")
        champion = self._champions.get(name)
        if not at or which == CHAMPION:
            return champion
        if not (which.isascii() and which.isdigit()):  # an alias, which the registry knows
            return None
        if champion is not None and champion.version == int(which):
            return champion
        if (held := self._others.get((name, int(which)))) is not None:
            self._others.move_to_end((name, int(which)))
        return held

    async def get(self, ref: str | None) -> ModelVersion:
        """The version that `ref` means now: None, `movies`, `movies@champion`, `movies@challenger`, `movies@7`.

        Raises `ModelNotFound`, `VersionNotFound`, `VersionCorrupt`.
        """
        if (held := self.held(ref)) is not None:
            return held
        name, at, which = (self._default_name() if ref is None else ref).partition("@")
        if not at or which == CHAMPION:
            return self.champion(name)
        if which.isascii() and which.isdigit():
            number = int(which)
        else:
            _, number = await self.in_thread(self.registry.resolve, f"{name}@{which}")
            if (held := self.held(f"{name}@{number}")) is not None:
                return held
        return await self._load(name, number)

    async def prepare_version(self, name: str, version: int) -> str:
        """Loads a version beside the served one. The answer, its fingerprint, says that this replica can serve it."""
        return (await self.get(f"{name}@{version}")).fingerprint

    async def commit_version(self, name: str, version: int) -> None:
        """Moves the pointer. What was served stays loaded: writes must still reach it, and a rollback may come."""
        new = await self.get(f"{name}@{version}")
        old = self._champions.get(name)
        if old is new:
            return
        self._champions[name] = new
        self._others.pop((name, version), None)
        if old is not None:
            self._hold(old)
        if self._metrics is not None:
            self._metrics.model(name, new.ref, new.fingerprint)
        log.info("serving %s (fingerprint %s), before %s", new.ref, new.fingerprint, old.ref if old else "none")

    async def is_searchable(self, version: ModelVersion) -> bool:
        """Is the version's index complete? One that is still filled answers partly, without an error."""
        name, fingerprint = version.name, version.fingerprint
        if version is self._champions.get(name) and fingerprint in self._searchable.get(name, ()):
            return True
        # Of another version the index may have been dropped and begun again since the last poll.
        return fingerprint in await self._read_searchable(name)

    async def check_searchable(self, version: ModelVersion) -> None:
        """Raises `StoreUnavailable` while the served version's index is filled, `NotSearchable` for one without."""
        if await self.is_searchable(version):
            return
        if version is self._champions.get(version.name):
            raise StoreUnavailable(f"the index of {version.ref} is still being filled", retry_after=2.0)
        live = await self._store.live(version.name)
        searchable = self._searchable[version.name]
        raise NotSearchable(version.ref, sorted(ref for fingerprint, ref in live.items() if fingerprint in searchable))

    # Work in threads

    async def encode(
        self, version: ModelVersion, items: Sequence[Mapping[str, Any]], pointer: str = "", cached: bool = True
    ) -> tuple[Encoding, float]:
        """The encoding, and the seconds that the items waited for a thread.

        `cached`: items that came before, or come just now, need not be encoded again.
        """
        if cached and self._caches:
            return await self._cache.encode(version, items, pointer, partial(self._compute_items, version))
        return await self._compute_items(version, items, pointer)

    async def _compute_items(
        self, version: ModelVersion, items: Sequence[Mapping[str, Any]], pointer: str
    ) -> tuple[Encoding, float]:
        if len(items) <= INLINE_ITEMS:
            encoding, waited, seconds = await self._together.encode(version, items, pointer)
        else:
            encoding, waited, seconds = await self.compute(len(items), partial(version.encode, items, pointer))
        if self._metrics is not None:
            self._metrics.encoded(version.ref, len(items), seconds)
        return encoding, waited

    async def encode_table(self, version: ModelVersion, table: pa.Table, pointer: str = "") -> tuple[Encoding, float]:
        """The same for Arrow columns; in parts, so that a long one does not keep the others waiting."""
        parts, took, waited = list[Encoding](), list[float](), 0.0
        for start in range(0, len(table), ROWS_AT_ONCE):
            part = table.slice(start, ROWS_AT_ONCE)
            try:
                encoding, queued, seconds = await self.compute(len(part), partial(version.encode_arrow, part))
            except InvalidItem as invalid:
                raise InvalidItem(_moved(error, pointer, start) for error in invalid.errors) from None
            parts.append(encoding)
            took.append(seconds)
            waited += queued
        if self._metrics is not None:
            for encoding, seconds in zip(parts, took, strict=True):
                self._metrics.encoded(version.ref, len(encoding.vectors), seconds)
        if len(parts) == 1:
            return parts[0], waited
        statuses = [status for part in parts for status in part.statuses]
        return Encoding(np.concatenate([part.vectors for part in parts]), statuses), waited

    async def compute(self, items: int, work: Callable[[], T]) -> tuple[T, float, float]:
        """What `work` over so many items gives, the seconds that it waited for a thread, and those that it took."""
        if items <= INLINE_ITEMS:
            began = perf_counter()
            return work(), 0.0, perf_counter() - began
        asked = perf_counter()

        def timed() -> tuple[T, float, float]:
            began = perf_counter()
            done = work()
            return done, began - asked, perf_counter() - began

        return await asyncio.get_running_loop().run_in_executor(self._encoders, timed)

    async def aside(self, size: int, work: Callable[..., T], *args: object) -> T:
        """What `work` over so many bytes gives. Of many by a thread that encodes: the event loop would hand the
        interpreter back and forth with it at every step, and both take a sixth more of a core for the same requests."""
        if size <= INLINE_BYTES:
            return work(*args)
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work, *args)

    async def in_thread(self, read: Callable[..., T], *args: object) -> T:
        """For what reads the registry's files, which may lie on a slow disk."""
        return await asyncio.get_running_loop().run_in_executor(self._files, read, *args)

    # Helpers

    def _default_name(self) -> str:
        if self._default is not None:
            return self._default
        if len(self._champions) > 1:
            names = ", ".join(sorted(self._champions))
            raise InvalidRequest([FieldError("/model", f"is missing, and there are several models: {names}")])
        return next(iter(self._champions), "")

    async def _load(self, name: str, number: int) -> ModelVersion:
        key = (name, number)
        if (failed := self._refused.get(key)) is not None and failed[1] > monotonic():
            raise failed[0]
        task = self._loading.get(key)
        if task is None:  # however many requests ask for a version, it is loaded once
            task = asyncio.create_task(self.in_thread(self.registry.load, f"{name}@{number}"))
            self._loading[key] = task
            task.add_done_callback(lambda _: self._loading.pop(key, None))
        try:
            version = await asyncio.shield(task)  # a caller that gives up must not fail the others
        except VersionCorrupt as error:
            self._refused[key] = (error, monotonic() + REFUSED_SECONDS)
            raise
        self._hold(version)
        return version

    def _hold(self, version: ModelVersion) -> None:
        key = (version.name, version.version)
        if self._champions.get(version.name) is version:
            return
        self._others[key] = version
        self._others.move_to_end(key)
        while len(self._others) > self._keep:
            self._others.popitem(last=False)

    async def _begin(self, name: str) -> None:
        """Serves the champion, or until its index is complete the version that the store is complete for."""
        aliases = await self.in_thread(self.registry.aliases, name)
        if CHAMPION not in aliases:
            return
        try:
            version = await self.get(f"{name}@{aliases[CHAMPION]}")
        except (VersionCorrupt, VersionNotFound) as error:
            if PREVIOUS not in aliases:
                raise
            log.warning("%s; serving the previous version instead", error)
            version = await self.get(f"{name}@{aliases[PREVIOUS]}")
        try:
            ready, live = await self._read_searchable(name), await self._store.live(name)
        except StoreUnavailable as error:
            log.warning("starting without the item store: %s", error)
            ready, live = set(), {}
        if version.fingerprint not in ready:
            for fingerprint in ready & live.keys():
                with contextlib.suppress(RegistryError, VersionCorrupt):
                    version = await self.get(live[fingerprint])
                    break
        await self.commit_version(name, version.version)

    async def _poll(self) -> None:
        said: dict[str, str] = {}
        started = monotonic()
        while True:
            young = monotonic() - started < YOUNG_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), min(self._poll_seconds, SOON if young else inf))
            self._wake.clear()
            try:
                names = await self.in_thread(self.registry.names)
            except (OSError, RegistryError) as error:  # an object store that did not answer in time, say
                log.warning("cannot read the registry: %s", error)
                continue
            for name in names:
                try:
                    await self._follow(name)
                    said.pop(name, None)
                except Exception as error:
                    # The next round may find it mended, and what is served goes on. Said once, not each time.
                    if said.get(name) != str(error):
                        trace = None if isinstance(error, ItemvecError) else error
                        log.warning("cannot follow the registry for model %s: %s", name, error, exc_info=trace)
                    said[name] = str(error)
                    if isinstance(error, StoreUnavailable):
                        await self._look_at_the_store()

    async def _look_at_the_store(self) -> None:
        """Answers say that it is down from now on, and not some polls later, also where nobody but these calls it."""
        for _ in range(FAILURES):
            with contextlib.suppress(ItemvecError):
                await self._store.ping()
                return

    async def _follow(self, name: str) -> None:
        served = self._champions.get(name)
        wanted = (await self.in_thread(self.registry.aliases, name)).get(CHAMPION)
        if wanted is None:
            return
        version = await self.get(f"{name}@{wanted}")
        if served is None:  # a model that was published after the start
            await self.commit_version(name, wanted)
            served = self._champions[name]
        searchable = await self._read_searchable(name)
        if self._champions.get(name) is not served:  # a promotion has come first, and what was read is of before
            return
        fields = attributes.index_fields(version.schema)
        if version.fingerprint in searchable and await self._store.indexes.covers(name, version.fingerprint, fields):
            await self.commit_version(name, wanted)
        elif self._behind is not None:
            await self._behind(name, wanted)

    async def _read_searchable(self, name: str) -> set[str]:
        self._searchable[name] = await self._store.ready(name)
        return self._searchable[name]


def _moved(error: FieldError, pointer: str, rows: int) -> FieldError:
    """`/3/price` of a part that begins at row 4096 -> `/input/4099/price`"""
    _, row, where = error.pointer.split("/", 2)
    return FieldError(f"{pointer}/{int(row) + rows}/{where}", error.detail)
