"""Neighbors by id over HTTP, against the bare FT.SEARCH, in catalogues of any size.

A catalogue is films, each many times with a little noise, in an index of the form that the service chooses for so many.
Each item has one of a hundred labels that has nothing to do with its vector, so that a filter leaves a hundredth.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import orjson
import redis
from numpy.typing import NDArray

from benchmarks._load import Caller, Target
from itemvec.version import ModelVersion
from service import attributes
from service.conditions import Eq, resolve
from service.index import Index, WantedMode, search_command
from service.keys import Space
from service.store import Encoded, Store

K: Final = 10
LABELS: Final = 100
COLUMN: Final = "age_rating"
"""The column of the films that holds the label."""

NOISE: Final = 0.05
"""In each of 64 directions: a copy has a cosine of .93 to its film."""

BATCH: Final = 4096
WARM_UP: Final = 100
JUDGED: Final = 500
"""Answers that are held against comparing every vector."""

PATH: Final = "/v1/similar"
Vectors = NDArray[np.float32]
Row = dict[str, Any]


@dataclass(frozen=True)
class Catalogue:
    """Items `item 0`, `item 1`, ... in Redis at `url`."""

    url: str
    version: ModelVersion
    matrix: Vectors
    """(items, dim)"""

    index: Index
    seconds: float
    """That it took to fill."""

    @classmethod
    def filled(cls, url: str, version: ModelVersion, films: Vectors, items: int, mode: WantedMode) -> "Catalogue":
        dice = np.random.default_rng(0)
        matrix = films[dice.integers(len(films), size=items)]
        matrix += np.float32(NOISE) * dice.standard_normal(matrix.shape, np.float32)
        matrix /= np.linalg.norm(matrix, axis=1, keepdims=True)
        with redis.Redis.from_url(url) as client:
            client.config_set("auto-aof-rewrite-percentage", 0)  # it would take a core from what is measured
        began = time.perf_counter()
        index = asyncio.run(_fill(url, version, matrix, mode))
        return cls(url, version, matrix, index, time.perf_counter() - began)

    def bytes_an_item(self) -> float:
        """Of Redis, items and index together."""
        with redis.Redis.from_url(self.url) as client:
            return float(client.info("memory")["used_memory"]) / len(self.matrix)

    def body(self, item: int, filtered: bool) -> bytes:
        query: Row = {"id": f"item {item}", "k": K}
        return orjson.dumps(query | {"filter": {"eq": {COLUMN: label_for(item)}}} if filtered else query)

    def command(self, item: int, filtered: bool) -> list[object]:
        """The bare FT.SEARCH of the same neighbors, the vector being known."""
        test = resolve(Eq(COLUMN, label_for(item)), self.version.schema) if filtered else None
        space, vector = Space(self.version.name), self.matrix[item].tobytes()
        return search_command(space, self.version.fingerprint, self.index, vector, K + 1, test, 10_000)

    def nearest(self, item: int, filtered: bool) -> set[str]:
        """By comparing every vector."""
        first = int(label_for(item)) if filtered else 0
        rows = np.arange(first, len(self.matrix), LABELS if filtered else 1)
        scores = self.matrix[first :: LABELS if filtered else 1] @ self.matrix[item]
        scores[rows == item] = -np.inf
        return {f"item {row}" for row in rows[np.argpartition(-scores, K)[:K]]}


def label_for(item: int) -> str:
    """What the neighbors of this item are narrowed to: not the label of its own, number modulo a hundred."""
    return str((item + LABELS // 2) % LABELS)


def asked(catalogue: Catalogue, count: int) -> list[int]:
    found: list[int] = np.random.default_rng(1).integers(len(catalogue.matrix), size=count).tolist()
    return found


def compare(catalogue: Catalogue, target: Target, count: int, filtered: bool) -> Row:
    """Microseconds of so many queries, by one caller; HTTP and bare take turns where Redis searches. `added`: the
    difference of the two at that percentile."""
    times: dict[str, list[float]] = {"HTTP": [], "FT.SEARCH": []}
    near: dict[int, set[str]] = {}
    refused = 0
    with redis.Redis.from_url(catalogue.url, protocol=3) as bare, Caller(target) as caller:
        ways: dict[str, Callable[[int], Any]] = {
            "HTTP": lambda item: caller.post(catalogue.body(item, filtered)),
            "FT.SEARCH": lambda item: bare.execute_command(*catalogue.command(item, filtered)),
        }
        order = ["HTTP"] if catalogue.index.mode == "exact" else list(ways)
        for turn, item in enumerate(asked(catalogue, count + WARM_UP)):
            order.reverse()  # the second one finds what it needs in the processor's caches
            for who in order:
                began = time.perf_counter()
                answer = ways[who](item)
                took = (time.perf_counter() - began) * 1e6
                if turn >= WARM_UP:
                    times[who].append(took)
                    if answer is None:  # the store took longer than its timeout
                        refused += 1
                    elif who == "HTTP" and len(near) < JUDGED:
                        near[item] = {neighbor["id"] for neighbor in orjson.loads(answer)["neighbors"]}
    hits = sum(len(found & catalogue.nearest(item, filtered)) for item, found in near.items())
    row: Row = {"refused": refused, "recall@10": hits / max(1, K * len(near))}
    for p in (50, 99):
        at = {who: float(np.percentile(taken, p)) for who, taken in times.items() if taken}
        row |= {f"{who} p{p} us": value for who, value in at.items()}
        if "FT.SEARCH" in at:
            row[f"added p{p} us"] = at["HTTP"] - at["FT.SEARCH"]
    return row


async def _fill(url: str, version: ModelVersion, matrix: Vectors, mode: WantedMode) -> Index:
    columns, items = attributes.filterable(version.schema), len(matrix)
    labels = [{COLUMN: str(label)} for label in range(LABELS)]
    raws, fields = [orjson.dumps(item) for item in labels], attributes.fields(columns, labels)
    name, fingerprint = version.name, version.fingerprint
    async with Store(url, bulk_timeout=60.0) as store:
        indexed = attributes.index_fields(version.schema)
        await store.indexes.ensure(name, fingerprint, version.dim, items, mode, indexed)
        await store.mark_live(name, fingerprint, version.ref)
        for start in range(0, items, BATCH):
            some = range(start, min(start + BATCH, items))
            encoded = Encoded(matrix[start : start + BATCH], attributes=[fields[i % LABELS] for i in some])
            ids, kept = [f"item {i}" for i in some], [raws[i % LABELS] for i in some]
            await store.put(name, ids, kept, {fingerprint: encoded})
        await store.mark_ready(name, fingerprint)
        return await store.indexes.get(name, fingerprint)
