"""Items on their way into the store: encoded by every live version, acknowledged when each of them has the vector."""

import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from itemvec.errors import FieldError, InvalidItem, ModelNotFound, StoreUnavailable, VersionCorrupt, VersionNotFound
from itemvec.features import Status
from itemvec.version import Encoding, ModelVersion
from service import attributes
from service.index import NoIndex
from service.models import LoadedModels
from service.store import Encoded, Store

log = logging.getLogger("itemvec.service")

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fitting:
    """Those of some items that a version can encode."""

    rows: Sequence[int]
    vectors: npt.NDArray[np.float32]
    """(len(rows), dim)"""

    statuses: Sequence[dict[str, Status]]
    """Parallel to `rows`."""

    errors: dict[int, list[FieldError]]
    """Of the rows that it cannot encode; the pointers begin with `/row`."""


@dataclass(frozen=True, slots=True)
class Upserted:
    """What became of some items. In the order of those that are stored: is it new, and its columns that were not plain.
    Of the others, by their row, why they were refused."""

    created: Sequence[bool]
    statuses: Sequence[dict[str, Status]]
    errors: Mapping[int, Sequence[FieldError]]


async def encode_fitting(models: LoadedModels, version: ModelVersion, items: Sequence[Item]) -> Fitting:
    try:
        encoding, _ = await models.encode(version, items, cached=False)
        return Fitting(range(len(items)), encoding.vectors, encoding.statuses, {})
    except InvalidItem as invalid:
        errors: dict[int, list[FieldError]] = {}
        for error in invalid.errors:
            errors.setdefault(int(error.pointer.split("/", 2)[1]), []).append(error)
    rows = [i for i in range(len(items)) if i not in errors]
    if not rows:
        return Fitting([], np.empty((0, version.dim), np.float32), [], errors)
    encoding, _ = await models.encode(version, [items[i] for i in rows], cached=False)
    return Fitting(rows, encoding.vectors, encoding.statuses, errors)


async def encoded(
    models: LoadedModels,
    version: ModelVersion,
    items: Sequence[Item],
    vectors: npt.NDArray[np.float32],
    rows: Sequence[int] | None = None,
) -> Encoded:
    """For the store: the vectors of the items at `rows` (None: of all), with what queries can filter by."""
    columns = attributes.filterable(version.schema)
    if not columns:
        return Encoded(vectors, rows)
    some = items if rows is None else [items[i] for i in rows]
    fields, _, _ = await models.compute(len(some), partial(attributes.fields, columns, some))
    return Encoded(vectors, rows, fields)


class ItemWriter:
    def __init__(self, models: LoadedModels, store: Store) -> None:
        self._models, self._store = models, store
        self._live: dict[str, Mapping[str, str]] = {}
        """Model -> the live versions that its last write saw, so that the next sends all their vectors at once."""

    async def upsert(
        self,
        version: ModelVersion,
        ids: Sequence[str],
        items: Sequence[Item],
        raws: Sequence[bytes],
        took: Callable[[str, float], None],
        while_here: Callable[[Coroutine[Any, Any, Fitting]], Awaitable[Fitting]],
        encoding: Encoding | None = None,
    ) -> Upserted:
        """Stores the items that `version` can encode.

        `took(part, since)` is told when the parts "encode" and "store" began, as each one ends. `while_here(work)` does
        the encoding, and may end it by an exception if nobody waits for it any more: once it is done all goes on to
        the end, since what is stored has to be in every live version. `encoding` is what `version` made of the items
        before.
        """
        began = perf_counter()
        if encoding is None:
            fitting = await while_here(encode_fitting(self._models, version, items))
        else:
            fitting = Fitting(range(len(items)), encoding.vectors, encoding.statuses, {})
        if fitting.errors:
            ids, items = [ids[i] for i in fitting.rows], [items[i] for i in fitting.rows]
            raws = [raws[i] for i in fitting.rows]
        own = await encoded(self._models, version, items, fitting.vectors)
        took("encode", began)
        created: list[bool] = []
        if fitting.rows:
            began = perf_counter()
            try:
                created = await self._put(version, ids, items, raws, own)
            finally:
                took("store", began)
        return Upserted(created, fitting.statuses, fitting.errors)

    async def _put(
        self,
        version: ModelVersion,
        ids: Sequence[str],
        items: Sequence[Item],
        raws: Sequence[bytes],
        own: Encoded,
    ) -> list[bool]:
        name = version.name
        known = self._live.get(name, {})
        if version.fingerprint in known:
            try:
                return await self._put_live(version, known, ids, items, raws, own)
            except Exception as error:
                self._live.pop(name, None)
                if not isinstance(error, NoIndex):  # one of them may have been dropped since
                    raise
        live = await self._store.live(name)
        if version.fingerprint not in live:
            raise StoreUnavailable(f"the index of {version.ref} is not there yet", retry_after=2.0)
        return await self._put_live(version, live, ids, items, raws, own)

    async def _put_live(
        self,
        version: ModelVersion,
        live: Mapping[str, str],
        ids: Sequence[str],
        items: Sequence[Item],
        raws: Sequence[bytes],
        own: Encoded,
    ) -> list[bool]:
        """`own` is what `version` made of the items."""
        name = version.name
        made = {}
        for fingerprint, ref in live.items():
            if fingerprint == version.fingerprint:
                made[fingerprint] = own
                if ref != version.ref and (same := await self._loaded(ref)) is not None:
                    made[fingerprint] = await encoded(self._models, same, items, own.vectors)
            elif (other := await self._encoded(name, fingerprint, ref, items)) is not None:
                made[fingerprint] = other
        written = await self._store.put(name, ids, raws, made)
        for fingerprint, ref in written.live.items():
            # Live since we looked, so its backfill may have passed these items already; or of another version now,
            # that has the same network but other columns to filter by.
            if live.get(fingerprint) != ref:
                late = await self._encoded(name, fingerprint, ref, items)
                if late is not None:
                    await self._store.add_vectors(name, fingerprint, ids, written.revs, late)
        if version.fingerprint not in written.live:
            raise StoreUnavailable(f"the index of {version.ref} is gone, and is made again", retry_after=2.0)
        self._live[name] = written.live  # only after a write that went well: the next one starts from what is true
        return written.created

    async def _encoded(self, name: str, fingerprint: str, ref: str, items: Sequence[Item]) -> Encoded | None:
        """None of a version that is gone or damaged. No write can reach it then, so it is live no more: its index would
        lack what is written from now on."""
        version = await self._loaded(ref)
        if version is None:
            log.warning("%s cannot be loaded any more: it is not searched, and writes leave it out", ref)
            await self._store.unmark_live(name, fingerprint)
            return None
        fitting = await encode_fitting(self._models, version, items)
        return await encoded(self._models, version, items, fitting.vectors, fitting.rows)

    async def _loaded(self, ref: str) -> ModelVersion | None:
        """None where it is gone or damaged."""
        with contextlib.suppress(ModelNotFound, VersionCorrupt, VersionNotFound):
            return await self._models.get(ref)
        return None
