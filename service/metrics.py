"""What the service counts, and the exact sum of it over every replica: `Metrics`, `Snapshot`, `exposition`.

A replica is a process of its own, so each writes its numbers to memory-mapped files in one folder a node.
Whoever reads that folder has the whole node, the replicas that died included. `GET /metrics` adds up one
snapshot of each node; where a node does not answer it is `Incomplete`, since a sum that lacks a part looks to
Prometheus like counters that were reset.
"""

import os
import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import Metric
from prometheus_client.multiprocess import MultiProcessCollector

from itemvec.errors import ConfigError, StoreUnavailable
from itemvec.notes import Status, Statuses
from itemvec.processes import is_alive

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
"""Bounds of the histograms: from under one item's time to the longest that a caller waits."""

Sample = tuple[str, tuple[tuple[str, str], ...], float]

Number = Any
"""A value of prometheus_client's behind a counter, with its labels: `inc` and `get`."""


class Incomplete(StoreUnavailable):
    """Not every replica told its numbers; answered 503, and Prometheus tries again."""

    def __init__(self, why: str) -> None:
        Exception.__init__(self, f"the metrics are incomplete: {why}")
        self.retry_after = 1.0


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    kind: str
    help: str
    samples: list[Sample]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that the replicas of one node have counted, since the service was started."""

    node: str
    families: list[Family]


class Metrics:
    """The numbers of this process.

    >>> metrics = Metrics()
    >>> metrics.request("GET /v1/models", 200, 0.001, None)
    >>> text = exposition([metrics.snapshot("here")]).decode()
    >>> 'itemvec_requests_total{endpoint="/v1/models",method="GET",status="200"} 1.0' in text
    True

    With a `directory`, which must be PROMETHEUS_MULTIPROC_DIR since before prometheus_client was imported, a
    snapshot covers every process that has counted there.
    """

    def __init__(self, directory: Path | None = None) -> None:
        if (directory is not None) != (values.ValueClass is not values.MutexValue):
            raise ConfigError(
                f"metrics in {directory or 'this process'}, but PROMETHEUS_MULTIPROC_DIR was "
                f"{'not ' if directory else ''}set when Python started"
            )
        self._directory = directory
        if directory is not None:
            values.ValueClass = _values_of(os.getpid())
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "itemvec_requests_total",
            "Answered requests.",
            ["endpoint", "method", "status"],
            registry=registry,
        )
        self._request_seconds = Histogram(
            "itemvec_request_seconds",
            "In the replica, from the head of a request to its answer.",
            ["endpoint", "method"],
            buckets=SECONDS,
            registry=registry,
        )
        self._encode_seconds = Histogram(
            "itemvec_encode_seconds",
            "Encoding the items of one request.",
            ["model"],
            buckets=SECONDS,
            registry=registry,
        )
        self._items = Counter("itemvec_items_encoded_total", "Encoded items.", ["model"], registry=registry)
        self._columns = Counter(
            "itemvec_column_status_total",
            "Values that were not plain: out of vocabulary, missing, clipped; ignored has no column.",
            ["model", "column", "status"],
            registry=registry,
        )
        self._cached = Counter(
            "itemvec_cache_items_total",
            "Items looked for in the encode cache: found in this process (local), in Redis (redis), or encoded (miss).",
            ["model", "result"],
            registry=registry,
        )
        self._degraded = Gauge(
            "itemvec_degraded_replicas",
            "Replicas that go on without the store, since it does not answer.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._store_seconds = Histogram(
            "itemvec_store_seconds", "Calls to Redis.", ["operation"], buckets=SECONDS, registry=registry
        )
        self._store_errors = Counter(
            "itemvec_store_errors_total",
            "Calls that Redis did not answer or refused.",
            ["operation"],
            registry=registry,
        )
        self._rejected = Counter(
            "itemvec_rejected_requests_total",
            "Requests refused since the service was full, or whose caller left.",
            ["reason"],
            registry=registry,
        )
        self._in_flight = Gauge(
            "itemvec_in_flight_requests",
            "Requests being answered now.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self._models = Gauge(
            "itemvec_model_info",
            "1 for the version that a model's name means now, 0 for one that it meant before.",
            ["model", "version", "fingerprint"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self._help = {family.name: family.documentation for family in registry.collect()}
        self._now = _behind(self._in_flight)
        self._of_operation: dict[str, tuple[str, str, _Seconds]] = {}
        self._of_answer: dict[tuple[str, int], Number] = {}
        self._of_column: dict[tuple[str, str, str], Number] = {}
        self._of_model: dict[str, tuple[Number, _Seconds]] = {}
        self._of_result: dict[tuple[str, str], Number] = {}
        self._served: dict[str, tuple[str, str, str]] = {}

    # What the parts of the service report. `operation` is "METHOD /path/{pattern}": a label has few values.

    def request(self, operation: str, status: int, seconds: float, model: str | None) -> None:
        if (known := self._of_operation.get(operation)) is None:
            method, _, endpoint = operation.rpartition(" ")
            known = method, endpoint, _Seconds(self._request_seconds.labels(endpoint, method))
            self._of_operation[operation] = known
        method, endpoint, histogram = known
        if (number := self._of_answer.get((operation, status))) is None:
            number = self._of_answer[operation, status] = _behind(self._requests.labels(endpoint, method, str(status)))
        number.inc(1)
        histogram.observe(seconds)

    def encoded(self, model: str, items: int, seconds: float) -> None:
        if (known := self._of_model.get(model)) is None:
            known = _behind(self._items.labels(model)), _Seconds(self._encode_seconds.labels(model))
            self._of_model[model] = known
        number, histogram = known
        number.inc(items)
        histogram.observe(seconds)

    def columns(self, model: str, statuses: Sequence[Mapping[str, Status]]) -> None:
        """One mapping an item, of the columns that were not plain."""
        for (column, status), times in Statuses.of(statuses).tally().items():
            if status == "ignored":  # its name is the caller's, so there is no end of them
                column = ""  # noqa: PLW2901
            if (number := self._of_column.get((model, column, status))) is None:
                number = self._of_column[model, column, status] = _behind(self._columns.labels(model, column, status))
            number.inc(times)

    def store(self, operation: str, seconds: float) -> None:
        self._store_seconds.labels(operation).observe(seconds)

    def store_error(self, operation: str) -> None:
        self._store_errors.labels(operation).inc()

    def cache(self, model: str, result: str, items: int) -> None:
        if items:
            if (number := self._of_result.get((model, result))) is None:
                number = self._of_result[model, result] = _behind(self._cached.labels(model, result))
            number.inc(items)

    def degraded(self, is_so: bool) -> None:
        self._degraded.set(int(is_so))

    def rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def in_flight(self, change: int) -> None:
        self._now.inc(change)

    def model(self, name: str, ref: str, fingerprint: str) -> None:
        """The version, "movies@3", that the bare name means from now on."""
        serves = name, ref.rpartition("@")[2], fingerprint
        if (before := self._served.get(name)) is not None and before != serves:
            self._models.labels(*before).set(0)
        self._models.labels(*serves).set(1)
        self._served[name] = serves

    # What others ask for

    def snapshot(self, node: str) -> Snapshot:
        if self._directory is None:
            return Snapshot(node, _families(self._registry, self._help))
        return node_snapshot(node, self._directory, self._help)

    def render(self) -> bytes:
        return exposition([self.snapshot("")])


def _behind(metric: Counter | Gauge) -> Number:
    """The library's own way to it checks each time what it was once told."""
    return metric._value  # noqa: SLF001


class _Seconds:
    """A child of a histogram, as it is told of each request: the library's own way there is as long as its work."""

    __slots__ = ("_buckets", "_sum")

    def __init__(self, histogram: Histogram) -> None:
        self._sum: Number = histogram._sum  # noqa: SLF001
        self._buckets: list[Number] = histogram._buckets  # noqa: SLF001

    def observe(self, seconds: float) -> None:
        self._sum.inc(seconds)
        self._buckets[bisect_left(SECONDS, seconds)].inc(1)


@cache
def _values_of(pid: int) -> type:
    """Numbers of a process that does not fork and has one thread that counts."""
    of_library: Any = values.MultiProcessValue(lambda: pid)  # type: ignore[no-untyped-call]

    class Mapped(of_library):  # type: ignore[misc]
        """Changed in its place in the file. The library takes a lock, asks who the process is, looks the place up,
        packs and copies, several times in each request."""

        def __init__(self, *what: Any, **options: Any) -> None:
            super().__init__(*what, **options)
            # A file that grows is mapped once more, and this map of its beginning stays as good.
            self._numbers = memoryview(self._file._m).cast("d")  # noqa: SLF001
            self._at: int = self._file._positions[self._key] // 8  # noqa: SLF001

        def inc(self, amount: float) -> None:
            self._numbers[self._at] += amount

        def set(self, value: float, timestamp: float | None = None) -> None:
            self._numbers[self._at] = value

        def get(self) -> float:
            found: float = self._numbers[self._at]
            return found

    return Mapped


def node_snapshot(node: str, directory: Path, help_texts: Mapping[str, str] | None = None) -> Snapshot:
    """What all processes that ever counted in `directory` have counted; gauges of those alive."""
    _forget_dead(directory)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
    return Snapshot(node, _families(registry, help_texts or {}))


def exposition(snapshots: Iterable[Snapshot]) -> bytes:
    """The sum in Prometheus's text format.

    A model's info is the greatest of its values, everything else is added up.
    """
    merged: dict[str, tuple[Metric, dict[tuple[str, tuple[tuple[str, str], ...]], float]]] = {}
    for family in (family for snapshot in snapshots for family in snapshot.families):
        _, total = merged.setdefault(family.name, (Metric(family.name, family.help, family.kind), {}))
        for name, labels, value in family.samples:
            before = total.get((name, labels), 0.0)
            total[name, labels] = max(before, value) if name.endswith("_info") else before + value
    for metric, total in merged.values():
        for (name, labels), value in total.items():
            metric.add_sample(name, dict(labels), value)
    return generate_latest(_Ready([metric for metric, _ in merged.values()]))


class _Ready(CollectorRegistry):
    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _families(registry: CollectorRegistry, help_texts: Mapping[str, str]) -> list[Family]:
    return [
        Family(
            family.name,
            family.type,
            help_texts.get(family.name, family.documentation),
            [
                (sample.name, tuple(sorted(sample.labels.items())), sample.value)
                for sample in family.samples
                if not sample.name.endswith("_created")
            ],
        )
        for family in registry.collect()
    ]


def _forget_dead(directory: Path) -> None:
    for file in directory.glob("gauge_live*_*.db"):
        owner = re.fullmatch(r"gauge_live\w*_(\d+)", file.stem)
        if owner is not None and not is_alive(int(owner[1])):
            with suppress(FileNotFoundError):  # another replica was faster
                file.unlink()
