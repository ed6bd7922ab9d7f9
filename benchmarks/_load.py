"""Load on a server of this machine: `flood` finds how much it takes, `offer` how long callers wait at a given rate.

`flood` is wrk: each connection sends its next request when the last one is answered. Such a caller waits with a server
that stalls, so what it sees of delays is too good. In `offer` request i is due at i/rate whatever the server does, and
its latency counts from then, also while it waits for one of the connections (as in wrk2): no coordinated omission.
"""

import contextlib
import gc
import os
import re
import select
import shutil
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import click
import numpy as np

PATIENCE = 3.0
"""Seconds that `offer` waits for answers after its last request was due."""

SCRIPT = """
local bodies, next_one = {}, tonumber(os.getenv("FIRST"))
local file = io.open(os.getenv("BODIES"), "rb")
for length in os.getenv("LENGTHS"):gmatch("%d+") do table.insert(bodies, file:read(tonumber(length))) end
wrk.method = "POST"
wrk.headers["Content-Type"] = os.getenv("CONTENT_TYPE")
request = function()
    next_one = next_one % #bodies + 1
    return wrk.format(nil, nil, nil, bodies[next_one])
end
"""


@dataclass(frozen=True)
class Target:
    port: int
    path: str
    content_type: str = "application/json"


class Requests:
    """Bodies that are sent one after the other, over all measurements: a cache of fewer never helps."""

    def __init__(self, bodies: Sequence[bytes]) -> None:
        self.bodies = bodies
        self.at = 0

    def take(self) -> bytes:
        body = self.bodies[self.at % len(self.bodies)]
        self.at += 1
        return body


def needs_wrk() -> None:
    if shutil.which("wrk") is None:
        raise click.ClickException("the load generator wrk is not installed: apt-get install wrk, or brew install wrk")


def flood(target: Target, requests: Requests, connections: int, seconds: float) -> float:
    """Answers of 200 a second."""
    with tempfile.TemporaryDirectory() as folder:
        script, bodies = Path(folder, "post.lua"), Path(folder, "bodies")
        # From where the last measurement ended.
        some = [requests.bodies[(requests.at + i) % len(requests.bodies)] for i in range(len(requests.bodies))]
        script.write_text(SCRIPT.replace('os.getenv("LENGTHS")', f"([[{' '.join(str(len(body)) for body in some)}]])"))
        bodies.write_bytes(b"".join(some))
        told = subprocess.run(
            ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s", "-s", str(script),
             f"http://127.0.0.1:{target.port}{target.path}"],
            check=True, capture_output=True, text=True,
            env={**os.environ, "FIRST": "0", "BODIES": str(bodies), "CONTENT_TYPE": target.content_type},
        ).stdout  # fmt: skip
    answered, rate = re.search(r"(\d+) requests in", told), re.search(r"Requests/sec:\s+([\d.]+)", told)
    assert answered and rate, told
    requests.at += int(answered[1])
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", told)
    return float(rate[1]) * (1 - int(refused[1]) / int(answered[1]) if refused else 1.0)


@dataclass(frozen=True)
class Waits:
    """Seconds from when a request was due to its answer; of those not answered in time, to when we gave up."""

    seconds: Sequence[float]
    unanswered: int
    """Or refused."""

    def at(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))


def offer(target: Target, requests: Requests, connections: int, rate: float, seconds: float) -> Waits:
    """`rate` requests a second, evenly, over so many connections in turn. They stay open, and each had an answer
    before: what a server does for a connection that is new is not what is measured."""
    total = max(1, int(rate * seconds))
    gc.disable()  # a look for garbage among all bodies takes milliseconds, which would count as the server's
    with contextlib.ExitStack() as stack:
        stack.callback(gc.enable)
        callers = [stack.enter_context(Caller(target)) for _ in range(connections)]
        for caller in callers:
            caller.send(requests.take())
        for caller in callers:  # all asked before: a server closes a connection that waits for long for a slow one
            caller.answer()
        return _offer(target, requests, [caller.connection for caller in callers], rate, total)


class Caller:
    """One connection, whose next request is sent when the last one is answered. The HTTP clients of Python take longer
    for a request than the service does."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connect()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def post(self, body: bytes) -> bytes | None:
        """The body of the answer; None if it is not 200."""
        self.send(body)
        return self.answer()

    def send(self, body: bytes) -> None:
        self.connection.sendall(_head(self._target, body) + body)

    def answer(self) -> bytes | None:
        answer = bytearray()
        while not _whole(answer):
            received = self.connection.recv(1 << 20)
            assert received, "the server closed the connection"
            answer += received
        head, _, rest = answer.partition(b"\r\n\r\n")
        if b"\r\nconnection: close" in head.lower():  # as HAProxy says once, when it has heard of a replica
            self.connection.close()
            self._connect()
        return bytes(rest) if head.startswith(b"HTTP/1.1 200") else None

    def _connect(self) -> None:
        self.connection = socket.create_connection(("127.0.0.1", self._target.port))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _offer(target: Target, requests: Requests, sockets: Sequence[socket.socket], rate: float, total: int) -> Waits:
    idle, buffers = deque(sockets), {one: bytearray() for one in sockets}
    due: dict[socket.socket, float] = {}
    waits: list[float] = []
    sent = refused = 0
    began = time.perf_counter() + 0.01
    end = began + total / rate + PATIENCE
    while len(waits) < total and (now := time.perf_counter()) < end:
        while idle and sent < total and (moment := began + sent / rate) <= now:
            body, one = requests.take(), idle.popleft()
            one.sendall(_head(target, body) + body)
            due[one], sent = moment, sent + 1
        pause = max(0.0, began + sent / rate - time.perf_counter()) if idle and sent < total else PATIENCE
        for one in select.select(list(due), [], [], pause)[0]:  # not epoll, whose shortest pause is 1 ms
            received = one.recv(1 << 20)
            buffers[one] += received
            if not received:  # closed by the server, and not opened again
                refused += 1
                waits.append(time.perf_counter() - due.pop(one))
            elif _whole(buffers[one]):
                refused += not buffers[one].startswith(b"HTTP/1.1 200")
                buffers[one].clear()
                waits.append(time.perf_counter() - due.pop(one))
                idle.append(one)
    late = [time.perf_counter() - moment for moment in due.values()]
    late += [time.perf_counter() - (began + i / rate) for i in range(sent, total)]
    return Waits(waits + late, len(late) + refused)


def _head(target: Target, body: bytes) -> bytes:
    told = {"Host": "127.0.0.1", "Content-Type": target.content_type, "Content-Length": len(body)}
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in told.items())]
    return "\r\n".join([*lines, "\r\n"]).encode()


def _whole(answer: bytearray) -> bool:
    """Is this a whole HTTP answer, of known length or in chunks?"""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return len(body) == int(length[1]) if length else body.endswith(b"0\r\n\r\n")
