"""The gate: what a new version must show before it is published, beside the champion on the same held-out rows.

Each check is a setting, and `off` turns it off. Those of the columns and of the rows are known before anything is
trained (`before`); the others need the trained model (`compare`). Without a champion those against it are left out.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator

from itemvec.errors import ItemvecError
from itemvec.schema import FeatureSchema
from itemvec.table import rows
from itemvec.version import ModelVersion
from training.coldstart import cold_start
from training.config import Settings
from training.items import taken
from training.judged import Views, judged, judged_version, measured_rows, searched_rows, truth_of
from training.readback import read_back
from training.retrieval import retrieve
from training.run import Job, Trained, one_thread, read_items
from training.space import space

TIMED = 50
"""Encodings of one item by which its latency is told; the median counts."""

Tolerance = Annotated[float, Field(ge=0)] | None
LeastShare = Annotated[float, Field(ge=0, le=1)] | None
MostShare = LeastShare


class GateConfig(Settings):
    """By how much a new version may be worse than the champion on the same rows. None (`off`) leaves a check out."""

    retrieval: Tolerance = 0.02
    """Mean precision@10 of neighbors for hidden columns."""

    column: Tolerance = 0.1
    """What the decoder reads back of any one column (accuracy, micro-F1, R2; for an ordinal one minus the mean error as
    a share of its steps)."""

    cold_start: Tolerance = 0.02
    """Recall@20 and NDCG@20 of new items, where there are interactions."""

    unseen: Tolerance = 0.1
    """Share of held-out rows with a column of labels that are all new to the model: labels that change with every
    export cannot be learned."""

    overlap: LeastShare = 0.1
    """Least share of neighbors that both agree on: a space that has nothing in common with the old one is a mistake."""

    rows: LeastShare = 0.5
    """Least share of the champion's number of rows: an export that was cut short must not become a model."""

    least_rows: PositiveInt | None = None
    """Least number of rows."""

    columns: bool = True
    """Every column of the champion's schema is there and of the same kind: callers send it, and filter by it."""

    rank: LeastShare = 0.5
    """Least share of the champion's effective rank: far below it the space has collapsed."""

    norm: LeastShare = 0.1
    """Least share of the champion's mean length of vectors before they are brought to length 1: near 0 their direction
    is noise."""

    cosine: MostShare = 0.5
    """Largest mean cosine of random pairs: near 1 all items are one."""

    latency: PositiveFloat | None = 50.0
    """Most milliseconds to encode one item, on the machine that trains."""

    size: PositiveFloat | None = None
    """Most MB of weights."""

    @field_validator("*", mode="before")
    @classmethod
    def _off(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML reads `off` as false."""
        return None if value is False and info.field_name != "columns" else value


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    new: float
    limit: float
    champion: float | None = None
    at_most: bool = False
    """Whether more is worse."""

    why: str = ""

    @property
    def passed(self) -> bool:
        """What is no number passes nothing."""
        return self.new <= self.limit if self.at_most else self.new >= self.limit

    def __str__(self) -> str:
        beside = "" if self.champion is None else f"champion {self.champion:.4g}, "
        text = f"{self.name} {self.new:.4g} ({beside}{'most' if self.at_most else 'least'} {self.limit:.4g})"
        if self.passed:
            return text
        by = f"is over by {self.new - self.limit:.4g}" if self.at_most else f"is short by {self.limit - self.new:.4g}"
        return f"{text} {by}{': ' if self.why else ''}{self.why}"

    def shown(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class GateRefused(ItemvecError):
    """The new version is worse than the champion by more than the gate allows."""

    exit_status = 3

    @classmethod
    def by(cls, name: str, champion: int | None, failed: list[Check]) -> "GateRefused":
        stays = f"{name} has no champion still" if champion is None else f"{name}@{champion} stays the champion"
        return cls(f"not switched, {stays}: {'; '.join(map(str, failed))}")


def before(job: Job, count: int, champion: ModelVersion | None, gate: GateConfig) -> list[Check]:
    """What can be told of a table of `count` rows without training on it."""
    checks = []
    if gate.least_rows is not None:
        checks.append(Check("number of rows", count, gate.least_rows))
    if champion is not None:
        if gate.rows is not None:
            theirs = champion.manifest.lineage.table_rows
            checks.append(Check("rows", count, gate.rows * theirs, theirs))
        if gate.columns:
            checks.append(same_columns(job.schema, champion.schema))
    return checks


def same_columns(new: FeatureSchema, old: FeatureSchema) -> Check:
    """How many of the old columns are there still, of the same kind."""
    kinds = {feature.name: feature.kind for feature in new.features}
    wrong = [
        f"{f.name} is gone" if f.name not in kinds else f"{f.name} was {f.kind} and is {kinds[f.name]}"
        for f in old.features
        if kinds.get(f.name) != f.kind
    ]
    every = len(old.features)
    return Check("columns kept", every - len(wrong), every, every, why=", ".join(wrong))


def compare(trained: Trained, champion: ModelVersion | None, gate: GateConfig) -> list[Check]:
    """Of what both models have. The rows are those held out from the new model; the champion did not train on them
    either, since an id's fold is a matter of its hash."""
    checks = list(_alone(trained, gate))
    if champion is not None:
        with torch.inference_mode(), one_thread():
            checks += _beside(trained, champion, gate)
    return checks


def _alone(trained: Trained, gate: GateConfig) -> Iterator[Check]:
    if gate.cosine is not None:
        yield Check("mean cosine", trained.evaluation["space"]["mean_cosine"], gate.cosine, at_most=True)
    if gate.latency is not None:
        yield Check("milliseconds an item", encode_milliseconds(trained), gate.latency, at_most=True)
    if gate.size is not None:
        modules = (trained.encoder, trained.decoder)
        weights = sum(p.numel() * p.element_size() for module in modules for p in module.parameters())
        yield Check("MB of weights", weights / 1e6, gate.size, at_most=True)


def _beside(trained: Trained, champion: ModelVersion, gate: GateConfig) -> Iterator[Check]:
    ours, data = trained.evaluation, trained.data
    searched, measured = searched_rows(data.fold), np.arange(len(measured_rows(data.fold)))
    table = _table_for(trained, champion)
    theirs = judged_version(champion, table, data.fold, searched)
    views = Views(theirs, np.arange(len(searched)))
    if gate.retrieval is not None:
        labels = truth_of(judged(data, trained.encoder, trained.decoder))
        truth = {name: of_column[searched] for name, of_column in labels.items()}
        retrieval, _ = retrieve(views, len(measured), truth, baselines=False)
        both = [name for name in ours["retrieval"]["columns"] if name in retrieval["columns"]]
        if both:
            new, old = (
                sum(r["columns"][name]["precision"] for name in both) / len(both)
                for r in (ours["retrieval"], retrieval)
            )
            yield Check("retrieval precision@10", new, old - gate.retrieval, old)
    if gate.column is not None:
        yield from _columns(trained, read_back(views, len(measured)), gate.column)
    if gate.cold_start is not None and ours["cold_start"] is not None and data.interactions is not None:
        likes = data.interactions.likes
        liked = np.flatnonzero(likes.getnnz(0))  # nobody asks for the others
        theirs_of_liked = judged_version(champion, table, data.fold, liked)
        old_figures = cold_start(theirs_of_liked, likes[:, liked], data.fold[liked], baselines=False)
        if old_figures is not None:
            for figure in ("recall", "ndcg"):
                new, old = ours["cold_start"]["model"][figure], old_figures["model"][figure]
                yield Check(f"cold start {figure}@20", new, old - gate.cold_start, old)
    before = champion.evaluation.get("out_of_vocabulary")
    if gate.unseen is not None and before is not None:
        old = before["share"]
        yield Check("unseen share", ours["out_of_vocabulary"]["share"], old + gate.unseen, old, at_most=True)
    parent = ours["parent"]
    if gate.overlap is not None and parent is not None and parent["version"] == champion.version:
        yield Check("neighbor overlap@10", parent["overlap"], gate.overlap)
    spread = space(theirs, measured)
    for name, key, share in (("effective rank", "effective_rank", gate.rank), ("norm", "norm_mean", gate.norm)):
        if share is not None:
            yield Check(name, ours["space"][key], share * spread[key], spread[key])


def _columns(trained: Trained, theirs: dict[str, Any], tolerance: float) -> Iterator[Check]:
    for name, mine in trained.evaluation["columns"].items():
        if name in theirs and theirs[name]["metric"] == mine["metric"]:
            new, old = (_higher_is_better(c, trained, name) for c in (mine, theirs[name]))
            if new is not None and old is not None:
                yield Check(f"{name} {mine['metric']}", new, old - tolerance, old)


def encode_milliseconds(trained: Trained) -> float:
    """The median over single items, from their columns to the vector."""
    transform, encoder, schema = trained.data.transform, trained.encoder, trained.job.schema
    some = taken(trained.table, measured_rows(trained.data.fold)[:TIMED])
    [(_, items)] = rows(some, schema.id, [f.name for f in schema.features])
    seconds = []
    with one_thread():
        for i in range(TIMED):
            began = time.perf_counter()
            encoder.encode(transform.transform([items[i % len(items)]]).batch)
            seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds)


def _table_for(trained: Trained, champion: ModelVersion) -> pa.Table:
    """The new table with the columns that the champion reads; one that it lost is missing on every row."""
    table, names = trained.table, [feature.name for feature in champion.schema.features]
    if not set(names) <= set(table.column_names):
        table = read_items(trained.job, names).table
    for name in names:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows))
    return table


def _higher_is_better(column: dict[str, Any], trained: Trained, name: str) -> float | None:
    score: float | None = column["score"]
    if column["kind"] == "ordinal" and score is not None:
        order = trained.job.schema.feature(name).order  # type: ignore[union-attr]
        return 1 - score / (len(order) - 1)
    return score
