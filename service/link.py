"""Link: one client of Redis with its deadline, its second try and its breaker; of one server or of a Redis Cluster.

Which of the two it is, is asked of the server at the first call, so a URL of any node will do.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha1
from typing import Any, TypeVar
from urllib.parse import urlsplit

import hiredis
from redis import exceptions as errors
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig

from itemvec.errors import ConfigError, ItemvecError, StoreUnavailable
from service.breaker import Breaker
from service.turns import Turns

T = TypeVar("T")
Command = Sequence[Any]

SILENT = 1.0
"""Seconds without an answer after which a server may hang. One that is busy answers something all the time."""

NO_ENGINE = (
    "Redis at {address} has no query engine, which the index modes flat and hnsw need: use Redis 8 or Redis Stack, "
    "set ITEMVEC_INDEX=exact, or unset REDIS_URL for the embedded server"
)


@dataclass(frozen=True, slots=True)
class ServerInfo:
    version: str
    query_engine: str | None
    """Version of the query engine, None where it is not loaded."""
    run_id: str
    """New at every start of the server, or of one of the cluster's."""
    evicts: bool
    """Redis may drop our keys when its memory is full."""
    cluster: bool


class Link:
    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        connections: int,
        changed: Callable[[bool], None] | None = None,
        scout: "Link | None" = None,
    ) -> None:
        """`timeout`: seconds of one call. `changed`: told when the breaker opens (True) and closes. `scout`: a link to
        the same server whose calls are short. It finds out whether the server answers where it has been silent, so that
        a long call to one that hangs fails as soon as a short one."""
        self.timeout = timeout
        self.heard = float("-inf")
        """When the server last answered, by the monotonic clock."""

        self._scout = scout
        self.address = without_secrets(url)
        self.breaker = Breaker(changed=changed)
        self._url = url
        self._turns = Turns(connections, slow=timeout / 2)
        self._connecting = asyncio.Lock()
        self._client: Redis | None = None
        self._cluster: RedisCluster | None = None

    @property
    def milliseconds(self) -> int:
        return max(1, int(self.timeout * 1000))

    async def close(self) -> None:
        for client in (self._client, self._cluster):
            if client is not None:
                await client.aclose()

    async def is_cluster(self) -> bool:
        if self._client is None and self._cluster is None:
            await self._run(self._connect)
        return self._cluster is not None

    async def command(self, *parts: Any) -> Any:
        async def send() -> Any:
            client = self._client or self._cluster or await self._connect()
            return await client.execute_command(*parts)

        return await self._run(send)

    async def pipeline(self, commands: Sequence[Command], then: Sequence[Command] = ()) -> list[Any]:
        """The replies in the order of the commands; the first one that failed is raised.

        `then` is carried out when all of `commands` have been, also where those go to several nodes.
        """
        if len(commands) + len(then) == 1:
            return [await self.command(*(*commands, *then)[0])]

        async def send() -> list[Any]:
            client = self._client or self._cluster or await self._connect()
            parts = [_shortened([*commands, *then])] if self._cluster is None else [commands, then]
            replies = []
            for part in parts:
                pipe = client.pipeline(transaction=False)  # a new one for each try: it is empty after it failed
                for command in part:
                    pipe.execute_command(*command)
                replies += await pipe.execute()
            return replies

        return await self._run(send)

    async def each_node(self, *parts: Any) -> list[Any]:
        """The replies of every server, or every primary of a cluster, to a command that names no key."""
        if not await self.is_cluster():
            return [await self.command(*parts)]
        return [await self._on_node(node, parts) for node in self._nodes()]

    async def server_info(self) -> ServerInfo:
        infos = await self.each_node("INFO", "everything")
        engine = None
        for modules in await self.each_node("MODULE", "LIST"):
            for module in modules:
                if module[b"name"] == b"search":
                    # 21005 -> 2.10.5, 80201 -> 8.2.1
                    number = int(module[b"ver"])
                    engine = f"{number // 10000}.{number // 100 % 100}.{number % 100}"
        return ServerInfo(
            version=str(infos[0]["redis_version"]),
            query_engine=engine,
            run_id=" ".join(sorted(str(info["run_id"]) for info in infos)),
            evicts=any(
                info.get("maxmemory") and str(info.get("maxmemory_policy")).startswith("allkeys") for info in infos
            ),
            cluster=await self.is_cluster(),
        )

    async def scan(self, pattern: str) -> AsyncIterator[list[bytes]]:
        """The keys that match, of every node; one may come twice."""
        clustered = await self.is_cluster()
        for node in self._nodes() if clustered else [None]:
            cursor = b"0"
            while True:
                parts = ("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
                cursor, keys = await (self._on_node(node, parts) if clustered else self.command(*parts))
                if keys:
                    yield keys
                if int(cursor) == 0:
                    break

    def _nodes(self) -> list[Any]:
        assert self._cluster is not None  # noqa: S101 - asked for a cluster alone
        return self._cluster.get_primaries()

    async def _on_node(self, node: Any, parts: Command) -> Any:
        # Not by the cluster's client, which merges what SCAN and others say into dicts of its own.
        return await self._run(lambda: node.execute_command(*parts))

    async def _connect(self) -> "Redis | RedisCluster":
        async with self._connecting:
            if (known := self._client or self._cluster) is not None:
                return known
            # One deadline around each call costs less than redis-py's own around each read and write. With its
            # maintenance notifications it would not notice that a pooled connection was closed.
            settings: dict[str, Any] = {
                "protocol": 3,
                "retry": Retry(NoBackoff(), 0),
                "driver_info": None,  # two round trips fewer for a new connection
                "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            }
            client = Redis.from_url(self._url, socket_timeout=None, socket_connect_timeout=None, **settings)
            pool = client.connection_pool
            pool.connection_class = _packing(pool.connection_class)  # type: ignore[arg-type]
            if urlsplit(self._url).scheme != "unix":
                try:
                    info = await client.execute_command("INFO", "cluster")  # type: ignore[no-untyped-call]
                except BaseException:
                    await client.aclose()
                    raise
                if int(info.get("cluster_enabled", 0)):
                    await client.aclose()
                    # Half of the deadline each, so that a node that hangs leaves time to ask another for the topology.
                    half = self.timeout / 2
                    self._cluster = cluster = RedisCluster.from_url(
                        self._url, socket_timeout=half, socket_connect_timeout=half, **settings
                    )
                    await cluster.initialize()
                    return cluster
            self._client = client
            return client

    async def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._scout is not None:
            silent = time.monotonic() - max(self.heard, self._scout.heard) > SILENT
            if silent or self._scout.breaker.is_open:
                await self._scout.each_node("PING")
        # Waiting for a turn is not the server's time: many calls at once are no reason to think it dead. If it
        # is, those before us find out, and nobody waits a second time.
        if waited := self._turns.all_taken():
            try:
                await _within(max(1.0, self.timeout), self._turns.take)
            except TimeoutError:
                raise StoreUnavailable(f"Redis at {self.address} has more to do than it can") from None
        else:
            await self._turns.take()
        began: float | None = None
        try:
            if waited and self.breaker.last_failed and time.monotonic() - self.heard > self.timeout:
                raise self._late()
            self.breaker.enter()
            began = time.monotonic()
            result = await _within(self.timeout, lambda: _once_more(call))
        except errors.ResponseError as error:
            self._answered()
            if (reason := self._refused(error)) is not None:
                raise reason from error
            raise
        except (*_UNREACHED, errors.TimeoutError, OSError) as error:
            self.breaker.failure()
            raise self._unavailable(error) from error
        finally:
            self._turns.give_back(None if began is None else time.monotonic() - began)
        self._answered()
        return result

    def _answered(self) -> None:
        self.breaker.success()
        self.heard = time.monotonic()

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        if isinstance(error, errors.BusyLoadingError):
            return StoreUnavailable(f"Redis at {self.address} is still loading its data", retry_after=5.0)
        if isinstance(error, _UNREACHED):
            return StoreUnavailable(f"Redis at {self.address}: {error}")
        return self._late()

    def _late(self) -> StoreUnavailable:
        return StoreUnavailable(f"Redis at {self.address} did not answer in {self.timeout:g} s")

    def _refused(self, error: errors.ResponseError) -> ItemvecError | None:
        """What the server cannot do at this time; None if the command was wrong, which is a fault of ours."""
        text = str(error)
        if "unknown command" in text and "FT." in text:
            return ConfigError(NO_ENGINE.format(address=self.address))
        if isinstance(error, errors.OutOfMemoryError) or text.startswith("OOM"):
            return StoreUnavailable(f"Redis at {self.address} is full, raise its maxmemory", retry_after=30.0)
        if isinstance(error, _PASSING) or text.startswith(("MISCONF", "NOREPLICAS", "BUSY")):
            return StoreUnavailable(f"Redis at {self.address}: {text}", retry_after=5.0)
        return None


@cache
def _packing(connection: type[AbstractConnection]) -> type[AbstractConnection]:
    """Connections of this kind whose commands hiredis packs, as those of redis-py's blocking clients: in Python, step
    by step, it takes 10 us of an item that is stored instead of 2. A cluster's client makes its connections itself."""

    class Packing(connection):  # type: ignore[misc, valid-type]
        def pack_command(self, *command: Any) -> list[bytes]:
            return [hiredis.pack_command(command)]

        def pack_commands(self, commands: Sequence[Command]) -> list[bytes]:
            return [hiredis.pack_command(tuple(command)) for command in commands]

    return Packing


def _shortened(commands: Sequence[Command]) -> Sequence[Command]:
    """A script is sent once and then called by its hash: on one connection it is known from the first call on."""
    known: dict[object, str] = {}
    short: list[Command] = []
    for command in commands:
        if command[0] == "EVAL":
            if (digest := known.get(command[1])) is not None:
                short.append(("EVALSHA", digest, *command[2:]))
                continue
            known[command[1]] = _sha1(str(command[1]))
        short.append(command)
    return short


@cache
def _sha1(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


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
            timer = loop.call_later(0.04, lambda: limit.reschedule(loop.time()))
        else:
            limit.reschedule(due)

    async with asyncio.timeout(None) as limit:
        timer = loop.call_at(due, expire)
        try:
            return await call()
        finally:
            timer.cancel()


_UNREACHED = (errors.ConnectionError, errors.RedisClusterException, errors.ClusterError)
"""`ClusterError`: a slot that is being moved to another node stayed under way for all tries of the client."""

_PASSING = (errors.ReadOnlyError, errors.NoPermissionError, errors.ClusterDownError, errors.TryAgainError)


def without_secrets(url: str) -> str:
    """The address for a message: no user, no password."""
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return f"unix://{parts.path}"
    return f"{parts.scheme}://{parts.hostname}:{parts.port or 6379}"
