"""A service of one process for the tests: the real application, a real registry of tiny models, the real Redis."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import orjson
import pyarrow as pa
import torch

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.features import FeatureTransform
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.version import Lineage, ModelVersion
from service.api import build_app
from service.config import ServiceConfig
from service.edge import Edge
from service.metrics import Metrics
from service.models import LoadedModels
from service.store import Store

MAKERS, TAGS = ["Ada", "Bell", "Curie", "Darwin"], ["wood", "metal", "puzzle", "car", "animal", "game", "red", "blue"]
TOYS: list[dict[str, Any]] = [
    {
        "sku": f"toy {i}",
        "name": f"{TAGS[i % 8]} {MAKERS[i % 4]}",
        "maker": MAKERS[i % 4],
        "tags": [TAGS[i % 8], TAGS[(3 * i + 1) % 8]],
        "price": 5.0 + i,
        "age": ["3+", "6+", "12+"][i % 3],
        "added": f"20{10 + i % 10}-0{1 + i % 9}-15",
    }
    for i in range(40)
]
ITEMS = {toy["sku"]: {column: value for column, value in toy.items() if column != "sku"} for toy in TOYS}
TOY = ITEMS["toy 3"]
SCHEMA = """
name: toys
id: sku
features:
  name: {kind: text}
  maker: {kind: nominal, filterable: true}
  tags: {kind: multi, filterable: true}
  price: {kind: %s, filterable: true}
  age: {kind: ordinal, order: ["3+", "6+", "12+"], filterable: true}
  added: {kind: timestamp, filterable: true}
"""
DIM = 8
PATIENCE = 5.0
"""Seconds that a store waits for Redis where how soon it gives up is not the point: on a busy machine Redis too may
wait for a core, and for longer than the 0.12 s that a service gives it."""

JSON = {"Content-Type": "application/json"}


def publish(
    registry: Registry,
    seed: int,
    alias: str | None = None,
    price: str = "numeric",
    name: str = "toys",
    named: str = "name: {kind: text}",
) -> int:
    """An untrained version, weights by `seed`: equal items still get equal vectors, which is all that serving needs.

    `price`: another kind than numeric makes a version that refuses what the others take. `named`: the column `name`.
    """
    table = pa.Table.from_pylist(TOYS)
    if price == "nominal":
        table = table.set_column(table.column_names.index("price"), "price", table["price"].cast(pa.string()))
    schema = SCHEMA.replace("name: {kind: text}", named) % ("nominal, min_count: 1" if price == "nominal" else price)
    transform = FeatureTransform.fit(table, FeatureSchema.from_yaml(schema))
    torch.manual_seed(seed)
    config = EncoderConfig(dim=DIM, embedding_dim=8, hidden=(16,))
    encoder, decoder = ItemEncoder(config, transform.layout), Decoder(config, transform.layout)
    lineage = Lineage(table="toys.parquet", table_sha256="0" * 64, table_rows=40, train_rows=40, config={"seed": seed})
    golden = [] if price == "nominal" else list(ITEMS.items())[:4]

    def write(folder: Path, version: int) -> None:
        made = ModelVersion.make(name, version, transform, encoder, decoder, {"recall@10": 0.5}, lineage)
        made.save(folder, golden)

    return registry.publish(name, write, alias)


@dataclass
class Running:
    """A running service and what a test may look into."""

    client: httpx.AsyncClient
    app: Edge
    models: LoadedModels
    store: Store
    registry: Registry
    metrics: Metrics

    async def load(self) -> None:
        """Stores all toys."""
        items = [{"id": sku, **item} for sku, item in ITEMS.items()]
        answer = await self.client.post("/v1/items", json={"items": items})
        assert answer.json()["created"] == len(ITEMS), answer.text

    async def promote(self, version: int | str, name: str = "toys") -> dict[str, Any]:
        """Starts a promotion and waits for its end."""
        answer = await self.client.put(f"/v1/models/{name}/aliases/champion", json={"version": version})
        assert answer.status_code == 202, answer.text
        return await self.finished(answer.json()["job"]["id"])

    async def finished(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = {}

        async def ended() -> bool:
            nonlocal job
            job = (await self.client.get(f"/v1/jobs/{job_id}")).json()
            return job["state"] != "running"

        await eventually(ended)
        return job


async def eventually(is_so: Callable[[], Awaitable[bool]], seconds: float = 20.0) -> None:
    async with asyncio.timeout(seconds):
        while not await is_so():  # noqa: ASYNC110 - what it waits for is in Redis or in a file
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(registry: Path, redis_url: str, searchable: bool = True, **settings: Any) -> AsyncIterator[Running]:
    """A service over the registry folder, `searchable` when this returns."""
    config = ServiceConfig.read(
        registry=str(registry),
        redis_url=redis_url,
        **{"registry_poll_seconds": 0.05, "store_timeout": PATIENCE, "encode_threads": 1, **settings},
    )
    metrics, known = Metrics(), Registry(registry)
    store = Store(redis_url, timeout=config.store_timeout, index=config.index, changed=metrics.degraded)
    models = LoadedModels(known, store, config, metrics)
    app = build_app(models, store, metrics, config)
    await models.start()
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://toys.test", timeout=60) as client:
            if searchable:
                name = config.model or "toys"

                async def ready() -> bool:  # and the job over that made it so: a test may start its own
                    made = models.champion(name).fingerprint in await store.ready(name)
                    return made and await store.leases.holder(name) is None

                await eventually(ready)
            yield Running(client, app, models, store, known, metrics)
    finally:
        await app.stop()
        await store.close()


def copied(registry: Path, to: Path) -> Path:
    shutil.copytree(registry, to)
    return to


async def post(service: Running, path: str, body: bytes | dict[str, Any] | list[Any] | str | int | None) -> Any:
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return await service.client.post(path, content=content, headers=JSON)


def assert_problem(answer: Any, status: int, pointer: str | None = None) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == status
    assert body["title"]
    assert body["detail"]
    assert body["request_id"] == answer.headers["x-request-id"]
    if pointer is not None:
        assert pointer in [error["pointer"] for error in body["errors"]], body
    return body
