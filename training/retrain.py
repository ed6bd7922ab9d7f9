"""`itemvec retrain`: train again, compare with the champion on the same held-out rows, and switch only if it is no
worse.

    read -> nothing new? stop -> check -> train -> gate -> publish as challenger
         -> load: new and changed rows of the table into the service -> backfill: the challenger's own index
         -> shadow: both answer the same searches -> promote: one switch -> clean up: versions that are too old

Whatever fails leaves the champion serving. Every step is written into a run record beside the registry
(`itemvec/runs.py`). A run that was killed is taken up where it was by the next one of the same inputs: training at its
last checkpoint, everything after it at the step. One run of a model at a time, over all machines with this registry.
"""

import contextlib
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import pyarrow as pa
from pydantic import PositiveFloat, PositiveInt

from itemvec.client import Client
from itemvec.errors import ConfigError, ItemvecError, TableError
from itemvec.registry import CHALLENGER, CHAMPION, Registry
from itemvec.runs import Lease, LeaseLost, Run, Runs, RunState, Step, StepName, new_run_id
from itemvec.schema import FeatureSchema
from itemvec.table import table_digest
from itemvec.version import read_manifest
from training.config import ClusterConfig, Settings, TrainConfig
from training.drift import drift, profile
from training.folds import some
from training.gate import Check, GateConfig, GateRefused, before, compare
from training.items import forget, taken
from training.ledger import load_changed
from training.progress import Display
from training.run import Job, locked, read_items, train
from training.shadow import ShadowConfig, compare_answers

UNFINISHED = {"interrupted", "failed"}

REFUSED = "refused"
"""The file in a run's folder that names the model whose gate refused what it trained."""


class RetrainConfig(Settings):
    """All that a retraining needs to know, so that a schedule names one file. The command line goes over it."""

    table: str | None = None
    """A path or URL; of several that match a `*` the last in the alphabet: `items-*.parquet` for dated exports."""

    interactions: str | None = None
    """The same for the table of who liked what.  [default: that of the champion]"""

    schema_file: Path | None = None
    """What the columns are.  [default: as the champion has them]"""

    name: str | None = None
    """The model's name.  [default: the schema's, or the registry's only one]"""

    registry: str | None = None
    runs: Path | None = None
    """Where a run keeps its files until it is published.  [default: beside the registry]"""

    train: dict[str, Any] | None = None
    """Settings of the training, as `itemvec train --config` takes them. Without it they are the champion's."""

    cluster: ClusterConfig = ClusterConfig()

    gate: GateConfig = GateConfig()

    url: str | None = None
    """The service that is to switch; without it only the registry's champion moves, and the service follows."""

    key_file: Path | None = None
    """A file with its bearer key."""

    items: Literal["changed", "sync", "none"] = "changed"
    """Which rows of the table the service is given: those that are new or changed since the last retraining; with
    `sync` items whose rows are gone are deleted too."""

    shadow: ShadowConfig = ShadowConfig()

    when: Literal["changed", "drift"] = "changed"
    """Whether any change of the table is a reason to train, or only values that have moved; new rows are loaded in any
    case."""

    drift: PositiveFloat = 0.2
    """With `when: drift`, the population stability index of a column from which on its values have moved."""

    keep: PositiveInt = 5
    """Newest versions that stay. The champion, the previous one, the challenger and their parents always do."""

    pinned: tuple[PositiveInt, ...] = ()
    """Versions that stay as well."""


def retrain(
    job: Job, config: RetrainConfig, display: Display, service: Client | None = None, force: bool = False
) -> Run:
    """Returns the run's record. Raises GateRefused, LeaseTaken, and ItemvecError for whatever else kept the champion in
    place; all but LeaseTaken are in the record too."""
    with Lease(job.registry, job.name) as lease:
        record = _Record(job, lease, display)
        with record.ending():
            if record.begin(config, force):
                _Retraining(job, config, display, service, record).run(force)
        return record.run


def newest(pattern: str) -> str:
    """`pattern` itself where it has no `*`, else the last match in the order of the alphabet. Raises TableError."""
    if "*" not in pattern:
        return pattern
    try:
        found: list[str] = sorted(fsspec.core.get_fs_token_paths(pattern)[2])
        protocol = pattern.split("://", 1)[0] + "://" if "://" in pattern else ""
    except (OSError, ValueError, ImportError) as error:
        raise TableError(f"cannot look for {pattern}: {error}") from None
    if not found:
        raise TableError(f"no table matches {pattern}")
    return found[-1] if found[-1].startswith(protocol) else protocol + found[-1]


def job_like_champion(
    table: str, registry: Registry, runs: Path, name: str | None, schema: FeatureSchema | None,
    configure: Callable[[dict[str, Any]], TrainConfig], cluster: ClusterConfig, interactions: str | None = None,
) -> Job:  # fmt: skip
    """A job with the champion's schema and interactions, where none are given; `configure` gets the settings that the
    champion was trained with. Raises ConfigError where there is neither schema nor champion."""
    name = name or (schema.name if schema else _only_name(registry))
    champion = registry.aliases(name).get(CHAMPION) if name in registry.names() else None
    if champion is None:
        if schema is None:
            raise ConfigError(
                f"{name!r} has no champion in {registry.url} to take the schema from: name one with --schema"
            )
        return Job(
            table, schema.model_copy(update={"name": name}), registry, runs, configure({}), cluster, interactions
        )
    folder = registry.path(name, champion)
    schema = schema or FeatureSchema.load(folder / "schema.yaml")
    lineage = read_manifest(folder).lineage
    config, likes = configure(lineage.config), interactions or lineage.interactions
    return Job(table, schema.model_copy(update={"name": name}), registry, runs, config, cluster, likes, champion)


class _Retraining:
    """The steps that are left to a run."""

    def __init__(
        self, job: Job, config: RetrainConfig, display: Display, service: Client | None, record: "_Record"
    ) -> None:
        self._job, self._config, self._display, self._service = job, config, display, service
        self._record, self._champion = record, record.run.champion

    def run(self, force: bool) -> None:
        version = self._published()
        loads = self._service is not None and self._config.items != "none"
        if version is None:
            if not force and self._config.when == "drift" and not self._has_drifted():
                if self._service is not None and loads:
                    self._load(self._service)
                self._record.end("skipped", f"no column has drifted by {self._config.drift:g}: nothing to train")
                return
            version = self._train()
        if self._service is not None and self._champion is not None:
            loaded = self._record.run.done("load")
            left = loaded.figures["refused"] if loaded else self._load(self._service) if loads else 0
            self._backfill(self._service, version)
            self._shadow(self._service, version)
        else:
            left = 1
        self._promote(version)
        if self._service is not None and loads and left:
            # The first version had nobody before it to take the items; and what the old one refused, this one may take.
            self._load(self._service)
        self._clean_up()
        self._record.end("promoted", f"{self._job.name}@{version} is the champion")

    def _published(self) -> int | None:
        """The version that an earlier try of this run published. It may not have lived to write that down."""
        run, registry, name = self._record.run, self._job.registry, self._job.name
        if run.version is None and run.tries > 1 and name in registry.names():
            later = [version for version in registry.versions(name) if version > (run.champion or 0)]
            for version in later:
                evaluation = (registry.path(name, version) / "evaluation.json").read_text(encoding="utf-8")
                if json.loads(evaluation).get("gate", {}).get("run") == run.id:
                    run.version = version
        if run.version is not None:
            self._display.line(f"{name}@{run.version} was published by an earlier try of run {run.id}")
        return run.version

    def _has_drifted(self) -> bool:
        """Also where it cannot be told: the champion has another schema, or was not made by a retraining."""
        job = self._job
        if self._champion is None:
            return True
        champion = job.registry.load(f"{job.name}@{self._champion}")
        with self._record.step("drift", f"comparing the values with those of {champion.ref}") as step:
            known = champion.evaluation.get("profile")
            if known is None or champion.schema != job.schema:
                step.said = "the champion has another schema" if known else "the champion has no profile of its table"
                return True
            step.figures = drift(known, read_items(job).table, job.schema)
            worst = max(step.figures, key=lambda name: step.figures[name])
            step.said = f"most in {worst}: {step.figures[worst]:.3f}"
            return bool(step.figures[worst] >= self._config.drift)

    def _train(self) -> int:
        job, gate, record = self._job, self._config.gate, self._record
        champion = None if self._champion is None else job.registry.load(f"{job.name}@{self._champion}")
        record.run.checks = []
        with record.step("check", "checking rows and columns") as step:
            count = read_items(job).table.num_rows
            step.said = f"{count:,} rows, {len(job.schema.features)} columns"
            self._judge(before(job, count, champion, gate))
        with record.step("train", f"training {job.name}") as step:
            trained = train(job, self._display)
            training = trained.evaluation["training"]
            step.said = f"{training['epochs']} epochs, the best was {training['best_epoch']}"
            step.figures = dict(trained.evaluation["seconds"])
        beside = "" if champion is None else f", beside {champion.ref} on the same rows"
        with record.step("gate", f"measuring what the gate asks for{beside}") as step:
            checks = compare(trained, champion, gate)
            step.said = f"{sum(check.passed for check in checks)} of {len(checks)} checks passed"
            try:
                self._judge(checks)
            except GateRefused:
                (trained.folder / REFUSED).write_text(job.name)
                forget_refused(job, but=trained.folder)
                raise
        with record.step("publish", "publishing it as the challenger") as step:
            trained.evaluation["gate"] = {
                "run": record.run.id, "champion": self._champion, "checks": record.run.checks,
            }  # fmt: skip
            trained.evaluation["profile"] = profile(trained.table, job.schema)
            version = trained.publish(CHALLENGER)
            record.run.version = version
            step.said = f"{job.name}@{version}"
        return version

    def _judge(self, checks: list[Check]) -> None:
        for check in checks:
            self._display.line(f"  [{'green]passed' if check.passed else 'red]failed'}[/] {check}")
        self._record.run.checks += [check.shown() for check in checks]
        failed = [check for check in checks if not check.passed]
        if failed:
            raise GateRefused.by(self._job.name, self._champion, failed)

    def _load(self, service: Client) -> int:
        """How many rows were refused."""
        job = self._job
        with self._record.step("load", f"giving {service.url} the new and changed rows") as step:
            schemas = [job.schema]
            if self._champion is not None:
                schemas.append(FeatureSchema.load(job.registry.path(job.name, self._champion) / "schema.yaml"))
            table = read_items(job, [f.name for schema in schemas for f in schema.features]).table
            step.figures = load_changed(
                service, job.registry, job.name, table, schemas, sync=self._config.items == "sync"
            )
            counts = ("created", "updated", "deleted", "refused", "unchanged")
            step.said = ", ".join(f"{step.figures[count]:,} {count}" for count in counts)
            refused: int = step.figures["refused"]
        return refused

    def _backfill(self, service: Client, version: int) -> None:
        """Not skipped where it was done before: the service may have dropped the index since, and else it is quick."""
        with self._record.step("backfill", f"{service.url} encodes its items with {self._job.name}@{version}") as step:
            done = service.backfill(self._job.name, version)
            step.figures = {"items": done["progress"]["done"], "refused": done["refused"]}
            step.said = f"{done['progress']['done']:,} items encoded, {done['refused']:,} refused"

    def _shadow(self, service: Client, version: int) -> None:
        config, job = self._config.shadow, self._job
        if not config.items or self._champion is None or self._record.run.done("shadow"):
            return
        with self._record.step("shadow", f"the same searches to version {self._champion} and {version}") as step:
            ids = read_items(job).table.select([job.schema.id])
            asked = taken(ids, some(np.arange(len(ids)), config.items)).column(0).cast(pa.string()).to_pylist()
            step.figures, checks = compare_answers(service, job.name, self._champion, version, asked, config)
            if step.figures["items"]:
                step.said = (
                    f"of {step.figures['items']} items {step.figures['overlap']:.2f} of the neighbors are the same"
                )
            else:
                step.said = "none of the table's items is stored"
            self._judge(checks)

    def _promote(self, version: int) -> None:
        job, service = self._job, self._service
        champion = job.champion()
        if champion == version:
            return  # by an earlier try
        with self._record.step("promote", f"switching to {job.name}@{version}") as step:
            if champion != self._champion:
                raise ItemvecError(
                    f"{job.name}@{champion} became the champion meanwhile, and {job.name}@{version} was not compared "
                    "with it: run it again"
                )
            if service is None:
                job.registry.promote(job.name, version, after=self._champion)
                step.said = "a running service follows within seconds"
            else:
                service.switch(job.name, version)
                step.said = f"{service.url} serves it"
        self._display.line(f"{job.name}@{version} is the champion; {step.said}")

    def _clean_up(self) -> None:
        job, config = self._job, self._config
        with self._record.step("clean up", "removing what is too old") as step:
            removed = too_old(job.registry, job.name, config.keep, config.pinned)
            for version in removed:
                job.registry.remove(job.name, version)
            Runs(job.registry).forget(job.name)
            forget_refused(job)
            step.said = f"removed {', '.join(f'{job.name}@{v}' for v in removed)}" if removed else "nothing is"


def too_old(registry: Registry, name: str, keep: int, pinned: tuple[int, ...] = ()) -> list[int]:
    """Versions beyond the `keep` newest, but for those that an alias names, their parents and what is pinned."""
    versions = registry.versions(name)
    named = set(registry.aliases(name).values()).intersection(versions)  # one may name what was removed by hand
    parents = {registry.manifest(name, version).lineage.parent for version in named}
    stay = {*versions[-keep:], *named, *parents, *pinned}
    return [version for version in versions if version not in stay]


def forget_refused(job: Job, but: Path | None = None) -> None:
    """Removes what refused runs of the model left; the last one stays until the next, so that with a looser gate there
    is nothing to train again. What was only interrupted stays."""
    for mark in job.runs.glob(f"*/{REFUSED}"):
        if mark.parent != but and mark.read_text() == job.name:
            with contextlib.suppress(ItemvecError), locked(mark.parent / "lock", "taken up"):
                shutil.rmtree(mark.parent)
    forget(job.runs)


def made_from(job: Job, version: int, digest: str, likes_digest: str | None) -> bool:
    """Whether `version` was trained on the same tables, to the byte, with the same schema and settings."""
    folder = job.registry.path(job.name, version)
    lineage = read_manifest(folder).lineage
    return (
        lineage.config == job.config.model_dump(mode="json")
        and FeatureSchema.load(folder / "schema.yaml") == job.schema
        and lineage.table_sha256 == digest
        and lineage.interactions_sha256 == likes_digest
    )


class _Record:
    """Writes a run down as it goes on; nothing is written once another process holds the lease."""

    def __init__(self, job: Job, lease: Lease, display: Display) -> None:
        self._job, self._lease, self._display = job, lease, display
        self._runs, now = Runs(job.registry), datetime.now(UTC)
        self.run = Run(
            id=new_run_id(), model=job.name, state="running", table=job.table, champion=job.champion(),
            started_at=now, updated_at=now, by=lease.by, token=lease.token,
        )  # fmt: skip

    def begin(self, config: RetrainConfig, force: bool) -> bool:
        """Whether there is something to do; goes on with the last run's record if that did not end and was of the same
        inputs. Raises GateRefused where the same was refused before."""
        job, name, champion = self._job, self._job.name, self.run.champion
        with self.step("read", f"reading {job.table}") as step:
            digest = table_digest(job.table)
            likes_digest = table_digest(job.interactions) if job.interactions else None
            step.said = f"sha256 {digest[:12]}"
        self.run.inputs = _digest(
            digest, likes_digest, job.schema.to_yaml(), job.config.model_dump(mode="json"), champion,
            config.gate.model_dump(mode="json"), config.shadow.model_dump(mode="json"),
        )  # fmt: skip
        new = champion is None or not made_from(job, champion, digest, likes_digest)
        last = next((run for run in self._runs.of(name, 2) if run.id != self.run.id), None)
        if last is not None and last.state in UNFINISHED:
            # With its promotion a run changes the champion, and so the inputs of the next one.
            switched = last.version is not None and last.version == champion
            if last.inputs == self.run.inputs or (switched and not new):
                self._display.line(f"going on with run {last.id}, which ended in its step {last.steps[-1].name!r}")
                self._take_up(last)
                return True
        if force:
            return True
        again = last is not None and last.inputs == self.run.inputs
        if last is not None and again and last.state == "refused":
            self._display.line(f"run {last.id} refused it, and nothing changed since; --force trains again")
            self._take_up(last)
            raise GateRefused(last.reason)
        if last is not None and again and last.state == "skipped":
            last.steps = self.run.steps
            self._take_up(last)
        if not new:
            self.end(
                "skipped",
                f"{name}@{champion} was trained on this very table with this schema and config: nothing to do",
            )
            self._display.line(self.run.reason)
        return new

    def _take_up(self, last: Run) -> None:
        for step in last.steps:
            if step.state == "running":
                step.state, step.said = "failed", "cut short"
        self._runs.drop(self.run)
        now = {"state": "running", "reason": "", "tries": last.tries + 1, "by": self.run.by, "token": self.run.token}
        self.run = last.model_copy(update=now)
        self._save()

    @contextlib.contextmanager
    def step(self, name: StepName, text: str) -> Iterator[Step]:
        self._display.say(name, text)
        step = Step(name=name, started_at=datetime.now(UTC))
        self.run.steps.append(step)
        self._save()
        began = time.monotonic()
        try:
            yield step
            step.state = "done"
        except BaseException as error:
            step.state = "failed"
            step.said = str(error) or type(error).__name__
            raise
        finally:
            step.seconds = round(time.monotonic() - began, 3)
        self._save()

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Writes down how it ended, however it does."""
        try:
            yield
        except LeaseLost:
            raise  # the record may be another's by now
        except BaseException as error:
            with contextlib.suppress(LeaseLost):
                state: RunState = "refused" if isinstance(error, GateRefused) else "failed"
                self.end(state, str(error) or type(error).__name__)
            raise

    def end(self, state: RunState, reason: str) -> None:
        self.run.state, self.run.reason = state, reason
        self._save()

    def _save(self) -> None:
        self._lease.check()
        self._runs.save(self.run)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _only_name(registry: Registry) -> str:
    names = registry.names()
    if len(names) != 1:
        there = (
            f"has {', '.join(names)}: name one with --name"
            if names
            else "has no model yet: name a schema with --schema"
        )
        raise ConfigError(f"which model? {registry.url} {there}")
    return names[0]
