"""An item table as tensors on disk: encoded once, memory-mapped by every worker, gathered into batches.

    EncodedTable          what FeatureTransform made of a table, plus two made-up items: one with every column missing,
    one
                          with every label unseen
    EncodedTable.gather   a batch in which column c of row b comes from item source[b, c]
    Prepared              all that the loop needs of a table, as a folder

The gather is the only way a batch is made. A clean batch has one source per row; swap noise is another item as the
source of some columns, mask noise the item in which all is missing.
"""

import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from itemvec.features import MISSING, OOV, Batch, FeatureTransform, Layout
from itemvec.schema import FeatureSchema
from training import losses, targets
from training.config import CorruptionConfig, TrainConfig
from training.folds import TRAIN
from training.ingest import Stored, encode, encoded_at, fit, stored
from training.interactions import Interactions
from training.items import ENCODED, written_whole
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

    pages: "Pages | None" = None
    """Of the files that it is mapped from, if it is."""

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
        parts = [stored(part) for part in (batch, _made_up(layout))]
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        whole["starts"] = np.concatenate([[0], np.cumsum(whole.pop("lengths"), dtype=np.int64)])
        whole["slot_of_dense"] = _slot_of_dense(layout)
        tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in whole.items()}
        return cls(**tensors)

    @staticmethod
    def write(folder: Path, blocks: Iterable[Stored], layout: Layout) -> None:
        """What `open` opens, block by block."""
        folder.mkdir(parents=True, exist_ok=True)
        bags, end = len(layout.bags), 0
        with (
            Appended(folder / "dense.npy", np.float32, (layout.dense_width,)) as dense,
            Appended(folder / "rows.npy", np.int32) as rows,
            Appended(folder / "starts.npy", np.int64) as starts,
            Appended(folder / "weights.npy", np.float32, (bags,)) as weights,
        ):
            starts.append(np.zeros(1, np.int64))
            for part in chain(blocks, [stored(_made_up(layout))]):
                dense.append(part["dense"])
                rows.append(part["rows"])
                weights.append(part["weights"])
                starts.append(end + np.cumsum(part["lengths"], dtype=np.int64))
                end += len(part["rows"])
        np.save(folder / "slot_of_dense.npy", _slot_of_dense(layout))

    @classmethod
    def open(cls, folder: Path) -> "EncodedTable":
        """Memory-mapped: workers of one machine share the pages, and only what a batch needs is read."""
        pages = Pages()
        mapped: dict[str, Any] = {name: pages.of(folder / f"{name}.npy") for name in TENSORS}
        return cls(**mapped, pages=pages)

    def to(self, device: torch.device) -> "EncodedTable":
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in TENSORS}
        return EncodedTable(**moved)

    def touched(self, items: int) -> None:
        """Said after so many were read, here or past `gather`: they need not stay in the memory of this process."""
        if self.pages is not None:
            self.pages.touched(items)

    def nbytes(self) -> int:
        return sum(getattr(self, name).nbytes for name in TENSORS)

    def clean(self, items: Tensor) -> Tensors:
        """The batch of these items (B,) as they are."""
        parts = [
            self.gather(part[:, None].expand(-1, self.bag_count), part[:, None].expand(-1, self.dense_slots))
            for part in torch.split(items, TOUCHED)  # of a mapped table no more than that is in memory at once
        ]
        if len(parts) == 1:
            return parts[0]
        dense, indices, weights, lengths = (torch.cat(same) for same in zip(*parts, strict=True))
        return dense, indices, weights, lengths

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
        self.touched(len(bags))
        return values, indices, weights, lengths.view(len(bags), self.bag_count)


TENSORS = tuple(name for name in EncodedTable.__dataclass_fields__ if name != "pages")

RESIDENT = 1 << 30
"""Bytes of a mapped table that may all stay in the memory of a process."""

TOUCHED = 2048
"""Items after which the pages of a larger one are let go of. Linux maps 64 KiB around each that is touched."""


class Pages:
    """The mapped files of a table. What is read of them counts as memory of the process for as long as it is mapped;
    let go of, it stays in the cache of the system for as long as nothing else needs the room."""

    def __init__(self) -> None:
        self._maps: list[mmap.mmap] = []
        self._size = self._touched = 0

    def of(self, path: Path) -> Tensor:
        """The array in a .npy file of ours."""
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            begin = file.tell()
            # Copy-on-write rather than read-only, because torch warns of arrays that it could not write to.
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if math.prod(shape) == 0:
            return torch.from_numpy(np.zeros(shape, dtype))
        self._maps.append(whole)
        self._size += len(whole)
        return torch.from_numpy(np.frombuffer(whole, dtype, offset=begin).reshape(shape))

    def touched(self, items: int) -> None:
        self._touched += items
        if self._size > RESIDENT and self._touched > TOUCHED:
            self._touched = 0
            for whole in self._maps:
                whole.madvise(mmap.MADV_DONTNEED)


class Appended:
    """A .npy file that grows: `append` adds to the first dimension, whose length is written when the file is closed."""

    def __init__(self, path: Path, dtype: npt.DTypeLike, width: tuple[int, ...] = ()) -> None:
        self._dtype, self._width, self._length = np.dtype(dtype), width, 0
        self._file = path.open("wb")
        self._write_header()

    def __enter__(self) -> "Appended":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def append(self, array: npt.NDArray[Any]) -> None:
        self._length += len(array)
        self._file.write(np.ascontiguousarray(array, self._dtype).data)

    def _write_header(self) -> None:
        # NumPy pads the header so that it is as long whatever the first dimension is.
        shape = (self._length, *self._width)
        about = {"descr": self._dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, about)


def _made_up(layout: Layout) -> Batch:
    """The item in which all is missing, and that in which every label is unseen."""
    dense = np.zeros((2, layout.dense_width), np.float32)
    for slot in layout.dense:
        dense[:, slot.flag] = 1.0  # an unseen number is a missing one
    bases = np.array([slot.base for slot in layout.bags], np.int64)
    # Texts have no unseen labels, they are hashed: the nearest that can happen to one is to be missing.
    unseen = np.array([MISSING if slot.kind == "text" else OOV for slot in layout.bags], np.int64)
    rows = np.concatenate([bases + MISSING, bases + unseen])
    return Batch(dense, rows, np.ones(len(rows), np.float32), np.ones((2, len(bases)), np.int32))


def _slot_of_dense(layout: Layout) -> npt.NDArray[np.int64]:
    return np.array([s for s, slot in enumerate(layout.dense) for _ in range(slot.width)], np.int64)


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
    """(D,) the constant with the least Huber loss over the present values; for a missing flag the share of missing; 0
    where nothing is read back"""

    spread: Tensor
    """(D,) that least loss, per training item; for a flag its entropy"""

    n: int

    @classmethod
    def of(cls, table: EncodedTable, items: Tensor, layout: Layout, chunk: int = 65_536) -> "Marginals":
        """Of each item at most once."""
        wanted, count = torch.zeros(table.n, dtype=torch.bool), torch.zeros(layout.table_rows, dtype=torch.float64)
        wanted[items] = True
        bags = table.bag_count
        blocks = torch.split(torch.arange(table.n), chunk) if bags else ()
        for part in blocks:  # as they lie in the file, which is many times quicker than item by item
            first, last = int(part[0]), int(part[-1]) + 1
            bounds = table.starts[first * bags : last * bags + 1 : bags]
            rows = table.rows[int(bounds[0]) : int(bounds[-1])]
            mine = rows[torch.repeat_interleave(wanted[first:last], bounds.diff(), output_size=len(rows))]
            count += torch.bincount(mine, minlength=layout.table_rows)
            table.touched(len(part))
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
            for column in range(slot.start, slot.start + slot.targets):
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
        cls, table: pa.Table, schema: FeatureSchema, config: TrainConfig, folder: Path, source: str = "the table",
        copy: Path | None = None, spread: bool = False,
    ) -> "Prepared":  # fmt: skip
        """Where `table` is mapped from `copy`, what is encoded of it lies beside that file, and is used again where an
        earlier run with the same schema and folds did it. `spread` is as in `ingest.fit`. Raises SchemaMismatch where
        the table does not fit the schema, TableError where it has too few rows."""
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / "items" if copy is None else encoded_at(copy, schema, config.test, config.validation)
        if not place.exists():
            with written_whole(place) as part:
                cls._encode(table, schema, config, part, source, copy, spread)
        (folder / ENCODED).write_text(os.path.relpath(place, folder))
        fold = np.load(place / "fold.npy")
        targets.save(targets.fit(table, schema, config.predict, np.flatnonzero(fold == TRAIN)), folder / "targets")
        return cls.open(folder)

    @staticmethod
    def _encode(
        table: pa.Table, schema: FeatureSchema, config: TrainConfig, folder: Path, source: str, copy: Path | None,
        spread: bool,
    ) -> None:  # fmt: skip
        transform, fold = fit(table, schema, config.test, config.validation, folder, source, copy, spread)
        EncodedTable.write(folder / "table", encode(table, transform, folder, copy, spread), transform.layout)
        train = torch.from_numpy(np.flatnonzero(fold == TRAIN))
        Marginals.of(EncodedTable.open(folder / "table"), train, transform.layout).save(folder / "marginals.npz")

    @classmethod
    def open(cls, folder: Path) -> "Prepared":
        place = folder / (folder / ENCODED).read_text()
        transform = FeatureTransform.load(place / "transform", FeatureSchema.load(place / "schema.yaml"))
        table, marginals = EncodedTable.open(place / "table"), Marginals.load(place / "marginals.npz")
        aims, fold = targets.load(folder / "targets"), np.load(place / "fold.npy")
        likes = Interactions.open(folder / "likes.npz", fold)
        gains = json.loads(path.read_text()) if (path := folder / "gains.json").exists() else {}
        return cls(transform, table, fold, marginals, aims, likes, gains, Parent.open(folder / "parent"))

    def with_likes(self, interactions: Interactions, gains: Mapping[str, float], folder: Path) -> "Prepared":
        """The same with what users liked, also for those who open the folder."""
        interactions.save(folder / "likes.npz")
        (folder / "gains.json").write_text(json.dumps(dict(gains)))
        return replace(self, interactions=interactions, gains=gains)

    def with_parent(self, parent: Parent, folder: Path) -> "Prepared":
        """The same with what is taken from an earlier version, also for those who open the folder."""
        parent.save(folder / "parent")
        return replace(self, parent=parent)
