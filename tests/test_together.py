import asyncio

import numpy as np
import pytest
from serving import ITEMS, publish

from itemvec.errors import InvalidItem
from itemvec.registry import Registry
from itemvec.version import ModelVersion
from service.together import AT_ONCE, Read, Together

pytestmark = pytest.mark.anyio
TOYS = list(ITEMS.values())


@pytest.fixture
def version(tmp_path):
    registry = Registry(tmp_path)
    publish(registry, seed=1, alias="champion")
    return registry.load("toys@champion")


@pytest.fixture
def calls(monkeypatch):
    """How many items each call of the encoder had."""
    sizes = []
    encode = ModelVersion.encode

    def counted(self, items, pointer=""):
        sizes.append(len(items))
        return encode(self, items, pointer)

    monkeypatch.setattr(ModelVersion, "encode", counted)
    return sizes


async def test_requests_that_arrive_together_are_encoded_in_one_call(version, calls):
    together = Together()
    parts = [TOYS[:1], TOYS[1:3], TOYS[3:6]]
    answers = await asyncio.gather(*(together.encode(version, items, "/input") for items in parts))
    assert calls == [6]
    alone = version.encode(TOYS[:6])
    vectors = np.concatenate([encoding.vectors for encoding, _, _ in answers])
    assert [len(encoding.vectors) for encoding, _, _ in answers] == [1, 2, 3]
    np.testing.assert_allclose(vectors, alone.vectors, atol=1e-6)
    assert [status for encoding, _, _ in answers for status in encoding.statuses] == alone.statuses


async def test_a_lone_request_is_encoded_before_the_loop_sleeps(version, calls):
    await Together().encode(version, TOYS[:2], "")
    assert calls == [2]


class Reader:
    """Begins requests as a listener does."""

    def __init__(self):
        self.read = Read()
        self.together = Together(self.read)

    async def request(self, version, item, first=None):
        """`first` is what it waits for before it is encoded."""
        self.read.unbegun -= 1
        self.read.last = asyncio.current_task()
        if first is not None:
            await first.wait()
        return await self.together.encode(version, [item], "")

    def begin(self, *requests):
        self.read.unbegun += len(requests)
        return [asyncio.create_task(request) for request in requests]


async def test_a_request_is_encoded_at_once_where_no_other_has_been_read(version, calls):
    reader = Reader()
    [lone] = reader.begin(reader.request(version, TOYS[0]))
    await asyncio.sleep(0)  # one step of it
    assert lone.done() and calls == [1]


async def test_requests_that_have_been_read_wait_for_each_other(version, calls):
    reader = Reader()
    await asyncio.gather(*reader.begin(*(reader.request(version, item) for item in TOYS[:3])))
    await asyncio.gather(*reader.begin(reader.request(version, TOYS[3])))
    assert calls == [3, 1]


async def test_requests_that_go_on_together_after_they_waited_are_encoded_together(version, calls):
    """As for Redis, or for their bodies."""
    reader, come = Reader(), asyncio.Event()
    waiting = reader.begin(*(reader.request(version, item, come) for item in TOYS[:3]))
    await asyncio.sleep(0)
    come.set()
    await asyncio.gather(*waiting)
    assert calls == [3]


async def test_requests_that_no_listener_has_read_are_encoded_together(version, calls):
    together = Together(Read())
    await asyncio.gather(*(together.encode(version, [item], "") for item in TOYS[:3]))
    assert calls == [3]


async def test_a_wrong_value_fails_its_own_request_alone(version):
    together = Together()
    asked = [TOYS[:1], [{"price": "dear"}], TOYS[1:2]]
    first, wrong, last = await asyncio.gather(
        *(together.encode(version, items, "/input") for items in asked), return_exceptions=True
    )
    assert isinstance(wrong, InvalidItem) and wrong.errors[0].pointer == "/input/0/price"
    for answer, item in ((first, TOYS[0]), (last, TOYS[1])):
        np.testing.assert_allclose(answer[0].vectors, version.encode([item]).vectors, atol=1e-6)


async def test_an_error_that_nobody_thought_of_fails_its_own_request_alone(version, monkeypatch):
    encode, strange = ModelVersion.encode, {"price": 7}

    def failing(self, items, pointer=""):
        if strange in items:
            raise RecursionError
        return encode(self, items, pointer)

    monkeypatch.setattr(ModelVersion, "encode", failing)
    together = Together()
    first, wrong, last = await asyncio.wait_for(
        asyncio.gather(
            *(together.encode(version, items, "/input") for items in (TOYS[:1], [strange], TOYS[1:2])),
            return_exceptions=True,
        ),
        timeout=5,
    )
    assert isinstance(wrong, RecursionError)
    assert (len(first[0].vectors), len(last[0].vectors)) == (1, 1)


async def test_a_call_has_no_more_requests_than_its_bound(version, calls):
    together = Together()
    await asyncio.gather(*(together.encode(version, TOYS[:1], "") for _ in range(AT_ONCE + 1)))
    assert calls == [AT_ONCE, 1]


async def test_versions_are_never_mixed(version, calls, tmp_path):
    registry = Registry(tmp_path)
    publish(registry, seed=2)
    other, together = registry.load("toys@2"), Together()
    calls.clear()  # loading replays golden items
    (mine, _, _), (others, _, _) = await asyncio.gather(
        together.encode(version, TOYS[:1], ""), together.encode(other, TOYS[:1], "")
    )
    assert calls == [1, 1]
    np.testing.assert_array_equal(mine.vectors, version.encode(TOYS[:1]).vectors)
    np.testing.assert_array_equal(others.vectors, other.encode(TOYS[:1]).vectors)


async def test_the_item_of_a_caller_that_has_gone_is_not_encoded(version, calls):
    together = Together()
    gone = asyncio.ensure_future(together.encode(version, TOYS[:1], ""))
    stays = asyncio.ensure_future(together.encode(version, TOYS[1:2], ""))
    await asyncio.sleep(0)  # both have asked
    assert calls == []
    gone.cancel()
    await stays
    assert calls == [1]
