"""The service of one process behind a real port, in a thread: for what talks to it by `itemvec.client.Client`."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import serving
import uvicorn


class LiveService:
    """`hold` stops the next request that is asked for, as a network would that swallows it."""

    def __init__(self, registry: Path, redis_url: str, **settings: Any) -> None:
        self._arguments, self._settings = (registry, redis_url), settings
        config = uvicorn.Config(self._app, port=0, log_level="error", interface="asgi3", lifespan="off")
        self._up, self._server = threading.Event(), uvicorn.Server(config)
        self._held: Callable[[str, list[str]], bool] | None = None
        self._seen: list[str] = []
        self.reached = threading.Event()
        self.running: serving.Running
        self.url = ""

    def hold(self, which: Callable[[str, list[str]], bool]) -> None:
        """The first request for which `which(path, paths before it)` is true is never answered."""
        self._seen.clear()
        self.reached.clear()
        self._held = which

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        path = f"{scope['method']} {scope['path']}"
        if self._held is not None and self._held(path, self._seen):
            self._held = None
            self.reached.set()
            while (await receive())["type"] != "http.disconnect":
                pass
            return
        self._seen.append(path)
        await self.running.app(scope, receive, send)

    async def serve(self) -> None:
        async with serving.running(*self._arguments, **self._settings) as self.running:
            task = asyncio.create_task(self._server.serve())
            while not self._server.started:  # noqa: ASYNC110 - it has no event for it
                await asyncio.sleep(0.01)
            port = self._server.servers[0].sockets[0].getsockname()[1]
            self.url = f"http://127.0.0.1:{port}"
            self._up.set()
            await task

    @contextmanager
    def up(self) -> Iterator["LiveService"]:
        thread = threading.Thread(target=lambda: asyncio.run(self.serve()))
        thread.start()
        try:
            assert self._up.wait(60)
            yield self
        finally:
            self._server.should_exit = True
            thread.join()
