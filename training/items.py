"""The items of a table, copied once to the disk of the runs and memory-mapped from then on.

    runs/tables/DIGEST/COLUMNS/000000000000.arrow   the columns that are learned from, from the first row on
    runs/tables/DIGEST/COLUMNS/000000524288.arrow   and from this one; further files where many have copied

This process copies a table batch by batch to one file. A large one, where there is a Ray cluster, is copied by tasks on
all its machines, a file each of whole row groups and whole text files; not by Ray Data, which takes the types of a CSV
file from its first megabyte and is slower on Parquet (`benchmarks.training`). Tasks read as this process would, and
what one of them cannot read this process does: for another machine a table may lie out of reach, and where it is the
table that is wrong the error is the same one.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from itemvec.errors import ConfigError, TableError
from itemvec.schema import FeatureSchema, Multi, Nominal, Numeric, Text
from itemvec.table import FORMATS, Piece, batches_of, files_of, pieces_of, size_of, table_digest
from training.tasks import ahead, others

TABLES: Final = "tables"
ENCODED: Final = "encoded"
"""The file of a run's folder that says where its table lies encoded, so that others on the same storage find it."""

KEPT: Final = 3
"""Tables that are kept for a next run, those last used; one that a run still needs is kept besides."""

ALONE: Final = 256 << 20
"""Bytes of a table up to which this process copies it alone: others would take longer to start."""

PART: Final = 32 << 20
"""Bytes of a table that one task copies at least, where it is of several pieces."""

PARTS: Final = 1000
"""Files of a copy, about, at most."""

FOOTERS: Final = 16
"""Parquet files that are asked at once for their row groups."""

_DTYPES: Final = {"string": pa.string(), "integer": pa.int64(), "boolean": pa.bool_()}


@dataclass(frozen=True, slots=True)
class Items:
    """The columns of an item table that a run learns from."""

    table: pa.Table
    """Memory-mapped: only what is read of it takes memory."""

    digest: str
    """`table_digest` of where it came from."""

    copy: Path
    """The folder that it is mapped from."""

    @classmethod
    def read(
        cls, url: str, schema: FeatureSchema, targets: Iterable[str], runs: Path, address: str | None = None
    ) -> "Items":
        """Copied to the folder `runs`, unless an earlier run did; a large table by all machines of the Ray cluster at
        `address`, if there is one. Raises TableError, and ConfigError for a cluster that does not share `runs`."""
        digest = table_digest(url)
        columns = list(dict.fromkeys([schema.id, *(f.name for f in schema.features), *targets]))
        types = _types(url, schema)
        copy = runs / TABLES / digest[:12] / short_digest([columns, {name: str(kind) for name, kind in types.items()}])
        if not copy.exists():
            with written_whole(copy) as folder:
                _copy(url, columns, types, folder.resolve(), address)
        os.utime(copy.parent)  # used now: `forget` begins with those that were not for longest
        return cls(opened(copy), digest, copy)


def opened(copy: Path, start: int = 0, rows: int | None = None) -> pa.Table:
    """A copied table, or these rows of it; memory-mapped."""
    files = sorted(copy.glob("*.arrow"))
    firsts = [int(file.stem) for file in files]
    until = len(files) if rows is None else bisect_left(firsts, start + rows)
    since = min(bisect_right(firsts, start), until) - 1
    table = pa.concat_tables(map(mapped, files[since:until]))
    return table.slice(start - firsts[since], rows)


def mapped(file: Path) -> pa.Table:
    """An Arrow file, memory-mapped."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


def taken(table: pa.Table, rows: Iterable[int]) -> pa.Table:
    """These rows of a table, in this order, each from the chunk that it lies in: pyarrow's own `take` of a table copies
    whole columns of lists for it, and fails where their labels are more than 2 GiB."""
    wanted = np.fromiter(rows, np.int64)
    order = np.argsort(wanted, kind="stable")
    places, parts, start, done = wanted[order], [table.slice(0, 0)], 0, 0
    for batch in table.to_batches():
        end = int(np.searchsorted(places, start + len(batch)))
        if end > done:
            parts.append(pa.Table.from_batches([batch.take(pa.array(places[done:end] - start))]))
        start, done = start + len(batch), end
    return pa.concat_tables(parts).combine_chunks().take(pa.array(np.argsort(order)))


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which stands at `path` once the block is done: whole, or not at all. Where
    another process was faster, theirs stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # machines that share it count processes alike
    try:
        yield part
        if not path.exists():
            part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        part.unlink(missing_ok=True)


def forget(runs: Path, kept: int = KEPT) -> None:
    """Removes tables of earlier runs, all but those last used and those of runs that did not end."""
    needed = {(pointer.parent / pointer.read_text()).resolve().parent for pointer in runs.glob(f"*/{ENCODED}")}
    tables = sorted((runs / TABLES).glob("*"), key=lambda table: table.stat().st_mtime, reverse=True)
    for table in tables[kept:]:
        if table.resolve() not in needed:
            shutil.rmtree(table, ignore_errors=True)


def _copy(url: str, columns: Sequence[str], types: dict[str, pa.DataType], folder: Path, address: str | None) -> None:
    """The files of the copy in `folder`, a new one."""
    files = files_of(url)
    parts = [[Piece(file) for file in files]]
    if address is not None and sum(map(size_of, files)) > ALONE:
        with ThreadPoolExecutor(FOOTERS) as pool:
            parts = _parts([piece for found in pool.map(pieces_of, files) for piece in found])
    folder.mkdir(parents=True)
    rows = 0
    while parts and not rows:  # the first that has rows decides what the columns of all are
        rows = _copied(parts.pop(0), columns, types, None, folder / _name(0))
    if not rows:
        raise TableError("the table has no rows")
    if not parts:
        return
    from training.cluster import connected  # noqa: PLC0415 - loads torch, which no task needs
    from training.config import ClusterConfig  # noqa: PLC0415

    what = columns, types, opened(folder).schema
    given = [([_absolute(p) for p in part], *what, folder / f"{n}.part") for n, part in enumerate(parts)]
    with connected(ClusterConfig(address=address)), others(spread=True) as machines:
        for part, mine, count in zip(parts, given, ahead(machines, _copied_there, given), strict=True):
            here = _copied(part, *what, mine[-1]) if count is None else count
            if here:
                mine[-1].rename(folder / _name(rows))
                rows += here


def _parts(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """The same pieces, in groups of about as many bytes."""
    least = max(PART, sum(piece.size for piece in pieces) // PARTS)
    parts, size = [list[Piece]()], 0
    for piece in pieces:
        if size >= least:
            parts.append([])
            size = 0
        parts[-1].append(piece)
        size += piece.size
    return parts


def _copied(
    pieces: Sequence[Piece], columns: Sequence[str], types: dict[str, pa.DataType], schema: pa.Schema | None, path: Path
) -> int:
    """How many rows the pieces have, which are in the file `path` now; none, no file."""
    rows = batches_of(pieces, columns, types, schema)
    if (first := next(rows, None)) is None:
        return 0
    count = len(first)
    with (
        written_whole(path) as part,
        pa.OSFile(str(part), "wb") as file,
        pa.ipc.new_file(file, first.schema) as writer,
    ):
        writer.write_batch(first)
        for batch in rows:
            writer.write_batch(batch)
            count += len(batch)
    return count


def _copied_there(*given: Any) -> int | None:
    """The same by a task; None where it cannot read them. Raises ConfigError where it does not reach the folder."""
    folder = given[-1].parent
    if not folder.exists():
        raise ConfigError(
            f"{folder} is not there on {socket.gethostname()}: the folder of runs, or of embed-table's vectors, has to "
            "lie on storage that all machines of the Ray cluster mount"
        )
    try:
        return _copied(*given)
    except TableError:
        return None


def _absolute(piece: Piece) -> Piece:
    """For a process that runs in another folder."""
    return piece if "://" in piece.file else replace(piece, file=str(Path(piece.file).resolve()))


def _name(first: int) -> str:
    """Of the file that begins with this row."""
    return f"{first:012d}.arrow"


def _types(url: str, schema: FeatureSchema) -> dict[str, pa.DataType]:
    """What the schema says of columns: a large text file is read piece by piece, and its first piece cannot know."""
    types: dict[str, pa.DataType] = {}
    if _form(url) == "Parquet":
        return types
    for feature in schema.features:
        if isinstance(feature, Nominal | Multi):
            label = _DTYPES[feature.dtype]
            one = isinstance(feature, Nominal) or feature.separator is not None
            types[feature.name] = label if one else pa.list_(label)
        elif isinstance(feature, Text):
            types[feature.name] = pa.string()
        elif isinstance(feature, Numeric):
            types[feature.name] = pa.float64()
    if is_csv(url):
        types[schema.id] = pa.string()
    return types


def is_csv(url: str) -> bool:
    return _form(url) == "CSV"


def _form(url: str) -> str | None:
    return FORMATS.get(Path(files_of(url)[0]).suffix.lower())


def short_digest(what: Any) -> str:
    """12 hex digits."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
