"""A table on its way in: copied once to the disk of the runs, checked and fitted column by column, encoded block by
block. What is in memory at a time is a column or a block, so the table may be larger than that.

    runs/tables/DIGEST/COLUMNS.arrow   the columns that are learned from, memory-mapped
    runs/tables/DIGEST/KEY/            what is fitted and encoded of them, for every run with this schema and folds

Large tables are fitted and encoded by as many processes as there are cores, or by tasks on all machines of a Ray
cluster. What each of them does is a function of paths, so that it reads its own column or block, and its memory is free
when it is done.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import itemvec
from itemvec.check import column_errors, count_errors, id_errors, label_counts, undictionaried
from itemvec.errors import SchemaMismatch, TableError
from itemvec.features import Batch, Column, FeatureTransform
from itemvec.schema import AnyFeature, FeatureSchema, Multi, Nominal, Numeric, Text
from itemvec.table import FORMATS, batches, files_of, table_digest
from training.folds import TRAIN, fold_of

TABLES: Final = "tables"
ENCODED: Final = "encoded"
"""The file of a run's folder that says where its table lies encoded, so that others on the same storage find it."""

KEPT: Final = 3
"""Tables that are kept for a next run, those last used; one that a run still needs is kept besides."""

BLOCK: Final = 65_536
"""Rows that are encoded at once, by one process."""

ALONE: Final = 200_000
"""Rows up to which this process does it alone: others would take longer to start."""

MIN_TRAIN_ROWS: Final = 8

_DTYPES: Final = {"string": pa.string(), "integer": pa.int64(), "boolean": pa.bool_()}


@dataclass(frozen=True, slots=True)
class Items:
    """The columns of an item table that a run learns from."""

    table: pa.Table
    """Memory-mapped: only what is read of it takes memory."""

    digest: str
    """`table_digest` of where it came from."""

    copy: Path
    """The Arrow file that it is mapped from."""

    @classmethod
    def read(cls, url: str, schema: FeatureSchema, targets: Iterable[str], runs: Path) -> "Items":
        """Copied to the folder `runs`, unless an earlier run did. Raises TableError."""
        digest = table_digest(url)
        columns = list(dict.fromkeys([schema.id, *(f.name for f in schema.features), *targets]))
        copy = runs / TABLES / digest[:12] / f"{_hashed(columns)}.arrow"
        if not copy.exists():
            with written_whole(copy) as path:
                _write(path, batches(url, columns, _types(url, schema)))
        os.utime(copy.parent)  # used now: `forget` begins with those that were not for longest
        return cls(opened(copy), digest, copy)


def opened(copy: Path) -> pa.Table:
    """Memory-mapped."""
    with pa.memory_map(str(copy)) as file:
        return pa.ipc.open_file(file).read_all()


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
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
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


def encoded_at(copy: Path, schema: FeatureSchema, test: float, validation: float) -> Path:
    """The folder of what is encoded of a table: of one name where nothing differs that decides what is in it."""
    what = [itemvec.__version__, FeatureTransform.FORMAT, schema.to_yaml(), test, validation]
    return copy.parent / _hashed(what)


def fold_rows(table: pa.Table, id_column: str, test: float, validation: float) -> npt.NDArray[np.int8]:
    """(n,) `fold_of` each row."""
    parts = [np.zeros(0, np.int8)]
    for batch in table.select([id_column]).to_batches(max_chunksize=BLOCK):
        parts.append(fold_of([str(i) for i in batch.column(0).to_pylist()], test, validation))
    return np.concatenate(parts)


def fit(
    table: pa.Table, schema: FeatureSchema, test: float, validation: float, folder: Path, source: str,
    copy: Path | None = None, spread: bool = False,
) -> tuple[FeatureTransform, npt.NDArray[np.int8]]:  # fmt: skip
    """Checks the table and fits the transform on its training rows, exactly as `FeatureTransform.fit` would; both are
    saved in `folder`. Also (n,) the fold of each row. `copy` is the file that `table` is mapped from, if it is, and
    `spread` whether the machines of the Ray cluster share the work, which this process is connected to.

    Raises SchemaMismatch where the table does not fit the schema, TableError where it has too few rows to train on.
    """
    errors = id_errors(table, schema.id)
    fold = np.zeros(table.num_rows, np.int8) if errors else fold_rows(table, schema.id, test, validation)
    enough = int((fold == TRAIN).sum())
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "fold.npy", fold)
    schema.save(folder / "schema.yaml")
    if copy is None or table.num_rows <= ALONE:
        found = [_fitted(table, feature, fold) for feature in schema.features]
    else:
        there = copy.resolve(), folder.resolve()
        found = list(ahead(_fitted_there, [(*there, f.name) for f in schema.features], spread))
    errors += [error for column in found for error in column.errors]
    if errors:
        raise SchemaMismatch(source, errors)
    if enough < MIN_TRAIN_ROWS:
        raise TableError(
            f"{source} leaves {enough} of its {table.num_rows} rows to train on; {MIN_TRAIN_ROWS} are the least"
        )
    if unfit := [error for column in found for error in column.errors_of_training]:
        raise SchemaMismatch(f"{source}, of which {enough} rows are trained on,", unfit)
    transform = FeatureTransform(schema, [column.fitted for column in found if column.fitted is not None])
    transform.save(folder / "transform")
    return transform, fold


def encode(
    table: pa.Table,
    transform: FeatureTransform,
    folder: Path | None = None,
    copy: Path | None = None,
    spread: bool = False,
) -> Iterator[Batch]:
    """The table's rows as numbers, block by block. By several processes where `fit` saved the transform in `folder` and
    `copy` is the file that `table` is mapped from; `spread` as there. Raises SchemaMismatch (a value of the wrong
    type)."""
    starts = range(0, table.num_rows, BLOCK)
    if folder is None or copy is None or table.num_rows <= ALONE:
        yield from (_encoded(table, transform, start, BLOCK) for start in starts)
        return
    there = copy.resolve(), folder.resolve()
    yield from ahead(_encoded_there, [(*there, start, BLOCK) for start in starts], spread)


@dataclass(frozen=True, slots=True)
class _Fitted:
    errors: list[str]
    errors_of_training: list[str]
    fitted: Column | None


def _fitted(table: pa.Table, feature: AnyFeature, fold: npt.NDArray[np.int8]) -> _Fitted:
    if errors := column_errors(table, feature):
        return _Fitted(errors, [], None)
    if (train := fold == TRAIN).sum() < MIN_TRAIN_ROWS:
        return _Fitted([], [], None)
    if isinstance(feature, Nominal | Multi):  # never a copy of all labels: they are most of a large table
        counts = label_counts(undictionaried(table.column(feature.name)), feature, train)
        unfit = count_errors(counts, feature)
        return _Fitted([], unfit, None if unfit else FeatureTransform.fit_labels(feature, counts))
    mine = table.select([feature.name]).filter(pa.array(train))
    if errors := column_errors(mine, feature):
        return _Fitted([], errors, None)
    return _Fitted([], [], FeatureTransform.fit_column(feature, undictionaried(mine.column(feature.name))))


def _encoded(table: pa.Table, transform: FeatureTransform, start: int, rows: int) -> Batch:
    return transform.transform_table(table.slice(start, rows), start)


def _fitted_there(copy: Path, folder: Path, name: str) -> _Fitted:
    feature = FeatureSchema.load(folder / "schema.yaml").feature(name)
    return _fitted(opened(copy), feature, np.load(folder / "fold.npy"))


_transforms: dict[Path, FeatureTransform] = {}


def _encoded_there(copy: Path, folder: Path, start: int, rows: int) -> Batch:
    if folder not in _transforms:
        schema = FeatureSchema.load(folder / "schema.yaml")
        _transforms[folder] = FeatureTransform.load(folder / "transform", schema)
    return _encoded(opened(copy), _transforms[folder], start, rows)


Made = TypeVar("Made")


Submit = Callable[..., "Future[Any]"]


@contextmanager
def workers(spread: bool) -> Iterator[tuple[Submit, int]]:
    """What hands work out, and how many do it at once: processes of this machine, one a core, or tasks of the Ray
    cluster. What a lost machine of the cluster had is done again elsewhere."""
    if spread:
        import ray  # noqa: PLC0415 - takes seconds

        cores = int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
        yield lambda function, *given: ray.remote(function).remote(*given).future(), max(cores, 1)
        return
    cores = os.cpu_count() or 1
    # Spawned, since a fork of a process with threads (Arrow, torch, Ray) may hang.
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        try:
            yield pool.submit, cores
        finally:
            pool.shutdown(cancel_futures=True)


def ahead(function: Callable[..., Made], given: Sequence[tuple[Any, ...]], spread: bool) -> Iterator[Made]:
    """By `workers`, in order; at most a few results wait to be taken, since each may be large."""
    with workers(spread) as (submit, cores):
        waiting: deque[Future[Made]] = deque()
        for arguments in given:
            waiting.append(submit(function, *arguments))
            if len(waiting) > 2 * cores:
                yield _made(waiting.popleft())
        while waiting:
            yield _made(waiting.popleft())


def _made(future: "Future[Made]") -> Made:
    try:
        return future.result()
    except Exception as error:
        raise getattr(error, "cause", error) from None  # Ray wraps what its tasks raise


def _write(path: Path, rows: Iterator[pa.RecordBatch]) -> None:
    first = next(rows, None)
    if first is None:
        raise TableError("the table has no rows")
    first = _plain(first)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, first.schema) as writer:
        writer.write_batch(first)
        for batch in rows:
            writer.write_batch(_plain(batch))


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Values instead of codes: a file holds one dictionary a column, and the batches of a table have their own."""
    columns = [c.cast(c.type.value_type) if pa.types.is_dictionary(c.type) else c for c in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def _types(url: str, schema: FeatureSchema) -> dict[str, pa.DataType]:
    """What the schema says of columns: a large text file is read piece by piece, and its first piece cannot know."""
    types: dict[str, pa.DataType] = {}
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
    return FORMATS.get(Path(files_of(url)[0]).suffix.lower()) == "CSV"


def _hashed(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
