"""A JSON body that is read as columns is answered as if it were read item by item; any other is left to that."""

import json
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest
import redis
import serving
from hypothesis import given
from hypothesis import strategies as st
from serving import DIM, TOY, Running, assert_problem, post

from itemvec.errors import InvalidItem
from itemvec.features import Batch, Encoded, FeatureTransform
from itemvec.schema import FeatureSchema
from service import columns, requests
from service.columns import NotColumns
from service.models import INLINE_BYTES
from service.requests import Limits

SCHEMA = """
name: films
id: tt
features:
  studio: {kind: nominal, min_count: 1}
  channel: {kind: nominal, dtype: integer, min_count: 1}
  colored: {kind: nominal, dtype: boolean, min_count: 1}
  genres: {kind: multi, min_count: 1}
  cast: {kind: multi, separator: "|", min_count: 1}
  tags: {kind: multi, dtype: integer, min_count: 1}
  rated: {kind: ordinal, order: [G, PG, R]}
  stars: {kind: ordinal, order: [1, 2, 3]}
  price: {kind: numeric}
  shown: {kind: timestamp}
  title: {kind: text, buckets: 32}
  views: {kind: series, points: 2}
  poster: {kind: vector, size: 2}
"""
FILM: dict[str, Any] = {
    "studio": "Acme", "channel": 4, "colored": True, "genres": ["Drama", "War"], "cast": "Ann|Bob", "tags": [7, 8],
    "rated": "PG", "stars": 2, "price": 9.5, "shown": "2020-05-01", "title": "One Two", "views": [1, 2.5, 4],
    "poster": [0.25, -1],
}  # fmt: skip
OTHER = {**FILM, "studio": "Blue", "rated": "R", "price": 4, "shown": "2021-01-02T03:04:05Z", "poster": [1.0, 2.0]}
TRANSFORM = FeatureTransform.fit(
    pa.Table.from_pylist([{"tt": "1", **FILM}, {"tt": "2", **OTHER}]), FeatureSchema.from_yaml(SCHEMA)
)
LIMITS = Limits(items=20, rows=99, labels=4, string=30, k=9, exclude=9, queries=9, examples=9, filter=9)


def read(body: bytes) -> columns.EmbeddingsColumns:
    return columns.read_embeddings(body, TRANSFORM.schema, LIMITS)


def arrays(batch: Batch) -> list[list[float]]:
    return [array.tolist() for array in (batch.dense, batch.indices, batch.weights, batch.lengths)]


def assert_as_item_by_item(found: columns.EmbeddingsColumns, encoded: Encoded, body: bytes, limits: Limits) -> None:
    wanted = requests.read_embeddings(body, limits)
    assert (found.model, found.base64, found.dimensions) == (wanted.model, wanted.base64, wanted.dimensions)
    by_item = TRANSFORM.transform(wanted.items)
    assert arrays(encoded.batch) == arrays(by_item.batch)
    assert encoded.statuses == by_item.statuses


text = st.sampled_from(["Acme", "Drama", "Ann|Bob", " é", "e\u0301", "", "😀", "2020-01-01", "PG", "x" * 30, "x" * 31])
number = st.sampled_from([0, 1, -2, 4, 2.5, -0.0, 1e300, 2**53 + 1, 2**64, 10**30, 1_600_000_000])
scalar = st.none() | text | number | st.booleans()
value = scalar | st.lists(scalar, max_size=5) | st.just({"deep": [[1]]})
plain = st.fixed_dictionaries(
    {},
    optional={
        "tt": text,
        "studio": st.none() | text,
        "channel": st.none() | st.integers(-5, 5),
        "colored": st.none() | st.booleans(),
        "genres": st.none() | st.lists(st.none() | text, max_size=4),
        "cast": st.none() | text,
        "tags": st.none() | st.lists(st.none() | st.integers(5, 9), max_size=4),
        "rated": st.none() | st.sampled_from(["G", " PG", "X"]),
        "stars": st.none() | st.integers(0, 4),
        "price": st.none() | number,
        "shown": st.none() | st.sampled_from(["2020-06-01", "2021-01-02T03:04:05+02:00", " "]),
        "title": st.none() | text,
        "views": st.none() | st.lists(st.none() | number, max_size=4),
        "poster": st.none() | st.lists(st.floats(-9, 9), min_size=2, max_size=2),
    },
)
odd = st.builds(lambda item, name, x: {**item, name: x}, plain, st.sampled_from([*FILM, "tt", "strange"]), value)
fields = st.fixed_dictionaries(
    {"input": st.lists(plain | plain | plain | odd, min_size=1, max_size=21)},
    optional={
        "model": st.sampled_from(["films", None, "", 7]),
        "encoding_format": st.sampled_from(["float", "base64", None, "hex"]),
        "dimensions": st.sampled_from([1, 8, None, 0, -1, 1.0, True, 2**70]),
        "user": st.sampled_from(["me", None, 3]),
    },
)
writers = st.sampled_from([json.dumps, lambda x: json.dumps(x, ensure_ascii=False), lambda x: json.dumps(x, indent=1)])


@given(fields, writers, st.sampled_from(["", " \n", "null"]))
def test_what_is_read_as_columns_are_the_numbers_and_the_fields_of_the_items(fields, write, end):
    body = (write(fields) + end).encode("utf-8", "surrogatepass")
    try:
        found = read(body)
        encoded = TRANSFORM.transform_arrow(found.table)
    except (NotColumns, InvalidItem):
        return
    assert_as_item_by_item(found, encoded, body, LIMITS)


@given(st.lists(plain, min_size=1, max_size=20), st.integers(1, 5), writers)
def test_items_with_values_of_the_right_types_are_read_as_columns_however_many(items, times, write):
    body = write({"input": items * times, "model": "films"}).encode("utf-8", "surrogatepass")
    limits = replace(LIMITS, items=100, string=31)
    if b"[null" in body.replace(b" ", b"").replace(b"\n", b""):  # as an item might be
        return
    found = columns.read_embeddings(body, TRANSFORM.schema, limits)
    assert_as_item_by_item(found, TRANSFORM.transform_arrow(found.table), body, limits)


PIECES = ["{", "}", "[", "]", ",", ":", '"', "\\", "null", "NaN", "1", "-", "e", ".", " ", "\n", "\0", '"tt":"1",']


@given(st.integers(0, 10_000), st.integers(0, 3), st.sampled_from([*map(str.encode, PIECES), b"\xff", b"\xed\xa0\x80"]))
def test_a_damaged_body_is_read_as_columns_only_if_it_still_means_the_same(at, cut, piece):
    whole = orjson.dumps({"input": [FILM, OTHER], "model": "films"})
    at %= len(whole)
    body = whole[:at] + piece + whole[at + cut :]
    try:
        found = read(body)
        encoded = TRANSFORM.transform_arrow(found.table)
    except (NotColumns, InvalidItem):
        return
    assert_as_item_by_item(found, encoded, body, LIMITS)


def test_items_as_the_schema_says_are_read_as_columns_with_all_that_they_may_lack():
    lacking = [FILM, {}, dict.fromkeys(FILM), {"tt": "1", "tags": []}, {"poster": [1, 2]}]
    found = read(orjson.dumps({"input": lacking, "model": "films@1", "encoding_format": "base64", "dimensions": 2}))
    assert (found.table.num_rows, found.model, found.base64, found.dimensions) == (5, "films@1", True, 2)
    assert found.table["cast"].to_pylist() == ["Ann|Bob", None, None, None, None]
    assert found.table["views"].to_pylist()[:2] == [[1.0, 2.5, 4.0], None]


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b'{"model": "films@2", "input": [{"model": "Corolla"}]}', "films@2"),
        (b'{"input": [{"model": "Corolla"}], "model" : "films"}', "films"),
        (b'{"input": [{"model": "Corolla"}]}', None),
    ],
)
def test_the_model_is_looked_for_outside_of_the_items(body, named):
    assert columns.model_named(body) == named


LEFT = {
    "a column of another name": '{"input": [{"strange": 1}]}',
    "a label of another type": '{"input": [{"studio": 1}]}',
    "a number as text": '{"input": [{"price": "1"}]}',
    "a fraction where labels are whole": '{"input": [{"channel": 1.5}]}',
    "a list of lists": '{"input": [{"genres": [["Drama"]]}]}',
    "a column twice": '{"input": [{"price": 1, "price": 2}]}',
    "a field twice": '{"input": [{}], "input": [{}, {}]}',
    "a field of another name": '{"input": [{}], "inputs": []}',
    "no items": '{"input": []}',
    "no list of items": '{"model": "films"}',
    "an item that is null": '{"input": [{}, null]}',
    "an item that is a list": '{"input": [[]]}',
    "too many items": json.dumps({"input": [{}] * 21}),
    "too many labels": '{"input": [{"tags": [1, 2, 3, 4, 5]}]}',
    "too long a text": json.dumps({"input": [{"title": "x" * 31}]}),
    "no such format": '{"input": [{}], "encoding_format": "hex"}',
    "no such size": '{"input": [{}], "dimensions": 0}',
    "an empty model": '{"input": [{}], "model": ""}',
    "two bodies": '{"input": [{}]} {"input": [{}]}',
    "a list": '[{"input": [{}]}]',
    "nothing": "",
    "white space": "  ",
    "not a number": '{"input": [{"price": NaN}]}',
    "no end": '{"input": [{"price": -Infinity}]}',
    "not a number in a list": '{"input": [{"views": [1, NaN]}]}',
    "a byte order mark": '\ufeff{"input": [{}]}',
    "what is behind a zero": '{"input": [{}]}\0 more',
}


@pytest.mark.parametrize("case", LEFT)
def test_any_other_body_is_left_to_be_read_item_by_item(case):
    with pytest.raises(NotColumns):
        read(LEFT[case].encode())


@pytest.mark.parametrize("inner", ["[", '{"a":', '{"price":', '{"genres":'])
def test_what_is_nested_without_end_is_not_followed(inner):
    for start in ("", '{"input": [', '{"input": [{"genres": ', '{"user": '):
        with pytest.raises(NotColumns):
            read((start + inner * 1_000_000).encode())


NOT_BEGUN = {
    "more objects than items may come": b'{"input": [' + b"{}," * 1_000_000 + b"{}]}",
    "items that are null": b'{"input": [null, null]}',
    "items that are null behind one": b'{"input": [{"price": 1} , null, null]}',
    "null": b"null",
    "null behind white space": b" \n null",
    "null behind the object": b'{"input": [{}]} \n null',
    "null behind the object in the next line": b'{"input": [{}]}\nnull\n',
}


@pytest.mark.parametrize("case", NOT_BEGUN)
def test_what_would_cost_much_memory_or_crash_arrow_is_not_given_to_it(case, monkeypatch):
    monkeypatch.setattr(pa.json, "read_json", None)
    with pytest.raises(NotColumns):
        read(NOT_BEGUN[case])


def test_white_space_without_end_takes_milliseconds():
    began = time.thread_time()
    for gap in ('{"input": [{"title": "a"}%s]}', '{"input": [%s{"title": "a"}]}', '{"input": [{"title": "a"},%s{}]}'):
        read((gap % (" " * 1_000_000)).encode())
    assert time.thread_time() - began < 2  # with its square it would be minutes


def test_labels_of_several_types_are_left_to_be_read_item_by_item():
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {x: {kind: ordinal, order: [1, two]}}")
    with pytest.raises(NotColumns):
        columns.read_embeddings(b'{"input": [{"x": 1}]}', schema, LIMITS)


# Over HTTP


@pytest.fixture(scope="module")
async def toys(anyio_backend: str, toy_registry: Path, redis_url: str) -> AsyncIterator[Running]:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    async with serving.running(toy_registry, redis_url) as service:
        yield service


MANY = [{**TOY, "price": 5.0 + i % 40, "name": f"toy {i} " + "of wood " * 20} for i in range(500)]
ODD = {**TOY, "shelf": 3}


def refuse(*_: object) -> None:
    raise AssertionError("read item by item")


@pytest.mark.anyio
@pytest.mark.parametrize("asked", [{}, {"encoding_format": "base64"}, {"dimensions": 4}, {"model": "toys@2"}])
async def test_many_items_get_the_answer_that_few_get(toys: Running, asked: Any, monkeypatch: Any) -> None:
    few = [await post(toys, "/v1/embeddings", {"input": MANY[at : at + 50], **asked}) for at in range(0, 500, 50)]
    monkeypatch.setattr(requests, "read_embeddings", refuse)
    body = orjson.dumps({"input": MANY, **asked})
    assert len(body) > INLINE_BYTES
    many = (await post(toys, "/v1/embeddings", body)).json()
    assert many["model"] == few[0].json()["model"] == asked.get("model", "toys@1")
    assert many["usage"] == {"prompt_tokens": 500, "total_tokens": 500}
    wanted = [one for answer in few for one in answer.json()["data"]]
    assert [one["columns"] for one in many["data"]] == [one["columns"] for one in wanted]
    if "encoding_format" not in asked:
        vectors = [np.array([one["embedding"] for one in data]) for data in (many["data"], wanted)]
        assert vectors[0].shape == (500, asked.get("dimensions", DIM))
        assert np.abs(vectors[0] - vectors[1]).max() <= 1e-6


@pytest.mark.anyio
async def test_the_model_may_stand_before_the_items_or_in_the_address(toys: Running, monkeypatch: Any) -> None:
    await post(toys, "/v1/embeddings", {"input": MANY, "model": "toys@2"})
    monkeypatch.setattr(requests, "read_embeddings", refuse)
    for path, fields in (("", {"model": "toys@2", "input": MANY}), ("?model=toys@2", {"input": MANY})):
        assert (await post(toys, "/v1/embeddings" + path, fields)).json()["model"] == "toys@2"
    both = await post(toys, "/v1/embeddings?model=toys@2", {"input": MANY, "model": "toys@1"})
    assert both.json()["model"] == "toys@1"


@pytest.mark.anyio
async def test_what_is_odd_about_one_of_many_items_is_said_as_of_few(toys: Running) -> None:
    answer = (await post(toys, "/v1/embeddings", {"input": [*MANY, ODD]})).json()
    assert [one["columns"] for one in answer["data"]] == [{}] * 500 + [{"shelf": "ignored"}]
    wrong = await post(toys, "/v1/embeddings", {"input": [*MANY, {"price": "cheap"}]})
    assert_problem(wrong, 422, "/input/500/price")
    assert_problem(await post(toys, "/v1/embeddings", {"input": MANY, "model": "boys"}), 404)
    assert_problem(await post(toys, "/v1/embeddings", {"input": MANY, "dimensions": 9}), 422, "/dimensions")
    assert_problem(await post(toys, "/v1/embeddings", orjson.dumps({"input": MANY})[:-1]), 400)


@pytest.mark.anyio
async def test_a_version_that_is_named_among_the_items_is_not_loaded_for_it(toys: Running) -> None:
    named = {**ODD, "model": "toys@3"}
    for items in ([*MANY, named], [named, *MANY]):
        assert (await post(toys, "/v1/embeddings", {"input": items})).json()["model"] == "toys@1"
    assert toys.models.held("toys@3") is None


@pytest.mark.anyio
async def test_a_table_of_several_parts_is_answered_in_its_order(toys: Running, monkeypatch: Any) -> None:
    few = (await post(toys, "/v1/embeddings", {"input": MANY[:40]})).json()["data"]
    monkeypatch.setattr(requests, "read_embeddings", refuse)
    many = (await post(toys, "/v1/embeddings", {"input": MANY[:40] * 60})).json()["data"]
    assert [one["index"] for one in many] == [*range(2400)]
    found, wanted = (np.array([one["embedding"] for one in data]) for data in (many[2040:2080], few))
    assert np.abs(found - wanted).max() <= 1e-6


@pytest.mark.anyio
async def test_few_items_are_kept_by_the_encode_cache_however_large_they_are(toys: Running) -> None:
    body = orjson.dumps({"input": [{**TOY, "name": f"{i} {'wood ' * 1000}"} for i in range(32)]})
    assert len(body) > INLINE_BYTES
    first, second = [await post(toys, "/v1/embeddings", body) for _ in range(2)]
    assert first.json()["data"] == second.json()["data"]
    counted = (await toys.client.get("/metrics")).text
    assert 'itemvec_cache_items_total{model="toys@1",result="local"} 32.0' in counted
