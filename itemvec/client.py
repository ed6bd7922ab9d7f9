"""A small HTTP client of the service, for the command line and for retraining jobs."""

import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from itemvec.errors import ItemvecError

RETRIES = 8
"""Times that a call answered 429 or 503 is made again, after what the service asks for: some 10 s in all."""


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
        for tries_left in reversed(range(RETRIES)):
            response = self._send(method, path, body)
            if response.status_code not in {429, 503} or not tries_left:
                break
            time.sleep(min(_seconds(response.headers.get("Retry-After")), 5.0))
        try:
            answer = response.json() if response.content else {}
        except ValueError:
            raise ServiceUnreachable(self.url, f"{response.status_code}, and not JSON") from None
        if not isinstance(answer, dict):
            raise ServiceUnreachable(self.url, "what answers there is no itemvec service")
        if response.is_error:
            raise ServiceProblem(f"{method} {path}", response.status_code, answer)
        return answer

    def _send(self, method: str, path: str, body: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body) if body is not None else self._http.request(method, path)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise ServiceUnreachable(self.url, str(error) or type(error).__name__) from None

    def item(self, item_id: str, model: str) -> dict[str, Any]:
        """The columns of a stored item."""
        columns: dict[str, Any] = self.call("GET", f"/v1/items/{_segment(item_id)}?model={quote(model)}")["item"]
        return columns

    def switch(self, name: str, version: int, progress: Callable[[dict[str, Any]], None] = lambda _: None) -> None:
        """Makes the service serve `version`, and returns when it does. `progress` gets the job as it goes on."""
        started = self.call("PUT", f"/v1/models/{quote(name)}/aliases/champion", {"version": version})
        job = started["job"]
        while job["state"] == "running":
            progress(job)
            time.sleep(0.25)
            job = self.call("GET", f"/v1/jobs/{job['id']}")
        progress(job)
        if job["state"] != "succeeded":
            raise ServiceProblem(f"switch to {name}@{version}", 500, job.get("problem") or {})


def _segment(item_id: str) -> str:
    """An id as one segment of a path; a dot is encoded too, since `..` would be taken for a step up."""
    return quote(item_id, safe="").replace(".", "%2E")


def _seconds(retry_after: str | None) -> float:
    try:
        return float(retry_after or 1.0)
    except ValueError:
        return 1.0
