"""Which rows of the table the service has been given, so that a retraining loads the new and the changed ones alone.

    ROOT/movies/loaded-1f0c9a3b.parquet    id and digest of each row, for the service of that URL

So of the table and the HTTP API whoever spoke last is right: an item that was put or deleted by API after its row was
loaded stays as it is until the row itself changes.
"""

import hashlib
import json
from io import BytesIO
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from itemvec.bulk import Loaded, load_items
from itemvec.client import Client
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.table import rows

Rows = dict[str, bytes]
"""Id -> digest of the row."""


def load_changed(
    client: Client, registry: Registry, name: str, table: pa.Table, schemas: list[FeatureSchema], sync: bool = False
) -> dict[str, Any]:
    """Stores the rows of `table` that are new or changed since the last call, with the columns of any of the `schemas`;
    with `sync` also deletes items whose rows are gone. Returns how many were created, updated, refused, unchanged and
    deleted, and the first refusals. A second call has only what was refused left to do."""
    model = client.call("GET", f"/v1/models/{name}")
    id_column = model["item_schema"]["x-itemvec-id"]
    columns = list(dict.fromkeys(f.name for schema in schemas for f in schema.features))
    table = table.select([id_column, *(c for c in columns if c in table.column_names)])
    file = f"loaded-{hashlib.sha256(client.url.encode()).hexdigest()[:8]}.parquet"
    before = _read(registry, name, file) if model["items"] else {}  # a store that is empty has lost what it was given
    now = digests(table, id_column)
    changed = pa.array([before.get(item_id) != digest for item_id, digest in now.items()], pa.bool_())
    for column in model["item_schema"]["properties"]:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows))
    # Ids that the table has twice are refused by training, so rows and digests go together.
    done = load_items(client, table.filter(changed), model, all_columns=True) if any(now) else Loaded()
    gone = [item_id for item_id in before if item_id not in now] if sync else []
    deleted = sum(client.delete(item_id, name) for item_id in gone)
    kept = {} if sync else {item_id: digest for item_id, digest in before.items() if item_id not in now}
    accepted = {item_id: digest for item_id, digest in now.items() if item_id not in done.refused_ids}
    _write(registry, name, file, kept | accepted)
    return {
        "created": done.created, "updated": done.updated, "refused": done.refused, "deleted": deleted,
        "unchanged": len(now) - done.total, "refusals": [{"id": i, "why": why} for i, why in done.reasons],
    }  # fmt: skip


def digests(table: pa.Table, id_column: str) -> Rows:
    """Of the rows as the HTTP API is sent them."""
    return {
        item_id: hashlib.blake2b(json.dumps(item, sort_keys=True, default=str).encode(), digest_size=8).digest()
        for ids, items in rows(table, id_column, [c for c in table.column_names if c != id_column])
        for item_id, item in zip(ids, items, strict=True)
    }


def _read(registry: Registry, name: str, file: str) -> Rows:
    content = registry.root.read(name, file)
    if content is None:
        return {}
    table = pa.parquet.read_table(BytesIO(content))
    return dict(zip(table.column("id").to_pylist(), table.column("digest").to_pylist(), strict=True))


def _write(registry: Registry, name: str, file: str, given: Rows) -> None:
    table = pa.table({"id": pa.array(given, pa.string()), "digest": pa.array(given.values(), pa.binary(8))})
    sink = BytesIO()
    pa.parquet.write_table(table, sink)
    registry.root.replace(name, file, sink.getvalue())
