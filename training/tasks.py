"""Work handed out: to processes of this machine, or to tasks on all machines of a Ray cluster.

What is handed out is a function of paths and small values, so that nothing large is sent, and its memory is free when
it is done.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Others:
    """What does the work."""

    submit: Callable[..., "Future[Any]"]

    cores: int
    """How many do it at once."""


@contextmanager
def others(spread: bool) -> Iterator[Others]:
    """Processes, one a core; or, to `spread` the work, tasks of the Ray cluster that this process is connected to. What
    a lost machine of the cluster had is done again elsewhere."""
    if spread:
        import ray  # noqa: PLC0415 - takes seconds

        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        yield Others(lambda function, *given: ray.remote(function).remote(*given).future(), max(cores, 1))
        return
    cores = os.cpu_count() or 1
    # Spawned, since a fork of a process with threads (Arrow, torch, Ray) may hang.
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        try:
            yield Others(pool.submit, cores)
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(by: Others, function: Callable[..., Made], given: Sequence[tuple[Any, ...]]) -> Iterator[Made]:
    """What `function` makes of each, in order; at most a few results wait to be taken, since each may be large."""
    waiting: deque[Future[Made]] = deque()
    for arguments in given:
        waiting.append(by.submit(function, *arguments))
        if len(waiting) > 2 * by.cores:
            yield _made(waiting.popleft())
    while waiting:
        yield _made(waiting.popleft())


def _made(future: "Future[Made]") -> Made:
    try:
        return future.result()
    except Exception as error:
        raise getattr(error, "cause", error) from None  # Ray wraps what its tasks raise
