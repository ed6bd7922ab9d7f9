"""Fixtures that several test files share: a real Redis and a real Ray, each started once."""

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import redis
import serving
import torch
from hypothesis import HealthCheck, settings
from realservice import RealService, eventually

from itemvec.registry import Registry
from service.redis_server import EmbeddedRedis
from service.store import Store
from training.cluster import own_cluster

# A busy machine is no defect of the code, so nothing here is timed; and threads of torch that wait for a core that
# something else has make small arithmetic many times slower. Ray's workers have one thread too, whatever the shell has.
settings.register_profile("itemvec", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("itemvec")
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded server, one for all tests; what they leave in it stays."""
    with EmbeddedRedis(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def empty_redis(redis_url: str) -> str:
    """The same server, emptied before the test."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture
async def store(empty_redis: str) -> AsyncIterator[Store]:
    async with Store(empty_redis, timeout=serving.PATIENCE) as store:
        yield store


@pytest.fixture
async def other(empty_redis: str) -> AsyncIterator[Store]:
    """A second replica of the service."""
    async with Store(empty_redis, timeout=serving.PATIENCE) as store:
        yield store


@pytest.fixture
def raw_redis(empty_redis: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(empty_redis) as client:
        yield client


@pytest.fixture(scope="session")
def toy_registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small versions of one model; 1 is the champion. Copy it to change it."""
    root = tmp_path_factory.mktemp("registry")
    registry = Registry(root)
    for seed in (1, 2, 3):
        serving.publish(registry, seed, alias="champion" if seed == 1 else None)
    return root


@pytest.fixture
async def toys(
    anyio_backend: str, tmp_path: Path, toy_registry: Path, empty_redis: str
) -> AsyncIterator[serving.Running]:
    """A running service of toys, its store empty."""
    async with serving.running(serving.copied(toy_registry, tmp_path / "registry"), empty_redis) as service:
        yield service


@pytest.fixture(scope="module")
def real_service(tmp_path_factory: pytest.TempPathFactory, toy_registry: Path) -> Iterator[RealService]:
    """`itemvec serve` with two replicas on a Ray of its own. Not for the whole session: an idle Ray takes a third of a
    core."""
    folder = tmp_path_factory.mktemp("service")
    with RealService(folder, serving.copied(toy_registry, folder / "registry"), replicas=2) as service:
        eventually(lambda: len(service.replicas()) == 2, 60)
        yield service


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of four logical CPUs, one for all tests that train."""
    with own_cluster(num_cpus=4):
        yield
