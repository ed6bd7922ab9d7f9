"""Items on their way into the store: encoded by every live version, acknowledged when each of them has the vector."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from itemvec.errors import FieldError, InvalidItem, StoreUnavailable
from itemvec.features import Status
from itemvec.version import ModelVersion
from service.models import LoadedModels
from service.store import Store

Item = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Fitting:
    """Those of some items that a version can encode."""

    rows: list[int]
    vectors: npt.NDArray[np.float32]
    """(len(rows), dim)"""

    statuses: list[dict[str, Status]]
    """Parallel to `rows`."""

    errors: dict[int, list[FieldError]]
    """Of the rows that it cannot encode; the pointers begin with `/row`."""


@dataclass(frozen=True, slots=True)
class Upserted:
    """What became of one item: stored, or refused for its errors."""

    created: bool
    columns: Mapping[str, Status]
    errors: Sequence[FieldError] = ()


async def encode_fitting(models: LoadedModels, version: ModelVersion, items: Sequence[Item]) -> Fitting:
    try:
        encoding, _ = await models.encode(version, items)
        return Fitting(list(range(len(items))), encoding.vectors, encoding.statuses, {})
    except InvalidItem as invalid:
        errors: dict[int, list[FieldError]] = {}
        for error in invalid.errors:
            errors.setdefault(int(error.pointer.split("/", 2)[1]), []).append(error)
    rows = [i for i in range(len(items)) if i not in errors]
    if not rows:
        return Fitting([], np.empty((0, version.dim), np.float32), [], errors)
    encoding, _ = await models.encode(version, [items[i] for i in rows])
    return Fitting(rows, encoding.vectors, encoding.statuses, errors)


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
    ) -> list[Upserted]:
        """Stores the items that `version` can encode; the answer is parallel to `ids`.

        `took(part, since)` is told when the parts "encode" and "store" began, as each one ends.
        """
        began = perf_counter()
        fitting = await encode_fitting(self._models, version, items)
        took("encode", began)
        outcome = [Upserted(False, {}, fitting.errors.get(i, ())) for i in range(len(items))]
        if fitting.rows:
            began = perf_counter()
            try:
                created = await self._put(
                    version,
                    [ids[i] for i in fitting.rows],
                    [items[i] for i in fitting.rows],
                    [raws[i] for i in fitting.rows],
                    fitting.vectors,
                )
            finally:
                took("store", began)
            for row, is_new, columns in zip(fitting.rows, created, fitting.statuses, strict=True):
                outcome[row] = Upserted(is_new, columns)
        return outcome

    async def _put(
        self,
        version: ModelVersion,
        ids: Sequence[str],
        items: Sequence[Item],
        raws: Sequence[bytes],
        vectors: npt.NDArray[np.float32],
    ) -> list[bool]:
        name = version.name
        known = self._live.pop(name, {})
        if version.fingerprint in known:
            try:
                return await self._put_live(version, known, ids, items, raws, vectors)
            except StoreUnavailable:
                # One of them may have been dropped since. If nothing has changed it was Redis, and so it was said.
                if await self._store.live(name) == known:
                    raise
        live = await self._store.live(name)
        if version.fingerprint not in live:
            raise StoreUnavailable(f"the index of {version.ref} is not there yet", retry_after=2.0)
        return await self._put_live(version, live, ids, items, raws, vectors)

    async def _put_live(
        self,
        version: ModelVersion,
        live: Mapping[str, str],
        ids: Sequence[str],
        items: Sequence[Item],
        raws: Sequence[bytes],
        vectors: npt.NDArray[np.float32],
    ) -> list[bool]:
        name = version.name
        whole = {version.fingerprint: vectors}
        partial: dict[str, Fitting] = {}
        for fingerprint, ref in live.items():
            if fingerprint not in whole:
                fitting = await self._fitting(ref, items)
                if fitting.errors:  # another schema may know a column by another type
                    partial[fingerprint] = fitting
                else:
                    whole[fingerprint] = fitting.vectors
        written = await self._store.put(name, ids, raws, whole)
        for fingerprint, ref in written.live.items():
            if fingerprint not in whole:  # live since we looked: its backfill may have passed these items already
                late = partial.get(fingerprint) or await self._fitting(ref, items)
                late_ids, revs = [ids[i] for i in late.rows], [written.revs[i] for i in late.rows]
                await self._store.add_vectors(name, fingerprint, late_ids, revs, late.vectors)
        self._live[name] = written.live  # only after a write that went well: the next one starts from what is true
        return written.created

    async def _fitting(self, ref: str, items: Sequence[Item]) -> Fitting:
        return await encode_fitting(self._models, await self._models.get(ref), items)
