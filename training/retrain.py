"""`itemvec retrain`: train again, compare with the champion on the same held-out rows, and switch only if it is no
worse.

    lock -> nothing new? stop -> train -> gate -> publish as challenger -> the service encodes its items and switches

Whatever fails leaves the champion serving. Run again after a kill, it goes on where it was: at the last checkpoint, or
at the switch if the version was published already.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import torch
from pydantic import BaseModel, ConfigDict, Field

from itemvec.client import Client
from itemvec.errors import ConfigError, ItemvecError
from itemvec.registry import CHALLENGER, CHAMPION, Registry
from itemvec.schema import FeatureSchema
from itemvec.table import read_table, table_digest
from itemvec.version import ModelVersion, read_manifest
from training.config import ClusterConfig, TrainConfig
from training.judged import Judged, Views, judged, judged_version, measured_rows, searched_rows, truth_of
from training.progress import Display
from training.readback import read_back
from training.retrieval import retrieve
from training.run import Job, Trained, locked, one_thread, train
from training.space import space

Tolerance = Annotated[float, Field(ge=0)]
LeastShare = Annotated[float, Field(ge=0, le=1)]


class GateConfig(BaseModel):
    """By how much a new version may be worse than the champion on the same rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    retrieval: Tolerance = 0.02
    """Mean precision@10 of neighbors for hidden columns."""

    column: Tolerance = 0.1
    """What the decoder reads back of any one column (accuracy, micro-F1, R2; for an ordinal one minus the mean error as
    a share of its steps)."""

    rows: LeastShare = 0.5
    """Least share of the champion's number of rows: an export that was cut short must not become a model."""

    rank: LeastShare = 0.5
    """Least share of the champion's effective rank: far below it the space has collapsed."""


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    new: float
    champion: float
    least: float

    @property
    def passed(self) -> bool:
        return self.new >= self.least

    def __str__(self) -> str:
        text = f"{self.name} {self.new:.4g} (champion {self.champion:.4g}, least {self.least:.4g})"
        return text if self.passed else f"{text} is short by {self.least - self.new:.4g}"


class GateRefused(ItemvecError):
    """The new version is worse than the champion by more than the gate allows."""

    exit_status = 3

    def __init__(self, name: str, champion: int, checks: list[Check]) -> None:
        self.failed = [check for check in checks if not check.passed]
        super().__init__(f"not published, {name}@{champion} stays the champion: {'; '.join(map(str, self.failed))}")


@dataclass(frozen=True, slots=True)
class Outcome:
    version: int | None
    """The new champion; None where nothing had changed."""

    checks: list[Check]


def retrain(
    job: Job, gate: GateConfig, display: Display, service: Client | None = None, force: bool = False
) -> Outcome:
    """Raises GateRefused, and ItemvecError for whatever else kept the champion in place."""
    with locked(job.runs / f"{job.name}.lock", f"{job.name} is being retrained"):
        champion = job.champion()
        if champion is None:
            version = train(job, display).publish(CHALLENGER)
            return _switched(job, version, [], display, service)
        if not force and made_from(job, champion):
            display.line(
                f"{job.name}@{champion} was trained on this very table with this schema and config: nothing to do"
            )
            return Outcome(None, [])
        waiting = job.registry.aliases(job.name).get(CHALLENGER)
        if waiting is not None and not force and made_from(job, waiting) and _passed_gate(job, waiting, champion):
            display.line(f"{job.name}@{waiting} passed the gate in an earlier run that did not get to switch")
            return _switched(job, waiting, [], display, service)
        trained = train(job, display)
        display.say("gate", f"comparing with {job.name}@{champion} on the same rows")
        checks = compare(trained, job.registry.load(f"{job.name}@{champion}"), gate)
        for check in checks:
            display.line(f"  [{'green]passed' if check.passed else 'red]failed'}[/] {check}")
        if not all(check.passed for check in checks):
            raise GateRefused(job.name, champion, checks)
        trained.evaluation["gate"] = {
            "champion": champion,
            "checks": [{"name": c.name, "new": c.new, "champion": c.champion, "least": c.least} for c in checks],
        }
        version = trained.publish(CHALLENGER)
        return _switched(job, version, checks, display, service)


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


def made_from(job: Job, version: int) -> bool:
    """Whether `version` was trained on the same tables, to the byte, with the same schema and settings."""
    folder = job.registry.path(job.name, version)
    lineage = read_manifest(folder).lineage
    return (
        lineage.config == job.config.model_dump(mode="json")
        and FeatureSchema.load(folder / "schema.yaml") == job.schema
        and lineage.table_sha256 == table_digest(job.table)
        and lineage.interactions_sha256 == (table_digest(job.interactions) if job.interactions else None)
    )


def compare(trained: Trained, champion: ModelVersion, gate: GateConfig) -> list[Check]:
    """The gate's checks, over the columns that both models have. The rows are those held out from the new model; the
    champion did not train on them either, since an id's fold is a matter of its hash."""
    theirs, ours = _judged_champion(trained, champion), trained.evaluation
    fold = trained.data.fold
    measured = measured_rows(fold)
    with torch.inference_mode(), one_thread():
        truth = truth_of(judged(trained.data, trained.encoder, trained.decoder))
        views = Views(theirs, searched_rows(fold))
        retrieval, _ = retrieve(views, len(measured), truth, baselines=False)
        columns, spread = read_back(views, len(measured)), space(theirs, measured)
    old_rows = champion.manifest.lineage.table_rows
    checks = [Check("rows", trained.table.num_rows, old_rows, gate.rows * old_rows)]
    both = [name for name in ours["retrieval"]["columns"] if name in retrieval["columns"]]
    if both:
        new, old = (
            sum(r["columns"][name]["precision"] for name in both) / len(both) for r in (ours["retrieval"], retrieval)
        )
        checks.append(Check("retrieval precision@10", new, old, old - gate.retrieval))
    for name, mine in ours["columns"].items():
        if name in columns and columns[name]["metric"] == mine["metric"]:
            pair = [_higher_is_better(c, trained, name) for c in (mine, columns[name])]
            if pair[0] is not None and pair[1] is not None:
                checks.append(Check(f"{name} {mine['metric']}", pair[0], pair[1], pair[1] - gate.column))
    rank = spread["effective_rank"]
    checks.append(Check("effective rank", ours["space"]["effective_rank"], rank, gate.rank * rank))
    return checks


def _judged_champion(trained: Trained, champion: ModelVersion) -> Judged:
    """The champion with the new table as its own transform sees it; a column that the table lost is missing."""
    schema = champion.schema
    table = read_table(trained.job.table, [schema.id, *(f.name for f in schema.features)])
    for feature in schema.features:
        if feature.name not in table.column_names:
            table = table.append_column(feature.name, pa.nulls(table.num_rows))
    return judged_version(champion, table, trained.data.fold)


def _higher_is_better(column: dict[str, Any], trained: Trained, name: str) -> float | None:
    score: float | None = column["score"]
    if column["kind"] == "ordinal" and score is not None:
        order = trained.job.schema.feature(name).order  # type: ignore[union-attr]
        return 1 - score / (len(order) - 1)
    return score


def _passed_gate(job: Job, version: int, champion: int) -> bool:
    gate = job.registry.load(f"{job.name}@{version}").evaluation.get("gate")
    return gate is not None and gate["champion"] == champion


def _switched(job: Job, version: int, checks: list[Check], display: Display, service: Client | None) -> Outcome:
    if service is None:
        job.registry.promote(job.name, version)
        display.line(f"{job.name}@{version} is the champion; a running service follows within seconds")
    else:
        display.say("switch", f"{service.url} encodes its items with {job.name}@{version}, then switches")
        service.switch(job.name, version)
        display.line(f"{service.url} serves {job.name}@{version}")
    return Outcome(version, checks)


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
