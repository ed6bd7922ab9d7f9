"""The OpenAPI document of the table of operations, and the page that shows it."""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, Final, get_args

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

import itemvec
from itemvec.errors import ConfigError
from service.arrow import STREAM
from service.edge import Operation
from service.problems import reason
from service.schemas import Problem

ASSETS: Final = {
    "swagger-ui-bundle.js": b"text/javascript; charset=utf-8",
    "swagger-ui.css": b"text/css; charset=utf-8",
}
ARROW: Final = STREAM.decode()
REFERENCE: Final = "#/components/schemas/{model}"

HEADERS: Final = {
    "X-Request-ID": "As it was sent, or made; problems name it, and the log where the service failed",
    "traceparent": "W3C Trace Context: the caller's trace, or a new one, with a parent id of this request",
    "Server-Timing": "Milliseconds of `queue`, `encode`, `store` and `total`",
    "Location": "The job that was started",
    "X-Model": "The version of an answer without a body",
    "X-Fingerprint": "Its fingerprint",
    "Retry-After": "Seconds",
    "WWW-Authenticate": "How a key is sent",
}
"""Those that answers may have, and what they say."""

WITH_ALL: Final = ("X-Request-ID", "traceparent", "Server-Timing")
BY_STATUS: Final = {202: ("Location",), 204: ("X-Model", "X-Fingerprint")}
OF_PROBLEMS: Final = {401: ("WWW-Authenticate",), 429: ("Retry-After",), 503: ("Retry-After",)}

PAGE: Final = b"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>itemvec</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="ui"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script>SwaggerUIBundle({url: "openapi.json", dom_id: "#ui", deepLinking: true, tryItOutEnabled: true})</script>
</body>
</html>
"""


def document(operations: Iterable[Operation], with_keys: bool) -> bytes:
    """The OpenAPI 3.1 document; `with_keys`: calls need a bearer key."""
    operations = list(operations)
    used = {m for o in operations for m in (o.takes, *chain(*map(_models, o.gives.values())), Problem) if m is not None}
    models = sorted(used, key=lambda m: m.__name__)
    _, schemas = models_json_schema([(m, "validation") for m in models], ref_template=REFERENCE)
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation, with_keys)
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()}
    components: dict[str, Any] = {"schemas": schemas["$defs"], "headers": headers}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    made = {
        "openapi": "3.1.0",
        "info": {
            "title": "itemvec",
            "version": itemvec.__version__,
            "description": "Dense embeddings of items, and the items that are similar. Errors are RFC 9457 problems.",
        },
        "paths": paths,
        "components": components,
    }
    return orjson.dumps(made)


def asset(name: str) -> tuple[bytes, bytes]:
    """A file of Swagger UI and its media type; they come with a package, so the page needs no internet."""
    return _read(name), ASSETS[name]


@lru_cache
def _read(name: str) -> bytes:
    package = find_spec("fastapi_offline")  # found, not imported: only its files are of use
    if package is None or package.origin is None:
        raise ConfigError("/docs needs the package fastapi-offline: pip install 'itemvec[service]'")
    return (Path(package.origin).parent / "static" / name).read_bytes()


def _described(operation: Operation, with_keys: bool) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": operation.handler.__name__,
        "summary": operation.summary,
        "description": " ".join((operation.handler.__doc__ or "").split()),
        "tags": [operation.tag],
        "parameters": [_parameter(name, "path") for name in re.findall(r"{(\w+)}", operation.path)]
        + [_parameter(name, "query", text) for name, text in operation.query.items()],
        "responses": {str(status): _answer(status, gives) for status, gives in operation.gives.items()}
        | {str(status): _problem(status) for status in operation.refuses},
    }
    if operation.takes is not None:
        content: dict[str, Any] = {"application/json": {"schema": _ref(operation.takes)}}
        if operation.arrow:
            stream = {ARROW: {"schema": {"type": "string", "format": "binary", "description": operation.arrow}}}
            content |= stream
            for status in map(str, operation.gives):
                described["responses"][status]["content"] |= stream
        described["requestBody"] = {"required": True, "content": content}
    if with_keys and operation.permission is not None:
        described["security"] = [{"key": []}]
        described["description"] += f" Needs a key with the scope `{operation.permission}`."
    return described


def _parameter(name: str, place: str, text: str = "") -> dict[str, Any]:
    schema = {"type": "integer" if name == "version" else "string"}
    return {"name": name, "in": place, "required": place == "path", "description": text, "schema": schema}


def _answer(status: int, gives: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"description": reason(status), "headers": _headers(BY_STATUS.get(status, ()))}
    if isinstance(gives, str):
        return made | ({"content": {gives: {}}} if gives else {})
    refs = [_ref(model) for model in _models(gives)]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return made | {"content": {"application/json": {"schema": schema}}}


def _models(gives: Any) -> Sequence[type[BaseModel]]:
    """The models of an answer that has one shape or another."""
    return () if isinstance(gives, str) else get_args(gives) or (gives,)


def _problem(status: int) -> dict[str, Any]:
    return {
        "description": reason(status),
        "headers": _headers(OF_PROBLEMS.get(status, ())),
        "content": {"application/problem+json": {"schema": _ref(Problem)}},
    }


def _headers(also: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (*WITH_ALL, *also)}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": REFERENCE.format(model=model.__name__)}
