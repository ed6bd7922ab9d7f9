"""`itemvec demo`: the main job, end to end, on the film table in `examples/`; nothing that a user could not type."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import click
from pyarrow import parquet
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import itemvec
from itemvec.bulk import load_items
from itemvec.cli import console, progress_bar
from itemvec.client import Client
from itemvec.errors import ConfigError, ItemvecError
from itemvec.registry import CHAMPION, Registry
from itemvec.table import read_table
from service.config import ServiceConfig
from service.runtime import check_port, running

MODEL = "movies"
FILMS = {
    "tt0133093": "The Matrix",
    "tt0068646": "The Godfather",
    "tt0114709": "Toy Story",
    "tt0076759": "Star Wars",
    "tt0034583": "Casablanca",
    "tt0078748": "Alien",
    "tt0058150": "Goldfinger",
    "tt0241527": "Harry Potter and the Philosopher's Stone",
    "tt0468569": "The Dark Knight",
    "tt0110912": "Pulp Fiction",
}
"""Films that most people know, for the sample queries."""


def run(config: ServiceConfig, once: bool, retrain: bool) -> None:
    """Raises ItemvecError in one line; KeyboardInterrupt ends it."""
    began = time.monotonic()
    check_port(config.host, config.port)
    table = _example("movies.parquet")
    _train(config, table, retrain)
    config = config.model_copy(update={"ready_items": parquet.read_metadata(table).num_rows})
    with Console(stderr=True).status("starting") as status, running(config, status.update) as service:
        status.stop()
        with Client(service.url) as client:
            load(client, table)
            _show_neighbors(client)
        click.echo(f"\nup on {service.url} after {time.monotonic() - began:.0f} s. Try:")
        click.echo(_hints(service.url))
        if not once:
            click.echo("Ctrl-C stops everything.")
            service.wait()


def _example(name: str) -> Path:
    """In a source tree `examples/` lies beside the packages; an installed wheel carries it inside."""
    package = Path(itemvec.__file__).parent
    for path in (package.parent / "examples" / name, package / "examples" / name):
        if path.is_file():
            return path
    raise ConfigError(
        f"the demo's film table {name} is not in {package.parent / 'examples'}: clone the repository anew"
    )


def _train(config: ServiceConfig, table: Path, retrain: bool) -> None:
    """In a process of its own, since Serve wants settings in the environment before Ray is imported."""
    registry = Registry(config.registry)
    if not retrain and MODEL in registry.names() and CHAMPION in registry.aliases(MODEL):
        name, version = registry.resolve(MODEL)
        click.echo(f"using {name}@{version} of {config.registry} (--retrain trains anew)")
        return
    command = ["train", str(table), "--schema", str(_example("movies.schema.yaml")), "--registry", config.registry]
    training = subprocess.Popen([sys.executable, "-m", "itemvec", *command, "--promote"])  # noqa: S603
    try:
        status = training.wait()
    except KeyboardInterrupt:  # Ray needs a few seconds to end its processes
        with suppress(subprocess.TimeoutExpired):
            training.send_signal(signal.SIGINT)
            training.wait(20)
        training.kill()
        raise
    if status != 0:
        raise ItemvecError(f"training failed (exit status {status}); its reason is above")


def load(client: Client, table: Path) -> None:
    """Stores all films in the service, unless they are there already."""
    model = client.call("GET", f"/v1/models/{MODEL}")
    films = read_table(str(table))
    if (model["items"] or 0) >= len(films):
        click.echo(f"{model['items']} items are in the store already")
        return
    began = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task("encoding and storing the films", total=len(films))
        done = load_items(client, films, model, progress=lambda n: bar.advance(task, n))
    click.echo(f"{done.total} films encoded and stored, {done.total / (time.monotonic() - began):,.0f} a second")


def _show_neighbors(client: Client) -> None:
    grid = Table("film", "nearest films by their embeddings", box=None, pad_edge=False)
    for film, title in FILMS.items():
        answer = client.call("POST", "/v1/similar", {"id": film, "k": 5, "model": MODEL})
        near = [_described(client.item(n["id"], MODEL)) for n in answer["neighbors"]]
        grid.add_row(title, escape("; ".join(near)))
    click.echo()
    console().print(grid)


def _described(film: dict[str, object]) -> str:
    return f"{film.get('title')} ({film.get('release_year')})"


def _hints(url: str) -> str:
    command = os.path.relpath(sys.argv[0]) if Path(sys.argv[0]).name == "itemvec" else "python -m itemvec"
    return f"""\
  {command} similar tt0133093 --url {url}
  curl -s {url}/v1/similar -d '{{"id": "tt0133093", "k": 5}}' -H 'content-type: application/json'
  curl -s {url}/v1/embeddings -d '{{"input": [{{"genres": ["Sci-Fi"], "release_year": 1999}}]}}' \
-H 'content-type: application/json'
  {url}/          the films, their neighbors, and why
  {url}/docs      the API, to try in a browser
  {url}/metrics   for Prometheus"""
