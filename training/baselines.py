"""What an embedding has to beat: answers that need no learning, or only linear algebra."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

Floats = npt.NDArray[np.float32]


class ColumnPCA:
    """Principal components of one-/multi-hot columns and scaled numbers, and the same with any one column left out.

    PCA of X needs only the inner products X Xt of the items, and those of all columns are the sum of each column's: so
    a column is left out by subtraction, however many labels it has.
    """

    def __init__(self, blocks: Mapping[str, Any], unit_variance: bool) -> None:
        """`blocks`: per column (n, width), sparse or not. `unit_variance` divides a column by its total spread, so that
        columns of many labels do not outweigh the others."""
        self._blocks = blocks
        self._unit_variance = unit_variance
        self._total = sum((self._products(name) for name in blocks), np.zeros((1, 1), np.float32))

    def embedding(self, dim: int, without: str | None = None, seed: int = 0) -> Floats:
        """(n, at most dim) coordinates of the items, centred."""
        return principal_coordinates(self._total - self._products(without) if without else self._total, dim, seed)

    def _products(self, name: str) -> Floats:
        block = self._blocks[name]
        products = block @ block.T
        products = np.asarray(products.todense() if sp.issparse(products) else products, np.float32)
        if not self._unit_variance:
            return products
        mean = np.asarray(block.mean(0)).ravel()
        spread = float(np.trace(products) / len(products) - np.square(mean).sum())
        return (products / max(spread, 1e-9)).astype(np.float32)


def principal_coordinates(products: Floats, dim: int, seed: int = 0) -> Floats:
    """(n, n) inner products -> (n, dim) coordinates along the directions of largest variance, largest first.

    By subspace iteration with a few random directions to spare (Halko et al. 2011).
    """
    # torch and not numpy, whose threads cannot be told how many they are
    inner = torch.from_numpy(products)
    row_mean = inner.mean(0, keepdim=True)
    centred = inner - row_mean - row_mean.T + inner.mean()
    n = len(inner)
    basis = torch.randn(n, min(n, dim + 10), generator=torch.Generator().manual_seed(seed))
    for _ in range(4):
        basis = torch.linalg.qr(centred @ basis)[0]
    values, vectors = torch.linalg.eigh(basis.T @ centred @ basis)
    largest = values.argsort(descending=True)[: min(dim, n - 1)]
    coordinates: Floats = (basis @ vectors[:, largest] * values[largest].clamp(min=0).sqrt()).numpy()
    return coordinates
