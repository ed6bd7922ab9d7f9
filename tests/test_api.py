"""What callers of the HTTP API can rely on. Everything behind it is real: models, Redis, the application."""

import base64
import math
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import serving
from serving import DIM, ITEMS, JSON, TOY, Running, assert_problem, post
from test_runs import run_of

from itemvec.runs import Runs
from itemvec.version import ModelVersion

pytestmark = pytest.mark.anyio


# Embeddings


async def test_embeddings_have_the_shape_that_openai_clients_read(toys: Running) -> None:
    answer = await post(toys, "/v1/embeddings", {"input": [TOY, {"maker": "Nobel", "price": None, "weight": 3}]})
    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "list"
    assert [(d["object"], d["index"]) for d in body["data"]] == [("embedding", 0), ("embedding", 1)]
    assert body["model"] == "toys@1"
    assert body["fingerprint"] == toys.models.champion().fingerprint
    assert body["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert "degraded" not in body
    assert all(math.hypot(*d["embedding"]) == pytest.approx(1, abs=1e-6) for d in body["data"])
    assert body["data"][0]["columns"] == {}
    columns = body["data"][1]["columns"]
    assert (columns["maker"], columns["price"], columns["weight"]) == ("oov", "missing", "ignored")


async def test_http_and_the_model_version_give_the_same_vectors(toys: Running) -> None:
    items = list(ITEMS.values())
    wanted = ModelVersion.load(toys.registry.path("toys", 1)).encode(items).vectors
    as_numbers = await post(toys, "/v1/embeddings", {"input": items})
    got = np.array([d["embedding"] for d in as_numbers.json()["data"]], np.float32)
    assert np.abs(got - wanted).max() <= 1e-6
    as_base64 = await post(toys, "/v1/embeddings", {"input": items, "encoding_format": "base64"})
    for row, data in zip(wanted, as_base64.json()["data"], strict=True):
        assert np.abs(np.frombuffer(base64.b64decode(data["embedding"]), "<f4") - row).max() <= 1e-6


async def test_a_stored_item_has_the_vector_that_an_embedding_of_it_has(toys: Running) -> None:
    await toys.client.put("/v1/items/x", json=TOY)
    stored = (await toys.client.get("/v1/items/x")).json()["embedding"]
    embedding = (await post(toys, "/v1/embeddings", {"input": [TOY]})).json()["data"][0]["embedding"]
    assert stored == pytest.approx(embedding, abs=1e-6)


@pytest.mark.parametrize(
    ("model", "version"), [("toys", "toys@1"), ("toys@champion", "toys@1"), ("toys@2", "toys@2"), (None, "toys@1")]
)
async def test_a_request_may_name_a_version(toys: Running, model: str | None, version: str) -> None:
    answer = await post(toys, "/v1/embeddings", {"input": [TOY], "model": model})
    assert answer.json()["model"] == version
    assert answer.json()["fingerprint"] == toys.registry.manifest("toys", int(version[-1])).fingerprint


async def test_the_query_string_may_name_it_too_but_not_by_a_misspelt_parameter(toys: Running) -> None:
    item, named = {"input": [TOY]}, {"input": [TOY], "model": "toys@3"}
    assert (await post(toys, "/v1/embeddings?model=toys@2", item)).json()["model"] == "toys@2"
    assert (await post(toys, "/v1/embeddings?model=toys@2", named)).json()["model"] == "toys@3"
    assert_problem(await post(toys, "/v1/embeddings?model=", item), 422, "/model")  # a template's empty variable
    for method, path, sent in (
        ("PUT", "/v1/items/x", TOY), ("GET", "/v1/items/x", None), ("DELETE", "/v1/items/x", None),
        ("POST", "/v1/items", {"items": [{"id": "x", **TOY}]}),
    ):  # fmt: skip
        assert_problem(await toys.client.request(method, f"{path}?model=", json=sent), 422, "/model")
    for path in ("/v1/embeddings?modle=toys@2", "/v1/similar?modle=toys@2"):
        told = assert_problem(await post(toys, path, item), 422, "/modle")
    assert told["detail"] == "/modle: is no parameter that the query string of this call can have; there is none"


async def test_challenger_is_read_from_the_registry(toys: Running) -> None:
    toys.registry.set_alias("toys", "challenger", 3)
    answer = await post(toys, "/v1/embeddings", {"input": [TOY], "model": "toys@challenger"})
    assert answer.json()["model"] == "toys@3"


@pytest.mark.parametrize(
    "model", ["nobody", "nobody@7", "toys@99", "toys@previous", "toys@²", "../toys@1", "@", "a@b@c"]
)
async def test_an_unknown_model_is_404(toys: Running, model: str) -> None:
    assert_problem(await post(toys, "/v1/embeddings", {"input": [TOY], "model": model}), 404)


async def test_fewer_dimensions_are_the_first_numbers_brought_to_length_1(toys: Running) -> None:
    [whole] = toys.models.champion().encode([TOY]).vectors
    for size in (1, 4, DIM):
        answer = await post(toys, "/v1/embeddings", {"input": [TOY], "dimensions": size})
        wanted = whole[:size] / np.linalg.norm(whole[:size])
        assert answer.json()["data"][0]["embedding"] == pytest.approx(wanted, abs=1e-6)
    assert_problem(await post(toys, "/v1/embeddings", {"input": [TOY], "dimensions": DIM + 1}), 422, "/dimensions")


# Items

IDS = [
    "plain",
    "with space",
    "a/b/c",
    "contract/check 1",
    "%2F",
    "ünï",
    "🎲",
    "a?b#c&d",
    "..",
    "{x}",
    "new\nline",
    "x" * 512,
]


@pytest.mark.parametrize("item_id", IDS)
async def test_an_item_of_any_id_is_created_replaced_read_and_removed(toys: Running, item_id: str) -> None:
    path = "/v1/items/" + quote(item_id, safe="").replace(".", "%2E")
    sent = {**TOY, "shelf": "unknown to the schema, kept all the same"}
    created = await toys.client.put(path, json=sent)
    assert (created.status_code, created.json()["status"], created.json()["id"]) == (201, "created", item_id)
    updated = await toys.client.put(path, json={**sent, "price": 7.0})
    assert (updated.status_code, updated.json()["status"]) == (200, "updated")
    got = (await toys.client.get(path)).json()
    assert (got["id"], got["item"]) == (item_id, {**sent, "price": 7.0})
    assert len(got["embedding"]) == DIM
    assert (got["model"], got["fingerprint"]) == ("toys@1", toys.models.champion().fingerprint)
    removed = await toys.client.delete(path)
    assert (removed.status_code, removed.content) == (204, b"")
    assert (removed.headers["x-model"], removed.headers["x-fingerprint"]) == (got["model"], got["fingerprint"])
    assert not {"content-length", "content-type"} & removed.headers.keys()
    assert_problem(await toys.client.get(path), 404)
    assert_problem(await toys.client.delete(path), 404)


@pytest.mark.parametrize(
    ("segment", "status"), [("x" * 513, 422), ("%F0%9F%8E%B2" * 129, 422), ("%ff", 400), ("", 404)]
)
async def test_an_id_that_cannot_be_is_refused(toys: Running, segment: str, status: int) -> None:
    assert_problem(await toys.client.put(f"/v1/items/{segment}", json=TOY), status)


async def test_an_item_may_repeat_its_id_but_not_name_another(toys: Running) -> None:
    assert (await toys.client.put("/v1/items/x", json={**TOY, "id": "x"})).status_code == 201
    assert "id" not in (await toys.client.get("/v1/items/x")).json()["item"]
    assert_problem(await toys.client.put("/v1/items/x", json={**TOY, "id": "y"}), 422, "/id")


async def test_a_wrong_item_is_not_stored(toys: Running) -> None:
    assert_problem(await toys.client.put("/v1/items/x", json={**TOY, "tags": 7}), 422, "/tags")
    assert_problem(await toys.client.get("/v1/items/x"), 404)


async def test_an_item_nested_too_deeply_is_refused(toys: Running) -> None:
    body = b'{"note": ' + b"[" * 600 + b"]" * 600 + b"}"
    assert_problem(await toys.client.put("/v1/items/x", content=body, headers=JSON), 422, "")


@pytest.mark.parametrize("column", ["maker", "tags", "price", "age", "name", "added"])
async def test_a_value_nested_as_deeply_as_json_is_read_is_refused_by_its_place(toys: Running, column: str) -> None:
    nested = b'{"a":' * 1015 + b"1" + b"}" * 1015
    body = b'{"input": [{"%b": %b}]}' % (column.encode(), nested)
    answer = await toys.client.post("/v1/embeddings", content=body, headers=JSON)
    assert_problem(answer, 422, f"/input/0/{column}")
    where = b'{"id": "x", "filter": {"eq": {"%b": %b}}}' % (column.encode(), nested)
    assert (await toys.client.post("/v1/similar", content=where, headers=JSON)).status_code == 422


async def test_an_id_whose_last_item_is_wrong_is_not_said_to_be_kept(toys: Running) -> None:
    items = [{"id": "a", "price": 1}, {"id": "a", "price": "much"}]
    first, last = (await post(toys, "/v1/items", {"items": items})).json()["items"]
    assert first["problem"]["errors"][0]["detail"] == "comes again at /items/1: the last one counts"
    assert last["problem"]["errors"][0]["pointer"] == "/items/1/price"


async def test_bulk_keeps_the_good_ones_and_tells_of_each(toys: Running) -> None:
    await toys.client.put("/v1/items/old", json=TOY)
    items = [
        {"id": "new", **TOY},
        {"id": "wrong", **TOY, "tags": 5},
        {**TOY},
        {"id": 7, **TOY},
        {"id": "old", **TOY, "maker": "Nobel"},
        "no item",
        {"id": "twice", "price": 1},
        {"id": "wrong too", "price": "much"},
        {"id": "twice", "price": 2},
    ]
    body = (await post(toys, "/v1/items", {"items": items})).json()
    assert [(e["id"], e["status"]) for e in body["items"]] == [
        ("new", "created"), ("wrong", "refused"), (None, "refused"), (None, "refused"), ("old", "updated"),
        (None, "refused"), ("twice", "refused"), ("wrong too", "refused"), ("twice", "created"),
    ]  # fmt: skip
    assert (body["created"], body["updated"], body["refused"], body["model"]) == (2, 1, 6, "toys@1")
    pointers = [e["problem"]["errors"][0]["pointer"] for e in body["items"] if e["status"] == "refused"]
    assert pointers == ["/items/1/tags", "/items/2/id", "/items/3/id", "/items/5", "/items/6/id", "/items/7/price"]
    assert body["items"][4]["columns"] == {"maker": "oov"}
    assert (await toys.client.get("/v1/items/twice")).json()["item"] == {"price": 2}
    assert_problem(await toys.client.get("/v1/items/wrong"), 404)


@pytest.mark.parametrize(
    ("body", "pointer"),
    [({}, "/items"), ({"items": TOY}, "/items"), ({"items": []}, "/items"), ({"items": [TOY], "x": 1}, "/x")],
)
async def test_a_wrong_bulk_is_refused_as_a_whole(toys: Running, body: dict[str, Any], pointer: str) -> None:
    assert_problem(await post(toys, "/v1/items", body), 422, pointer)


async def test_items_belong_to_a_model_not_to_a_version(toys: Running) -> None:
    assert (await toys.client.put("/v1/items/x?model=toys", json=TOY)).status_code == 201
    assert_problem(await toys.client.put("/v1/items/x?model=toys@2", json=TOY), 422, "/model")
    assert_problem(await toys.client.get("/v1/items/x?model=nobody"), 404)
    assert_problem(await toys.client.get("/v1/items/x?model=%ff"), 400)


# Similar


async def test_neighbors_of_a_stored_item_are_the_others_best_first(toys: Running) -> None:
    await toys.load()
    body = (await post(toys, "/v1/similar", {"id": "toy 3"})).json()
    vectors = dict(zip(ITEMS, toys.models.champion().encode(list(ITEMS.values())).vectors, strict=True))
    wanted = sorted((float(v @ vectors["toy 3"]) for sku, v in vectors.items() if sku != "toy 3"), reverse=True)[:10]
    assert [n["score"] for n in body["neighbors"]] == pytest.approx(wanted, abs=1e-5)
    assert "toy 3" not in [n["id"] for n in body["neighbors"]]
    assert (body["model"], body["fingerprint"]) == ("toys@1", toys.models.champion().fingerprint)


async def test_an_item_its_vector_and_its_id_have_the_same_neighbors(toys: Running) -> None:
    await toys.load()
    answer = (await post(toys, "/v1/embeddings", {"input": [TOY], "encoding_format": "base64"})).json()
    packed = answer["data"][0]["embedding"]
    numbers = [3 * float(x) for x in np.frombuffer(base64.b64decode(packed), "<f4")]  # its length does not matter
    huge = [1e300 * x for x in numbers]
    queries = [{"item": TOY}, {"embedding": numbers}, {"embedding": huge}, {"embedding": packed}, {"id": "toy 3"}]
    answers = [(await post(toys, "/v1/similar", {**q, "k": 5, "exclude": ["toy 3"]})).json() for q in queries]
    first = [n["id"] for n in answers[0]["neighbors"]]
    assert len(first) == 5
    assert all([n["id"] for n in a["neighbors"]] == first for a in answers)


async def test_an_item_is_searchable_at_once_and_nearest_to_itself(toys: Running) -> None:
    await toys.load()
    await toys.client.put("/v1/items/new%2Fone", json={**TOY, "price": 12.5, "name": "wooden top"})
    body = (await post(toys, "/v1/similar", {"item": {**TOY, "price": 12.5, "name": "wooden top"}, "k": 1})).json()
    assert [n["id"] for n in body["neighbors"]] == ["new/one"]
    assert body["neighbors"][0]["score"] > 0.9999
    assert body["columns"] == {}


async def test_excluded_items_make_room_for_others(toys: Running) -> None:
    await toys.load()
    ten = [n["id"] for n in (await post(toys, "/v1/similar", {"id": "toy 3", "k": 10})).json()["neighbors"]]
    rest = (await post(toys, "/v1/similar", {"id": "toy 3", "k": 5, "exclude": ten[:5]})).json()["neighbors"]
    assert [n["id"] for n in rest] == ten[5:]


async def test_there_are_no_more_neighbors_than_items(toys: Running) -> None:
    await toys.client.put("/v1/items/a", json=TOY)
    assert len((await post(toys, "/v1/similar", {"item": TOY, "k": 1000})).json()["neighbors"]) == 1
    assert (await post(toys, "/v1/similar", {"id": "a", "k": 1})).json()["neighbors"] == []


async def test_a_version_without_an_index_has_no_neighbors_and_says_so(toys: Running) -> None:
    problem = assert_problem(await post(toys, "/v1/similar", {"item": TOY, "model": "toys@2"}), 409)
    assert "searchable: toys@1" in problem["detail"]


async def test_a_backfilled_version_can_be_searched_beside_the_served_one(toys: Running) -> None:
    await toys.load()
    toys.registry.set_alias("toys", "challenger", 2)
    assert_problem(await post(toys, "/v1/similar", {"id": "toy 3", "model": "toys@challenger"}), 409)
    started = await post(toys, "/v1/models/toys/backfill", {"version": 2})
    assert started.status_code == 202
    job = started.json()["job"]
    assert started.headers["location"] == f"/v1/jobs/{job['id']}"
    job = await toys.finished(job["id"])
    assert (job["kind"], job["state"], job["progress"]) == ("backfill", "succeeded", {"done": 40, "total": 40})
    assert toys.models.champion().ref == "toys@1"
    other = ModelVersion.load(toys.registry.path("toys", 2))
    await toys.client.put("/v1/items/new", json={**TOY, "price": 11.0})  # reaches both
    for model, version in (("toys@challenger", other), ("toys", toys.models.champion())):
        body = (await post(toys, "/v1/similar", {"id": "toy 3", "model": model, "k": 50})).json()
        assert body["fingerprint"] == version.fingerprint
        vectors = dict(zip(ITEMS, version.encode(list(ITEMS.values())).vectors, strict=True))
        vectors["new"] = version.encode([{**TOY, "price": 11.0}]).vectors[0]
        wanted = sorted((float(v @ vectors["toy 3"]) for sku, v in vectors.items() if sku != "toy 3"), reverse=True)
        assert [near["score"] for near in body["neighbors"]] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status"), [({"version": 99}, 404), ({"version": "2"}, 422), ({}, 422), ({"version": 2, "x": 1}, 422)]
)
async def test_a_backfill_of_no_version_is_refused(toys: Running, body: dict[str, Any], status: int) -> None:
    assert_problem(await post(toys, "/v1/models/toys/backfill", body), status)
    assert_problem(await post(toys, "/v1/models/nobody/backfill", {"version": 1}), 404)


# Models


async def test_models_tell_their_versions_aliases_schema_and_evaluation(toys: Running) -> None:
    [model] = (await toys.client.get("/v1/models")).json()["data"]
    assert (model["id"], model["model"], model["versions"]) == ("toys", "toys@1", [1, 2, 3])
    assert model["aliases"] == {"champion": 1}
    assert (model["items"], model["index"], model["dimensions"]) == (0, "flat", [DIM])
    one = (await toys.client.get("/v1/models/toys")).json()
    assert set(one["item_schema"]["properties"]) == {"name", "maker", "tags", "price", "age", "added"}
    assert one["evaluation"] == {"recall@10": 0.5}
    version = (await toys.client.get("/v1/models/toys/versions/2")).json()
    assert version["model"] == "toys@2"
    assert version["manifest"]["lineage"]["config"] == {"seed": 2}
    assert version["fingerprint"] == version["manifest"]["fingerprint"]


@pytest.mark.parametrize(
    "path",
    [
        *("nobody", "..", "toys/versions/9", "toys/versions/x", "%2e%2e/versions/1", "toys/aliases/x"),
        pytest.param("toys/versions/" + "9" * 4400, id="more digits than int() reads"),
    ],
)
async def test_an_unknown_model_version_or_alias_is_404(toys: Running, path: str) -> None:
    assert_problem(await toys.client.get(f"/v1/models/{quote(path, safe='/%')}"), 404)


@pytest.mark.parametrize("content", ["[]", "{", '{"champion": "one"}'])
async def test_aliases_that_are_none_are_told_and_what_is_served_goes_on(toys: Running, content: str) -> None:
    (toys.registry.path("toys", 1).parents[1] / "aliases.json").write_text(content)
    for path in ("/v1/models", "/v1/models/toys", "/v1/models/toys/versions/champion"):
        assert "aliases.json" in assert_problem(await toys.client.get(path), 503)["detail"]
    assert_problem(await post(toys, "/v1/embeddings", {"input": [TOY], "model": "toys@challenger"}), 503)
    assert (await post(toys, "/v1/embeddings", {"input": [TOY]})).json()["model"] == "toys@1"


# The service


async def test_ready_tells_models_and_store(toys: Running) -> None:
    answer = await toys.client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json() == {"ready": True, "models": {"toys": "toys@1"}, "store": "ok"}


async def test_metrics_count_requests_items_and_columns(toys: Running) -> None:
    await post(toys, "/v1/embeddings", {"input": [TOY, {**TOY, "maker": "Nobel"}]})
    text = (await toys.client.get("/metrics")).text
    assert 'itemvec_requests_total{endpoint="/v1/embeddings",method="POST",status="200"} 1.0' in text
    assert 'itemvec_items_encoded_total{model="toys@1"} 2.0' in text
    assert 'itemvec_column_status_total{column="maker",model="toys@1",status="oov"} 1.0' in text


# Without Redis


async def test_without_redis_encoding_goes_on_and_the_store_says_when_to_return(
    tmp_path: Any, toy_registry: Any
) -> None:
    nowhere = f"unix://{tmp_path}/none.sock"
    async with serving.running(toy_registry, nowhere, searchable=False) as service:
        for _ in range(6):  # the breaker opens
            answer = await service.client.get("/v1/items/x")
            assert_problem(answer, 503)
            assert int(answer.headers["retry-after"]) >= 1
        assert_problem(await service.client.put("/v1/items/x", json=TOY), 503)
        assert_problem(await post(service, "/v1/items", {"items": [{"id": "x", **TOY}]}), 503)
        assert_problem(await post(service, "/v1/similar", {"item": TOY}), 503)
        assert_problem(await service.client.put("/v1/models/toys/aliases/champion", json={"version": 2}), 503)
        counted = (await service.client.get("/metrics")).text
        assert 'itemvec_store_errors_total{operation="get"} 6.0' in counted
        body = (await post(service, "/v1/embeddings", {"input": [TOY]})).json()
        assert body["degraded"] is True
        assert len(body["data"][0]["embedding"]) == DIM
        ready = await service.client.get("/readyz")
        assert (ready.status_code, ready.json()["store"]) == (200, "unavailable")
        assert (await service.client.get("/healthz")).status_code == 200


async def test_it_is_ready_when_the_store_holds_as_many_items_as_asked_for(toy_registry, empty_redis):
    async with serving.running(toy_registry, empty_redis, ready_items=2) as service:
        answers = []
        for sku in ("a", "b"):
            answers.append(await service.client.get("/readyz"))
            assert (await service.client.put(f"/v1/items/{sku}", json=TOY)).status_code == 201
        answers.append(await service.client.get("/readyz"))
        await service.client.delete("/v1/items/a")  # a smaller catalogue later is no reason to stop serving
        answers.append(await service.client.get("/readyz"))
        seen = [(answer.status_code, answer.json()["store"]) for answer in answers]
        assert seen == [(503, "loading"), (503, "loading"), (200, "ok"), (200, "loading")]


async def test_retrainings_are_listed_newest_first_and_shown(toys: Running) -> None:
    store = Runs(toys.registry)
    for day in ("21", "22", "23"):
        store.save(run_of(1, f"202611{day}-031700-000000-0a1b"))
    listed = (await toys.client.get("/v1/runs")).json()["data"]
    assert [run["id"][:8] for run in listed] == ["20261123", "20261122", "20261121"]
    assert (await toys.client.get("/v1/runs?model=toys")).json()["data"] == listed
    shown = (await toys.client.get(f"/v1/runs/{listed[0]['id']}")).json()
    assert shown == listed[0]
    assert (shown["state"], shown["steps"][0]["seconds"]) == ("interrupted", 1.5)
    assert_problem(await toys.client.get("/v1/runs/20261123-031700-000000-ffff"), 404)
    assert_problem(await toys.client.get("/v1/runs?model=films"), 404)
