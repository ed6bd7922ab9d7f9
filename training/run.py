"""One training run, from an item table to a published model version. Everything meets here; each part is elsewhere.

    read -> check, fit, encode (data) -> train on Ray (cluster, loop) -> settle -> evaluate -> publish (registry)

The run's folder is named by what goes in, so the same command after a kill finds the encoded table and the checkpoint
of the first try and goes on from there. It is removed when the version is published.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

import itemvec
from itemvec.encoder import Decoder, ItemEncoder, finish
from itemvec.errors import ItemvecError
from itemvec.registry import CHALLENGER, CHAMPION, Registry
from itemvec.schema import FeatureSchema
from itemvec.table import rows, table_digest
from itemvec.version import Lineage, ModelVersion
from training import cluster as ray_cluster
from training.config import ClusterConfig, TrainConfig
from training.data import Prepared
from training.evaluate import assess, parent_of, write_report
from training.exhibits import Exhibits
from training.folds import TRAIN, some
from training.ingest import ALONE
from training.interactions import Interactions
from training.items import Items, forget, taken
from training.judged import judged, measured_rows
from training.objectives import Predict, chosen
from training.progress import Display
from training.readout import FITTED, refit_numbers
from training.start import gains_from, unseen_as_unknown
from training.warm import align, follow, why_anew

GOLDEN_ROWS = 16
ENCODED_AT_ONCE = 4096

SETTLED = 500_000
"""Training rows that the mean and covariance of the embeddings are of at most: of more they are the same to a
thousandth."""


@dataclass(frozen=True, slots=True)
class Job:
    """What to train, on what, and where to put it."""

    table: str
    """A path or URL."""

    schema: FeatureSchema
    registry: Registry
    runs: Path
    """Where runs keep what they need until they are published."""

    config: TrainConfig = field(default_factory=TrainConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    interactions: str | None = None
    """A path or URL of the table of who liked what."""

    follows: int | None = None
    """The version of the model whose weights it starts from, and whose vectors it is turned to."""

    @property
    def name(self) -> str:
        return self.schema.name

    def champion(self) -> int | None:
        with contextlib.suppress(ItemvecError):
            return self.registry.aliases(self.name).get(CHAMPION)
        return None

    def parent(self) -> int | None:
        """The version that the new one is compared with."""
        return self.champion() if self.follows is None else self.follows


@dataclass(slots=True)
class Trained:
    """A trained model that is not yet published."""

    job: Job
    data: Prepared
    table: pa.Table
    digest: str
    likes_digest: str | None
    encoder: ItemEncoder
    decoder: Decoder
    evaluation: dict[str, Any]
    exhibits: Exhibits
    folder: Path

    def publish(self, alias: str | None) -> int:
        """Publishes it as the next version, and removes the run's folder. `alias` as in `Registry.publish`."""
        job = self.job
        parent = job.parent()
        lineage = Lineage(
            table=job.table, table_sha256=self.digest, table_rows=self.table.num_rows,
            train_rows=self.evaluation["rows"]["train"], config=job.config.model_dump(mode="json"), parent=parent,
            interactions=job.interactions, interactions_sha256=self.likes_digest,
        )  # fmt: skip

        def write(folder: Path, version: int) -> None:
            write_report(folder, f"{job.name}@{version}", self.evaluation, self.exhibits)
            made = ModelVersion.make(
                job.name, version, self.data.transform, self.encoder, self.decoder, self.evaluation, lineage
            )
            made.save(folder, self._golden())

        version = job.registry.publish(job.name, write, alias)
        shutil.rmtree(self.folder, ignore_errors=True)
        forget(job.runs)
        return version

    def _golden(self) -> list[tuple[str, dict[str, Any]]]:
        """Some measured rows, as the HTTP API would get them."""
        some = taken(self.table, measured_rows(self.data.fold)[:GOLDEN_ROWS])
        schema = self.job.schema
        return [
            (item_id, _as_json(item))
            for ids, items in rows(some, schema.id, [f.name for f in schema.features])
            for item_id, item in zip(ids, items, strict=True)
        ]


def train(job: Job, display: Display) -> Trained:
    """Raises ItemvecError for all that can go wrong with the table, the schema, the settings or the cluster."""
    display.say("read", f"reading {job.table}")
    job.registry.names()  # whether it can be reached is better known now than when there is something to publish
    likes_digest = table_digest(job.interactions) if job.interactions else None
    items = read_items(job)
    parent = None if job.follows is None else job.registry.load(f"{job.name}@{job.follows}")
    folder = (
        job.runs / f"{job.name}-{run_digest(job, items.digest, likes_digest, parent.fingerprint if parent else None)}"
    )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"another process trains {job.name} on this table with these settings"):
        data = prepared(job, items, folder, display, parent)
        chosen(job.config, data)  # a run that could learn nothing ends here
        display.say(
            "ray", "starting Ray" if job.cluster.address is None else f"connecting to Ray at {job.cluster.address}"
        )
        with ray_cluster.connected(job.cluster):
            display.say("workers", f"starting {_counted(job.cluster.workers, 'worker')}")
            state = ray_cluster.fit(folder.resolve(), job.config, job.cluster, display.told)
            display.say("ray", "stopping the workers")
        display.say("evaluate", "evaluating on the rows that were held out")
        encoder, decoder = best_of(state, job.config, data)
        settle(encoder, decoder, data)
        align(encoder, decoder, data)
        history = json.loads(state["history"])
        with one_thread():
            model = judged(data, encoder, decoder)
            evaluation, exhibits = assess(
                model, items.table, job.schema, data.fold, data.interactions.likes if data.interactions else None,
                parent_of(job.registry, job.name, job.parent()),
            )  # fmt: skip
        if data.targets:
            evaluation["predict"] = target_scores(state, job.config, data, encoder, decoder)
        evaluation["training"] = {
            "best_epoch": state["best_epoch"], "epochs": len(history), "history": history,
            "parameters": sum(p.numel() for module in (encoder, decoder) for p in module.parameters()),
            "gains": dict(data.gains),
        }  # fmt: skip
        display.end_phase()
        evaluation["seconds"] = dict(display.timings)
        return Trained(
            job, data, items.table, items.digest, likes_digest, encoder, decoder, evaluation, exhibits, folder
        )


def read_items(job: Job, also: Iterable[str] = ()) -> Items:
    """The columns that are learned from, and `also` these."""
    return Items.read(job.table, job.schema, [*job.config.predict.targets, *also], job.runs, job.cluster.address)


def run_digest(job: Job, table_sha256: str, likes_sha256: str | None = None, parent: str | None = None) -> str:
    """12 hex digits of all that decides what is learned. `parent` is the fingerprint of the version that it follows."""
    what = [
        itemvec.__version__, table_sha256, likes_sha256, parent, job.schema.to_yaml(),
        job.config.model_dump(mode="json"),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def best_of(state: dict[str, Any], config: TrainConfig, data: Prepared) -> tuple[ItemEncoder, Decoder]:
    """The networks of the best epoch."""
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    encoder.load_state_dict(state["best"]["encoder"])
    decoder.load_state_dict(state["best"]["decoder"])
    return encoder.eval(), decoder.eval()


@torch.inference_mode()
def target_scores(
    state: dict[str, Any], config: TrainConfig, data: Prepared, encoder: ItemEncoder, decoder: Decoder
) -> dict[str, dict[str, Any]]:
    """Of the `predict` objective on the measured rows (`Predict.scores`)."""
    predict = Predict(config.encoder, config.predict, data.targets)
    predict.load_state_dict(state["best"]["predict"])
    items = torch.from_numpy(measured_rows(data.fold))
    embedding = encoder(*data.table.clean(items))
    return predict.eval().scores(decoder.as_trained(embedding), items)


@torch.inference_mode()
def settle(encoder: ItemEncoder, decoder: Decoder, data: Prepared) -> None:
    """`finish` with the mean and covariance of the training rows, of which the loop had those of damaged ones; and what
    the loop could not teach (`unseen_as_unknown`, `refit_numbers`)."""
    unseen_as_unknown(encoder, data)
    items, dim = torch.from_numpy(some(np.flatnonzero(data.fold == TRAIN), SETTLED)), encoder.config.dim
    total, products = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    for part in torch.split(items, ENCODED_AT_ONCE):
        z = encoder.uncentred(*data.table.clean(part)).double()
        total += z.sum(0)
        products += z.T @ z
    mean = total / len(items)
    finish(encoder, decoder, mean, products / len(items) - torch.outer(mean, mean))
    refit_numbers(judged(data, encoder, decoder), some(items.numpy(), FITTED))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """What is measured is small, and threads that wait for each other make it many times slower on a machine that has
    other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def alias_of_new(job: Job, promote: bool) -> str:
    """The first version has nobody to be compared with."""
    return CHAMPION if promote or job.champion() is None else CHALLENGER


@contextlib.contextmanager
def locked(path: Path, taken: str) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends. Raises ItemvecError with `taken` where another holds
    it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ItemvecError(f"{taken} (process {file.read().strip() or 'unknown'}); wait until it is done") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def prepared(job: Job, items: Items, folder: Path, display: Display, parent: ModelVersion | None = None) -> Prepared:
    """The items encoded in `folder`, with the likes and with what is taken from `parent`."""
    table, done = items.table, folder / "prepared"
    if done.exists():
        display.say("encode", "taking up an earlier run that did not end")
        return Prepared.open(folder)
    display.say("encode", f"encoding {table.num_rows:,} items, {_counted(len(job.schema.features), 'column')}")
    spread = job.cluster.address is not None and table.num_rows > ALONE
    with ray_cluster.connected(job.cluster) if spread else contextlib.nullcontext():
        data = Prepared.make(table, job.schema, job.config, folder, job.table, items.copy, spread)
    if job.interactions:
        display.say("likes", f"reading {job.interactions}, and how much each column says about them")
        ids = table.column(job.schema.id)
        likes = Interactions.read(job.interactions, job.config.interactions, ids, data.fold)
        gains = gains_from(likes, data, job.config.seed) if job.config.start == "components" else {}
        data = data.with_likes(likes, gains, folder)
        display.line(f"  {likes.likes.nnz:,} likes of {_counted(likes.likes.shape[0], 'user')}" + _listed(gains))
    if parent is not None:
        anew = why_anew(parent.manifest, job.config)
        display.say(
            "follow", f"going on from {parent.ref}" if not anew else f"beginning anew after {parent.ref}: {anew}"
        )
        data = data.with_parent(follow(parent, table, data, job.config, folder), folder)
    done.touch()
    return data


def _as_json(item: dict[str, Any]) -> dict[str, Any]:
    """Dates and times as the text that a request would have."""
    text: dict[str, Any] = json.loads(
        json.dumps(item, default=lambda value: value.isoformat() if hasattr(value, "isoformat") else str(value))
    )
    return text


def _listed(gains: Mapping[str, float]) -> str:
    most = sorted(gains.items(), key=lambda gain: -gain[1])
    return f"; columns count {', '.join(f'{name} {gain:.2f}' for name, gain in most)}" if gains else ""


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
