"""The documentation against the service: what it says is sent is taken, and what it says is answered is answered."""

import re
from typing import Any

import jsonschema
import pytest
from serving import TOY, Running, post

pytestmark = pytest.mark.anyio


async def test_every_call_is_documented_with_its_answers(toys: Running) -> None:
    document = (await toys.client.get("/openapi.json")).json()
    calls = {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}
    assert calls >= {
        "POST /v1/embeddings", "POST /v1/similar", "PUT /v1/items/{id}", "POST /v1/items", "GET /v1/items/{id}",
        "DELETE /v1/items/{id}", "GET /v1/models", "GET /v1/models/{name}", "GET /v1/models/{name}/versions/{version}",
        "PUT /v1/models/{name}/aliases/champion", "GET /v1/jobs/{id}", "GET /healthz", "GET /readyz", "GET /metrics",
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
    bulk = {"items": [{"id": "a", **TOY}, {"id": "b", "tags": 7}, {}]}
    sent: list[tuple[str, str, str, Any]] = [
        ("POST", "/v1/embeddings", "/v1/embeddings", {"input": [TOY, {"maker": "Nobel"}]}),
        ("POST", "/v1/embeddings", "/v1/embeddings", {"input": [TOY], "encoding_format": "base64"}),
        ("POST", "/v1/embeddings", "/v1/embeddings", {"input": [{"tags": 7}]}),
        ("POST", "/v1/similar", "/v1/similar", {"id": "toy 3"}),
        ("POST", "/v1/similar", "/v1/similar", {"item": TOY, "k": 2}),
        ("PUT", "/v1/items/{id}", "/v1/items/x", TOY),
        ("PUT", "/v1/items/{id}", "/v1/items/x", TOY),
        ("POST", "/v1/items", "/v1/items", bulk),
        ("GET", "/v1/items/{id}", "/v1/items/x", None),
        ("GET", "/v1/items/{id}", "/v1/items/none", None),
        ("GET", "/v1/models", "/v1/models", None),
        ("GET", "/v1/models/{name}", "/v1/models/toys", None),
        ("GET", "/v1/models/{name}/versions/{version}", "/v1/models/toys/versions/1", None),
        ("PUT", "/v1/models/{name}/aliases/champion", "/v1/models/toys/aliases/champion", {"version": 1}),
        ("GET", "/v1/jobs/{id}", f"/v1/jobs/{job['id']}", None),
        ("GET", "/healthz", "/healthz", None),
        ("GET", "/readyz", "/readyz", None),
    ]
    for method, path, url, body in sent:
        answer = await toys.client.request(method, url, json=body)
        described = document["paths"][path][method.lower()]["responses"][str(answer.status_code)]
        media_type = answer.headers["content-type"]
        schema = {**described["content"][media_type]["schema"], "components": document["components"]}
        jsonschema.validate(answer.json(), schema)


async def test_the_examples_of_the_document_are_taken(toys: Running) -> None:
    schemas = (await toys.client.get("/openapi.json")).json()["components"]["schemas"]
    item = schemas["EmbeddingsRequest"]["properties"]["input"]["items"]["examples"][0]
    assert (await post(toys, "/v1/embeddings", {"input": [item]})).status_code == 200
    await toys.load()
    for example in schemas["SimilarRequest"]["examples"]:
        assert (await post(toys, "/v1/similar", example)).status_code in {200, 404}


async def test_the_page_needs_nothing_from_elsewhere(toys: Running) -> None:
    page = (await toys.client.get("/docs")).text
    assert "http" not in page
    for name in re.findall(r'(?:src|href)="(.*?)"', page):
        asset = await toys.client.get("/" + name)
        assert asset.status_code == 200
        assert len(asset.content) > 10_000
    assert (await toys.client.get("/docs/other.js")).status_code == 404
