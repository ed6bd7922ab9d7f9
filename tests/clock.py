"""A clock for what must be soon, on a machine that may be busy."""

import time
from contextlib import suppress
from pathlib import Path


def now() -> float:
    """Seconds; they stand still while this thread waits for a core that something else has. Elsewhere than on Linux it
    is the common clock."""
    waited = 0
    with suppress(OSError):
        _, waited, _ = map(int, Path("/proc/thread-self/schedstat").read_text().split())  # nanoseconds
    return time.monotonic() - waited / 1e9
