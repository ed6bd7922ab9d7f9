"""Indexes are made once, change their form while they are searched, and end with their version."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from storing import go_live, rows, turned

from itemvec.errors import ConfigError, StoreUnavailable
from service import index
from service.index import Mode
from service.redis_server import find_binaries
from service.store import Store

pytestmark = pytest.mark.anyio


async def test_an_index_is_made_once(store: Store, other: Store) -> None:
    made = await asyncio.gather(*(replica.indexes.ensure("movies", "aa", 2) for replica in [store, other] * 4))
    assert sorted(made) == [False] * 7 + [True]
    with pytest.raises(ConfigError, match="iv:idx:movies:aa:1 in Redis has 2 dimensions, this version 3"):
        await store.indexes.ensure("movies", "aa", 3)


@pytest.mark.parametrize(("items", "mode"), [(49_999, "flat"), (50_000, "hnsw")])
async def test_large_stores_get_a_graph_index(store: Store, items: int, mode: Mode) -> None:
    await store.indexes.ensure("movies", "aa", 2, items_hint=items)
    assert (await store.indexes.status("movies", "aa")).mode == mode


FORMS: list[Mode] = ["flat", "hnsw", "exact", "hnsw", "flat", "exact", "flat"]


@pytest.fixture
async def patient(empty_redis: str) -> AsyncIterator[tuple[Store, Store]]:
    """Two replicas for tests that keep Redis busy, on a machine that may be."""
    async with Store(empty_redis, timeout=10.0) as store, Store(empty_redis, timeout=10.0) as other:
        yield store, other


async def test_an_index_takes_another_form_while_it_is_searched_and_written(patient: tuple[Store, Store]) -> None:
    """`other` is never told; what it has acknowledged is found all the same, by both."""
    store, other = patient
    await store.indexes.ensure("movies", "aa", 2, mode=FORMS[0])
    await store.mark_live("movies", "aa", "movies@1")
    ids = [f"tt{i}" for i in range(2000)]
    await store.put("movies", ids, [b"{}"] * 2000, {"aa": np.stack([turned(0.5 + i / 5000) for i in range(2000)])})
    done = False
    written = ["tt0"]

    async def write() -> None:
        while not done:
            item_id = f"new {len(written)}"
            await other.put("movies", [item_id], [b"{}"], {"aa": turned(0.4 - len(written) / 1e5)[None]})
            written.append(item_id)
            await asyncio.sleep(0.002)

    async def search(replica: Store) -> None:
        while not done:
            last = written[-1]
            found = {neighbor.id for neighbor in await replica.search("movies", "aa", turned(0.0), 1000)}
            assert last in found
            assert len(found) == 1000
            await asyncio.sleep(0.002)

    working = [asyncio.create_task(work) for work in (write(), search(store), search(other))]
    for form in FORMS[1:]:
        assert await store.indexes.reindex("movies", "aa", form)
        assert not await store.indexes.reindex("movies", "aa", form)
        await asyncio.sleep(0.02)
        assert (await other.indexes.status("movies", "aa")).mode == form
    done = True
    await asyncio.gather(*working)
    assert len(written) > 20
    assert (await store.indexes.status("movies", "aa")).docs == await store.count("movies")


async def test_a_store_whose_size_crossed_the_bound_wants_another_form(
    store: Store, raw_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "FLAT_UP_TO", 100)
    monkeypatch.setattr(index, "FLAT_DOWN_TO", 50)
    await go_live(store)
    for items, form in ((99, "flat"), (100, "hnsw"), (51, "hnsw"), (49, "flat"), (99, "flat")):
        ids = [str(i) for i in range(100)]
        await store.delete("movies", ids)
        await store.put("movies", ids[:items], [b"{}"] * items, {"aa": np.ones((items, 2), np.float32)})
        now = (await store.indexes.status("movies", "aa")).mode
        assert await store.indexes.reindex_wanted("movies", "aa") is (now != form)
        assert await store.indexes.reindex("movies", "aa") is (now != form)
        assert (await store.indexes.status("movies", "aa")).mode == form
    assert len(raw_redis.execute_command("FT._LIST")) == 1


async def test_dropping_a_version_leaves_the_others(store: Store, raw_redis: redis.Redis) -> None:
    await go_live(store, "aa")
    await go_live(store, "bb")
    ids = [f"tt{i}" for i in range(1500)]
    await store.put("movies", ids, [b"{}"] * 1500, dict.fromkeys(["aa", "bb"], np.ones((1500, 2), np.float32)))
    for _ in range(2):
        await store.unmark_live("movies", "aa")
        await store.indexes.drop("movies", "aa")
    assert await store.live("movies") == {"bb": "movies@1"}
    assert not raw_redis.keys("iv:vec:movies:aa:*")
    assert len(raw_redis.keys("iv:vec:movies:bb:*")) == 1500
    with pytest.raises(StoreUnavailable, match="movies has no index for fingerprint aa"):
        await store.search("movies", "aa", turned(0), k=1)
    assert len(await store.search("movies", "bb", turned(0), k=3)) == 3


@pytest.mark.parametrize("mode", ["flat", "exact"])
async def test_a_write_that_had_not_heard_of_a_drop_leaves_no_vector(
    store: Store, other: Store, raw_redis: redis.Redis, mode: Mode
) -> None:
    await store.indexes.ensure("movies", "aa", 2, mode=mode)
    await store.mark_live("movies", "aa", "movies@1")
    await other.put("movies", ["a"], [b"{}"], {"aa": rows((1, 0))})
    await store.unmark_live("movies", "aa")
    await store.indexes.drop("movies", "aa")
    assert (await other.put("movies", ["a", "b"], [b"{}"] * 2, {"aa": rows((1, 0), (1, 1))})).live == {}
    assert not raw_redis.keys("iv:vec:*")
    assert not raw_redis.keys("iv:log:*")
    assert await store.count("movies") == 2


async def test_a_drop_that_was_cut_short_is_known_and_done_again(
    store: Store, raw_redis: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    await go_live(store, "aa")
    await store.put("movies", ["a"], [b"{}"], {"aa": rows((1, 0))})
    await store.unmark_live("movies", "aa")

    async def cut_short(*_: str) -> None:
        raise StoreUnavailable("gone")

    with monkeypatch.context() as patched:
        patched.setattr(store.indexes, "_unlink", cut_short)
        with pytest.raises(StoreUnavailable, match="gone"):
            await store.indexes.drop("movies", "aa")
    with pytest.raises(StoreUnavailable, match="movies has no index for fingerprint aa"):
        await store.search("movies", "aa", turned(0), k=1)
    assert await store.indexes.fingerprints("movies") == {"aa"}
    await store.indexes.drop("movies", "aa")
    assert not raw_redis.keys("iv:vec:*")
    assert await store.indexes.fingerprints("movies") == set()


async def test_no_deleted_item_comes_back_with_the_index_of_a_dropped_version(
    store: Store, other: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await go_live(store, "aa")
    await store.put("movies", ["kept", "deleted"], [b"{}"] * 2, {"aa": rows((1, 0), (1, 1))})
    assert await other.search("movies", "aa", turned(0), k=1)
    await store.unmark_live("movies", "aa")
    await store.indexes.drop("movies", "aa")

    async def cut_short(*_: object) -> None:
        pass

    # A write that began before the drop, by a replica that then ended: its vectors have no index any more.
    monkeypatch.setattr(other.indexes, "remove_late", cut_short)
    await other.put("movies", ["kept", "deleted"], [b"{}"] * 2, {"aa": rows((1, 0), (1, 1))})
    assert await store.live("movies") == {}
    await store.delete("movies", ["deleted"])
    await go_live(store, "aa")
    await store.indexes.remove_orphans("movies", "aa")
    for _ in range(500):
        if (await store.indexes.status("movies", "aa")).percent_indexed == 1:
            break
        await asyncio.sleep(0.01)
    assert [found.id for found in await store.search("movies", "aa", rows((1, 1))[0], k=2)] == ["kept"]


async def test_what_is_ready_ends_with_being_live(store: Store) -> None:
    await go_live(store, "aa")
    await go_live(store, "bb")
    await store.mark_ready("movies", "aa")
    assert await store.ready("movies") == {"aa"}
    await store.unmark_live("movies", "aa")
    await store.mark_live("movies", "aa", "movies@1")
    assert await store.ready("movies") == set()


async def test_an_index_made_anew_is_not_ready(store: Store, raw_redis: redis.Redis) -> None:
    await go_live(store, "aa")
    await store.mark_ready("movies", "aa")
    raw_redis.execute_command("FT.DROPINDEX", "iv:idx:movies:aa:1")
    await store.indexes.ensure("movies", "aa", 2)
    assert await store.ready("movies") == set()


async def test_a_redis_that_evicts_is_refused(store: Store, raw_redis: redis.Redis) -> None:
    raw_redis.config_set("maxmemory", "1gb")
    raw_redis.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match="set its maxmemory-policy to noeviction"):
            await store.indexes.ensure("movies", "aa", 2)
    finally:
        raw_redis.config_set("maxmemory-policy", "noeviction")
        raw_redis.config_set("maxmemory", 0)


@pytest.fixture
def plain_redis(tmp_path: Path) -> Iterator[str]:
    """The server without its query engine."""
    socket = tmp_path / "redis.sock"
    command = [find_binaries()[0], "--port", "0", "--unixsocket", socket, "--save", "", "--dir", tmp_path]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        with redis.Redis(unix_socket_path=str(socket), retry=Retry(ConstantBackoff(0.01), 1000)) as client:
            client.ping()
        yield f"unix://{socket}"
        process.kill()


async def test_a_mode_that_needs_the_query_engine_is_refused_without_it_with_the_ways_out(plain_redis: str) -> None:
    async with Store(plain_redis) as store:
        assert (await store._bulk.server_info()).query_engine is None
        with pytest.raises(
            ConfigError, match=r"no query engine.*Redis 8 or Redis Stack.*ITEMVEC_INDEX=exact.*embedded"
        ):
            await store.indexes.ensure("movies", "aa", 2, mode="hnsw")
        assert await store.indexes.ensure("movies", "aa", 2)
        assert (await store.indexes.status("movies", "aa")).mode == "exact"
