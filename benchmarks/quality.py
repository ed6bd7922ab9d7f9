"""How good the embeddings are: `python -m benchmarks.quality --data DATA --out DIR` prints tables beside baselines and
leaves results.json, quality.png, cold_start.parquet and attribute.parquet (id, embedding).

cold start      films that nobody rated yet, recommended by what users liked; warm ratings only are learned from
attribute       genres are held out of the columns, and there are no ratings: do the vectors know them?
reconstruction  what can be read back of artworks from 16 and 32 numbers

With `--inner` the settings of candidates.yaml are compared instead, without the rows that are judged.

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
from typing import Any, NamedTuple

import click
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

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

OURS, DEFAULTS = "itemvec", "itemvec, defaults"

LIKES = {"test": _films.COLD, "interactions.weight": "rating", "interactions.least": _films.LIKED}

COLD_START = {
    OURS: {
        **LIKES,
        "contrast.weight": 0.1,
        "contrast.temperature": 0.2,
        "co_engage.popularity_correction": 0.75,
        "optimizer.learning_rate": 0.001,
        "optimizer.table_learning_rate": 0.001,
        "epochs": 4,
    },
    DEFAULTS: LIKES,
}
"""Compared on warm films (`--inner`). Likes are few, 13 ratings a film: steps are short, above all those of the table
of labels, or it learns by heart which actor was in a film that was liked."""

ATTRIBUTE = {DEFAULTS: {"test": 0.0}}

RECONSTRUCTION = {
    OURS: {
        "test": _artworks.HELD_OUT,
        "validation": 0.02,
        "encoder.hidden": [512],
        "encoder.decoder_hidden": [512],
        "encoder.dropout": 0.0,
        "contrast.weight": 0,
        **{f"corruption.{kind}": 0.0 for kind in ("swap", "mask", "thin", "unseen")},
        "epochs": 16,
        "column_weights": {"subjects_l1": 2, "subjects_l2": 6, "subjects_l3": 6},
    },
    DEFAULTS: {"test": _artworks.HELD_OUT},
}
"""An autoencoder and nothing else: no damage, no contrast, a decoder as wide as the encoder. `column_weights` go into
the schema and follow how much there is to know: the loss of a column is measured against that of its best constant, and
a set of five among a hundred labels says more than a yes or no does."""

CANDIDATES = Path(__file__).with_name("candidates.yaml")
"""What `--inner` compares: per task and per model of ours the settings that are laid over its own, by a name."""

Settings = dict[str, dict[str, Any]]
"""Of each model of ours."""


class Asked(NamedTuple):
    data: Path
    out: Path
    seeds: int
    inner: bool
    """Whether settings are compared without the rows that are judged. Baselines are left out then."""

    def models(self, settings: Settings) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Name, seed and settings of all that are to be trained."""
        for method, given in settings.items():
            for seed in range(self.seeds):
                yield method, seed, {**given, "seed": seed}


Row = dict[str, Any]
"""method, figures; and of our models seed and seconds of preparing and training."""


@contextmanager
def trained(
    table: pa.Table, schema: FeatureSchema, given: dict[str, Any], likes: Path | None = None
) -> Iterator[tuple[Judged, npt.NDArray[np.int8]]]:
    """A model, and the folds (n,) of the rows, while its encoded table is on disk. `likes` is a table of ratings."""
    config = config_of(given)
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


def config_of(given: dict[str, Any]) -> TrainConfig:
    return TrainConfig.load(None, {name: value for name, value in given.items() if name != "column_weights"})


@torch.inference_mode()
def vectors_of(model: Judged) -> _films.Floats:
    """(n, dim) of the whole table."""
    parts = torch.split(torch.arange(model.table.n), 4096)
    return np.concatenate([model.encoder(*model.table.clean(part)).numpy() for part in parts])


def cold_start(asked: Asked, settings: Settings) -> Iterator[Row]:
    films = _films.Films.read(asked.data, asked.inner)
    task = _films.ColdStart(films)
    with tempfile.TemporaryDirectory() as folder:
        likes = Path(folder) / "warm.parquet"
        # All that anything of ours ever reads of the ratings.
        pq.write_table(_films.warm_ratings(asked.data, asked.inner), likes)
        for method, seed, given in asked.models(settings):
            began = time.perf_counter()
            with trained(films.table, _films.schema(), given, likes) as (model, _):
                vectors = vectors_of(model)
            yield ours(method, seed, task.score(dense_cosines(vectors)), began)
            if (method, seed) == (OURS, 0):
                _films.write(asked.out / "cold_start.parquet", films.ids, vectors)
    for name, found in () if asked.inner else _films.cold_start_baselines(films):
        yield baseline(name, found)


def attribute(asked: Asked, settings: Settings) -> Iterator[Row]:
    films = _films.Films.read(asked.data, asked.inner)
    task = _films.Genres(films)
    for method, seed, given in asked.models(settings):
        began = time.perf_counter()
        with trained(films.table, _films.schema(without="genres"), given) as (model, _):
            vectors = vectors_of(model)
        yield ours(method, seed, task.score(dense_cosines(vectors), vectors), began)
        if (method, seed) == (DEFAULTS, 0):
            _films.write(asked.out / "attribute.parquet", films.ids, vectors)
    for name, found in () if asked.inner else _films.attribute_baselines(films):
        yield baseline(name, found)


def reconstruction(asked: Asked, settings: Settings) -> Iterator[Row]:
    """One split and one seed, for each dim."""
    table = _artworks.read(asked.data, asked.inner)
    for dim in _artworks.DIMS:
        for method, given in settings.items():
            began = time.perf_counter()
            schema = _artworks.schema(given.get("column_weights", {}))
            with trained(table, schema, {**given, "encoder.dim": dim}) as (model, fold):
                held, fit = np.flatnonzero(fold == TEST), np.flatnonzero(fold == TRAIN)
                truth, kinds = _artworks.truth_of(model, held), _artworks.kinds_of(model)
                found = _artworks.figures(_artworks.read_back(model, held), truth, kinds)
                yield ours(f"{method} {dim}", 0, found, began)
                if method == OURS:  # the baselines are fitted on the rows that it was trained on
                    for name, way in (("PCA", _artworks.components), ("autoencoder", _artworks.autoencoder)):
                        found = _artworks.figures(way(model, fit, held, dim), truth, kinds)
                        yield baseline(f"{name} {dim}", found)


TASKS = {
    "cold_start": (cold_start, COLD_START),
    "attribute": (attribute, ATTRIBUTE),
    "reconstruction": (reconstruction, RECONSTRUCTION),
}


def baseline(method: str, figures: dict[str, float]) -> Row:
    return {"method": method, "figures": figures}


def ours(method: str, seed: int, figures: dict[str, float], began: float) -> Row:
    click.echo(
        f"{method}, seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()), err=True
    )
    return {"method": method, "figures": figures, "seed": seed, "seconds": round(time.perf_counter() - began, 1)}


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
@click.option(
    "--inner", is_flag=True, help="Compare the settings of candidates.yaml, without the rows that are judged."
)
def main(data: Path, out: Path, seeds: int, only: tuple[str, ...], inner: bool) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    asked = Asked(data, out, seeds, inner)
    settings = candidates() if inner else {task: of_ours for task, (_, of_ours) in TASKS.items()}
    results = {}
    for task in only or settings:
        results[task] = list(TASKS[task][0](asked, settings[task]))
        show(task, results[task])
    draw(results, out / "quality.png")
    found = {"machine": platform.platform(), "python": platform.python_version(), "torch": torch.__version__}
    (out / "results.json").write_text(
        json.dumps({**found, "settings": {task: settings[task] for task in results}, "rows": results}, indent=1) + "\n"
    )


def candidates() -> dict[str, Settings]:
    compared = yaml.safe_load(CANDIDATES.read_text(encoding="utf-8"))
    return {
        task: {
            f"{model}, {name}": {**TASKS[task][1][model], **given}
            for model, named in models.items()
            for name, given in named.items()
        }
        for task, models in compared.items()
    }


if __name__ == "__main__":
    main()
