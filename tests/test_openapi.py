"""The documentation against the service: what it says is sent is taken, and what it says is answered is answered."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import orjson
import pytest
import serving
from serving import DIM, TOY, Running
from test_runs import run_of

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.registry import Registry
from itemvec.runs import Runs
from itemvec.schema import FeatureSchema
from itemvec.table import read_table
from itemvec.version import Lineage, ModelVersion

pytestmark = pytest.mark.anyio


async def test_every_call_is_documented_with_its_answers(toys: Running) -> None:
    document = (await toys.client.get("/openapi.json")).json()
    calls = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert calls >= {
        "POST /v1/embeddings", "POST /v1/similar", "PUT /v1/items/{id}", "POST /v1/items", "GET /v1/items/{id}",
        "DELETE /v1/items/{id}", "GET /v1/models", "GET /v1/models/{name}", "GET /v1/models/{name}/versions/{version}",
        "POST /v1/decode", "POST /v1/models/{name}/backfill", "PUT /v1/models/{name}/aliases/champion",
        "GET /v1/jobs/{id}", "GET /v1/runs", "GET /v1/runs/{id}", "GET /healthz", "GET /readyz", "GET /metrics",
    }  # fmt: skip
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call["summary"], (method, path)
            assert call["description"], (method, path)
            named = [p["name"] for p in call["parameters"] if p["in"] == "path"]
            assert named == re.findall(r"{(\w+)}", path)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', str(document).replace("'", '"')))
    assert references <= document["components"]["schemas"].keys()


async def test_every_answer_is_what_the_document_says(toys: Running) -> None:
    await toys.load()
    document = (await toys.client.get("/openapi.json")).json()
    job = (await toys.client.put("/v1/models/toys/aliases/champion", json={"version": 2})).json()["job"]
    await toys.finished(job["id"])
    Runs(toys.registry).save(run := run_of(1))
    bulk = {"items": [{"id": "a", **TOY}, {"id": "b", "tags": 7}, {}]}
    sent: list[tuple[str, str, str, Any]] = [
        ("POST", "/v1/embeddings", "/v1/embeddings", {"input": [TOY, {"maker": "Nobel"}]}),
        ("POST", "/v1/embeddings", "/v1/embeddings", {"input": [TOY], "encoding_format": "base64"}),
        ("POST", "/v1/embeddings", "/v1/embeddings", {"input": [{"tags": 7}]}),
        ("POST", "/v1/similar", "/v1/similar", {"id": "toy 3"}),
        ("POST", "/v1/similar", "/v1/similar", {"item": TOY, "k": 2}),
        ("POST", "/v1/similar", "/v1/similar", {"positive": ["toy 3", {"maker": "Nobel"}], "negative": ["toy 4"]}),
        ("POST", "/v1/similar", "/v1/similar", {"queries": [{"id": "toy 3", "explain": True}, {"id": "nobody"}]}),
        ("POST", "/v1/decode", "/v1/decode", {"embeddings": [[1.0] * DIM, [-1.0] * DIM]}),
        ("POST", "/v1/decode", "/v1/decode", {"embedding": [1.0]}),
        ("PUT", "/v1/items/{id}", "/v1/items/x", TOY),
        ("PUT", "/v1/items/{id}", "/v1/items/x", TOY),
        ("POST", "/v1/items", "/v1/items", bulk),
        ("GET", "/v1/items/{id}", "/v1/items/x", None),
        ("GET", "/v1/items/{id}", "/v1/items/none", None),
        ("GET", "/v1/models", "/v1/models", None),
        ("GET", "/v1/models/{name}", "/v1/models/toys", None),
        ("GET", "/v1/models/{name}/versions/{version}", "/v1/models/toys/versions/1", None),
        ("PUT", "/v1/models/{name}/aliases/champion", "/v1/models/toys/aliases/champion", {"version": 1}),
        ("POST", "/v1/models/{name}/backfill", "/v1/models/toys/backfill", {"version": 3}),
        ("GET", "/v1/jobs/{id}", f"/v1/jobs/{job['id']}", None),
        ("GET", "/v1/runs", "/v1/runs?model=toys", None),
        ("GET", "/v1/runs/{id}", f"/v1/runs/{run.id}", None),
        ("GET", "/v1/runs/{id}", "/v1/runs/none", None),
        ("DELETE", "/v1/items/{id}", "/v1/items/x", None),
        ("GET", "/healthz", "/healthz", None),
        ("GET", "/readyz", "/readyz", None),
    ]
    for method, path, url, body in sent:
        answer = await toys.client.request(method, url, json=body)
        described = document["paths"][path][method.lower()]["responses"][str(answer.status_code)]
        entity = {"content-type", "content-length"}
        assert {name.lower() for name in described["headers"]} == answer.headers.keys() - entity, (method, url)
        if answer.status_code == 204:
            continue
        media_type = answer.headers["content-type"]
        schema = {**described["content"][media_type]["schema"], "components": document["components"]}
        jsonschema.validate(answer.json(), schema)


FILMS = """
name: movies
id: id
features:
  title: {kind: text, buckets: 256}
  genres: {kind: multi, filterable: true}
  release_year: {kind: numeric, filterable: true}
"""


def publish_films(registry: Registry) -> None:
    """Two untrained versions over a part of the film table, of the columns that the examples speak of."""
    table = read_table(str(Path(__file__).parents[1] / "examples" / "movies.parquet")).slice(0, 300)
    transform = FeatureTransform.fit(table, FeatureSchema.from_yaml(FILMS))
    config = EncoderConfig(dim=DIM, embedding_dim=8, hidden=(16,))
    for alias in ("champion", None):
        encoder, decoder = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
        lineage = Lineage(table="movies", table_sha256="0" * 64, table_rows=300, train_rows=300, config={})

        def write(
            folder: Path, version: int, encoder: Any = encoder, decoder: Any = decoder, lineage: Any = lineage
        ) -> None:
            ModelVersion.make("movies", version, transform, encoder, decoder, {}, lineage).save(folder, [])

        registry.publish("movies", write, alias)


async def test_every_example_of_the_document_is_answered_as_it_says(tmp_path: Path, empty_redis: str) -> None:
    publish_films(Registry(tmp_path))
    async with serving.running(tmp_path, empty_redis, model="movies") as films:
        document = (await films.client.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        for film in schemas["BulkRequest"]["examples"][0]["items"]:
            assert (await films.client.put(f"/v1/items/{film['id']}", json=film)).status_code == 201
        sent = 0
        for path, methods in document["paths"].items():
            for method, call in methods.items():
                if "requestBody" not in call:
                    continue
                body = schemas[call["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]]
                for example in body["examples"]:
                    jsonschema.validate(example, {**body, "components": document["components"]})
                    url = path.replace("{id}", "tt0133093").replace("{name}", "movies")
                    answer = await films.client.request(method, url, json=example)
                    assert answer.is_success, (path, example, answer.text)
                    described = call["responses"][str(answer.status_code)]["content"]["application/json"]["schema"]
                    jsonschema.validate(answer.json(), {**described, "components": document["components"]})
                    sent += 1
                    if "job" in answer.json():
                        await films.finished(answer.json()["job"]["id"])
        assert sent >= 13


CALLS = re.findall(
    r"```json\n(\w+) (\S+)\n(.*?)```", (Path(__file__).parents[1] / "docs" / "api.md").read_text(), flags=re.DOTALL
)


async def test_every_call_in_the_documentation_is_answered(tmp_path: Path, empty_redis: str) -> None:
    publish_films(Registry(tmp_path))
    async with serving.running(tmp_path, empty_redis, model="movies") as films:
        for film in ("tt0133093", "tt0234215"):
            assert (await films.client.put(f"/v1/items/{film}", json={"genres": ["Sci-Fi"]})).status_code == 201
        assert len(CALLS) == 8
        for method, path, body in CALLS:
            answer = await films.client.request(method, path, json=orjson.loads(body))
            assert answer.is_success, (path, body, answer.text)
        await films.finished(answer.json()["job"]["id"])


async def test_the_page_needs_nothing_from_elsewhere(toys: Running) -> None:
    page = (await toys.client.get("/docs")).text
    assert "http" not in page
    for name in re.findall(r'(?:src|href)="(.*?)"', page):
        asset = await toys.client.get("/" + name)
        assert asset.status_code == 200
        assert len(asset.content) > 10_000
    assert (await toys.client.get("/docs/other.js")).status_code == 404
