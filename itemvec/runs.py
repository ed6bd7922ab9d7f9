"""What each retraining did: run records beside the model's versions, and the lease that lets one run at a time.

    ROOT/movies/runs/20261123-031700-000000-4f2a.json    a record, written anew at every step
    ROOT/movies/lease/7.json                      who may retrain the model; 7 is the token

A token is got by creating its file, which only one process can, so this holds for every kind of root and over machines.
Who has a later token makes the earlier ones stale: a run that stood still for so long that another took over finds out
before it writes, and ends (fencing).
"""

import contextlib
import json
import logging
import os
import re
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from itemvec.errors import ItemvecError, RegistryError, RunNotFound, RunUnreadable
from itemvec.processes import is_alive
from itemvec.registry import Registry
from itemvec.roots import Root

log = logging.getLogger("itemvec")

LEASE_SECONDS = 60.0
"""A holder on another machine that was not heard of for so long is taken for dead; one of this machine at once."""

KEPT = 100
"""Records of a model; older ones are removed."""

NOT_NOW = (OSError, RegistryError)
"""What a registry that does not answer raises: the next beat of the lease may find it well again."""

RUNS, LEASE = "runs", "lease"
_ID = re.compile(r"[0-9]{8}-[0-9]{6}-[0-9]{6}-[0-9a-f]{4}")

StepName = Literal[
    "read", "drift", "check", "train", "gate", "publish", "load", "backfill", "shadow", "promote", "clean up"
]  # fmt: skip
RunState = Literal["running", "promoted", "skipped", "refused", "failed", "interrupted"]


class Step(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: StepName
    state: Literal["running", "done", "failed"] = "running"
    started_at: datetime
    seconds: float | None = Field(default=None, description="null while it runs, or where it was cut short")
    said: str = Field(default="", description="What it came to, or why it failed")
    figures: dict[str, Any] = Field(default={}, description="What it measured or counted")


class Run(BaseModel):
    """One retraining, whatever it came to."""

    model_config = ConfigDict(extra="forbid")

    id: str = Field(examples=["20261123-031700-000000-4f2a"])
    model: str = Field(description="The model's name", examples=["movies"])
    state: RunState = Field(
        description="`skipped`: there was nothing to do; `refused`: a check of the gate or of the shadow comparison "
        "failed; `interrupted`: its process is gone, and the next run of the same table and settings goes on with it"
    )
    reason: str = Field(default="", description="Why it ended as it did")
    table: str
    inputs: str = Field(default="", description="Digest of the table, the schema, the settings and the champion")
    champion: int | None = Field(description="The version that was served when it began")
    version: int | None = Field(default=None, description="The version that it published")
    started_at: datetime
    updated_at: datetime
    tries: int = Field(default=1, description="How often it was taken up again, and one")
    by: str = Field(description="Host and process that had it last", examples=["trainer-1:4711"])
    token: int
    checks: list[dict[str, Any]] = Field(default=[], description="Of the gate: name, new, champion, limit, passed")
    steps: list[Step] = []

    def done(self, name: StepName) -> Step | None:
        """The step, if it was done."""
        return next((step for step in self.steps if step.name == name and step.state == "done"), None)


class Runs:
    """The run records of a registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry, self._root = registry, registry.root

    def of(self, name: str, most: int = KEPT) -> list[Run]:
        """Of one model, the newest first. One that cannot be read is told in the log and left out."""
        found = []
        for file in sorted(self._root.files(name, RUNS), reverse=True)[:most]:
            try:
                found.append(self._read(name, file))
            except RunUnreadable as error:
                log.warning("%s", error)
        return [run for run in found if run is not None]

    def newest(self, most: int = 50) -> list[Run]:
        """Of all models, the newest first."""
        every = [run for name in self._registry.names() for run in self.of(name, most)]
        return sorted(every, key=lambda run: run.id, reverse=True)[:most]

    def get(self, run_id: str) -> Run:
        """Raises RunNotFound."""
        for name in self._registry.names() if _ID.fullmatch(run_id) else []:
            if (run := self._read(name, f"{run_id}.json")) is not None:
                return run
        raise RunNotFound(run_id)

    def save(self, run: Run) -> None:
        run.updated_at = datetime.now(UTC)
        self._root.replace(run.model, f"{RUNS}/{run.id}.json", run.model_dump_json(indent=1).encode())

    def drop(self, run: Run) -> None:
        self._root.delete(run.model, f"{RUNS}/{run.id}.json")

    def forget(self, name: str) -> None:
        """Removes all but the newest records."""
        for file in sorted(self._root.files(name, RUNS), reverse=True)[KEPT:]:
            self._root.delete(name, f"{RUNS}/{file}")

    def _read(self, name: str, file: str) -> Run | None:
        content = self._root.read(name, f"{RUNS}/{file}")
        if content is None:
            return None
        try:
            run = Run.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise RunUnreadable(f"{name}/{RUNS}/{file}", f"{where} {first['msg']}") from None
        if run.state == "running" and _holder(self._root, name) != run.token:
            run.state, run.reason = "interrupted", "its process is gone; the next retraining goes on with it"
        return run


def new_run_id() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{secrets.token_hex(2)}"


class LeaseTaken(ItemvecError):
    def __init__(self, name: str, by: str) -> None:
        super().__init__(f"{name} is being retrained ({by}); wait until it is done")


class LeaseLost(ItemvecError):
    def __init__(self, name: str, token: int) -> None:
        super().__init__(
            f"another process took over the retraining of {name}, since this one (token {token}) was not heard of for "
            f"{LEASE_SECONDS:.0f} s; it stops, and `itemvec runs list` shows the other"
        )


class Lease:
    """The right to retrain a model, within the block:

    with Lease(registry, "movies") as lease: ...
    """

    def __init__(self, registry: Registry, name: str) -> None:
        self._root, self._name, self.token = registry.root, name, 0
        self.by = f"{socket.gethostname()}:{os.getpid()}"
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name=f"lease of {name}", daemon=True)

    def __enter__(self) -> Self:
        """Raises LeaseTaken where another process has it."""
        self._take()
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(LeaseLost, *NOT_NOW):  # if it cannot be given back now, it runs out
            self.check()
            self._write(0.0)

    def check(self) -> None:
        """To be called before every write. Raises LeaseLost where another process holds a later token."""
        if _last(self._root, self._name) != self.token:
            raise LeaseLost(self._name, self.token)

    def _take(self) -> None:
        root, name = self._root, self._name
        last = _last(root, name)
        if last and _holder(root, name) == last:
            raise LeaseTaken(name, f"by {_claim(root, name, last)['by']}")
        self.token = last + 1
        if not root.create(name, _file(self.token), self._said(LEASE_SECONDS)):
            raise LeaseTaken(name, "another process was first")
        try:
            self.check()  # it may be that others came and went since the last one was read
        except LeaseLost:
            root.delete(name, _file(self.token))
            raise LeaseTaken(name, "another process was first") from None
        for file in root.files(name, LEASE):
            if int(Path(file).stem) < self.token:
                root.delete(name, f"{LEASE}/{file}")

    def _beat(self) -> None:
        while not self._ended.wait(LEASE_SECONDS / 6):
            with contextlib.suppress(*NOT_NOW):
                if _last(self._root, self._name) != self.token:
                    return
                self._write(LEASE_SECONDS)

    def _write(self, seconds: float) -> None:
        self._root.replace(self._name, _file(self.token), self._said(seconds))

    def _said(self, seconds: float) -> bytes:
        until = time.time() + seconds if seconds else 0.0
        return json.dumps({"by": self.by, "place": _place(), "pid": os.getpid(), "until": until}).encode()


def _holder(root: Root, name: str) -> int | None:
    """The token of a holder that is alive."""
    claim = _claim(root, name, last := _last(root, name))
    if claim.get("until", 0.0) < time.time():
        return None
    if claim["place"] == _place() and not is_alive(claim["pid"]):
        return None
    return last


def _last(root: Root, name: str) -> int:
    """0 where there was none yet."""
    return max((int(Path(file).stem) for file in root.files(name, LEASE)), default=0)


def _claim(root: Root, name: str, token: int) -> dict[str, Any]:
    content = root.read(name, _file(token))
    claim: dict[str, Any] = json.loads(content) if content else {}
    return claim


def _file(token: int) -> str:
    return f"{LEASE}/{token}.json"


def _place() -> str:
    """Where process ids mean the same: this machine, and on Linux this container."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
