"""Hard inputs: each has its status and its pointer, and none is a 500."""

import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
import serving
from serving import DIM, TOY, Running, assert_problem, post

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
async def toys(anyio_backend: str, toy_registry: Path, redis_url: str) -> AsyncIterator[Running]:
    """One service for all of these tests: none of them changes anything."""
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    async with serving.running(toy_registry, redis_url) as service:
        yield service


OK: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "unseen labels": ({**TOY, "maker": "Nobel", "tags": ["wood", "glass"]}, {"maker": "oov", "tags": "partly_oov"}),
    "missing columns": ({"maker": "Ada"}, {"price": "missing", "tags": "missing", "added": "missing"}),
    "no column at all": ({}, {"maker": "missing", "name": "missing"}),
    "null": ({**TOY, "price": None}, {"price": "missing"}),
    "unknown columns": ({**TOY, "weight": 3, "a/b~c": {"deep": [1]}}, {"weight": "ignored", "a/b~c": "ignored"}),
    "an empty list": ({**TOY, "tags": []}, {"tags": "missing"}),
    "an empty string": ({**TOY, "maker": ""}, {"maker": "missing"}),
    "emoji": ({**TOY, "name": "🎲🧸", "maker": "👩‍🔬"}, {"maker": "oov"}),
    "a number beyond the training range": ({**TOY, "price": 1e300}, {"price": "clipped"}),
    "a number beyond 64 bits": ({**TOY, "price": 10**30}, {"price": "clipped"}),
    "1,000 labels in one set": ({**TOY, "tags": [f"t{i}" for i in range(1000)]}, {"tags": "oov"}),
}


@pytest.mark.parametrize("case", OK)
async def test_any_value_of_the_right_type_is_encoded(toys: Running, case: str) -> None:
    item, columns = OK[case]
    answer = await post(toys, "/v1/embeddings", json.dumps({"input": [item]}).encode())
    assert answer.status_code == 200, answer.text
    got = answer.json()["data"][0]["columns"]
    assert {name: got.get(name) for name in columns} == columns


WRONG: dict[str, tuple[bytes | Any, int, str | None]] = {
    "no body": (b"", 400, None),
    "not JSON": (b"{nope", 400, None),
    "not UTF-8": (b'{"input": [{"name": "\xff"}]}', 400, None),
    "a lone surrogate": (b'{"input": [{"name": "\\ud800"}]}', 400, None),
    "NaN": (b'{"input": [{"price": NaN}]}', 400, None),
    "a number beyond double": (b'{"input": [{"price": 1e400}]}', 400, None),
    "too deep to read": (b'{"input": [' + b"[" * 5000 + b"]" * 5000 + b"]}", 400, None),
    "not an object": ([TOY], 422, ""),
    "null alone": (None, 422, ""),
    "no input": ({}, 422, "/input"),
    "input null": ({"input": None}, 422, "/input"),
    "input not a list": ({"input": TOY}, 422, "/input"),
    "no items": ({"input": []}, 422, "/input"),
    "too many items": ({"input": [{}] * 4097}, 422, "/input"),
    "an item that is text": ({"input": [TOY, "a toy"]}, 422, "/input/1"),
    "an item that is null": ({"input": [None]}, 422, "/input/0"),
    "a string where a number belongs": ({"input": [TOY, {**TOY, "price": "long"}]}, 422, "/input/1/price"),
    "a boolean where a number belongs": ({"input": [{"price": True}]}, 422, "/input/0/price"),
    "a number where a set belongs": ({"input": [{"tags": 7}]}, 422, "/input/0/tags"),
    "a number where a label belongs": ({"input": [{"maker": 7}]}, 422, "/input/0/maker"),
    "an object where a label belongs": ({"input": [{"maker": {"a": 1}}]}, 422, "/input/0/maker"),
    "a number within a set": ({"input": [{"tags": ["wood", 7]}]}, 422, "/input/0/tags/1"),
    "no date": ({"input": [{"added": "yesterday"}]}, 422, "/input/0/added"),
    "10,000 labels in one set": ({"input": [{"tags": [f"t{i}" for i in range(10_000)]}]}, 422, "/input/0/tags"),
    "a string of 100,000 characters": ({"input": [{"name": "x" * 100_000}]}, 422, "/input/0/name"),
    "such a label": ({"input": [{"tags": ["x" * 100_000]}]}, 422, "/input/0/tags/0"),
    "1,001 columns": ({"input": [{f"c{i}": i for i in range(1001)}]}, 422, "/input/0"),
    "a format unheard of": ({"input": [TOY], "encoding_format": "hex"}, 422, "/encoding_format"),
    "a format of another type": ({"input": [TOY], "encoding_format": ["float"]}, 422, "/encoding_format"),
    "a model that is a number": ({"input": [TOY], "model": 7}, 422, "/model"),
    "a misspelt field": ({"input": [TOY], "modle": "toys"}, 422, "/modle"),
    "a field with a slash": ({"input": [TOY], "a/b": 1}, 422, "/a~1b"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_body_is_told_with_its_place(toys: Running, case: str) -> None:
    body, status, pointer = WRONG[case]
    assert_problem(await post(toys, "/v1/embeddings", body), status, pointer)


async def test_limits_are_named(toys: Running) -> None:
    answer = await post(toys, "/v1/embeddings", {"input": [{"tags": [f"t{i}" for i in range(5000)]}]})
    assert "up to 4096" in assert_problem(answer, 422, "/input/0/tags")["detail"]


async def test_of_many_items_those_beyond_a_limit_are_refused_and_the_others_stored(toys: Running) -> None:
    limits = {
        "long": {"name": "x" * 65_537},
        "broad": {"tags": ["red"] * 4097},
        "long label": {"tags": ["red", "x" * 65_537]},
    }
    items = [{"id": "good", **TOY}, *({"id": item_id, **item} for item_id, item in limits.items())]
    stored = (await post(toys, "/v1/items", {"items": items})).json()["items"]
    assert [one["status"] for one in stored] == ["created", "refused", "refused", "refused"]
    pointers = [one["problem"]["errors"][0]["pointer"] for one in stored[1:]]
    assert pointers == ["/items/1/name", "/items/2/tags", "/items/3/tags/1"]


NOT_NUMBERS = base64.b64encode(np.full(DIM, np.nan, "<f4").tobytes()).decode()
SIMILAR: dict[str, tuple[bytes | dict[str, Any], int, str | None]] = {
    "k = 0": ({"id": "toy 3", "k": 0}, 422, "/k"),
    "k < 0": ({"id": "toy 3", "k": -1}, 422, "/k"),
    "k beyond the limit": ({"id": "toy 3", "k": 1001}, 422, "/k"),
    "k beyond 64 bits": (b'{"id": "toy 3", "k": 99999999999999999999999}', 422, "/k"),
    "k a string": ({"id": "toy 3", "k": "5"}, 422, "/k"),
    "k a boolean": ({"id": "toy 3", "k": True}, 422, "/k"),
    "k a fraction": ({"id": "toy 3", "k": 2.5}, 422, "/k"),
    "k null": ({"id": "toy 3", "k": None}, 422, "/k"),
    "nothing to look for": ({"k": 3}, 422, ""),
    "two things to look for": ({"id": "toy 3", "item": TOY}, 422, ""),
    "an unknown id": ({"id": "nobody"}, 404, None),
    "an id that is a number": ({"id": 3}, 422, "/id"),
    "an id that is too long": ({"id": "x" * 513}, 422, "/id"),
    "an item that is a list": ({"item": [TOY]}, 422, "/item"),
    "a wrong value in an item": ({"item": {**TOY, "price": "much"}}, 422, "/item/price"),
    "a vector of the wrong size": ({"embedding": [0.5, 0.5]}, 422, "/embedding"),
    "an empty vector": ({"embedding": []}, 422, "/embedding"),
    "a vector without direction": ({"embedding": [0.0] * DIM}, 422, "/embedding"),
    "a vector of strings": ({"embedding": ["1"] * DIM}, 422, "/embedding/0"),
    "a vector with null": ({"embedding": [1.0] * (DIM - 1) + [None]}, 422, f"/embedding/{DIM - 1}"),
    "a vector with a boolean": ({"embedding": [True] * DIM}, 422, "/embedding/0"),
    "a vector that is an object": ({"embedding": {}}, 422, "/embedding"),
    "NaN in a vector": (b'{"embedding": [NaN, 1.0]}', 400, None),
    "NaN in base64": ({"embedding": NOT_NUMBERS}, 422, "/embedding"),
    "no base64": ({"embedding": "no base64"}, 422, "/embedding"),
    "base64 of no float32": ({"embedding": "YWE="}, 422, "/embedding"),
    "exclude not a list": ({"id": "toy 3", "exclude": "toy 1"}, 422, "/exclude"),
    "exclude of numbers": ({"id": "toy 3", "exclude": ["toy 1", 2]}, 422, "/exclude/1"),
    "too many excluded": ({"id": "toy 3", "exclude": ["x"] * 1001}, 422, "/exclude"),
    "a field of another call": ({"id": "toy 3", "filter": {}}, 422, "/filter"),
    "a version without an index": ({"id": "toy 3", "model": "toys@2"}, 404, None),
}  # fmt: skip


@pytest.mark.parametrize("case", SIMILAR)
async def test_a_wrong_search_is_told_with_its_place(toys: Running, case: str) -> None:
    body, status, pointer = SIMILAR[case]
    assert_problem(await post(toys, "/v1/similar", body), status, pointer)
