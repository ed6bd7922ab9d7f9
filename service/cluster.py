"""Ray and the deployment on it. Import it when Ray's environment is set: see `runtime.serve_environment`."""

import logging
import math
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.schema import LoggingConfig

from itemvec.errors import ItemvecError
from itemvec.signals import handlers_kept
from service.app import APP, application
from service.config import ServiceConfig
from service.processes import own_ray_died

OBJECT_STORE_BYTES: Final = 80 << 20
"""The least that Ray takes: requests do not pass through it."""


@contextmanager
def connected(config: ServiceConfig, folder: Path) -> Iterator[None]:
    """To the cluster of the settings, or to one of our own that ends with the block; its files are in `folder`."""
    options: dict[str, Any] = {"address": config.ray_address}
    if config.ray_address is None:
        options = {
            "address": "local",
            # Logical: they bound what is scheduled, not what runs. Serve's own processes ask for none.
            "num_cpus": max(os.cpu_count() or 1, math.ceil(config.number_of_replicas() * config.replica_cpus)),
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(folder),
        }
    try:
        try:
            with handlers_kept():
                ray.init(**options, logging_level=logging.ERROR, log_to_driver=True, namespace="itemvec")
        except Exception as error:
            raise ItemvecError(f"Ray did not start: {_last_line(str(error))}") from error
        yield
    finally:
        if not own_ray_died():  # it would end this very process, before it has tidied up
            ray.shutdown()


@contextmanager
def deployed(config: ServiceConfig, sockets: Path | None) -> Iterator[str]:
    """The URL of the service, once it is ready. Requests in flight are answered before the block is left.

    `sockets` is as in `service.app.application`.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    url = _url(config)
    try:
        try:
            _deploy(config, sockets)
            wait_until_ready(config, url)
        except (RayError, RuntimeError, TimeoutError) as error:
            why, logs = _reason(str(error), config), config.data_dir / "logs"
            raise ItemvecError(f"Ray Serve did not start: {why} (Ray's logs: {logs})") from error
        yield url
    finally:
        if not own_ray_died():
            remover = threading.Thread(target=_remove, daemon=True)
            remover.start()
            remover.join(config.drain_seconds + config.stop_seconds + 4.0)


def _deploy(config: ServiceConfig, sockets: Path | None) -> None:
    serve.start(
        proxy_location="EveryNode",
        http_options={"host": config.host, "port": config.port},
        logging_config=LoggingConfig(log_level="WARNING"),
    )
    target = serve.RunTarget(application(config, sockets), name=APP, route_prefix="/")
    serve.run_many([target], wait_for_applications_running=False)


def _remove() -> None:
    with suppress(Exception):  # a cluster that is gone has nothing to remove
        serve.delete(APP)


def wait_until_ready(config: ServiceConfig, url: str) -> None:
    """Raises `ItemvecError` once Serve says that the application failed, with its reason, or if it takes too long."""
    deadline = time.monotonic() + config.start_seconds
    look = 0.0
    while not _is_up(f"{url}/readyz"):
        time.sleep(0.05)
        if time.monotonic() < look:
            continue
        look = time.monotonic() + 0.5
        status = serve.status().applications.get(APP)
        if status is not None and status.status.value in {"DEPLOY_FAILED", "UNHEALTHY"}:
            why = [deployment.message for deployment in status.deployments.values() if deployment.message]
            raise ItemvecError(f"the service did not start: {_last_line(why[0] if why else status.message)}")
        if time.monotonic() > deadline:
            raise ItemvecError(f"the service was not ready within {config.start_seconds:g} s")


def _is_up(url: str) -> bool:
    """Whether it is ready, or would be if somebody loaded the items that it waits for."""
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:  # noqa: S310 our own http://
            return bool(answer.status == 200)
    except urllib.error.HTTPError as refused:
        return b'"store":"loading"' in refused.read()
    except (urllib.error.URLError, OSError):
        return False


def _url(config: ServiceConfig) -> str:
    everywhere = {"0.0.0.0", "::"}  # noqa: S104 only compared
    host = "127.0.0.1" if config.host in everywhere else config.host
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _reason(text: str, config: ServiceConfig) -> str:
    if "cannot bind socket" in text:  # it was free when the service looked
        return f"port {config.port} was taken meanwhile, perhaps by a process of Ray's; choose another with --port"
    return _last_line(text)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^(itemvec|service)[.\w]*: ", "", lines[-1]) if lines else "no reason was given"
