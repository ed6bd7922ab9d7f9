"""A real Redis Cluster of three nodes without replicas, from the binary of the embedded server."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import redis

from benchmarks._services import free_port
from service.redis_server import find_binaries

SLOTS = 16384


@contextlib.contextmanager
def three_nodes(folder: Path) -> Iterator[list["subprocess.Popen[bytes]"]]:
    """Their processes; `url(process)` is where one listens."""
    with contextlib.ExitStack() as stack:
        nodes = []
        ports = []
        for number in range(3):
            home = folder / str(number)
            home.mkdir()
            port, bus = free_port(), free_port()
            settings = {
                "port": port, "cluster-port": bus, "bind": "127.0.0.1", "cluster-enabled": "yes", "save": "",
                "cluster-node-timeout": 2000, "dir": home,
            }  # fmt: skip
            words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
            node = subprocess.Popen([find_binaries()[0], *words], stdout=subprocess.DEVNULL)
            stack.callback(node.wait)
            stack.callback(node.kill)
            nodes.append(node)
            ports.append((port, bus))
        clients = [stack.enter_context(redis.Redis(port=port)) for port, _ in ports]
        for client in clients:
            _eventually(lambda client=client: client.ping())  # type: ignore[misc]
        for number, client in enumerate(clients):
            first, last = SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "MEET", "127.0.0.1", *ports[0])
        for client in clients:
            _eventually(lambda client=client: _is_whole(client))  # type: ignore[misc]
        for node, (port, _) in zip(nodes, ports, strict=True):
            _URLS[node.pid] = f"redis://127.0.0.1:{port}"
        yield nodes


_URLS: dict[int, str] = {}


def url(node: "subprocess.Popen[bytes]") -> str:
    return _URLS[node.pid]


def _is_whole(client: redis.Redis) -> bool:
    """As this node sees it."""
    covered = sum(last - first + 1 for first, last, *_ in client.execute_command("CLUSTER", "SLOTS"))
    return covered == SLOTS and "cluster_state:ok" in client.execute_command("CLUSTER", "INFO").decode()


def _eventually(true: Callable[[], Any], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(redis.ConnectionError):
            if true():
                return
        assert time.monotonic() < end, "the cluster did not come up"
        time.sleep(0.02)
