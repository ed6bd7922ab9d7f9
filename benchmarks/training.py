"""What Ray, shards and checkpoints cost a training: `python -m benchmarks.training --out DIR` prints tables and leaves
results.json.

Epochs: items a second of `itemvec train`'s loop on one Ray worker, which reads a memory-mapped table, against a bare
PyTorch loop over the same tensors in memory: same network, losses, noise, optimizer and batch size, one thread each.
Then two workers at the same global batch. Seconds: those of a whole run by phase. Growth: seconds of encoding and items
a second of an epoch as rows, columns and labels grow. Copy: seconds until a table of ten Parquet files is the mapped
copy that training reads, by the driver alone, by tasks of the cluster, and by Ray Data. Embed: items a second of
`itemvec embed-table` against a loop that only encodes. Peer: seconds of training until what is read back is as good as
at the best epoch of pytorch-tabular's denoising autoencoder, on the columns of the films that it can read. The table is
examples/movies.parquet, repeated with fresh ids.

Large, only if `--only` names it: `itemvec train` of `--rows` made-up films, and the memory of all its processes; and
again, from what the first run encoded.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import torch

from benchmarks._copying import copy
from benchmarks._large import watched, write_films
from itemvec.encoder import Decoder, ItemEncoder
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion
from training import cluster
from training.config import ClusterConfig, TrainConfig
from training.data import TENSORS, EncodedTable, Prepared, corrupt
from training.embed_table import BLOCK, QUIET, embed_table
from training.folds import TEST, TRAIN, fold_of
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
    click.echo(f"epochs over {rows:,} films, items a second")
    schema, config = FeatureSchema.load(EXAMPLES / "movies.schema.yaml"), settings(count)
    rates: dict[str, list[float]] = {"bare": [], "one worker": [], "two workers": []}
    losses: dict[str, float] = {}
    with cluster.connected(ClusterConfig()):
        for turn in range(turns):
            place = folder / f"turn-{turn}"
            data = Prepared.make(films(rows), schema, config, place)
            found = bare(data, config)
            rates["bare"] += found[1:]
            click.echo(f"  turn {turn + 1}, bare: {_listed(found)}")
            for workers, name in ((1, "one worker"), (2, "two workers")):
                again = folder / f"turn-{turn}-{workers}"
                Prepared.make(films(rows), schema, config, again)
                made = on_ray(again, config, workers)
                rates[name] += made["rates"][1:]
                click.echo(f"  turn {turn + 1}, {name}: {_listed(made['rates'])}")
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
    with Display() as display:
        trained = train(job, display)
    publishing = time.perf_counter()
    trained.publish("champion")
    ended = time.perf_counter()
    return {**trained.evaluation["seconds"], "publish": ended - publishing, "all": ended - began}


def growth(rows: int, folder: Path) -> list[dict[str, Any]]:
    """One epoch of the loop in this process, on made-up columns of labels."""
    found = []
    grow = {
        "rows": [{"rows": rows * factor, "columns": 4, "labels": 1_000} for factor in (1, 4, 16)],
        "columns": [{"rows": rows, "columns": columns, "labels": 1_000} for columns in (4, 8, 16, 32)],
        "labels": [{"rows": rows * 4, "columns": 4, "labels": rows // 20 * factor} for factor in (1, 8, 64)],
    }
    click.echo("\ngrown      rows columns  labels   all labels  encode s   items/s")
    for grown, sizes in grow.items():
        for size in sizes:
            names = [f"c{c}" for c in range(size["columns"])]
            labels = np.random.default_rng(0).integers(size["labels"], size=(len(names), size["rows"])).astype(str)
            ids = [str(i) for i in range(size["rows"])]
            table = pa.table({"id": ids, **dict(zip(names, map(pa.array, labels.tolist()), strict=True))})
            features = ", ".join(f"{name}: {{kind: nominal}}" for name in names)
            schema = FeatureSchema.from_yaml(f"name: grown\nid: id\nfeatures: {{{features}}}")
            config, began = settings(1), time.perf_counter()
            data = Prepared.make(table, schema, config, folder / f"{grown}-{size[grown]}")
            encoded, learned = time.perf_counter() - began, data.layout.table_rows
            [metrics] = Trainer(data, config, CPU).epochs()
            rate = metrics["items_per_second"]
            found.append({"grown": grown, **size, "table_rows": learned, "encode": encoded, "items_per_second": rate})
            click.echo(
                f"{grown:8} {size['rows']:6} {size['columns']:7} {size['labels']:7} {learned:12,} {encoded:9.2f} "
                f"{rate:9,.0f}"
            )
    return found


def embed(rows: int, folder: Path) -> dict[str, Any]:
    """Items a second of the film model, one thread a process: encoding alone, and `itemvec embed-table`, which reads
    and writes Parquet: by what all rows take longer than a third of them, so that the start of actors is told apart."""
    third, table, registry = folder / "a-third.parquet", folder / "all.parquet", Registry(folder / "embed")
    for path, count in ((third, rows // 3), (table, rows)):
        write_films(pq.read_table(EXAMPLES / "movies.parquet"), count, path)
    schema, config = FeatureSchema.load(EXAMPLES / "movies.schema.yaml"), settings(1)
    data = Prepared.make(films(2_000), schema, config, folder / "embed-model")
    trainer = Trainer(data, config, CPU)
    list(trainer.epochs())
    lineage = Lineage(table="films", table_sha256="", table_rows=2_000, train_rows=1_700, config={})

    def write(place: Path, version: int) -> None:
        networks = trainer.task.encoder.eval(), trainer.task.decoder.eval()
        ModelVersion.make("films", version, data.transform, *networks, {}, lineage).save(place, [])

    registry.publish("films", write, "champion")
    model, read, rates = registry.load("films"), pq.read_table(third), dict[str, float]()
    click.echo(f"\nembedding {rows:,} films, items a second")

    def alone() -> None:
        began = time.perf_counter()
        for start in range(0, read.num_rows, BLOCK):
            model.encode_arrow(read.slice(start, BLOCK))
        rate = read.num_rows / (time.perf_counter() - began)
        rates["encoding alone"] = max(rates.get("encoding alone", 0.0), rate)
        click.echo(f"{'encoding alone':16} {rate:9,.0f}")

    alone()
    with cluster.environment(QUIET), cluster.connected(ClusterConfig()):
        for workers in (1, 2):
            some, every = (
                embed_table(str(path), registry, "films", folder / f"{path.stem}-{workers}", workers, "auto")
                for path in (third, table)
            )
            rate = (every.items - some.items) / (every.seconds - some.seconds)
            start = some.seconds - some.items / rate
            rates[f"{workers} actors"] = rate
            click.echo(f"{f'{workers} actors':16} {rate:9,.0f}, and {start:.1f} s to start them")
            alone()
    return {"rows": rows, "items_per_second": rates}


LABELS, NUMBERS = ("age_rating", "genres", "languages", "countries", "studios"), ("release_year", "runtime_minutes")


def plain_films() -> pa.Table:
    """What both trainers can read: a label a column, the first of a set, and numbers that are always there. Rare labels
    are one."""
    once = pq.read_table(EXAMPLES / "movies.parquet")
    made = {"id": once.column("id").cast(pa.string())}
    for name in LABELS:
        cells = once.column(name).to_pylist()
        labels = [(cell[0] if cell else None) if isinstance(cell, list) else cell for cell in cells]
        counts = Counter(labels)
        made[name] = [label or "none" if counts[label] > 4 else "other" for label in labels]
    for name in NUMBERS:
        column = once.column(name).cast(pa.float64())
        made[name] = pc.fill_null(column, pc.mean(column))
    return pa.table(made)


@torch.no_grad()
def read_back_loss(trainer: Trainer, items: torch.Tensor) -> float:
    """The mean over the columns of labels of the cross-entropy of what is read back of undamaged items, in nats."""
    task, total = trainer.task.eval(), 0.0
    clean = trainer.data.table.clean(items)
    hidden = task.decoder(task.encoder(*clean))
    rows = clean[1].view(len(items), -1)  # (items, columns): one label each
    for f, slot in enumerate(trainer.data.layout.bags):
        logits = task.decoder.rows(hidden, slice(slot.base, slot.base + slot.rows))
        total += float(torch.nn.functional.cross_entropy(logits, rows[:, f] - slot.base))
    return total / len(trainer.data.layout.bags)


SWAPPED = 0.15
"""The peer's share of numbers of an item that another item's take the place of. It counts each number of a one-hot
column by itself: a label becomes another one with SWAPPED^2, is gone with SWAPPED (1 - SWAPPED), and as often there is
another one beside it. Ours replaces whole labels. What stands beside another is taken for gone here, which is harder to
read back."""


def peer(python: str, count: int, folder: Path) -> dict[str, Any]:
    """Seconds of training and loss after each epoch, of pytorch-tabular and of our loop: the same widths, batch size
    and epochs, and noise that is no easier for us; all else at the defaults of each, but nothing that we learn besides
    reading back."""
    table = plain_films()
    config = TrainConfig.load(
        None,
        {
            "epochs": count, "patience": count, "contrast.weight": 0, "encoder.dropout": 0,
            "encoder.decoder_hidden": [256],
            "corruption": {
                "swap": SWAPPED**2, "mask": 2 * SWAPPED * (1 - SWAPPED), "thin": 0, "unseen": 0, "whole": 0,
            },
        },
    )  # fmt: skip
    fold = fold_of(table.column("id").to_pylist(), config.test, config.validation)
    for name, which in (("train", TRAIN), ("held", TEST)):
        pq.write_table(table.drop_columns(["id"]).filter(pa.array(fold == which)), folder / f"{name}.parquet")
    program = Path(__file__).parent / "peers" / "tabular.py"
    arguments = ["train.parquet", "held.parquet", str(count), "256-64", str(SWAPPED)]
    theirs, ours = list[dict[str, float]](), list[dict[str, float]]()
    click.echo("\nread-back loss after seconds of training")
    with subprocess.Popen(
        [python, "-W", "ignore", program, *arguments], cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=(folder / "peer.log").open("w"), text=True,
    ) as process:  # fmt: skip
        for line in process.stdout or ():
            if line.startswith('{"seconds"'):
                theirs.append(json.loads(line))
                click.echo(
                    f"  pytorch-tabular, epoch {len(theirs)}: {theirs[-1]['loss']:.3f} {theirs[-1]['seconds']:.1f} s"
                )
    if process.returncode:
        raise click.ClickException(f"{program} failed: {(folder / 'peer.log').read_text()[-2000:]}")

    kinds = {**dict.fromkeys(LABELS, "nominal"), **dict.fromkeys(NUMBERS, "numeric")}
    features = ", ".join(f"{name}: {{kind: {kind}}}" for name, kind in kinds.items())
    schema = FeatureSchema.from_yaml(f"name: films\nid: id\nfeatures: {{{features}}}")
    began = time.perf_counter()
    trainer = Trainer(Prepared.make(table, schema, config, folder / "peer"), config, CPU)
    started, seconds = time.perf_counter() - began, 0.0
    for metrics in trainer.epochs():
        seconds += metrics["seconds"]
        ours.append({"seconds": seconds, "loss": read_back_loss(trainer, trainer.data.items(TEST))})
        click.echo(f"  itemvec, epoch {len(ours)}: {ours[-1]['loss']:.3f} {seconds:.1f} s")
    aim = min(epoch["loss"] for epoch in theirs)
    reached = {
        name: next((epoch["seconds"] for epoch in epochs if epoch["loss"] <= aim), None)
        for name, epochs in (("pytorch-tabular", theirs), ("itemvec", ours))
    }
    return {"loss": aim, "seconds": reached, "start": started, "pytorch-tabular": theirs, "itemvec": ours}


def large(rows: int, folder: Path) -> dict[str, Any]:
    """Two runs of `itemvec train` on one table, by 300 steps of 1,024 items an epoch."""
    write_films(pq.read_table(EXAMPLES / "movies.parquet"), rows, folder / "large.parquet")
    command = [
        sys.executable, "-m", "itemvec", "train", str(folder / "large.parquet"),
        "--schema", str(EXAMPLES / "movies.schema.yaml"), "--registry", str(folder / "large"), "--epochs", "2",
        "--set", "batch_size=1024", "--set", "epoch_steps=300",
    ]  # fmt: skip
    first = watched(command, folder / "large.log")
    return {"rows": rows, "first": first, "second": watched([*command, "--seed", "1"], folder / "large.log")}


def _listed(rates: list[float]) -> str:
    return ", ".join(f"{rate:,.0f}" for rate in rates)


SECTIONS = ("epochs", "seconds", "growth", "copy", "embed", "peer", "large")


@click.command()
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for results.json.")
@click.option("--quick", is_flag=True, help="Fewer rows and epochs: whether it runs, and the order of things.")
@click.option("--only", help=f"Sections, with commas, of {', '.join(SECTIONS)}.  [default: all but large]")
@click.option("--rows", default=20_000_000, show_default=True, help="Of `large`.")
@click.option("--peer-python", help="The interpreter of an environment with benchmarks/requirements.txt, for `peer`.")
def main(out: Path, quick: bool, only: str | None, rows: int, peer_python: str | None) -> None:
    torch.set_num_threads(1)
    of_epoch, count, turns = (2_000, 3, 1) if quick else (20_000, 4, 2)
    wanted = only.split(",") if only else [name for name in SECTIONS[:-1] if name != "peer" or peer_python]
    results: dict[str, Any] = {
        "machine": platform.platform(), "cores": os.cpu_count(), "python": platform.python_version(),
        "torch": torch.__version__, "ray": ray.__version__,
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as name:
        place = Path(name).resolve()
        if "epochs" in wanted:
            results["epochs"] = show_epochs(epochs(of_epoch, count, turns, place))
        if "seconds" in wanted:
            results["seconds"] = outside(of_epoch, count, place)
            told = "\n".join(f"{phase:12} {taken:8.1f}" for phase, taken in results["seconds"].items())
            click.echo(f"\na whole run over {of_epoch:,} films, seconds\n{told}")
        if "growth" in wanted:
            results["growth"] = growth(of_epoch, place)
        if "copy" in wanted:
            copied, schema = 225 * of_epoch, FeatureSchema.load(EXAMPLES / "movies.schema.yaml")
            click.echo(f"\ncopying {copied:,} films")
            results["copy"] = copy(EXAMPLES / "movies.parquet", schema, copied, 1 if quick else 3, place)
        if "embed" in wanted:
            results["embed"] = embed(30 * of_epoch if not quick else 200_000, place)
        if "peer" in wanted:
            if peer_python is None:
                raise click.UsageError("peer needs --peer-python")
            results["peer"] = show_peer(peer(peer_python, 4 if quick else 12, place))
        if "large" in wanted:
            results["large"] = large(rows, place)
            click.echo(json.dumps(results["large"], indent=1))
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def show_epochs(made: dict[str, Any]) -> dict[str, Any]:
    for name, rate in made["items_per_second"].items():
        click.echo(f"{name:12} {rate:9,.0f} {rate / made['items_per_second']['bare']:6.0%}")
    click.echo(f"loss: {', '.join(f'{name} {loss:.4f}' for name, loss in made['loss'].items())}")
    return made


def show_peer(made: dict[str, Any]) -> dict[str, Any]:
    click.echo(f"\nseconds of training to a read-back loss of {made['loss']:.3f}")
    for name, taken in made["seconds"].items():
        last = made[name][-1]
        reached = "never" if taken is None else f"{taken:.1f}"
        click.echo(f"{name:16} {reached:>6}   {len(made[name])} epochs: {last['seconds']:.1f} s, {last['loss']:.3f}")
    return made


if __name__ == "__main__":
    main()
