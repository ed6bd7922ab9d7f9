"""A replica's own listener, on a port beside HAProxy's: one hop less for callers on trusted ground.

All replicas of a machine listen on the same port (SO_REUSEPORT), and the system gives each new connection to one of
them. What HAProxy does for a request is then not done: it does not go to another replica when its own dies, a
connection stays with its replica however busy that is, and a replica that ends closes its connections.
"""

import asyncio
import contextlib
import socket
from typing import Any

import uvicorn

from itemvec.errors import ConfigError


def listen(app: Any, host: str, port: int) -> "asyncio.Task[None]":
    """Answers until the task is cancelled. Raises `ConfigError` if nobody could listen there."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}, direct_port {port}: {error.strerror or error}") from None
    server = _Server(uvicorn.Config(app, lifespan="off", access_log=False, log_level="warning", server_header=False))
    return asyncio.get_running_loop().create_task(_answer(server, listening))


async def _answer(server: uvicorn.Server, listening: socket.socket) -> None:
    try:
        await server.serve(sockets=[listening])
    finally:  # uvicorn itself closes nothing when it is cancelled
        await server.shutdown(sockets=[listening])


class _Server(uvicorn.Server):
    """Leaves the signals of the process to Ray."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()
