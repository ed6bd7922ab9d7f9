"""Turns: how many calls may be on their way to Redis at once."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

FEWEST: Final = 5
"""As many failures open the breaker, so that nobody waits for a second round of calls to a store that is down."""


class Turns:
    """Fewer while calls take long.

    Redis does one call after the other. Of sixteen at once that take it 10 ms each, the last would be given up before
    its turn, and be done there all the same: a busy store would pass for one that is down. A call of more than `slow`
    seconds halves the number, once in that time; calls that take less raise it by one for each round of them (additive
    increase, multiplicative decrease: Chiu and Jain 1989).
    """

    def __init__(self, most: int, slow: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._slow, self._clock = most, slow, clock
        self.limit = self._fewest = min(FEWEST, most)
        self._free = asyncio.Semaphore(self.limit)
        self._owed = 0
        """Calls under way beyond the limit, from before it was halved: as they end, nobody follows them."""

        self._quick = 0
        self._halved = float("-inf")

    def all_taken(self) -> bool:
        return self._free.locked()

    async def take(self) -> None:
        """Waits for a turn; does not wait unless all are taken."""
        await self._free.acquire()

    def give_back(self, seconds: float | None) -> None:
        """`seconds`: how long the call took; None where none was made."""
        self._owed -= 1
        if seconds is not None:
            self._learn(seconds)
        while self._owed < 0:
            self._owed += 1
            self._free.release()

    def _learn(self, seconds: float) -> None:
        if seconds > self._slow:
            if (now := self._clock()) - self._halved > self._slow:
                fewer = max(self._fewest, self.limit // 2)
                self._owed += self.limit - fewer
                self.limit, self._quick, self._halved = fewer, 0, now
        elif self.limit < self._most:
            self._quick += 1
            if self._quick >= self.limit:
                self.limit, self._quick = self.limit + 1, 0
                self._owed -= 1
