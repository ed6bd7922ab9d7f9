"""The two kinds of work of a request, encoding and calls to the store; the time they took is told to the caller
(`Server-Timing`) and to the metrics."""

import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from itemvec.errors import StoreUnavailable
from itemvec.version import Encoding, ModelVersion
from service.edge import Answer, Request
from service.metrics import Metrics
from service.models import INLINE_BYTES, INLINE_ITEMS, ROWS_AT_ONCE, LoadedModels

T = TypeVar("T")
Given = TypeVar("Given")
"""What else came with the columns of many items: the ids of a stream, the fields of a request."""


class _Encoded(NamedTuple):
    encoding: Encoding
    seconds: float
    answer: Answer


class Measured:
    def __init__(self, models: LoadedModels, metrics: Metrics) -> None:
        self._models, self._metrics = models, metrics

    async def encode(
        self,
        request: Request,
        version: ModelVersion,
        items: Sequence[Mapping[str, Any]],
        pointer: str,
        cached: bool = True,
    ) -> Encoding:
        """Raises `InvalidItem`, with `pointer` before each of its places."""
        work = self._models.encode(version, items, pointer, cached)
        return await self._encoded(request, version, len(items), work)

    async def encode_table(
        self,
        request: Request,
        version: ModelVersion,
        size: int,
        read: Callable[[], tuple[Given, pa.Table]],
        write: Callable[[Given, Encoding], Answer],
        pointer: str,
    ) -> Answer:
        """What `write` makes of the encoding of the table that `read` gives, and of what else it gives.

        Of a body of many bytes (`size`) all of it in one go, by a thread that encodes: with a trip there for each
        of the three a service takes 8 % fewer Arrow streams of a thousand items. A long table is encoded in parts.
        """
        request.model = version.ref
        rows = read() if size <= INLINE_BYTES else None

        def at_once() -> _Encoded | tuple[Given, pa.Table]:
            given, table = rows or read()
            if len(table) > ROWS_AT_ONCE:
                return given, table
            began = perf_counter()
            encoding = version.encode_arrow(table, pointer)
            seconds = perf_counter() - began
            return _Encoded(encoding, seconds, write(given, encoding))

        items = ROWS_AT_ONCE if rows is None else len(rows[1])
        done, waited, _ = await self.here(request, items, self._models.compute(items, at_once))
        if isinstance(done, _Encoded):
            request.waited(waited, done.seconds)
            self._metrics.encoded(version.ref, len(done.encoding.vectors), done.seconds)
            self._metrics.columns(version.ref, done.encoding.statuses)
            return done.answer
        given, table = done
        encoding = await self._encoded(request, version, len(table), self._models.encode_table(version, table, pointer))
        return (await self._models.compute(len(table), partial(write, given, encoding)))[0]

    async def _encoded(
        self, request: Request, version: ModelVersion, items: int, work: Coroutine[Any, Any, tuple[Encoding, float]]
    ) -> Encoding:
        request.model = version.ref
        began = perf_counter()
        encoding, waited = await self.here(request, items, work)
        request.waited(waited, perf_counter() - began - waited)
        self._metrics.columns(version.ref, encoding.statuses)
        return encoding

    @staticmethod
    async def here(request: Request, items: int, work: Coroutine[Any, Any, T]) -> T:
        """What waits for a thread need not be done if nobody waits for it."""
        return await (work if items <= INLINE_ITEMS else request.while_here(work))

    async def compute(self, request: Request, items: int, work: Callable[[], T]) -> T:
        """Other work of the model's network, over so many items."""
        done, waited, seconds = await self._models.compute(items, work)
        request.waited(waited, seconds)
        return done

    @contextmanager
    def stored(self, request: Request, operation: str) -> Iterator[None]:
        """Around a call to the store, whether it goes well or not."""
        began = perf_counter()
        try:
            yield
        finally:
            self.took(request, operation, began)

    def took(self, request: Request, operation: str, began: float) -> None:
        """The same for one that is over; inside a `finally`, so that one that failed is counted as that."""
        request.took("store", began)
        self._metrics.store(operation, perf_counter() - began)
        if isinstance(sys.exception(), StoreUnavailable):
            self._metrics.store_error(operation)
