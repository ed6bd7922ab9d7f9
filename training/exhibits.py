"""Single items that a person can look at: some with their nearest neighbors, and a map of the held-out ones."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import scipy.sparse as sp
import torch

from itemvec.features import FIRST
from itemvec.schema import FeatureSchema
from training.folds import some
from training.items import taken
from training.judged import Floats, Judged, Rows, Views, bags_of, measured_rows

SAMPLES, NEIGHBORS = 8, 5
SAMPLED_AMONG = 20_000
"""Items that sample neighbors are searched among at most."""

APART = 0.5
"""Cosine under which two items are different enough to be both shown."""

MAPPED = 750
"""Items on the map at most: more take longer and hide each other."""

COLORINGS, COLORS = 6, 8
"""Columns that the map can be colored by, and labels of one that have a color of their own."""

TITLES = ("title", "name")


@dataclass(frozen=True, slots=True)
class Coloring:
    """A column as colors on the map."""

    column: str
    legend: list[str]
    """What each color stands for, `other` and `missing` left out."""
    ordered: bool
    """Whether the colors go from low to high."""
    color: list[int | None]
    """Per point its place in the legend, or None."""


@dataclass(frozen=True, slots=True)
class Exhibits:
    samples: list[dict[str, Any]]
    """As in evaluation.json: id, neighbors (id, score)."""
    described: dict[str, tuple[str, str]]
    """Per id of a sample or a neighbor: its title (or id), and its columns in a line."""
    among: int
    """Items that the neighbors were searched among."""
    points: Floats
    """(mapped, 2) between 0 and 1"""
    names: list[str]
    """Per point."""
    colorings: list[Coloring]


@torch.inference_mode()
def exhibits(
    model: Judged, table: pa.Table, schema: FeatureSchema, fold: Any, likes: sp.csr_matrix | None = None
) -> Exhibits:
    """`table` has the rows that `model` knows encoded, in the same order."""
    among = some(np.arange(model.table.n), SAMPLED_AMONG)
    vectors = Views(model, among).whole
    chosen = recognisable(model, vectors, among, likes)
    ids = [str(i) for i in table.column(schema.id).take(pa.array(among)).to_pylist()]
    samples, rows = [], set[int]()
    for place in chosen:
        scores = vectors @ vectors[place]
        scores[place] = -torch.inf
        best, nearest = scores.topk(min(NEIGHBORS, len(ids) - 1))
        found = [{"id": ids[n], "score": round(s, 4)} for s, n in zip(best.tolist(), nearest.tolist(), strict=True)]
        samples.append({"id": ids[place], "neighbors": found})
        rows |= {place, *nearest.tolist()}
    described = {ids[row]: _described(table, schema, int(among[row])) for row in sorted(rows)}
    mapped = some(measured_rows(fold), MAPPED)
    shown = taken(table, mapped)
    title = _title(schema)
    names = [str(name) for name in shown.column(title or schema.id).to_pylist()]
    return Exhibits(samples, described, len(among), flat(Views(model, mapped).whole), names, _colorings(shown, schema))


def recognisable(model: Judged, vectors: torch.Tensor, items: Rows, likes: sp.csr_matrix | None) -> list[int]:
    """Places in `items` of some that people may know: those with most likes, or else those of which most is known.
    None is near another, so that they are of several corners of the space."""
    if likes is not None:
        known = np.asarray((likes > 0).sum(0)).ravel()[items]
    else:
        labels, first = bags_of(model, items)
        flags = model.table.dense[torch.from_numpy(items)][:, [slot.flag for slot in model.layout.dense]].numpy()
        present = (first >= FIRST).sum(1) + (flags == 0).sum(1)
        known = present * 1000 + np.minimum(labels.sum(1), 999)
    chosen: list[int] = []
    for place in np.argsort(-known, kind="stable").tolist():
        if len(chosen) == SAMPLES:
            break
        if not chosen or float((vectors[chosen] @ vectors[place]).max()) < APART:
            chosen.append(place)
    return chosen


def flat(vectors: torch.Tensor) -> Floats:
    """(n, dim) -> (n, 2) between 0 and 1, near points from near vectors (t-SNE, van der Maaten and Hinton 2008); by
    principal components where there are too few for it."""
    x = vectors.numpy()
    if len(x) > 50:
        from sklearn.manifold import TSNE  # noqa: PLC0415 - takes a second, and not every run has a map

        placed = TSNE(max_iter=500, init="pca", random_state=0).fit_transform(x)
    else:
        placed = (x - x.mean(0)) @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2].T
    low, high = placed.min(0), placed.max(0)
    out: Floats = ((placed - low) / np.maximum(high - low, 1e-9)).astype(np.float32)
    return out


def _colorings(table: pa.Table, schema: FeatureSchema) -> list[Coloring]:
    """Of the columns that color most points: labels first, then quantities."""
    makers: Mapping[str, Callable[[str, Sequence[Any]], Coloring | None]] = {
        "nominal": _by_label, "multi": _by_label, "ordinal": _by_label, "numeric": _by_quantity,
        "timestamp": _by_quantity,
    }  # fmt: skip
    found = []
    for feature in schema.features:
        if feature.kind in makers:
            values = table.column(feature.name)
            if pa.types.is_date(values.type) or pa.types.is_timestamp(values.type):
                values = pc.year(values)
            separator, cells = getattr(feature, "separator", None), values.to_pylist()
            if separator is not None:
                cells = [[part.strip() for part in cell.split(separator)] if cell else None for cell in cells]
            made = makers[feature.kind](feature.name, cells)
            if made is not None:
                found.append(made)
    covered = {c.column: sum(color is not None for color in c.color) for c in found}
    best = sorted(found, key=lambda c: (c.ordered, -covered[c.column]))
    labels, quantities = [c for c in best if not c.ordered], [c for c in best if c.ordered]
    kept = labels[: COLORINGS - min(2, len(quantities))]
    return kept + quantities[: COLORINGS - len(kept)]


def _by_label(column: str, values: Sequence[Any]) -> Coloring | None:
    """The most frequent labels. An item that has several is colored by the rarest of them, which says most."""
    sets = [{str(label) for label in (v if isinstance(v, list) else [v]) if label is not None} for v in values]
    counts = Counter(label for labels in sets for label in labels)
    legend = [label for label, count in counts.most_common(COLORS) if count > 1]
    if len(legend) < 2:
        return None
    place = {label: i for i, label in enumerate(legend)}
    color = [max((place[label] for label in labels if label in place), default=None) for labels in sets]
    return Coloring(column, legend, False, color)


def _by_quantity(column: str, values: Sequence[Any]) -> Coloring | None:
    """Bins of about as many items each."""
    numbers = np.array([np.nan if v is None else _number(v) for v in values])
    there = ~np.isnan(numbers)
    edges = (
        np.unique(np.quantile(numbers[there], np.linspace(0, 1, COLORS + 1), method="lower"))
        if there.any()
        else np.zeros(0)
    )
    if len(edges) < 3:
        return None
    bins = np.clip(np.searchsorted(edges, numbers, side="right") - 1, 0, len(edges) - 2)
    legend = [f"{low:.6g} to {high:.6g}" for low, high in pairwise(edges)]
    return Coloring(column, legend, True, [int(b) if ok else None for b, ok in zip(bins, there, strict=True)])


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _title(schema: FeatureSchema) -> str | None:
    named = {feature.name for feature in schema.features}
    return next((name for name in TITLES if name in named), None)


def _described(table: pa.Table, schema: FeatureSchema, row: int) -> tuple[str, str]:
    title = _title(schema)
    values = {f.name: table.column(f.name)[row].as_py() for f in schema.features}
    name = values.pop(title) if title else None
    told = [f"{column}: {_short(value)}" for column, value in values.items() if value is not None and value != []]
    return str(name or table.column(schema.id)[row].as_py()), "; ".join(told)


def _short(value: Any, longest: int = 60) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        more = f" and {len(value) - 3} more" if len(value) > 3 else ""
        return ", ".join(_short(v, 30) for v in value[:3]) + more
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"
