"""Promotion and rollback: the stored items are encoded with the new version, then the service switches to it.

A promotion is a job, since encoding a large store takes its time; `PUT .../aliases/champion` starts one and answers at
once. Its order is what keeps every write and every answer right:

    load the version on every replica -> make its index -> mark it live (from here on writes reach it too)
        -> scan the items and add their vectors, where an item has not changed since -> wait until the index is whole
        -> mark it ready -> registry: champion -> every replica moves its pointer -> in a while drop what is too old

Whatever fails before the registry is written leaves the champion as it was. The previous version stays live and ready,
so a rollback is the same job with nothing to encode. One promotion per model runs at a time, whichever replica has it:
a lease in Redis says so, and what a dead replica held is free again in half a minute. One that stood still for longer
has lost the lease when it goes on: it stops before the switch, and leaves the index to whoever is at it now. Jobs are
kept in Redis as well, since a question about one may reach any replica.

A Redis that is away for less than that ends no backfill, which scans again; and what ended while it was away is told
when it is back. What a job began and could not finish or take back is removed by whoever finds it and no job running.
"""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import orjson

from itemvec.errors import ItemvecError, StoreUnavailable, VersionCorrupt, VersionNotFound
from itemvec.version import ModelVersion
from service import attributes
from service.items import encode_fitting, encoded
from service.models import LoadedModels
from service.problems import JobLost, JobNotFound, PromotionLost, PromotionRunning, problem
from service.store import Store

log = logging.getLogger("itemvec.service")

LEASE_SECONDS = 30.0
"""A job whose replica has not been heard of for so long is taken for dead; for so long it waits for Redis."""

PAUSE_SECONDS = 1.0
"""Between tries at a store that does not answer: as long as a link may take until it tries it again."""

KEPT_SECONDS = 86_400.0
PREPARE_SECONDS = 600.0
INDEX_SECONDS = 600.0
SHORT_SECONDS = 5.0
"""For how long an index may have read everything and still lack vectors, before the items are scanned again."""

CLEANING = "drop-"
"""Begins the name of who holds the lease to remove an old version: nobody's job, and soon done."""

PATIENCE_SECONDS = 5.0
AGAIN_SECONDS = 30.0
"""After a failure, until a champion that the registry names is tried again."""

SCAN_TRIES = 3
BATCH = 128
"""Items encoded at once in a backfill: some 5 ms, so that no request waits long for the interpreter."""

TOLD_REFUSALS = 20

WATCH_SECONDS = 30.0
"""How often it is looked whether an index has outgrown its form, and for what ended jobs left."""

State = Literal["running", "succeeded", "failed"]
Stage = Literal["loading", "encoding items", "waiting for the index", "indexing again", "switching", "done"]
Kind = Literal["promotion", "backfill", "reindex"]
Cause = Literal["request", "registry", "size"]


class Fleet(Protocol):
    """Calls a method on every replica; raises the first error of one that is alive."""

    async def call(self, method: str, *args: Any, timeout: float = 60.0) -> list[Any]: ...  # noqa: ASYNC109


class Alone:
    """The fleet of a service that is this one process."""

    def __init__(self, models: LoadedModels) -> None:
        self._models = models

    async def call(self, method: str, *args: Any, timeout: float = 60.0) -> list[Any]:  # noqa: ASYNC109
        async with asyncio.timeout(timeout):
            return [await getattr(self._models, method)(*args)]


@dataclass(slots=True)
class Job:
    id: str
    name: str
    version: int
    cause: Cause
    """Who asked: a call, the registry's champion that was changed by other means, or the number of items."""

    kind: Kind = "promotion"
    fingerprint: str | None = None
    """None until the version is loaded."""

    state: State = "running"
    stage: Stage = "loading"
    done: int = 0
    total: int = 0
    """Items encoded, and those that there were when their scan began."""

    refused: int = 0
    refusals: list[dict[str, str]] = field(default_factory=list)
    """Stored items that the version cannot encode; the first of them, with the reason."""

    started: float = 0.0
    heard: float = 0.0
    """Unix seconds; a running job is heard of every few seconds."""

    problem: dict[str, Any] | None = None

    def shown(self) -> dict[str, Any]:
        return {
            "id": self.id, "kind": self.kind, "model": f"{self.name}@{self.version}",
            "fingerprint": self.fingerprint, "cause": self.cause,
            "state": self.state, "stage": self.stage, "progress": {"done": self.done, "total": self.total},
            "refused": self.refused, "refusals": self.refusals,
            "started_at": _iso(self.started), "updated_at": _iso(self.heard), "problem": self.problem,
        }  # fmt: skip


class Promotions:
    def __init__(self, models: LoadedModels, store: Store, fleet: Fleet | None = None, grace: float = 30.0) -> None:
        """`grace`: seconds after a switch for which requests on their way may still ask for what is dropped then."""
        self._models, self._store, self._fleet = models, store, fleet or Alone(models)
        self._grace = grace
        self._running: dict[str, Job] = {}
        self._failed: dict[tuple[str, int], float] = {}
        """When the last try at a version failed."""

        self._tasks: set[asyncio.Task[None]] = set()
        self._taking_back: set[asyncio.Task[None]] = set()
        """Those that `stop` lets end."""

        self._watching = False
        models.when_behind(self.follow)

    def start(self) -> None:
        """From now on looks whether an index should have another form, by its size or the settings, and for what ended
        jobs left; may come twice."""
        if not self._watching:
            self._watching = True
            self._spawn(self._watch())

    async def stop(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*self._taking_back, return_exceptions=True)

    async def promote(self, name: str, version: int | str) -> Job:
        """Starts the switch to a version, or to what an alias names; one under way to the same is the answer.

        Raises `VersionNotFound`, or `PromotionRunning` if one to another version is under way.
        """
        return await self._asked(name, version, "promotion")

    async def backfill(self, name: str, version: int | str) -> Job:
        """Starts to make a version's index, as a promotion would, and leaves it at that: it can be searched by its
        name then, every write reaches it, and a later promotion has nothing left to encode."""
        return await self._asked(name, version, "backfill")

    async def _asked(self, name: str, wanted: int | str, kind: Kind) -> Job:
        _, version = await self._models.in_thread(self._models.registry.resolve, f"{name}@{wanted}")
        try:
            return await self._start(name, version, "request", kind)
        except PromotionRunning as running:
            with contextlib.suppress(JobNotFound):
                job = await self.job(running.job_id)
                if (job.kind, job.version, job.state) == (kind, version, "running"):
                    return job
            raise

    async def follow(self, name: str, version: int) -> None:
        """Makes ready what the registry has named champion by other means, unless some replica is at it already."""
        if time.monotonic() - self._failed.get((name, version), -AGAIN_SECONDS) < AGAIN_SECONDS:
            return
        with contextlib.suppress(PromotionRunning):
            await self._start(name, version, "registry")

    async def job(self, job_id: str) -> Job:
        if job_id in self._running:
            return self._running[job_id]
        job = await self._read(job_id)
        if await self._is_silent(job):
            # Redis may be back just now, after the lease ran out, and the replica about to tell how it ended.
            await asyncio.sleep(2 * PAUSE_SECONDS)
            job = await self._read(job_id)
            if await self._is_silent(job):
                job.state, job.problem = "failed", problem(JobLost("is gone"), job.id).body
        return job

    async def _read(self, job_id: str) -> Job:
        record = await self._store.leases.job(job_id)
        if record is None:
            raise JobNotFound(job_id)
        return Job(**orjson.loads(record))

    async def _is_silent(self, job: Job) -> bool:
        """A Redis that is full takes no record of how far the job is, but the lease can be kept even so."""
        if job.state != "running" or time.time() - job.heard <= LEASE_SECONDS:
            return False
        return await self._store.leases.holder(job.name) != job.id

    async def _watch(self) -> None:
        said: dict[str, str] = {}
        while True:
            for name, version in list(self._models.serving.items()):
                if any(job.name == name for job in self._running.values()):
                    continue  # what is read now may be done, and the lease free, when the next job asks for it
                try:
                    if await self._left_over(name):
                        await self._drop(name, self._left_over)
                    if await self._store.indexes.reindex_wanted(name, version.fingerprint):
                        await self._start(name, version.version, "size", "reindex")
                    said.pop(name, None)
                except (StoreUnavailable, PromotionRunning):  # it may be wanted still when that is over
                    pass
                except ItemvecError as error:  # a Redis that evicts items, or cannot do what the setting asks for
                    if said.get(name) != str(error):
                        log.warning("the index of %s: %s", version.ref, error)
                    said[name] = str(error)
            await asyncio.sleep(WATCH_SECONDS)

    async def _start(self, name: str, version: int, cause: Cause, kind: Kind = "promotion") -> Job:
        job = Job(secrets.token_hex(8), name, version, cause, kind, started=time.time(), heard=time.time())
        holder = await self._store.leases.claim(name, job.id, LEASE_SECONDS)
        patience = time.monotonic() + PATIENCE_SECONDS
        while holder != job.id and time.monotonic() < patience and await self._is_soon_free(holder):
            await asyncio.sleep(0.05)
            holder = await self._store.leases.claim(name, job.id, LEASE_SECONDS)
        if holder.startswith(CLEANING):
            raise StoreUnavailable(f"an old version of {name} is still being removed", retry_after=5.0)
        if holder != job.id:
            raise PromotionRunning(name, holder)
        self._running[job.id] = job
        with contextlib.suppress(StoreUnavailable):  # it is noted again in a second
            await self._note(job)
        self._spawn(self._run(job))
        return job

    async def _is_soon_free(self, holder: str) -> bool:
        """Does one hold the lease who removes an old version, or a job that has ended and is about to give it back?"""
        with contextlib.suppress(JobNotFound):
            return holder.startswith(CLEANING) or (await self.job(holder)).state != "running"
        return False

    async def _run(self, job: Job) -> None:
        try:
            try:
                failure = await self._failure(job)
            except asyncio.CancelledError:
                self._end(job, JobLost("was stopped"))
                await self._is_told(job)
                raise
            self._end(job, failure)
            while not await self._is_told(job):  # noqa: ASYNC110 - what it waits for is Redis
                await asyncio.sleep(PAUSE_SECONDS)
        finally:
            self._running.pop(job.id, None)
        if failure is None and job.kind != "backfill":
            self._spawn(self._drop_old(job.name))

    async def _failure(self, job: Job) -> Exception | None:
        """Does the work; None if that went well."""
        kinds = {"promotion": self._switch, "backfill": self._fill, "reindex": self._reindex}
        work = asyncio.create_task(kinds[job.kind](job))
        renewal = asyncio.create_task(self._renew(job.name, job.id, job))
        try:
            await _while_held(job, work, renewal)
        except Exception as error:
            trace = None if isinstance(error, ItemvecError) else error
            log.warning(
                "job %s (%s of %s@%d) failed: %s", job.id, job.kind, job.name, job.version, error, exc_info=trace
            )
            return error
        finally:
            work.cancel()
            renewal.cancel()
            await asyncio.wait({work, renewal})
        return None

    async def _is_told(self, job: Job) -> bool:
        """Writes how the job ended and gives the lease back; False if the store did not answer. Until it does the lease
        is kept, without which the others take the replica for dead."""
        with contextlib.suppress(StoreUnavailable):
            await self._store.leases.renew(job.name, job.id, LEASE_SECONDS)
            await self._note(job)
            await self._store.leases.release(job.name, job.id)
            return True
        return False

    def _end(self, job: Job, failure: Exception | None) -> None:
        if failure is None:
            job.state, job.stage = "succeeded", "done"
            self._failed.pop((job.name, job.version), None)
            log.info("%s of %s@%d succeeded (job %s)", job.kind, job.name, job.version, job.id)
        else:
            job.state, job.problem = "failed", problem(failure, job.id).body
            if job.kind == "promotion":
                self._failed[job.name, job.version] = time.monotonic()

    async def _switch(self, job: Job) -> None:
        name, number = job.name, job.version
        await self._fill(job)
        await self._hold_patiently(job)
        job.stage = "switching"
        await self._models.in_thread(self._models.registry.promote, name, number)
        try:
            await self._fleet.call("commit_version", name, number)
        except Exception as error:  # the registry has it, so whoever missed the call follows at its next poll
            log.warning("not every replica was told of %s@%d, the rest will read it: %s", name, number, error)

    async def _fill(self, job: Job) -> None:
        """Loads the version on every replica and completes its index, unless it is complete already."""
        name, number = job.name, job.version
        await self._fleet.call("prepare_version", name, number, timeout=PREPARE_SECONDS)
        version = await self._models.get(f"{name}@{number}")
        job.fingerprint = version.fingerprint
        ready = await self._store.ready(name)
        # A version may differ from the one before in what is filterable alone, and then they share a fingerprint.
        fields = attributes.index_fields(version.schema)
        if version.fingerprint not in ready or not await self._store.indexes.covers(name, version.fingerprint, fields):
            try:
                await self._backfill(job, version)
            except BaseException:
                if version.fingerprint not in ready | self._served(name):
                    await asyncio.shield(self._spawn(self._withdraw(job, version), self._taking_back))
                raise

    async def _reindex(self, job: Job) -> None:
        job.stage, job.fingerprint = "indexing again", (await self._models.get(f"{job.name}@{job.version}")).fingerprint
        for fingerprint in await self._store.live(job.name):
            await self._store.indexes.reindex(job.name, fingerprint)

    async def _backfill(self, job: Job, version: ModelVersion) -> None:
        for tries_left in reversed(range(SCAN_TRIES)):
            try:
                await self._fill_index(job, version)
                break
            except StoreUnavailable as error:
                if not tries_left:
                    raise
                log.warning("job %s scans the items again: %s", job.id, error)
                await asyncio.sleep(max(PAUSE_SECONDS, error.retry_after))
                await self._hold_patiently(job)

    async def _fill_index(self, job: Job, version: ModelVersion) -> None:
        """May be done again, wherever it was cut short."""
        name, fingerprint, store = job.name, version.fingerprint, self._store
        fields = attributes.index_fields(version.schema)
        await store.indexes.ensure(name, fingerprint, version.dim, items_hint=await store.count(name), fields=fields)
        await store.mark_live(name, fingerprint, version.ref)
        await store.indexes.remove_orphans(name, fingerprint)
        await self._encode_stored(job, version)
        await self._wait_for_index(job, version)
        await store.indexes.reindex(name, fingerprint, fields=fields)
        await store.mark_ready(name, fingerprint)

    async def _encode_stored(self, job: Job, version: ModelVersion) -> None:
        job.stage, job.done, job.refused, job.refusals = "encoding items", 0, 0, []
        job.total = await self._store.count(job.name)
        async for batch in self._store.scan(job.name, BATCH):
            began = time.monotonic()
            items = [orjson.loads(item.raw) for item in batch]
            fitting = await encode_fitting(self._models, version, items)
            ids, revs = [item.id for item in batch], [item.rev for item in batch]
            vectors = await encoded(self._models, version, items, fitting.vectors, fitting.rows)
            await self._store.add_vectors(job.name, version.fingerprint, ids, revs, vectors)
            job.done += len(batch)
            job.refused += len(fitting.errors)
            for row, errors in fitting.errors.items():
                if len(job.refusals) < TOLD_REFUSALS:
                    column = errors[0].pointer.removeprefix(f"/{row}")
                    job.refusals.append({"id": batch[row].id, "pointer": column, "detail": errors[0].detail})
            await asyncio.sleep(time.monotonic() - began)  # half of the time is for the requests
        if job.refused:
            log.warning("job %s: %s cannot encode %d stored items", job.id, version.ref, job.refused)

    async def _wait_for_index(self, job: Job, version: ModelVersion) -> None:
        """Until the index holds every vector: one that does not answers with part of the neighbors and no error.

        Raises `StoreUnavailable` where another scan may help. An item may have been replaced since by one that the
        version refuses, and then the index stays one short of what the last scan promised.
        """
        job.stage = "waiting for the index"
        began = complete = time.monotonic()
        while True:
            # The count first: items that are put in between are in the index, never the other way round. And not those
            # put since the scan began: the version may refuse them, and those it takes were indexed as they were put.
            expected = min(job.total, await self._store.count(job.name)) - job.refused
            status = await self._store.indexes.status(job.name, version.fingerprint)
            now = time.monotonic()
            if status.failures:
                raise ItemvecError(f"{status.failures} vectors of {version.ref} were refused by its index")
            if status.percent_indexed < 1:
                complete = now
            elif status.docs >= expected:
                return
            if now - began > INDEX_SECONDS or now - complete > SHORT_SECONDS:
                raise StoreUnavailable(
                    f"the index of {version.ref} has {status.docs} of {expected} vectors after {now - began:.0f} s"
                )
            await asyncio.sleep(0.05)

    async def _hold(self, job: Job) -> None:
        """Raises `PromotionLost` if another job may have begun, since what follows would get in its way."""
        if not await self._store.leases.renew(job.name, job.id, LEASE_SECONDS):
            raise PromotionLost(f"{job.name}@{job.version}")

    async def _hold_patiently(self, job: Job) -> None:
        """The same, through a time in which the store does not answer."""
        patience = time.monotonic() + LEASE_SECONDS
        while True:
            try:
                await self._hold(job)
                break
            except StoreUnavailable:
                if time.monotonic() > patience:
                    raise
            await asyncio.sleep(PAUSE_SECONDS)

    async def _withdraw(self, job: Job, version: ModelVersion) -> None:
        with contextlib.suppress(StoreUnavailable, PromotionLost):
            await self._hold(job)  # otherwise the index may be another job's by now
            await self._store.unmark_live(version.name, version.fingerprint)
            await self._store.indexes.drop(version.name, version.fingerprint)

    async def _drop_old(self, name: str) -> None:
        """Of the live versions the champion, the previous one and the challenger stay."""
        await asyncio.sleep(self._grace)
        await self._drop(name, self._too_old)

    async def _drop(self, name: str, which: Callable[[str], Awaitable[set[str]]]) -> None:
        """Removes the indexes and vectors of these versions, unless a job runs, which may need them."""
        me = CLEANING + secrets.token_hex(8)
        with contextlib.suppress(StoreUnavailable):
            if await self._store.leases.claim(name, me, LEASE_SECONDS) != me:
                return
            renewal = asyncio.create_task(self._renew(name, me))
            try:
                for fingerprint in await which(name):
                    if not await self._store.leases.renew(name, me, LEASE_SECONDS):
                        return
                    await self._store.unmark_live(name, fingerprint)
                    await self._store.indexes.drop(name, fingerprint)
                    log.info("dropped the index and the vectors of %s %s, which nothing needs", name, fingerprint)
            except ItemvecError as error:  # a registry that does not answer now
                log.warning("what nothing needs of model %s is not dropped for now: %s", name, error)
            finally:
                renewal.cancel()
                await self._store.leases.release(name, me)

    async def _too_old(self, name: str) -> set[str]:
        return await self._there(name) - self._served(name) - await self._models.in_thread(self._named, name)

    async def _left_over(self, name: str) -> set[str]:
        """What a job began that was killed, or failed and could not take it back: every write would go on reaching it,
        and nothing searches it."""
        there = await self._there(name)  # first: what becomes ready meanwhile is none
        return there - self._served(name) - await self._store.ready(name)

    async def _there(self, name: str) -> set[str]:
        return await self._store.indexes.fingerprints(name) | (await self._store.live(name)).keys()

    def _served(self, name: str) -> set[str]:
        """The fingerprint of the version that is served, be its index ready or not: writes have to reach it."""
        return {version.fingerprint for model, version in self._models.serving.items() if model == name}

    def _named(self, name: str) -> set[str]:
        """The fingerprints of the versions that have an alias."""
        registry, named = self._models.registry, set[str]()
        for alias, version in registry.aliases(name).items():
            try:
                named.add(registry.manifest(name, version).fingerprint)
            except (VersionCorrupt, VersionNotFound) as error:  # cannot be served again
                log.warning("the alias %s of model %s keeps nothing: %s", alias, name, error)
        return named

    async def _renew(self, name: str, holder: str, job: Job | None = None) -> None:
        """Keeps the lease, and tells how far the job is, until it is cancelled; returns if the lease is lost."""
        while True:
            await asyncio.sleep(LEASE_SECONDS / 30)
            with contextlib.suppress(StoreUnavailable):
                if not await self._store.leases.renew(name, holder, LEASE_SECONDS):
                    return
                if job is not None:
                    await self._note(job)

    async def _note(self, job: Job) -> None:
        job.heard = time.time()
        await self._store.leases.save_job(job.id, orjson.dumps(asdict(job)), KEPT_SECONDS)

    def _spawn(
        self, work: Coroutine[Any, Any, None], among: "set[asyncio.Task[None]] | None" = None
    ) -> "asyncio.Task[None]":
        """Among the tasks that `stop` cancels, if not said otherwise."""
        task, among = asyncio.create_task(work), self._tasks if among is None else among
        among.add(task)
        task.add_done_callback(among.discard)
        return task


async def _while_held(job: Job, work: asyncio.Task[None], renewal: asyncio.Task[None]) -> None:
    """Until the work is done, or the lease is lost; but once it switches, it ends what it began."""
    await asyncio.wait({work, renewal}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done() and job.stage != "switching":
        renewal.result()  # raises what broke it, if it was not the lease
        raise PromotionLost(f"{job.name}@{job.version}")
    await work


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
