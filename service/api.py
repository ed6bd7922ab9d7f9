"""The HTTP API: what each call does, and the table of all of them."""

import asyncio
import sys
from base64 import b64encode
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from itemvec.errors import FieldError, InvalidItem, ItemNotFound, ItemvecError, ModelNotFound, StoreUnavailable
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.version import Encoding, ModelVersion
from service import openapi, requests, schemas
from service.config import ServiceConfig
from service.edge import Answer, Edge, Keys, Operation, Request
from service.items import ItemWriter, Upserted
from service.metrics import CONTENT_TYPE, Metrics
from service.models import LoadedModels
from service.problems import InvalidRequest, PathNotFound, problem
from service.promote import Fleet, Promotions
from service.requests import Entry, Item, RefusedEntry
from service.store import Store

Vector = npt.NDArray[np.float32]


def build_app(
    models: LoadedModels,
    store: Store,
    metrics: Metrics,
    config: ServiceConfig,
    fleet: Fleet | None = None,
    metrics_text: Callable[[], Awaitable[bytes]] | None = None,
) -> Edge:
    """The ASGI application of one replica. `fleet` reaches the others; without it this process is alone."""
    promotions = Promotions(models, store, fleet)
    api = Api(models, store, metrics, config, promotions, metrics_text)

    async def stop() -> None:
        await promotions.stop()
        await models.stop()

    return Edge(
        api.operations(),
        Keys(config.read_keys()),
        metrics,
        max_in_flight=config.max_in_flight,
        max_body=config.max_body_bytes,
        start=models.start,
        stop=stop,
    )


class Api:
    def __init__(
        self,
        models: LoadedModels,
        store: Store,
        metrics: Metrics,
        config: ServiceConfig,
        promotions: Promotions,
        metrics_text: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        self._models, self._store, self._metrics, self._promotions = models, store, metrics, promotions
        self._writer = ItemWriter(models, store)
        self._metrics_text = metrics_text
        self._filled_once = False
        self._ready_items = config.ready_items
        self._limits = requests.Limits(
            items=config.max_items,
            labels=config.max_labels,
            string=config.max_string,
            k=config.max_k,
            exclude=config.max_exclude,
        )
        self._with_keys = bool(config.read_keys())

    def operations(self) -> Sequence[Operation]:
        """Every call of the API. The documentation is made from this table too."""
        of_model = {"model": "A model's name; the default model if left out"}
        read, write = (401, 403, 404, 422, 429, 503), (400, 401, 403, 404, 413, 415, 422, 429, 503)
        table = [
            Operation(
                "POST", "/v1/embeddings", self.embeddings, "Encode items", "embeddings", "read",
                takes=schemas.EmbeddingsRequest, gives={200: schemas.Embeddings}, refuses=write,
            ),
            Operation(
                "POST", "/v1/similar", self.similar, "Find similar items", "similar", "read",
                takes=schemas.SimilarRequest, gives={200: schemas.Similar}, refuses=(*write, 409),
            ),
            Operation(
                "PUT", "/v1/items/{id}", self.put_item, "Create or replace an item", "items", "write",
                takes=schemas.ItemRequest, gives={200: schemas.UpsertedItem, 201: schemas.UpsertedItem},
                refuses=write, query=of_model,
            ),
            Operation(
                "POST", "/v1/items", self.put_items, "Create or replace many items", "items", "write",
                takes=schemas.BulkRequest, gives={200: schemas.BulkAnswer}, refuses=write,
            ),
            Operation(
                "GET", "/v1/items/{id}", self.get_item, "An item and its vector", "items", "read",
                gives={200: schemas.StoredItem}, refuses=read, query=of_model,
            ),
            Operation(
                "DELETE", "/v1/items/{id}", self.delete_item, "Remove an item", "items", "write",
                gives={204: ""}, refuses=read, query=of_model,
            ),
            Operation(
                "GET", "/v1/models", self.list_models, "The models", "models", "read",
                gives={200: schemas.Models}, refuses=(401, 403, 429, 503),
            ),
            Operation(
                "GET", "/v1/models/{name}", self.get_model, "One model", "models", "read",
                gives={200: schemas.ModelDetail}, refuses=read,
            ),
            Operation(
                "GET", "/v1/models/{name}/versions/{version}", self.get_version, "One version of a model", "models",
                "read", gives={200: schemas.VersionDetail}, refuses=read,
            ),
            Operation(
                "PUT", "/v1/models/{name}/aliases/champion", self.promote, "Promote or roll back", "models", "admin",
                takes=schemas.AliasRequest, gives={202: schemas.JobStarted}, refuses=(*write, 409),
            ),
            Operation(
                "GET", "/v1/jobs/{id}", self.get_job, "A job and its progress", "models", "read",
                gives={200: schemas.Job}, refuses=read,
            ),
            Operation("GET", "/healthz", self.healthz, "Is the process alive", "service", gives={200: schemas.Health}),
            Operation(
                "GET", "/readyz", self.readyz, "Can it answer", "service",
                gives={200: schemas.Readiness, 503: schemas.Readiness},
            ),
            Operation(
                "GET", "/metrics", self.get_metrics, "Metrics for Prometheus", "service", "read",
                gives={200: "text/plain"}, refuses=(401, 403, 429, 503),
            ),
        ]  # fmt: skip
        described = cache(lambda: openapi.document(table, self._with_keys))  # 90 ms, for the few who ask

        async def openapi_json(_: Request) -> Answer:
            return Answer(described())

        async def docs(_: Request) -> Answer:
            return Answer(openapi.PAGE, content_type=b"text/html; charset=utf-8")

        async def docs_asset(request: Request) -> Answer:
            name = request.params[0].decode("latin-1")
            if name not in openapi.ASSETS:
                raise PathNotFound(request.path)
            content, media_type = openapi.asset(name)
            return Answer(content, content_type=media_type, headers=[(b"cache-control", b"max-age=86400")])

        return [
            *table,
            Operation("GET", "/openapi.json", openapi_json, "", "service"),
            Operation("GET", "/docs", docs, "", "service"),
            Operation("GET", "/docs/{file}", docs_asset, "", "service"),
        ]

    # Embeddings and neighbors

    async def embeddings(self, request: Request) -> Answer:
        """Encodes items with a model's champion or with the version that is named. Nothing is stored."""
        wanted = requests.read_embeddings(await request.body(), self._limits)
        version = await self._models.get(wanted.model)
        if wanted.dimensions not in {None, version.dim}:
            raise InvalidRequest.at("/dimensions", f"{version.ref} has {version.dim} dimensions and no shorter form")
        encoding = await self._encode(request, version, wanted.items, "/input")
        vectors: Sequence[Vector] | Sequence[str] = list(encoding.vectors)
        if wanted.base64:
            vectors = [b64encode(row.astype("<f4", copy=False).tobytes()).decode() for row in encoding.vectors]
        count = len(wanted.items)
        answer: dict[str, Any] = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": vectors[i], "columns": columns}
                for i, columns in enumerate(encoding.statuses)
            ],
            "model": version.ref,
            "fingerprint": version.fingerprint,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        if not self._store.available:
            answer["degraded"] = True
        return Answer.json(answer)

    async def similar(self, request: Request) -> Answer:
        """The stored items nearest to a stored item, to an item in the request, or to a vector, by cosine."""
        wanted = requests.read_similar(await request.body(), self._limits)
        version = await self._models.get(wanted.model)
        request.model = version.ref
        answer: dict[str, Any] = {}
        exclude = wanted.exclude
        if wanted.embedding is not None:
            vector = wanted.embedding
            if len(vector) != version.dim:
                detail = f"has {len(vector)} numbers, {version.ref} has {version.dim}"
                raise InvalidRequest.at("/embedding", detail)
        elif wanted.item is not None:
            try:
                encoding = await self._encode(request, version, [wanted.item], "")
            except InvalidItem as error:
                raise InvalidItem(requests.moved(error.errors, "/0", "/item")) from None
            vector, answer["columns"] = encoding.vectors[0], encoding.statuses[0]
        elif wanted.id is not None:
            vector, exclude = await self._vector_of(request, version, wanted.id), exclude | {wanted.id}
        began = perf_counter()
        try:
            await self._models.check_searchable(version)
            neighbors = await self._store.search(version.name, version.fingerprint, vector, wanted.k, exclude)
        finally:
            self._stored(request, "search", began)
        answer["neighbors"] = [{"id": item_id, "score": score} for item_id, score in neighbors]
        return _of(version, answer)

    # Items

    async def put_item(self, request: Request) -> Answer:
        """Encodes and stores an item; it is searchable when this answers. The body is the object of its columns."""
        item_id = requests.read_path_id(request.params[0])
        entry = requests.read_item(await request.body(), item_id, self._limits)
        version = self._champion(request)
        [stored] = await self._upsert(request, version, [entry])
        if stored.errors:
            raise InvalidItem(requests.moved(stored.errors, "/0", ""))
        status = "created" if stored.created else "updated"
        answer = {"id": item_id, "status": status, "columns": stored.columns}
        return _of(version, answer, 201 if stored.created else 200)

    async def put_items(self, request: Request) -> Answer:
        """Encodes and stores items; each is taken or refused by itself, and the good ones are kept."""
        wanted = requests.read_bulk(await request.body(), self._limits)
        version = self._champion(request, wanted.model)
        answers: list[dict[str, Any]] = []
        good = [entry for entry in wanted.entries if isinstance(entry, Entry)]
        stored = iter(await self._upsert(request, version, good) if good else ())
        for i, entry in enumerate(wanted.entries):
            if isinstance(entry, RefusedEntry):
                answers.append(_refused(entry.id, InvalidRequest(entry.errors), request))
                continue
            outcome = next(stored)
            if outcome.errors:
                # Its place among the good ones becomes its place in the request.
                errors = [FieldError(f"/items/{i}/" + e.pointer.split("/", 2)[2], e.detail) for e in outcome.errors]
                answers.append(_refused(entry.id, InvalidItem(errors), request))
            else:
                status = "created" if outcome.created else "updated"
                answers.append({"id": entry.id, "status": status, "columns": outcome.columns})
        counts = Counter(answer["status"] for answer in answers)
        totals = {status: counts[status] for status in ("created", "updated", "refused")}
        return _of(version, {"items": answers, **totals})

    async def get_item(self, request: Request) -> Answer:
        """The columns of an item as they were sent, and the vector that the champion gave it."""
        item_id = requests.read_path_id(request.params[0])
        version = self._champion(request)
        began = perf_counter()
        try:
            item, [vector] = await asyncio.gather(
                self._store.get(version.name, item_id),
                self._store.get_vectors(version.name, version.fingerprint, [item_id]),
            )
        finally:
            self._stored(request, "get", began)
        return _of(version, {"id": item_id, "item": orjson.Fragment(item.raw), "embedding": vector})

    async def delete_item(self, request: Request) -> Answer:
        """Removes an item and its vectors; it is no longer found when this answers."""
        item_id = requests.read_path_id(request.params[0])
        version = self._champion(request)
        began = perf_counter()
        try:
            [existed] = await self._store.delete(version.name, [item_id])
        finally:
            self._stored(request, "delete", began)
        if not existed:
            raise ItemNotFound(item_id, version.name)
        return Answer(b"", 204)

    # Models and jobs

    async def list_models(self, _: Request) -> Answer:
        """The models of the registry: their versions, their aliases, and what is served."""
        names = await self._models.in_thread(self._models.registry.names)
        data = [await self._described(name) for name in names]
        return Answer.json({"object": "list", "data": data})

    async def get_model(self, request: Request) -> Answer:
        """A model with the schema and the evaluation of the version that is served."""
        name = requests.read_path_segment(request.params[0])
        described = await self._described(name)
        champion = self._models.serving.get(name)
        described["item_schema"] = champion and champion.schema.json_schema()
        described["evaluation"] = champion and champion.evaluation
        return Answer.json(described)

    async def get_version(self, request: Request) -> Answer:
        """The manifest, the schema (as JSON Schema of an item) and the evaluation of a version."""
        name, number = map(requests.read_path_segment, request.params)
        return Answer.json(await self._models.in_thread(_read_version, self._models.registry, f"{name}@{number}"))

    async def promote(self, request: Request) -> Answer:
        """Encodes the stored items with a version, then switches to it: a job. Give the version before for a rollback.

        If anything fails, what is served goes on. The previous version stays ready, so a rollback takes no time.
        """
        name = requests.read_path_segment(request.params[0])
        job = await self._promotions.promote(name, requests.read_alias(await request.body()))
        answer = Answer.json({"job": job.shown()}, 202)
        answer.headers.append((b"location", f"/v1/jobs/{job.id}".encode()))
        return answer

    async def get_job(self, request: Request) -> Answer:
        """How far a job is. It is kept for a day."""
        job = await self._promotions.job(requests.read_path_segment(request.params[0]))
        return Answer.json(job.shown())

    # The service

    async def healthz(self, _: Request) -> Answer:
        """200 as long as the process answers at all: for a liveness probe."""
        return Answer.json({"status": "ok"})

    async def readyz(self, _: Request) -> Answer:
        """200 as soon as a model is loaded and its index was complete once: for a readiness probe.

        With the setting `ready_items` it also waits until the store holds so many items. The store may be down:
        encoding does not need it.
        """
        answer: dict[str, Any] = {"models": {n: v.ref for n, v in self._models.serving.items()}}
        try:
            await self._store.ping()
            searchable = [await self._models.is_searchable(v) for v in self._models.serving.values()]
            answer["store"] = "filling" if not all(searchable) else "ok" if await self._has_items() else "loading"
        except StoreUnavailable:
            answer["store"] = "unavailable"
        # Only at the start does a half-filled index keep callers away; later it would stop the encoding too.
        self._filled_once = self._filled_once or answer["store"] not in {"filling", "loading"}
        answer["ready"] = self._models.ready and self._filled_once
        return Answer.json(answer, 200 if answer["ready"] else 503)

    async def _has_items(self) -> bool:
        return not self._ready_items or self._ready_items <= sum(
            [await self._store.count(name) for name in self._models.serving]
        )

    async def get_metrics(self, _: Request) -> Answer:
        """Counters and histograms, summed over all replicas. 503 rather than a part of them, if a replica is silent."""
        text = await self._metrics_text() if self._metrics_text else self._metrics.render()
        return Answer(text, content_type=CONTENT_TYPE.encode())

    # Helpers

    def _champion(self, request: Request, ref: str | None = None) -> ModelVersion:
        """Items belong to a model, not to one of its versions: they are encoded with each that is live."""
        ref = ref or request.query.get("model")
        name, at, which = ref.partition("@") if ref is not None else (None, "", "")
        if at and which != "champion":
            raise InvalidRequest.at("/model", f"items are kept for all versions of a model: say {name!r}, not {ref!r}")
        version = self._models.champion(name)
        request.model = version.ref
        return version

    async def _encode(self, request: Request, version: ModelVersion, items: Sequence[Item], pointer: str) -> Encoding:
        request.model = version.ref
        began = perf_counter()
        encoding, waited = await self._models.encode(version, items, pointer)
        seconds = perf_counter() - began - waited
        request.seconds["queue"], request.seconds["encode"] = waited, seconds
        self._metrics.columns(version.ref, encoding.statuses)
        return encoding

    async def _upsert(self, request: Request, version: ModelVersion, entries: Sequence[Entry]) -> list[Upserted]:
        def took(part: str, since: float) -> None:
            if part == "store":
                self._stored(request, "put", since)
            else:
                request.took(part, since)

        ids, items, raws = [e.id for e in entries], [e.item for e in entries], [e.raw for e in entries]
        stored = await self._writer.upsert(version, ids, items, raws, took)
        self._metrics.columns(version.ref, [one.columns for one in stored])
        return stored

    async def _vector_of(self, request: Request, version: ModelVersion, item_id: str) -> Vector:
        """The vector of a stored item; encoded anew where the store has the item but not this version's vector."""
        began = perf_counter()
        try:
            [vector] = await self._store.get_vectors(version.name, version.fingerprint, [item_id])
            if vector is not None:
                return vector
            item = await self._store.get(version.name, item_id)
        finally:
            self._stored(request, "get", began)
        encoded: Vector = (await self._encode(request, version, [orjson.loads(item.raw)], "")).vectors[0]
        return encoded

    def _stored(self, request: Request, operation: str, began: float) -> None:
        """Notes a call to the store, whether it went well or not: called in a `finally`."""
        request.took("store", began)
        self._metrics.store(operation, perf_counter() - began)
        if isinstance(sys.exception(), StoreUnavailable):
            self._metrics.store_error(operation)

    async def _described(self, name: str) -> dict[str, Any]:
        """A model as the registry and the store know it."""
        versions, aliases = await self._models.in_thread(_read_model, self._models.registry, name)
        champion = self._models.serving.get(name)
        try:
            items = await self._store.count(name)
        except StoreUnavailable:
            items = None
        return {
            "id": name,
            "object": "model",
            "created": int(champion.manifest.created.timestamp()) if champion else 0,
            "owned_by": "itemvec",
            "model": champion and champion.ref,
            "fingerprint": champion and champion.fingerprint,
            "versions": versions,
            "aliases": aliases,
            "items": items,
        }


def _read_model(registry: Registry, name: str) -> tuple[list[int], dict[str, int]]:
    if name not in (names := registry.names()):  # a name from a path may hold anything
        raise ModelNotFound(name, names)
    return registry.versions(name), registry.aliases(name)


def _of(version: ModelVersion, answer: dict[str, Any], status: int = 200) -> Answer:
    return Answer.json({**answer, "model": version.ref, "fingerprint": version.fingerprint}, status)


def _refused(item_id: str | None, error: ItemvecError, request: Request) -> dict[str, Any]:
    return {"id": item_id, "status": "refused", "problem": problem(error, request.id).body}


def _read_version(registry: Registry, ref: str) -> dict[str, Any]:
    """What there is to tell of a version, from its files: the network is not loaded for it."""
    name, number = registry.resolve(ref)
    manifest, folder = registry.manifest(name, number), registry.path(name, number)
    return {
        "model": f"{name}@{number}",
        "fingerprint": manifest.fingerprint,
        "manifest": manifest.model_dump(mode="json"),
        "item_schema": FeatureSchema.load(folder / "schema.yaml").json_schema(),
        "evaluation": orjson.loads((folder / "evaluation.json").read_bytes()),
    }
