"""Breaker: after a row of failures a dead or hung Redis costs a caller nothing."""

import time
from collections.abc import Callable
from typing import Final

from itemvec.errors import StoreUnavailable

FAILURES: Final = 5
"""In a row, which open it."""


class Breaker:
    """Opens after `failures` in a row. Then one call tries again after `pause` seconds (half open), and after twice as
    many each time up to `longest`; the rest fail at once. So a Redis that stood still for a moment is not given up for
    long.

    `changed(is_open)` is called when it opens and when it closes again.
    """

    def __init__(
        self,
        failures: int = FAILURES,
        pause: float = 0.1,
        longest: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[bool], None] | None = None,
    ) -> None:
        self._limit, self._clock = failures, clock
        self._first = self._pause = pause
        self._longest = longest
        self._changed = changed
        self._failures = 0
        self._next_try = 0.0

    def enter(self) -> None:
        """Before a call; raises `StoreUnavailable` while it is open and another call is the one that tries."""
        if not self.is_open:
            return
        wait = self._next_try - self._clock()
        if wait > 0:
            raise StoreUnavailable(f"Redis failed {self._failures} times in a row", retry_after=wait)
        self._pause = min(self._longest, 2 * self._pause)
        self._next_try = self._clock() + self._pause  # this call is the one that tries

    @property
    def is_open(self) -> bool:
        return self._failures >= self._limit

    @property
    def last_failed(self) -> bool:
        return self._failures > 0

    def success(self) -> None:
        was_open, self._failures, self._pause = self.is_open, 0, self._first
        if was_open and self._changed is not None:
            self._changed(False)

    def failure(self) -> None:
        self._failures += 1
        self._next_try = self._clock() + self._pause
        if self._failures == self._limit and self._changed is not None:
            self._changed(True)
