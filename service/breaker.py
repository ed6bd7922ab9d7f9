"""Breaker: after a row of failures a dead or hung Redis costs a caller nothing."""

import time
from collections.abc import Callable

from itemvec.errors import StoreUnavailable


class Breaker:
    """Opens after `failures` in a row. Then one call each `pause` seconds tries again (half open), the rest fail
    at once.

    `changed(is_open)` is called when it opens and when it closes again.
    """

    def __init__(
        self,
        failures: int = 5,
        pause: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[bool], None] | None = None,
    ) -> None:
        self._limit, self._pause, self._clock = failures, pause, clock
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
        self._next_try = self._clock() + self._pause  # this call is the one that tries

    @property
    def is_open(self) -> bool:
        return self._failures >= self._limit

    def success(self) -> None:
        was_open, self._failures = self.is_open, 0
        if was_open and self._changed is not None:
            self._changed(False)

    def failure(self) -> None:
        self._failures += 1
        self._next_try = self._clock() + self._pause
        if self._failures == self._limit and self._changed is not None:
            self._changed(True)
