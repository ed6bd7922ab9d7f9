"""The commands `itemvec train`, `itemvec retrain` and `itemvec evaluate`."""

import json
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
        click.option(
            "--interactions", metavar="TABLE",
            help="Who liked what (columns user_id and item_id, or as --set interactions.user=... says): items that the "
            "same users like become similar.",
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
@click.option(
    "--from",
    "follows",
    metavar="REF",
    help="Start from the weights of a version (`movies@3`): known labels keep what was learned of them.",
)
@_training_options
def train(
    table: str, schema_file: Path, promote: bool, follows: str | None, registry: str, name: str | None,
    runs: Path | None, interactions: str | None, **options: Any,
) -> None:  # fmt: skip
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
    store, config = Registry(registry), _config(options)({})
    job = Job(
        table, schema, store, _runs(runs, registry), config, _cluster(options), interactions,
        None if follows is None else _followed(store, follows, schema.name, config),
    )  # fmt: skip
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
    registry: str, name: str | None, runs: Path | None, interactions: str | None, **options: Any,
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
    job = job_like_champion(
        table, store, _runs(runs, registry), name, schema, _config(options), _cluster(options), interactions
    )
    limits = validated(GateConfig, dict(_pair(text) for text in gate), "--gate")
    with Display() as display:
        if url is None:
            run_retrain(job, limits, display, force=force)
        else:
            with Client(url, key) as service:
                run_retrain(job, limits, display, service, force)


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("table")
@click.option(
    "--out", default="evaluation", show_default=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where evaluation.json and report.html are written.",
)  # fmt: skip
@click.option("--interactions", metavar="TABLE", help="Who liked what: adds how well new items are recommended.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="How that table is read, such as interactions.user=viewer; may be repeated.  [default: as in training]",
)  # fmt: skip
@registry_option
def evaluate(
    model: str, table: str, out: Path, interactions: str | None, settings: tuple[str, ...], registry: str
) -> None:
    """Measure MODEL (`movies`, `movies@3`, `movies@challenger`) on TABLE, and write a report that people can read.

    The rows are those that training holds out, by a hash of their id, so that versions can be compared on the same
    table. Training writes the same report into each version.

    \b
      itemvec evaluate movies@challenger items.parquet --out challenger
      itemvec evaluate movies items.parquet --interactions likes.parquet --set interactions.user=viewer
    """
    from itemvec.registry import Registry
    from training.evaluate import evaluate_version, write_report
    from training.run import one_thread

    _leave_a_core()
    with Display() as display:
        display.say("read", f"reading {model} and {table}")
        store = Registry(registry)
        version = store.load(model)
        display.say("evaluate", f"evaluating {version.ref} on {table}")
        with one_thread():
            likes_of = _likes_of(interactions, settings, version.manifest.lineage.config) if interactions else None
            evaluation, exhibits = evaluate_version(version, table, store, likes_of)
        display.end_phase()
        evaluation["seconds"] = dict(display.timings)
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps(evaluation, indent=1, ensure_ascii=False)
        (out / "evaluation.json").write_text(content, encoding="utf-8")
        write_report(out, version.ref, evaluation, exhibits)
        _summary(display, evaluation)
        display.line(f"wrote {out / 'report.html'}")


def _followed(store: Any, ref: str, name: str, config: TrainConfig) -> int:
    """The version that `ref` names. Raises ConfigError where a run with `config` cannot start from it."""
    from itemvec.errors import ConfigError
    from training.warm import why_anew

    other, version = store.resolve(ref)
    if other != name:
        raise ConfigError(f"--from {ref} is a version of {other}, and this is {name}: name one of {name}")
    if why := why_anew(store.manifest(name, version), config):
        raise ConfigError(f"cannot start --from {ref}: {why}; `itemvec models show {ref}` has its settings")
    found: int = version
    return found


def _likes_of(url: str, settings: tuple[str, ...], trained: dict[str, Any]) -> Callable[..., Any]:
    """Reads the likes at `url` as the version's training read them, or as `settings` say."""
    from training.interactions import Interactions

    as_trained = {"interactions": trained.get("interactions", {})}
    how = TrainConfig.load(None, dict(_pair(text) for text in settings), as_trained)
    return lambda ids, fold: Interactions.read(url, how.interactions, ids, fold).likes


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


def _figures(column: dict[str, Any]) -> str:
    keys = ("score", "pca", "majority", "inferred")
    return ", ".join(f"{key} {column[key]:.3f}" for key in keys if column[key] is not None)


def _summary(display: Display, evaluation: dict[str, Any]) -> None:
    from training.findings import NAMES, best_rival

    rows, space = evaluation["rows"], evaluation["space"]
    display.line(f"on {rows['measured']:,} rows that were held out ({rows['train']:,} trained on):")
    for name, column in evaluation["columns"].items():
        told = [f"{column['metric']} {_figures(column)}"]
        if "r_precision" in column:
            told.append(f"R-precision {_figures(column['r_precision'])}")
        display.line(f"  {name}: {'; '.join(told)}")
    mean = evaluation["retrieval"]["mean"]
    if mean:
        baseline, best = best_rival(mean)
        display.line(
            f"  neighbors that share a hidden column: {mean['precision']:.3f}, {NAMES[baseline]} {best:.3f}, "
            f"by chance {mean['base_rate']:.3f}"
        )
    display.line(f"  effective rank {space['effective_rank']:.1f}, mean cosine {space['mean_cosine']:.3f}")
