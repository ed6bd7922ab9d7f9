"""Loads an item table into a running service: batches over a few connections, each item taken or refused by itself."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa

from itemvec.check import require_columns
from itemvec.client import Client
from itemvec.table import rows

TOLD = 20


@dataclass
class Loaded:
    created: int = 0
    updated: int = 0
    refused: int = 0
    reasons: list[tuple[str, str]] = field(default_factory=list)
    """(id, why) of the first refused items."""

    refused_ids: set[str] = field(default_factory=set)

    @property
    def total(self) -> int:
        return self.created + self.updated + self.refused


def load_items(
    client: Client,
    table: pa.Table,
    model: dict[str, Any],
    all_columns: bool = False,
    batch_size: int = 1024,
    connections: int = 2,
    progress: Callable[[int], None] = lambda _: None,
) -> Loaded:
    """`model` is what `GET /v1/models/{name}` answers. Raises SchemaMismatch for columns the table lacks.

    Two connections: while the service encodes one batch, the next is on its way.
    """
    schema = model["item_schema"]
    id_column = schema["x-itemvec-id"]
    require_columns(table, [id_column, *schema["properties"]])
    names = table.column_names if all_columns else [c for c in table.column_names if c in schema["properties"]]
    batches = rows(table, id_column, [c for c in names if c != id_column], batch_size)
    done = Loaded()

    def send(batch: tuple[list[str], list[dict[str, Any]]]) -> dict[str, Any]:
        items = [{**item, "id": item_id} for item_id, item in zip(*batch, strict=True)]
        return client.call("POST", "/v1/items", {"items": items, "model": model["id"]})

    with ThreadPoolExecutor(connections) as pool:
        while window := list(islice(batches, 2 * connections)):
            for answer in pool.map(send, window):
                _count(done, answer)
                progress(len(answer["items"]))
    return done


def _count(done: Loaded, answer: dict[str, Any]) -> None:
    done.created += answer["created"]
    done.updated += answer["updated"]
    done.refused += answer["refused"]
    for entry in answer["items"]:
        if entry["status"] == "refused":
            done.refused_ids.add(str(entry["id"]))
            if len(done.reasons) < TOLD:
                done.reasons.append((str(entry["id"]), entry["problem"]["detail"]))
