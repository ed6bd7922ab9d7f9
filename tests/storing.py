"""What tests of the store share: a model of two dimensions, and a Redis that dies."""

import os
import signal
import time

import numpy as np
import redis
from numpy.typing import NDArray

from service.redis_server import EmbeddedRedis
from service.store import Store

Vectors = NDArray[np.float32]


async def go_live(store: Store, fp: str = "aa", dim: int = 2, name: str = "movies") -> None:
    await store.indexes.ensure(name, fp, dim)
    await store.mark_live(name, fp, f"{name}@1")


def rows(*vectors: tuple[float, ...]) -> Vectors:
    return np.array(vectors, np.float32)


def turned(angle: float) -> Vectors:
    return np.array([np.cos(angle), np.sin(angle)], np.float32)


def kill(server: EmbeddedRedis) -> None:
    """Once the system has what was acknowledged: while the disk is busy with an earlier part, Redis keeps it back."""
    with redis.Redis.from_url(server.url) as client:
        while client.info("persistence").get("aof_buffer_length"):
            time.sleep(0.01)
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    while server.pid is not None:
        time.sleep(0.005)


def restart(server: EmbeddedRedis) -> None:
    kill(server)
    server.start()
