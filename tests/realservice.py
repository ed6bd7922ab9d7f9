"""`itemvec serve` as a user starts it: real Ray Serve, HAProxy and Redis, in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import httpx

from benchmarks._services import free_port


class RealService:
    """Started from a script, as it were: in its own session, and with Ctrl-C ignored until it says otherwise."""

    def __init__(self, folder: Path, registry: Path, **options: object) -> None:
        self.port = free_port()
        self.log = folder / "serve.log"
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        command = [
            *(sys.executable, "-m", "itemvec", "serve", f"--port={self.port}"),
            *(f"--data-dir={folder / 'data'}", f"--registry={registry}", *words),
        ]
        environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=10.0)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        eventually(ready, 90.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self.client.close()
        self.signal_group(signal.SIGINT)
        try:
            self.process.wait(30.0)
        except subprocess.TimeoutExpired:
            self.signal_group(signal.SIGKILL)
            self.process.wait()
            raise

    def interrupt(self) -> None:
        """Ctrl-C, which the command and all its children get at once: nothing is left behind."""
        self.signal_group(signal.SIGINT)
        assert self.process.wait(15) == 0
        eventually(lambda: not self.processes(), 5)
        said = self.log.read_text()
        assert "stopped" in said
        assert "Traceback" not in said

    def signal_group(self, number: int) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def processes(self) -> dict[int, str]:
        """Everything it runs, by pid. Redis has a session of its own, and is found by who started it."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state, parent, _, session = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:4]
                title = (folder / "cmdline").read_text().replace("\0", " ").strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
            ours = int(session) == self.process.pid or int(parent) == self.process.pid
            if ours and state != "Z" and title:  # without one it is ending
                found[int(folder.name)] = title
        return found

    def replicas(self) -> list[int]:
        """Those that have started; the title of one that is starting ends with what it is doing."""
        titles = self.processes().items()
        return [
            pid
            for pid, title in titles
            if title.startswith("ray::ServeReplica") and not title.endswith("initialize_and_get_metadata")
        ]

    def asked(self) -> set[str]:
        """The sockets of the replicas that HAProxy sends requests to."""
        lines = [title.split() for title in self.processes().values() if "/haproxy" in title]
        configs = {words[words.index("-f") + 1] for words in lines if "-f" in words}
        return {word for config in configs for word in Path(config).read_text().split() if word.startswith("unix@")}

    def metric(self, series: str) -> float:
        answer = self.client.get("/metrics")
        assert answer.status_code == 200, answer.text
        lines = [line for line in answer.text.splitlines() if line.startswith(series + " ")]
        return float(lines[0].split()[-1]) if lines else 0.0


def eventually(is_so: Callable[[], Any], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)
