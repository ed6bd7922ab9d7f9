"""An item table as tensors on disk: encoded once, memory-mapped by every worker, gathered into batches.

    fold_of(ids)          which fold each row belongs to, for ever
    EncodedTable          what FeatureTransform made of a table, plus two made-up items: one with every column missing,
    one
                          with every label unseen
    EncodedTable.gather   a batch in which column c of row b comes from item source[b, c]
    Prepared              all that the loop needs of a table, as a folder

The gather is the only way a batch is made. A clean batch has one source per row; swap noise is another item as the
source of some columns, mask noise the item in which all is missing.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from itemvec.check import require_fit
from itemvec.errors import TableError
from itemvec.features import MISSING, OOV, Batch, FeatureTransform, Layout
from itemvec.schema import FeatureSchema
from training import losses, targets
from training.config import CorruptionConfig, TrainConfig
from training.folds import TRAIN, fold_of
from training.interactions import Interactions
from training.parent import Parent
from training.targets import Target

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]
"""dense (B, D), indices (nnz,), weights (nnz,), lengths (B, F): the order of `ItemEncoder.forward`."""


@dataclass(frozen=True, slots=True)
class EncodedTable:
    """n items and two made-up ones behind them; F bag columns, D dense floats. Rows of the shared embedding table as
    int32."""

    dense: Tensor
    """(n + 2, D)"""

    rows: Tensor
    """(nnz,) item by item, bag by bag"""

    starts: Tensor
    """((n + 2) F + 1,) where each bag begins in `rows`"""

    weights: Tensor
    """(n + 2, F) what each row of a bag counts in the bag's sum"""

    slot_of_dense: Tensor
    """(D,) the dense slot that each float belongs to"""

    @property
    def n(self) -> int:
        return len(self.dense) - 2

    @property
    def all_missing(self) -> int:
        """The item in which every column is missing."""
        return self.n

    @property
    def all_unseen(self) -> int:
        """The item in which every label is out of vocabulary."""
        return self.n + 1

    @property
    def bag_count(self) -> int:
        return self.weights.shape[1]

    @property
    def dense_slots(self) -> int:
        return int(self.slot_of_dense.max()) + 1 if len(self.slot_of_dense) else 0

    @classmethod
    def of(cls, batch: Batch, layout: Layout) -> "EncodedTable":
        return cls(**{name: torch.from_numpy(array) for name, array in _arrays(batch, layout).items()})

    @staticmethod
    def write(folder: Path, batch: Batch, layout: Layout) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, array in _arrays(batch, layout).items():
            np.save(folder / f"{name}.npy", array)

    @classmethod
    def open(cls, folder: Path) -> "EncodedTable":
        """Memory-mapped: workers of one machine share the pages, and only what a batch needs is read."""
        # Copy-on-write rather than read-only, because torch warns of arrays that it could not write to.
        return cls(**{name: _mapped(folder / f"{name}.npy") for name in cls.__dataclass_fields__})

    def to(self, device: torch.device) -> "EncodedTable":
        return EncodedTable(**{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in self.__dataclass_fields__)

    def clean(self, items: Tensor) -> Tensors:
        """The batch of these items (B,) as they are."""
        return self.gather(items[:, None].expand(-1, self.bag_count), items[:, None].expand(-1, self.dense_slots))

    def gather(self, bags: Tensor, dense: Tensor) -> Tensors:
        """bags (B, F) and dense (B, number of dense slots) name the item that each column is taken from."""
        bag = bags * self.bag_count + torch.arange(self.bag_count, device=bags.device)  # (B, F)
        start = self.starts[bag].reshape(-1)
        lengths = self.starts[bag + 1].reshape(-1) - start
        ends = lengths.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        shift = torch.repeat_interleave(start - (ends - lengths), lengths, output_size=total)
        indices = self.rows[shift + torch.arange(total, device=bags.device)].long()
        weights = torch.repeat_interleave(self.weights.gather(0, bags).reshape(-1), lengths, output_size=total)
        values = (
            self.dense.gather(0, dense[:, self.slot_of_dense])
            if self.dense_slots
            else self.dense[dense[:, 0] if dense.shape[1] else bags[:, 0]]
        )
        return values, indices, weights, lengths.view(len(bags), self.bag_count)


def _mapped(path: Path) -> Tensor:
    empty = np.load(path, mmap_mode="r").size == 0  # a file without data cannot be mapped for writing
    return torch.from_numpy(np.load(path, mmap_mode=None if empty else "c"))


def _arrays(batch: Batch, layout: Layout) -> dict[str, npt.NDArray[Any]]:
    """The fields of EncodedTable, with the two made-up items behind the last row."""
    bags = len(layout.bags)
    bases = np.array([slot.base for slot in layout.bags], np.int64)
    dense = np.zeros((len(batch) + 2, layout.dense_width), np.float32)
    dense[: len(batch)] = batch.dense
    for slot in layout.dense:
        dense[-2:, slot.flag] = 1.0  # an unseen number is a missing one
    lengths = np.concatenate([batch.lengths.ravel(), np.ones(2 * bags, np.int32)])
    ends = np.cumsum(batch.lengths.ravel(), dtype=np.int64)
    weights = np.ones((len(batch) + 2, bags), np.float32)
    if bags:
        # Every row of a bag counts the same, so the weight of its last one is the bag's.
        weights[: len(batch)] = batch.weights[ends - 1].reshape(len(batch), bags)
    # Texts have no unseen labels, they are hashed: the nearest that can happen to one is to be missing.
    unseen = np.array([MISSING if slot.kind == "text" else OOV for slot in layout.bags], np.int64)
    return {
        "dense": dense,
        "rows": np.concatenate([batch.indices, bases + MISSING, bases + unseen]).astype(np.int32),
        "starts": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
        "weights": weights,
        "slot_of_dense": np.array([s for s, slot in enumerate(layout.dense) for _ in range(slot.width)], np.int64),
    }


def corrupt(
    table: EncodedTable,
    items: Tensor,
    others: Tensor,
    how: CorruptionConfig,
    layout: Layout,
    generator: torch.Generator,
) -> Tensors:
    """The batch of `items` (B,), damaged. `others` (m,) are the items that swapped columns may come from."""
    device, b = items.device, len(items)
    columns = table.bag_count + table.dense_slots
    draw = torch.rand(b, columns, generator=generator, device=device)
    donors = others[torch.randint(len(others), (b, columns), generator=generator, device=device)]
    source = items[:, None].expand(b, columns).clone()
    source = torch.where(draw < how.swap, donors, source)
    source = torch.where((draw >= how.swap) & (draw < how.swap + how.mask), table.all_missing, source)
    if how.unseen:  # also for columns of which single labels make no sense, the ordinal ones
        source = torch.where(draw > 1 - how.unseen, table.all_unseen, source)
    spared = torch.rand(b, generator=generator, device=device) < how.whole
    source = torch.where(spared[:, None], items[:, None], source)
    dense, indices, weights, lengths = table.gather(source[:, : table.bag_count], source[:, table.bag_count :])
    indices, weights = _damage_labels(indices, weights, lengths, spared, how, layout, generator)
    return dense, indices, weights, lengths


def _damage_labels(
    indices: Tensor, weights: Tensor, lengths: Tensor, spared: Tensor, how: CorruptionConfig, layout: Layout,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Takes some labels out of their sets and makes others unseen ones, but for the items `spared` (B,).

    What is left counts as serving would count it: a set of m distinct rows weighs 1/sqrt(m) each, and several unseen
    labels are one row. A label that is out keeps its place with weight 0.
    """
    if len(indices) == 0 or not (how.thin or how.unseen):
        return indices, weights
    device = indices.device
    sizes = lengths.reshape(-1)
    bag = torch.repeat_interleave(torch.arange(len(sizes), device=device), sizes, output_size=len(indices))
    column = bag % lengths.shape[1]
    is_set = torch.tensor([slot.kind in ("multi", "text") for slot in layout.bags], device=device)[column]
    has_labels = torch.tensor([slot.kind in ("nominal", "multi") for slot in layout.bags], device=device)[column]
    base = torch.tensor([slot.base for slot in layout.bags], device=device)[column]
    draw = torch.rand(len(indices), generator=generator, device=device)
    damaged = ~spared[bag // lengths.shape[1]]
    unseen = damaged & has_labels & (draw < how.unseen) & (indices != base + MISSING)
    indices = torch.where(unseen, base + OOV, indices)
    kept = ~(damaged & is_set & (draw > 1 - how.thin))
    unseen_here = indices == base + OOV
    before = (unseen_here & kept).long().cumsum(0)
    starts = sizes.cumsum(0) - sizes
    before_bag = (before - (unseen_here & kept).long())[starts.clamp(max=max(len(indices) - 1, 0))][bag]
    kept &= ~(unseen_here & (before - before_bag > 1))
    left = torch.zeros(len(sizes), device=device).index_add_(0, bag, kept.float())
    emptied = (left == 0)[bag]
    kept, left = kept | emptied, torch.where(left == 0, sizes.float(), left)
    scale = (sizes.float() / left).sqrt()[bag]
    return indices, torch.where(kept, weights * torch.where(is_set, scale, 1.0), 0.0)


@dataclass(frozen=True, slots=True)
class Marginals:
    """What the training rows are like before anything is learned: the best that a constant answer can know."""

    count: Tensor
    """(table rows,) how many training items have each row"""

    centre: Tensor
    """(D,) the constant with the least Huber loss over the present values; for a missing flag the share of missing"""

    spread: Tensor
    """(D,) that least loss, per training item; for a flag its entropy"""

    n: int

    @classmethod
    def of(cls, table: EncodedTable, items: Tensor, layout: Layout, chunk: int = 65_536) -> "Marginals":
        count = torch.zeros(layout.table_rows, dtype=torch.float64)
        for part in torch.split(items, chunk):
            _, indices, _, _ = table.clean(part)
            count += torch.bincount(indices, minlength=layout.table_rows)
        some = table.dense[items[:: max(1, len(items) // 100_000)]].double()
        centre, spread = (
            torch.zeros(some.shape[1], dtype=torch.float64),
            torch.zeros(some.shape[1], dtype=torch.float64),
        )
        for slot in layout.dense:
            flag = slot.flag
            present = some[:, flag] == 0
            share = (1 - present.double().mean()).clamp(1e-4, 1 - 1e-4)
            centre[flag] = share
            spread[flag] = -(share * share.log() + (1 - share) * (1 - share).log())
            for column in range(slot.start, flag):
                values = some[present, column]
                centre[column] = losses.best_huber_constant(values)
                spread[column] = losses.huber(values[:, None], centre[column].expand(len(values), 1)).sum() / max(
                    len(some), 1
                )
        return cls(count.float(), centre.float(), spread.float(), len(items))

    def save(self, path: Path) -> None:
        np.savez(path, count=self.count.numpy(), centre=self.centre.numpy(), spread=self.spread.numpy(), n=self.n)

    @classmethod
    def load(cls, path: Path) -> "Marginals":
        with np.load(path) as f:
            count, centre, spread = (torch.from_numpy(f[name]) for name in ("count", "centre", "spread"))
            return cls(count, centre, spread, int(f["n"]))


MIN_TRAIN_ROWS: Final = 8


@dataclass(frozen=True, slots=True)
class Prepared:
    """A table made ready for the loop: read, checked, fitted and encoded once, by the driver; opened by every
    worker."""

    transform: FeatureTransform
    table: EncodedTable
    fold: npt.NDArray[np.int8]
    """(n,)"""

    marginals: Marginals

    targets: tuple[Target, ...] = ()

    interactions: Interactions | None = None

    gains: Mapping[str, float] = field(default_factory=dict)
    """Per column how much it counts in the components that training starts from; 1 where nothing is said."""

    parent: Parent | None = None
    """The version that this run follows."""

    @property
    def layout(self) -> Layout:
        return self.transform.layout

    def items(self, fold: int) -> Tensor:
        """The rows of a fold."""
        return torch.from_numpy(np.flatnonzero(self.fold == fold))

    @classmethod
    def make(
        cls, table: pa.Table, schema: FeatureSchema, config: TrainConfig, folder: Path, source: str = "the table"
    ) -> "Prepared":
        """Raises SchemaMismatch where the table does not fit the schema, TableError where it has too few rows."""
        require_fit(table, schema, source)
        fold = fold_of([str(i) for i in table.column(schema.id).to_pylist()], config.test, config.validation)
        train = np.flatnonzero(fold == TRAIN)
        if len(train) < MIN_TRAIN_ROWS:
            raise TableError(
                f"{source} leaves {len(train)} of its {table.num_rows} rows to train on; {MIN_TRAIN_ROWS} are the least"
            )
        transform = FeatureTransform.fit(table.take(train), schema, source)
        encoded = transform.transform_table(table)
        aims = targets.fit(table, schema, config.predict, train)
        folder.mkdir(parents=True, exist_ok=True)
        schema.save(folder / "schema.yaml")
        transform.save(folder / "transform")
        EncodedTable.write(folder / "table", encoded, transform.layout)
        np.save(folder / "fold.npy", fold)
        targets.save(aims, folder / "targets")
        opened = EncodedTable.open(folder / "table")
        marginals = Marginals.of(opened, torch.from_numpy(train), transform.layout)
        marginals.save(folder / "marginals.npz")
        return cls(transform, opened, fold, marginals, aims)

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        transform = FeatureTransform.load(folder / "transform", FeatureSchema.load(folder / "schema.yaml"))
        marginals = Marginals.load(folder / "marginals.npz")
        aims, fold = targets.load(folder / "targets"), np.load(folder / "fold.npy")
        likes = Interactions.open(folder / "likes.npz", fold)
        gains = json.loads(path.read_text()) if (path := folder / "gains.json").exists() else {}
        parent = Parent.open(folder / "parent")
        return cls(transform, EncodedTable.open(folder / "table"), fold, marginals, aims, likes, gains, parent)

    def with_likes(self, interactions: Interactions, gains: Mapping[str, float], folder: Path) -> "Prepared":
        """The same with what users liked, also for those who open the folder."""
        interactions.save(folder / "likes.npz")
        (folder / "gains.json").write_text(json.dumps(dict(gains)))
        return replace(self, interactions=interactions, gains=gains)

    def with_parent(self, parent: Parent, folder: Path) -> "Prepared":
        """The same with what is taken from an earlier version, also for those who open the folder."""
        parent.save(folder / "parent")
        return replace(self, parent=parent)
