"""Arrow streams in and out: the numbers of JSON, and a status for every hard stream."""

import asyncio
import math
import re
import struct
import threading
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import serving
from serving import DIM, ITEMS, SCHEMA, TOY, TOYS, Running, assert_problem, post

from itemvec.schema import FeatureSchema
from service import arrow
from service.requests import Limits

pytestmark = pytest.mark.anyio

STREAM = "application/vnd.apache.arrow.stream"
SENT = {"Content-Type": STREAM}


def stream(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


async def sent(
    service: Running, table: pa.Table | bytes, path: str = "/v1/embeddings", **headers: str
) -> httpx.Response:
    content = table if isinstance(table, bytes) else stream(table)
    return await service.client.post(path, content=content, headers={**SENT, **headers})


def received(answer: httpx.Response) -> pa.Table:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == STREAM
    return pa.ipc.open_stream(answer.content).read_all()


def vectors(table: pa.Table) -> Any:
    return np.stack(table["embedding"].to_numpy())


# Embeddings


async def test_a_stream_gives_the_vectors_and_the_columns_that_json_gives(toys: Running) -> None:
    items = [TOY, {**TOY, "maker": "Nobel", "price": None}, {"tags": ["wood", "glass"], "price": 1e9}]
    json = (await post(toys, "/v1/embeddings", {"input": items})).json()
    answer = received(await sent(toys, pa.Table.from_pylist(items, pa.Table.from_pylist(items[:2]).schema)))
    wanted = np.array([data["embedding"] for data in json["data"]], np.float32)
    assert np.abs(vectors(answer) - wanted).max() <= 1e-6
    assert [dict(row) for row in answer["columns"].to_pylist()] == [data["columns"] for data in json["data"]]
    assert answer.schema.field("embedding").type == pa.list_(pa.float32(), DIM)
    assert answer.schema.metadata == {b"model": b"toys@1", b"fingerprint": json["fingerprint"].encode()}


async def test_ids_come_back_beside_their_vectors(toys: Running) -> None:
    for name in ("sku", "id"):  # the schema's own word, and that of the API
        table = pa.Table.from_pylist(TOYS).rename_columns([name, *pa.Table.from_pylist(TOYS).column_names[1:]])
        answer = received(await sent(toys, table))
        assert answer["id"].to_pylist() == list(ITEMS)
        assert [dict(row) for row in answer["columns"].to_pylist()] == [{}] * 40


async def test_the_header_accept_chooses_the_form_of_the_answer(toys: Running) -> None:
    table = pa.Table.from_pylist([TOY])
    for headers, media_type in (
        ({}, STREAM),
        ({"Accept": "*/*"}, STREAM),
        ({"Accept": STREAM}, STREAM),
        ({"Accept": "application/json"}, "application/json"),
    ):
        assert (await sent(toys, table, **headers)).headers["content-type"] == media_type
    asked = {"Accept": STREAM}
    answer = await toys.client.post("/v1/embeddings", json={"input": [TOY], "dimensions": 4}, headers=asked)
    assert vectors(received(answer)).shape == (1, 4)
    plain = await toys.client.post("/v1/embeddings", json={"input": [TOY]}, headers={"Accept": "*/*"})
    assert plain.headers["content-type"] == "application/json"


async def test_model_and_dimensions_stand_in_the_query(toys: Running) -> None:
    table = pa.Table.from_pylist([TOY])
    answer = received(await sent(toys, table, "/v1/embeddings?model=toys@2&dimensions=4"))
    assert answer.schema.metadata[b"model"] == b"toys@2"
    assert np.linalg.norm(vectors(answer)) == pytest.approx(1, abs=1e-6)
    for query, pointer in (("dimensions=0", "/dimensions"), ("dimensions=x", "/dimensions"), ("modle=toys", "/modle")):
        assert_problem(await sent(toys, table, "/v1/embeddings?" + query), 422, pointer)


def views_by_code(texts: list[str | None], codes: list[int]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(codes, pa.array(texts, pa.string_view()))


TYPES: dict[str, tuple[pa.Array, dict[str, Any]]] = {
    "large text": (pa.array(["Ada"], pa.large_string()), {"maker": "Ada"}),
    "text view": (pa.array(["Ada"], pa.string_view()), {"maker": "Ada"}),
    "dictionary": (pa.array(["Ada"]).dictionary_encode(), {"maker": "Ada"}),
    "dictionary of text views": (views_by_code([None, "Bell", "Ada"], [2]), {"maker": "Ada"}),
    "large list": (pa.array([["wood", "car"]], pa.large_list(pa.string())), {"tags": ["wood", "car"]}),
    "fixed list": (pa.array([["wood", "car"]], pa.list_(pa.string(), 2)), {"tags": ["wood", "car"]}),
    "list of dictionary": (
        pa.ListArray.from_arrays([0, 2], pa.array(["wood", "car"]).dictionary_encode()), {"tags": ["wood", "car"]}
    ),
    "list of dictionary of text views": (
        pa.ListArray.from_arrays([0, 2], views_by_code(["wood", "car, of a longer name than a view holds"], [0, 1])),
        {"tags": ["wood", "car, of a longer name than a view holds"]},
    ),
    "fixed list of dictionary of text views": (
        pa.FixedSizeListArray.from_arrays(views_by_code(["wood", "car"], [1, 0]), 2), {"tags": ["car", "wood"]}
    ),
    "list of text views": (pa.array([["wood", "car"]], pa.list_(pa.string_view())), {"tags": ["wood", "car"]}),
    "list of nothing": (pa.array([[]], pa.list_(pa.null())), {"tags": []}),
    "nothing": (pa.nulls(1), {"price": None}),
    "whole number": (pa.array([7], pa.int8()), {"price": 7}),
    "half float": (pa.array([7.5], pa.float16()), {"price": 7.5}),
    "decimal": (pa.array([Decimal("7.25")]), {"price": 7.25}),
    "not a number": (pa.array([float("nan")]), {"price": None}),
    "date": (pa.array([date(2014, 3, 5)]), {"added": "2014-03-05"}),
    "nanoseconds": (pa.array([1_400_000_000_123_456_789], pa.timestamp("ns")), {"added": 1_400_000_000.123456}),
    "zoned": (
        pa.array([datetime(2014, 3, 5, tzinfo=UTC)], pa.timestamp("s", "Europe/Berlin")),
        {"added": "2014-03-05T00:00:00Z"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TYPES)
async def test_every_type_that_says_the_same_gives_the_same_vector(toys: Running, case: str) -> None:
    array, item = TYPES[case]
    [column] = item
    wanted = (await post(toys, "/v1/embeddings", {"input": [item]})).json()["data"][0]
    answer = received(await sent(toys, pa.table({column: array})))
    assert vectors(answer)[0] == pytest.approx(wanted["embedding"], abs=1e-6)
    assert dict(answer["columns"].to_pylist()[0]) == wanted["columns"]
    stored = await sent(toys, pa.table({"id": ["x"], column: array}), "/v1/items")
    assert received(stored)["status"].to_pylist() == ["created"]
    kept = (await toys.client.get("/v1/items/x")).json()
    assert kept["embedding"] == pytest.approx(wanted["embedding"], abs=1e-6)


async def test_a_stream_of_more_rows_than_are_encoded_at_once_keeps_its_order(toys: Running) -> None:
    table = pa.Table.from_pylist([{"price": 5.0 + i % 40} for i in range(10_000)])
    answer = vectors(received(await sent(toys, table)))
    assert np.abs(answer[:40] - answer[8000:8040]).max() < 1e-6  # BLAS adds up in another order elsewhere in a matrix
    assert np.abs(answer[0] - answer[1]).max() > 1e-3
    late = pa.table({"added": ["2014-01-01"] * 9999 + ["yesterday"]})
    assert_problem(await sent(toys, late), 422, "/input/9999/added")


# Items


async def test_a_short_stream_does_not_wait_for_a_long_one(toys: Running) -> None:
    free = threading.Event()
    long = asyncio.create_task(toys.models.compute(1000, lambda: free.wait(20)))  # the encoder's thread is taken
    try:
        assert len(received(await asyncio.wait_for(sent(toys, pa.Table.from_pylist([TOY])), 10))) == 1
    finally:
        free.set()
        await long


async def test_more_dimensions_than_there_are_is_refused_before_anything_is_encoded(toys: Running) -> None:
    before = (await toys.client.get("/metrics")).text
    for content in (pa.Table.from_pylist([TOY] * 3), pa.Table.from_pylist([TOY] * 3000)):
        assert_problem(await sent(toys, content, f"/v1/embeddings?dimensions={DIM + 1}"), 422, "/dimensions")
    after = (await toys.client.get("/metrics")).text
    counted = [re.findall(r"(?m)^itemvec_items_encoded_total.*", text) for text in (before, after)]
    assert counted[0] == counted[1]


async def test_a_stream_of_items_is_stored_as_json_would_be(toys: Running) -> None:
    rows = [{**toy, "shelf": i} for i, toy in enumerate(TOYS)]
    answer = received(await sent(toys, pa.Table.from_pylist(rows), "/v1/items"))
    assert answer["id"].to_pylist() == list(ITEMS)
    assert set(answer["status"].to_pylist()) == {"created"}
    assert answer["errors"].null_count == 40
    assert dict(answer["columns"].to_pylist()[0]) == {"shelf": "ignored"}
    kept = (await toys.client.get("/v1/items/toy%203")).json()
    assert kept["item"] == {**TOY, "shelf": 3}
    embedded = (await post(toys, "/v1/embeddings", {"input": [TOY]})).json()["data"][0]["embedding"]
    assert kept["embedding"] == pytest.approx(embedded, abs=1e-6)


async def test_a_wrong_row_is_refused_alone(toys: Running) -> None:
    table = pa.table({"id": ["a", "b", None, "a"], "added": ["2014-01-01", "yesterday", "2014-01-01", "2014-01-01"]})
    answer = received(await sent(toys, table, "/v1/items"))
    assert answer["status"].to_pylist() == ["refused", "refused", "refused", "created"]
    errors = answer["errors"].to_pylist()
    pointers = [row and row[0]["pointer"] for row in errors]
    assert pointers == ["/items/0/id", "/items/1/added", "/items/2/id", None]


@pytest.mark.parametrize("column", ["maker", "name", "age", "price", "tags"])
async def test_a_moment_where_none_belongs_is_refused_by_both_calls_in_the_words_of_the_api(
    toys: Running, column: str
) -> None:
    for word, moment in (("date", date(2014, 1, 1)), ("time", datetime(2014, 1, 1, 12))):
        table = pa.table({"id": ["a", "b"], column: [None, moment]})
        problem = assert_problem(await sent(toys, table), 422, f"/input/1/{column}")
        assert problem["detail"].endswith(f", got the {word} {moment.isoformat()}")
        answer = received(await sent(toys, table, "/v1/items"))
        assert answer["status"][1].as_py() == "refused"
        [error] = answer["errors"][1].as_py()
        assert error == {"pointer": f"/items/1/{column}", "detail": problem["errors"][0]["detail"]}


async def test_moments_are_stored_as_their_text_and_can_be_searched_by(toys: Running) -> None:
    """A label of another type in the second row, so that all are read item by item."""
    day, noon = date(2014, 1, 1), datetime(2014, 1, 1, 12, tzinfo=UTC)
    for added, text in ((pa.array([day] * 2), "2014-01-01"), (pa.array([noon] * 2), "2014-01-01T12:00:00+00:00")):
        table = pa.table({"id": ["a", None], "added": added, "shelved": added})
        received(await sent(toys, table, "/v1/items"))
        assert (await toys.client.get("/v1/items/a")).json()["item"] == {"added": text, "shelved": text}
        asked = {"item": {}, "filter": {"range": {"added": {"gte": text, "lte": text}}}}
        found = (await post(toys, "/v1/similar", asked)).json()["neighbors"]
        assert [neighbor["id"] for neighbor in found] == ["a"]


@pytest.mark.parametrize("odd", [math.inf, -math.inf, math.nan])
async def test_a_number_that_json_has_no_word_for_is_missing_to_both_calls(toys: Running, odd: float) -> None:
    table = pa.table({"id": ["a", "b"], "maker": ["Ada", "Ada"], "price": [odd, None]})
    stored, embedded = received(await sent(toys, table, "/v1/items")), received(await sent(toys, table))
    for answer in (stored, embedded):
        assert [dict(marks)["price"] for marks in answer["columns"].to_pylist()] == ["missing", "missing"]
    first, second = [(await toys.client.get(f"/v1/items/{item_id}")).json() for item_id in "ab"]
    assert first["item"] == second["item"] == {"maker": "Ada"}
    for vector in (first["embedding"], second["embedding"], *vectors(embedded)):
        assert vector == pytest.approx(first["embedding"], abs=1e-6)


def test_such_a_number_in_a_list_is_a_gap() -> None:
    table = pa.table({"views": [[1.5, math.inf, math.nan], None]})
    limits = Limits(items=9, rows=9, labels=9, string=9, k=9, exclude=9, queries=9, examples=9, filter=9)
    _, columns = arrow.read_items(stream(table), FeatureSchema.from_yaml(SCHEMA % "numeric"), limits, "/input")
    assert columns["views"].to_pylist() == [[1.5, None, None], None]


@pytest.mark.parametrize("maker", ["Ada", None])
async def test_a_column_that_an_item_does_not_have_is_not_ignored(toys: Running, maker: str | None) -> None:
    whole = pa.table({"id": ["a", "b", maker and "c"], "shelf": [1, None, None]})  # as columns, and item by item
    answer = received(await sent(toys, whole, "/v1/items"))
    assert answer["status"].to_pylist()[:2] == ["created", "created"]
    assert ["shelf" in dict(marks) for marks in answer["columns"].to_pylist()] == [True, False, False]
    assert answer["status"].to_pylist()[2] == ("created" if maker else "refused")


async def test_items_without_ids_are_refused_as_a_whole(toys: Running) -> None:
    assert_problem(await sent(toys, pa.Table.from_pylist([TOY]), "/v1/items"), 422, "/items/id")


# Hard streams


def rows_without_bytes() -> bytes:
    """A record batch of 2^40 rows that are all null: a few hundred bytes."""
    small = stream(pa.table({"price": pa.nulls(1)}))
    return small.replace(struct.pack("<q", 1), struct.pack("<q", 1 << 40))


def heavy_dictionary() -> bytes:
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 60_000, pa.int16()), pa.array(["x" * 60_000]))
    return stream(pa.table({"maker": text}))


def views_of_one(length: int, rows: int) -> pa.Array:
    """16 bytes a row, and the text that all of them show."""
    view = struct.pack("<iiii", length, 0x78787878, 0, 0)  # length, its first letters, which buffer, where in it
    buffers = [None, pa.py_buffer(view * rows), pa.py_buffer(b"x" * length)]
    return pa.Array.from_buffers(pa.string_view(), rows, buffers)


def heavy_views() -> bytes:
    return stream(pa.table({"maker": views_of_one(60_000, 10_000)}))


def many_dictionaries() -> bytes:
    """Each column is 7 times the body when it is written out, all of them 150 times."""
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 150, pa.int16()), pa.array(["x" * 60_000]))
    return stream(pa.table({f"c{i}": text for i in range(20)}))


def spoilt() -> bytes:
    """The second text begins where the body has ended long ago."""
    offsets = struct.pack("<iii", 0, 3, 6)
    return stream(pa.table({"maker": ["Ada", "Bob"]})).replace(offsets, struct.pack("<iii", 0, 1 << 30, 6))


GOOD = stream(pa.Table.from_pylist([TOY]))
HARD: dict[str, tuple[bytes, int, str | None]] = {
    "nothing": (b"", 400, None),
    "JSON": (b'{"input": []}', 400, None),
    "noise": (bytes(range(256)) * 8, 400, None),
    "a name that is no UTF-8": (stream(pa.table({"maker": ["Ada"]})).replace(b"maker", b"ma\xffer"), 400, None),
    "such a name in a struct": (
        stream(pa.table({"maker": [{"named": "Ada"}]})).replace(b"named", b"na\xffed"), 422, "/input/maker"
    ),
    "cut off within": (GOOD[: len(GOOD) // 2], 400, None),
    "two streams": (GOOD + GOOD, 400, None),
    "a stream and noise": (GOOD + b"\0", 400, None),
    "compressed": (stream(pa.Table.from_pylist([TOY]), compression="zstd"), 400, None),
    "compressed dictionary": (
        stream(pa.table({"maker": pa.array(["Ada"]).dictionary_encode()}), compression="lz4"), 400, None
    ),
    "offsets beyond the body": (spoilt(), 400, None),
    "no rows": (stream(pa.table({"price": pa.array([], pa.float64())})), 422, "/input"),
    "too many rows": (stream(pa.table({"price": np.zeros(65_537)})), 422, "/input"),
    "rows without bytes": (rows_without_bytes(), 422, "/input"),
    "a dictionary of one long text": (heavy_dictionary(), 422, "/input/maker"),
    "views of one long text": (heavy_views(), 422, "/input/maker"),
    "a list of such views": (
        stream(pa.table({"tags": pa.ListArray.from_arrays([0, 4000], views_of_one(60_000, 4000))})), 422, "/input/tags"
    ),
    "a dictionary of such views": (
        stream(pa.table({"maker": pa.DictionaryArray.from_arrays([0], views_of_one(60_000, 1))}).take([0] * 3000)),
        422,
        "/input/maker",
    ),
    "a set of more nulls than there are bytes": (
        stream(pa.table({"tags": pa.FixedSizeListArray.from_arrays(pa.nulls(1 << 24), 4096)})), 422, "/input/tags"
    ),
    "dictionaries that are much only together": (many_dictionaries(), 422, "/input/c1"),
    "1,001 columns": (stream(pa.table({f"c{i}": [i] for i in range(1001)})), 422, "/input"),
    "a column twice": (stream(pa.table([pa.array([1]), pa.array([2])], ["price", "price"])), 422, "/input/price"),
    "text where a number belongs": (stream(pa.table({"price": ["1", "much"]})), 422, "/input/0/price"),
    "numbers where a label belongs": (stream(pa.table({"maker": [1, 2]})), 422, "/input/0/maker"),
    "numbers where a set belongs": (stream(pa.table({"tags": [1]})), 422, "/input/0/tags"),
    "a struct": (stream(pa.table({"maker": [{"a": 1}]})), 422, "/input/maker"),
    "bytes": (stream(pa.table({"maker": [b"Ada"]})), 422, "/input/maker"),
    "a list of lists": (stream(pa.table({"tags": [[["wood"]]]})), 422, "/input/tags"),
    "a time of day": (stream(pa.table({"added": pa.array([1], pa.time64("us"))})), 422, "/input/added"),
    "a year beyond 9999": (stream(pa.table({"added": pa.array([1 << 60], pa.timestamp("us"))})), 422, "/input/added"),
    "a day beyond 9999": (stream(pa.table({"added": pa.array([1 << 30], pa.date32())})), 422, "/input/added"),
    "5,000 labels in a set": (stream(pa.table({"tags": [["a"], [str(i) for i in range(5000)]]})), 422, "/input/1/tags"),
    "a set of a million nulls": (
        stream(pa.table({"tags": pa.array([None], pa.list_(pa.null(), 1 << 20))})), 422, "/input/0/tags"
    ),
    "a text of 70,000 characters": (stream(pa.table({"name": ["a", "x" * 70_000]})), 422, "/input/1/name"),
    "such a label": (stream(pa.table({"tags": [["a"], ["b", "x" * 70_000]]})), 422, "/input/1/tags"),
}  # fmt: skip


@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/items"])
async def test_a_hard_stream_has_its_status_and_its_place(toys: Running, case: str, path: str) -> None:
    body, status, pointer = HARD[case]
    if path == "/v1/items" and status == 422:
        answer = await sent(toys, body, path)
        assert answer.status_code in {200, 422}, answer.text  # a wrong value refuses its row alone, and ids are missing
    else:
        assert_problem(await sent(toys, body, path), status, pointer)


async def test_a_stream_may_end_with_the_body(toys: Running) -> None:
    end = struct.pack("<iI", -1, 0)
    assert GOOD.endswith(end)
    assert len(received(await sent(toys, GOOD.removesuffix(end)))) == 1


async def test_a_stream_is_not_taken_where_there_is_no_table_in_it(toys: Running) -> None:
    for path in ("/v1/similar", "/v1/decode"):
        assert_problem(await sent(toys, GOOD, path), 415)


async def test_the_limit_of_rows_is_a_setting(toy_registry: Any, empty_redis: str) -> None:
    async with serving.running(toy_registry, empty_redis, max_rows=3, searchable=False) as service:
        problem = assert_problem(await sent(service, pa.table({"price": [1.0] * 4})), 422, "/input")
        assert "1 to 3" in problem["detail"]


WRAPPED = {
    "days": pa.array([2_137_972_720], pa.date32()),
    "milliseconds of days": pa.array([86_400_000 * 10**10], pa.date64()),
    "seconds": pa.array([1 << 62], pa.timestamp("s")),
    "seconds before": pa.array([-(1 << 62)], pa.timestamp("s", "Asia/Tokyo")),
    "seconds in a list": pa.array([[1 << 62]], pa.list_(pa.timestamp("s"))),
}


@pytest.mark.parametrize("case", WRAPPED)
async def test_a_moment_that_would_wrap_around_is_refused_in_any_column(toys: Running, case: str) -> None:
    table = pa.table({"id": ["a"], "shelved": WRAPPED[case]})
    for path, pointer in (("/v1/embeddings", "/input/shelved"), ("/v1/items", "/items/shelved")):
        assert "the years 1 to 9999" in assert_problem(await sent(toys, table, path), 422, pointer)["detail"]


async def test_the_first_and_the_last_moment_of_the_years_are_taken(toys: Running) -> None:
    for unit in ("s", "ms", "us"):
        ends = pa.array([datetime(1, 1, 1), datetime(9999, 12, 31, 23, 59, 59)], pa.timestamp(unit))
        answer = received(await sent(toys, pa.table({"id": ["a", "b"], "added": ends}), "/v1/items"))
        assert "refused" not in answer["status"].to_pylist()


async def test_what_is_only_pointed_to_is_not_written_out_where_it_is_too_much(toys: Running, monkeypatch: Any) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("written out")

    monkeypatch.setattr(arrow, "_plain", refuse)
    for body in (heavy_views(), heavy_dictionary()):
        problem = assert_problem(await sent(toys, body), 422, "/input/maker")
        assert "when what it points to is written out" in problem["detail"]


async def test_few_bytes_may_point_to_many(toys: Running) -> None:
    """A dictionary of long labels with codes of one byte is 40 times as large written out, and no harm."""
    labels = pa.array([f"{'of wood' * 6} {i}" for i in range(4)])
    names = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2, 3] * 500, pa.int8()), labels)
    assert len(received(await sent(toys, pa.table({"maker": names})))) == 2000


async def test_rows_without_a_list_and_with_an_empty_one_stay_in_their_places(toys: Running) -> None:
    tags = [["wood"], None, [], ["car", "x" * 5]]
    for kind in (
        pa.list_(pa.string()),
        pa.large_list(pa.string_view()),
        pa.list_(pa.dictionary(pa.int8(), pa.string())),
    ):
        table = pa.table({"id": list("abcd"), "tags": pa.array(tags, kind)})
        received(await sent(toys, table.slice(1), "/v1/items"))
        kept = [(await toys.client.get(f"/v1/items/{item_id}")).json()["item"].get("tags") for item_id in "bcd"]
        assert kept == tags[1:]
    long = pa.table({"tags": [["a"], None, [], ["b", "x" * 70_000]]})
    assert_problem(await sent(toys, long.slice(1)), 422, "/input/2/tags")


async def test_nanoseconds_in_a_list_are_cut_as_alone(toys: Running) -> None:
    moments = pa.array([[1_400_000_000_123_456_789]], pa.list_(pa.timestamp("ns")))
    received(await sent(toys, pa.table({"id": ["a"], "shelved": moments}), "/v1/items"))
    kept = (await toys.client.get("/v1/items/a")).json()["item"]
    assert kept == {"shelved": ["2014-05-13T16:53:20.123456"]}


async def test_rows_without_columns_are_items_of_which_nothing_is_known(toys: Running) -> None:
    nothing = (await post(toys, "/v1/embeddings", {"input": [{}]})).json()["data"][0]
    bare = pa.RecordBatch.from_struct_array(pa.array([{}] * 2049, pa.struct([])))  # more than are encoded at once
    for table in (pa.Table.from_batches([bare]), pa.table({"id": [f"a{i}" for i in range(2049)]})):
        answer = received(await sent(toys, table))
        assert np.abs(vectors(answer) - np.array(nothing["embedding"], np.float32)).max() <= 1e-6
        assert len(answer) == 2049
        assert dict(answer["columns"][2048].as_py()) == nothing["columns"]


async def test_items_of_ids_alone_are_stored_as_json_would_be(toys: Running) -> None:
    answer = received(await sent(toys, pa.table({"id": ["a", "b"]}), "/v1/items"))
    assert answer["status"].to_pylist() == ["created", "created"]
    stored = await post(toys, "/v1/items", {"items": [{"id": "c"}]})
    assert dict(answer["columns"][0].as_py()) == stored.json()["items"][0]["columns"]
    a, c = [(await toys.client.get(f"/v1/items/{item_id}")).json() for item_id in "ac"]
    assert a["item"] == c["item"] == {}
    assert a["embedding"] == pytest.approx(c["embedding"], abs=1e-6)


async def test_items_of_ids_and_ready_vectors_alone_are_stored(toys: Running) -> None:
    ready = received(await sent(toys, pa.table({"id": ["a"], "maker": ["Ada"]}))).drop_columns(["columns"])
    received(await sent(toys, ready, "/v1/items"))
    kept = (await toys.client.get("/v1/items/a")).json()
    assert kept["item"] == {}
    assert kept["embedding"] == pytest.approx(ready["embedding"][0].as_py(), abs=1e-6)


@pytest.mark.parametrize(("path", "pointer"), [("/v1/embeddings", "/input"), ("/v1/items", "/items")])
async def test_columns_that_the_model_does_not_use_are_no_more_than_an_answer_can_name(
    toys: Running, path: str, pointer: str
) -> None:
    bits, ids = np.zeros(16_384, bool), [str(i) for i in range(16_384)]
    for shelves in ({f"shelf {i}": bits for i in range(250)}, {"shelf" * 1000: bits}):
        problem = assert_problem(await sent(toys, pa.table({"id": ids, **shelves}), path), 422, pointer)
        assert f"has {len(shelves)} columns that the model 'toys' does not use" in problem["detail"]
        assert problem["detail"].endswith("leave them out, or send fewer rows")
    few = pa.table({"id": ids[:100], **{f"shelf {i}": bits[:100] for i in range(250)}})
    assert len(received(await sent(toys, few, path))["columns"][99]) >= 250


@pytest.mark.parametrize("nested", [False, True])
async def test_batches_may_not_repeat_a_large_dictionary(toys: Running, nested: bool) -> None:
    """Each is checked with the whole of it, however few rows it has."""
    labels = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array([""] * 20_000))
    column = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), labels) if nested else labels
    batch = pa.record_batch({"maker": column})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        for _ in range(200):
            writer.write_batch(batch)
    answer = await sent(toys, sink.getvalue().to_pybytes())
    problem = assert_problem(answer, 422)
    assert "send fewer, larger batches" in problem["errors"][0]["detail"]
