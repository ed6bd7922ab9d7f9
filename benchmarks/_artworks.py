"""Artworks for `benchmarks.quality`: how much of a row can be read back from 16 or 32 numbers.

Six nominal, four multi-label and five numeric columns of Tate's collection; of media and subjects the most frequent.
Two figures on held-out rows: the accuracy of the nominal columns, averaged over them, and micro-F1 of the labels of all
sets together.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn
from torch.nn import functional

from benchmarks._inner import without_judged
from itemvec.features import FIRST, MISSING, BagSlot
from itemvec.schema import FeatureSchema
from training.baselines import Recalled
from training.judged import Judged, plain_blocks

HELD_OUT = 0.2
DIMS = (16, 32)

SCHEMA = FeatureSchema.from_yaml(
    """
    name: artworks
    id: item_id
    features:
      classification: {kind: nominal}
      medium: {kind: nominal, max_labels: 50}
      artist_gender: {kind: nominal}
      artist_role: {kind: nominal}
      contributor_count: {kind: nominal, dtype: integer}
      group_type: {kind: nominal}
      movements: {kind: multi, max_labels: 100}
      subjects_l1: {kind: multi}
      subjects_l2: {kind: multi, max_labels: 100}
      subjects_l3: {kind: multi, max_labels: 100}
      artist_birth_year: {kind: numeric}
      year_start: {kind: numeric}
      acquisition_year: {kind: numeric}
      height_mm: {kind: numeric, scale: log}
      width_mm: {kind: numeric, scale: log}
    """
)

Floats = npt.NDArray[np.float32]
Scores = Mapping[str, Floats]
"""Per column of labels (m, its rows): above 0 for yes, and of a nominal one the highest is the answer."""

Figures = dict[str, float]


def schema(weights: Mapping[str, float]) -> FeatureSchema:
    """`weights` of columns that count otherwise than 1."""
    weighted = (f.model_copy(update={"weight": weights.get(f.name, 1.0)}) for f in SCHEMA.features)
    return SCHEMA.model_copy(update={"features": tuple(weighted)})


def read(data: Path, inner: bool = False) -> pa.Table:
    """All artworks; or with `inner` those that are not held out, a fifth of which is held out instead."""
    table = pq.read_table(data / "tate_artworks.parquet", columns=["item_id", *(f.name for f in SCHEMA.features)])
    return without_judged(table, "item_id", HELD_OUT) if inner else table


def figures(scores: Scores, truth: Mapping[str, Floats], kinds: Mapping[str, str]) -> Figures:
    """`truth` is (m, rows) of 0 and 1 per column. A missing label is no question, nor are the unseen ones of a set."""
    accuracies = []
    right = named = there = 0.0
    for name, kind in kinds.items():
        if kind == "nominal":
            answer, label = scores[name].copy(), truth[name].argmax(1)
            answer[:, MISSING] = -np.inf
            accuracies.append(float((answer.argmax(1) == label)[label != MISSING].mean()))
        else:
            said, true = scores[name][:, FIRST:] > 0, truth[name][:, FIRST:] > 0
            right, named, there = right + (said & true).sum(), named + said.sum(), there + true.sum()
    return {"accuracy": float(np.mean(accuracies)), "micro-F1": float(2 * right / max(named + there, 1))}


def kinds_of(model: Judged) -> dict[str, str]:
    return {slot.name: slot.kind for slot in model.layout.bags}


def truth_of(model: Judged, rows: npt.NDArray[np.int64]) -> dict[str, Floats]:
    blocks = plain_blocks(model, rows)
    return {slot.name: blocks[slot.name].toarray() for slot in model.layout.bags}


@torch.inference_mode()
def read_back(model: Judged, rows: npt.NDArray[np.int64]) -> Scores:
    """What our own decoder says of the vectors of `rows` (m,)."""
    parts = torch.split(torch.from_numpy(rows), 4096)
    hidden = torch.cat([model.decoder(model.encoder(*model.table.clean(part))) for part in parts])
    return {
        slot.name: model.decoder.rows(hidden, slice(slot.base, slot.base + slot.rows)).numpy()
        for slot in model.layout.bags
    }


def components(model: Judged, fit: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], dim: int) -> Scores:
    """PCA, decoded by the highest (nominal) and by one half (sets)."""
    recalled = Recalled.fit(plain_blocks(model, fit), dim)
    codes = recalled.codes(plain_blocks(model, rows))
    return {slot.name: recalled.column(codes, slot.name) - 0.5 for slot in model.layout.bags}


def autoencoder(
    model: Judged, fit: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], dim: int, steps: int = 5000
) -> Scores:
    """A plain one as one would first write it: the one-hot row, a hidden layer of 256 on either side, Adam, the sum of
    the columns' losses."""
    torch.manual_seed(0)
    blocks, places, at = plain_blocks(model, np.arange(model.table.n)), {}, 0
    for name, block in blocks.items():
        places[name], at = slice(at, at + block.shape[1]), at + block.shape[1]
    dense = [block if isinstance(block, np.ndarray) else block.toarray() for block in blocks.values()]
    x = torch.from_numpy(np.hstack(dense).astype(np.float32))
    net = nn.Sequential(
        nn.Linear(at, 256), nn.ReLU(), nn.Linear(256, dim), nn.Linear(dim, 256), nn.ReLU(), nn.Linear(256, at)
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses: dict[str, Callable[[Any, Any], Any]] = {
        "nominal": lambda answer, true: functional.cross_entropy(answer, true.argmax(1)),
        "multi": lambda answer, true: functional.binary_cross_entropy_with_logits(answer, true) * true.shape[1],
        "numeric": lambda answer, true: functional.mse_loss(answer, true) * true.shape[1],
    }
    for _ in range(steps):
        batch = x[torch.from_numpy(fit)[torch.randint(len(fit), (256,))]]
        answer = net(batch)
        loss = sum(losses[slot.kind](answer[:, places[slot.name]], batch[:, places[slot.name]]) for slot in model.slots)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.inference_mode():
        answer = net(x[torch.from_numpy(rows)]).numpy()
    return {slot.name: answer[:, places[slot.name]] for slot in model.slots if isinstance(slot, BagSlot)}
