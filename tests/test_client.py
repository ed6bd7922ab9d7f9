"""The client and the command `itemvec similar` against a service that listens on a port."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import serving
import uvicorn
from click.testing import CliRunner
from serving import ITEMS, TOY, TOYS

from itemvec.bulk import load_items
from itemvec.cli import cli
from itemvec.client import Client, ServiceProblem, ServiceUnreachable
from itemvec.errors import ConfigError
from itemvec.registry import Registry
from itemvec.table import read_table
from itemvec.version import ModelVersion
from training.embed_table import embed_table


@pytest.fixture(scope="module")
def url(toy_registry: Path, redis_url: str) -> Iterator[str]:
    """A service of all toys in a thread, until the tests of this file are done."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    listening, stop, where = threading.Event(), threading.Event(), []

    async def serve() -> None:
        async with serving.running(toy_registry, redis_url, max_body_bytes=200_000) as service:
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
    with pytest.raises(ServiceProblem, match="404"):  # a model that the query names is the one that is asked
        client.similar({"id": "toy 3", "model": "nobody@1"})
    answer = client.similar({"id": "toy 3", "k": 2, "filter": {"eq": {"maker": "Ada"}}}, "toys")
    assert len(answer["neighbors"]) == 2
    [columns] = client.decode(model.encode([TOY]).vectors, "toys")
    assert set(columns) == {"maker", "tags", "price", "age", "added"}


def embedded(folder: Path, registry: Path, table: Path, ref: str = "toys") -> str:
    embed_table(str(table), Registry(registry), ref, folder)
    return str(folder)


def test_a_table_is_loaded_as_columns_and_only_the_items_that_are_wrong_are_refused(client: Client) -> None:
    model = client.call("GET", "/v1/models/toys")
    rows = [{**toy, "sku": f"again {i}"} for i, toy in enumerate(TOYS[:5])]
    done = load_items(client, pa.Table.from_pylist(rows), model, batch_size=2)
    assert (done.created, done.refused) == (5, 0)
    assert client.item("again 3", "toys") == client.item(TOYS[3]["sku"], "toys")
    rows[1]["maker"] = "x" * 70_000  # a stream is refused for it as a whole
    done = load_items(client, pa.Table.from_pylist(rows), model, batch_size=5)
    assert (done.updated, done.refused, done.refused_ids) == (4, 1, {"again 1"})
    assert "65536" in done.reasons[0][1]


def test_what_is_too_large_for_one_request_goes_in_several(client: Client) -> None:
    model = client.call("GET", "/v1/models/toys")
    rows = [{**toy, "sku": f"wide {i}", "notes": "x" * 30_000} for i, toy in enumerate(TOYS[:20])]
    wide = pa.Table.from_pylist(rows)  # 600 kB, and a request takes 200
    done = load_items(client, wide, model, all_columns=True)
    assert (done.created, done.refused) == (20, 0)
    assert client.item("wide 19", "toys") == {name: value for name, value in rows[19].items() if name != "sku"}
    assert client.embed(wide)["id"].to_pylist() == [row["sku"] for row in rows]
    rows[0] |= {f"more notes {i}": "y" * 60_000 for i in range(4)}
    done = load_items(client, pa.Table.from_pylist(rows), model, all_columns=True)
    assert (done.updated, done.refused_ids) == (19, {"wide 0"})
    assert "200000 bytes" in done.reasons[0][1]


def test_labels_that_are_codes_do_not_bring_all_labels_along_with_each_part(client: Client) -> None:
    table = pa.Table.from_pylist([{**toy, "sku": f"coded {i}"} for i, toy in enumerate(TOYS)])
    labels = [*table["maker"].unique().to_pylist(), *(f"{i:0100}" for i in range(3_000))]  # 300 kB
    codes = pa.array([labels.index(maker) for maker in table["maker"].to_pylist()], pa.int32())
    coded = table.set_column(table.column_names.index("maker"), "maker", pa.DictionaryArray.from_arrays(codes, labels))
    done = load_items(client, coded, client.call("GET", "/v1/models/toys"))
    assert (done.created, done.refused) == (40, 0)
    assert client.item("coded 5", "toys") == ITEMS["toy 5"]
    assert client.embed(coded)["embedding"].to_pylist() == client.embed(table)["embedding"].to_pylist()


def test_vectors_that_a_version_made_of_a_table_are_stored_and_not_made_again(
    client: Client, url: str, toy_registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{**toy, "sku": f"ready {i}"} for i, toy in enumerate(TOYS[:6])]
    table = tmp_path / "toys.parquet"
    pq.write_table(pa.Table.from_pylist(rows), table)
    monkeypatch.setattr("training.embed_table.BLOCK", 4)  # two files
    folder = embedded(tmp_path / "vectors", toy_registry, table)
    file = Path(folder, "part-000001.parquet")
    written = pq.read_table(file)
    turned = pa.array([[1.0] + [0.0] * 7] * 2, written.schema.field("embedding").type)  # nobody would encode it so
    pq.write_table(written.set_column(1, "embedding", turned), file)
    done = CliRunner().invoke(cli, ["load", str(table), "--vectors", folder, "--url", url], catch_exceptions=False)
    assert done.stdout.startswith("6 created, 0 updated, 0 refused")
    stored = [client.call("GET", f"/v1/items/ready%20{i}")["embedding"] for i in (0, 5)]
    assert stored[1] == [1.0] + [0.0] * 7
    assert stored[0] == pytest.approx(pq.read_table(folder)["embedding"][0].as_py())


def test_vectors_of_another_version_or_of_other_items_are_refused_in_one_line(
    client: Client, toy_registry: Path, tmp_path: Path
) -> None:
    model, table = client.call("GET", "/v1/models/toys"), tmp_path / "toys.parquet"
    pq.write_table(pa.Table.from_pylist(TOYS), table)
    other = read_table(embedded(tmp_path / "other", toy_registry, table, "toys@2"))
    with pytest.raises(ConfigError, match=r"are of toys@2 \(fingerprint \w+\), and toys@1 .* is served"):
        load_items(client, pa.Table.from_pylist(TOYS), model, vectors=other)
    right = read_table(embedded(tmp_path / "right", toy_registry, table))
    with pytest.raises(ConfigError, match="1 items have no vector, such as 'new'"):
        load_items(client, pa.Table.from_pylist([{**TOYS[0], "sku": "new"}]), model, vectors=right)
    own = pa.Table.from_pylist([{**toy, "embedding": [1.0]} for toy in TOYS])
    with pytest.raises(ConfigError, match="a column 'embedding' of its own"):
        load_items(client, own, model, all_columns=True, vectors=right)
    for wrong in ([0.5] * 8, [1.0], [float("nan")] * 8):
        vectors = pa.table({"sku": ["a"], "embedding": [wrong]}, metadata={"fingerprint": model["fingerprint"]})
        with pytest.raises(ServiceProblem, match=r"422 /items/(0/)?embedding"):
            client.put(vectors, "toys")


def test_values_of_wrong_types_beside_their_vectors_are_stored_and_found_by_no_filter(client: Client) -> None:
    fingerprint = client.call("GET", "/v1/models/toys")["fingerprint"]
    wrong: dict[str, list[Any]] = {"maker": [["Ada"]], "tags": [7], "price": ["much"], "added": [[1]]}
    vector = [[0.0] * 7 + [1.0]]
    table = pa.table({"sku": ["odd"], **wrong, "embedding": vector}, metadata={"fingerprint": fingerprint})
    assert [one["status"] for one in client.put(table, "toys")["items"]] == ["created"]
    near = {"embedding": vector[0], "k": 1}
    for column in wrong:
        found = client.call("POST", "/v1/similar", {**near, "filter": {"exists": column}})["neighbors"]
        assert found[0]["id"] == "odd"
    for value in ({"eq": {"maker": "Ada"}}, {"range": {"price": {"gt": -1e9}}}):
        assert client.call("POST", "/v1/similar", {**near, "filter": value})["neighbors"][0]["id"] != "odd"
    client.call("DELETE", "/v1/items/odd")


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
    described = similar(url, '{"maker": "Ada"}', "--partial", "-k", "2")
    wanted = client.similar({"item": {"maker": "Ada"}, "partial": True, "k": 2})["neighbors"]
    assert [line.split()[0] for line in described.splitlines()[1:3]] == [f"{near['score']:.3f}" for near in wanted]


@pytest.mark.parametrize("option", ["--filter", "--override"])
def test_json_that_is_none_is_told_with_its_option(url: str, option: str) -> None:
    done = CliRunner().invoke(cli, ["similar", "toy 3", option, "{", "--url", url])
    assert done.exit_code == 2
    assert option in done.output
