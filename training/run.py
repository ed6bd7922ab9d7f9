"""One training run, from an item table to a published model version. Everything meets here; each part is elsewhere.

    read -> check, fit, encode (data) -> train on Ray (cluster, loop) -> centre -> evaluate -> publish (registry)

The run's folder is named by what goes in, so the same command after a kill finds the encoded table and the checkpoint
of the first try and goes on from there. It is removed when the version is published.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

import itemvec
from itemvec.encoder import Decoder, ItemEncoder
from itemvec.errors import ItemvecError
from itemvec.registry import CHALLENGER, CHAMPION, Registry
from itemvec.schema import FeatureSchema
from itemvec.table import read_table, rows, table_digest
from itemvec.version import Lineage, ModelVersion
from training import cluster as ray_cluster
from training.config import ClusterConfig, TrainConfig
from training.data import TRAIN, Prepared
from training.evaluate import evaluate, judged, measured_rows
from training.progress import Display

GOLDEN_ROWS = 16
ENCODED_AT_ONCE = 4096


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

    @property
    def name(self) -> str:
        return self.schema.name

    def champion(self) -> int | None:
        with contextlib.suppress(ItemvecError):
            return self.registry.aliases(self.name).get(CHAMPION)
        return None


@dataclass(slots=True)
class Trained:
    """A trained model that is not yet published."""

    job: Job
    data: Prepared
    table: pa.Table
    digest: str
    encoder: ItemEncoder
    decoder: Decoder
    evaluation: dict[str, Any]
    folder: Path
    history: list[dict[str, Any]] = field(default_factory=list)

    def publish(self, alias: str | None) -> int:
        """Publishes it as the next version, and removes the run's folder. `alias` as in `Registry.publish`."""
        job = self.job
        parent = job.champion()
        lineage = Lineage(
            table=job.table, table_sha256=self.digest, table_rows=self.table.num_rows,
            train_rows=self.evaluation["rows"]["train"], config=job.config.model_dump(mode="json"), parent=parent,
        )  # fmt: skip

        def write(folder: Path, version: int) -> None:
            from training.plots import loss_curves  # noqa: PLC0415 - matplotlib takes a second to import

            loss_curves(self.history, folder / "plots" / "losses.png")
            made = ModelVersion.make(
                job.name, version, self.data.transform, self.encoder, self.decoder, self.evaluation, lineage
            )
            made.save(folder, self._golden())

        version = job.registry.publish(job.name, write, alias)
        shutil.rmtree(self.folder, ignore_errors=True)
        return version

    def _golden(self) -> list[tuple[str, dict[str, Any]]]:
        """Some measured rows, as the HTTP API would get them."""
        some = self.table.take(pa.array(measured_rows(self.data.fold)[:GOLDEN_ROWS]))
        schema = self.job.schema
        return [
            (item_id, _as_json(item))
            for ids, items in rows(some, schema.id, [f.name for f in schema.features])
            for item_id, item in zip(ids, items, strict=True)
        ]


def train(job: Job, display: Display) -> Trained:
    """Raises ItemvecError for all that can go wrong with the table, the schema, the settings or the cluster."""
    display.say("read", f"reading {job.table}")
    digest = table_digest(job.table)
    table = read_table(job.table, [job.schema.id, *(f.name for f in job.schema.features)])
    folder = job.runs / f"{job.name}-{run_digest(job, digest)}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock", f"another process trains {job.name} on this table with these settings"):
        data = _prepared(job, table, folder, display)
        display.say(
            "ray", "starting Ray" if job.cluster.address is None else f"connecting to Ray at {job.cluster.address}"
        )
        with ray_cluster.connected(job.cluster):
            display.say("workers", f"starting {_counted(job.cluster.workers, 'worker')}")
            state = ray_cluster.fit(folder.resolve(), job.config, job.cluster, display.told)
            display.say("ray", "stopping the workers")
        display.say("evaluate", "evaluating on the rows that were held out")
        encoder, decoder = best_of(state, job.config, data)
        centre(encoder, data)
        history = json.loads(state["history"])
        with one_thread():
            evaluation = evaluate(judged(data, encoder, decoder), data.fold)
        evaluation["training"] = {
            "best_epoch": state["best_epoch"], "epochs": len(history), "history": history,
            "parameters": sum(p.numel() for module in (encoder, decoder) for p in module.parameters()),
        }  # fmt: skip
        display.end_phase()
        evaluation["seconds"] = dict(display.timings)
        return Trained(job, data, table, digest, encoder, decoder, evaluation, folder, history)


def run_digest(job: Job, table_sha256: str) -> str:
    """12 hex digits of all that decides what is learned."""
    what = [itemvec.__version__, table_sha256, job.schema.to_yaml(), job.config.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def best_of(state: dict[str, Any], config: TrainConfig, data: Prepared) -> tuple[ItemEncoder, Decoder]:
    """The networks of the best epoch."""
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    encoder.load_state_dict(state["best"]["encoder"])
    decoder.load_state_dict(state["best"]["decoder"])
    return encoder.eval(), decoder.eval()


@torch.inference_mode()
def centre(encoder: ItemEncoder, data: Prepared) -> None:
    """Sets the mean that is subtracted to that of all training rows; the loop had a moving one of damaged rows."""
    if not encoder.config.centre:
        return
    items = data.items(TRAIN)
    total = torch.zeros(encoder.config.dim, dtype=torch.float64)
    for part in torch.split(items, ENCODED_AT_ONCE):
        total += encoder.uncentred(*data.table.clean(part)).double().sum(0)
    encoder.mean.copy_(total / len(items))


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


def _prepared(job: Job, table: pa.Table, folder: Path, display: Display) -> Prepared:
    done = folder / "prepared"
    if done.exists():
        display.say("encode", "taking up an earlier run that did not end")
        return Prepared.open(folder)
    display.say("encode", f"encoding {table.num_rows:,} items, {_counted(len(job.schema.features), 'column')}")
    data = Prepared.make(table, job.schema, job.config, folder, job.table)
    done.touch()
    return data


def _as_json(item: dict[str, Any]) -> dict[str, Any]:
    """Dates and times as the text that a request would have."""
    text: dict[str, Any] = json.loads(
        json.dumps(item, default=lambda value: value.isoformat() if hasattr(value, "isoformat") else str(value))
    )
    return text


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
