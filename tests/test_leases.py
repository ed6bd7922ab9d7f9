import asyncio

import pytest

from service.store import Store

pytestmark = pytest.mark.anyio


async def test_one_switches_at_a_time(store: Store, other: Store) -> None:
    assert await store.leases.claim("movies", "one", ttl=10) == "one"
    assert await other.leases.claim("movies", "two", ttl=10) == "one"
    assert await other.leases.claim("books", "two", ttl=10) == "two"
    await other.leases.release("movies", "two")  # not his to give back
    assert await store.leases.claim("movies", "one", ttl=0.05) == "one"
    await asyncio.sleep(0.1)
    assert await other.leases.claim("movies", "two", ttl=10) == "two"
    assert await store.leases.holder("movies") == "two"
    await other.leases.release("movies", "two")
    assert await store.leases.holder("movies") is None
    assert await store.leases.claim("movies", "one", ttl=10) == "one"


async def test_a_job_is_kept_for_a_while(store: Store, other: Store) -> None:
    await store.leases.save_job("7", b'{"state": "running"}', ttl=0.5)
    assert await other.leases.job("7") == b'{"state": "running"}'
    await asyncio.sleep(0.55)
    assert await other.leases.job("7") is None
