"""The Ray Serve deployment: ingress and encoder in one process, so that no request pays for a hop between them.

It only brings the parts together; what they do is in `models.py`, `store.py`, `api.py` and `metrics.py`.
"""

import asyncio
import gc
import logging
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from itemvec.errors import ItemvecError
from service import metrics
from service.config import ServiceConfig
from service.haproxy import socket_of
from service.processes import short_turns

APP: Final = "itemvec"

GARBAGE: Final = 50_000
"""New objects after which Python looks for those that hold each other. A body of 1,024 items is ten thousand, and by
default each seven hundred of them made it look."""

METRICS_SECONDS: Final = 5.0
"""Within which every replica must have told its numbers; Prometheus itself waits 10 s by default."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a replica answered to another one. An error travels as text: few exceptions survive pickling."""

    replica: str
    value: Any = None
    error: str | None = None

    def result(self) -> Any:
        if self.error is not None:
            raise ItemvecError(self.error)
        return self.value


class Fleet:
    """All running replicas of this deployment, and this one even while it is starting.

    `here` is the deployment's object in this process, `name` the id of this replica.
    """

    def __init__(self, handle: "DeploymentHandle[Any]", here: object, name: str) -> None:
        self._handle, self._here, self._name = handle, here, name

    async def call(self, method: str, *args: Any, timeout: float = 60.0) -> list[Any]:  # noqa: ASYNC109
        """The result of `method` from each replica; `ItemvecError` if one fails or takes longer than `timeout`.

        Other replicas that are starting are not asked, and one that dies meanwhile is left out: they, or their
        successors, read the truth in the registry.
        """
        return [reply.result() for reply in await self._replies(method, args, timeout) if reply is not None]

    async def call_everyone(self, method: str, timeout: float) -> list[Any]:  # noqa: ASYNC109
        """The same, but not without one that is dead: it asks again until the dead are known to be gone."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout
        while clock() < deadline:
            replies = await self._replies(method, (), deadline - clock())
            alive = [reply for reply in replies if reply is not None]
            if len(alive) == len(replies):
                return [reply.result() for reply in alive]
            await asyncio.sleep(0.1)
        raise ItemvecError(f"a replica has died, and is still listed after {timeout:g} s")

    async def _replies(self, method: str, args: tuple[Any, ...], seconds: float) -> list[Reply | None]:
        """None for a replica that died."""
        try:
            broadcast = self._handle.broadcast(method, *args)
            answers = await broadcast.results_async(timeout_s=seconds, return_exceptions=True)
        except DeploymentUnavailableError:  # none is running yet
            answers = []
        except TimeoutError as error:
            raise ItemvecError(f"a replica did not answer to {method} within {seconds:.1f} s") from error
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RayActorError):
                raise ItemvecError(f"a replica failed at {method}: {answer}") from answer
        replies = [answer if isinstance(answer, Reply) else None for answer in answers]
        if not any(reply is not None and reply.replica == self._name for reply in replies):
            replies.append(await getattr(self._here, method)(*args))
        return replies


@serve.ingress()
class Service:
    """One replica."""

    def __init__(self, config: ServiceConfig, metrics_dir: Path, sockets: Path | None) -> None:
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
        self._replica = serve.get_replica_context()
        self._node = ray.get_runtime_context().get_node_id()
        metrics_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = metrics.Metrics(metrics_dir)
        self._config = config
        self._sockets = sockets
        self._listening: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> "BehindServe":
        # Imported here, not above, so that the process that deploys need not load torch.
        import torch  # noqa: PLC0415

        from itemvec.registry import Registry  # noqa: PLC0415
        from service.api import build_app  # noqa: PLC0415
        from service.listener import listen, listen_for_haproxy  # noqa: PLC0415
        from service.models import LoadedModels  # noqa: PLC0415
        from service.store import Store  # noqa: PLC0415
        from service.together import Read  # noqa: PLC0415

        config = self._config
        torch.set_num_threads(config.torch_threads)
        store = Store(
            config.redis_url or "",
            timeout=config.store_timeout,
            bulk_timeout=config.bulk_timeout,
            index=config.index,
            changed=self._metrics.degraded,
        )
        read = Read()
        self._models = LoadedModels(Registry(config.registry), store, config, self._metrics, read)
        # Not by the application's lifespan: Serve keeps the reason of a failure there to itself.
        await self._models.start()
        # What is here now stays. A full collection of garbage looks at all of it, 100 ms in which nobody is answered.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GARBAGE)
        short_turns()  # of the event loop; the threads that encode many items have turns as usual
        handle = serve.get_deployment_handle(self._replica.deployment, app_name=self._replica.app_name)
        self._fleet = Fleet(handle, self, self._replica.replica_tag)
        app = build_app(
            self._models, store, self._metrics, config, fleet=self._fleet, metrics_text=self._metrics_of_all
        )
        if config.direct_port is not None:
            self._listening.append(listen(app, config.host, config.direct_port, read))
        if self._sockets is not None:
            socket = socket_of(self._sockets, self._replica.replica_tag)
            self._listening.append(await listen_for_haproxy(app, socket, read))
        return BehindServe(app, self._listening)

    async def check_health(self) -> None:
        if not self._models.ready:
            raise RuntimeError("no champion is loaded")

    async def prepare_version(self, name: str, version: int) -> Reply:
        return await self._reply(self._models.prepare_version(name, version))

    async def commit_version(self, name: str, version: int) -> Reply:
        return await self._reply(self._models.commit_version(name, version))

    async def metrics_snapshot(self) -> Reply:
        return Reply(self._replica.replica_tag, self._metrics.snapshot(self._node))

    async def _reply(self, work: Awaitable[Any]) -> Reply:
        try:
            return Reply(self._replica.replica_tag, await work)
        except ItemvecError as error:
            return Reply(self._replica.replica_tag, error=str(error))

    async def _metrics_of_all(self) -> bytes:
        try:
            snapshots = await self._fleet.call_everyone("metrics_snapshot", METRICS_SECONDS)
        except ItemvecError as error:
            raise metrics.Incomplete(str(error)) from error
        return metrics.exposition({snapshot.node: snapshot for snapshot in snapshots}.values())


class BehindServe:
    """The application as Serve runs it.

    X-Request-ID is left to Serve, which adds it to every answer itself: it would be there twice. And before the
    application ends, so do the replica's own listeners, of which Serve knows nothing: what they have is answered.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], listening: Sequence["asyncio.Task[None]"]) -> None:
        self._app, self._listening = app, listening

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_without(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [header for header in message["headers"] if header[0] != b"x-request-id"]
            await send(message)

        async def receive_last() -> Any:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                for listening in self._listening:
                    listening.cancel()
                await asyncio.gather(*self._listening, return_exceptions=True)
            return message

        if scope["type"] == "lifespan":
            await self._app(scope, receive_last, send)
        else:
            await self._app(scope, receive, send_without if scope["type"] == "http" else send)


def application(config: ServiceConfig, sockets: Path | None = None) -> serve.Application:
    """The Serve application of these settings; in the folder `sockets` its replicas listen for a HAProxy that
    `service.haproxy` installed."""
    metrics_dir = config.metrics_dir or Path(tempfile.gettempdir(), f"itemvec-metrics-{uuid.uuid4().hex[:12]}")
    deployment = serve.deployment(
        name="Service",
        num_replicas=config.number_of_replicas(),
        # The application counts what is in flight and answers 429 itself; Serve's own limits lie beyond, so that
        # health checks and metrics get through when it is full.
        max_ongoing_requests=2 * config.max_in_flight,
        max_queued_requests=config.max_in_flight,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=config.stop_seconds,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5,
        health_check_timeout_s=10,
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        ray_actor_options={
            "num_cpus": config.replica_cpus,
            "runtime_env": {
                "env_vars": {
                    "PROMETHEUS_MULTIPROC_DIR": str(metrics_dir),  # in no other process of Ray: it breaks theirs
                    "OMP_NUM_THREADS": str(config.torch_threads),
                }
            },
        },
    )
    return deployment(Service).bind(config, metrics_dir, sockets)


def from_settings(settings: dict[str, str]) -> serve.Application:
    """For `serve run` and KubeRay's `import_path: service.app:from_settings`; the rest comes from the environment."""
    config = ServiceConfig.read(**settings)
    # What this process counts is not what the cluster has.
    return application(config.model_copy(update={"replicas": config.replicas or 1}))
