"""The settings of the service: `ServiceConfig`, from arguments, `ITEMVEC_*` variables and `REDIS_URL`.

Whoever starts the service reads them once, with `ServiceConfig.read`, and hands them to every part of it.
"""

import ipaddress
import os
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import (
    AliasChoices,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from itemvec.errors import ConfigError

SCOPES: Final = frozenset({"read", "write", "admin"})
MIN_KEY_LENGTH: Final = 16
UNASKED_REPLICAS: Final = 4
"""As many at most where nobody says how many: whoever runs a large machine for this alone can say so."""

READ_ELSEWHERE: Final = frozenset({"ITEMVEC_KEY", "ITEMVEC_URL", "ITEMVEC_TRACEBACK"})
"""Variables of the commands, which are no settings of the service."""

NO_CHAMPION: Final = (
    "the registry {} has no champion to serve: run itemvec train, or name one with itemvec models promote"
)


class ServiceConfig(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="ITEMVEC_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        protected_namespaces=(),
    )

    # Where it is reached

    host: str = "127.0.0.1"
    """Beyond this machine only with keys: whoever reaches the port may read and write every item."""

    port: int = Field(default=8000, ge=1, le=65535)

    api_keys_file: Path | None = None
    """A line a key: the key, then what it may do, `s3cr3t-0123456789 read,write`. None: open, on loopback
    alone. A file, because a process's environment is seen by more eyes."""

    direct_port: int | None = Field(default=None, ge=1, le=65535)
    """A second port, on which replicas listen without HAProxy in front: some 0.2 ms less for a caller, but no second
    try when a replica dies, and a connection stays with one replica."""

    # What it serves

    data_dir: Path = Path(".itemvec")
    """The embedded Redis keeps its data here, so a restart loses nothing."""

    registry: str = Field(default_factory=lambda settings: str(settings["data_dir"] / "registry"))
    """A folder or an fsspec URL; by default `registry` in the data folder."""

    model: str | None = None
    """The model that a request means which names none; None: the only one in the registry."""

    versions_kept: PositiveInt = 4
    """Pinned versions that a replica holds besides the champion; the films' takes 18 MB, and up to 64 MB more for what
    is worked out of it beforehand. Without a bound: what a version takes depends on its model, and only those that a
    request has named are loaded."""

    registry_poll_seconds: PositiveFloat = 2.0
    """A replica that missed a switch, since it was starting, is behind for this long at most."""

    ready_items: NonNegativeInt = 0
    """`/readyz` is 503 until the store has held so many items, so that no traffic comes to an empty catalogue."""

    # The store

    redis_url: str | None = Field(
        default=None,
        validation_alias=AliasChoices("redis_url", "ITEMVEC_REDIS_URL"),
        repr=False,  # it may hold a password
    )
    """unix://PATH, redis:// or rediss://. None: an embedded server is started. Also read from REDIS_URL."""

    redis_maxmemory: str | None = None
    """Of the embedded server, as Redis writes it, "2gb". Beyond it writes are refused, nothing is dropped."""

    store_timeout: PositiveFloat = 0.12
    """Seconds of one call in the path of a request. Short, since encoding goes on without the store and a caller would
    rather have that at once."""

    bulk_timeout: PositiveFloat = 10.0
    """Seconds of one call that moves many items."""

    index: Literal["auto", "flat", "hnsw", "exact"] = "auto"
    """How neighbors are found. auto: flat below 50,000 items and hnsw above; exact where Redis has no query engine."""

    cache: Literal["off", "local", "redis"] = "local"
    """Where results of the encoder are kept. A look in Redis costs more than a small network on the spot; it pays for
    large ones, and where replicas see the same items."""

    cache_items: PositiveInt = 10_000
    """Items that each replica keeps in memory; one of 64 numbers takes 1 kB."""

    # What one request may ask for: each limit bounds the memory or time that one caller takes from others.

    max_body_bytes: PositiveInt = 8 << 20
    """Room for `max_items` items of 2 kB."""

    max_items: PositiveInt = 4096
    """Bounds what one request computes before others get their turn."""

    max_labels: PositiveInt = 4096
    """Labels in one set. Real items have tens."""

    max_string: PositiveInt = 65_536
    """Characters in one value."""

    max_rows: PositiveInt = 65_536
    """Items of one Arrow stream."""

    max_k: PositiveInt = 1000
    max_exclude: PositiveInt = 1000

    max_queries: PositiveInt = 100
    """Queries of one search, embeddings of one decoding."""

    max_examples: PositiveInt = 100
    """Positive examples of one query, and as many negative ones."""

    max_filter: PositiveInt = 1000
    """Conditions and values of one filter, counted together."""

    max_in_flight: PositiveInt = 256
    """Requests that one replica takes on at once; the next is answered 429."""

    # Its processes

    replicas: PositiveInt | None = None
    """Processes that answer; more than cores gains nothing, and each takes 450 MB. None: one for each core that the
    service may use, up to four; on a cluster, 1."""

    torch_threads: PositiveInt = 1
    """In a replica. The network is small: a second thread costs more in hand-over than it computes."""

    encode_threads: PositiveInt | None = None
    """Requests of many items that a replica encodes at the same time. Half of that work needs no Python: where it has a
    second core a second thread pays, and where it has one it costs (docs/service.md). None: 2 if the machine has two
    cores for each of all replicas, otherwise 1; on a cluster of several machines, say it."""

    replica_cpus: float = Field(default=1.0, ge=0)
    """What Ray reserves for a replica on a cluster that others use too."""

    ray_address: str | None = None
    """A running Ray cluster to join, whose nodes have the environment that `deploy/` gives them. None: Ray
    starts on this machine, and ends with the service."""

    metrics_dir: Path | None = None
    """Where the replicas of a node keep their counters, on that node; None: a new temporary folder."""

    start_seconds: PositiveFloat = 120.0
    """How long it may take until it is ready: a slow disk reads Python's packages for a minute at first."""

    drain_seconds: float = Field(default=0.5, ge=0)
    """A replica that is to end answers for this long after that was announced, so that no request meets a
    closed port."""

    stop_seconds: PositiveFloat = 5.0
    """What requests in flight get to finish when the service is stopped."""

    @classmethod
    def read(cls, **given: Any) -> Self:
        """Settings that are None in `given` come from the environment. Raises `ConfigError`, in one line."""
        try:
            return cls(**{name: value for name, value in given.items() if value is not None})
        except ValidationError as error:
            wrong = [e for e in error.errors(include_url=False) if e["type"] != "default_factory_not_called"]
            raise ConfigError("; ".join(map(_told, wrong))) from None
        except SettingsError as error:
            raise ConfigError(str(error)) from None

    @field_validator("data_dir", "api_keys_file", "metrics_dir")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Ray's processes have their own working folder.
        return path.expanduser().absolute() if path is not None else None

    @field_validator("redis_maxmemory")
    @classmethod
    def _memory(cls, size: str | None) -> str | None:
        if size is not None and not re.fullmatch(r"[0-9]+([kmg]?b|[kmg])?", size.lower()):
            raise ValueError("expected bytes, or a number with k, kb, m, mb, g or gb: 2gb")
        return size

    @field_validator("registry")
    @classmethod
    def _absolute_folder(cls, registry: str) -> str:
        return registry if "://" in registry else str(Path(registry).expanduser().absolute())

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.api_keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is reached from other machines, and there are no keys: "
                "name a file of keys (ITEMVEC_API_KEYS_FILE) or stay on 127.0.0.1"
            )
        if self.ray_address is not None and self.redis_url is None:
            raise ValueError("on a Ray cluster every node needs the same Redis: set REDIS_URL")
        self.read_keys()
        return self

    def number_of_replicas(self) -> int:
        """Those of all machines."""
        return self.replicas or (min(cores(), UNASKED_REPLICAS) if self.ray_address is None else 1)

    def threads_of_a_replica(self) -> int:
        """Those that encode, on this machine."""
        return self.encode_threads or max(1, min(2, cores() // self.number_of_replicas()))

    def read_keys(self) -> dict[str, frozenset[str]]:
        """Key -> scopes; empty where everything is open. Raises ValueError if the file is no such file."""
        if self.api_keys_file is None:
            return {}
        try:
            lines = self.api_keys_file.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"the file of keys {self.api_keys_file} cannot be read: {error}") from None
        keys = {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            where = f"{self.api_keys_file}, line {number}"
            key, _, scopes = line.strip().partition(" ")
            keys[key] = frozenset(scope.strip() for scope in scopes.split(","))
            # The key itself is never told: this ends in a log.
            if len(key) < MIN_KEY_LENGTH:
                raise ValueError(f"{where}: a key has at least {MIN_KEY_LENGTH} characters")
            if not keys[key] <= SCOPES:
                raise ValueError(f"{where}: after the key come its scopes, such as read,write or admin")
        if not keys:
            raise ValueError(f"the file of keys {self.api_keys_file} has none")
        return keys


def misspelt(variables: Iterable[str]) -> dict[str, str]:
    """Of variables that look like ours and that nobody reads, those close to a setting, with the setting's name.

    Others are not ours to judge: Kubernetes itself sets ITEMVEC_SERVICE_HOST where a service is called itemvec.

    >>> misspelt(["ITEMVEC_MAX_INFLIGHT", "ITEMVEC_PORT", "ITEMVEC_SERVICE_HOST"])
    {'ITEMVEC_MAX_INFLIGHT': 'ITEMVEC_MAX_IN_FLIGHT'}
    """
    prefix, names = "ITEMVEC_", [name.upper() for name in ServiceConfig.model_fields]
    read = READ_ELSEWHERE.union(prefix + name for name in names)
    unread = [one.removeprefix(prefix) for one in variables if one.startswith(prefix) and one not in read]
    likely = {name: get_close_matches(name, names, 1, 0.75) for name in unread}
    return {prefix + name: prefix + close[0] for name, close in likely.items() if close}


def cores(control_groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int:
    """Those that this process may use whole: by its affinity, and by the processor time that its control group
    (version 2, as containers and systemd set it) and those around it are allowed; at least one."""
    found = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    with suppress(OSError, StopIteration):
        own = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
        innermost = control_groups / own.strip("/")
        for group in (innermost, *innermost.parents):
            if group.is_relative_to(control_groups) and (group / "cpu.max").exists():
                quota, period = (group / "cpu.max").read_text().split()
                if quota != "max":
                    found = min(found, int(quota) / int(period))
    return max(1, int(found))


def is_loopback(host: str) -> bool:
    """
    >>> [is_loopback(h) for h in ("localhost", "127.0.0.1", "::1", "0.0.0.0", "example.org")]
    [True, True, True, False, False]
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _told(error: Any) -> str:
    where = ".".join(map(str, error["loc"]))
    said = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"there is no setting {where!r}"
    return f"{where}={error['input']!r}: {said}" if where else said
