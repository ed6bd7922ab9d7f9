"""A replica's own listeners: a socket for HAProxy, and a port beside HAProxy's for callers on trusted ground.

On the port all replicas of a machine listen together (SO_REUSEPORT), and the system gives each new connection to one of
them. What HAProxy does for a request is then not done: it does not go to another replica when its own dies, a
connection stays with its replica however busy that is, and a replica that ends closes its connections.
"""

import asyncio
import contextlib
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import uvicorn
from httptools import HttpParserUpgrade
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from itemvec.errors import ConfigError
from service.together import Read

Application = Callable[..., Awaitable[None]]

COPIED: Final = 65_536
"""Bytes of a body up to which it is copied behind its head; a larger one is sent after it, as it is."""

BUFFER: Final = 1 << 20
"""Bytes of an answer that the system takes at once, or as many as it allows. By default Linux takes 208 kB, and the
rest of a bulk answer waits until the event loop comes round again."""


def listen(app: Application, host: str, port: int, read: Read) -> "asyncio.Task[None]":
    """Answers until the task is cancelled. Raises `ConfigError` if nobody could listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, direct_port {port}: {error.strerror or error}") from None
    return asyncio.get_running_loop().create_task(_answer(_Server(_settings(app, read)), listening))


async def listen_for_haproxy(app: Application, path: Path, read: Read) -> "asyncio.Task[None]":
    """Answers on the Unix socket `path`, which is there when this returns, until the task is cancelled."""
    # HAProxy decides when an idle connection ends: one that ends as it sends a request is a request that fails.
    server = _Server(_settings(app, read, uds=str(path), timeout_keep_alive=3600))
    task = asyncio.get_running_loop().create_task(_answer(server))
    while not server.started and not task.done():  # noqa: ASYNC110 uvicorn has no event for it
        await asyncio.sleep(0.01)
    return task


def _settings(app: Application, read: Read, **others: Any) -> uvicorn.Config:
    return uvicorn.Config(
        _Counted(app, read), interface="asgi3", http=_AtOnce, ws="none", lifespan="off", proxy_headers=False,
        access_log=False, log_level="error", server_header=False, **others,
    )  # fmt: skip


async def _answer(server: uvicorn.Server, *listening: socket.socket) -> None:
    try:
        await server.serve(sockets=list(listening) or None)
    finally:  # uvicorn itself closes nothing when it is cancelled
        await server.shutdown(sockets=list(listening))


class _Server(uvicorn.Server):
    """Leaves the signals of the process to Ray."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


class _Counted:
    """The application, and what was read for it."""

    def __init__(self, app: Application, read: Read) -> None:
        self._app, self.read = app, read

    def __call__(self, scope: Any, receive: Any, send: Any) -> Awaitable[None]:
        self.read.unbegun -= 1
        self.read.last = asyncio.current_task()
        return self._app(scope, receive, send)


class _AtOnce(HttpToolsProtocol):
    """Gives an answer to the system at once: head and body together, and to HAProxy up to `BUFFER` bytes of them."""

    transport: "Joining"  # type: ignore[assignment]

    _head_ends: int | None = None
    """Where in the data that came last; of a head with `Upgrade`, which is yet to be read without it."""

    def data_received(self, data: "bytes | memoryview") -> None:
        """A server may ignore Upgrade (RFC 9110, 7.8), but what follows such a head httptools leaves to the protocol
        that was asked for: it is given the head once more, without the header, and then the rest."""
        super().data_received(data)  # type: ignore[arg-type]
        while (end := self._head_ends) is not None:
            self._head_ends = None
            super().data_received(self._head_without_upgrade())
            data = memoryview(data)[end:]
            super().data_received(data)  # type: ignore[arg-type]

    def _should_upgrade(self) -> bool:
        """Asked of what httptools takes for an upgrade, which CONNECT without the header is too."""
        return any(name == b"upgrade" for name, _ in self.headers)

    def handle_websocket_upgrade(self) -> None:
        """Called for each of them, as httptools says so by an error that names the place."""
        error = sys.exception()
        assert isinstance(error, HttpParserUpgrade)  # noqa: S101
        self._head_ends = error.args[0]

    def _head_without_upgrade(self) -> bytes:
        first = b"%s %s HTTP/%s" % (self.scope["method"].encode(), self.url, self.scope["http_version"].encode())
        fields = (b"%s: %s" % field for field in self.headers if field[0] != b"upgrade")
        return b"\r\n".join([first, *fields, b"\r\n"])

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        app.read.unbegun += 1
        super()._start_asgi_task(cycle, app)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(Joining(transport))  # type: ignore[arg-type]
        own = transport.get_extra_info("socket")
        if own.family == socket.AF_UNIX:  # of a TCP socket the system finds the best size itself
            own.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)

    def on_response_complete(self) -> None:
        self.transport.flush()  # a head without a body, to HEAD
        super().on_response_complete()


class Joining:
    """A transport that keeps the head of an answer until the body comes.

    uvicorn writes them one after the other. Each is then a call to the system and wakes who waits for the answer:
    HAProxy, which passes on what it has, and then the caller.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport, self._head = transport, b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._head:
            self.flush(data)
        elif data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n") and not data.startswith(b"HTTP/1.1 100 "):
            self._head = data
        else:
            self._transport.write(data)

    def flush(self, body: bytes = b"") -> None:
        head, self._head = self._head, b""
        if not head or self._transport.is_closing():
            return
        if len(body) > COPIED:
            self._transport.write(head)
            self._transport.write(body)
        else:
            self._transport.write(head + body)

    def close(self) -> None:
        self.flush()
        self._transport.close()
