"""The commands `serve` and `demo`."""

import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

DATA_DIR = click.option(
    "--data-dir", type=click.Path(file_okay=False, path_type=Path),
    help="Where the embedded Redis keeps its data.  [env: ITEMVEC_DATA_DIR; default: .itemvec]",
)  # fmt: skip
PORT = click.option(
    "--port", type=click.IntRange(1, 65535), help="Port to listen on.  [env: ITEMVEC_PORT; default: 8000]"
)


@click.command()
@click.option("--host", help="Address to listen on.  [env: ITEMVEC_HOST; default: 127.0.0.1]")
@PORT
@DATA_DIR
@click.option(
    "--registry", metavar="DIR",
    help="Where model versions are published.  [env: ITEMVEC_REGISTRY; default: registry/ in the data folder]",
)  # fmt: skip
@click.option(
    "--model", help="Model that a request means which names none.  [env: ITEMVEC_MODEL; default: the only one]"
)
@click.option(
    "--replicas",
    type=click.IntRange(1),
    help="Processes that answer.  [env: ITEMVEC_REPLICAS; default: one a core, up to 4]",
)
@click.option("--redis-url", help="A Redis to use.  [env: REDIS_URL; default: an embedded server is started]")
@click.option("--ray-address", help="A Ray cluster to join.  [env: ITEMVEC_RAY_ADDRESS; default: Ray starts here]")
def serve(**given: Any) -> None:
    """Start the HTTP service: embeddings and similar items of the registry's champions, until Ctrl-C.

    It starts Ray Serve and, unless REDIS_URL names a Redis, an embedded server that keeps its data in the data folder.
    All settings can come from the environment; docs/service.md lists them, limits and keys included.
    """
    from service.config import ServiceConfig, misspelt
    from service.runtime import running

    for name, likely in misspelt(os.environ).items():
        click.echo(f"itemvec: {name} is no setting and changes nothing; did you mean {likely}?", err=True)
    config = ServiceConfig.read(**given)
    console = Console(stderr=True)
    try:
        with console.status("starting") as status, running(config, status.update) as service:
            status.stop()
            click.echo(f"serving on {service.url}  (API: {service.url}/docs, Ctrl-C stops)")
            service.wait()
    except KeyboardInterrupt:
        click.echo("stopped", err=True)


@click.command()
@PORT
@DATA_DIR
@click.option("--once", is_flag=True, help="Exit after the sample queries instead of staying up.")
@click.option("--retrain", is_flag=True, help="Train anew even if there is a model.")
def demo(port: int | None, once: bool, retrain: bool, data_dir: Path | None) -> None:
    """The main job in one command: train on 17,470 films, serve, load them, and show similar ones.

    Stays up on http://127.0.0.1:8000 until Ctrl-C, which stops everything that it started. A second run finds its model
    and its items again.
    """
    from service.config import ServiceConfig
    from service.demo import run

    config = ServiceConfig.read(port=port, data_dir=data_dir)
    try:
        run(config, once=once, retrain=retrain)
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        sys.exit(130 if once else 0)
