"""The two kinds of work of a request, encoding and calls to the store; the time they took is told to the caller
(`Server-Timing`) and to the metrics."""

import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

import pyarrow as pa

from itemvec.errors import StoreUnavailable
from itemvec.version import Encoding, ModelVersion
from service.edge import Answer, Request
from service.metrics import Metrics
from service.models import INLINE_ITEMS, ROWS_AT_ONCE, LoadedModels

T = TypeVar("T")


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

    async def encode_stream(
        self,
        request: Request,
        version: ModelVersion,
        read: Callable[[], tuple[pa.ChunkedArray | None, pa.Table]],
        write: Callable[[pa.ChunkedArray | None, Encoding], Answer],
        pointer: str,
    ) -> Answer:
        """What `write` makes of the ids that `read` gives and the encoding of its table.

        All of it in one go, by the thread that encodes: with a trip there for each of the three a service takes 8 %
        fewer streams of a thousand items. A long table is encoded in parts.
        """
        request.model = version.ref

        def at_once() -> tuple[pa.ChunkedArray | None, pa.Table, Encoding | None, Answer | None, float]:
            ids, table = read()
            if len(table) > ROWS_AT_ONCE:
                return ids, table, None, None, 0.0
            began = perf_counter()
            encoding = version.encode_arrow(table, pointer)
            seconds = perf_counter() - began
            return ids, table, encoding, write(ids, encoding), seconds

        done, waited, _ = await request.while_here(self._models.in_turn(at_once))
        ids, table, encoding, answer, seconds = done
        request.waited(waited, seconds)
        if encoding is not None and answer is not None:
            self._metrics.encoded(version.ref, len(table), seconds)
            self._metrics.columns(version.ref, encoding.statuses)
            return answer
        encoding = await self._encoded(request, version, len(table), self._models.encode_table(version, table, pointer))
        return (await request.while_here(self._models.in_turn(partial(write, ids, encoding))))[0]

    async def _encoded(
        self, request: Request, version: ModelVersion, items: int, work: Coroutine[Any, Any, tuple[Encoding, float]]
    ) -> Encoding:
        request.model = version.ref
        began = perf_counter()
        # What waits for the encoder's thread need not be done if nobody waits for it.
        encoding, waited = await (work if items <= INLINE_ITEMS else request.while_here(work))
        request.waited(waited, perf_counter() - began - waited)
        self._metrics.columns(version.ref, encoding.statuses)
        return encoding

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
