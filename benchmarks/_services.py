"""Servers under measurement: processes that start, answer, and are gone afterwards."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

START_SECONDS = 120.0


def free_port() -> int:
    """Below those that the system gives out itself: one of Ray's many processes could take it in the meantime."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("none of 100 ports is free")


@contextmanager
def started(
    command: Sequence[str], url: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """The process, once `url` answers 200, or 405 since it takes no GET.

    Raises RuntimeError with the end of its log if it does not.
    """
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )  # fmt: skip
    try:
        _wait(process, url, log)
        yield process
    finally:
        stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx.HTTPError):
            if httpx.get(url, timeout=2.0).status_code in {200, 405}:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{log.stem} did not start: {log.read_text(errors='replace')[-2000:]}")


def halt(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started stand still until `go_on`: idle servers take their share of the cores too."""
    _signal(process, signal.SIGSTOP)


def go_on(process: subprocess.Popen[bytes]) -> None:
    _signal(process, signal.SIGCONT)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    for pid in _session(process):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _session(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """The ids of the processes in the session that it leads."""
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            if int((folder / "stat").read_text().rsplit(")", 1)[1].split()[3]) == process.pid:
                yield int(folder.name)


def stop(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started: they share its session."""
    go_on(process)
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20.0)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def itemvec(
    name: str, data: Path, registry: str, environment: Mapping[str, str] | None = None, **options: object
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """`itemvec serve`: its port and its process."""
    data.mkdir(parents=True, exist_ok=True)
    port = free_port()
    words = [f"--{option.replace('_', '-')}={value}" for option, value in options.items()]
    command = [
        sys.executable,
        "-m",
        "itemvec",
        "serve",
        f"--port={port}",
        f"--data-dir={data}",
        f"--registry={registry}",
    ]
    url = f"http://127.0.0.1:{port}/readyz"
    with started([*command, *words], url, data / f"{name}.log", environment) as process:
        yield port, process


@contextmanager
def peer(
    name: str, python: str, version: Path, folder: Path, encoder: str, workers: int = 1
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """One of `benchmarks.peers` with an encoder of `benchmarks.peers.films.Encoder` in each of its `workers`
    processes, run by the interpreter `python`: its port and its process."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    # A home of its own, where BentoML and LitServe leave files; nothing is told to anybody.
    environment = {
        "PYTHONPATH": paths, "HOME": str(folder), "ENCODER": encoder, "WORKERS": str(workers),
        "BENTOML_DO_NOT_TRACK": "True", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    command = [python, "-m", f"benchmarks.peers.{name}", str(port), str(version)]
    with started(command, f"http://127.0.0.1:{port}/embed", folder / f"{name}.log", environment) as process:
        yield port, process


def memory_of(process: subprocess.Popen[bytes], title: str) -> list[float]:
    """MB of each process in its session whose title begins so."""
    found = []
    for folder in (Path(f"/proc/{pid}") for pid in _session(process)):
        with suppress(OSError, StopIteration):
            if (folder / "cmdline").read_text().startswith(title):
                lines = (folder / "smaps_rollup").read_text().splitlines()
                found.append(next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024)
    return found
