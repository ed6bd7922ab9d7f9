"""Warm start: a run that begins with the weights of an earlier version, and ends in the same place of space.

At its first step the new network gives an item the vector that the old one gives it. Whatever was fitted anew since
then is made up for: a label keeps its row, wherever that is now; a new label has the row that the old version would
have read it as, the out-of-vocabulary one; numbers that are scaled otherwise are scaled back in the first layer; a
column that is gone counts as missing there; one that is new counts nothing until it is learned. Only what layers of
`encoder.cross` multiply is carried over without the shift of a new scale.

At the end the vectors are turned onto those of the old version (`align`), which changes no similarity between them.
"""

import copy
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from itemvec.bags import LabelColumn
from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder, turn
from itemvec.features import CHUNK, FIRST, MISSING, OOV, BagSlot, DenseSlot, FeatureTransform
from itemvec.schema import FeatureSchema
from itemvec.version import Manifest, ModelVersion
from training.config import TrainConfig
from training.data import Prepared
from training.folds import TRAIN, some
from training.ingest import BLOCK
from training.items import taken
from training.objectives import Reconstruct
from training.parent import Parent, Weights

FREE = {"dropout", "widths", "whiten", "centre", "nested"}
"""Settings of the encoder that may differ: the network has the same shape."""

REFITTED = {
    "weight", "filterable", "min_count", "max_labels", "labels", "hash_buckets", "scale", "bins", "clip", "cycles",
    "points", "max_length", "max_characters",
}  # fmt: skip
"""Settings of a column that may differ: what is read is the same, and how it became numbers is made up for."""

ALIGNED = 100_000
"""Training rows at most by which the new vectors are turned onto the old ones: more would turn them the same way."""

SCALED_ROWS = 8192
"""Training rows at most by which the scale of a column is compared."""

RIDGE = 1e-9
"""Share of the mean variance of floats that is added to each: those that say the same would make it infinite."""


def why_anew(parent: Manifest, config: TrainConfig) -> str:
    """Why a run cannot begin with the weights of `parent`; empty where it can."""
    if not config.warm:
        return "warm is off"
    for name in EncoderConfig.model_fields.keys() - FREE:
        new, old = getattr(config.encoder, name), getattr(parent.encoder, name)
        if new != old:
            return f"encoder.{name} was {_told(old)} and is {_told(new)}"
    for name in ("test", "validation"):
        new, old = getattr(config, name), parent.lineage.config.get(name, getattr(TrainConfig(), name))
        if new != old:  # rows that the old version learned from would be held out now
            return f"the share {name} was {old} and is {new}"
    return ""


def follow(
    parent: ModelVersion, table: pa.Table, data: Prepared, config: TrainConfig, folder: Path | None = None
) -> Parent:
    """What the run on `data`, which is `table` prepared, takes from `parent`. Vectors lie in a file without a name in
    `folder`, or where temporary files are: those of all rows may be more than memory holds."""
    readable = _readable(parent.schema, data.transform.schema, table)
    rows = vectors = basis = encoder = decoder = None
    if parent.dim == config.encoder.dim:
        wanted = np.arange(table.num_rows) if config.compatible else _aligned(data)
        rows, vectors = torch.from_numpy(wanted), _vectors(parent, readable, wanted, folder)
        basis = parent.decoder.basis.clone()
    if not why_anew(parent.manifest, config):
        encoder, decoder = _weights(parent, readable, data, config)
    return Parent(parent.version, rows, vectors, basis, encoder, decoder)


@torch.no_grad()
def align(encoder: ItemEncoder, decoder: Decoder, data: Prepared, at_once: int = 4096) -> None:
    """Turns the finished encoder's vectors onto those that the parent gives training rows (orthogonal Procrustes,
    Schoenemann 1966). Within the blocks between trained prefixes, so that each of them keeps its angles too."""
    parent, dim = data.parent, encoder.config.dim
    if parent is None or parent.rows is None or parent.vectors is None:
        return
    products = torch.zeros(dim, dim, dtype=torch.float64)
    for items in torch.split(torch.from_numpy(_aligned(data)), at_once):
        ours = encoder.eval()(*data.table.clean(items)).double()
        products += parent.vectors[torch.searchsorted(parent.rows, items)].double().T @ ours
    bounds = [0, *encoder.config.nested, dim]
    turns = []
    for first, last in itertools.pairwise(bounds):
        left, _, right = torch.linalg.svd(products[first:last, first:last])
        turns.append(left @ right)
    turn(encoder, decoder, torch.block_diag(*turns))  # type: ignore[no-untyped-call]


def _aligned(data: Prepared) -> npt.NDArray[np.int64]:
    return np.ascontiguousarray(some(np.flatnonzero(data.fold == TRAIN), ALIGNED))


def _vectors(parent: ModelVersion, readable: pa.Table, rows: npt.NDArray[np.int64], folder: Path | None) -> Tensor:
    """(m, dim) of the rows (m,), which ascend."""
    with tempfile.TemporaryFile(dir=folder) as file:  # what is mapped stays
        found = np.memmap(file, np.float32, shape=(len(rows), parent.dim))
    for start in range(0, readable.num_rows, BLOCK):
        first, end = np.searchsorted(rows, [start, start + BLOCK])
        block = readable.slice(start, BLOCK)
        for at in range(first, end, CHUNK):
            part = slice(at, min(at + CHUNK, end))
            found[part] = parent.encode_arrow(taken(block, rows[part] - start)).vectors
    return torch.from_numpy(found)


def _weights(parent: ModelVersion, readable: pa.Table, data: Prepared, config: TrainConfig) -> tuple[Weights, Weights]:
    """Of encoder and decoder on the new table."""
    old_encoder, old_decoder = copy.deepcopy(parent.encoder), copy.deepcopy(parent.decoder)
    turn(old_encoder, old_decoder, old_decoder.basis.double())  # as the losses saw it
    torch.manual_seed(config.seed)
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    Reconstruct(decoder, data.layout, data.marginals, {}, config.reconstruct).start_from_marginals()
    bags = _bags(parent.transform, data.transform, readable.column_names)
    scales = _scales(parent.transform, readable, data)
    with torch.no_grad():
        _carry_encoder(old_encoder, encoder, bags, scales)
        _carry_decoder(old_decoder, decoder, bags, scales)
    return encoder.state_dict(), decoder.state_dict()


def _readable(old: FeatureSchema, new: FeatureSchema, table: pa.Table) -> pa.Table:
    """The columns that both versions read alike; the old one takes the others for missing."""
    theirs = {feature.name: feature.model_dump(exclude=REFITTED) for feature in old.features}
    return table.select([f.name for f in new.features if theirs.get(f.name) == f.model_dump(exclude=REFITTED)])


Affine = tuple[Tensor, Tensor]
"""(v, w) and (v,): from w floats to v of them."""


@dataclass(frozen=True, slots=True)
class _Bag:
    """A column of labels or words that both versions have."""

    old: BagSlot
    new: BagSlot
    rows: Tensor
    """(new.rows,) for each of its rows now the one it had, both counted from the column's first"""


@dataclass(frozen=True, slots=True)
class _Scale:
    """A dense column that both versions have, and how its floats follow from each other where it is not missing."""

    old: DenseSlot
    new: DenseSlot
    to_old: Affine
    to_new: Affine
    """Only of those that are read back."""


def _bags(old: FeatureTransform, new: FeatureTransform, shared: Sequence[str]) -> list[_Bag]:
    slots = {slot.name: slot for slot in old.layout.bags}
    return [
        _Bag(slots[slot.name], slot, torch.tensor(_rows(old.column(slot.name), new.column(slot.name))))
        for slot in new.layout.bags
        if slot.name in shared
    ]


def _rows(old: Any, new: Any) -> list[int]:
    """Per row of a column, the row that the old version gives what falls into it."""
    if not isinstance(new, LabelColumn):
        return list(range(new.rows))
    before, now = old.vocabulary, new.vocabulary
    filled = before.filled if before.hash_buckets == now.hash_buckets else []
    buckets = [OOV] * now.hash_buckets
    for bucket in filled:
        buckets[bucket] = FIRST + len(before.labels) + bucket
    return [OOV, MISSING, *map(before.row, now.labels), *buckets]


def _scales(old: FeatureTransform, readable: pa.Table, data: Prepared) -> list[_Scale]:
    items = data.items(TRAIN)
    items = items[:: -(-len(items) // SCALED_ROWS)]
    before = torch.from_numpy(old.transform_arrow(taken(readable, items.numpy())).batch.dense).double()
    now = data.table.dense[items].double()
    slots, scales = {slot.name: slot for slot in old.layout.dense}, []
    for new in data.layout.dense:
        if new.name in readable.column_names:
            was = slots[new.name]
            there = (before[:, was.flag] == 0) & (now[:, new.flag] == 0)
            one, other = before[there, was.start : was.flag], now[there, new.start : new.flag]
            to_new = _affine(one[:, : was.targets], other[:, : new.targets])
            scales.append(_Scale(was, new, _affine(other, one), to_new))
    return scales


def _affine(x: Tensor, y: Tensor) -> Affine:
    """(m, w) -> (m, v) by least squares; of all that are as good, the one that is nearest to leaving x as it is."""
    same = torch.eye(y.shape[1], x.shape[1], dtype=torch.float64)
    if len(x) == 0:
        return same.float(), torch.zeros(y.shape[1])
    rest, centre = y - x @ same.T, x.mean(0)
    spread = (x - centre).T @ (x - centre)
    least = RIDGE * spread.diagonal().mean() + 1e-12
    slope = torch.linalg.solve(spread + least * torch.eye(len(spread)), (x - centre).T @ (rest - rest.mean(0))).T
    return (same + slope).float(), (rest.mean(0) - slope @ centre).float()


def _carry_encoder(old: ItemEncoder, new: ItemEncoder, bags: Sequence[_Bag], scales: Sequence[_Scale]) -> None:
    for bag in bags:
        new.table[bag.new.base : bag.new.base + bag.new.rows] = old.table[bag.old.base + bag.rows]
    # What the old network read is `reads @ x + shift` of what the new one reads; `place` is where each number of x was.
    reads = torch.zeros(_inputs(old), _inputs(new))
    shift, place = _all_missing(old), torch.full((_inputs(new),), -1)
    starts, new_starts = _starts(old), _starts(new)
    for bag in bags:
        f, g = old.layout.bags.index(bag.old), new.layout.bags.index(bag.new)
        width = min(starts[f + 1] - starts[f], new_starts[g + 1] - new_starts[g])
        at, was = torch.arange(width) + new_starts[g], torch.arange(width) + starts[f]
        reads[was, at], place[at] = 1.0, was
        shift[starts[f] : starts[f + 1]] = 0.0
    for scale in scales:
        slope, by = scale.to_old
        first, flag = starts[-1] + scale.old.start, starts[-1] + scale.old.flag
        new_first, new_flag = new_starts[-1] + scale.new.start, new_starts[-1] + scale.new.flag
        reads[first:flag, new_first:new_flag], shift[first:flag] = slope, by
        reads[first:flag, new_flag] = -by  # a missing value is 0 on every scale
        reads[flag, new_flag], shift[flag], place[new_flag] = 1.0, 0.0, flag
        width = min(slope.shape)
        place[new_first : new_first + width] = torch.arange(first, first + width)
    weights = {name: value.clone() for name, value in old.state_dict().items()} | {"table": new.table}
    _read_through(weights, reads, shift, place, new.config)
    new.load_state_dict(weights)


def _read_through(weights: Weights, reads: Tensor, shift: Tensor, place: Tensor, config: EncoderConfig) -> None:
    """Makes the layers that read the columns expect them as they come now."""
    first = "layers.0" if config.hidden else "out"
    weights[f"{first}.bias"] += weights[f"{first}.weight"] @ shift
    weights[f"{first}.weight"] = weights[f"{first}.weight"] @ reads
    if "skip.weight" in weights:
        weights["out.bias"] += weights["skip.weight"] @ shift
        weights["skip.weight"] = weights["skip.weight"] @ reads
    for i in range(config.cross):
        narrow, wide, bias = (f"cross.{i}.{name}" for name in ("narrow.weight", "wide.weight", "wide.bias"))
        weights[bias] += weights[wide] @ (weights[narrow] @ shift)
        weights[narrow] = weights[narrow] @ reads
        for name in (wide, bias):
            weights[name] = weights[name][place]
            weights[name][place < 0] = 0.0


def _carry_decoder(old: Decoder, new: Decoder, bags: Sequence[_Bag], scales: Sequence[_Scale]) -> None:
    by_row = ("row_weight", "row_bias", "dense_head", "basis")
    layers = {name: value for name, value in old.state_dict().items() if not name.startswith(by_row)}
    new.load_state_dict(layers, strict=False)
    for bag in bags:
        rows, old_rows = torch.arange(bag.new.rows), bag.old.base + bag.rows
        new.row_weight[bag.new.base + rows] = old.row_weight[old_rows]
        known = (bag.rows != OOV) | (rows == OOV)  # how frequent a new label is, its count says
        new.row_bias[bag.new.base + rows[known]] = old.row_bias[old_rows[known]]
    for scale in scales:
        assert old.dense_head is not None and new.dense_head is not None  # noqa: S101
        slope, by = scale.to_new
        was = slice(scale.old.start, scale.old.start + scale.old.targets)
        now = slice(scale.new.start, scale.new.start + scale.new.targets)
        new.dense_head.weight[now] = slope @ old.dense_head.weight[was]
        new.dense_head.bias[now] = slope @ old.dense_head.bias[was] + by
        new.dense_head.weight[scale.new.flag] = old.dense_head.weight[scale.old.flag]
        new.dense_head.bias[scale.new.flag] = old.dense_head.bias[scale.old.flag]


def _starts(encoder: ItemEncoder) -> list[int]:
    """Where each bag column's numbers begin in what the layers read, and last where the dense columns do."""
    bag = encoder.used // encoder.config.embedding_dim
    widths = torch.bincount(bag, minlength=len(encoder.layout.bags))
    return [0, *torch.cumsum(widths, 0).tolist()]


def _inputs(encoder: ItemEncoder) -> int:
    return len(encoder.used) + encoder.layout.dense_width


def _all_missing(encoder: ItemEncoder) -> Tensor:
    """(inputs,) of an item that lacks every column."""
    starts, x = _starts(encoder), torch.zeros(_inputs(encoder))
    for f, slot in enumerate(encoder.layout.bags):
        x[starts[f] : starts[f + 1]] = encoder.table[slot.base + MISSING, : starts[f + 1] - starts[f]]
    for dense in encoder.layout.dense:
        x[starts[-1] + dense.flag] = 1.0
    return x


def _told(value: Any) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
