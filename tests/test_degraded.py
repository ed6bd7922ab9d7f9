"""The service over a Redis that hangs or dies: what answers, what is refused and how soon, and that it recovers."""

import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import clock
import pytest
import serving
from serving import DIM, ITEMS, TOY, Running, assert_problem, eventually, post
from storing import kill

from service import link, models
from service.config import ServiceConfig
from service.redis_server import EmbeddedRedis

pytestmark = pytest.mark.anyio

SECONDS = 0.2
"""Within which a call that needs the store is refused."""

DEFAULT = ServiceConfig.model_fields["store_timeout"].default


@pytest.fixture
async def over_redis(tmp_path: Path, toy_registry: Path) -> AsyncIterator[tuple[Running, EmbeddedRedis]]:
    with EmbeddedRedis(tmp_path) as server:
        async with serving.running(
            toy_registry, server.url, cache="off", registry_poll_seconds=3600.0, store_timeout=DEFAULT
        ) as service:
            await service.load()
            yield service, server


def hang(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGSTOP)


def go_on(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    os.kill(server.pid, signal.SIGCONT)


def start(server: EmbeddedRedis) -> None:
    server.start()


def degraded(service: Running) -> float:
    [line] = [
        line for line in service.metrics.render().decode().splitlines() if line.startswith("itemvec_degraded_replicas")
    ]
    return float(line.split()[-1])


@pytest.mark.parametrize(("stop", "resume"), [(hang, go_on), (kill, start)], ids=["hung", "dead"])
async def test_encoding_goes_on_and_what_needs_the_store_is_refused_soon_until_redis_is_back(
    over_redis: tuple[Running, EmbeddedRedis],
    stop: Callable[[EmbeddedRedis], None],
    resume: Callable[[EmbeddedRedis], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service, server = over_redis
    monkeypatch.setattr(link, "SILENT", 0.0)  # as if Redis had been silent for long
    assert degraded(service) == 0
    many = [{"id": f"many {i}", **TOY} for i in range(100)]
    calls: dict[str, Callable[[], Any]] = {
        "similar": lambda: post(service, "/v1/similar", {"id": "toy 3"}),
        "similar to an item": lambda: post(service, "/v1/similar", {"item": TOY}),
        "put": lambda: service.client.put("/v1/items/new", json=TOY),
        "put many": lambda: post(service, "/v1/items", {"items": many}),
        "many queries": lambda: post(service, "/v1/similar", {"queries": [{"id": f"toy {i % 40}"} for i in range(70)]}),
        "get": lambda: service.client.get("/v1/items/toy%203"),
        "delete": lambda: service.client.delete("/v1/items/toy%204"),
    }
    stop(server)
    try:
        for name, call in list(calls.items()) * 2:
            async with clock.running() as watch:
                answer = await call()
            assert_problem(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
            assert watch.seconds < SECONDS, name
        assert degraded(service) == 1
        for _ in range(3):
            async with clock.running() as watch:
                answer = await post(service, "/v1/embeddings", {"input": [TOY]})
            assert watch.seconds < SECONDS
            assert (answer.status_code, answer.json()["degraded"]) == (200, True)
            assert len(answer.json()["data"][0]["embedding"]) == DIM
    finally:
        resume(server)

    async def recovered() -> bool:
        return bool((await post(service, "/v1/similar", {"id": "toy 3", "k": 39})).status_code == 200)

    await eventually(recovered)
    found = (await post(service, "/v1/similar", {"id": "toy 3", "k": 100})).json()["neighbors"]
    assert {neighbor["id"] for neighbor in found} >= set(ITEMS) - {"toy 3", "toy 4"}  # "toy 4" as Redis had got to it
    assert "degraded" not in (await post(service, "/v1/embeddings", {"input": [TOY]})).json()
    assert degraded(service) == 0


async def test_answers_say_that_the_store_is_down_soon_where_nobody_else_calls_it(
    tmp_path: Path, toy_registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "YOUNG_SECONDS", 0.0)
    with EmbeddedRedis(tmp_path) as server:
        async with serving.running(
            toy_registry, server.url, registry_poll_seconds=1.0, store_timeout=DEFAULT
        ) as service:
            hang(server)
            try:

                async def says_so() -> bool:
                    return bool((await post(service, "/v1/embeddings", {"input": [TOY]})).json().get("degraded"))

                async with clock.running() as watch:
                    await eventually(says_so)
                assert watch.seconds < 3.0  # a poll of the registry and five short calls, not five polls
            finally:
                go_on(server)
