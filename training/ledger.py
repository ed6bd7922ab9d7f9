"""Which rows of the table the service has been given, so that a retraining loads the new and the changed ones alone.

    ROOT/movies/loaded-1f0c9a3b.parquet    id and digest of each row, for the service of that URL

So of the table and the HTTP API whoever spoke last is right: an item that was put or deleted by API after its row was
loaded stays as it is until the row itself changes.
"""

import hashlib
import json
from io import BytesIO
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from itemvec.bulk import TOLD, Loaded, load_items
from itemvec.client import Client
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.table import rows
from training.ingest import BLOCK

GIVEN = pa.schema([("id", pa.string()), ("digest", pa.binary(8))])
"""Of rows of the table."""

DIGESTED_AT_ONCE = 8192


def load_changed(
    client: Client, registry: Registry, name: str, table: pa.Table, schemas: list[FeatureSchema], sync: bool = False
) -> dict[str, Any]:
    """Stores the rows of `table` that are new or changed since the last call, with the columns of any of the `schemas`;
    with `sync` also deletes items whose rows are gone. Returns how many were created, updated, refused, unchanged and
    deleted, and the first refusals. A second call has only what was refused left to do.

    Of a table that is mapped, ids and digests are in memory, and a block of rows at a time."""
    model = client.call("GET", f"/v1/models/{name}")
    id_column = model["item_schema"]["x-itemvec-id"]
    columns = list(dict.fromkeys(f.name for schema in schemas for f in schema.features))
    table = table.select([id_column, *(c for c in columns if c in table.column_names)])
    file = f"loaded-{hashlib.sha256(client.url.encode()).hexdigest()[:8]}.parquet"
    # A store that is empty has lost what it was given.
    before = _read(registry, name, file) if model["items"] else GIVEN.empty_table()
    now = digests(table, id_column)
    same = np.asarray(_same(now, before))
    for column in model["item_schema"]["properties"]:
        if column not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows))
    done = Loaded()
    for start in range(0, table.num_rows, BLOCK):
        # Ids that the table has twice are refused by training, so rows and digests go together.
        changed = table.slice(start, BLOCK).filter(pa.array(~same[start : start + BLOCK]))
        _add(done, load_items(client, changed, model, all_columns=True))
    gone = _without(before, now.column("id"))
    deleted = sum(client.delete(item_id, name) for item_id in gone.column("id").to_pylist()) if sync else 0
    accepted = _without(now, pa.array(done.refused_ids, pa.string()))
    _write(registry, name, file, accepted if sync else pa.concat_tables([gone, accepted]))
    return {
        "created": done.created, "updated": done.updated, "refused": done.refused, "deleted": deleted,
        "unchanged": int(same.sum()), "refusals": [{"id": i, "why": why} for i, why in done.reasons],
    }  # fmt: skip


def digests(table: pa.Table, id_column: str) -> pa.Table:
    """Id and digest of each row, as the HTTP API is sent it."""
    names = [c for c in table.column_names if c != id_column]
    parts = [GIVEN.empty_table()]
    for ids, items in rows(table, id_column, names, DIGESTED_AT_ONCE):
        texts = (json.dumps(item, sort_keys=True, default=str).encode() for item in items)
        each = [hashlib.blake2b(text, digest_size=8).digest() for text in texts]
        parts.append(pa.table([ids, each], schema=GIVEN))
    return pa.concat_tables(parts)


def _same(now: pa.Table, before: pa.Table) -> pa.Array:
    """(n,) whether a row of `now` is in `before` with this very digest."""
    place = pc.index_in(now.column("id"), value_set=before.column("id"))
    digest = before.column("digest").combine_chunks().take(place.combine_chunks())
    return pc.fill_null(pc.equal(digest, now.column("digest").combine_chunks()), False)


def _without(given: pa.Table, ids: pa.Array | pa.ChunkedArray) -> pa.Table:
    return given.filter(pc.invert(pc.is_in(given.column("id"), value_set=ids)))


def _add(done: Loaded, more: Loaded) -> None:
    done.created += more.created
    done.updated += more.updated
    done.refused += more.refused
    done.refused_ids |= more.refused_ids
    done.reasons = [*done.reasons, *more.reasons][:TOLD]


def _read(registry: Registry, name: str, file: str) -> pa.Table:
    content = registry.root.read(name, file)
    return GIVEN.empty_table() if content is None else pa.parquet.read_table(BytesIO(content), schema=GIVEN)


def _write(registry: Registry, name: str, file: str, given: pa.Table) -> None:
    sink = BytesIO()
    pa.parquet.write_table(given, sink)
    registry.root.replace(name, file, sink.getvalue())
