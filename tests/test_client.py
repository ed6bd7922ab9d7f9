"""The client and the command `itemvec similar` against a service that listens on a port."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import redis
import serving
import uvicorn
from click.testing import CliRunner
from serving import ITEMS, TOY, TOYS

from itemvec.cli import cli
from itemvec.client import Client, ServiceProblem, ServiceUnreachable
from itemvec.registry import Registry
from itemvec.version import ModelVersion


@pytest.fixture(scope="module")
def url(toy_registry: Path, redis_url: str) -> Iterator[str]:
    """A service of all toys in a thread, until the tests of this file are done."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    listening, stop, where = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with serving.running(toy_registry, redis_url) as service:
            await service.load()
            server = uvicorn.Server(uvicorn.Config(service.app, port=0, log_level="error", lifespan="off"))
            serve = asyncio.create_task(server.serve())
            while not server.started:  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.01)
            where.append(server.servers[0].sockets[0].getsockname()[1])
            listening.set()
            await asyncio.to_thread(stop.wait)
            server.should_exit = True
            await serve

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert listening.wait(60)
        yield f"http://127.0.0.1:{where[0]}"
    finally:
        stop.set()
        thread.join(60)


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


@pytest.fixture(scope="module")
def model(toy_registry: Path) -> ModelVersion:
    return Registry(toy_registry).load("toys")


def test_a_table_is_embedded_in_its_order_in_parts(
    client: Client, model: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("itemvec.client.ROWS", 7)
    answer = client.embed(pa.Table.from_pylist(TOYS), "toys")
    assert answer["id"].to_pylist() == list(ITEMS)
    got = np.stack(answer["embedding"].to_numpy())
    assert np.abs(got - model.encode(list(ITEMS.values())).vectors).max() <= 1e-6
    assert client.embed(pa.Table.from_pylist(TOYS), dimensions=3)["embedding"].type.list_size == 3


def test_what_the_service_refuses_is_an_error_that_says_why(client: Client) -> None:
    with pytest.raises(ServiceProblem, match=r"POST /v1/embeddings: 422 /input/0/price"):
        client.embed(pa.table({"price": ["much"]}))
    with pytest.raises(ServiceProblem, match="404"):
        client.similar({"id": "nobody"})
    with Client("http://127.0.0.1:1") as nobody, pytest.raises(ServiceUnreachable, match="itemvec serve"):
        nobody.embed(pa.table({"price": [1.0]}))


def test_neighbors_and_columns_come_as_the_service_gives_them(client: Client, model: ModelVersion) -> None:
    answer = client.similar({"id": "toy 3", "k": 2, "filter": {"eq": {"maker": "Ada"}}}, "toys")
    assert len(answer["neighbors"]) == 2
    [columns] = client.decode(model.encode([TOY]).vectors, "toys")
    assert set(columns) == {"maker", "tags", "price", "age", "added"}


def similar(url: str, *args: str) -> str:
    done = CliRunner().invoke(cli, ["similar", *args, "--url", url], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_filters_changes_ignores_and_explains(client: Client, url: str) -> None:
    ada = similar(url, "toy 3", "-k", "3", "--filter", '{"eq": {"maker": "Ada"}}', "--label", "maker")
    assert ada.count("Ada") == 3
    changed = ["--override", '{"maker": "Bell"}', "--ignore", "price", "--ignore", "tags"]
    shown = similar(url, "toy 3", "-k", "4", *changed)
    query = {"id": "toy 3", "k": 4, "override": {"maker": "Bell"}, "ignore": ["price", "tags"], "explain": True}
    wanted = client.similar(query)["neighbors"]
    assert [line.split()[0] for line in shown.splitlines()[1:5]] == [f"{near['score']:.3f}" for near in wanted]
    why = similar(url, "toy 3", "-k", "4", *changed, "--explain")
    column, gained = next(iter(wanted[0]["contributions"].items()))
    assert f"{column} {gained:+.2f}" in why
    assert "why" not in shown


@pytest.mark.parametrize("option", ["--filter", "--override"])
def test_json_that_is_none_is_told_with_its_option(url: str, option: str) -> None:
    done = CliRunner().invoke(cli, ["similar", "toy 3", option, "{", "--url", url])
    assert done.exit_code == 2
    assert option in done.output
