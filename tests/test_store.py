"""Items and their vectors: what was put is there, is found, and is lost by no switch of versions."""

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from storing import Vectors, go_live, restart, rows, turned

from itemvec.errors import ItemNotFound, StoreUnavailable
from itemvec.schema import FeatureSchema
from service import scripts
from service.conditions import In
from service.index import Index, Mode, read_neighbors
from service.indexes import IndexStatus
from service.keys import CHUNK, bucket_of, round_trips
from service.redis_server import EmbeddedRedis
from service.store import Encoded, Neighbor, Query, Store, _most

pytestmark = pytest.mark.anyio


# Neighbors


async def test_neighbors_are_ranked_by_angle_not_by_length(store: Store) -> None:
    await go_live(store)
    vectors = rows((2, 0), (1, 1), (0, 9), (-1, 0))
    await store.put("movies", ["east", "north-east", "north", "west"], [b"{}"] * 4, {"aa": vectors})
    found = await store.search("movies", "aa", rows((5, 0))[0], k=4)
    # cos 0 = 1, cos 45 deg = 0.7071, cos 90 deg = 0, cos 180 deg = -1; that "north" is the longest must not matter
    assert [neighbor.id for neighbor in found] == ["east", "north-east", "north", "west"]
    assert [neighbor.score for neighbor in found] == pytest.approx([1, 0.70711, 0, -1], abs=1e-5)


@pytest.mark.parametrize("mode", ["flat", "hnsw", "exact"])
async def test_k_neighbors_are_left_after_excluding_many(store: Store, mode: Mode) -> None:
    await store.indexes.ensure("movies", "aa", 2, mode=mode)
    angles = np.arange(1, 301) * 0.01
    ids = [f"film {i}" for i in range(300)]
    await store.put("movies", ids, [b"{}"] * 300, {"aa": np.stack([turned(angle) for angle in angles])})
    found = await store.search("movies", "aa", turned(0), k=20, exclude=[*ids[:200], "unknown"])
    assert [neighbor.id for neighbor in found] == ids[200:220]
    assert len(await store.search("movies", "aa", turned(0), k=1000)) == 300
    assert await store.search("movies", "aa", turned(0), k=5, exclude=ids) == []


async def test_equal_scores_come_in_the_order_of_their_ids(store: Store) -> None:
    await go_live(store)
    await store.put("movies", ["b", "c", "a"], [b"{}"] * 3, {"aa": rows((1, 1), (2, 2), (4, 4))})
    assert [found.id for found in await store.search("movies", "aa", rows((1, 1))[0], k=3)] == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["many neighbors", "a large filter"])
async def test_what_keeps_redis_busy_for_long_is_not_given_up_as_if_it_hung(
    store: Store, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    await store.indexes.ensure("m", "aa", 2, fields={"f_year": "number"})
    ids = [str(i) for i in range(900)]
    years = [{"f_year": str(i % 200), "has": "f_year"} for i in range(900)]
    vectors = np.stack([turned(i / 1000) for i in range(900)])
    await store.put("m", ids, [b"{}"] * 900, {"aa": Encoded(vectors, attributes=years)})
    schema = FeatureSchema.from_yaml("{name: m, id: i, features: {year: {kind: numeric, filterable: true}}}")
    where = In("year", tuple(range(150)))
    assert len(await store.search_like("m", "aa", "1", 3, where=In("year", (1, 2)), schema=schema) or []) == 3

    async def too_short(*_: object) -> object:
        raise StoreUnavailable("too short")

    monkeypatch.setattr(store._hot, "pipeline", too_short)
    with pytest.raises(StoreUnavailable, match="too short"):
        await store.search("m", "aa", turned(0), 10)
    if what == "many neighbors":
        found = await store.search_many("m", "aa", [Query(turned(0), 900)] * 12)
        assert [len(neighbors) for neighbors in found] == [900] * 12
    else:
        assert len(await store.search("m", "aa", turned(0), 10, where=where, schema=schema)) == 10


async def test_scores_stay_between_minus_1_and_1(store: Store) -> None:
    await go_live(store, dim=64)
    vectors = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    await store.put("movies", [str(i) for i in range(200)], [b"{}"] * 200, {"aa": vectors})
    for vector in vectors:
        scores = [neighbor.score for neighbor in await store.search("movies", "aa", vector, k=200)]
        assert max(scores) <= 1
        assert min(scores) >= -1


async def test_the_graph_index_finds_what_exact_search_finds(store: Store) -> None:
    dice = np.random.default_rng(0)
    vectors, queries = dice.standard_normal((1000, 64)), dice.standard_normal((50, 64))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    await store.indexes.ensure("movies", "aa", 64, mode="hnsw")
    await store.put("movies", [str(i) for i in range(1000)], [b"{}"] * 1000, {"aa": vectors})
    hits = 0
    for query in queries:
        nearest = {str(i) for i in np.argsort(-(vectors @ query))[:10]}
        hits += len(nearest & {found.id for found in await store.search("movies", "aa", query, k=10)})
    assert hits / 500 > 0.97  # with the effort that the server takes by default it is 0.66


async def test_where_a_graph_gives_too_few_every_vector_is_compared(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors that are nearly the same can be an island in a graph, from which the rest is not reached."""
    await store.indexes.ensure("movies", "aa", 2, mode="hnsw")
    ids = [f"film {i}" for i in range(300)]
    await store.put("movies", ids, [b"{}"] * 300, {"aa": np.stack([turned(i / 100) for i in range(300)])})
    knn, asked = store._knn, list[bool]()

    async def through_an_island(*args: Any, exhaustive: bool) -> list[list[Neighbor]]:
        asked.append(exhaustive)
        found = await knn(*args, exhaustive=exhaustive)
        return found if exhaustive else [neighbors[:60] for neighbors in found]

    monkeypatch.setattr(store, "_knn", through_an_island)
    assert [found.id for found in await store.search("movies", "aa", turned(0), 200)] == ids[:200]
    assert asked == [False, True]
    assert [found.id for found in await store.search("movies", "aa", turned(0), 60)] == ids[:60]
    assert asked == [False, True, False]


async def test_a_search_that_was_cut_short_is_an_error(raw_redis: redis.Redis, empty_redis: str) -> None:
    # A reply of the real server, with too little time for 20,000 x 128 numbers.
    vectors = np.random.default_rng(0).standard_normal((20_000, 128)).astype(np.float32)
    async with Store(empty_redis, timeout=5.0) as store:
        await store.indexes.ensure("movies", "aa", 128, mode="flat")
        await store.put("movies", [str(i) for i in range(20_000)], [b"{}"] * 20_000, {"aa": vectors})
        reply = await store._bulk.command(
            "FT.SEARCH", "iv:idx:movies:aa:1", "*=>[KNN 20000 @v $q AS d]", "RETURN", 1, "d", "LIMIT", 0, 20_000,
            "TIMEOUT", 1, "DIALECT", 2, "PARAMS", 2, "q", vectors[0].tobytes(),
        )  # fmt: skip
    assert len(reply[b"results"]) < 20_000
    with pytest.raises(StoreUnavailable, match="cut short: Timeout limit was reached"):
        read_neighbors(reply, 0)


@pytest.mark.parametrize("mode", ["flat", "hnsw", "exact"])
async def test_what_is_like_an_item_is_what_is_near_to_its_vector_but_for_itself(store: Store, mode: Mode) -> None:
    await store.indexes.ensure("movies", "aa", 2, mode=mode)
    ids = [f"film {i}" for i in range(300)]
    await store.put("movies", ids, [b"{}"] * 300, {"aa": np.stack([turned(i / 100) for i in range(300)])})
    found = await store.search_like("movies", "aa", "film 0", k=20, exclude=ids[1:11])
    assert found == await store.search("movies", "aa", turned(0), 20, exclude=ids[:11])
    assert [neighbor.id for neighbor in found] == ids[11:31]
    assert found[0].score == 0.993956  # cos 0.11 = 1 - 0.11**2 / 2 + 0.11**4 / 24, to the same digits in every mode
    assert await store.search_like("movies", "aa", "film 0", k=9, exclude=ids) == []
    assert await store.search_like("movies", "aa", "none", k=9) is None


async def test_what_is_like_an_item_is_asked_in_two_calls_where_scripts_may_not_search(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    await go_live(store)
    await store.put("movies", ["a", "b"], [b"{}"] * 2, {"aa": rows((1, 0), (1, 1))})
    # What a script may not call in the server at hand, an FT.SEARCH may not be in another one.
    monkeypatch.setattr(scripts, "SEARCH_LIKE", "return redis.call('SUBSCRIBE', 'x')")
    for _ in range(2):
        found = await store.search_like("movies", "aa", "a", k=9)
        assert [neighbor.id for neighbor in found or ()] == ["b"]
        assert not store._script_searches


async def test_k_below_1_is_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        await store.search("movies", "aa", turned(0), k=0)


# Items


async def test_what_was_put_is_there(store: Store) -> None:
    await go_live(store)
    written = await store.put("movies", ["tt1", "tt2"], [b'{"a": 1}', b"\xff\x00"], {"aa": rows((1, 0), (0, 1))})
    assert written.created == [True, True]
    assert written.live == {"aa": "movies@1"}
    item = await store.get("movies", "tt2")
    assert item.raw == b"\xff\x00"
    assert item.rev == written.revs[1]
    assert await store.get_many("movies", ["tt2", "none"]) == [item, None]
    [vector, nothing] = await store.get_vectors("movies", "aa", ["tt2", "none"])
    assert vector is not None
    assert vector.dtype == np.float32
    assert vector.tolist() == [0, 1]
    assert nothing is None
    assert await store.count("movies") == 2
    with pytest.raises(ItemNotFound, match="no item 'none' in movies"):
        await store.get("movies", "none")


async def test_each_write_changes_rev_and_says_whether_the_item_is_new(store: Store) -> None:
    await go_live(store)
    revs = []
    for expected in (True, False, True):
        written = await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})
        assert written.created == [expected]
        revs += written.revs
        if len(revs) == 2:
            await store.delete("movies", ["tt1"])
    assert len(set(revs)) == 3
    assert await store.count("movies") == 1


async def test_of_an_id_that_comes_twice_the_last_stays(store: Store) -> None:
    await go_live(store)
    written = await store.put("movies", ["a", "a"], [b"1", b"2"], {"aa": rows((1, 0), (0, 1))})
    assert written.created == [True, False]
    assert await store.get("movies", "a") == ("a", b"2", written.revs[1])
    assert await store.search("movies", "aa", rows((0, 1))[0], k=2) == [Neighbor("a", 1.0)]
    assert await store.count("movies") == 1


@given(st.lists(st.binary(min_size=1, max_size=2), max_size=1500), st.integers(1, 40))
def test_each_item_is_in_one_script_of_its_bucket_and_copies_of_an_id_stay_in_order(
    keys: list[bytes], most: int
) -> None:
    trips = list(round_trips(keys, most))
    scripts_sent = [script for trip in trips for script in trip]
    assert sorted(i for _, positions in scripts_sent for i in positions) == list(range(len(keys)))
    assert all(bucket_of(keys[i]) == bucket for bucket, positions in scripts_sent for i in positions)
    assert all(1 <= len(positions) <= most for _, positions in scripts_sent)
    assert all(1 <= sum(len(positions) for _, positions in trip) <= CHUNK for trip in trips)
    for key in set(keys):
        places = [i for _, positions in scripts_sent for i in positions if keys[i] == key]
        assert places == sorted(places)


def test_a_script_is_no_longer_for_a_graph_nor_for_several_versions() -> None:
    flat, graph = Index("flat", 2, {}), Index("hnsw", 2, {})
    assert [_most(indexes) for indexes in ([flat], [graph], [flat, flat], [flat, graph], [])] == [32, 8, 16, 4, 32]


async def test_nothing_to_write_is_no_error(store: Store) -> None:
    await go_live(store)
    written = await store.put("movies", [], [], {"aa": np.empty((0, 2), np.float32)})
    assert (written.created, written.revs, written.live) == ([], [], {"aa": "movies@1"})
    assert await store.delete("movies", []) == []
    assert await store.get_many("movies", []) == []
    assert await store.add_vectors("movies", "aa", [], [], np.empty((0, 2), np.float32)) == 0


async def test_many_items_at_once(store: Store) -> None:
    await go_live(store)
    ids = [f"tt{i}" for i in range(2000)]
    raws = [str(i).encode() for i in range(2000)]
    vectors = np.stack([turned(i / 1000) for i in range(2000)])
    written = await store.put("movies", ids, raws, {"aa": vectors})
    assert all(written.created)
    items = await store.get_many("movies", ids)
    assert [(item.id, item.raw, item.rev) for item in items if item] == list(zip(ids, raws, written.revs, strict=True))
    found = await store.get_vectors("movies", "aa", ids)
    assert np.array_equal(np.stack([vector for vector in found if vector is not None]), vectors)
    assert await store.indexes.status("movies", "aa") == IndexStatus("flat", 2, 2000, 1.0, 0)
    some = [f"tt{i}" for i in range(1000, 3000)]
    again = await store.put("movies", [*some, "tt1"], [b"{}"] * 2001, {"aa": np.ones((2001, 2), np.float32)})
    assert again.created == [False] * 1000 + [True] * 1000 + [False]
    await store.delete("movies", some[1000:])
    assert await store.delete("movies", [*ids[:1999], "none"]) == [True] * 1999 + [False]
    assert await store.count("movies") == 1


@pytest.mark.parametrize(
    ("vectors", "why"),
    [
        (rows((1, 0), (0, 0)), "vector 1 .* has no direction"),
        (rows((1, 0), (1, np.nan)), "vector 1 .* has no direction"),
        (rows((np.inf, 0), (1, 0)), "vector 0 .* has no direction"),
        (rows((3e38, 3e38), (1, 0)), "vector 0 .* has no direction"),  # its length is infinite
        (rows((1, 0, 0), (0, 1, 0)), r"takes vectors of shape \(2, 2\), not \(2, 3\)"),
        (rows((1, 0)), r"takes vectors of shape \(2, 2\), not \(1, 2\)"),
    ],
)
async def test_a_vector_that_could_not_be_found_is_refused_before_anything_is_written(
    store: Store, vectors: Vectors, why: str
) -> None:
    await go_live(store)
    with pytest.raises(ValueError, match=why):
        await store.put("movies", ["a", "b"], [b"{}", b"{}"], {"aa": vectors})
    with pytest.raises(ValueError, match=why):
        await store.add_vectors("movies", "aa", ["a", "b"], [b"1", b"1"], vectors)
    assert await store.count("movies") == 0
    with pytest.raises(ValueError, match=r"takes vectors|no direction"):
        await store.search("movies", "aa", np.zeros(vectors.shape[1]), k=1)


async def test_models_whose_names_begin_alike_are_apart(store: Store) -> None:
    names = ["movies", "movies.b01", "movies.b01.b02", "m"]
    for name in names:
        await go_live(store, name=name)
        await store.put(name, [name], [b"{}"], {"aa": rows((1, 0))})
    for name in names:
        assert [[item.id for item in batch] async for batch in store.scan(name)] == [[name]]
        assert [found.id for found in await store.search(name, "aa", rows((1, 0))[0], k=9)] == [name]
    await store.indexes.drop("movies", "aa")
    for name in names[1:]:
        assert await store.search(name, "aa", rows((1, 0))[0], k=9) == [Neighbor(name, 1.0)]
    for name in ("", "a:b", "{a}", "a*"):
        with pytest.raises(ValueError, match="cannot name a model"):
            await store.count(name)


# Ids


async def round_trip(store: Store, ids: list[str]) -> None:
    await store.put("movies", ids, [b"{}"] * len(ids), {"aa": np.ones((len(ids), 2), np.float32)})
    assert [item and item.id for item in await store.get_many("movies", ids)] == ids
    assert {item.id async for batch in store.scan("movies") for item in batch} == set(ids)
    found = [neighbor.id for neighbor in await store.search("movies", "aa", rows((1, 1))[0], k=100)]
    assert found == sorted(set(ids))
    rest = await store.search("movies", "aa", rows((1, 1))[0], k=100, exclude=ids[:1])
    assert {neighbor.id for neighbor in rest} == set(ids) - set(ids[:1])
    assert all(await store.delete("movies", list(dict.fromkeys(ids))))
    assert await store.count("movies") == 0
    assert await store.search("movies", "aa", rows((1, 1))[0], k=1) == []


ODD_IDS = [
    "a b", "a/b", "../..", "{x}", "}{", "a:b", "*", "[0-9]", "\n", "\r\n", "\0", "\\", '"', "'", "%2F", "$q", " ",
    "\U0001f3ac", "\u65e5\u672c", "e\u0301", "\u00e9", "\ufeff", "\x7f", "\U0001f3ac" * 128, "x" * 512, "-1",
    "iv:item:{movies.b00}:x",
]  # fmt: skip


async def test_ids_may_be_any_text(store: Store) -> None:
    await go_live(store)
    await round_trip(store, ODD_IDS)
    for item_id in ODD_IDS:
        await round_trip(store, [item_id])


@given(ids=st.lists(st.text(min_size=1, max_size=128), min_size=1, max_size=8, unique=True))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_ids_may_be_any_text_that_hypothesis_thinks_of(redis_url: str, ids: list[str]) -> None:
    async with Store(redis_url, timeout=5.0) as store:
        await go_live(store)
        await round_trip(store, ids)


@pytest.mark.parametrize("item_id", ["", "x" * 513, "\U0001f3ac" * 129, "\ud800"])
async def test_ids_that_are_none(store: Store, item_id: str) -> None:
    await go_live(store)
    with pytest.raises(ValueError, match=r"1 to 512 bytes|surrogates not allowed"):
        await store.put("movies", ["good", item_id], [b"{}"] * 2, {"aa": rows((1, 0), (0, 1))})
    assert await store.count("movies") == 0


# Deleting


async def test_nothing_of_a_deleted_item_remains(store: Store, raw_redis: redis.Redis) -> None:
    await go_live(store, "aa")
    await go_live(store, "bb", dim=3)
    vectors = {"aa": rows((1, 0), (0, 1)), "bb": rows((1, 0, 0), (0, 1, 0))}
    await store.put("movies", ["gone", "kept"], [b"{}"] * 2, vectors)
    assert await store.delete("movies", ["gone", "never"]) == [True, False]
    assert not [key for key in raw_redis.scan_iter() if b"gone" in key]
    assert await store.search("movies", "aa", rows((1, 0))[0], k=2) == [Neighbor("kept", pytest.approx(0))]
    assert await store.search("movies", "bb", rows((1, 0, 0))[0], k=2) == [Neighbor("kept", pytest.approx(0))]
    assert await store.count("movies") == 1


async def test_a_delete_reaches_a_version_that_another_replica_made_live(store: Store, other: Store) -> None:
    await go_live(store, "aa")
    written = await store.put("movies", ["tt1"], [b"{}"], {"aa": rows((1, 0))})  # here `store` saw only aa
    await go_live(other, "bb")
    assert await other.add_vectors("movies", "bb", ["tt1"], written.revs, rows((1, 0))) == 1
    await store.delete("movies", ["tt1"])
    assert await store.search("movies", "bb", rows((1, 0))[0], k=1) == []
    assert await other.get_vectors("movies", "bb", ["tt1"]) == [None]


@pytest.mark.parametrize("mode", ["flat", "exact"])
async def test_what_is_deleted_from_a_full_store_is_gone_and_makes_room(
    store: Store, raw_redis: redis.Redis, mode: Mode
) -> None:
    await store.indexes.ensure("movies", "aa", 2, mode=mode)
    await store.mark_live("movies", "aa", "movies@1")
    await store.put("movies", ["east", "north"], [b"{}"] * 2, {"aa": rows((1, 0), (0, 1))})
    raw_redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(StoreUnavailable, match="full"):
            await store.put("movies", ["west"], [b"{}"], {"aa": rows((-1, 0))})
        assert await store.delete("movies", ["east"]) == [True]
        assert [found.id for found in await store.search("movies", "aa", rows((1, 0))[0], k=3)] == ["north"]
        assert await store.count("movies") == 1
    finally:
        raw_redis.config_set("maxmemory", 0)


# Versions


async def test_a_late_vector_needs_the_rev_it_was_made_from(store: Store) -> None:
    await go_live(store, "aa")
    await go_live(store, "bb")
    ids = ["same", "rewritten", "deleted", "put again"]
    old = (await store.put("movies", ids, [b"{}"] * 4, {"aa": np.ones((4, 2), np.float32)})).revs
    await store.put("movies", ["rewritten"], [b"{}"], {"aa": rows((1, 0)), "bb": rows((1, 0))})
    await store.delete("movies", ["deleted", "put again"])
    await store.put("movies", ["put again"], [b"{}"], {"aa": rows((1, 0)), "bb": rows((1, 0))})
    assert await store.add_vectors("movies", "bb", ids, old, np.full((4, 2), [0, 1], np.float32)) == 1
    found = await store.get_vectors("movies", "bb", ids)
    assert [None if vector is None else vector.tolist() for vector in found] == [[0, 1], [1, 0], None, [1, 0]]


async def test_a_write_reads_the_live_versions_after_it_stored_the_items(store: Store, raw_redis: redis.Redis) -> None:
    await go_live(store)
    with raw_redis.monitor() as monitor:
        await store.put("movies", ["a", "b", "c"], [b"{}"] * 3, {"aa": np.ones((3, 2), np.float32)})
        await store.ping()
        seen = list(iter(lambda: monitor.next_command()["command"].split()[0], "PING"))
    writes = [position for position, command in enumerate(seen) if command == "HSET"]
    assert len(writes) == 6
    assert seen.index("HGETALL") > max(writes)


async def test_no_write_is_lost_while_a_version_takes_over(store: Store, other: Store) -> None:
    """Writers at work during a backfill, as the service does it; each vector tells which raw item it is of."""
    await go_live(store, "old")
    ids = [f"tt{i}" for i in range(300)]
    dice = np.random.default_rng(0)
    numbers = itertools.count(1)
    done = asyncio.Event()
    late = 0

    def vectors(values: list[int]) -> Vectors:
        return np.stack([turned(value / 5000) for value in values])

    await store.put("movies", ids, [b"0"] * 300, {"old": vectors([0] * 300)})

    async def write() -> None:
        nonlocal late
        known = {"old"}  # learned from the writes only, as by a replica that nobody told of the new version
        while not done.is_set():
            chosen = [str(item_id) for item_id in dice.choice(ids, 5, replace=False)]
            if dice.random() < 0.2:
                await store.delete("movies", chosen)
                continue
            values = [next(numbers) for _ in chosen]
            written = await store.put(
                "movies", chosen, [str(value).encode() for value in values], {fp: vectors(values) for fp in known}
            )
            for fp in written.live.keys() - known:
                late += await store.add_vectors("movies", fp, chosen, written.revs, vectors(values))
            known = set(written.live)

    async def backfill() -> None:
        await other.indexes.ensure("movies", "new", 2)
        await other.mark_live("movies", "new", "movies@2")
        async for batch in other.scan("movies", batch=20):
            await asyncio.sleep(0.002)  # so that many an item changes after it was read
            values = [int(item.raw) for item in batch]
            await other.add_vectors(
                "movies", "new", [item.id for item in batch], [item.rev for item in batch], vectors(values)
            )
        done.set()

    await asyncio.gather(backfill(), write(), write(), write())
    items = [item for item in await store.get_many("movies", ids) if item]
    expected = {item.id: turned(int(item.raw) / 5000).tolist() for item in items}
    for fp in ("old", "new"):
        found = await store.get_vectors("movies", fp, ids)
        assert {
            item_id: vector.tolist() for item_id, vector in zip(ids, found, strict=True) if vector is not None
        } == expected
        assert (await store.indexes.status("movies", fp)).docs == len(items) == await store.count("movies")
    assert next(numbers) > 300
    assert late > 0


async def test_an_item_that_a_version_refuses_loses_its_old_vector_in_it(store: Store) -> None:
    await go_live(store, "aa")
    await go_live(store, "bb")
    both = rows((1, 0), (0, 1))
    await store.put("movies", ["a", "b"], [b"1"] * 2, {"aa": both, "bb": both})
    written = await store.put("movies", ["a", "b"], [b"2"] * 2, {"aa": both, "bb": Encoded(both[1:], rows=[1])})
    assert [found.id for found in await store.search("movies", "bb", turned(0), 9)] == ["b"]
    assert [found.id for found in await store.search("movies", "aa", turned(0), 9)] == ["a", "b"]
    # And so where the version learned of the item late.
    assert await store.add_vectors("movies", "aa", ["a", "b"], written.revs, Encoded(both[:1], rows=[0])) == 2
    assert [found.id for found in await store.search("movies", "aa", turned(0), 9)] == ["a"]
    assert await store.add_vectors("movies", "aa", ["a"], [b"old"], Encoded(both[:0], rows=[])) == 0
    assert [found.id for found in await store.search("movies", "aa", turned(0), 9)] == ["a"]


async def test_many_queries_at_once_are_answered_in_their_order(store: Store) -> None:
    await go_live(store)
    await store.put("movies", ["a", "b"], [b"{}"] * 2, {"aa": rows((1, 0), (0, 1))})
    queries = [Query(turned(0), 1), Query(turned(1.5), 2), Query(turned(0), 2, exclude={"a"})]
    found = await store.search_many("movies", "aa", queries)
    assert [[neighbor.id for neighbor in neighbors] for neighbors in found] == [["a"], ["b", "a"], ["b"]]
    assert await store.search_many("movies", "aa", []) == []


# Scanning


async def test_a_scan_has_every_item_that_was_there_all_the_time(store: Store, other: Store) -> None:
    await go_live(store)
    ids = [f"tt{i}" for i in range(3000)]
    await store.put("movies", ids, [b"{}"] * 3000, {"aa": np.ones((3000, 2), np.float32)})
    seen: list[str] = []
    async for batch in store.scan("movies", batch=100):
        seen += [item.id for item in batch]
        extra = [f"new {len(seen)} {i}" for i in range(200)]  # the server's table grows, and shrinks
        await other.put("movies", extra, [b"{}"] * 200, {"aa": np.ones((200, 2), np.float32)})
        await other.delete("movies", extra[50:])
    assert set(ids) <= set(seen)


async def test_a_scan_tells_that_redis_was_restarted(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server:
        async with Store(server.url, timeout=5.0) as store:
            await go_live(store)
            ids = [f"tt{i}" for i in range(2000)]
            await store.put("movies", ids, [b"{}"] * 2000, {"aa": np.ones((2000, 2), np.float32)})
            scan = store.scan("movies", batch=10)
            await anext(scan)
            await asyncio.to_thread(restart, server)
            with pytest.raises(StoreUnavailable, match="restarted"):
                async for _ in scan:
                    pass
