"""The commands `itemvec train` and `itemvec retrain`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import yaml

from itemvec.cli import registry_option
from training.config import ClusterConfig, TrainConfig, validated
from training.progress import Display


def _training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    file, folder = click.Path(dir_okay=False, path_type=Path), click.Path(file_okay=False, path_type=Path)
    for option in (
        click.option(
            "--ray-address", metavar="ADDRESS", help="An existing Ray cluster; `auto` for the one of this machine."
        ),
        click.option(
            "--device", default="auto", type=click.Choice(["auto", "cpu", "gpu"]),
            help="auto: GPUs, if the cluster has one for each worker.",
        ),
        click.option("--cpus-per-worker", default=1.0, show_default=True, type=click.FloatRange(0.01), metavar="N"),
        click.option(
            "--workers", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Ray Train workers."
        ),
        click.option(
            "--runs", type=folder,
            help="Where a run keeps its files until it is published; for workers on several machines, storage that "
            "they share.  [default: beside the registry]",
        ),
        click.option(
            "--set", "settings", multiple=True, metavar="NAME=VALUE",
            help="Any setting, such as corruption.mask=0.3; may be repeated.",
        ),
        click.option("--seed", type=click.IntRange(0), metavar="N"),
        click.option("--dim", type=click.IntRange(2, 4096), metavar="N", help="Numbers in an embedding."),
        click.option(
            "--epochs", type=click.IntRange(1), metavar="N",
            help="The most; training stops before when the validation rows gain nothing.",
        ),
        click.option(
            "--config", "config_file", type=file, help="YAML with settings; training/config.py says what they are."
        ),
        click.option("--name", help="The model's name.  [default: the schema's]"),
    ):  # fmt: skip
        command = option(command)
    return registry_option(command)


@click.command()
@click.argument("table")
@click.option(
    "--schema",
    "schema_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What the columns are; `itemvec schema infer` writes a first one.",
)
@click.option("--promote", is_flag=True, help="Make the new version the champion. The first version always is.")
@_training_options
def train(
    table: str, schema_file: Path, promote: bool, registry: str, name: str | None, runs: Path | None, **options: Any
) -> None:
    """Train a model version on TABLE (Parquet, CSV, JSON Lines; a path or URL) and publish it.

    It becomes the `challenger`, or the `champion` with --promote. One row in ten is held out, always the same ones, and
    evaluation.json in the version says how well the model does on them. A run that was killed goes on where it was when
    the same command is given again.

    \b
      itemvec train items.parquet --schema items.schema.yaml
      itemvec train items.parquet --schema items.schema.yaml --epochs 20 --set corruption.mask=0.3
    """
    from itemvec.registry import Registry
    from itemvec.schema import FeatureSchema
    from training.run import Job, alias_of_new
    from training.run import train as run_train

    _leave_a_core()
    schema = FeatureSchema.load(schema_file)
    if name is not None:
        schema = FeatureSchema.from_yaml(schema.model_copy(update={"name": name}).to_yaml(), "--name")
    job = Job(table, schema, Registry(registry), _runs(runs, registry), _config(options)({}), _cluster(options))
    with Display() as display:
        trained = run_train(job, display)
        version = trained.publish(alias := alias_of_new(job, promote=False))
        if promote:
            job.registry.promote(job.name, version)
            alias = "champion"
        _summary(display, trained.evaluation)
        display.line(f"published {job.name}@{version} ({alias}) in {registry}")


@click.command()
@click.argument("table")
@click.option(
    "--schema", "schema_file", type=click.Path(dir_okay=False, path_type=Path), help="[default: the champion's]"
)
@click.option(
    "--url",
    envvar="ITEMVEC_URL",
    help="The service that is to switch; without it only the registry's alias moves.  [env: ITEMVEC_URL]",
)
@click.option("--key", envvar="ITEMVEC_KEY", help="Bearer key, where the service asks for one.  [env: ITEMVEC_KEY]")
@click.option(
    "--gate",
    multiple=True,
    metavar="NAME=VALUE",
    help="What the gate allows: retrieval, column, rows or rank; may be repeated.",
)
@click.option("--force", is_flag=True, help="Train even if the table, the schema and the config are the champion's.")
@_training_options
def retrain(
    table: str, schema_file: Path | None, url: str | None, key: str | None, gate: tuple[str, ...], force: bool,
    registry: str, name: str | None, runs: Path | None, **options: Any,
) -> None:  # fmt: skip
    """Train again on TABLE, and switch to the new version if it is no worse than the champion.

    Both are measured on the same held-out rows. If a check fails nothing is published, the champion goes on serving,
    and the exit status is 3. Does nothing if nothing changed since the champion; never runs twice at once. What is not
    given here is as the champion was trained.

    As a line of a crontab, every night at 3:17:

    \b
      17 3 * * * cd /srv/itemvec && .venv/bin/itemvec retrain items.parquet --url http://127.0.0.1:8000
    """
    from itemvec.client import Client
    from itemvec.registry import Registry
    from itemvec.schema import FeatureSchema
    from training.retrain import GateConfig, job_like_champion
    from training.retrain import retrain as run_retrain

    _leave_a_core()
    schema = FeatureSchema.load(schema_file) if schema_file else None
    store = Registry(registry)
    job = job_like_champion(table, store, _runs(runs, registry), name, schema, _config(options), _cluster(options))
    limits = validated(GateConfig, dict(_pair(text) for text in gate), "--gate")
    with Display() as display:
        if url is None:
            run_retrain(job, limits, display, force=force)
        else:
            with Client(url, key) as service:
                run_retrain(job, limits, display, service, force)


def _leave_a_core() -> None:
    """A thread that waits for one whose core is taken stops them all, so arithmetic uses half of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))


def _config(options: dict[str, Any]) -> Callable[[dict[str, Any]], TrainConfig]:
    """Settings of the file, or else of the champion; over them those of the command line."""
    over: dict[str, Any] = dict(_pair(text) for text in options["settings"])
    for name, option in (("epochs", "epochs"), ("encoder.dim", "dim"), ("seed", "seed")):
        if options[option] is not None:
            over[name] = options[option]
    return lambda champion: TrainConfig.load(options["config_file"], over, champion)


def _cluster(options: dict[str, Any]) -> ClusterConfig:
    return ClusterConfig(
        workers=options["workers"],
        cpus_per_worker=options["cpus_per_worker"],
        device=options["device"],
        address=options["ray_address"],
    )


def _runs(runs: Path | None, registry: str) -> Path:
    return runs or (Path(".itemvec") if "://" in registry else Path(registry).parent) / "runs"


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{text!r} is not NAME=VALUE")
    return name.strip(), yaml.safe_load(value)


def _summary(display: Display, evaluation: dict[str, Any]) -> None:
    rows, space = evaluation["rows"], evaluation["space"]
    display.line(f"on {rows['measured']:,} rows that were held out ({rows['train']:,} trained on):")
    for name, column in evaluation["columns"].items():
        figures = (f"{key} {column[key]:.3f}" for key in ("score", "inferred", "majority") if column[key] is not None)
        display.line(f"  {name}: {column['metric']} {', '.join(figures)}")
    mean = evaluation["retrieval"]["mean"]
    if mean:
        best = max(mean["pca"], mean["pca_unit_variance"])
        display.line(
            f"  neighbors that share a hidden column: {mean['precision']:.3f}, PCA {best:.3f}, "
            f"by chance {mean['base_rate']:.3f}"
        )
    display.line(f"  effective rank {space['effective_rank']:.1f}, mean cosine {space['mean_cosine']:.3f}")
