"""The edge of the service: what every request passes, whatever it asks for.

    request id -> operation (path, method) -> key and scope -> admission -> body within its limits
        -> the operation's handler -> answer, or the problem that an error maps to -> timings, metrics

It is a plain ASGI application with a table of operations, since a framework's routing, dependencies and validation cost
more here than encoding an item does. The same table makes the documentation (`service/openapi.py`).
"""

import asyncio
import hmac
import logging
import random
import re
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import sha256
from time import perf_counter
from types import UnionType, coroutine
from typing import Any, Final, Literal, TypeVar
from urllib.parse import parse_qsl, quote

import orjson
from pydantic import BaseModel

from itemvec.errors import FieldError, ItemvecError, VersionCorrupt
from service.metrics import Metrics
from service.problems import (
    MAX_ERRORS,
    BodyTooLarge,
    BodyTooSlow,
    Forbidden,
    InvalidRequest,
    MalformedRequest,
    MethodNotAllowed,
    PathNotFound,
    TooManyRequests,
    Unauthorized,
    UnsupportedCoding,
    UnsupportedMediaType,
    escaped,
    problem,
)

log = logging.getLogger("itemvec.service")

T = TypeVar("T")
Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Coroutine[Any, Any, Message]]
Send = Callable[[Message], Awaitable[None]]
Permission = Literal["read", "write", "admin"]

JSON: Final = b"application/json"
BODY_SECONDS: Final = 30.0
IDS: Final = random.Random()  # noqa: S311 - ids have to differ, not to be secret, and a call to the system costs 1 us
REQUEST_ID = re.compile(rb"[!-~]{1,128}")
"""Printable ASCII without spaces: what may be echoed in a header and written to a log as it came."""

TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-[!-~]*)?")
"""W3C Trace Context, level 1: version, trace, parent, flags; a later version may add more behind them."""

WEIGHT = re.compile(rb"q=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")


@dataclass(slots=True)
class Answer:
    body: bytes
    status: int = 200
    content_type: bytes = JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)

    @classmethod
    def json(cls, value: object, status: int = 200) -> "Answer":
        """numpy rows are written as lists of numbers, the shortest that give the same float32 again."""
        return cls(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), status)


class ClientGone(Exception):
    """The caller closed the connection before its request was whole; nobody is left to answer."""


class Request:
    """One request on its way; handlers read from it, and note in it how long their parts took."""

    __slots__ = ("_receive", "_scope", "headers", "id", "max_body", "media_type", "model", "params", "seconds", "trace")

    def __init__(self, scope: Scope, receive: Receive, max_body: int) -> None:
        self._scope, self._receive, self.max_body = scope, receive, max_body
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id", b"")
        fresh = IDS.getrandbits(288).to_bytes(36).hex()
        self.id = given.decode() if REQUEST_ID.fullmatch(given) else fresh[:24]
        self.trace = _trace(self.headers.get(b"traceparent"), fresh[24:])
        """W3C Trace Context of this request: its caller's trace, with a parent id of its own."""
        self.media_type = self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        """What the body says it is, without parameters."""
        self.params: Sequence[bytes] = ()
        """The variable segments of the path, still percent-encoded."""
        self.model: str | None = None
        """The version that answered, for the metrics."""
        self.seconds: dict[str, float] = {}
        """What parts of the work took, for the header Server-Timing."""

    @property
    def path(self) -> str:
        return str(self._scope["path"])

    @property
    def query(self) -> dict[str, str]:
        if not (sent := self._scope.get("query_string")):
            return {}
        try:
            return dict(parse_qsl(sent.decode(), keep_blank_values=True, errors="strict"))
        except (UnicodeDecodeError, ValueError):
            raise MalformedRequest("the query string is not percent-encoded UTF-8") from None

    def took(self, part: str, since: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + perf_counter() - since

    def waited(self, queue: float, encode: float) -> None:
        """Notes seconds before the encoder had time for the request, and those that it took."""
        self.seconds["queue"] = self.seconds.get("queue", 0.0) + queue
        self.seconds["encode"] = self.seconds.get("encode", 0.0) + encode

    def wants(self, media_type: bytes) -> bool:
        """Is the answer to be of this type, or JSON? As the header Accept prefers, and otherwise as the body came."""
        accept, sent = self.headers.get(b"accept", b"*/*"), self.media_type == media_type
        if accept == b"*/*":
            return sent
        this, json = _preference(accept, media_type), _preference(accept, JSON)
        return sent if this == json else this > json

    async def body(self, *types: bytes) -> bytes:
        """The whole body, of one of these types, or JSON; refused as soon as it is known to be too large."""
        types = types or (JSON,)
        # Other types, and none, can be sent by a foreign web page without asking first; JSON and Arrow cannot. A
        # service on loopback without keys is safe from such pages because of this line.
        if (media_type := self.media_type) not in types:
            raise UnsupportedMediaType(media_type.decode("latin-1")[:100], [one.decode() for one in types])
        if (coding := self.headers.get(b"content-encoding")) and coding.strip().lower() != b"identity":
            raise UnsupportedCoding(coding.decode("latin-1")[:100])
        announced = self.headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > self.max_body:
            raise BodyTooLarge(self.max_body)
        message: Message | None = None
        receiving, pending = self._receive(), None
        try:
            pending = receiving.send(None)
        except StopIteration as there:  # it came with the head, as nearly always: no clock has to run for it
            message = there.value
            if message["type"] == "http.request" and not message.get("more_body", False):
                whole: bytes = message.get("body", b"")
                if len(whole) <= self.max_body:
                    return whole
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await self._pieces(await _rest(receiving, pending) if message is None else message)
        except TimeoutError:
            raise BodyTooSlow(BODY_SECONDS) from None

    async def _pieces(self, message: Message) -> bytes:
        """The body that begins with this message."""
        pieces: list[bytes] = []
        size = 0
        while message["type"] != "http.disconnect":
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > self.max_body:
                raise BodyTooLarge(self.max_body)
            if not message.get("more_body", False):
                return b"".join(pieces)
            message = await self._receive()
        raise ClientGone

    async def while_here(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of long work, after the body; drops it and raises `ClientGone` if the caller goes first."""
        doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._left())
        try:
            await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                doing.cancel()
                await asyncio.wait({doing})
                raise ClientGone
            return doing.result()
        finally:
            doing.cancel()
            leaving.cancel()

    async def _left(self) -> None:
        if (await self._receive())["type"] != "http.disconnect":
            await asyncio.Event().wait()  # not what a server may send here, so nothing to learn from


@coroutine
def _rest(begun: Coroutine[Any, Any, T], pending: object) -> Generator[Any, Any, T]:
    """Waits for a coroutine that has begun, and first for `pending`: what `await` does from the beginning (PEP 380)."""
    try:
        while True:
            try:
                sent = yield pending
            except BaseException as error:
                pending = begun.throw(error)
            else:
                pending = begun.send(sent)
    except StopIteration as done:
        result: T = done.value
        return result


Handler = Callable[[Request], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class Operation:
    """One call of the API: where it is, who may make it, what makes the answer, and what the documentation says."""

    method: str
    path: str
    """Segments in braces are variable: `/v1/items/{id}`."""

    handler: Handler
    summary: str
    tag: str
    permission: Permission | None = None
    """The scope a key needs; None is open to everybody, and answered even when the service is full."""

    takes: type[BaseModel] | None = None
    arrow: str = ""
    """What an Arrow stream sent and answered here holds, where one may be."""

    gives: Mapping[int, type[BaseModel] | UnionType | str] = field(default_factory=dict)
    """Status -> the model of the answer (a union where it has one of several shapes), or the media type of one that is
    not JSON."""

    refuses: tuple[int, ...] = ()
    query: Mapping[str, str] = field(default_factory=dict)
    """Name of a query parameter -> what it is for."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.path}"


class Router:
    """Finds an operation by the path as it was sent, so that an encoded slash stays within its segment.

    >>> async def handler(request): ...
    >>> router = Router([Operation("GET", "/v1/items/{id}", handler, "", "items")])
    >>> operation, params = router.find("GET", b"/v1/items/a%2Fb%20c")
    >>> operation.name, params
    ('GET /v1/items/{id}', [b'a%2Fb%20c'])
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        self._fixed: dict[bytes, dict[str, Operation]] = {}
        self._variable: dict[int, list[tuple[list[bytes | None], dict[str, Operation]]]] = {}
        for operation in operations:
            path = operation.path.encode()
            if b"{" not in path:
                methods = self._fixed.setdefault(path, {})
            else:
                pattern = [None if s.startswith(b"{") else s for s in path.split(b"/")]
                same_length = self._variable.setdefault(len(pattern), [])
                methods = next((m for p, m in same_length if p == pattern), {})
                if not methods:
                    same_length.append((pattern, methods))
            methods[operation.method] = operation
            if operation.method == "GET":
                methods["HEAD"] = operation

    def find(self, method: str, path: bytes) -> tuple[Operation, Sequence[bytes]]:
        methods, params = self._methods(path)
        operation = methods.get(method)
        if operation is None:
            raise MethodNotAllowed(method, methods)
        return operation, params

    def _methods(self, path: bytes) -> tuple[dict[str, Operation], Sequence[bytes]]:
        methods = self._fixed.get(path)
        if methods is not None:
            return methods, ()
        segments = path.split(b"/")
        for pattern, methods in self._variable.get(len(segments), ()):
            if all(p is None or p == s for p, s in zip(pattern, segments, strict=True)):
                params = [s for p, s in zip(pattern, segments, strict=True) if p is None]
                if all(params):
                    return methods, params
        raise PathNotFound(path.decode("latin-1"))


class Keys:
    """Bearer keys and what each may do. Without any, everything is open, and the service only starts on loopback."""

    def __init__(self, keys: Mapping[str, Iterable[str]]) -> None:
        self._keys = [(sha256(key.encode()).digest(), frozenset(scopes)) for key, scopes in keys.items()]

    def check(self, authorization: bytes, permission: Permission) -> None:
        if not self._keys:
            return
        scheme, _, key = authorization.partition(b" ")
        digest = sha256(key.strip()).digest()
        # Every key is compared, in constant time, so the time taken tells nothing of a key or its place.
        matching = [scopes for known, scopes in self._keys if hmac.compare_digest(known, digest)]
        if scheme.lower() != b"bearer" or not matching:
            raise Unauthorized
        if permission not in matching[0]:
            raise Forbidden(permission)


class Edge:
    """The ASGI application. Admission is bounded: beyond `max_in_flight` requests at once the next is turned away."""

    def __init__(
        self,
        operations: Iterable[Operation],
        keys: Keys,
        metrics: Metrics,
        max_in_flight: int,
        max_body: int,
        start: Callable[[], Awaitable[None]],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self._router, self._keys, self._metrics = Router(operations), keys, metrics
        self._max_in_flight, self._max_body = max_in_flight, max_body
        self._start, self.stop = start, stop
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._answer(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._live(receive, send)
        else:  # a websocket, by Serve's own port: accepting none, the handshake is refused with 403
            await send({"type": "websocket.close", "code": 1000})

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = perf_counter()
        request = Request(scope, receive, self._max_body)
        operation: Operation | None = None
        try:
            operation, request.params = self._router.find(scope["method"], _raw_path(scope))
            answer = await self._admitted(operation, request)
        except ClientGone:
            self._metrics.rejected("client_gone")
            return
        except Exception as error:
            answer = self._refusal(error, request, scope["method"])
        seconds = perf_counter() - began
        name = operation.name if operation else "none"
        self._metrics.request(name, answer.status, seconds, request.model)
        request.seconds["total"] = seconds
        await _send(answer, request, send, with_body=scope["method"] != "HEAD")

    async def _admitted(self, operation: Operation, request: Request) -> Answer:
        if operation.permission is None:
            return await operation.handler(request)
        self._keys.check(request.headers.get(b"authorization", b""), operation.permission)
        # A misspelt `model` must not be answered by another one.
        if (query := request.query) and (unknown := query.keys() - operation.query.keys()):
            there = ", ".join(operation.query) or "none"
            detail = f"is no parameter that the query string of this call can have; there is {there}"
            raise InvalidRequest(FieldError(f"/{escaped(name)}", detail) for name in sorted(unknown)[:MAX_ERRORS])
        if self._in_flight >= self._max_in_flight:
            self._metrics.rejected("in_flight")
            raise TooManyRequests(self._max_in_flight)
        self._in_flight += 1
        self._metrics.in_flight(1)
        try:
            return await operation.handler(request)
        finally:
            self._in_flight -= 1
            self._metrics.in_flight(-1)

    @staticmethod
    def _refusal(error: Exception, request: Request, method: str) -> Answer:
        made = problem(error, request.id, request.path[:1000])
        if made.status == 500 or isinstance(error, VersionCorrupt):
            trace = None if isinstance(error, ItemvecError) else error  # one of ours explains itself
            said = (request.id, request.trace, method, request.path, error)
            log.error("request %s (trace %s) failed: %s %s: %s", *said, exc_info=trace)
        if request.path.endswith("/v1/embeddings"):
            made.body["message"] = made.body["detail"]  # what OpenAI's clients show of an error
        headers = [(name.lower().encode(), value.encode()) for name, value in made.headers.items()]
        return Answer(orjson.dumps(made.body), made.status, b"application/problem+json", headers)

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            part, hook = ("startup", self._start) if message["type"] == "lifespan.startup" else ("shutdown", self.stop)
            try:
                await hook()
            except ItemvecError as error:
                await send({"type": f"lifespan.{part}.failed", "message": str(error)})
                return
            await send({"type": f"lifespan.{part}.complete"})
            if part == "shutdown":
                return


@lru_cache(maxsize=64)  # callers have few different ones
def _preference(accept: bytes, media_type: bytes) -> tuple[float, int]:
    """What a header Accept says of a type (RFC 9110, 12.5.1): the weight of the range that names it most closely, and
    how closely that does. A type that no range names comes before one that is refused.

    >>> said = b"application/json;q=0.5, application/*, text/html;q=0.9"
    >>> _preference(said, b"application/json"), _preference(said, b"application/xml"), _preference(said, b"text/css")
    ((0.5, 3), (1.0, 2), (0.0, 0))
    """
    ranges = b"*/*", media_type.partition(b"/")[0] + b"/*", media_type
    closeness, weight = 0, 0.0
    for said in accept.lower().split(b","):
        named, *parameters = map(bytes.strip, said.split(b";"))
        if named in ranges and (close := ranges.index(named) + 1) > closeness:
            weights = filter(None, map(WEIGHT.fullmatch, parameters))
            closeness, weight = close, next((float(found[1]) for found in weights), 1.0)
    return weight, closeness if weight else -closeness


def _trace(given: bytes | None, fresh: str) -> str:
    """`00-TRACE-PARENT-FLAGS`: the trace and the flags of the caller, or a new trace; the parent is this request.

    `fresh`: 48 random hex digits.
    """
    found = TRACEPARENT.fullmatch(given) if given is not None else None
    if found is None or (found[3] and given is not None and given.startswith(b"00")):
        return f"00-{fresh[:32]}-{fresh[32:]}-00"
    return f"00-{found[1].decode()}-{fresh[32:]}-{found[2].decode()}"


def _raw_path(scope: Scope) -> bytes:
    raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
    return raw.removeprefix(scope.get("root_path", "").encode())


async def _send(answer: Answer, request: Request, send: Send, with_body: bool) -> None:
    timing = ", ".join(f"{part};dur={seconds * 1000:.3f}" for part, seconds in request.seconds.items())
    headers = [
        (b"x-request-id", request.id.encode()),
        (b"server-timing", timing.encode()),
        (b"traceparent", request.trace.encode()),
        *answer.headers,
    ]
    if answer.status != 204:  # which must have neither (RFC 9110, 8.6)
        headers += (b"content-type", answer.content_type), (b"content-length", str(len(answer.body)).encode())
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body if with_body else b""})
