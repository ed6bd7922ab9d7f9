"""Ray around the training loop: a cluster of our own or one that is there, enough room in it, and what went wrong.

The workers open the run's folder, so on several machines it has to lie on storage that they share. Nothing large goes
through Ray: the workers map the encoded table, and the driver reads their progress from a file in the same folder.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from itemvec.errors import ConfigError, ItemvecError
from itemvec.signals import handlers_kept
from training.config import ClusterConfig, TrainConfig

Told = Callable[[dict[str, Any]], None]

OBJECT_STORE_BYTES = 80 << 20
"""The least that Ray takes: the table does not pass through it."""

PREFIX = "itemvec-train-"
ABANDONED_SECONDS = 60.0
POLL_SECONDS = 0.1
REACH_SECONDS = 10.0
ROUNDING = 1e-6
COLLECTIVE_SECONDS = 120
ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 s by default, and a run ends only at a check
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the default will change to this; without it every worker warns
}
OWN = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process that asks whether the cloud takes a node back
    "RAY_prestart_worker_first_driver": "0",  # processes for tasks that may never come: those that do come start them
}
"""Of a cluster of our own, whose cores are better spent on the run itself."""


class TrainingFailed(ItemvecError):
    """A worker or the cluster gave up."""


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """To the cluster at `cluster.address`, or to one of our own that ends with the block. One that this process is
    already connected to is used as it is. Raises ConfigError where there is none at the address."""
    with environment(ENVIRONMENT):
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            yield
        elif cluster.address is None:
            with own_cluster():
                yield
        else:
            require_reachable(cluster.address)
            with _ray(address=cluster.address):
                yield


def require_reachable(address: str) -> None:
    """Raises ConfigError where nobody listens at `host:port`: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host.rpartition("/")[2].strip("[]"), int(port)), REACH_SECONDS).close()
        except OSError as error:
            raise ConfigError(f"Ray is not at {address!r}: {error.strerror or error}") from None


@contextmanager
def own_cluster(num_cpus: int | None = None) -> Iterator[None]:
    """A Ray of this machine and for this process, with as many CPUs as there are."""
    with _folder() as folder:
        settings = ENVIRONMENT | OWN
        if "ray" not in sys.modules:  # once imported, it has read which token to use: its own, in the user's home
            token = folder / "token"  # Ray runs code for whoever reaches its ports
            token.touch(mode=0o600)
            token.write_text(secrets.token_hex(32))
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        with (
            environment(settings),
            _ray(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder / "ray"),
            ),
        ):
            yield


@contextmanager
def _folder() -> Iterator[Path]:
    """For Ray's own files: for this user alone, and short, or the paths of its sockets get too long. Those that killed
    processes left behind are removed too."""
    for left in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED_SECONDS:
                with (left / "lock").open("a") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(left, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _ray(**options: Any) -> Iterator[None]:
    import ray  # noqa: PLC0415

    try:
        with handlers_kept():
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR, namespace="itemvec")
    except (ConnectionError, ValueError, RuntimeError) as error:
        where = "did not start" if options["address"] == "local" else f"is not at {options['address']!r}"
        token = "" if "RAY_AUTH_MODE" in os.environ else "; if that cluster asks for a token, set RAY_AUTH_MODE=token"
        raise ConfigError(f"Ray {where}: {_one_line(error)}{token}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets what the user has not set, for the processes that start within the block."""
    added = [name for name in settings if name not in os.environ]
    os.environ.update({name: settings[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def fit(folder: Path, config: TrainConfig, cluster: ClusterConfig, told: Told = lambda _: None) -> dict[str, Any]:
    """Trains on the table prepared in `folder`; within `connected`. Returns the loop's last state (`Trainer.state`).

    Takes up the last checkpoint of the folder if there is one. `told` hears every step and epoch as it is done.
    Raises ConfigError where the cluster cannot hold the workers, TrainingFailed where they fail.
    """
    import torch  # noqa: PLC0415
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig  # noqa: PLC0415
    from ray.train.torch import TorchConfig  # noqa: PLC0415

    from training import loop  # noqa: PLC0415
    from training.trainer import LeanTrainer  # noqa: PLC0415

    resources = _room(cluster)
    trainer = LeanTrainer(
        loop.work,
        train_loop_config={"folder": str(folder), "config": config.model_dump(mode="json")},
        scaling_config=ScalingConfig(
            num_workers=cluster.workers, use_gpu="GPU" in resources, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(folder),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
        torch_config=TorchConfig(backend="nccl" if "GPU" in resources else "gloo", timeout_s=COLLECTIVE_SECONDS),
    )
    checkpoint = _followed(trainer.fit, folder / loop.PROGRESS, told, folder / "error.log").checkpoint
    if checkpoint is None:
        raise TrainingFailed("training ended without a checkpoint")
    with checkpoint.as_directory() as place:
        state: dict[str, Any] = torch.load(Path(place) / loop.CHECKPOINT, map_location="cpu", weights_only=True)
    return state


def _followed(fit: Callable[[], Any], progress: Path, told: Told, log: Path) -> Any:
    """Runs `fit` in a thread, so that this one can tell what the workers say, and so that Ctrl-C reaches us and not
    Ray."""
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(fit())
        except BaseException as error:
            failure.append(error)

    read = progress.stat().st_size if progress.exists() else 0
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    while True:
        alive = thread.is_alive()
        read = _tell_new(progress, read, told)
        if not alive:
            break
        thread.join(POLL_SECONDS)
    if failure:
        log.write_text("".join(traceback.format_exception(failure[0])), encoding="utf-8")
        raise TrainingFailed(f"training failed: {_reason(failure[0])} (all of it: {log})") from None
    return outcome[0]


def _tell_new(progress: Path, read: int, told: Told) -> int:
    """Tells the lines that were added after byte `read`, and returns where they end."""
    if not progress.exists():
        return read
    with progress.open("rb") as file:
        file.seek(read)
        for line in file:
            if not line.endswith(b"\n"):
                break  # half written
            read += len(line)
            told(json.loads(line))
    return read


def _room(cluster: ClusterConfig) -> dict[str, float]:
    """The resources of a worker, once they are free for all of them. Raises ConfigError where they can never be, or are
    still not after `start_seconds`: Ray Train would wait without a word."""
    import ray  # noqa: PLC0415

    each = resources_per_worker(cluster, alive_nodes())
    wanted = {name: amount * cluster.workers for name, amount in each.items()}
    deadline = time.monotonic() + cluster.start_seconds
    while True:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        if all(free.get(name, 0.0) + ROUNDING >= amount for name, amount in wanted.items()):
            return each
        if time.monotonic() > deadline:
            raise ConfigError(
                f"the cluster is busy: of the {_listed(wanted)} that the workers want, {_listed(free, each)} "
                f"are free after {cluster.start_seconds:g} s"
            )
        time.sleep(0.2)


def alive_nodes() -> list[dict[str, float]]:
    """What each node of the cluster has."""
    import ray  # noqa: PLC0415

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]


def resources_per_worker(cluster: ClusterConfig, nodes: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """CPUs, and a GPU where there is one for each worker. Raises ConfigError where the nodes cannot hold the workers.

    >>> resources_per_worker(ClusterConfig(workers=2), [{"CPU": 4.0, "GPU": 2.0}])
    {'CPU': 1.0, 'GPU': 1.0}
    """
    plain = {"CPU": cluster.cpus_per_worker}
    with_gpu = {**plain, "GPU": 1.0}
    gpu = cluster.device == "gpu" or (cluster.device == "auto" and held(nodes, with_gpu) >= cluster.workers)
    wanted = with_gpu if gpu else plain
    possible = held(nodes, wanted)
    if possible < cluster.workers:
        total = {name: sum(node.get(name, 0.0) for node in nodes) for name in wanted}
        raise ConfigError(
            f"the cluster has {_listed(total)} and holds {possible} of {cluster.workers} workers with "
            f"{_listed(wanted)} each: take fewer --workers, fewer --cpus-per-worker or a larger cluster"
        )
    return wanted


def held(nodes: Sequence[Mapping[str, float]], each: Mapping[str, float]) -> int:
    """How many workers the nodes hold; one cannot be split over two of them."""
    return sum(int(min(node.get(name, 0.0) / amount + ROUNDING for name, amount in each.items())) for node in nodes)


def _listed(amounts: Mapping[str, float], names: Iterable[str] | None = None) -> str:
    return ", ".join(f"{amounts.get(name, 0.0):g} {name}" for name in names or amounts)


def _reason(error: BaseException) -> str:
    """The first worker's error without Ray's wrapping."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, first = min(failures.items())
        cause = getattr(first, "cause", None) or first
        return f"worker {rank}: {type(cause).__name__}: {_one_line(cause)}"
    return _one_line(getattr(error, "controller_failure", None) or error)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
