"""The encode cache: what was encoded once is not encoded again, and nothing of another version or item is given."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serving
from serving import ITEMS, TOY

from itemvec.errors import FieldError, InvalidItem
from itemvec.registry import Registry
from itemvec.version import Encoding, ModelVersion
from service import cache
from service.cache import EncodeCache
from service.metrics import Metrics
from service.redis_server import EmbeddedRedis
from service.store import Store

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(empty_redis: str) -> AsyncIterator[Store]:
    async with Store(empty_redis, timeout=serving.PATIENCE) as store:
        yield store


@pytest.fixture(scope="module")
def versions(toy_registry: Path) -> tuple[ModelVersion, ModelVersion]:
    registry = Registry(toy_registry)
    return registry.load("toys@1"), registry.load("toys@2")


class Encoder:
    """Encodes for real and notes what it was asked for."""

    def __init__(self, version: ModelVersion) -> None:
        self.version = version
        self.calls: list[list[Any]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, items: Sequence[Any], pointer: str) -> tuple[Encoding, float]:
        self.calls.append(list(items))
        await self.gate.wait()
        return self.version.encode(items, pointer), 0.5


def counted(metrics: Metrics) -> dict[str, float]:
    prefix = 'itemvec_cache_items_total{model="toys@1",result="'
    lines = [line for line in metrics.render().decode().splitlines() if line.startswith(prefix)]
    return {line.removeprefix(prefix).split('"')[0]: float(line.split()[-1]) for line in lines}


async def test_an_item_is_encoded_once_for_each_version(store: Store, versions: Sequence[ModelVersion]) -> None:
    metrics = Metrics()
    kept = EncodeCache(store, "local", 100, metrics)
    one, two = map(Encoder, versions)
    toys = list(ITEMS.values())[:3]
    first, waited = await kept.encode(one.version, toys, "", one)
    again, waited_again = await kept.encode(one.version, [toys[2], toys[0], {**TOY, "price": 9.25}], "", one)
    assert (waited, waited_again) == (0.5, 0.5)
    assert one.calls == [toys, [{**TOY, "price": 9.25}]]
    assert np.array_equal(again.vectors[:2], first.vectors[[2, 0]])
    assert (await kept.encode(one.version, toys, "", one))[1] == 0.0
    other, _ = await kept.encode(two.version, toys, "", two)
    assert two.calls == [toys]
    assert np.abs(other.vectors - first.vectors).max() > 0.1
    assert counted(metrics) == {"local": 5, "miss": 4}


async def test_the_order_of_columns_says_nothing_and_every_value_does(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    kept, one = EncodeCache(store, "local", 100), Encoder(versions[0])
    await kept.encode(one.version, [{"maker": "Ada", "price": 3}], "", one)
    for same, item in [
        (True, {"price": 3, "maker": "Ada"}),
        (False, {"price": 4, "maker": "Ada"}),
        (False, {"price": 3, "maker": "Ada", "colour": "red"}),  # its status says that `colour` is ignored
        (False, {"price": 3}),
        (False, {"price": None, "maker": "Ada"}),
    ]:
        before = len(one.calls)
        encoding, _ = await kept.encode(one.version, [item], "", one)
        assert (len(one.calls) == before) is same, item
        assert encoding.statuses == one.version.encode([item]).statuses


async def test_the_items_used_longest_ago_make_room(store: Store, versions: Sequence[ModelVersion]) -> None:
    kept, one = EncodeCache(store, "local", 2), Encoder(versions[0])
    a, b, c = list(ITEMS.values())[:3]
    for item in (a, b, a, c, a, b):
        await kept.encode(one.version, [item], "", one)
    assert one.calls == [[a], [b], [c], [b]]  # b was the oldest when c came


async def test_requests_that_bring_one_item_at_once_share_the_work(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    kept, one = EncodeCache(store, "local", 100), Encoder(versions[0])
    one.gate.clear()
    a, b = list(ITEMS.values())[:2]
    requests = [asyncio.create_task(kept.encode(one.version, items, "", one)) for items in ([a], [a, b], [b, a], [a])]
    await asyncio.sleep(0.01)
    one.gate.set()
    encodings = [encoding for encoding, _ in await asyncio.gather(*requests)]
    assert sorted(len(call) for call in one.calls) == [1, 1]
    assert np.array_equal(encodings[1].vectors, encodings[2].vectors[::-1])


async def test_a_request_whose_twin_was_cancelled_or_failed_encodes_by_itself(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    kept, one = EncodeCache(store, "local", 100), Encoder(versions[0])
    one.gate.clear()
    twin = asyncio.create_task(kept.encode(one.version, [{**TOY, "price": 1.0}, TOY], "", one))
    await asyncio.sleep(0)
    waiting = asyncio.create_task(kept.encode(one.version, [TOY], "", one))
    await asyncio.sleep(0)
    twin.cancel()
    await asyncio.sleep(0)
    one.gate.set()
    encoding, _ = await waiting
    assert encoding.vectors.shape == (1, serving.DIM)


async def test_a_lone_item_whose_twin_was_cancelled_is_encoded_by_itself(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    metrics = Metrics()
    kept, one = EncodeCache(store, "local", 100, metrics), Encoder(versions[0])
    one.gate.clear()
    twins = [asyncio.create_task(kept.encode(one.version, [TOY], "", one)) for _ in range(3)]
    await asyncio.sleep(0)
    twins[0].cancel()
    await asyncio.sleep(0)
    one.gate.set()
    (first, _), (second, _) = await asyncio.gather(*twins[1:])
    assert np.array_equal(first.vectors, second.vectors)
    assert one.calls == [[TOY], [TOY]]
    assert counted(metrics) == {"local": 1, "miss": 1}


async def test_a_kept_item_keeps_nothing_of_those_that_were_encoded_with_it(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    kept, version = EncodeCache(store, "local", 100), versions[0]
    many = version.encode([TOY] * 64)

    async def together(items: Sequence[Any], pointer: str) -> tuple[Encoding, float]:
        return Encoding(many.vectors[5:6], many.statuses[5:6]), 0.0

    await kept.encode(version, [TOY], "", together)
    again, _ = await kept.encode(version, [TOY], "", together)
    assert np.array_equal(again.vectors, many.vectors[5:6])
    assert again.vectors.base.nbytes == again.vectors.nbytes


async def test_an_item_that_is_refused_is_told_by_its_place_in_the_request(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    kept, one = EncodeCache(store, "local", 100), Encoder(versions[0])
    await kept.encode(one.version, [TOY], "/input", one)
    for _ in range(2):
        with pytest.raises(InvalidItem) as refusal:
            await kept.encode(one.version, [TOY, {**TOY, "price": "cheap"}], "/input", one)
        assert [error.pointer for error in refusal.value.errors] == ["/input/1/price"]
    assert isinstance(refusal.value.errors[0], FieldError)


async def test_what_one_replica_encoded_another_finds_in_redis(
    store: Store, empty_redis: str, versions: Sequence[ModelVersion]
) -> None:
    metrics = Metrics()
    one = Encoder(versions[0])
    odd = {**TOY, "maker": "nobody", "colour": "red"}
    made, _ = await EncodeCache(store, "redis", 100).encode(one.version, [TOY, odd], "", one)
    await asyncio.sleep(0.05)  # the answer does not wait for the write
    async with Store(empty_redis, timeout=serving.PATIENCE) as elsewhere:
        kept = EncodeCache(elsewhere, "redis", 100, metrics)
        found, _ = await kept.encode(one.version, [odd, TOY, {"price": 1}], "", one)
        assert one.calls == [[TOY, odd], [{"price": 1}]]
        assert np.array_equal(found.vectors[:2], made.vectors[::-1])
        assert found.statuses[:2] == made.statuses[::-1] == [{"maker": "oov", "colour": "ignored"}, {}]
        await kept.encode(one.version, [odd], "", one)
        assert counted(metrics) == {"redis": 2, "miss": 1, "local": 1}


async def test_without_redis_items_are_encoded_all_the_same(tmp_path: Path, versions: Sequence[ModelVersion]) -> None:
    one = Encoder(versions[0])
    with EmbeddedRedis(tmp_path) as server:
        store = Store(server.url)
    async with store:
        kept = EncodeCache(store, "redis", 100)
        for item in list(ITEMS.values())[:10]:
            encoding, _ = await kept.encode(one.version, [item], "", one)
            assert encoding.vectors.shape == (1, serving.DIM)
        assert not store.available
        await asyncio.sleep(0.2)  # the writes on their way fail without a word


@pytest.mark.parametrize("how", ["off", "many", "not JSON"])
async def test_what_is_not_looked_up_goes_straight_to_the_encoder(
    store: Store, versions: Sequence[ModelVersion], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, one = EncodeCache(store, "off" if how == "off" else "local", 100), Encoder(versions[0])
    monkeypatch.setattr(cache, "CACHED_ITEMS", 2)
    items: list[Any] = [TOY] * (3 if how == "many" else 1)
    if how == "not JSON":
        items = [{**TOY, "price": 2**70}]
    for _ in range(2):
        await kept.encode(one.version, items, "", one)
    assert one.calls == [items, items]


async def test_copies_of_an_item_in_one_request_are_encoded_once(
    store: Store, versions: Sequence[ModelVersion]
) -> None:
    metrics, other = Metrics(), ITEMS["toy 5"]
    encoder = Encoder(versions[0])
    kept = EncodeCache(store, "local", 100, metrics)
    encoding, _ = await kept.encode(versions[0], [TOY, other, TOY, dict(TOY)], "/input", encoder)
    assert encoder.calls == [[TOY, other]]
    expected = versions[0].encode([TOY, other, TOY, TOY]).vectors
    np.testing.assert_allclose(encoding.vectors, expected, atol=1e-6)
    assert counted(metrics) == {"miss": 2, "local": 2}
    wrong = {"price": "much"}
    with pytest.raises(InvalidItem) as refused:
        await kept.encode(versions[0], [other, wrong, wrong], "/input", encoder)
    assert [error.pointer for error in refused.value.errors] == ["/input/1/price", "/input/2/price"]
