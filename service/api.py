"""The HTTP API: what each call does, and the table of all of them."""

import asyncio
from binascii import b2a_base64
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import cache, partial
from time import perf_counter
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from itemvec.errors import FieldError, InvalidItem, ItemNotFound, ItemvecError, StoreUnavailable
from itemvec.notes import Status
from itemvec.runs import Run
from itemvec.version import Encoding, ModelVersion
from service import arrow, columns, openapi, requests, schemas
from service.cache import CACHED_ITEMS
from service.config import ServiceConfig
from service.decode import decode
from service.edge import JSON, Answer, Edge, Keys, Operation, Request
from service.explorer import page as explorer_page
from service.items import ItemWriter, Upserted
from service.measured import Measured
from service.metrics import CONTENT_TYPE, Metrics
from service.models import INLINE_BYTES, LoadedModels
from service.problems import InvalidRequest, PathNotFound, problem
from service.promote import Fleet, Promotions
from service.queries import read_similar
from service.releases import Releases
from service.requests import Entry, Limits, RefusedEntry
from service.similar import Neighborhoods
from service.store import Store

Vectors = npt.NDArray[np.float32]
IN_QUERY: Final = "As in the JSON body, which counts first; an Arrow stream has no room for it"


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

    async def start() -> None:
        await models.start()
        promotions.start()

    async def stop() -> None:
        await promotions.stop()
        await models.stop()

    return Edge(
        api.operations(),
        Keys(config.read_keys()),
        metrics,
        max_in_flight=config.max_in_flight,
        max_body=config.max_body_bytes,
        start=start,
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
        self._models, self._store, self._metrics = models, store, metrics
        self._releases = Releases(models, store, promotions)
        self._writer = ItemWriter(models, store)
        self._metrics_text = metrics_text
        self._filled_once = False
        self._ready_items = config.ready_items
        self._limits = Limits(
            items=config.max_items,
            rows=config.max_rows,
            labels=config.max_labels,
            string=config.max_string,
            k=config.max_k,
            exclude=config.max_exclude,
            queries=config.max_queries,
            examples=config.max_examples,
            filter=config.max_filter,
        )
        self._measured = Measured(models, metrics)
        self._neighborhoods = Neighborhoods(models, store, self._measured, self._limits)
        self._with_keys = bool(config.read_keys())

    def operations(self) -> Sequence[Operation]:
        """Every call of the API. The documentation is made from this table too."""
        releases = self._releases
        of_model = {"model": "A model's name; the default model if left out"}
        read, write = (400, 401, 403, 404, 422, 429, 503), (400, 401, 403, 404, 408, 413, 415, 422, 429, 503)
        table = [
            Operation(
                "POST", "/v1/embeddings", self.embeddings, "Encode items", "embeddings", "read",
                takes=schemas.EmbeddingsRequest, gives={200: schemas.Embeddings}, refuses=write,
                query=dict.fromkeys(("model", "dimensions"), IN_QUERY),
                arrow=schemas.ARROW_EMBEDDINGS,
            ),
            Operation(
                "POST", "/v1/similar", self.similar, "Find similar items", "similar", "read",
                takes=schemas.SimilarRequest, gives={200: schemas.Similar | schemas.ManySimilar}, refuses=(*write, 409),
            ),
            Operation(
                "POST", "/v1/decode", self.decode, "Read columns back from an embedding", "embeddings", "read",
                takes=schemas.DecodeRequest, gives={200: schemas.Decoded}, refuses=write,
            ),
            Operation(
                "PUT", "/v1/items/{id}", self.put_item, "Create or replace an item", "items", "write",
                takes=schemas.ItemRequest, gives={200: schemas.UpsertedItem, 201: schemas.UpsertedItem},
                refuses=write, query=of_model,
            ),
            Operation(
                "POST", "/v1/items", self.put_items, "Create or replace many items", "items", "write",
                takes=schemas.BulkRequest, gives={200: schemas.BulkAnswer}, refuses=write,
                query={"model": IN_QUERY}, arrow=schemas.ARROW_ITEMS,
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
                "GET", "/v1/models", releases.list_models, "The models", "models", "read",
                gives={200: schemas.Models}, refuses=(401, 403, 422, 429, 503),
            ),
            Operation(
                "GET", "/v1/models/{name}", releases.get_model, "One model", "models", "read",
                gives={200: schemas.ModelDetail}, refuses=read,
            ),
            Operation(
                "GET", "/v1/models/{name}/versions/{version}", releases.get_version, "One version of a model", "models",
                "read", gives={200: schemas.VersionDetail}, refuses=read,
            ),
            Operation(
                "PUT", "/v1/models/{name}/aliases/champion", releases.promote, "Promote or roll back", "models",
                "admin", takes=schemas.AliasRequest, gives={202: schemas.JobStarted}, refuses=(*write, 409),
            ),
            Operation(
                "POST", "/v1/models/{name}/backfill", releases.backfill, "Make a version searchable", "models", "admin",
                takes=schemas.BackfillRequest, gives={202: schemas.JobStarted}, refuses=(*write, 409),
            ),
            Operation(
                "GET", "/v1/jobs/{id}", releases.get_job, "A job and its progress", "models", "read",
                gives={200: schemas.Job}, refuses=read,
            ),
            Operation(
                "GET", "/v1/runs", releases.list_runs, "The last retrainings", "models", "read",
                gives={200: schemas.RunList}, refuses=(401, 403, 404, 422, 429, 503),
                query={"model": "Of this model only"},
            ),
            Operation(
                "GET", "/v1/runs/{id}", releases.get_run, "One retraining", "models", "read",
                gives={200: Run}, refuses=read,
            ),
            Operation("GET", "/healthz", self.healthz, "Is the process alive", "service", gives={200: schemas.Health}),
            Operation(
                "GET", "/readyz", self.readyz, "Can it answer", "service",
                gives={200: schemas.Readiness, 503: schemas.Readiness},
            ),
            Operation(
                "GET", "/metrics", self.get_metrics, "Metrics for Prometheus", "service", "read",
                gives={200: "text/plain"}, refuses=(401, 403, 422, 429, 503),
            ),
        ]  # fmt: skip
        described = cache(lambda: openapi.document(table, self._with_keys))  # 90 ms, for the few who ask

        async def openapi_json(_: Request) -> Answer:
            return Answer(described())

        async def docs(_: Request) -> Answer:
            return Answer(openapi.PAGE, content_type=b"text/html; charset=utf-8")

        async def explorer(_: Request) -> Answer:
            content, policy = explorer_page()
            headers = [(b"content-security-policy", policy), (b"x-content-type-options", b"nosniff")]
            return Answer(content, content_type=b"text/html; charset=utf-8", headers=headers)

        async def docs_asset(request: Request) -> Answer:
            name = request.params[0].decode("latin-1")
            if name not in openapi.ASSETS:
                raise PathNotFound(request.path)
            content, media_type = openapi.asset(name)
            return Answer(content, content_type=media_type, headers=[(b"cache-control", b"max-age=86400")])

        return [
            *table,
            Operation("GET", "/", explorer, "", "service"),
            Operation("GET", "/openapi.json", openapi_json, "", "service"),
            Operation("GET", "/docs", docs, "", "service"),
            Operation("GET", "/docs/{file}", docs_asset, "", "service"),
        ]

    # Embeddings and neighbors

    async def embeddings(self, request: Request) -> Answer:
        """Encodes items with a model's champion or with the version that is named. Nothing is stored."""
        body = await request.body(JSON, arrow.STREAM)
        ref, size = requests.read_embeddings_query(request.query)
        if request.media_type == arrow.STREAM:
            version = await self._models.get(ref)
            _check_size(size, version)
            read = partial(arrow.read_items, body, version.schema, self._limits, "/input")
            write = partial(self._encoded, request, version, size, False)
            return await self._measured.encode_table(request, version, len(body), read, write, "/input")
        if len(body) > INLINE_BYTES and (answer := await self._embed_columns(request, body, ref, size)) is not None:
            return answer
        wanted = await self._models.aside(len(body), requests.read_embeddings, body, self._limits)
        version, size = await self._models.get(wanted.model or ref), wanted.dimensions or size
        _check_size(size, version)
        encoding = await self._measured.encode(request, version, wanted.items, "/input")
        given = request, version, size, wanted.base64, None, encoding
        return await self._models.aside(encoding.vectors.nbytes, self._encoded, *given)

    async def _embed_columns(self, request: Request, body: bytes, ref: str | None, size: int | None) -> Answer | None:
        """The answer to a body of many items that are all as the schema says; None if they have to be read one by one,
        which gives the same answer, or says what is wrong."""
        named = columns.model_named(body) or ref
        try:
            version = self._models.held(named)
        except InvalidRequest:  # of several models none is named
            return None
        if version is None:
            return None

        def read() -> tuple[columns.EmbeddingsColumns, pa.Table]:
            wanted = columns.read_embeddings(body, version.schema, self._limits)
            if (wanted.model or ref) != named or len(wanted.table) <= CACHED_ITEMS:  # so few may be known already
                raise columns.NotColumns
            _check_size(wanted.dimensions or size, version)
            return wanted, wanted.table

        def write(wanted: columns.EmbeddingsColumns, encoding: Encoding) -> Answer:
            return self._encoded(request, version, wanted.dimensions or size, wanted.base64, None, encoding)

        try:
            return await self._measured.encode_table(request, version, len(body), read, write, "/input")
        except (columns.NotColumns, InvalidItem):
            return None

    def _encoded(
        self,
        request: Request,
        version: ModelVersion,
        size: int | None,
        base64: bool,
        ids: pa.ChunkedArray | None,
        encoding: Encoding,
    ) -> Answer:
        """`ids` are those of an Arrow stream; `size` the numbers of a vector that are wanted."""
        vectors = encoding.vectors if size is None else _shortened(encoding.vectors, size)
        said: dict[str, Any] = {"model": version.ref, "fingerprint": version.fingerprint}
        if not self._store.available:
            said["degraded"] = True
        if request.wants(arrow.STREAM):
            metadata = {name: str(value).lower() if value is True else value for name, value in said.items()}
            return Answer(arrow.embeddings(ids, vectors, encoding.statuses, metadata), content_type=arrow.STREAM)
        return _embeddings(vectors, encoding.statuses, base64, said)

    async def similar(self, request: Request) -> Answer:
        """The stored items nearest to what each query looks for, by cosine.

        A query looks for a stored item (`id`), an item in the request, a vector, or for what is near to all `positive`
        examples and far from the `negative` ones: the mean of the positive vectors minus half the mean of the negative.
        `override` and `ignore` change the item's columns first ("the same, but a comedy"). `explain` adds to each
        neighbor what each column contributed: its score minus the score of the query without that column; these do not
        add up to the score, and cost one encoding a column. Of several `queries` each is answered or refused by itself.
        """
        wanted = read_similar(await request.body(), self._limits)
        version = await self._models.get(wanted.model)
        request.model = version.ref
        _check_made(wanted.fingerprint, version)
        answers = await self._neighborhoods.find(request, version, wanted.queries)
        if not wanted.many:
            [only] = answers
            if isinstance(only, ItemvecError):
                raise only
            return _of(version, only)
        results = [
            {"problem": problem(answer, request.id).body} if isinstance(answer, ItemvecError) else answer
            for answer in answers
        ]
        return _of(version, {"results": results})

    async def decode(self, request: Request) -> Answer:
        """The most likely value of each column for an embedding of this version, with its probability."""
        wanted = requests.read_decode(await request.body(), self._limits)
        version = await self._models.get(wanted.model)
        request.model = version.ref
        _check_made(wanted.fingerprint, version)
        errors = [
            FieldError(at, f"has {len(vector)} numbers, {version.ref} has {version.dim}")
            for at, vector in zip(wanted.pointers, wanted.vectors, strict=True)
            if len(vector) != version.dim
        ]
        if errors:
            raise InvalidRequest(errors)
        columns = await self._measured.compute(
            request, len(wanted.vectors), lambda: decode(version, np.stack(wanted.vectors), wanted.top)
        )
        return _of(version, {"data": [{"index": i, "columns": read} for i, read in enumerate(columns)]})

    # Items

    async def put_item(self, request: Request) -> Answer:
        """Encodes and stores an item; it is searchable when this answers. The body is the object of its columns."""
        item_id = requests.read_path_id(request.params[0])
        entry = requests.read_item(await request.body(), item_id, self._limits)
        version = self._champion(request)
        stored = await self._upsert(request, version, [entry])
        if stored.errors:
            raise InvalidItem(requests.moved(stored.errors[0], "/0", ""))
        [is_new], [columns] = stored.created, stored.statuses[:]
        answer = {"id": item_id, "status": "created" if is_new else "updated", "columns": columns}
        return _of(version, answer, 201 if is_new else 200)

    async def put_items(self, request: Request) -> Answer:
        """Encodes and stores items; each is taken or refused by itself, and the good ones are kept."""
        body, encoding = await request.body(JSON, arrow.STREAM), None
        if request.media_type == arrow.STREAM:
            version = self._champion(request)
            entries, table, vectors = await self._models.aside(len(body), self._read_stream, body, version)
            if vectors is not None:
                encoding = Encoding(vectors, [{}] * len(vectors))
            elif all(isinstance(entry, Entry) for entry in entries):
                encoding = await self._encode_columns(request, version, table)
        else:
            wanted = await self._models.aside(len(body), requests.read_bulk, body, self._limits)
            version, entries = self._champion(request, wanted.model), wanted.entries
        good = [entry for entry in entries if isinstance(entry, Entry)]
        stored = await self._upsert(request, version, good, encoding) if good else Upserted([], [], {})
        answers, statuses = _outcomes(entries, stored, request)
        if request.wants(arrow.STREAM):
            metadata = {"model": version.ref, "fingerprint": version.fingerprint}
            return Answer(arrow.outcomes(answers, statuses, metadata), content_type=arrow.STREAM)
        for answer, marks in zip(answers, statuses[:], strict=True):
            if "problem" not in answer:
                answer["columns"] = marks
        counts = Counter(answer["status"] for answer in answers)
        totals = {status: counts[status] for status in ("created", "updated", "refused")}
        return _of(version, {"items": answers, **totals})

    async def get_item(self, request: Request) -> Answer:
        """The columns of an item as they were sent, and the vector that the champion gave it."""
        item_id = requests.read_path_id(request.params[0])
        version = self._champion(request)
        with self._measured.stored(request, "get"):
            item, [vector] = await asyncio.gather(
                self._store.get(version.name, item_id),
                self._store.get_vectors(version.name, version.fingerprint, [item_id]),
            )
        return _of(version, {"id": item_id, "item": orjson.Fragment(item.raw), "embedding": vector})

    async def delete_item(self, request: Request) -> Answer:
        """Removes an item and its vectors; it is no longer found when this answers."""
        item_id = requests.read_path_id(request.params[0])
        version = self._champion(request)
        with self._measured.stored(request, "delete"):
            [existed] = await self._store.delete(version.name, [item_id])
        if not existed:
            raise ItemNotFound(item_id, version.name)
        said = [(b"x-model", version.ref.encode()), (b"x-fingerprint", version.fingerprint.encode())]
        return Answer(b"", 204, headers=said)  # which has no body to say it in

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
        errors: list[FieldError] = []
        ref = ref or requests.read_model(request.query, errors)
        if errors:
            raise InvalidRequest(errors)
        name, at, which = ref.partition("@") if ref is not None else (None, "", "")
        if at and which != "champion":
            raise InvalidRequest.at("/model", f"items are kept for all versions of a model: say {name!r}, not {ref!r}")
        version = self._models.champion(name)
        request.model = version.ref
        return version

    def _read_stream(
        self, body: bytes, version: ModelVersion
    ) -> tuple[list[Entry | RefusedEntry], pa.Table, Vectors | None]:
        """Its items, their columns, and the vectors of those that are taken, if they are ready."""
        table = arrow.read_table(body, version.schema, self._limits, "/items")
        vectors, table = arrow.ready_vectors(table, version.schema, version.fingerprint, version.dim)
        ids, table = arrow.without_ids(table, version.schema)
        if ids is None:
            raise InvalidRequest.at("/items/id", f"is missing: send a column id, or {version.schema.id!r}")
        entries = requests.read_entries(arrow.items_of(table), ids.to_pylist(), self._limits, len(body))
        if vectors is not None:
            vectors = vectors[[isinstance(entry, Entry) for entry in entries]]
        return entries, table, vectors

    async def _encode_columns(self, request: Request, version: ModelVersion, table: pa.Table) -> Encoding | None:
        """None where a value has a wrong type: item by item it is found out which are good."""
        began = perf_counter()
        try:
            return (await self._measured.here(request, len(table), self._models.encode_table(version, table)))[0]
        except InvalidItem:
            return None
        finally:
            request.took("encode", began)

    async def _upsert(
        self, request: Request, version: ModelVersion, entries: Sequence[Entry], encoding: Encoding | None = None
    ) -> Upserted:
        def took(part: str, since: float) -> None:
            if part == "store":
                self._measured.took(request, "put", since)
            else:
                request.took(part, since)

        ids, items, raws = zip(*entries, strict=True)
        while_here = partial(self._measured.here, request, len(items))
        stored = await self._writer.upsert(version, ids, items, raws, took, while_here, encoding)
        self._metrics.columns(version.ref, stored.statuses)
        return stored


def _embeddings(
    vectors: Vectors, statuses: Sequence[Mapping[str, Status]], base64: bool, said: Mapping[str, Any]
) -> Answer:
    rows: Sequence[Vectors] | Sequence[str] = list(vectors)
    if base64:
        packed, width = vectors.astype("<f4", copy=False).tobytes(), 4 * vectors.shape[1]
        rows = [b2a_base64(packed[at : at + width], newline=False).decode() for at in range(0, len(packed), width)]
    count = len(rows)
    answer: dict[str, Any] = {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": rows[i], "columns": columns}
            for i, columns in enumerate(statuses)
        ],
        **said,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }
    return Answer.json(answer)


def _check_size(size: int | None, version: ModelVersion) -> None:
    if size is not None and size > version.dim:
        raise InvalidRequest.at("/dimensions", f"is {size}; {version.ref} has {version.dim}")


def _check_made(fingerprint: str | None, version: ModelVersion) -> None:
    """By this version, says the request of its vectors; nothing, if it does not say."""
    if fingerprint is not None and fingerprint != version.fingerprint:
        detail = f"is {fingerprint!r}; {version.ref} has {version.fingerprint!r}, and its vectors cannot be compared"
        raise InvalidRequest.at("/fingerprint", f"{detail}: name the version in `model`, or encode the items again")


def _shortened(vectors: Vectors, size: int) -> Vectors:
    """The first `size` numbers of each, brought to length 1."""
    if size == vectors.shape[1]:
        return vectors
    kept = vectors[:, :size]
    lengths = np.linalg.norm(kept, axis=1, keepdims=True)
    shortened: Vectors = kept / np.maximum(lengths, np.finfo(np.float32).tiny)
    return shortened


def _of(version: ModelVersion, answer: dict[str, Any], status: int = 200) -> Answer:
    return Answer.json({**answer, "model": version.ref, "fingerprint": version.fingerprint}, status)


def _outcomes(
    entries: Sequence[Entry | RefusedEntry], stored: Upserted, request: Request
) -> tuple[list[dict[str, Any]], Sequence[dict[str, Status]]]:
    """Of each entry what became of it, and its columns that were not plain. `stored` is of those that could be read."""
    refused: dict[int, ItemvecError] = {}
    row = 0
    for i, entry in enumerate(entries):
        if isinstance(entry, RefusedEntry):
            refused[i] = InvalidRequest(entry.errors)
            continue
        if (errors := stored.errors.get(row)) is not None:
            # Its place among those becomes its place in the request.
            moved = (FieldError(f"/items/{i}/" + e.pointer.split("/", 2)[2], e.detail) for e in errors)
            refused[i] = InvalidItem(moved)
        row += 1
    created = iter(stored.created)
    answers = [
        _refused(entry.id, refused[i], request)
        if i in refused
        else {"id": entry.id, "status": "created" if next(created) else "updated"}
        for i, entry in enumerate(entries)
    ]
    if not refused:
        return answers, stored.statuses
    marks = iter(stored.statuses[:])
    return answers, [{} if i in refused else next(marks) for i in range(len(entries))]


def _refused(item_id: str | None, error: ItemvecError, request: Request) -> dict[str, Any]:
    return {"id": item_id, "status": "refused", "problem": problem(error, request.id).body}
