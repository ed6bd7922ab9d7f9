"""Together: small requests that arrive at the same time are encoded in one call.

A call into the network costs tens of microseconds however few items it has. Nobody waits for company, there is no
timer: what the event loop has read from its sockets is encoded, and while that runs the next requests arrive. So a lone
request is encoded alone, and the busier the service is, the more it encodes at once.

Where the listener tells what it has read (`Read`), a lone request does not even wait for the event loop to come round
again.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from itemvec.version import Encoding, ModelVersion

AT_ONCE = 64
"""Items of one call: some 3 ms in the event loop. More gain little."""

Done = tuple[Encoding, float, float]
"""The encoding, the seconds that its items waited, and those that the call took."""


@dataclass(slots=True)
class _Part:
    """What one request brings."""

    version: ModelVersion
    items: Sequence[Mapping[str, Any]]
    pointer: str
    asked: float
    done: "asyncio.Future[Done]"


class Read:
    """The requests that listeners have read from their sockets."""

    __slots__ = ("last", "unbegun")

    def __init__(self) -> None:
        self.unbegun = 0
        """How many have not begun."""
        self.last: asyncio.Task[Any] | None = None
        """Of those that have, the last."""

    def is_alone(self) -> bool:
        """Has the request that asks begun as the last of all? Others that wait for something with it may go on with it,
        so only the last of those can say so, and none that has come by another way."""
        return not self.unbegun and self.last is asyncio.current_task()


class Together:
    def __init__(self, read: Read | None = None) -> None:
        self._read = read
        self._parts: list[_Part] = []

    async def encode(self, version: ModelVersion, items: Sequence[Mapping[str, Any]], pointer: str) -> Done:
        """As `ModelVersion.encode`. Raises what it raises, to the request alone whose items are at fault."""
        if self._read is not None and not self._parts and self._read.is_alone():
            began = perf_counter()
            return version.encode(items, pointer), 0.0, perf_counter() - began
        loop = asyncio.get_running_loop()
        part = _Part(version, items, pointer, perf_counter(), loop.create_future())
        self._parts.append(part)
        if len(self._parts) == 1:
            loop.call_soon(self._encode_all)  # behind the requests that the loop has read already
        return await part.done

    def _encode_all(self) -> None:
        parts, self._parts = self._parts, []
        call: list[_Part] = []
        for part in parts:
            if part.done.done():  # its caller has gone
                continue
            if call and (part.version is not call[0].version or sum(len(p.items) for p in call) >= AT_ONCE):
                _encode(call)
                call = []
            call.append(part)
        if call:
            _encode(call)


def _encode(parts: Sequence[_Part]) -> None:
    """Of one version."""
    began = perf_counter()
    if len(parts) == 1:
        _encode_alone(parts[0], began)
        return
    try:
        whole = parts[0].version.encode([item for part in parts for item in part.items])
    except Exception:  # whoever's fault it is: each gets an answer of its own
        for part in parts:
            _encode_alone(part, perf_counter())
        return
    seconds, at = perf_counter() - began, 0
    for part in parts:
        end = at + len(part.items)
        encoding = Encoding(whole.vectors[at:end], whole.statuses[at:end])
        part.done.set_result((encoding, began - part.asked, seconds))
        at = end


def _encode_alone(part: _Part, began: float) -> None:
    try:
        encoding = part.version.encode(part.items, part.pointer)
    except Exception as error:
        part.done.set_exception(error)
    else:
        part.done.set_result((encoding, began - part.asked, perf_counter() - began))
