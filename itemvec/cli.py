"""The command `itemvec`: what needs neither Ray nor Redis is here; `training` and `service` add theirs by entry points.

So the arrows of the packages hold (`training -> itemvec <- service`), a small install has a small command, and
`itemvec --help` imports no torch.
"""

import errno
import json
import os
import sys
import time
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, cast
from urllib.parse import quote

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from itemvec import __version__
from itemvec.errors import ItemvecError
from itemvec.signals import stop_signals

REGISTRY = ".itemvec/registry"
EXTRAS = {"training": "training", "service": "service"}

registry_option = click.option(
    "--registry", envvar="ITEMVEC_REGISTRY", default=REGISTRY, show_default=True, metavar="DIR",
    help="Where model versions are published.  [env: ITEMVEC_REGISTRY]",
)  # fmt: skip


def service_options(command: Any) -> Any:
    """--url and --key of the commands that talk to a running service."""
    for option in (
        click.option("--key", envvar="ITEMVEC_KEY", help="Bearer key, if the service has keys.  [env: ITEMVEC_KEY]"),
        click.option(
            "--url", envvar="ITEMVEC_URL", default="http://127.0.0.1:8000", show_default=True,
            help="Where the service answers.  [env: ITEMVEC_URL]",
        ),
    ):  # fmt: skip
        command = option(command)
    return command


class Commands(click.Group):
    """Built-in commands, and those of the entry-point group `itemvec.commands`, imported when they are called."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.found: dict[str, EntryPoint] = {e.name: e for e in entry_points(group="itemvec.commands")}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in ORDER if name in self.commands or name in self.found]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in self.found:
            return super().get_command(ctx, name)
        try:
            command = self.found[name].load()
        except ModuleNotFoundError as error:
            extra = EXTRAS.get(self.found[name].module.split(".")[0], "all")
            raise click.ClickException(f"itemvec {name} needs {error.name}: pip install 'itemvec[{extra}]'") from None
        return cast("click.Command", command)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """By their one-liners here, since importing every command for its help would load Ray and torch."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, ORDER[name]) for name in self.list_commands(ctx)])


ORDER = {
    "demo": "Train on the film table, serve it, and show similar films.",
    "schema": "Infer a schema from a table, or check a table against one.",
    "encode": "Write a table one-hot, multi-hot, as integers or hashed.",
    "train": "Train a model version from an item table.",
    "retrain": "Train again, compare with the champion, publish and switch.",
    "tune": "Search for good settings with many short trainings.",
    "schedule": "Retrain at the times of a cron expression.",
    "evaluate": "Measure a model version on a table, and write a report.",
    "models": "List, show, promote and roll back model versions.",
    "runs": "List and show what each retraining did.",
    "serve": "Start the HTTP service.",
    "load": "Encode a table's items and store them for similarity queries.",
    "embed": "Print the embedding of items.",
    "embed-table": "Write the vectors of a whole table to Parquet files.",
    "similar": "Print the nearest items of an item.",
}


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="itemvec")
def cli() -> None:
    """Learn dense embeddings of items from their feature table, and serve them to a recommender.

    \b
    A first round, on your own table:
      itemvec schema infer items.parquet --out items.schema.yaml
      itemvec train items.parquet --schema items.schema.yaml
      itemvec serve &
      itemvec load items.parquet
      itemvec similar ITEM-ID

    Each command has its own --help.
    """


def main() -> None:
    """Entry point: an error of ours is one line on stderr and exit status 1; exit status 2 is a usage error. A signal
    that ends a command lets it tidy up first."""
    try:
        with stop_signals():
            cli()
    except ItemvecError as error:
        print(f"itemvec: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 1))
    except Exception as error:
        if os.environ.get("ITEMVEC_TRACEBACK"):
            raise
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:500] or 'no reason given'}"
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            said = "a disk is full: that of the registry, the runs, the output or the temporary folder (TMPDIR)"
        print(f"itemvec: {said} (ITEMVEC_TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(1)


@cli.group()
def schema() -> None:
    """Infer a schema from a table, or check a table against one."""


@schema.command("infer")
@click.argument("table")
@click.option("--name", help="The model's name.  [default: the file's name]")
@click.option("--id", "id_column", help="The id column.  [default: the first that can be one]")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where to write it.  [default: standard output]",
)
@click.option("--force", is_flag=True, help="Overwrite the file of --out.")
def infer(table: str, name: str | None, id_column: str | None, out: Path | None, force: bool) -> None:
    """Write a schema for TABLE (Parquet, CSV, JSON Lines; a path or URL), with the reason for each column's kind.

    It is a start: read it, and edit what you know better.
    """
    from itemvec.infer import infer_schema
    from itemvec.table import read_table

    if out is not None and out.exists() and not force:
        raise click.ClickException(f"{out} is there already; --force overwrites it")
    inferred = infer_schema(read_table(table), name or _model_name(table), id_column)
    if out is None:
        click.echo(inferred.to_yaml(), nl=False)
    else:
        out.write_text(inferred.to_yaml(), encoding="utf-8")
        click.echo(
            f"wrote {out}: {len(inferred.schema.features)} features. Read it, then: itemvec schema check {table} {out}"
        )


@schema.command("check")
@click.argument("table")
@click.argument("schema_file", metavar="SCHEMA", type=click.Path(path_type=Path))
def check(table: str, schema_file: Path) -> None:
    """Say, column by column, what is wrong with TABLE for SCHEMA. Exit status 1 if training would refuse it."""
    from itemvec.check import check_table
    from itemvec.schema import FeatureSchema
    from itemvec.table import read_table

    findings = check_table(read_table(table), FeatureSchema.load(schema_file))
    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    grid = Table("column", "", "finding", box=None, pad_edge=False)
    for finding in findings:
        grid.add_row(escape(finding.column), f"[{colors[finding.level]}]{finding.level}[/]", escape(finding.text))
    console().print(grid)
    errors = sum(finding.level == "error" for finding in findings)
    if errors:
        raise click.ClickException(f"{errors} {'error' if errors == 1 else 'errors'}: training would refuse {table}")


@cli.command()
@click.argument("table")
@click.option(
    "--schema", "schema_file", required=True, type=click.Path(path_type=Path), help="The schema of TABLE, a YAML file."
)
@click.option(
    "--as", "how", required=True, type=click.Choice(["integer", "one-hot", "multi-hot", "hashing"]),
    help="What becomes of labels: a number each, a column of zeros and ones each (one-hot and multi-hot are the same), "
    "or a share of the columns by hash.",
)  # fmt: skip
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="Parquet file to write.")
@click.option(
    "--layout", "form", type=click.Choice(["columns", "sparse"]),
    help="A Parquet column each, or per row a list of those that are not 0.  [default: sparse beyond 1,000 columns]",
)  # fmt: skip
@click.option("--buckets", default=1024, show_default=True, type=click.IntRange(1, 2**24), help="Columns of hashing.")
@click.option(
    "--scale", default="raw", show_default=True, type=click.Choice(["raw", "standard"]),
    help="Columns of numbers as they are, or brought to mean 0 and variance 1.",
)  # fmt: skip
@click.option("--fit", "fitted", metavar="TABLE", help="Take labels and scales from this one.  [default: TABLE itself]")
@click.option("--force", is_flag=True, help="Overwrite the file of --out.")
def encode(
    table: str, schema_file: Path, out: Path, form: Any, fitted: str | None, force: bool, **settings: Any
) -> None:
    """Write the rows of TABLE in a plain encoding, as Parquet: the id, and numbers. docs/encodings.md explains them.

    Nothing is trained. Numbers stay numbers, an unseen label is 0 or sets no column, text is left out of all but
    hashing.
    """
    from itemvec.plain import WIDE, PlainEncoding, write_encoding
    from itemvec.schema import FeatureSchema
    from itemvec.table import read_table

    if out.exists() and not force:
        raise click.ClickException(f"{out} is there already; --force overwrites it")
    if not out.absolute().parent.is_dir():
        raise click.ClickException(f"there is no folder {out.parent} to write {out.name} into")
    schema = FeatureSchema.load(schema_file)
    items = read_table(table)
    encoding = PlainEncoding.fit(read_table(fitted) if fitted else items, schema, **settings)
    form = form or ("sparse" if len(encoding.names) > WIDE and encoding.how != "integer" else "columns")
    with progress_bar() as bar:
        task = bar.add_task(f"encoding as {encoding.how}", total=len(items))
        write_encoding(encoding, items, out, form, progress=lambda n: bar.advance(task, n))
    shape = f"{len(items):,} rows, {len(encoding.names):,} columns"
    click.echo(f"wrote {out}: {shape}" + (" (sparse: itemvec.plain.read_sparse)" if form == "sparse" else ""))
    text = [f.name for f in schema.features if f not in encoding.schema.features and f.kind == "text"]
    if text:
        click.echo(f"left out: {', '.join(text)} (text has no labels; --as hashing takes it)")


@cli.group()
def models() -> None:
    """List, show, promote and roll back model versions."""


@models.command("list")
@registry_option
def list_models(registry: str) -> None:
    """All versions of all models, and which of them serve."""
    from itemvec.registry import Registry

    store = Registry(registry)
    grid = Table("model", "alias", "created", "items", "dim", "fingerprint", box=None, pad_edge=False)
    for name in store.names():
        aliases = store.aliases(name)
        for version in reversed(store.versions(name)):
            try:
                manifest = store.manifest(name, version)
            except ItemvecError as error:
                grid.add_row(f"{name}@{version}", escape(str(error)))
                continue
            alias = ", ".join(a for a, v in aliases.items() if v == version)
            created = manifest.created.strftime("%Y-%m-%d %H:%M")
            grid.add_row(
                f"{name}@{version}",
                alias,
                created,
                str(manifest.lineage.table_rows),
                str(manifest.dim),
                manifest.fingerprint,
            )
    if grid.row_count == 0:
        raise click.ClickException(f"no model in {registry}; train one: itemvec train TABLE --schema SCHEMA")
    console().print(grid)


@models.command("show")
@click.argument("ref")
@registry_option
def show_model(ref: str, registry: str) -> None:
    """The manifest of REF (`movies`, `movies@3`, `movies@previous`) as JSON, and how compatible its vectors are with
    those of the version before (`parent`)."""
    from itemvec.registry import Registry

    store = Registry(registry)
    name, version = store.resolve(ref)
    manifest = store.manifest(name, version).model_dump(mode="json")
    evaluation = json.loads((store.path(name, version) / "evaluation.json").read_text(encoding="utf-8"))
    click.echo(json.dumps({**manifest, "parent": evaluation.get("parent")}, indent=2, ensure_ascii=False))


@models.command("promote")
@click.argument("ref")
@registry_option
def promote_model(ref: str, registry: str) -> None:
    """Make REF (`movies@3`, `movies@challenger`) the champion; the champion becomes `previous`.

    A running service sees it within seconds, fills the version's index, and then switches.
    """
    from itemvec.registry import Registry

    store = Registry(registry)
    name, version = store.resolve(ref)
    store.load(f"{name}@{version}")  # a broken version must not become the champion
    store.promote(name, version)
    click.echo(f"{name}@{version} is the champion")


@models.command("rollback")
@click.argument("name")
@registry_option
def rollback_model(name: str, registry: str) -> None:
    """Make the previous champion of model NAME the champion again."""
    from itemvec.registry import Registry

    click.echo(f"{name}@{Registry(registry).rollback(name)} is the champion again")


@cli.group()
def runs() -> None:
    """List and show what each retraining did."""


@runs.command("list")
@click.option("--model", "name", help="Of this model only.")
@click.option("-n", "most", default=20, show_default=True, type=click.IntRange(1), help="How many.")
@registry_option
def list_runs(name: str | None, most: int, registry: str) -> None:
    """The retrainings, the newest first: what each came to, and why."""
    from itemvec.registry import Registry
    from itemvec.runs import Runs

    store = Runs(Registry(registry))
    found = store.of(name, most) if name else store.newest(most)
    if not found:
        raise click.ClickException(f"no retraining is on record in {registry}; start one: itemvec retrain TABLE")
    grid = Table("run", "model", "state", "champion", "version", "seconds", "reason", box=None, pad_edge=False)
    colors = {"promoted": "green", "refused": "red", "failed": "red", "interrupted": "yellow"}
    for run in found:
        state = f"[{colors[run.state]}]{run.state}[/]" if run.state in colors else run.state
        spent = sum(step.seconds or 0.0 for step in run.steps)
        versions = ["" if v is None else str(v) for v in (run.champion, run.version)]
        grid.add_row(run.id, run.model, state, *versions, f"{spent:.1f}", escape(run.reason))
    console().print(grid)


@runs.command("show")
@click.argument("run_id", metavar="RUN")
@click.option("--json", "as_json", is_flag=True, help="The record itself.")
@registry_option
def show_run(run_id: str, as_json: bool, registry: str) -> None:
    """The steps of a retraining, how long each took, and what the gate measured."""
    from itemvec.registry import Registry
    from itemvec.runs import Runs

    run = Runs(Registry(registry)).get(run_id)
    if as_json:
        click.echo(run.model_dump_json(indent=2))
        return
    click.echo(f"{run.model}: {run.state}" + (f", {run.reason}" if run.reason else ""))
    click.echo(f"table {run.table}, by {run.by}" + (f", in {run.tries} tries" if run.tries > 1 else ""))
    grid = Table("step", "", "began", "seconds", "", box=None, pad_edge=False)
    for step in run.steps:
        took = "" if step.seconds is None else f"{step.seconds:.1f}"
        grid.add_row(step.name, step.state, f"{step.started_at:%Y-%m-%d %H:%M:%S}", took, escape(step.said))
    console().print(grid)
    if run.checks:
        grid = Table("check", "new", "champion", "limit", "", box=None, pad_edge=False)
        for check in run.checks:
            beside = "" if check["champion"] is None else f"{check['champion']:.4g}"
            limit = f"{'at most' if check['at_most'] else 'at least'} {check['limit']:.4g}"
            passed = "passed" if check["passed"] else f"[red]failed[/] {escape(check['why'])}"
            grid.add_row(escape(check["name"]), f"{check['new']:.4g}", beside, limit, passed)
        console().print(grid)


@cli.command()
@click.argument("table")
@click.option("--model", "name", help="The model's name.  [default: the service's only one]")
@click.option("--all-columns", is_flag=True, help="Also store columns that the schema does not name.")
@click.option(
    "--vectors",
    "embedded",
    metavar="FOLDER",
    help="What `itemvec embed-table TABLE` wrote with the served version: nothing is encoded again.",
)
@click.option("--batch", default=1024, show_default=True, type=click.IntRange(1, 4096), help="Items a request.")
@service_options
def load(
    table: str, name: str | None, all_columns: bool, embedded: str | None, batch: int, url: str, key: str | None
) -> None:
    """Store the items of TABLE (Parquet, CSV, JSON Lines) in a running service, which encodes them.

    Items that are there already are replaced. An item that is refused is reported, the others are kept; exit status 1
    says that some were refused.
    """
    from itemvec.bulk import load_items
    from itemvec.client import Client
    from itemvec.table import read_table

    with Client(url, key) as client:
        model = served_model(client, name)
        items, vectors = read_table(table), read_table(embedded) if embedded else None
        began = time.monotonic()
        with progress_bar() as bar:
            task = bar.add_task(f"encoding and storing with {model['model']}", total=len(items))
            told = partial(bar.advance, task)
            done = load_items(client, items, model, all_columns, batch, progress=told, vectors=vectors)
    seconds = time.monotonic() - began
    click.echo(
        f"{done.created} created, {done.updated} updated, {done.refused} refused: {done.total / seconds:,.0f} items/s"
    )
    for item_id, why in done.reasons:
        click.echo(f"  {item_id}: {why}", err=True)
    if done.refused:
        raise click.ClickException(f"{done.refused} items were refused, the first {len(done.reasons)} are above")


@cli.command()
@click.argument("items", nargs=-1, metavar="ITEM...")
@click.option("--table", "table_url", help="Embed all items of this table instead.")
@click.option("--model", "ref", help="`movies`, `movies@3`, `movies@previous`.  [default: the only model's champion]")
@registry_option
def embed(items: tuple[str, ...], table_url: str | None, ref: str | None, registry: str) -> None:
    """Print the embedding of each ITEM, a JSON object of its columns (`-`: one a line from standard input).

    Needs no service: the model version is read from the registry. Each line of output is a JSON object with
    `embedding`, and `columns`: which of them were not plain.

    \b
      itemvec embed '{"title": "A new film", "genres": ["Sci-Fi"], "release_year": 1999}'
    """
    from itemvec.check import require_columns
    from itemvec.registry import Registry
    from itemvec.table import read_table, rows

    if bool(items) == bool(table_url):
        raise click.UsageError("give either items or --table")
    store = Registry(registry)
    model = store.load(ref or only_model(store.names(), registry))
    if table_url is not None:
        table, schema = read_table(table_url), model.schema
        require_columns(table, [schema.id, *(f.name for f in schema.features)])
        for ids, batch in rows(table, schema.id, [f.name for f in schema.features]):
            _print_embeddings(model.encode(batch), ids)
        return
    lines = [line for line in sys.stdin if line.strip()] if items == ("-",) else items
    _print_embeddings(model.encode([_parsed(line) for line in lines]))


@cli.command()
@click.argument("item")
@click.option("-k", default=10, show_default=True, type=click.IntRange(1), help="How many.")
@click.option("--model", "name", help="The model's name.  [default: the service's only one]")
@click.option("--label", help="A column to show beside the id.  [default: title or name, if there is one]")
@click.option(
    "--filter", "condition", metavar="JSON", help='Only items that fulfil it: \'{"eq": {"genres": "Drama"}}\'.'
)
@click.option("--override", metavar="JSON", help='The same item, but for these columns: \'{"genres": ["Comedy"]}\'.')
@click.option("--ignore", multiple=True, metavar="COLUMN", help="A column that shall not count; may come again.")
@click.option("--partial", is_flag=True, help="ITEM is a description: the columns that it lacks say nothing.")
@click.option("--explain", is_flag=True, help="Show which columns contributed most to each score.")
@service_options
def similar(
    item: str, k: int, name: str | None, label: str | None, condition: str | None, override: str | None,
    ignore: tuple[str, ...], partial: bool, explain: bool, url: str, key: str | None,
) -> None:  # fmt: skip
    """Print the items nearest to ITEM: the id of a stored item, or a JSON object of columns."""
    from itemvec.client import Client

    query: dict[str, Any] = {"item": _parsed(item)} if item.lstrip().startswith("{") else {"id": item}
    query |= {"k": k, "explain": explain, "ignore": list(ignore)}
    query |= {"partial": True} if partial else {}
    query |= {"filter": _parsed(condition, "--filter")} if condition is not None else {}
    query |= {"override": _parsed(override, "--override")} if override is not None else {}
    with Client(url, key) as client:
        model = served_model(client, name)
        answer = client.similar(query, model["id"])
        label = label or next((c for c in ("title", "name") if c in model["item_schema"]["properties"]), None)
        grid = Table("score", "id", label or "", *(["why"] if explain else []), box=None, pad_edge=False)
        for neighbor in answer["neighbors"]:
            shown = client.item(neighbor["id"], model["id"]).get(label, "") if label else ""
            why = ", ".join(f"{c} {gain:+.2f}" for c, gain in list(neighbor.get("contributions", {}).items())[:3])
            row = [f"{neighbor['score']:.3f}", escape(neighbor["id"]), escape(str(shown))]
            grid.add_row(*row, *([escape(why)] if explain else []))
    console().print(grid)
    click.echo(f"{answer['model']}, fingerprint {answer['fingerprint']}")


def served_model(client: Any, name: str | None) -> dict[str, Any]:
    """What the service says of model `name`, or of its only one."""
    names = [name] if name else [m["id"] for m in client.call("GET", "/v1/models")["data"]]
    answer: dict[str, Any] = client.call("GET", f"/v1/models/{quote(only_model(names, client.url))}")
    return answer


def only_model(names: list[str], where: str) -> str:
    if len(names) != 1:
        there = f"has {', '.join(names)}" if names else "has none yet: itemvec train"
        raise click.ClickException(f"which model? {where} {there}" + ("; name one with --model" if names else ""))
    return names[0]


def _parsed(text: str, what: str = "ITEM") -> dict[str, Any]:
    try:
        item = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{text[:60]!r} is not JSON: {error}", param_hint=what) from None
    if not isinstance(item, dict):
        raise click.BadParameter(f"{text[:60]!r} is not a JSON object", param_hint=what)
    return item


def _print_embeddings(encoding: Any, ids: list[str] | None = None) -> None:
    for i, (vector, columns) in enumerate(zip(encoding.vectors.tolist(), encoding.statuses, strict=True)):
        line = {"embedding": vector, "columns": columns}
        click.echo(json.dumps({"id": ids[i], **line} if ids else line))


def progress_bar() -> Progress:
    """On standard error, so that output can be piped; without a terminal it shows nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def console() -> Console:
    """Tables as wide as the terminal; where there is none, wide enough not to fold."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def _model_name(table: str) -> str:
    stem = Path(table).name.split(".")[0].lower()
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in stem).strip("-") or "items"
