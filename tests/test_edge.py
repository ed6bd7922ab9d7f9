"""What every request passes, whatever it asks for: limits of its body, headers, keys, admission."""

import asyncio
import gzip
import logging
import re
import threading
from typing import Any

import orjson
import pytest
import serving
from serving import TOY, Running, assert_problem, post

from itemvec.version import ModelVersion
from service import edge
from service.arrow import STREAM

pytestmark = pytest.mark.anyio


# Bodies


async def test_a_body_of_2_mb_is_served(toys: Running) -> None:
    items = [{**TOY, "name": "word " * 100, "note": "x" * 1000} for _ in range(1300)]
    body = orjson.dumps({"input": items})
    assert len(body) > 2_000_000
    assert (await post(toys, "/v1/embeddings", body)).status_code == 200


async def test_a_body_beyond_the_limit_is_refused_by_its_announced_size_unread(toys: Running) -> None:
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b" " * 65_536, "more_body": True}

    status, _ = await _raw_call(toys, receive, {b"content-length": str(64 << 20).encode()})
    assert (status, read) == (413, 0)


async def test_a_body_of_unknown_size_is_read_no_further_than_the_limit(toys: Running) -> None:
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 65_536
        return {"type": "http.request", "body": b" " * 65_536, "more_body": True}

    status, body = await _raw_call(toys, receive, {})
    assert status == 413
    assert str(8 << 20) in orjson.loads(body)["detail"]
    assert read <= (8 << 20) + 65_536


async def test_a_body_that_comes_later_and_in_pieces_is_awaited(toys: Running) -> None:
    body, at = orjson.dumps({"input": [TOY]}), 0

    async def receive() -> dict[str, Any]:
        nonlocal at
        await asyncio.sleep(0.01)
        at += 10
        return {"type": "http.request", "body": body[at - 10 : at], "more_body": at < len(body)}

    status, answer = await _raw_call(toys, receive, {})
    assert status == 200
    assert len(orjson.loads(answer)["data"]) == 1


@pytest.mark.parametrize("pieces", [0, 1])
async def test_a_body_that_does_not_come_is_not_awaited_for_ever(
    toys: Running, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr(edge, "BODY_SECONDS", 0.05)
    come = iter([{"type": "http.request", "body": b"{", "more_body": True}] * pieces)
    ended = 0

    async def receive() -> dict[str, Any]:
        nonlocal ended
        for message in come:
            return message
        try:
            await asyncio.sleep(60)
        finally:
            ended += 1
        raise AssertionError

    status, answer = await asyncio.wait_for(_raw_call(toys, receive, {}), 5)
    assert (status, ended) == (408, 1)
    assert "0.05" in orjson.loads(answer)["detail"]


@pytest.mark.parametrize("fails", [None, ConnectionResetError])
async def test_a_receiver_that_has_begun_goes_on_as_if_it_had_been_awaited(
    toys: Running, fails: type[Exception] | None
) -> None:
    come = asyncio.get_running_loop().create_future()

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0)
        try:
            await come
        except ConnectionResetError:
            await asyncio.sleep(0)
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": orjson.dumps({"input": [TOY]})}

    calling = asyncio.create_task(_raw_call(toys, receive, {}))
    await asyncio.sleep(0.01)
    come.set_exception(fails()) if fails else come.set_result(None)
    status, _ = await asyncio.wait_for(calling, 5)
    assert status == (None if fails else 200)


async def test_a_caller_that_leaves_is_not_answered(toys: Running) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    assert await _raw_call(toys, receive, {}) == (None, b"")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": [TOY] * 100}),
        ("/v1/items", {"items": [{"id": str(i), **TOY} for i in range(100)]}),
    ],
)
async def test_long_work_of_a_caller_that_leaves_is_dropped_and_counted(
    toys: Running, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any]
) -> None:
    busy = threading.Event()
    first = asyncio.create_task(toys.models.compute(1000, lambda: busy.wait(20)))  # the encoder's thread is taken
    await asyncio.sleep(0.05)
    messages = iter([{"type": "http.request", "body": orjson.dumps(body)}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(messages)

    encoded: list[int] = []
    monkeypatch.setattr(ModelVersion, "encode", lambda _, items, __="": encoded.append(len(items)))
    assert await _raw_call(toys, receive, {}, path) == (None, b"")  # at once, though the thread is still taken
    busy.set()
    await first
    await toys.models.compute(1000, lambda: None)  # whatever waited for the thread has had its turn
    assert encoded == []
    assert 'rejected_requests_total{reason="client_gone"} 1.0' in (await toys.client.get("/metrics")).text


async def _raw_call(
    service: Running, receive: Any, headers: dict[bytes, bytes], path: str = "/v1/embeddings"
) -> tuple[int | None, bytes]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json"), *headers.items()]
    await service.app(scope, receive, send)
    if not sent:
        return None, b""
    return sent[0]["status"], sent[1]["body"]


async def _never() -> dict[str, Any]:
    raise AssertionError


@pytest.mark.parametrize(
    "headers", [{}, {"Content-Type": "text/plain"}, {"Content-Type": "application/x-www-form-urlencoded"}]
)
async def test_what_a_foreign_web_page_can_send_is_refused(toys: Running, headers: dict[str, str]) -> None:
    content = orjson.dumps({"items": [{"id": "x", **TOY}]})
    assert_problem(await toys.client.post("/v1/items", content=content, headers=headers), 415)


async def test_the_media_type_may_have_parameters(toys: Running) -> None:
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    answer = await toys.client.post("/v1/embeddings", content=orjson.dumps({"input": [TOY]}), headers=headers)
    assert answer.status_code == 200


async def test_a_compressed_body_is_refused_by_the_name_of_its_coding(toys: Running) -> None:
    body = orjson.dumps({"input": [TOY]})
    headers = {**serving.JSON, "Content-Encoding": "gzip"}
    answer = await toys.client.post("/v1/embeddings", content=gzip.compress(body), headers=headers)
    assert re.search("Content-Encoding was 'gzip'; send the body as it is", assert_problem(answer, 415)["detail"])
    plain = {**serving.JSON, "Content-Encoding": "Identity"}
    assert (await toys.client.post("/v1/embeddings", content=body, headers=plain)).status_code == 200


# Headers and paths


@pytest.mark.parametrize(
    ("accept", "of_json", "of_arrow"),
    [
        (None, "JSON", "Arrow"),
        ("*/*", "JSON", "Arrow"),
        ("ARROW", "Arrow", "Arrow"),
        ("application/json", "JSON", "JSON"),
        ("ARROW;q=0, application/json", "JSON", "JSON"),
        ("application/json, ARROW;q=0.1", "JSON", "JSON"),
        ("application/json;q=0.1,ARROW; q=0.25", "Arrow", "Arrow"),
        ("application/json;q=0, */*", "Arrow", "Arrow"),
        ("ARROW;q=0", "JSON", "JSON"),
        ("ARROW, application/json", "JSON", "Arrow"),
        ("application/json, text/plain, */*", "JSON", "JSON"),
        ("Application/*;q=0.5, */*;q=0.1", "JSON", "Arrow"),
        ("ARROWx, text/html", "JSON", "Arrow"),
        ("ARROW;q=high, , ;", "Arrow", "Arrow"),
    ],
)
def test_the_answer_has_the_form_that_accept_gives_more_weight_and_else_that_of_the_request(
    accept: str | None, of_json: str, of_arrow: str
) -> None:
    def form(sent: bytes) -> str:
        headers = [(b"content-type", sent)]
        if accept is not None:
            headers.append((b"accept", accept.replace("ARROW", STREAM.decode()).encode()))
        return "Arrow" if edge.Request({"headers": headers}, _never, 0).wants(STREAM) else "JSON"

    assert (form(edge.JSON), form(STREAM)) == (of_json, of_arrow)


async def test_the_request_id_comes_back(toys: Running) -> None:
    answer = await toys.client.get("/healthz", headers={"X-Request-ID": "abc-123"})
    assert answer.headers.get_list("x-request-id") == ["abc-123"]


@pytest.mark.parametrize("given", ["", "with space", "x" * 129, "tab\there"])
async def test_a_request_id_that_could_harm_a_log_is_replaced(toys: Running, given: str) -> None:
    made = (await toys.client.get("/healthz", headers={"X-Request-ID": given})).headers["x-request-id"]
    assert made != given
    assert len(made) == 24


TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


async def test_a_trace_is_passed_on_with_a_parent_id_of_our_own(toys: Running) -> None:
    answer = await toys.client.get("/healthz", headers={"traceparent": f"00-{TRACE}-{CALLER}-01"})
    version, trace, parent, flags = answer.headers["traceparent"].split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert re.fullmatch("[0-9a-f]{16}", parent) and parent != CALLER
    later = await toys.client.get("/healthz", headers={"traceparent": f"cc-{TRACE}-{CALLER}-00-more"})
    assert later.headers["traceparent"].startswith(f"00-{TRACE}-")  # of a later version the known part is read


@pytest.mark.parametrize(
    "given",
    [
        None, "", "nonsense", f"00-{TRACE}-{CALLER}", f"ff-{TRACE}-{CALLER}-01", f"00-{'0' * 32}-{CALLER}-01",
        f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE.upper()}-{CALLER}-01", f"00-{TRACE}-{CALLER}-01-more",
    ],
)  # fmt: skip
async def test_a_trace_that_is_none_is_replaced_by_a_new_one(toys: Running, given: str | None) -> None:
    headers = {} if given is None else {"traceparent": given}
    answers = [await toys.client.get("/healthz", headers=headers) for _ in range(2)]
    traces = {answer.headers["traceparent"] for answer in answers}
    assert len(traces) == 2
    assert all(re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-00", made) and TRACE not in made for made in traces)


async def test_server_timing_tells_encode_store_and_total(toys: Running) -> None:
    await toys.load()
    timing = (await post(toys, "/v1/similar", {"item": TOY})).headers["server-timing"]
    parts = dict(part.split(";dur=") for part in timing.split(", "))
    assert set(parts) == {"queue", "encode", "store", "total"}
    assert float(parts["encode"]) + float(parts["store"]) < float(parts["total"]) < 1000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/v1/items/a/b", 404),
        ("GET", "/v1/models/", 404),
        ("PATCH", "/v1/items/a", 405),
    ],
)
async def test_what_is_not_there_is_a_problem_too(toys: Running, method: str, path: str, status: int) -> None:
    answer = await toys.client.request(method, path)
    assert_problem(answer, status)
    if status == 405:
        assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"


async def test_head_is_get_without_the_body(toys: Running) -> None:
    answer = await toys.client.head("/v1/models")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_a_failure_of_ours_tells_nothing_but_its_request_id(
    toys: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("the secret of the house")

    monkeypatch.setattr(toys.models, "get", broken)
    with caplog.at_level(logging.ERROR, "itemvec.service"):
        answer = await post(toys, "/v1/embeddings", {"input": [TOY]})
    problem = assert_problem(answer, 500)
    assert "secret" not in answer.text
    assert problem["request_id"] in caplog.text
    assert answer.headers["traceparent"] in caplog.text
    assert "the secret of the house" in caplog.text


# Admission


async def test_a_full_service_sends_callers_away_and_stays_alive(
    tmp_path: Any, toy_registry: Any, empty_redis: str
) -> None:
    async with serving.running(toy_registry, empty_redis, max_in_flight=1) as service:
        held = asyncio.Event()

        async def slow() -> dict[str, Any]:
            await held.wait()
            return {"type": "http.request", "body": orjson.dumps({"input": [TOY]}), "more_body": False}

        first = asyncio.create_task(_raw_call(service, slow, {}))
        await asyncio.sleep(0)
        answer = await post(service, "/v1/embeddings", {"input": [TOY]})
        assert_problem(answer, 429)
        assert answer.headers["retry-after"] == "1"
        assert (await service.client.get("/healthz")).status_code == 200
        held.set()
        assert (await first)[0] == 200
        assert (await post(service, "/v1/embeddings", {"input": [TOY]})).status_code == 200


READER, ADMIN = "reader-key-0123456789", "admin-key-0123456789ab"


async def test_keys_open_what_their_scopes_say(tmp_path: Any, toy_registry: Any, empty_redis: str) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{READER} read\n{ADMIN} read,write,admin\n")
    async with serving.running(toy_registry, empty_redis, api_keys_file=keys) as service:

        async def put(key: str | None) -> Any:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            return await service.client.put("/v1/items/x", json=TOY, headers=headers)

        for key in (None, "wrong", READER + "x", ""):
            answer = await put(key)
            assert_problem(answer, 401)
            assert answer.headers["www-authenticate"].startswith("Bearer")
        assert_problem(await put(READER), 403)
        assert (await put(ADMIN)).status_code == 201
        assert (
            await service.client.get("/v1/items/x", headers={"Authorization": f"bearer {READER}"})
        ).status_code == 200
        assert_problem(await service.client.get("/metrics"), 401)
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
            assert (await service.client.get(path)).status_code == 200
        assert "key" in (await service.client.get("/openapi.json")).json()["components"]["securitySchemes"]
