"""Where training starts: at the principal components of the columns, so that it begins with what a linear method knows.

Columns are brought to one total variance each, so that none outweighs the others by its number of labels, times a gain.
Where users' likes are known the gains follow from them: how much each column has to count for the items that a user
liked to be close to the next one (`gains_from`). That takes a number a column to learn, which a few thousand likes can
teach, where the hundreds of thousands of weights of an encoder would only learn them by heart.

The encoder's table then holds each column's part of the leading `dim` components, and its linear path adds them up.
Principal components come in order of their variance, so prefixes of the embedding are embeddings from the start.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.nn import functional

from itemvec.encoder import ItemEncoder
from itemvec.features import FIRST, OOV, BagSlot, DenseSlot
from training.data import EncodedTable, Prepared
from training.folds import TRAIN
from training.interactions import Interactions

ROWS = 100_000
"""Training rows that the components are of at most."""

ITERATIONS = 5
SPARE = 16
"""Directions more than wanted in the subspace iteration (Halko et al. 2011)."""

ROUNDING = 1e-3
"""Share of the largest deviation below which there is none."""

OUTER = 0.1
"""Share of its usual size that the hidden path starts with, beside the components."""

GAIN_ROUNDS, GAIN_USERS, GAIN_LIKES, GAIN_STEPS = 6, 256, 6, 80
GAIN_DECAY = 0.01

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Blocks:
    """m items as one wide row each: the rows of the table, then the dense floats. Column by column of one total
    variance around the mean."""

    items: sp.csr_matrix
    """(m, table rows + D), not centred"""

    mean: Floats
    """(table rows + D,)"""

    scale: Floats
    """(table rows + D,) what a value was multiplied by"""

    @classmethod
    def of(cls, data: Prepared, items: Tensor) -> "Blocks":
        wide = _wide(data.table, items, data.layout.table_rows)
        mean = np.asarray(wide.mean(0), np.float64).ravel()
        variance = np.asarray(wide.multiply(wide).mean(0), np.float64).ravel() - mean**2
        scale = np.ones(wide.shape[1])
        for column in columns(data):
            scale[column.place] = 1 / np.sqrt(max(variance[column.place].sum(), 1e-9))
        return cls((wide @ sp.diags(scale)).tocsr().astype(np.float32), _small(mean * scale), _small(scale))


@dataclass(frozen=True, slots=True)
class Column:
    slot: BagSlot | DenseSlot
    place: slice
    """Among the numbers of a wide row."""


def columns(data: Prepared) -> list[Column]:
    rows = data.layout.table_rows
    bags = [Column(slot, slice(slot.base, slot.base + slot.rows)) for slot in data.layout.bags]
    dense = [Column(slot, slice(rows + slot.start, rows + slot.start + slot.width)) for slot in data.layout.dense]
    return [*bags, *dense]


def start_from_components(encoder: ItemEncoder, data: Prepared, seed: int = 0) -> None:
    """Sets the table and the linear path so that the encoder gives the leading `dim` principal components of the
    training rows; a column counts by its gain, 1 where the data has none."""
    items = data.items(TRAIN)
    blocks = Blocks.of(data, items[:: -(-len(items) // ROWS)])
    by_gain = np.ones(len(blocks.scale), np.float32)
    for column in columns(data):
        by_gain[column.place] = data.gains.get(column.slot.name, 1.0) ** 0.5
    weighted, mean = (blocks.items @ sp.diags(by_gain)).tocsr(), blocks.mean * by_gain
    components = _components(weighted, mean, encoder.config.dim, seed)
    loading = components * (blocks.scale * by_gain)[:, None]  # (table rows + D, dim): from raw numbers
    _fill_in_unseen(loading, blocks, data)
    length = np.sqrt(np.square(weighted @ components - mean @ components).sum(1).mean())
    _place(encoder, _small(loading / max(length, 1e-9)), data)


def _wide(table: EncodedTable, items: Tensor, rows: int) -> sp.csr_matrix:
    dense, indices, weights, lengths = table.clean(items)
    bounds = np.concatenate([[0], np.cumsum(lengths.sum(1).numpy())])
    bags = sp.csr_matrix((weights.numpy(), indices.numpy(), bounds), shape=(len(items), rows))
    return sp.hstack([bags, sp.csr_matrix(dense.numpy())], format="csr", dtype=np.float32)


def _components(items: sp.csr_matrix, mean: Floats, dim: int, seed: int) -> Floats:
    """(m, w) sparse -> (w, dim) orthonormal directions of the largest variance around the mean, largest first.

    By subspace iteration (Halko et al. 2011), centred on the fly: a dense copy would not fit. Beyond the rank of the
    items they are zeros.
    """

    def project(directions: Tensor) -> Tensor:  # (w, d) -> (m, d)
        there = directions.numpy()
        return torch.from_numpy(items @ there - (mean @ there)[None])

    def back(scores: Tensor) -> Tensor:  # (m, d) -> (w, d)
        here = scores.numpy()
        return torch.from_numpy(items.T @ here - np.outer(mean, here.sum(0)).astype(np.float32))

    width = min(dim + SPARE, *items.shape)
    directions = torch.randn(items.shape[1], width, generator=torch.Generator().manual_seed(seed))
    for _ in range(ITERATIONS):
        directions = torch.linalg.qr(back(torch.linalg.qr(project(directions))[0]))[0]
    _, size, rotation = torch.linalg.svd(project(directions), full_matrices=False)
    found = (directions @ rotation.T * (size > ROUNDING * size[0]))[:, :dim]
    return functional.pad(found, (0, dim - found.shape[1])).numpy()


def _fill_in_unseen(loading: Floats, blocks: Blocks, data: Prepared) -> None:
    """A row of the table that no item had gets what its column's rows are on average: it says nothing."""
    seen = np.diff(blocks.items.tocsc().indptr) > 0
    for column in columns(data):
        if isinstance(column.slot, BagSlot):
            raw = blocks.mean[column.place] / blocks.scale[column.place]
            loading[column.place][~seen[column.place]] = raw @ loading[column.place]


@torch.no_grad()
def unseen_as_unknown(encoder: ItemEncoder, data: Prepared) -> None:
    """When training is over: a label that the schema names and no training item has gets the row of unknown labels,
    which was trained, where its own never was."""
    for slot in data.layout.bags:
        if slot.kind in ("nominal", "multi"):
            rows = slice(slot.base + FIRST, slot.base + slot.rows)
            encoder.table[rows][data.marginals.count[rows] == 0] = encoder.table[slot.base + OOV]


@torch.no_grad()
def _place(encoder: ItemEncoder, loading: Floats, data: Prepared) -> None:
    """Each column's loading (rows, dim), as well as its width in the table allows, in two factors."""
    widest = encoder.config.embedding_dim
    linear = torch.zeros(encoder.config.dim, len(encoder.used) + data.layout.dense_width)
    at = 0
    for f, slot in enumerate(data.layout.bags):
        width = int((encoder.used // widest == f).sum())
        rows = slice(slot.base, slot.base + slot.rows)
        left, size, right = torch.linalg.svd(torch.from_numpy(loading[rows]), full_matrices=False)
        kept = min(width, len(size))
        table = left[:, :kept] * size[:kept]
        gain = 1 / table.square().sum(1).mean().sqrt().clamp(min=1e-9)  # rows of length 1, as where nothing is started
        encoder.table[rows] = functional.pad(table * gain, (0, widest - kept))
        linear[:, at : at + kept] = right[:kept].T / gain
        at += width
    linear[:, at:] = torch.from_numpy(loading[data.layout.table_rows :]).T
    if encoder.skip is not None:
        encoder.skip.weight.copy_(linear)
        encoder.out.weight.mul_(OUTER)
        encoder.out.bias.zero_()
    elif not encoder.config.hidden:
        encoder.out.weight.copy_(linear)
        encoder.out.bias.zero_()


def gains_from(interactions: Interactions, data: Prepared, seed: int = 0) -> dict[str, float]:
    """Per column how much it counts, so that a user's next item is close to those liked before. They average 1.

    Maximises the likelihood of the next item among those of other users, by its mean cosine to some of the liked.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds = []
    for _ in range(GAIN_ROUNDS):
        liked, following = interactions.histories(GAIN_USERS, GAIN_LIKES, generator)
        if len(following):
            rounds.append(_products(data, liked, following, interactions.popularity))
    if not rounds:
        return {}
    found = torch.zeros(len(columns(data)), requires_grad=True)
    sharpness = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.Adam([found, sharpness], lr=0.1)
    for _ in range(GAIN_STEPS):
        loss = sum((_unlikelihood(found, sharpness, *given) for given in rounds), torch.zeros(())) / len(rounds)
        optimizer.zero_grad()
        (loss + GAIN_DECAY * found.square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    gains = found.detach().exp()
    gains = gains / gains.mean()
    return {column.slot.name: float(gain) for column, gain in zip(columns(data), gains, strict=True)}


def _products(data: Prepared, liked: Tensor, following: Tensor, popularity: Tensor) -> tuple[Tensor, ...]:
    """liked (U, L) and following (U,) items -> per column f their inner products (f, U, L, U), and their own (f, U, L)
    and (f, U)."""
    flat = liked.reshape(-1)
    fit = data.items(TRAIN)
    blocks = Blocks.of(data, fit[:: -(-len(fit) // 10_000)])
    one, other = (
        (_wide(data.table, part, data.layout.table_rows) @ sp.diags(blocks.scale)).tocsr() for part in (flat, following)
    )
    between, ones, others = [], [], []
    for column in columns(data):
        mean = blocks.mean[column.place]
        a, b = one[:, column.place], other[:, column.place]
        a_mean, b_mean, square = a @ mean, b @ mean, float(mean @ mean)
        between.append((a @ b.T).toarray() - a_mean[:, None] - b_mean[None] + square)
        ones.append(np.asarray(a.multiply(a).sum(1)).ravel() - 2 * a_mean + square)
        others.append(np.asarray(b.multiply(b).sum(1)).ravel() - 2 * b_mean + square)
    shape = (len(between), *liked.shape)
    products = torch.from_numpy(np.stack(between)).view(*shape, len(following)).float()
    same = following[:, None] == following[None]
    return (
        products,
        torch.from_numpy(np.stack(ones)).view(shape).float(),
        torch.from_numpy(np.stack(others)).float(),
        popularity[following].clamp(min=1e-9).log().float(),
        same.fill_diagonal_(False),
    )


def _unlikelihood(
    found: Tensor, sharpness: Tensor, between: Tensor, ones: Tensor, others: Tensor, log_q: Tensor, same: Tensor
) -> Tensor:
    gains = found.exp()
    one = torch.einsum("f,ful->ul", gains, ones).clamp(min=1e-9)
    other = torch.einsum("f,fv->v", gains, others).clamp(min=1e-9)
    cosine = torch.einsum("f,fulv->ulv", gains, between) * one.rsqrt()[..., None] * other.rsqrt()
    logits = (cosine.mean(1) * sharpness.exp() - log_q).masked_fill(same, -torch.inf)
    return functional.cross_entropy(logits, torch.arange(len(logits)))


def _small(values: npt.NDArray[np.floating[Any]]) -> Floats:
    return values.astype(np.float32)
