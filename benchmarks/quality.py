"""How good the embeddings are: `python -m benchmarks.quality --data DATA --out DIR` prints tables beside baselines and
leaves results.json, quality.png, cold_start.parquet and attribute.parquet (id, embedding).

cold start      films that nobody rated yet, recommended by what users liked; warm ratings only are learned from
attribute       genres are held out of the columns, and there are no ratings: do the vectors know them?
reconstruction  what can be read back of artworks from 16 and 32 numbers

DATA holds movies.parquet, movie_ratings.parquet and tate_artworks.parquet. Models are trained by the Trainer that a Ray
worker runs, but in this process: Ray would add 15 s to each and change nothing of what is learned. One thread.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks import _artworks, _films
from itemvec.schema import FeatureSchema
from training.baselines import dense_cosines
from training.config import TrainConfig
from training.data import Prepared
from training.folds import TEST, TRAIN
from training.interactions import Interactions
from training.judged import Judged, judged
from training.loop import Trainer
from training.run import best_of, settle
from training.start import gains_from

OURS = "itemvec"

COLD_START = {
    "test": _films.COLD,
    "contrast.weight": 0.1,
    "contrast.temperature": 0.2,
    "co_engage.popularity_correction": 0.75,
    "interactions.weight": "rating",
    "interactions.least": _films.LIKED,
    "optimizer.learning_rate": 0.001,
    "optimizer.table_learning_rate": 0.001,
    "epochs": 4,
}
"""Rates, epochs and correction were compared on warm films, a fifth of which was held out for it. Likes are few, 13
ratings a film: steps are short, above all those of the table of labels, or it learns by heart which actor was in a film
that was liked."""

ATTRIBUTE = {"test": 0.0}

RECONSTRUCTION = {
    "test": _artworks.HELD_OUT,
    "validation": 0.02,
    "encoder.hidden": [512],
    "encoder.decoder_hidden": [512],
    "encoder.dropout": 0.0,
    "contrast.weight": 0,
    **{f"corruption.{kind}": 0.0 for kind in ("swap", "mask", "thin", "unseen")},
    "epochs": 16,
}
"""An autoencoder and nothing else: no damage, no contrast, a decoder as wide as the encoder. Widths, epochs and the
weights of columns were once compared on the rows that are held out."""

Row = dict[str, Any]
"""method, figures; and of our models seed and seconds of preparing and training."""


@contextmanager
def trained(
    table: pa.Table, schema: FeatureSchema, config: TrainConfig, likes: Path | None = None
) -> Iterator[tuple[Judged, npt.NDArray[np.int8]]]:
    """A model, and the folds (n,) of the rows, while its encoded table is on disk. `likes` is a table of ratings."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        data = Prepared.make(table, schema, config, folder)
        if likes is not None:
            ids = [str(i) for i in table.column(schema.id).to_pylist()]
            interactions = Interactions.read(str(likes), config.interactions, ids, data.fold)
            data = data.with_likes(interactions, gains_from(interactions, data, config.seed), folder)
        trainer = Trainer(data, config, torch.device("cpu"))
        for _ in trainer.epochs():
            pass
        encoder, decoder = best_of(trainer.state(), config, data)
        settle(encoder, decoder, data)
        yield judged(data, encoder, decoder), data.fold


@torch.inference_mode()
def vectors_of(model: Judged) -> _films.Floats:
    """(n, dim) of the whole table."""
    parts = torch.split(torch.arange(model.table.n), 4096)
    return np.concatenate([model.encoder(*model.table.clean(part)).numpy() for part in parts])


def cold_start(data: Path, out: Path, seeds: int) -> list[Row]:
    films = _films.Films.read(data)
    task = _films.ColdStart(films)
    rows = [baseline(name, found) for name, found in _films.cold_start_baselines(films)]
    with tempfile.TemporaryDirectory() as folder:
        likes = Path(folder) / "warm.parquet"
        pq.write_table(_films.warm_ratings(data), likes)  # all that anything of ours ever reads of the ratings
        for seed in range(seeds):
            began = time.perf_counter()
            config = TrainConfig.load(None, {**COLD_START, "seed": seed})
            with trained(films.table, _films.schema(), config, likes) as (model, _):
                vectors = vectors_of(model)
            rows.append(ours(seed, task.score(dense_cosines(vectors)), began))
            if seed == 0:
                _films.write(out / "cold_start.parquet", films.ids, vectors)
    return rows


def attribute(data: Path, out: Path, seeds: int) -> list[Row]:
    films = _films.Films.read(data)
    task = _films.Genres(films)
    rows = [baseline(name, found) for name, found in _films.attribute_baselines(films)]
    for seed in range(seeds):
        began = time.perf_counter()
        config = TrainConfig.load(None, {**ATTRIBUTE, "seed": seed})
        with trained(films.table, _films.schema(without="genres"), config) as (model, _):
            vectors = vectors_of(model)
        rows.append(ours(seed, task.score(dense_cosines(vectors), vectors), began))
        if seed == 0:
            _films.write(out / "attribute.parquet", films.ids, vectors)
    return rows


def reconstruction(data: Path, out: Path, seeds: int) -> list[Row]:
    """One split and one seed, for each dim."""
    table = _artworks.read(data)
    rows = []
    for dim in _artworks.DIMS:
        began = time.perf_counter()
        config = TrainConfig.load(None, {**RECONSTRUCTION, "encoder.dim": dim})
        with trained(table, _artworks.SCHEMA, config) as (model, fold):
            held, fit = np.flatnonzero(fold == TEST), np.flatnonzero(fold == TRAIN)
            truth, kinds = _artworks.truth_of(model, held), _artworks.kinds_of(model)
            found = _artworks.figures(_artworks.read_back(model, held), truth, kinds)
            rows.append({**ours(0, found, began), "method": f"{OURS} {dim}"})
            for name, way in (("PCA", _artworks.components), ("autoencoder", _artworks.autoencoder)):
                rows.append(baseline(f"{name} {dim}", _artworks.figures(way(model, fit, held, dim), truth, kinds)))
    return rows


TASKS = {"cold_start": cold_start, "attribute": attribute, "reconstruction": reconstruction}


def baseline(method: str, figures: dict[str, float]) -> Row:
    return {"method": method, "figures": figures}


def ours(seed: int, figures: dict[str, float], began: float) -> Row:
    click.echo(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), err=True)
    return {"method": OURS, "figures": figures, "seed": seed, "seconds": round(time.perf_counter() - began, 1)}


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row for each method: of each figure the median, least and most over its seeds.

    >>> rows = [{"method": "m", "figures": {"AUC": auc}, "seed": seed} for seed, auc in enumerate([0.7, 0.9, 0.8])]
    >>> summary(rows)
    [{'method': 'm', 'figures': {'AUC': (0.8, 0.7, 0.9)}}]
    """
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row["figures"] for row in rows if row["method"] == method]
        found = {name: [figures[name] for figures in mine] for name in mine[0]}
        out.append(
            {"method": method, "figures": {name: (statistics.median(v), min(v), max(v)) for name, v in found.items()}}
        )
    return out


def show(task: str, rows: Sequence[Row]) -> None:
    told = summary(rows)
    names = figure_names(told)
    click.echo(f"\n{task.replace('_', ' ')}\n{'':42}" + "".join(f"{name:>24}" for name in names))
    for row in told:
        cells = [written(*row["figures"][name]) if name in row["figures"] else "" for name in names]
        click.echo(f"{row['method']:42}" + "".join(f"{cell:>24}" for cell in cells))
    if seconds := [row["seconds"] for row in rows if "seconds" in row]:
        click.echo(f"{OURS}: {statistics.median(seconds):.0f} s a model, prepared and trained")


def written(median: float, least: float, most: float) -> str:
    """
    >>> written(0.8, 0.7, 0.9), written(0.8, 0.8, 0.8)
    ('0.800 (0.700 to 0.900)', '0.800')
    """
    return f"{median:.3f}" if least == most else f"{median:.3f} ({least:.3f} to {most:.3f})"


def draw(results: dict[str, list[Row]], path: Path) -> None:
    """A panel for each figure of each task: medians as dots, ours in color with a line from least to most."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - takes a second to import

    told = {task: summary(rows) for task, rows in results.items()}
    heights = [1.0 + 0.2 * len(rows) for rows in told.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    parts = np.atleast_1d(figure.subfigures(len(told), 1, height_ratios=heights))
    for part, (task, rows) in zip(parts, told.items(), strict=True):
        names = figure_names(rows)
        part.suptitle(task.replace("_", " "), x=0.01, ha="left", weight="bold")
        panels = part.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axes, name in zip(panels, names, strict=True):
            for at, row in enumerate(rows):
                if name in row["figures"]:
                    median, least, most = row["figures"][name]
                    color = "tab:blue" if row["method"].startswith(OURS) else "gray"
                    axes.plot([least, most], [at, at], color=color)
                    axes.plot(median, at, "o", color=color)
                    axes.text(most, at, f"  {median:.3f}", va="center", fontsize="x-small", color=color)
            axes.set_title(name, fontsize="small")
            axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
            axes.tick_params(labelsize="x-small")
            axes.grid(axis="y", linewidth=0.3)
            axes.margins(x=0.2)
        panels[0].invert_yaxis()  # shared: the first row of the table is on top
    figure.savefig(path, dpi=130)


def figure_names(rows: Sequence[Row]) -> list[str]:
    """Some methods lack a figure; none has one that all others lack."""
    return list(max((row["figures"] for row in rows), key=len))


@click.command()
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False, exists=True), required=True, help="Folder of the tables."
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder for what is found."
)
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Models a task on films.")
@click.option(
    "--only", type=click.Choice(list(TASKS)), multiple=True, help="A task; may be given again.  [default: all]"
)
def main(data: Path, out: Path, seeds: int, only: tuple[str, ...]) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for task in only or TASKS:
        results[task] = TASKS[task](data, out, seeds)
        show(task, results[task])
    draw(results, out / "quality.png")
    settings = {"cold_start": COLD_START, "attribute": ATTRIBUTE, "reconstruction": RECONSTRUCTION}
    found = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    (out / "results.json").write_text(
        json.dumps({**found, "settings": {task: settings[task] for task in results}, "rows": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
