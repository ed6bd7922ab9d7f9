"""How good an encoder is on rows that it was not trained on, beside what needs no learning: the content of
`evaluation.json`.

rows                train, validation, test: how many; measured: how many test rows the figures are of; searched: items
                    that neighbors were searched among; fitted: training rows that the baselines of `columns` saw
columns.NAME        kind, metric: accuracy (nominal), micro-F1 (multi, text), mean error in steps (ordinal; lower is
                    better), R2 (numbers)
                    score: of what the decoder reads back from the embedding of the whole item
                    inferred: the same, where the column was hidden and must follow from the others
                    majority: of the best constant answer; pca: of principal components of the same dim
                    r_precision (sets): the same four, of as many highest-scored labels as the item has
                    loss: of the decoder on the whole item; 1 is the best constant answer, 0 is perfect
retrieval           columns.NAME: precision@k, the share of the k nearest items that have a label of a hidden column in
                    common with the item (the column is hidden from all of them); one_hot, hashing, svd, pca,
                    pca_unit_variance: the same by the plain encodings of the other columns (training/baselines.py);
                    base_rate: by chance. mean: over columns. prefixes.SIZE: the mean with the first numbers of the
                    vectors only, and of as many principal components; loss: what these numbers say to the decoder,
                    the mean over columns
cold_start          where there are likes: k, users, warm_items, cold_items; for model, each baseline and chance:
                    recall, ndcg, pm_auc (training/coldstart.py); else null
out_of_vocabulary   columns.NAME: the share of rows whose labels in the column are all new to the model; share: of rows
                    with such a column; precision: the mean of retrieval over those rows; precision_of_others: of the
                    others, each hidden column counting as often as it does for those rows
space               norm_mean, norm_std: of the vectors before their length is made 1; effective_rank: how many
                    dimensions are in use (exp of the entropy of the spectrum); mean_cosine: of random pairs, near 0
parent              where it follows a version, or else there was a champion when it was trained: version, k,
                    overlap: the share of the k nearest items that both agree on; where the dim is the same,
                    compatibility: the mean cosine between an item's old and new vector, and cross_recall: the share of
                    the k nearest of the old space that the new vector finds there; else null
samples             some items with their nearest: id, neighbors: id and score
predict             of a run with targets, TARGET: metric, score and majority as above, rows that have the target
training            best_epoch (kept), epochs, history: losses of each, parameters
seconds             of each phase: read, encode, ray, workers (start), loop, evaluate
gate                written by `itemvec retrain`: the champion it was compared with, and the checks
profile             written by `itemvec retrain`: what values the table had (training/drift.py)

`evaluate` makes the figures, `assess` adds what needs the items themselves; the run adds the last four.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp
import torch

from itemvec.check import require_columns
from itemvec.errors import InvalidItem, ItemvecError, TableError
from itemvec.features import OOV
from itemvec.registry import Registry
from itemvec.schema import FeatureSchema
from itemvec.table import read_table, rows
from itemvec.version import ModelVersion
from training.coldstart import FITTED, cold_start
from training.config import TrainConfig
from training.exhibits import Exhibits, exhibits
from training.folds import TEST, TRAIN, VALIDATION, fold_of, some
from training.ingest import MIN_TRAIN_ROWS
from training.items import taken
from training.judged import Floats, Judged, Rows, Views, bags_of, judged_version, measured_rows, searched_rows, truth_of
from training.readback import prefix_losses, read_back
from training.retrieval import K, nested_sizes, retrieve
from training.space import cross_recall, neighbor_overlap, space

LikesOf = Callable[[list[str], npt.NDArray[np.int8]], sp.csr_matrix | None]
"""The ids of n items and their folds -> (users, n), whether a user liked an item; None where nobody knows."""


def evaluate_version(
    version: ModelVersion, url: str, registry: Registry, likes_of: LikesOf | None = None
) -> tuple[dict[str, Any], Exhibits]:
    """`assess` of a released model on the table at `url`, with the folds that its training had. Raises TableError,
    SchemaMismatch."""
    schema, lineage = version.schema, version.manifest.lineage
    table = read_table(url, [schema.id, *(f.name for f in schema.features)])
    require_columns(table, [schema.id, *(f.name for f in schema.features)])
    default = TrainConfig()
    test, validation = (lineage.config.get(k, getattr(default, k)) for k in ("test", "validation"))
    ids = [str(i) for i in table.column(schema.id).to_pylist()]
    fold = fold_of(ids, test, validation)
    if (fold == TRAIN).sum() < MIN_TRAIN_ROWS:
        raise TableError(f"{url} has {table.num_rows} rows: too few to search neighbors among")
    parent, likes = parent_of(registry, version.name, lineage.parent), likes_of and likes_of(ids, fold)
    evaluation, exhibits = assess(judged_version(version, table, fold), table, schema, fold, likes, parent)
    if "training" in version.evaluation:
        evaluation["training"] = version.evaluation["training"]
    return evaluation, exhibits


def write_report(folder: Path, ref: str, evaluation: dict[str, Any], exhibits: Exhibits) -> None:
    """report.html, in `folder`."""
    from training.report import render  # noqa: PLC0415 - matplotlib takes a second to import

    (folder / "report.html").write_text(render(ref, evaluation, exhibits), encoding="utf-8")


def parent_of(registry: Registry, name: str, version: int | None) -> ModelVersion | None:
    """A version to compare neighborhoods with; one that is gone or damaged is none."""
    with contextlib.suppress(ItemvecError):
        return registry.load(f"{name}@{version}") if version is not None else None
    return None


def assess(
    model: Judged, table: pa.Table, schema: FeatureSchema, fold: npt.NDArray[np.int8],
    likes: sp.csr_matrix | None = None, parent: ModelVersion | None = None,
) -> tuple[dict[str, Any], Exhibits]:  # fmt: skip
    """`evaluate`, and what a person looks at. `table` has the rows that `model` knows encoded, in their order; `likes`
    is (users, n), whether a user liked an item."""
    evaluation, shown = evaluate(model, fold, likes), exhibits(model, table, schema, fold, likes)
    evaluation["parent"] = None if parent is None else against(parent, model, table, fold)
    evaluation["samples"] = shown.samples
    return evaluation, shown


@torch.inference_mode()
def against(parent: ModelVersion, model: Judged, table: pa.Table, fold: npt.NDArray[np.int8]) -> dict[str, Any] | None:
    """How near to `parent` the space still is; None where the table is not one that it can read."""
    searched, id_column = searched_rows(fold), parent.schema.id
    if id_column not in table.column_names:
        return None
    batches = rows(taken(table, searched), id_column, [f.name for f in parent.schema.features])
    try:
        theirs = torch.from_numpy(np.concatenate([parent.encode(items).vectors for _, items in batches]))
    except InvalidItem:
        return None
    ours, queries = Views(model, searched).whole, len(measured_rows(fold))
    comparable = ours.shape == theirs.shape
    return {
        "version": parent.version,
        "k": K,
        "overlap": neighbor_overlap(ours, theirs, queries, K),
        "compatibility": float((ours * theirs)[:queries].sum(1).mean()) if comparable else None,
        "cross_recall": cross_recall(ours, theirs, queries, K) if comparable else None,
    }


@torch.inference_mode()
def evaluate(model: Judged, fold: npt.NDArray[np.int8], likes: sp.csr_matrix | None = None) -> dict[str, Any]:
    """The figures of a model over a table whose rows are in the folds `fold` (n,). `likes` is (users, n)."""
    measured, fitted_on = measured_rows(fold), some(np.flatnonzero(fold == TRAIN), FITTED)
    views = Views(model, searched_rows(fold))
    prefixes = nested_sizes(model.encoder.config.dim, model.encoder.config.nested)
    retrieval, by_query = retrieve(views, len(measured), truth_of(model), prefixes)
    if "prefixes" in retrieval:
        for size, loss in prefix_losses(views, len(measured), prefixes).items():
            retrieval["prefixes"][str(size)]["loss"] = loss
    unseen = _only_unseen(model, measured)
    any_unseen = np.any([*unseen.values(), np.zeros(len(measured), bool)], axis=0)
    precision, of_others = like_with_like(by_query, any_unseen)
    return {
        "rows": {
            "train": int((fold == TRAIN).sum()), "validation": int((fold == VALIDATION).sum()),
            "test": int((fold == TEST).sum()), "measured": len(measured), "searched": len(views.items),
            "fitted": len(fitted_on),
        },
        "columns": read_back(views, len(measured), fitted_on),
        "retrieval": retrieval,
        "cold_start": None if likes is None else cold_start(model, likes, fold),
        "out_of_vocabulary": {
            "columns": {name: float(rows.mean()) for name, rows in unseen.items()},
            "share": float(any_unseen.mean()),
            "precision": precision,
            "precision_of_others": of_others,
        },
        "space": space(model, measured),
    }  # fmt: skip


def _only_unseen(model: Judged, items: Rows) -> dict[str, npt.NDArray[np.bool_]]:
    """Per column of labels (items,): whether the item has labels there, and training knew none of them."""
    labels, first = bags_of(model, items)
    return {
        slot.name: (labels[:, f] == 1) & (first[:, f] == OOV)
        for f, slot in enumerate(model.layout.bags)
        if slot.kind != "text"
    }


def like_with_like(by_column: Floats, rows: npt.NDArray[np.bool_]) -> tuple[float | None, float | None]:
    """The mean of `by_column` (columns, items) over the items `rows` (items,), and that over the others as if they had
    the columns as often; NaN is no figure. Else items that lack their hardest column would look better for it."""
    here = others = count = 0.0
    for figures in by_column:
        there = ~np.isnan(figures)
        mine, theirs = figures[there & rows], figures[there & ~rows]
        if len(mine) and len(theirs):
            here += float(mine.sum())
            others += len(mine) * float(theirs.mean())
            count += len(mine)
    return (here / count, others / count) if count else (None, None)
