import asyncio
import socket

import httpx
import pytest

from benchmarks._services import free_port
from itemvec.errors import ConfigError
from service.app import BehindServe
from service.listener import COPIED, Joining, listen, listen_for_haproxy
from service.together import Read

pytestmark = pytest.mark.anyio


def answering(text):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text})

    return app


class Written:
    """A transport that keeps what it is given."""

    def __init__(self):
        self.calls = []

    def write(self, data):
        self.calls.append(data)

    def is_closing(self):
        return "closed" in self.calls

    def close(self):
        self.calls.append("closed")


def test_a_head_waits_for_the_body_and_nothing_else_waits():
    transport = Written()
    joining = Joining(transport)
    joining.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert transport.calls == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    for part in (b"HTTP/1.1 200 OK\r\n\r\n", b"a body", b"more\r\n\r\n"):
        joining.write(part)
    assert transport.calls[1:] == [b"HTTP/1.1 200 OK\r\n\r\na body", b"more\r\n\r\n"]
    joining.write(b"HTTP/1.1 200 OK\r\n\r\n")
    joining.write(bytes(COPIED + 1))
    assert transport.calls[3:] == [b"HTTP/1.1 200 OK\r\n\r\n", bytes(COPIED + 1)]
    joining.write(b"HTTP/1.1 204 No Content\r\n\r\n")
    joining.close()
    assert transport.calls[5:] == [b"HTTP/1.1 204 No Content\r\n\r\n", "closed"]
    joining.write(b"HTTP/1.1 200 OK\r\n\r\n")
    joining.write(b"for nobody")
    assert transport.calls[6:] == ["closed"]


async def test_answers_with_a_body_and_without_come_one_after_the_other_on_one_connection(tmp_path):
    async def app(scope, receive, send):
        body = (await receive())["body"] if scope["method"] == "PUT" else b"ends in an empty line\r\n\r\n"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    task = await listen_for_haproxy(app, tmp_path / "socket", Read())
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "socket"))
    for method, sent, got in [
        (b"HEAD", b"", b""),
        (b"GET", b"", b"ends in an empty line\r\n\r\n"),
        (b"PUT", b"taken", b"taken"),
        (b"PUT", b"", b""),
    ]:
        told = b"content-length: %d\r\nexpect: 100-continue\r\n" % len(sent) if sent else b""
        writer.write(method + b" / HTTP/1.1\r\nhost: here\r\n" + told + b"\r\n")
        if sent:
            assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5) == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(sent)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200 OK\r\n") and await reader.readexactly(len(got)) == got
    writer.close()
    task.cancel()
    await asyncio.wait([task])


H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"


async def echo(scope, receive, send):
    """Answers with the method, the path, whether there is Upgrade, and the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message["body"], message["more_body"]
    told = b"%s %s %d %s" % (scope["method"].encode(), scope["raw_path"], b"upgrade" in dict(scope["headers"]), body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(told))]})
    await send({"type": "http.response.body", "body": told})


def put(path, body, more=b""):
    return b"PUT %s HTTP/1.1\r\nhost: here\r\n%scontent-length: %d\r\n\r\n%s" % (path, more, len(body), body)


@pytest.mark.parametrize("pieces", ["one", "head and body", "bytes"])
@pytest.mark.parametrize("tcp", [True, False])
async def test_a_request_for_another_protocol_is_answered_as_if_it_had_not_asked(tmp_path, tcp, pieces):
    path, port = tmp_path / "socket", free_port()
    task = listen(echo, "127.0.0.1", port, Read()) if tcp else await listen_for_haproxy(echo, path, Read())
    await asyncio.sleep(0.1)
    reader, writer = await (asyncio.open_connection("127.0.0.1", port) if tcp else asyncio.open_unix_connection(path))
    sent = (
        put(b"/a?b=1", b"upgrade: h2c\r\n\r\n", H2C),
        put(b"/c", H2C),  # a body that looks like such a head is a body
        b"PUT /d HTTP/1.1\r\n" + H2C + b"transfer-encoding: chunked\r\n\r\n4\r\nfour\r\n0\r\n\r\n",
        b"GET /e HTTP/1.1\r\n" + H2C + b"\r\n",
    )
    got = b"PUT /a 0 upgrade: h2c\r\n\r\n", b"PUT /c 0 " + H2C, b"PUT /d 0 four", b"GET /e 0 "
    if pieces == "one":
        writer.write(b"".join(sent))
    for request, answer in zip(sent, got, strict=True):
        head, end, body = request.partition(b"\r\n\r\n")
        for piece in {"one": [], "head and body": [head + end, body], "bytes": [bytes([b]) for b in request]}[pieces]:
            writer.write(piece)
            await asyncio.sleep(0.001)
        told = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert told.startswith(b"HTTP/1.1 200 OK\r\n")
        assert await asyncio.wait_for(reader.readexactly(len(answer)), 5) == answer
    writer.close()
    task.cancel()
    await asyncio.wait([task])


async def test_a_request_knows_how_many_have_been_read_and_not_begun(tmp_path):
    read, seen = Read(), []

    async def app(scope, receive, send):
        seen.append((read.unbegun, read.is_alone()))
        await answering(b"")(scope, receive, send)

    path = tmp_path / "socket"
    task = await listen_for_haproxy(app, path, read)
    callers = [await asyncio.open_unix_connection(str(path)) for _ in range(3)]
    await asyncio.sleep(0.05)
    for _ in range(2):
        for _, writer in callers:
            writer.write(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")  # before the server's turn
        for reader, _ in callers:
            await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)
    assert seen == [(2, False), (1, False), (0, True)] * 2
    for _, writer in callers:
        writer.close()
    task.cancel()
    await asyncio.wait([task])


async def test_several_listen_on_one_port_and_the_others_answer_when_one_ends():
    port = free_port()
    tasks = {text: listen(answering(text), "127.0.0.1", port, Read()) for text in (b"first", b"second")}
    await asyncio.sleep(0.2)
    heard = set()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        for _ in range(40):  # all at one of the two by chance: 2^-39
            answer = await client.get("/", headers={"connection": "close"})
            heard.add(answer.content)
        assert heard == {b"first", b"second"}
        tasks[b"first"].cancel()
        await asyncio.wait([tasks[b"first"]])
        await asyncio.sleep(0.2)
        assert {(await client.get("/", headers={"connection": "close"})).content for _ in range(10)} == {b"second"}
    tasks[b"second"].cancel()
    await asyncio.wait([tasks[b"second"]])


async def test_an_address_of_another_machine_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1, direct_port 8123"):
        listen(answering(b""), "192.0.2.1", 8123, Read())


async def test_an_answer_of_many_items_is_taken_by_the_system_before_haproxy_reads_it(tmp_path):
    sent = asyncio.Event()

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        # More than the 208 kB of a socket as it comes, and the 64 kB that uvicorn holds back before it waits.
        await send({"type": "http.response.body", "body": bytes(300_000), "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        sent.set()

    task = await listen_for_haproxy(app, tmp_path / "socket", Read())
    with socket.socket(socket.AF_UNIX) as caller:  # which never reads
        caller.connect(str(tmp_path / "socket"))
        caller.sendall(b"GET / HTTP/1.1\r\nhost: here\r\n\r\n")
        await asyncio.wait_for(sent.wait(), 5)
    task.cancel()
    await asyncio.wait([task])


async def test_what_a_listener_has_in_hand_is_answered_before_the_application_ends(tmp_path):
    ended, asked = asyncio.Event(), asyncio.Event()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            assert (await receive())["type"] == "lifespan.shutdown"
            ended.set()
            return
        asked.set()
        await asyncio.sleep(0.3)
        await answering(b"too late" if ended.is_set() else b"in time")(scope, receive, send)

    path = tmp_path / "socket"
    behind = BehindServe(app, [await listen_for_haproxy(app, path, Read())])

    async def told():
        return {"type": "lifespan.shutdown"}

    transport = httpx.AsyncHTTPTransport(uds=str(path))
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        request = asyncio.create_task(client.get("/"))
        await asked.wait()
        await behind({"type": "lifespan"}, told, None)
        assert ended.is_set() and (await request).content == b"in time"
        with pytest.raises(httpx.ConnectError):
            await client.get("/")
