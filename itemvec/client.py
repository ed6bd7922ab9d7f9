"""A small HTTP client of the service, for the command line and for retraining jobs."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

import httpx
import pyarrow as pa

from itemvec.check import undictionaried
from itemvec.errors import ItemvecError

RETRIES = 8
"""Times that a call answered 429 or 503 is made again, after what the service asks for: some 10 s in all."""

ARROW = "application/vnd.apache.arrow.stream"
ROWS = 8192
"""Of a table, in one request at most."""

BYTES = 4 << 20
"""The same, on average: half of what a service takes unless it is set up otherwise."""

TOO_LARGE = 413

FIRST_WAIT, LONGEST_WAIT = 0.02, 0.5
"""Seconds between two looks at a job: a rollback has ended at the first."""

Progress = Callable[[dict[str, Any]], None]
"""Gets a job as it goes on."""


class ServiceUnreachable(ItemvecError):
    def __init__(self, url: str, why: str) -> None:
        super().__init__(f"no answer from a service at {url} ({why}); start one: itemvec serve")


class ServiceProblem(ItemvecError):
    """The service refused a call; `status` and `problem` are what it answered (RFC 9457)."""

    def __init__(self, call: str, status: int, problem: Mapping[str, Any]) -> None:
        super().__init__(f"{call}: {status} {problem.get('detail') or problem.get('title') or 'no reason given'}")
        self.status, self.problem = status, problem


class Client:
    """Calls the service at `url`; `key` is a bearer key where it asks for one.

    Raises ServiceUnreachable and ServiceProblem. Safe to use from several threads.
    """

    def __init__(self, url: str, key: str | None = None, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, trust_env=False)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The answer's JSON. A busy or starting service is asked again, as often and as late as it says."""
        response = self._answered(method, path, **({} if body is None else {"json": body}))
        return self._json(response)

    def embed(self, table: pa.Table, model: str | None = None, dimensions: int | None = None) -> pa.Table:
        """The embeddings of a table's items, row by row and as fast as they come: `embedding` (a list of float32),
        `columns` (what was not plain), and `id` if the table has it. Columns travel as columns (Arrow), in parts."""
        asked = {"model": model, "dimensions": None if dimensions is None else str(dimensions)}
        query = {name: value for name, value in asked.items() if value is not None}
        rows = rows_at_once(table, ROWS)
        starts = range(0, max(len(table), 1), rows)
        return pa.concat_tables(part for start in starts for part in self._embedded(table.slice(start, rows), query))

    def _embedded(self, table: pa.Table, query: Mapping[str, str]) -> list[pa.Table]:
        """In one part, or in several where one would be too large."""
        headers = {"Content-Type": ARROW, "Accept": ARROW}
        response = self._answered("POST", "/v1/embeddings", params=query, content=_stream(table), headers=headers)
        if response.status_code == TOO_LARGE and len(table) > 1:
            half = len(table) // 2
            return [*self._embedded(table.slice(0, half), query), *self._embedded(table.slice(half), query)]
        if response.headers.get("Content-Type") != ARROW:
            self._json(response)
            raise ServiceUnreachable(self.url, "what answers there knows no Arrow streams")
        return [pa.ipc.open_stream(response.content).read_all()]

    def put(self, table: pa.Table, model: str) -> dict[str, Any]:
        """Stores the items of a table whose ids are text; the answer is that of `POST /v1/items`."""
        headers = {"Content-Type": ARROW, "Accept": "application/json"}
        content = {"params": {"model": model}, "content": _stream(table), "headers": headers}
        return self._json(self._answered("POST", "/v1/items", **content))

    def similar(self, query: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
        """Neighbors of a query as `POST /v1/similar` takes it: `{"id": ..., "k": 5}`."""
        return self.call("POST", "/v1/similar", {**query, "model": model or query.get("model")})

    def decode(self, embeddings: Sequence[Sequence[float]], model: str | None = None) -> list[dict[str, Any]]:
        """The columns of each embedding, read back: name -> value, missing, candidates."""
        body = {"embeddings": [list(map(float, one)) for one in embeddings], "model": model}
        return [one["columns"] for one in self.call("POST", "/v1/decode", body)["data"]]

    def _answered(self, method: str, path: str, **content: Any) -> httpx.Response:
        for tries_left in reversed(range(RETRIES)):
            try:
                response = self._http.request(method, path, **content)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                raise ServiceUnreachable(self.url, str(error) or type(error).__name__) from None
            if response.status_code not in {429, 503} or not tries_left:
                break
            time.sleep(min(_seconds(response.headers.get("Retry-After")), 5.0))
        return response

    def _json(self, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = response.json() if response.content else {}
        except ValueError:
            raise ServiceUnreachable(self.url, f"{response.status_code}, and not JSON") from None
        if not isinstance(answer, dict):
            raise ServiceUnreachable(self.url, "what answers there is no itemvec service")
        if response.is_error:
            made = f"{response.request.method} {response.request.url.raw_path.decode()}"
            raise ServiceProblem(made, response.status_code, answer)
        return answer

    def item(self, item_id: str, model: str) -> dict[str, Any]:
        """The columns of a stored item."""
        columns: dict[str, Any] = self.call("GET", f"/v1/items/{_segment(item_id)}?model={quote(model)}")["item"]
        return columns

    def delete(self, item_id: str, model: str) -> bool:
        """Whether there was such an item."""
        try:
            self.call("DELETE", f"/v1/items/{_segment(item_id)}?model={quote(model)}")
        except ServiceProblem as problem:
            if problem.status == 404:
                return False
            raise
        return True

    def switch(self, name: str, version: int, progress: Progress = lambda _: None) -> dict[str, Any]:
        """Makes the service serve `version`, and returns the job when it does. `progress` gets it as it goes on."""
        started = self.call("PUT", f"/v1/models/{quote(name)}/aliases/champion", {"version": version})
        return self._ended(started["job"], f"switch to {name}@{version}", progress)

    def backfill(self, name: str, version: int, progress: Progress = lambda _: None) -> dict[str, Any]:
        """Makes `version` searchable beside what is served, and returns the job when it is."""
        started = self.call("POST", f"/v1/models/{quote(name)}/backfill", {"version": version})
        return self._ended(started["job"], f"backfill of {name}@{version}", progress)

    def _ended(self, job: dict[str, Any], what: str, progress: Progress) -> dict[str, Any]:
        wait = FIRST_WAIT
        while job["state"] == "running":
            progress(job)
            time.sleep(wait)
            wait = min(2 * wait, LONGEST_WAIT)
            job = self.call("GET", f"/v1/jobs/{job['id']}")
        progress(job)
        if job["state"] != "succeeded":
            raise ServiceProblem(what, 500, job.get("problem") or {})
        return job


def rows_at_once(table: pa.Table, most: int) -> int:
    """How many of its rows go into one request."""
    size: int = table.nbytes
    return max(1, min(most, len(table) * BYTES // max(size, 1)))


def _segment(item_id: str) -> str:
    """An id as one segment of a path; a dot is encoded too, since `..` would be taken for a step up."""
    return quote(item_id, safe="").replace(".", "%2E")


def _stream(table: pa.Table) -> bytes:
    """Labels that are codes are written out: else each part would bring the labels of the whole table."""
    names, columns = table.column_names, map(undictionaried, table.columns)
    table = pa.Table.from_arrays([*columns], names).replace_schema_metadata(table.schema.metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _seconds(retry_after: str | None) -> float:
    try:
        return float(retry_after or 1.0)
    except ValueError:
        return 1.0
