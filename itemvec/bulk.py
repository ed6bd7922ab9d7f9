"""Loads an item table into a running service: batches over a few connections, each item taken or refused by itself."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from itemvec.check import require_columns
from itemvec.client import TOO_LARGE, Client, ServiceProblem, rows_at_once
from itemvec.errors import ConfigError
from itemvec.table import require_ids, rows

TOLD = 20
STREAM_REFUSED = {400, 422}


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
    vectors: pa.Table | None = None,
) -> Loaded:
    """`model` is what `GET /v1/models/{name}` answers; `vectors` are those that `itemvec embed-table` made of the table
    with the served version, so that the service need not encode it.

    Raises SchemaMismatch for columns the table lacks, ConfigError for vectors of another version or other items. Items
    travel as columns (Arrow), `batch_size` in a request, and fewer where they are large. Two connections: while the
    service encodes one batch, the next is on its way.
    """
    schema = model["item_schema"]
    id_column = schema["x-itemvec-id"]
    require_columns(table, [id_column, *schema["properties"]])
    require_ids(table, id_column)
    names = table.column_names if all_columns else [c for c in table.column_names if c in schema["properties"]]
    names = [name for name in names if name != id_column]
    parts = table.select(names).append_column(id_column, table.column(id_column).cast(pa.string()))
    if vectors is not None:
        parts = _joined(parts, id_column, vectors, model)
    sending = _Sending(client, model["id"], table, parts, id_column, names)
    done, at_once = Loaded(), rows_at_once(parts, batch_size)
    places = ((start, min(at_once, len(table) - start)) for start in range(0, len(table), at_once))
    with ThreadPoolExecutor(connections) as pool:
        while window := list(islice(places, 2 * connections)):
            for answer in chain.from_iterable(pool.map(sending.send, *zip(*window, strict=True))):
                _count(done, answer)
                progress(len(answer["items"]))
    return done


@dataclass(frozen=True, slots=True)
class _Sending:
    """Sends rows of a table, and tells what became of each."""

    client: Client
    model: str
    table: pa.Table
    parts: pa.Table
    """The same rows as they are sent: `id_column` is text, and maybe there are vectors."""

    id_column: str
    names: list[str]
    """Of its other columns."""

    def send(self, start: int, count: int) -> list[dict[str, Any]]:
        """The answers of the requests that so many rows took: several where one would be too large."""
        try:
            return [self._put(start, count)]
        except ServiceProblem as problem:
            if problem.status != TOO_LARGE:
                raise
            if count == 1:
                item_id = self.parts.column(self.id_column)[start].as_py()
                refused = {"id": item_id, "status": "refused", "problem": problem.problem}
                return [{"created": 0, "updated": 0, "refused": 1, "items": [refused]}]
        half = count // 2
        return [*self.send(start, half), *self.send(start + half, count - half)]

    def _put(self, start: int, count: int) -> dict[str, Any]:
        try:
            return self.client.put(self.parts.slice(start, count), self.model)
        except ServiceProblem as problem:
            # A stream is refused whole for one value beyond a limit; as JSON each item is refused by itself.
            if problem.status not in STREAM_REFUSED:
                raise
        [batch] = rows(self.table.slice(start, count).combine_chunks(), self.id_column, self.names, count)
        items = [{**item, "id": item_id} for item_id, item in zip(*batch, strict=True)]
        return self.client.call("POST", "/v1/items", {"items": items, "model": self.model})


def _joined(parts: pa.Table, id_column: str, vectors: pa.Table, model: dict[str, Any]) -> pa.Table:
    """With each item's vector, and in the metadata the fingerprint of what made them."""
    metadata = vectors.schema.metadata or {}
    if not {"id", "embedding"} <= set(vectors.column_names) or b"fingerprint" not in metadata:
        raise ConfigError("the vectors are not from `itemvec embed-table`: no id, no embedding, or no fingerprint")
    if "embedding" in parts.column_names:
        raise ConfigError("the table has a column 'embedding' of its own, which is loaded: leave the vectors out")
    made, by = metadata[b"fingerprint"].decode(), metadata.get(b"model", b"another model").decode()
    if made != model["fingerprint"]:
        raise ConfigError(
            f"the vectors are of {by} (fingerprint {made}), and {model['model']} (fingerprint {model['fingerprint']}) "
            "is served: embed the table with that one"
        )
    ids = parts.column(id_column).combine_chunks()
    places = pc.index_in(ids, value_set=vectors.column("id").cast(pa.string()).combine_chunks())
    if places.null_count:
        which = ids.filter(pc.is_null(places))[0].as_py()
        raise ConfigError(f"{places.null_count} items have no vector, such as {which!r}: embed this very table")
    found = vectors.column("embedding").combine_chunks().take(places)
    return parts.append_column("embedding", found).replace_schema_metadata({"fingerprint": made})


def _count(done: Loaded, answer: dict[str, Any]) -> None:
    done.created += answer["created"]
    done.updated += answer["updated"]
    done.refused += answer["refused"]
    for entry in answer["items"]:
        if entry["status"] == "refused":
            done.refused_ids.add(str(entry["id"]))
            if len(done.reasons) < TOLD:
                done.reasons.append((str(entry["id"]), entry["problem"]["detail"]))
