"""A copied table on its way in: checked and fitted column by column, encoded block by block. What is in memory at a
time is a column or a block, so the table may be larger than that.

    runs/tables/DIGEST/COLUMNS   the columns that are learned from (`Items`)
    runs/tables/DIGEST/KEY/      what is fitted and encoded of them, for every run with this schema and folds

Large tables are fitted and encoded by as many processes as there are cores, or by tasks on all machines of a Ray
cluster. What each of them does is a function of paths, so that it reads its own column or block.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

import itemvec
from itemvec.check import (
    added_up,
    column_errors,
    count_errors,
    id_errors,
    label_counts,
    of_kept,
    presence_errors,
    undictionaried,
)
from itemvec.errors import SchemaMismatch, TableError
from itemvec.features import Batch, Column, FeatureTransform
from itemvec.schema import AnyFeature, FeatureSchema, Multi, Nominal
from training.folds import TRAIN, fold_at, hashed_ids
from training.items import mapped, opened, short_digest, taken, written_whole
from training.tasks import Made, Others, ahead, others

BLOCK: Final = 65_536
"""Rows that are encoded at once, by one process."""

COUNTED: Final = 1 << 20
"""Rows whose labels one process counts at once."""

ALONE: Final = 200_000
"""Rows up to which this process does it alone: others would take longer to start."""

MIN_TRAIN_ROWS: Final = 8

COUNTS: Final = "counts"

Stored = dict[str, npt.NDArray[Any]]
"""The fields of `training.data.EncodedTable` for some items, with the `lengths` of bags instead of where they begin."""


def encoded_at(copy: Path, schema: FeatureSchema, test: float, validation: float) -> Path:
    """The folder of what is encoded of a table: of one name where nothing differs that decides what is in it."""
    what = [itemvec.__version__, FeatureTransform.FORMAT, schema.to_yaml(), test, validation]
    return copy.parent / short_digest(what)


def fit(
    table: pa.Table, schema: FeatureSchema, test: float, validation: float, folder: Path, source: str,
    copy: Path | None = None, spread: bool = False,
) -> tuple[FeatureTransform, npt.NDArray[np.int8]]:  # fmt: skip
    """Checks the table and fits the transform on its training rows, exactly as `FeatureTransform.fit` would; both are
    saved in `folder`. Also (n,) the fold of each row. `copy` is the folder that `table` is mapped from, if it is, and
    `spread` whether the machines of the Ray cluster share the work, which this process is connected to.

    Raises SchemaMismatch where the table does not fit the schema, TableError where it has too few rows to train on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema.save(folder / "schema.yaml")
    with _shared(table, copy, folder, spread) as shared:
        if schema.id in table.column_names:
            hashes = _hashes(table, schema.id, shared)
            fold, suspects = fold_at(hashes, test, validation), taken(table.select([schema.id]), _alike(hashes))
            errors = id_errors(table, schema.id, suspects.column(0))
        else:
            fold, errors = np.zeros(table.num_rows, np.int8), id_errors(table, schema.id)
        np.save(folder / "fold.npy", fold)
        found = _found(table, schema, fold, shared)
    enough = int((fold == TRAIN).sum())
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
) -> Iterator[Stored]:
    """The table's rows as numbers, block by block, as they are stored. By several processes where `fit` saved the
    transform in `folder` and `copy` is the folder that `table` is mapped from; `spread` as there. Raises SchemaMismatch
    (a value of the wrong type)."""
    starts = range(0, table.num_rows, BLOCK)
    with _shared(table, copy, folder, spread) as shared:
        if shared is None:
            yield from (stored(transform.transform_table(table.slice(start, BLOCK), start)) for start in starts)
        else:
            yield from shared.each(_encoded_there, [(start, BLOCK) for start in starts])


@dataclass(frozen=True, slots=True)
class _Shared:
    """Work on a table that others do too."""

    by: Others
    copy: Path
    folder: Path
    """Where they find what is fitted, and leave what they made."""

    def each(self, function: Callable[..., Made], given: Iterable[tuple[Any, ...]]) -> Iterator[Made]:
        """What `function` makes of the two folders and of each, in order."""
        return ahead(self.by, function, [(self.copy, self.folder, *one) for one in given])


@contextlib.contextmanager
def _shared(table: pa.Table, copy: Path | None, folder: Path | None, spread: bool) -> Iterator[_Shared | None]:
    """None where the table is small, or not mapped."""
    if copy is None or folder is None or table.num_rows <= ALONE:
        yield None
        return
    with others(spread) as by:
        yield _Shared(by, copy.resolve(), folder.resolve())


def _hashes(table: pa.Table, id_column: str, shared: _Shared | None) -> npt.NDArray[np.uint64]:
    """(n,) `hashed_ids` of all rows."""
    starts = range(0, table.num_rows, BLOCK)
    parts = (
        (_hashed(table.slice(start, BLOCK), id_column) for start in starts)
        if shared is None
        else shared.each(_hashed_there, [(id_column, start, BLOCK) for start in starts])
    )
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def _hashed(table: pa.Table, id_column: str) -> npt.NDArray[np.uint64]:
    return hashed_ids(str(i) for i in table.column(id_column).to_pylist())


def _hashed_there(copy: Path, _: Path, id_column: str, start: int, rows: int) -> npt.NDArray[np.uint64]:
    return _hashed(opened(copy, start, rows), id_column)


def _alike(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The rows whose hash another row has too: 8 bytes a row tell that no id stands there twice, where a table of all
    ids would take many times as much."""
    ordered = np.sort(hashes)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    return np.flatnonzero(np.isin(hashes, twice)) if len(twice) else np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True)
class _Fitted:
    errors: list[str]
    errors_of_training: list[str]
    fitted: Column | None


def _found(table: pa.Table, schema: FeatureSchema, fold: npt.NDArray[np.int8], shared: _Shared | None) -> list[_Fitted]:
    """Of each column, in the order of the schema."""
    columns = range(len(schema.features))
    if shared is None:
        return [_fitted(table, feature, fold) for feature in schema.features]
    if table.num_rows > COUNTED:
        labels = [n for n in columns if isinstance(schema.features[n], Nominal | Multi)]
        starts = range(0, table.num_rows, COUNTED)
        for _ in shared.each(_counted_there, [(n, start, COUNTED) for n in labels for start in starts]):
            pass
    found = list(shared.each(_fitted_there, [(n,) for n in columns]))
    shutil.rmtree(shared.folder / COUNTS, ignore_errors=True)
    return found


def _fitted(table: pa.Table, feature: AnyFeature, fold: npt.NDArray[np.int8], counts: Path | None = None) -> _Fitted:
    """`counts` is where the labels of the column are counted, if they are."""
    train = fold == TRAIN
    if isinstance(feature, Nominal | Multi):
        return _fitted_labels(table, feature, train, counts)
    if errors := column_errors(table, feature):
        return _Fitted(errors, [], None)
    if train.sum() < MIN_TRAIN_ROWS:
        return _Fitted([], [], None)
    mine = table.select([feature.name]).filter(pa.array(train))
    if errors := column_errors(mine, feature):
        return _Fitted([], errors, None)
    return _Fitted([], [], FeatureTransform.fit_column(feature, undictionaried(mine.column(feature.name))))


def _fitted_labels(
    table: pa.Table, feature: Nominal | Multi, train: npt.NDArray[np.bool_], counts: Path | None
) -> _Fitted:
    """Never of a copy of all labels: they are most of a large table."""
    if errors := presence_errors(table, feature):
        return _Fitted(errors, [], None)
    if counts is None:
        counted = label_counts(undictionaried(table.column(feature.name)), feature, train)
    else:
        counted = added_up([mapped(file) for file in sorted(counts.glob("*.arrow"))])
    if errors := count_errors(counted, feature):
        return _Fitted(errors, [], None)
    if train.sum() < MIN_TRAIN_ROWS:
        return _Fitted([], [], None)
    of_train = of_kept(counted)
    unfit = count_errors(of_train, feature)
    return _Fitted([], unfit, None if unfit else FeatureTransform.fit_labels(feature, of_train))


def _fitted_there(copy: Path, folder: Path, n: int) -> _Fitted:
    """Of the n-th column."""
    feature, counts = FeatureSchema.load(folder / "schema.yaml").features[n], folder / COUNTS / str(n)
    return _fitted(opened(copy), feature, np.load(folder / "fold.npy"), counts if counts.exists() else None)


def _counted_there(copy: Path, folder: Path, n: int, start: int, rows: int) -> None:
    """Leaves the `label_counts` of some rows of the n-th column, with those of training `kept`, in a file."""
    feature, table = FeatureSchema.load(folder / "schema.yaml").features[n], opened(copy, start, rows)
    if not isinstance(feature, Nominal | Multi) or presence_errors(table, feature):
        return  # there are no labels to count
    train = np.load(folder / "fold.npy", mmap_mode="r")[start : start + rows] == TRAIN
    counts = label_counts(undictionaried(table.column(feature.name)), feature, train)
    with (
        written_whole(folder / COUNTS / str(n) / f"{start:012d}.arrow") as part,
        pa.ipc.new_file(part, counts.schema) as file,
    ):
        file.write_table(counts)


def stored(batch: Batch) -> Stored:
    """Half the bytes of the batch."""
    lengths = batch.lengths.ravel()
    # Every row of a bag counts the same, so the weight of its last one is the bag's.
    weights = batch.weights[np.cumsum(lengths, dtype=np.int64) - 1] if len(lengths) else np.ones(0, np.float32)
    return {
        "dense": batch.dense,
        "rows": batch.indices.astype(np.int32),
        "lengths": lengths,
        "weights": weights.reshape(batch.lengths.shape),
    }


_transforms: dict[Path, FeatureTransform] = {}


def _encoded_there(copy: Path, folder: Path, start: int, rows: int) -> Stored:
    if folder not in _transforms:
        schema = FeatureSchema.load(folder / "schema.yaml")
        _transforms[folder] = FeatureTransform.load(folder / "transform", schema)
    return stored(_transforms[folder].transform_table(opened(copy, start, rows), start))
