"""Errors as RFC 9457 problems: the one place that knows which error is which HTTP status.

The errors of `itemvec` know nothing of HTTP; the ones below are about a request itself. `STATUS` maps them all, and
`problem` turns any of them into the body and the headers of an answer.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

from itemvec.errors import (
    FieldError,
    InvalidItem,
    ItemNotFound,
    ItemvecError,
    ModelNotFound,
    RegistryError,
    RunNotFound,
    StoreUnavailable,
    VersionCorrupt,
    VersionNotFound,
)

MAX_ERRORS: Final = 100
"""Listed errors an answer: a body of a million wrong values must not become an answer of a million lines."""


class RequestError(ItemvecError):
    """What is wrong with a request, its path, its headers or its caller, rather than with a value in it."""


class MalformedRequest(RequestError):
    """The bytes are not what they say they are: no JSON, no UTF-8."""


class InvalidRequest(RequestError):
    """Well-formed, but values are missing, of the wrong type, or beyond a limit; names each by a JSON pointer."""

    def __init__(self, errors: Iterable[FieldError]) -> None:
        self.errors = list(errors)
        super().__init__(_first_of(self.errors))

    @classmethod
    def at(cls, pointer: str, detail: str) -> "InvalidRequest":
        return cls([FieldError(pointer, detail)])


class BodyTooLarge(RequestError):
    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes, the most that one request may send: split it")


class BodyTooSlow(RequestError):
    def __init__(self, seconds: float) -> None:
        super().__init__(f"the body did not arrive within {seconds:g} s")


class UnsupportedMediaType(RequestError):
    def __init__(self, got: str, possible: Iterable[str] = ("application/json",)) -> None:
        sent = f"was {got!r}" if got else "is missing"
        super().__init__(f"the header Content-Type {sent}; send {' or '.join(possible)} (with curl: --json)")


class UnsupportedCoding(RequestError):
    def __init__(self, got: str) -> None:
        super().__init__(f"the header Content-Encoding was {got!r}; send the body as it is, and without it")


class Unauthorized(RequestError):
    def __init__(self) -> None:
        super().__init__("send a key that this service knows: Authorization: Bearer KEY")


class Forbidden(RequestError):
    def __init__(self, scope: str) -> None:
        super().__init__(f"this key lacks the scope {scope!r}")


class PathNotFound(RequestError):
    def __init__(self, path: str) -> None:
        super().__init__(f"nothing is at {path[:200]!r}; /docs lists the calls (a slash within an id is written %2F)")


class MethodNotAllowed(RequestError):
    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{method[:20]} is not possible here; {self.allowed} is")


class TooManyRequests(RequestError):
    def __init__(self, limit: int, retry_after: float = 1.0) -> None:
        super().__init__(f"{limit} requests are being answered already, as many as one replica takes on: try again")
        self.retry_after = retry_after


class JobNotFound(RequestError):
    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {job_id[:100]!r}; a job is forgotten a day after its end")


class JobLost(RequestError):
    def __init__(self, how: str) -> None:
        super().__init__(f"the replica that ran this job {how}: start it again")


class PromotionRunning(RequestError):
    def __init__(self, name: str, job_id: str) -> None:
        super().__init__(f"model {name!r} is being switched by job {job_id}: wait for it (GET /v1/jobs/{job_id})")
        self.job_id = job_id


class PromotionLost(RequestError):
    def __init__(self, ref: str) -> None:
        super().__init__(
            f"the promotion of {ref} stood still, or lacked Redis, for so long that another may have begun: it stopped "
            "before the switch; start it again if it is still wanted"
        )


class NotSearchable(RequestError):
    def __init__(self, ref: str, searchable: Iterable[str]) -> None:
        there = ", ".join(searchable) or "none yet"
        super().__init__(f"{ref} has no complete index of the stored items, so no neighbors; searchable: {there}")


STATUS: Final[dict[type[ItemvecError], HTTPStatus]] = {
    MalformedRequest: HTTPStatus.BAD_REQUEST,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    PathNotFound: HTTPStatus.NOT_FOUND,
    ItemNotFound: HTTPStatus.NOT_FOUND,
    ModelNotFound: HTTPStatus.NOT_FOUND,
    VersionNotFound: HTTPStatus.NOT_FOUND,
    RunNotFound: HTTPStatus.NOT_FOUND,
    JobNotFound: HTTPStatus.NOT_FOUND,
    MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    BodyTooSlow: HTTPStatus.REQUEST_TIMEOUT,
    PromotionRunning: HTTPStatus.CONFLICT,
    PromotionLost: HTTPStatus.CONFLICT,
    NotSearchable: HTTPStatus.CONFLICT,
    BodyTooLarge: HTTPStatus(413),  # its name differs between Python 3.12 and 3.13
    UnsupportedMediaType: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    UnsupportedCoding: HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
    InvalidRequest: HTTPStatus(422),  # so does this one's
    InvalidItem: HTTPStatus(422),
    TooManyRequests: HTTPStatus.TOO_MANY_REQUESTS,
    JobLost: HTTPStatus.SERVICE_UNAVAILABLE,
    StoreUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    RegistryError: HTTPStatus.SERVICE_UNAVAILABLE,
    VersionCorrupt: HTTPStatus.SERVICE_UNAVAILABLE,
    ItemvecError: HTTPStatus.INTERNAL_SERVER_ERROR,
}
"""Looked up along an error's class and its parents. An error that is not even an `ItemvecError` was not meant to be
raised, so its text is for the log alone."""


@dataclass(frozen=True, slots=True)
class Problem:
    status: int
    body: dict[str, Any]
    headers: dict[str, str] = field(default_factory=dict)


def reason(status: int) -> str:
    return HTTPStatus(status).phrase


def problem(error: Exception, request_id: str, instance: str | None = None) -> Problem:
    """The problem that tells a caller of `error`; of an error that is no `ItemvecError`, only that there was one."""
    kind = next((c for c in type(error).__mro__ if c in STATUS), None)
    if kind is None:
        return _problem(
            "InternalError", 500, f"the service failed; its log has the cause under the request id {request_id}",
            request_id, instance,
        )  # fmt: skip
    made = _problem(kind.__name__, STATUS[kind], str(error), request_id, instance)
    if isinstance(error, InvalidItem | InvalidRequest):
        made.body["detail"] = _first_of(error.errors)
        made.body["errors"] = [{"pointer": e.pointer, "detail": e.detail} for e in error.errors[:MAX_ERRORS]]
    if isinstance(error, StoreUnavailable | TooManyRequests):
        made.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        made.headers["WWW-Authenticate"] = 'Bearer realm="itemvec"'
    if isinstance(error, MethodNotAllowed):
        made.headers["Allow"] = error.allowed
    return made


def _problem(kind: str, status: int, detail: str, request_id: str, instance: str | None) -> Problem:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind).lower()
    body = {
        "type": f"urn:itemvec:problem:{words}",
        "title": words.replace("-", " ").capitalize(),
        "status": int(status),
        "detail": detail,
        "request_id": request_id,
    }
    return Problem(int(status), body | ({"instance": instance} if instance else {}))


def _first_of(errors: list[FieldError]) -> str:
    first, more = errors[0], len(errors) - 1
    return f"{first.pointer or 'the body'}: {first.detail}" + (f" (and {more} more)" if more else "")


TYPE_NAMES: Final = {
    dict: "an object",
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
}


def expected(pointer: str, wanted: str, value: Any) -> FieldError:
    """What belongs at `pointer`, and what is there."""
    if value is None:
        return FieldError(pointer, f"expected {wanted}, got null")
    shown = repr(value) if isinstance(value, str | int | float) else ""
    shown = f" {shown}" if shown and len(shown) <= 60 else ""
    return FieldError(pointer, f"expected {wanted}, got {TYPE_NAMES[type(value)]}{shown}")


def escaped(name: str) -> str:
    """A name as a part of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
