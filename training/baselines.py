"""What an embedding has to beat: the plain encodings, and the linear algebra that makes them small.

    one_hot             one-/multi-hot columns and scaled numbers, centred; as wide as there are labels
    hashing             each label adds +1 or -1 to one of `dim` numbers (Weinberger et al. 2009)
    svd                 truncated SVD of the one-/multi-hot columns
    pca                 the same, centred: principal components
    pca_unit_variance   principal components where a column of many labels weighs no more than one of few

All but the first are of the embedding's own dim. All are compared by cosine, like the embedding.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from torch import Tensor

BASELINES = ("one_hot", "hashing", "svd", "pca", "pca_unit_variance")

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]
Blocks = Mapping[str, Any]
"""Per column (n, width), CSR or dense."""


class LeftOut(NamedTuple):
    """The baselines of n items with a column left out."""

    one_hot: Tensor
    """(n, n) cosines"""

    coordinates: dict[str, Tensor]
    """Per other baseline (n, at most dim), not of unit length; of principal components the largest first."""


class LeaveOneOut:
    """The baselines of n items with any one column left out.

    Cosines, SVD and PCA of X need only the inner products X Xt of the items, and those of all columns are the sum of
    each column's: so a column is left out by subtraction, however many labels it has. Memory is n x n.
    """

    def __init__(self, blocks: Blocks, dim: int, seed: int = 0) -> None:
        self._blocks, self._dim = blocks, dim
        self._scale = {name: 1 / max(total_variance(block), 1e-9) for name, block in blocks.items()}
        self._hashed = {name: torch.from_numpy(h) for name, h in hashed_columns(blocks, dim, seed).items()}
        self._all_hashed = torch.stack(list(self._hashed.values())).sum(0)
        n = len(self._all_hashed)
        self._total, self._total_unit = torch.zeros(n, n), torch.zeros(n, n)
        for name, block in blocks.items():
            products = _inner_products(block)
            self._total += products
            self._total_unit.add_(products, alpha=self._scale[name])
        start = torch.randn(n, min(n, dim + 10), generator=torch.Generator().manual_seed(seed))
        # One column more or less turns the large directions only a little, so each search begins where this one ended.
        self._start = {kind: _subspace(inner, start, 4) for kind, inner in self._inner(None).items()}

    def without(self, column: str | None) -> LeftOut:
        inner = self._inner(column)
        coordinates = {
            kind: _coordinates(products, _subspace(products, self._start[kind], 1), self._dim)
            for kind, products in inner.items()
        }
        hashed = self._all_hashed if column is None else self._all_hashed - self._hashed[column]
        norm = inner["pca"].diagonal().clamp(min=1e-12).sqrt()
        cosines = inner["pca"] / norm[:, None] / norm
        return LeftOut(cosines, {"hashing": hashed - hashed.mean(0), **coordinates})

    def _inner(self, without: str | None) -> dict[str, Tensor]:
        """The inner products (n, n) whose large directions each baseline is."""
        plain, unit = self._total, self._total_unit
        if without is not None:
            products = _inner_products(self._blocks[without])
            plain = plain - products
            unit = unit - products * self._scale[without]
        return {"svd": plain, "pca": _centred(plain), "pca_unit_variance": _centred(unit)}


def _coordinates(inner: Tensor, basis: Tensor, dim: int) -> Tensor:
    """(n, n) inner products and a basis (n, >= dim) of their large directions -> (n, at most dim) coordinates along
    them, largest first."""
    values, vectors = torch.linalg.eigh(basis.T @ inner @ basis)
    largest = values.argsort(descending=True)[: min(dim, len(inner) - 1)]
    coordinates: Tensor = basis @ vectors[:, largest] * values[largest].clamp(min=0).sqrt()
    return coordinates


def _subspace(inner: Tensor, start: Tensor, rounds: int) -> Tensor:
    """Subspace iteration towards the large directions, with a few to spare (Halko et al. 2011)."""
    basis = start
    for _ in range(rounds):
        basis = torch.linalg.qr(inner @ basis)[0]
    return basis


def _centred(inner: Tensor) -> Tensor:
    """The inner products that the items have once their mean is subtracted."""
    mean = inner.mean(0, keepdim=True)
    return inner - mean - mean.T + inner.mean()


def _inner_products(block: Any) -> Tensor:
    products = block @ block.T
    return torch.from_numpy(np.asarray(products.todense() if sp.issparse(products) else products, np.float32))


def total_variance(block: Any) -> float:
    """Of a column, over all its numbers together."""
    mean = np.asarray(block.mean(0)).ravel()
    squares = block.multiply(block).sum() if sp.issparse(block) else np.square(block).sum()
    return float(squares / block.shape[0] - np.square(mean).sum())


def hashed_columns(blocks: Blocks, dim: int, seed: int = 0) -> dict[str, Floats]:
    """Per column (n, dim): each of its numbers added to one place, with a sign, both drawn once (a hash that is random
    by construction)."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, block in blocks.items():
        width = block.shape[1]
        signs = rng.choice(np.array([-1, 1], np.float32), width)
        places = sp.csr_matrix((signs, (np.arange(width), rng.integers(dim, size=width))), shape=(width, dim))
        hashed = block @ places
        out[name] = np.asarray(hashed.todense() if sp.issparse(hashed) else hashed, np.float32)
    return out


# --- fitted on some items, for others ---------------------------------------------------------------------------------


class Cosines(Protocol):
    def __call__(self, a: Rows, b: Rows, sums: sp.csr_matrix | None = None) -> Floats:
        """Cosines (a, b) of the items at rows `a` and those at rows `b`; with `sums` (u, a) their product (u, b) with
        it, for which they need not be known one by one."""


def dense_cosines(vectors: Floats) -> Cosines:
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)

    def cosines(a: Rows, b: Rows, sums: sp.csr_matrix | None = None) -> Floats:
        out: Floats = (unit[a] if sums is None else sums @ unit[a]) @ unit[b].T
        return out

    return cosines


def fitted(blocks: Blocks, rows: Rows, dim: int, seed: int = 0) -> Iterator[tuple[str, Cosines]]:
    """Each baseline's name with its cosines of all n items, fitted on `rows` alone: means, spreads and axes are
    theirs."""
    from sklearn.decomposition import TruncatedSVD  # noqa: PLC0415 - takes a second, and not every run needs it

    x = stacked(blocks)
    unit = stacked({name: block / max(total_variance(block[rows]), 1e-9) ** 0.5 for name, block in blocks.items()})
    yield "one_hot", centred_cosines(x, rows)
    hashed = np.sum(list(hashed_columns(blocks, dim, seed).values()), axis=0)
    yield "hashing", dense_cosines(hashed - hashed[rows].mean(0))
    with np.errstate(divide="ignore", invalid="ignore"):  # it divides by the variance, of which there may be none
        svd = TruncatedSVD(_components(x[rows], dim), random_state=seed).fit(x[rows])
    yield "svd", dense_cosines(svd.transform(x))
    for name, columns in (("pca", x), ("pca_unit_variance", unit)):
        mean, axes = principal_axes(columns[rows], dim, seed)
        yield name, dense_cosines(np.asarray(columns @ axes.T - mean @ axes.T))


def stacked(blocks: Blocks) -> sp.csr_matrix:
    """All columns side by side: (n, widths together)."""
    return sp.hstack([sp.csr_matrix(block) for block in blocks.values()], format="csr")


def _components(x: sp.csr_matrix, dim: int) -> int:
    """As many as `dim`, or as there can be."""
    return max(1, min(dim, *(int(size) - 1 for size in x.shape)))


def principal_axes(x: sp.csr_matrix, dim: int, seed: int = 0) -> tuple[Floats, Floats]:
    """(n, width) -> the mean (width,) and the principal axes (at most dim, width); one of zeros where all rows are
    alike."""
    from sklearn.decomposition import PCA  # noqa: PLC0415 - as above

    if (x.max(0) != x.min(0)).nnz == 0:
        return np.asarray(x.mean(0), np.float32).ravel(), np.zeros((1, x.shape[1]), np.float32)
    pca = PCA(_components(x, dim), svd_solver="arpack", random_state=seed).fit(x)
    return pca.mean_.astype(np.float32), pca.components_.astype(np.float32)


def centred_cosines(x: sp.csr_matrix, rows: Rows) -> Cosines:
    """Of columns too wide to be centred in memory: the mean of `rows` is subtracted from the inner products."""
    mean = np.asarray(x[rows].mean(0)).ravel()
    with_mean = x @ mean
    of_mean = float(mean @ mean)
    norm = np.sqrt(np.maximum(np.asarray(x.multiply(x).sum(1)).ravel() - 2 * with_mean + of_mean, 1e-12))

    def cosines(a: Rows, b: Rows, sums: sp.csr_matrix | None = None) -> Floats:
        weights = sp.diags(1 / norm[a]) if sums is None else sums @ sp.diags(1 / norm[a])
        all_weights = np.asarray(weights.sum(1)).ravel()
        means = (weights @ with_mean[a])[:, None] + all_weights[:, None] * (with_mean[None, b] - of_mean)
        out: Floats = ((((weights @ x[a]) @ x[b].T).toarray() - means) / norm[None, b]).astype(np.float32)
        return out

    return cosines


@dataclass(frozen=True)
class Recalled:
    """What principal components of the plain encodings give back: the baseline of reconstruction."""

    mean: Floats
    axes: Floats
    """(dim, width)"""
    places: dict[str, slice]
    """Where each column lies in the width."""

    @classmethod
    def fit(cls, blocks: Blocks, dim: int, seed: int = 0) -> "Recalled":
        """On the items of `blocks`."""
        mean, axes = principal_axes(stacked(blocks), dim, seed)
        ends = np.cumsum([block.shape[1] for block in blocks.values()])
        places = {
            name: slice(int(end) - block.shape[1], int(end))
            for end, (name, block) in zip(ends, blocks.items(), strict=True)
        }
        return cls(mean, axes, places)

    def codes(self, blocks: Blocks) -> Floats:
        """(n, dim) coordinates of other items."""
        return np.asarray(stacked(blocks) @ self.axes.T - self.mean @ self.axes.T, np.float32)

    def column(self, codes: Floats, name: str) -> Floats:
        """(n, the column's width): what the coordinates say of its numbers; around 1 for a label that is there."""
        at = self.places[name]
        return codes @ self.axes[:, at] + self.mean[at]
