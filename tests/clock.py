"""A clock for what must be soon, on a machine that may be busy."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

TICK = 0.005
"""Seconds."""


class Watch:
    """Seconds in which the event loop could turn. They stand still while this thread waits for a core that something
    else has (on Linux), and a loop that stands still, since this process or the whole machine does, counts as two
    ticks, or as the processor time that it took in them."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = _unhindered(), time.thread_time()

    def tick(self) -> None:
        began, busy = self._last
        now = self._last = _unhindered(), time.thread_time()
        self.seconds += max(min(now[0] - began, 2 * TICK), now[1] - busy)


def _unhindered() -> float:
    waited = 0
    with suppress(OSError):
        _, waited, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())  # nanoseconds
    return time.monotonic() - waited / 1e9


@asynccontextmanager
async def running() -> AsyncIterator[Watch]:
    watch = Watch()

    async def go_on() -> None:
        while True:
            await asyncio.sleep(TICK)
            watch.tick()

    ticking = asyncio.create_task(go_on())
    try:
        yield watch
    finally:
        ticking.cancel()
        watch.tick()
