"""What Ray, shards and checkpoints cost a training: `python -m benchmarks.training --out DIR` prints tables and leaves
results.json.

Epochs: items a second of `itemvec train`'s loop on one Ray worker, which reads a memory-mapped table, against a bare
PyTorch loop over the same tensors in memory: same network, losses, noise, optimizer and batch size, one thread each.
Then two workers at the same global batch. Outside: the seconds of a whole run by phase. Growth: seconds of encoding and
items a second of an epoch as rows, columns and labels double. The table is examples/movies.parquet, repeated with fresh
ids.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from rich.console import Console

from itemvec.encoder import Decoder, ItemEncoder
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from training import cluster
from training.config import ClusterConfig, TrainConfig
from training.data import TENSORS, EncodedTable, Prepared, corrupt
from training.folds import TRAIN
from training.loop import Trainer
from training.objectives import Given, Task
from training.optimize import Optimization
from training.progress import Display
from training.run import Job, train

EXAMPLES = Path(__file__).parents[1] / "examples"
CPU = torch.device("cpu")


def films(rows: int) -> pa.Table:
    """`rows` films, whose ids are all different."""
    once = pq.read_table(EXAMPLES / "movies.parquet")
    many = pa.concat_tables([once] * -(-rows // len(once))).slice(0, rows)
    return many.set_column(many.column_names.index("id"), "id", pa.array([f"film {i}" for i in range(rows)]))


def settings(epochs: int) -> TrainConfig:
    return TrainConfig(epochs=epochs, patience=epochs, start="random")


def bare(data: Prepared, config: TrainConfig) -> list[float]:
    """Items a second of each epoch of a plain loop."""
    torch.manual_seed(config.seed)
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    task = Task(encoder, decoder, data, config)
    task.reconstruct.start_from_marginals()
    task.sparse_gradients(True)
    task.train()
    table = EncodedTable(**{name: getattr(data.table, name).clone() for name in TENSORS})
    items, steps = data.items(TRAIN), len(data.items(TRAIN)) // config.batch_size
    optimization = Optimization(
        task.layer_parameters(), task.table_parameters(), config.optimizer, config.epochs, steps, True
    )
    noise = torch.Generator().manual_seed(config.seed)
    rates = []
    for _ in range(config.epochs):
        began = time.perf_counter()
        order = items[torch.randperm(len(items))]
        for step in range(steps):
            batch = order[step * config.batch_size : (step + 1) * config.batch_size]
            views = batch.repeat(task.views)
            damaged = corrupt(table, views, items, config.corruption, data.layout, noise)
            loss, _ = task(damaged, Given(table.clean(batch), {}, None, None))
            optimization.zero_grad()
            loss.backward()
            optimization.step()
        rates.append(steps * config.batch_size / (time.perf_counter() - began))
    return rates


def on_ray(data_folder: Path, config: TrainConfig, workers: int) -> dict[str, Any]:
    """The loop's own figures, per epoch, and its best loss."""
    (data_folder / "progress.jsonl").unlink(missing_ok=True)
    told: list[dict[str, Any]] = []
    half = ClusterConfig(workers=workers, cpus_per_worker=0.5)
    state = cluster.fit(data_folder, config, half, told.append)
    return {
        "rates": [m["items_per_second"] for m in told if "items_per_second" in m],
        "seconds": [m["seconds"] for m in told if "items_per_second" in m],
        "loss": state["best_loss"],
    }


def epochs(rows: int, count: int, turns: int, folder: Path) -> dict[str, Any]:
    """Bare and on Ray take turns; medians over all epochs but each run's first."""
    schema, config = FeatureSchema.load(EXAMPLES / "movies.schema.yaml"), settings(count)
    rates: dict[str, list[float]] = {"bare": [], "one worker": [], "two workers": []}
    losses: dict[str, float] = {}
    with cluster.connected(ClusterConfig()):
        for turn in range(turns):
            place = folder / f"turn-{turn}"
            data = Prepared.make(films(rows), schema, config, place)
            rates["bare"] += bare(data, config)[1:]
            for workers, name in ((1, "one worker"), (2, "two workers")):
                again = folder / f"turn-{turn}-{workers}"
                Prepared.make(films(rows), schema, config, again)
                made = on_ray(again, config, workers)
                rates[name] += made["rates"][1:]
                losses[name] = made["loss"]
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {"rows": rows, "items_per_second": medians, "share": medians["one worker"] / medians["bare"], "loss": losses}


def outside(rows: int, count: int, folder: Path) -> dict[str, float]:
    """Seconds of a whole `itemvec train`, by phase."""
    pq.write_table(films(rows), folder / "films.parquet")
    schema, began = FeatureSchema.load(EXAMPLES / "movies.schema.yaml"), time.perf_counter()
    job = Job(
        str(folder / "films.parquet"), schema, Registry(folder / "registry"), folder / "runs", settings(count),
        ClusterConfig(),
    )  # fmt: skip
    with Display(Console(file=(folder / "log").open("w"))) as display:
        trained = train(job, display)
    publishing = time.perf_counter()
    trained.publish("champion")
    ended = time.perf_counter()
    return {**trained.evaluation["seconds"], "publish": ended - publishing, "all": ended - began}


def growth(rows: int, folder: Path) -> list[dict[str, Any]]:
    """One epoch of the loop in this process, on made-up columns of labels."""
    plain, found = {"rows": rows, "columns": 4, "labels": 1000}, []
    for grown, factors in (("rows", (1, 2, 4)), ("columns", (1, 2, 4)), ("labels", (1, 4, 16))):
        for factor in factors:
            size = plain | {grown: plain[grown] * factor}
            names = [f"c{c}" for c in range(size["columns"])]
            labels = np.random.default_rng(0).integers(size["labels"], size=(len(names), size["rows"])).astype(str)
            ids = [str(i) for i in range(size["rows"])]
            table = pa.table({"id": ids, **dict(zip(names, map(pa.array, labels.tolist()), strict=True))})
            features = ", ".join(f"{name}: {{kind: nominal}}" for name in names)
            schema = FeatureSchema.from_yaml(f"name: grown\nid: id\nfeatures: {{{features}}}")
            config, began = settings(1), time.perf_counter()
            data = Prepared.make(table, schema, config, folder / f"{grown}-{factor}")
            encoded = time.perf_counter() - began
            [metrics] = Trainer(data, config, CPU).epochs()
            found.append({"grown": grown, **size, "encode": encoded, "items_per_second": metrics["items_per_second"]})
    return found


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for results.json.")
@click.option("--quick", is_flag=True, help="Fewer rows and epochs: whether it runs, and the order of things.")
def main(out: Path, quick: bool) -> None:
    torch.set_num_threads(1)
    rows, count, turns = (2_000, 3, 1) if quick else (50_000, 4, 3)
    with tempfile.TemporaryDirectory() as place:
        made = epochs(rows, count, turns, Path(place))
        click.echo(f"epochs over {rows:,} films, items a second")
        for name, rate in made["items_per_second"].items():
            share = rate / made["items_per_second"]["bare"]
            click.echo(f"{name:12} {rate:9,.0f} {share:6.0%}")
        click.echo(f"loss: {', '.join(f'{name} {loss:.4f}' for name, loss in made['loss'].items())}")
        phases = outside(rows, count, Path(place))
        click.echo("\na whole run, seconds\n" + "\n".join(f"{name:12} {taken:8.1f}" for name, taken in phases.items()))
        grown = growth(rows // 5, Path(place))
        click.echo("\ngrown      rows columns labels  encode s   items/s")
        for row in grown:
            click.echo(
                f"{row['grown']:8} {row['rows']:6} {row['columns']:7} {row['labels']:6} {row['encode']:9.2f} "
                f"{row['items_per_second']:9,.0f}"
            )
    out.mkdir(parents=True, exist_ok=True)
    machine = {
        "machine": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__, "ray": ray.__version__,
    }  # fmt: skip
    results = {**machine, "epochs": made, "seconds": phases, "growth": grown}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
