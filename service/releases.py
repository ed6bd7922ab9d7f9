"""The calls about what is released: models, their versions and evaluations, the switches between them, retrainings."""

import contextlib
from typing import Any

import orjson

from itemvec.errors import ModelNotFound, StoreUnavailable
from itemvec.registry import Registry
from itemvec.runs import Runs
from itemvec.schema import FeatureSchema
from itemvec.version import ModelVersion
from service import requests
from service.attributes import filterable
from service.edge import Answer, Request
from service.models import LoadedModels
from service.promote import Job, Promotions
from service.store import Store


class Releases:
    def __init__(self, models: LoadedModels, store: Store, promotions: Promotions) -> None:
        self._models, self._store, self._promotions = models, store, promotions

    async def list_models(self, _: Request) -> Answer:
        """The models of the registry: their versions, their aliases, and what is served."""
        names = await self._models.in_thread(self._models.registry.names)
        data = [await self._described(name, self._models.serving.get(name)) for name in names]
        return Answer.json({"object": "list", "data": data})

    async def get_model(self, request: Request) -> Answer:
        """A model with the schema and the evaluation of the version that is served."""
        name = requests.read_path_segment(request.params[0])
        champion = self._models.serving.get(name)
        described = await self._described(name, champion)
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
        return _started(await self._promotions.promote(name, requests.read_version(await request.body())))

    async def backfill(self, request: Request) -> Answer:
        """Encodes the stored items with a version beside the served one: a job. It can be searched by its name then.

        Good for comparing a challenger before it serves, and a promotion of it has nothing left to do. From then on
        writes cost an encoding more, until a promotion drops what is neither champion, previous nor challenger.
        """
        name = requests.read_path_segment(request.params[0])
        return _started(await self._promotions.backfill(name, requests.read_version(await request.body())))

    async def get_job(self, request: Request) -> Answer:
        """How far a job is. It is kept for a day."""
        job = await self._promotions.job(requests.read_path_segment(request.params[0]))
        return Answer.json(job.shown())

    async def list_runs(self, request: Request) -> Answer:
        """What the last 50 retrainings came to, the newest first, with their steps and what the gate measured."""
        name = request.query.get("model")
        return Answer.json({"object": "list", "data": await self._models.in_thread(self._read_runs, name)})

    async def get_run(self, request: Request) -> Answer:
        """How far a retraining is, or what it came to and why."""
        run_id = requests.read_path_segment(request.params[0])
        run = await self._models.in_thread(Runs(self._models.registry).get, run_id)
        return Answer.json(run.model_dump(mode="json"))

    # Helpers

    def _read_runs(self, name: str | None) -> list[dict[str, Any]]:
        registry, runs = self._models.registry, Runs(self._models.registry)
        if name is not None:
            _read_model(registry, name)
        found = runs.newest() if name is None else runs.of(name, 50)
        return [run.model_dump(mode="json") for run in found]

    async def _described(self, name: str, champion: ModelVersion | None) -> dict[str, Any]:
        """A model as the registry and the store know it, of which `champion` is served."""
        versions, aliases = await self._models.in_thread(_read_model, self._models.registry, name)
        items = index = None
        with contextlib.suppress(StoreUnavailable):
            items = await self._store.count(name)
            if champion is not None:
                index = (await self._store.indexes.status(name, champion.fingerprint)).mode
        return {
            "id": name,
            "object": "model",
            "created": int(champion.manifest.created.timestamp()) if champion else 0,
            "owned_by": "itemvec",
            "model": champion and champion.ref,
            "fingerprint": champion and champion.fingerprint,
            "dimensions": champion and [*champion.encoder.config.nested, champion.dim],
            "filterable": champion and list(filterable(champion.schema)),
            "versions": versions,
            "aliases": aliases,
            "items": items,
            "index": index,
        }


def _read_model(registry: Registry, name: str) -> tuple[list[int], dict[str, int]]:
    if name not in (names := registry.names()):  # a name from a path may hold anything
        raise ModelNotFound(name, names)
    return registry.versions(name), registry.aliases(name)


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


def _started(job: Job) -> Answer:
    answer = Answer.json({"job": job.shown()}, 202)
    answer.headers.append((b"location", f"/v1/jobs/{job.id}".encode()))
    return answer
