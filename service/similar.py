"""Neighbors of queries: from ids, items and vectors to one vector each, and from there to the nearest stored items.

A query's vector is the one of its only example, or, of several,

    q = mean of the positive vectors - NEGATIVE_SHARE x mean of the negative ones, brought to length 1

`override` and `ignore` change the columns of the example before it is encoded. What a `partial` example lacks says
nothing of it: otherwise a query of one column is near to whatever lacks the others, too. So what its vector v has in
common with e, the one of an item without any column, is taken out:

    q = v - max(v . e, 0) e, brought to length 1

`explain` tells what each column of the query contributed to a neighbor's score, by occlusion (Zeiler and Fergus 2014):
the score, minus the score of the same query with that column missing. The encoder was trained with missing columns, so
it knows what to make of such an item. Contributions do not add up to the score, since columns overlap in what they say;
a negative one says that the column speaks against this neighbor. The price is one encoding for each column of the
query, and the neighbors' vectors.

However many queries a request has, they are encoded at once, and the store is asked four times at most; a lone query by
the id of a stored item asks once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from itemvec.errors import FieldError, InvalidItem, ItemNotFound, ItemvecError
from itemvec.features import Status
from itemvec.version import ModelVersion
from service.conditions import Condition
from service.edge import Request
from service.filters import read_filter
from service.index import Neighbor
from service.measured import Measured
from service.models import LoadedModels
from service.problems import InvalidRequest, escaped
from service.queries import Example, SimilarQuery
from service.requests import Item, Limits
from service.store import Query, Store

Vector = npt.NDArray[np.float32]
Answer = dict[str, Any] | ItemvecError


@dataclass(slots=True)
class _Plan:
    """A query on its way to its answer."""

    query: SimilarQuery
    where: Condition | None
    vectors: dict[int, Vector] = field(default_factory=dict)
    """Place among the examples -> its vector, as they become known."""

    items: dict[int, Item] = field(default_factory=dict)
    """Place among the examples -> the item that has to be encoded for it."""

    columns: dict[int, dict[str, Status]] = field(default_factory=dict)
    explained: list[str] = field(default_factory=list)
    without: Vector | None = None
    """(len(explained), dim): the query without each of these columns."""

    vector: Vector | None = None
    error: ItemvecError | None = None

    @property
    def changed(self) -> bool:
        """Is the stored vector of the example not enough?"""
        query = self.query
        return bool(query.override or query.ignore or query.explain or query.partial)


class Neighborhoods:
    def __init__(self, models: LoadedModels, store: Store, measured: Measured, limits: Limits) -> None:
        self._models, self._store, self._measured, self._limits = models, store, measured, limits

    async def find(
        self, request: Request, version: ModelVersion, queries: Sequence[SimilarQuery | InvalidRequest]
    ) -> list[Answer]:
        """Parallel to `queries`: `neighbors` and what else there is to tell, or why there is no answer.

        Raises `StoreUnavailable` and `NotSearchable`, which are no query's own.
        """
        plans = [query if isinstance(query, InvalidRequest) else self._plan(query, version) for query in queries]
        if len(plans) == 1 and (answer := await self._answer_by_id(request, version, plans[0])) is not None:
            return [answer]
        good = [plan for plan in plans if isinstance(plan, _Plan)]
        await self._fetch(request, version, good)
        await self._encode(request, version, good)
        for plan in good:
            if plan.error is None:
                plan.vector = _combined(plan)
        good = [plan for plan in good if plan.error is None]
        found = await self._search(request, version, good)
        near = dict(zip(map(id, good), found, strict=True))
        explained = await self._explained(request, version, [(plan, near[id(plan)]) for plan in good])
        return [
            plan if isinstance(plan, InvalidRequest) else plan.error or _answer(plan, near[id(plan)], explained)
            for plan in plans
        ]

    async def _answer_by_id(
        self, request: Request, version: ModelVersion, plan: "_Plan | InvalidRequest"
    ) -> Answer | None:
        """To a query that is the id of an item with a vector and nothing more; None to any other."""
        if isinstance(plan, InvalidRequest) or plan.changed or len(plan.query.examples) != 1:
            return None
        query, item_id = plan.query, plan.query.examples[0].what
        if not isinstance(item_id, str):
            return None
        with self._measured.stored(request, "search"):
            if not await self._models.is_searchable(version):
                return None
            name, fingerprint, schema = version.name, version.fingerprint, version.schema
            near = await self._store.search_like(
                name, fingerprint, item_id, query.k, query.exclude, where=plan.where, schema=schema
            )
        return None if near is None else _answer(plan, near, {})

    def _plan(self, query: SimilarQuery, version: ModelVersion) -> "_Plan | InvalidRequest":
        errors, where = _wrong_columns(query, version), None
        if query.filter is not None:
            try:
                where = read_filter(query.filter, version.schema, self._limits.filter, f"{query.pointer}/filter")
            except InvalidRequest as invalid:
                errors += invalid.errors
        plan = _Plan(query, where)
        for i, example in enumerate(query.examples):
            if isinstance(example.what, np.ndarray):
                if len(example.what) != version.dim:
                    detail = f"has {len(example.what)} numbers, {version.ref} has {version.dim}"
                    errors.append(FieldError(example.pointer, detail))
                plan.vectors[i] = example.what
            elif isinstance(example.what, dict):
                plan.items[i] = _changed(example.what, query)
        return InvalidRequest(errors) if errors else plan

    async def _fetch(self, request: Request, version: ModelVersion, plans: Sequence[_Plan]) -> None:
        """Vectors of the stored examples; their items where a vector is not enough, or not there."""
        stored = [
            (plan, i, example.what)
            for plan in plans
            for i, example in enumerate(plan.query.examples)
            if isinstance(example.what, str)
        ]
        if not stored:
            return
        whole = [one for one in stored if one[0].changed]
        with self._measured.stored(request, "get"):
            if len(whole) < len(stored):
                plain = [one for one in stored if not one[0].changed]
                ids = [item_id for _, _, item_id in plain]
                vectors = await self._store.get_vectors(version.name, version.fingerprint, ids)
                for (plan, i, item_id), vector in zip(plain, vectors, strict=True):
                    if vector is None:
                        whole.append((plan, i, item_id))
                    else:
                        plan.vectors[i] = vector
            if whole:
                items = await self._store.get_many(version.name, [item_id for _, _, item_id in whole])
                for (plan, i, item_id), item in zip(whole, items, strict=True):
                    if item is None:
                        plan.error = ItemNotFound(item_id, version.name)
                    else:
                        plan.items[i] = _changed(orjson.loads(item.raw), plan.query)

    async def _encode(self, request: Request, version: ModelVersion, plans: Sequence[_Plan]) -> None:
        plans = [plan for plan in plans if plan.items and plan.error is None]
        for plan in plans:
            if plan.query.explain:
                names = (feature.name for feature in version.schema.features)
                plan.explained = [name for name in names if plan.items[0].get(name) is not None]
        while plans:
            rows = [(plan, i) for plan in plans for i in plan.items]
            items = [plan.items[i] for plan, i in rows]
            items += [_lacking(plan.items[0], name) for plan in plans for name in plan.explained]
            items += [{}] if any(plan.query.partial for plan in plans) else []
            if len(plans) > 1 and len(items) > self._limits.items:
                detail = f"ask for {len(items)} encodings together; a request takes up to {self._limits.items}"
                raise InvalidRequest.at("/queries", detail)
            try:
                explained = any(plan.explained for plan in plans)  # items that nobody asks for twice
                encoding = await self._measured.encode(request, version, items, "", cached=not explained)
            except InvalidItem as invalid:
                _blame(invalid, rows)
                plans = [plan for plan in plans if plan.error is None]
                continue
            for (plan, i), vector, columns in zip(rows, encoding.vectors, encoding.statuses, strict=False):
                plan.vectors[i], plan.columns[i] = vector, columns
            start = len(rows)
            for plan in plans:
                plan.without = encoding.vectors[start : start + len(plan.explained)]
                start += len(plan.explained)
                if plan.query.partial:
                    [plan.vectors[0]] = without_empty(plan.vectors[0][None], encoding.vectors[-1])
                    plan.without = without_empty(plan.without, encoding.vectors[-1])
            return

    async def _search(
        self, request: Request, version: ModelVersion, plans: Sequence[_Plan]
    ) -> Sequence[Sequence[Neighbor]]:
        queries = [
            Query(plan.vector, plan.query.k, _left_out(plan), plan.where) for plan in plans if plan.vector is not None
        ]
        if not queries:
            return []
        name, fingerprint, schema = version.name, version.fingerprint, version.schema
        with self._measured.stored(request, "search"):
            await self._models.check_searchable(version)
            if len(queries) > 1:
                return await self._store.search_many(name, fingerprint, queries, schema=schema)
            [one] = queries
            return [
                await self._store.search(
                    name, fingerprint, one.vector, one.k, one.exclude, where=one.where, schema=schema
                )
            ]

    async def _explained(
        self, request: Request, version: ModelVersion, found: Sequence[tuple[_Plan, Sequence[Neighbor]]]
    ) -> dict[str, Vector]:
        """Id -> vector of every neighbor that is to be explained, unless it has gone meanwhile."""
        ids = list({neighbor.id for plan, neighbors in found if plan.query.explain for neighbor in neighbors})
        if not ids:
            return {}
        with self._measured.stored(request, "get"):
            vectors = await self._store.get_vectors(version.name, version.fingerprint, ids)
        return {item_id: vector for item_id, vector in zip(ids, vectors, strict=True) if vector is not None}


def _wrong_columns(query: SimilarQuery, version: ModelVersion) -> list[FieldError]:
    """A misspelt column must not give the very neighbors that it was to change."""
    if not (query.override or query.ignore):
        return []
    names = [feature.name for feature in version.schema.features]
    detail = f"is no column of {version.ref}; it has {', '.join(names)}"
    known = set(names)
    errors = [
        FieldError(f"{query.pointer}/override/{escaped(name)}", detail) for name in query.override if name not in known
    ]
    return errors + [
        FieldError(f"{query.pointer}/ignore/{i}", detail) for i, name in enumerate(query.ignore) if name not in known
    ]


def _changed(item: Item, query: SimilarQuery) -> Item:
    if not (query.override or query.ignore):
        return item
    return {name: value for name, value in (item | query.override).items() if name not in query.ignore}


def _lacking(item: Item, column: str) -> Item:
    return {name: value for name, value in item.items() if name != column}


def _blame(invalid: InvalidItem, rows: Sequence[tuple[_Plan, int]]) -> None:
    """Gives each plan the errors of its items, with the place in the request that each value came from."""
    errors: dict[int, list[FieldError]] = {}
    for error in invalid.errors:
        _, row, column = error.pointer.split("/", 2)
        if int(row) >= len(rows):
            continue  # a copy of an item without a column has the mistakes of the item
        plan, i = rows[int(row)]
        example, name = plan.query.examples[i], column.split("/", 1)[0].replace("~1", "/").replace("~0", "~")
        pointer = f"{plan.query.pointer}/override" if name in plan.query.override else example.pointer
        if pointer == example.pointer and isinstance(example.what, str):
            found = FieldError(pointer, f"the stored item has /{column}, which this version refuses: {error.detail}")
        else:
            found = FieldError(f"{pointer}/{column}", error.detail)
        errors.setdefault(id(plan), []).append(found)
    for plan, _ in rows:
        if id(plan) in errors:
            plan.error = InvalidItem(errors[id(plan)])


def _combined(plan: _Plan) -> Vector | None:
    examples = plan.query.examples
    if len(examples) == 1:
        return plan.vectors[0]
    vectors = np.stack([plan.vectors[i] for i in range(len(examples))]).astype(np.float64)
    total = np.array([example.share for example in examples]) @ vectors
    length = float(np.linalg.norm(total))
    if length < 1e-6:  # what is left is rounding
        where = f"{plan.query.pointer}/positive"
        plan.error = InvalidRequest.at(where, "the examples cancel each other out: no direction is left to search in")
        return None
    combined: Vector = (total / length).astype(np.float32)
    return combined


def without_empty(vectors: Vector, empty: Vector) -> Vector:
    """(n, dim), (dim,) -> (n, dim): unit vectors without what they have in common with the empty item; one that has
    nothing else stays as it is."""
    rest = vectors - np.maximum(vectors @ empty, 0)[:, None] * empty
    lengths = np.linalg.norm(rest, axis=1, keepdims=True)
    said: Vector = np.where(lengths < 1e-3, vectors, rest / np.maximum(lengths, 1e-3))  # less is rounding
    return said


def _left_out(plan: _Plan) -> frozenset[str]:
    """No item is among its own neighbors."""
    return plan.query.exclude | {example.what for example in plan.query.examples if isinstance(example.what, str)}


def _answer(plan: _Plan, neighbors: Sequence[Neighbor], vectors: dict[str, Vector]) -> dict[str, Any]:
    query, answer = plan.query, dict[str, Any]()
    if len(query.examples) == 1:
        if plan.columns and (plan.changed or not isinstance(query.examples[0].what, str)):
            answer["columns"] = {name: status for name, status in plan.columns[0].items() if name not in query.ignore}
    elif told := [_told(query.examples[i], columns) for i, columns in plan.columns.items() if columns]:
        answer["examples"] = told
    answer["neighbors"] = [{"id": neighbor.id, "score": neighbor.score} for neighbor in neighbors]
    if query.explain and plan.without is not None:
        for shown in answer["neighbors"]:
            if (vector := vectors.get(shown["id"])) is not None:
                shown["contributions"] = _contributions(plan, shown["score"], vector)
    return answer


def _told(example: Example, columns: dict[str, Status]) -> dict[str, Any]:
    return {"pointer": example.pointer, "columns": columns}


def _contributions(plan: _Plan, score: float, neighbor: Vector) -> dict[str, float]:
    """Largest first."""
    assert plan.without is not None  # noqa: S101 - as its caller has seen
    scores = plan.without @ neighbor
    missing = {name for name, status in plan.columns[0].items() if status == "missing"}
    gained = {
        name: round(score - float(s), 6) for name, s in zip(plan.explained, scores, strict=True) if name not in missing
    }
    return dict(sorted(gained.items(), key=lambda one: -one[1]))
