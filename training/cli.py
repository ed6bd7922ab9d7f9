"""The commands of training: `itemvec train`, `retrain`, `schedule`, `tune`, `evaluate` and `embed-table`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
import yaml
from click.core import ParameterSource

from itemvec.cli import registry_option
from training.config import ClusterConfig, TrainConfig
from training.progress import Display

if TYPE_CHECKING:
    from itemvec.version import Lineage
    from training.evaluate import LikesOf

_workers_option = click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1), metavar="N", help="Ray Train workers."
)


_config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML with settings; docs/training.md lists them.",
)


def _training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    folder = click.Path(file_okay=False, path_type=Path)
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
            "--interactions", metavar="TABLE",
            help="Who liked what (columns user_id and item_id, or as --set interactions.user=... says): items that the "
            "same users like become similar.",
        ),
        click.option("--name", help="The model's name.  [default: the schema's]"),
    ):  # fmt: skip
        command = option(command)
    return registry_option(command)


schema_option = click.option(
    "--schema",
    "schema_file",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="What the columns are; `itemvec schema infer` writes a first one.",
)


@click.command()
@click.argument("table")
@schema_option
@click.option("--promote", is_flag=True, help="Make the new version the champion. The first version always is.")
@click.option(
    "--from",
    "follows",
    metavar="REF",
    help="Start from the weights of a version (`movies@3`): known labels keep what was learned of them.",
)
@_workers_option
@_config_option
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
    from training.run import Job, alias_of_new
    from training.run import train as run_train

    _leave_a_core()
    schema = _schema(schema_file, name)
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
@click.argument("table", required=False)
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML with all of this and more; docs/retraining.md lists it. What is given here goes over it.",
)
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
    help="What the gate allows, such as column=0.05 or latency=off; may be repeated.",
)
@click.option("--keep", type=click.IntRange(1), metavar="N", help="Newest versions that stay.  [default: 5]")
@click.option("--force", is_flag=True, help="Train even if the table, the schema and the config are the champion's.")
@_workers_option
@_training_options
def retrain(key: str | None, gate: tuple[str, ...], force: bool, **options: Any) -> None:
    """Train again on TABLE, and switch to the new version if it is no worse than the champion.

    Both are measured on the same held-out rows. If a check fails the champion goes on serving, and the exit status is
    3. Does nothing if nothing changed since the champion; never runs twice at once; goes on with a run that was killed.
    With a service, it gets the table's new and changed rows, and switches when its items are encoded. What is not given
    is as the champion was trained. TABLE may have a `*`: the last name in the order of the alphabet is the newest.

    `itemvec runs list` shows what each run came to.

    As a line of a crontab, every night at 3:17:

    \b
      17 3 * * * cd /srv/itemvec && .venv/bin/itemvec retrain --config retrain.yaml
    """  # fmt: skip
    from itemvec.client import Client
    from itemvec.errors import ConfigError
    from itemvec.registry import Registry
    from itemvec.schema import FeatureSchema
    from training.retrain import RetrainConfig, job_like_champion, newest
    from training.retrain import retrain as run_retrain

    _leave_a_core()
    over = {RETRAIN_SETTINGS[name]: options[name] for name in RETRAIN_SETTINGS if _is_given(name)}
    over |= {f"gate.{name}": value for name, value in map(_pair, gate)}
    config = RetrainConfig.load(options.pop("config_file"), over)
    if config.table is None:
        raise ConfigError("which table? Name it after `itemvec retrain`, or as `table` in the file of --config")
    if key is None and config.key_file is not None:
        key = _secret(config.key_file)
    registry = config.registry or options["registry"]
    store = Registry(registry)
    job = job_like_champion(
        newest(config.table), store, _runs(config.runs, registry), config.name,
        FeatureSchema.load(config.schema_file) if config.schema_file else None,
        lambda champion: TrainConfig.load(None, _over(options), champion if config.train is None else config.train),
        config.cluster, newest(config.interactions) if config.interactions else None,
    )  # fmt: skip
    with Display() as display:
        if config.url is None:
            run_retrain(job, config, display, force=force)
        else:
            with Client(config.url, key) as service:
                run_retrain(job, config, display, service, force)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("expression", metavar="CRON")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="-- RETRAIN_OPTIONS...")
@click.option("--timezone", "zone", metavar="ZONE", help="Such as Europe/Berlin.  [default: that of the machine]")
@click.option("--now", is_flag=True, help="One run at once, before the first time.")
def schedule(expression: str, options: tuple[str, ...], zone: str | None, now: bool) -> None:
    """Run `itemvec retrain` with RETRAIN_OPTIONS at the times of CRON (minute, hour, day, month, weekday), until
    Ctrl-C.

    For machines and containers that have no cron, no systemd and no Kubernetes. Each run is a process of its own; a
    time at which the run before has not ended is left out.

    \b
      itemvec schedule "17 3 * * *" --timezone Europe/Berlin -- --config retrain.yaml
    """
    import subprocess

    from training.schedule import command_of, follow, next_time

    next_time(expression, zone)  # one that is none is said before the first run
    command = command_of(options)
    if now:
        subprocess.run(command, check=False)  # noqa: S603 - our own command
    follow(expression, command, lambda text: click.echo(text, err=True), zone)


RETRAIN_SETTINGS = {
    "table": "table", "schema_file": "schema_file", "name": "name", "registry": "registry", "runs": "runs",
    "interactions": "interactions", "url": "url", "keep": "keep", "workers": "cluster.workers",
    "cpus_per_worker": "cluster.cpus_per_worker", "device": "cluster.device", "ray_address": "cluster.address",
}  # fmt: skip
"""Options of `itemvec retrain` -> what they go over in the file."""


def _is_given(option: str) -> bool:
    """On the command line or in the environment."""
    given = {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}
    return click.get_current_context().get_parameter_source(option) in given


def _secret(file: Path) -> str:
    from itemvec.errors import ConfigError

    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"cannot read the key in {file}: {error.strerror}") from None


@click.command()
@click.argument("table")
@schema_option
@click.option(
    "--space",
    "space_file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="YAML: what each setting is drawn from.  [default: learning rates, layers, dropout, contrast and corruption]",
)
@click.option("--trials", default=20, show_default=True, type=click.IntRange(2), metavar="N", help="How many are run.")
@click.option(
    "--metric",
    default="precision",
    show_default=True,
    type=click.Choice(["precision", "ndcg", "loss"]),
    help="What is to be best on the validation rows: precision@10 of neighbors for hidden columns, NDCG@20 of new "
    "items (with --interactions), or the loss.",
)
@click.option(
    "--out",
    default="tuning",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where trials.csv, best.yaml and settings.svg are written.",
)
@_config_option
@_training_options
def tune(
    table: str, schema_file: Path, space_file: Path | None, trials: int, metric: Any, out: Path, registry: str,
    name: str | None, runs: Path | None, interactions: str | None, **options: Any,
) -> None:  # fmt: skip
    """Search for good settings: many short trainings on TABLE, each with settings drawn from a space.

    The first trial is of the settings as they are (--config, --set), so that the gain shows. As many run at once as Ray
    has room for, and those that fall behind are stopped early. A search that was killed goes on when the same command
    is given again, and with a larger --trials it goes on from where it ended. Nothing is published: train with what it
    found.

    A space names settings, each with choice, uniform, loguniform or int:

    \b
      encoder.dim: {choice: [32, 64, 128]}
      encoder.dropout: {uniform: [0, 0.3]}
      encoder.cross: {int: [0, 2]}
      optimizer.learning_rate: {loguniform: [0.0005, 0.01]}

    \b
      itemvec tune items.parquet --schema items.schema.yaml --trials 30
      itemvec tune items.parquet --schema items.schema.yaml --space space.yaml --epochs 4
      itemvec train items.parquet --schema items.schema.yaml --config tuning/best.yaml
    """
    from itemvec.errors import ConfigError
    from itemvec.registry import Registry
    from training.run import Job
    from training.tune import DEFAULT_SPACE, read_space
    from training.tune import tune as run_tune

    _leave_a_core()
    try:
        text = DEFAULT_SPACE if space_file is None else space_file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the space {space_file}: {error.strerror}") from None
    space = read_space(text, str(space_file or "the default space"))
    job = Job(
        table, _schema(schema_file, name), Registry(registry), _runs(runs, registry), _config(options)({}),
        _cluster(options), interactions,
    )  # fmt: skip
    with Display() as display:
        tuned = run_tune(job, space, trials, metric, display)
        display.end_phase()
        tuned.write(out)
        for line in tuned.summary():
            display.line(line)
        display.line(f"wrote {out / 'trials.csv'}, {out / 'settings.svg'} and, for --config, {out / 'best.yaml'}")


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("table")
@click.option(
    "--out", default="evaluation", show_default=True, type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
    help="Where evaluation.json and report.html are written.",
)  # fmt: skip
@click.option(
    "--interactions", metavar="TABLE",
    help="Who liked what: adds how well new items are recommended.  [default: that of the training, if there was one]",
)  # fmt: skip
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
            likes_of = likes_as(interactions, settings, version.manifest.lineage, display.line)
            evaluation, exhibits = evaluate_version(version, table, store, likes_of)
        display.end_phase()
        evaluation["seconds"] = dict(display.timings)
        out.mkdir(parents=True, exist_ok=True)
        content = json.dumps(evaluation, indent=1, ensure_ascii=False)
        (out / "evaluation.json").write_text(content, encoding="utf-8")
        write_report(out, version.ref, evaluation, exhibits)
        _summary(display, evaluation)
        display.line(f"wrote {out / 'report.html'}")


def _schema(file: Path, name: str | None) -> Any:
    """The schema, under another name where one is given."""
    from itemvec.schema import FeatureSchema

    schema = FeatureSchema.load(file)
    if name is None:
        return schema
    return FeatureSchema.from_yaml(schema.model_copy(update={"name": name}).to_yaml(), "--name")


@click.command("embed-table")
@click.argument("model", metavar="MODEL")
@click.argument("table")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Actors, for large tables.  [default: one a core]")
@click.option(
    "--ray-address", metavar="ADDRESS",
    help="Embed on this Ray cluster instead, `auto` for the one of this machine; its machines share OUT and registry.",
)  # fmt: skip
@registry_option
def embed_table(model: str, table: str, out: Path, workers: int | None, ray_address: str | None, registry: str) -> None:
    """Write the vectors that MODEL (`movies`, `movies@3`) gives all items of TABLE to Parquet files in the folder OUT.

    Each row has `id` and `embedding`. The same command goes on after a kill.

    \b
      itemvec embed-table movies items.parquet vectors
      itemvec embed-table movies@3 s3://shop/items/ vectors --ray-address auto
    """
    from itemvec.cli import progress_bar
    from itemvec.registry import Registry
    from training.embed_table import embed_table as run_embed_table

    with progress_bar() as bar:
        task = bar.add_task(f"embedding with {model}", total=None)
        done = run_embed_table(
            table, Registry(registry), model, out, workers, ray_address,
            lambda count, total: bar.update(task, completed=count, total=total),
        )  # fmt: skip
    new = done.items - done.done_before
    now = f"{new:,} now, {new / max(done.seconds, 1e-9):,.0f} items/s" if new else "all of them were there"
    click.echo(f"{done.items:,} vectors of {done.model} in {out}: {now}")


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


def likes_as(
    url: str | None, settings: tuple[str, ...], trained: "Lineage", tell: Callable[[str], None]
) -> "LikesOf | None":
    """Reads the likes at `url`, or else those of the version's training where they can still be read, as that training
    did or as `settings` say."""
    from itemvec.errors import ItemvecError
    from training.interactions import Interactions

    found = url or trained.interactions
    if found is None:
        return None
    as_trained = {"interactions": trained.config.get("interactions", {})}
    how = TrainConfig.load(None, dict(_pair(text) for text in settings), as_trained)

    def read(ids: list[str], fold: Any) -> Any:
        try:
            likes = Interactions.read(found, how.interactions, ids, fold).likes
        except ItemvecError as error:
            if url is not None:
                raise
            tell(f"the likes of its training cannot be read ({error}): how new items are recommended is left out")
            return None
        if url is None:
            tell(f"with the likes of its training, {found}")
        return likes

    return read


def _leave_a_core() -> None:
    """A thread that waits for one whose core is taken stops them all, so arithmetic uses half of the cores."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))


def _config(options: dict[str, Any]) -> Callable[[dict[str, Any]], TrainConfig]:
    """Settings of the file, or else of the champion; over them those of the command line."""
    return lambda champion: TrainConfig.load(options["config_file"], _over(options), champion)


def _over(options: dict[str, Any]) -> dict[str, Any]:
    """Settings of the command line."""
    over: dict[str, Any] = dict(_pair(text) for text in options["settings"])
    for name, option in (("epochs", "epochs"), ("encoder.dim", "dim"), ("seed", "seed")):
        if options[option] is not None:
            over[name] = options[option]
    return over


def _cluster(options: dict[str, Any]) -> ClusterConfig:
    return ClusterConfig(
        workers=options.get("workers", 1),
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
    try:
        return name.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise click.UsageError(f"the value in {text!r} is not YAML: {' '.join(str(error).split())}") from None


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
