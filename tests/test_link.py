"""A Redis that is down, hung, full, or lacks something; and two breaks that nobody should notice."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import clock
import numpy as np
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import Connection, UnixDomainSocketConnection
from storing import go_live, kill, restart, rows, turned

from itemvec.errors import StoreUnavailable
from service.link import _packing
from service.redis_server import EmbeddedRedis
from service.store import Neighbor, Store

pytestmark = pytest.mark.anyio


CALLS: dict[str, Callable[[Store], Awaitable[object]]] = {
    "ping": lambda store: store.ping(),
    "get": lambda store: store.get("movies", "tt1"),
    "get_many": lambda store: store.get_many("movies", ["tt1"] * 1000),
    "get_vectors": lambda store: store.get_vectors("movies", "aa", ["tt1"]),
    "put": lambda store: store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))}),
    "put many": lambda store: store.put("movies", ["tt1"] * 99, [b"{}"] * 99, {"aa": rows(*[(1, 0)] * 99)}),
    "add_vectors": lambda store: store.add_vectors("movies", "aa", ["tt1"], [b"1"], rows((1, 0))),
    "delete": lambda store: store.delete("movies", ["none"]),
    "search": lambda store: store.search("movies", "aa", turned(0), 1),
    "count": lambda store: store.count("movies"),
    "live": lambda store: store.live("movies"),
    "mark_live": lambda store: store.mark_live("movies", "aa", "movies@1"),
    "ensure_index": lambda store: store.indexes.ensure("movies", "aa", 2),
    "index_status": lambda store: store.indexes.status("movies", "aa"),
    "server_info": lambda store: store._bulk.server_info(),
}


async def fails_within(seconds: float, call: Awaitable[object]) -> StoreUnavailable:
    async with clock.running() as watch:
        with pytest.raises(StoreUnavailable) as failure:
            await call
    assert watch.seconds < seconds
    return failure.value


async def test_every_call_fails_at_once_while_redis_is_down_and_works_when_it_is_back(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with Store(server.url) as store:
            await go_live(store)
            await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})
            for call in CALLS.values():
                await call(store)
            await asyncio.to_thread(kill, server)
            assert store.available
            for call in CALLS.values():
                failure = await fails_within(0.2, call(store))
                assert failure.retry_after > 0
            assert not store.available
            await fails_within(0.005, store.ping())  # the breaker is open: nothing is tried
            await asyncio.to_thread(server.start)
            await asyncio.sleep(1.0)
            for call in CALLS.values():
                await call(store)
            assert store.available


async def test_a_short_restart_of_redis_is_not_noticed(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with Store(server.url) as store:
            await go_live(store)
            await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})
            await asyncio.to_thread(restart, server)  # the connections in the pool are dead now
            for call in CALLS.values():
                await call(store)


async def test_a_hung_redis_costs_no_more_than_200_ms(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with Store(server.url) as store:
            await go_live(store)
            await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                for name in ("get", "search", "put", "delete"):
                    failure = await fails_within(0.2, CALLS[name](store))
                    assert "did not answer in 0.12 s" in str(failure)
                async with clock.running() as watch:
                    said = await asyncio.gather(*(store.ping() for _ in range(100)), return_exceptions=True)
                assert {type(one) for one in said} == {StoreUnavailable}
                assert watch.seconds < 0.2
            finally:
                os.kill(server.pid, signal.SIGCONT)
            await asyncio.sleep(1.0)
            for call in CALLS.values():
                await call(store)


async def test_what_waited_for_its_turn_at_a_hung_redis_does_not_wait_for_it_again(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with Store(server.url) as store:
            await store.ping()
            assert server.pid is not None
            os.kill(server.pid, signal.SIGSTOP)
            try:
                calls = []
                for _ in range(10):  # the first five take all turns, and fail one after the other
                    calls.append(asyncio.create_task(fails_within(0.2, store.ping())))
                    await asyncio.sleep(0.002)
                await asyncio.gather(*calls)
            finally:
                os.kill(server.pid, signal.SIGCONT)


async def test_calls_whose_connection_is_lost_are_sent_again(empty_redis: str, raw_redis: redis.Redis) -> None:
    async with Store(empty_redis, timeout=2.0) as store:  # how fast the new connections are is not the point
        await go_live(store)
        await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})
        raw_redis.client_pause(50)
        calls = [asyncio.create_task(store.get("movies", "tt1")) for _ in range(5)]
        await asyncio.sleep(0.02)
        assert raw_redis.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes") >= 5
        assert [item.id for item in await asyncio.gather(*calls)] == ["tt1"] * 5


async def test_a_slot_that_is_being_moved_is_a_store_that_cannot_answer_now(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await go_live(store)

    async def moving(*_: object) -> object:
        raise redis.exceptions.ClusterError("TTL exhausted.")

    monkeypatch.setattr(store._hot._client, "execute_command", moving)
    with pytest.raises(StoreUnavailable, match="TTL exhausted"):
        await store.live("movies")


async def test_many_calls_at_once_wait_for_each_other(store: Store) -> None:
    await go_live(store)
    ids = [str(i) for i in range(500)]
    await store.put("movies", ids, [b"{}"] * 500, {"aa": np.ones((500, 2), np.float32)})
    items = await asyncio.gather(*(store.get("movies", item_id) for item_id in ids))
    assert [item.id for item in items] == ids


async def test_calls_do_not_fail_because_this_process_stood_still(empty_redis: str) -> None:
    async with Store(empty_redis, timeout=0.3) as store:
        await go_live(store)
        await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})
        calls = [asyncio.create_task(store.get("movies", "tt1")) for _ in range(100)]
        await asyncio.sleep(0.001)
        time.sleep(0.6)  # noqa: ASYNC251 - to block the event loop is the point
        assert [item.id for item in await asyncio.gather(*calls)] == ["tt1"] * 100


async def test_an_abandoned_call_leaves_no_answer_for_the_next_one(store: Store) -> None:
    await go_live(store)
    ids = [str(i) for i in range(200)]
    await store.put("movies", ids, [item_id.encode() for item_id in ids], {"aa": np.ones((200, 2), np.float32)})
    dice = np.random.default_rng(0)
    for _ in range(10):
        tasks = [asyncio.create_task(store.get("movies", item_id)) for item_id in ids]
        await asyncio.sleep(dice.random() / 100)
        for chosen in dice.choice(200, 100, replace=False):
            tasks[chosen].cancel()
        for item_id, item in zip(ids, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(item, Exception):
                raise item
            assert isinstance(item, asyncio.CancelledError) or item[:2] == (item_id, item_id.encode())


async def test_a_full_redis_refuses_a_write_whole(store: Store, raw_redis: redis.Redis) -> None:
    await go_live(store)
    await store.put("movies", ["tt1"], [b"old"], {"aa": rows((1, 0))})
    raw_redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailable, match="full, raise its maxmemory"):
            await store.put("movies", ["tt1", "tt2"], [b"new"] * 2, {"aa": rows((0, 1), (0, 1))})
        assert (await store.get("movies", "tt1")).raw == b"old"
        assert await store.search("movies", "aa", rows((1, 0))[0], k=1) == [Neighbor("tt1", 1.0)]
    finally:
        raw_redis.config_set("maxmemory", 0)
    assert await store.count("movies") == 1


@given(st.lists(st.lists(st.binary() | st.text() | st.integers() | st.floats(), min_size=1), max_size=5))
async def test_commands_are_written_as_redis_py_writes_them(commands: list[list[object]]) -> None:
    named = [("SET", *command) for command in commands]
    theirs, ours = Connection(), _packing(Connection)()
    assert b"".join(ours.pack_commands(named)) == b"".join(theirs.pack_commands(named))
    for command in named:
        assert b"".join(ours.pack_command(*command)) == b"".join(theirs.pack_command(*command))


async def test_the_connections_of_a_store_write_so(store: Store) -> None:
    await store.ping()
    client = store._hot._client
    assert client is not None
    made = type(client.connection_pool.make_connection())
    assert made is _packing(UnixDomainSocketConnection)


async def test_no_error_tells_the_password() -> None:
    async with Store("redis://user:secret@127.0.0.1:1/0") as store:
        with pytest.raises(StoreUnavailable) as failed:
            await store.ping()
    failure = failed.value
    assert "redis://127.0.0.1:1" in str(failure)
    assert "secret" not in str(failure) + str(failure.__cause__) + store.address


async def test_what_the_server_is(store: Store) -> None:
    info = await store._bulk.server_info()
    assert (info.version, info.query_engine, info.evicts) == ("8.2.3", "2.10.5", False)


async def test_it_is_told_when_redis_goes_and_when_it_is_back(tmp_path: Path) -> None:
    told: list[bool] = []
    with EmbeddedRedis(tmp_path) as server:
        async with Store(server.url, changed=told.append) as store:
            await store.ping()
            await asyncio.to_thread(kill, server)
            for _ in range(8):
                await fails_within(0.2, store.ping())
            assert told == [True]
            await asyncio.to_thread(server.start)
            await asyncio.sleep(1.0)
            await store.ping()
            await store.ping()
            assert told == [True, False]
