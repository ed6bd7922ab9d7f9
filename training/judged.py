"""What an evaluation looks at: a trained encoder with its decoder, and the rows that it is measured on."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import scipy.sparse as sp
import torch
from torch import Tensor

from itemvec.encoder import Decoder, ItemEncoder
from itemvec.features import FIRST, BagSlot, DenseSlot, Layout
from itemvec.version import ModelVersion
from training.data import EncodedTable, Marginals, Prepared
from training.folds import TEST, TRAIN, some
from training.ingest import BLOCK, encode, stored
from training.items import taken

MEASURED = 1_000
"""Held-out rows that are measured at most; chosen by their place, so the same for every version of a model."""

SEARCHED = 2_000
"""Items that neighbors are searched among at most, the measured ones first."""

ENCODED_AT_ONCE = 512

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Judged:
    """A trained encoder with its decoder and the table as its own transform encodes it."""

    encoder: ItemEncoder
    decoder: Decoder
    layout: Layout
    table: EncodedTable
    marginals: Marginals

    @property
    def slots(self) -> Sequence[BagSlot | DenseSlot]:
        return [*self.layout.bags, *self.layout.dense]


def judged(data: Prepared, encoder: ItemEncoder, decoder: Decoder) -> Judged:
    return Judged(encoder.eval(), decoder.eval(), data.layout, data.table, data.marginals)


def judged_version(
    version: ModelVersion, table: pa.Table, fold: npt.NDArray[np.int8], only: Rows | None = None
) -> Judged:
    """A released model with a table as its own transform sees it: all of it, or `only` these rows, which are its items
    0, 1, 2, ... then. Raises SchemaMismatch."""
    layout = version.transform.layout
    parts = encode(table, version.transform)
    if only is not None:
        fold, blocks = fold[only], range(0, len(only), BLOCK)
        parts = (stored(version.transform.transform_table(taken(table, only[at : at + BLOCK]))) for at in blocks)
    with tempfile.TemporaryDirectory() as place:  # what is mapped stays, and takes no name
        EncodedTable.write(Path(place), parts, layout)
        encoded = EncodedTable.open(Path(place))
    marginals = Marginals.of(encoded, torch.from_numpy(np.flatnonzero(fold == TRAIN)), layout)
    return Judged(version.encoder, version.decoder, layout, encoded, marginals)


def measured_rows(fold: npt.NDArray[np.int8]) -> Rows:
    """The measured rows: of the test fold, or of the training fold where the table is so small that none fell into
    it."""
    rows = np.flatnonzero(fold == TEST)
    rows = rows if len(rows) >= 2 else np.flatnonzero(fold == TRAIN)
    return some(rows, MEASURED)


def searched_rows(fold: npt.NDArray[np.int8]) -> Rows:
    """The measured rows, and after them training rows up to SEARCHED in all."""
    measured = measured_rows(fold)
    train = fold == TRAIN
    train[measured] = False
    return np.concatenate([measured, some(np.flatnonzero(train), max(SEARCHED - len(measured), SEARCHED // 2))])


class Views:
    """The embeddings of some items: as they are, and with any one column hidden. Each is made once."""

    def __init__(self, model: Judged, items: Rows) -> None:
        self.model, self.items = model, items
        self._made: dict[str | None, Tensor] = {}

    @property
    def whole(self) -> Tensor:
        """(items, dim)"""
        return self.without(None)

    def without(self, column: str | None) -> Tensor:
        """(items, dim), with the column missing in all of them."""
        if column not in self._made:
            parts = torch.split(torch.from_numpy(self.items), ENCODED_AT_ONCE)
            self._made[column] = torch.cat([_embed(self.model, part, column) for part in parts])
        return self._made[column]


def _embed(model: Judged, items: Tensor, without: str | None) -> Tensor:
    bags = items[:, None].repeat(1, model.table.bag_count)
    dense = items[:, None].repeat(1, model.table.dense_slots)
    for slots, source in ((model.layout.bags, bags), (model.layout.dense, dense)):
        names = [slot.name for slot in slots]
        if without in names:
            source[:, names.index(without)] = model.table.all_missing
    vectors: Tensor = model.encoder(*model.table.gather(bags, dense))
    return vectors


def one_hot(model: Judged, slot: BagSlot, items: Rows | None = None) -> sp.csr_matrix:
    """(items, rows) of one bag column: a 1 for each of the column's rows that an item has. Of all items where none are
    named."""
    table, f = model.table, model.layout.bags.index(slot)
    items = np.arange(table.n) if items is None else items
    at_bag = items * table.bag_count + f
    starts, ends = table.starts.numpy()[at_bag], table.starts.numpy()[at_bag + 1]
    lengths = ends - starts
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    at = np.repeat(starts - bounds[:-1], lengths) + np.arange(bounds[-1])
    rows = table.rows.numpy()[at] - slot.base
    table.touched(len(items))
    return sp.csr_matrix((np.ones(len(rows), np.float32), rows, bounds), shape=(len(items), slot.rows))


def bags_of(model: Judged, items: Rows) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(items, F) how many rows of each bag column an item has, and the first of them: `OOV` or `MISSING` where it has
    no label that is known, counted from the column's own first row."""
    starts, rows = model.table.starts.numpy(), model.table.rows.numpy()
    bags = items[:, None] * model.table.bag_count + np.arange(model.table.bag_count)
    bases = np.array([slot.base for slot in model.layout.bags], np.int64)
    lengths, first = starts[bags + 1] - starts[bags], rows[starts[bags]] - bases
    model.table.touched(len(items))
    return lengths, first


def floats_of(model: Judged, slot: DenseSlot, items: Rows) -> Floats:
    """(items, width) of one dense column, its missing flag last."""
    floats: Floats = model.table.dense[torch.from_numpy(items)][:, slot.start : slot.start + slot.width].numpy()
    model.table.touched(len(items))
    return floats


def plain_blocks(model: Judged, items: Rows) -> dict[str, Any]:
    """Per column the plain encoding of the items: one-/multi-hot as (items, rows) in CSR, scaled numbers (items,
    width)."""
    return {
        slot.name: one_hot(model, slot, items) if isinstance(slot, BagSlot) else floats_of(model, slot, items)
        for slot in model.slots
    }


@dataclass(frozen=True, slots=True)
class Labels:
    """Who has which label of a column: `labels[items]` is (items, labels)."""

    model: Judged
    slot: BagSlot

    def __getitem__(self, items: Rows) -> sp.csr_matrix:
        return one_hot(self.model, self.slot, items)[:, FIRST:]


def truth_of(model: Judged) -> dict[str, Labels]:
    """Per column of labels who has which. The judge of retrieval, also of a model with another vocabulary."""
    return {slot.name: Labels(model, slot) for slot in model.layout.bags if slot.kind in {"nominal", "multi"}}
