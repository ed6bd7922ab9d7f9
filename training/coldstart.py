"""How well a model recommends items that nobody has clicked yet, from their columns alone, beside what needs no
learning. The task and its figures: training/colditems.py."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from training.baselines import Cosines, dense_cosines, fitted
from training.colditems import ColdItems, K
from training.folds import TEST, some
from training.judged import Judged, Rows, Views, plain_blocks

FITTED = 4_000
"""Training items that the baselines are fitted on at most."""


def cold_start(
    model: Judged, likes: sp.csr_matrix, fold: npt.NDArray[np.int8], baselines: bool = True
) -> dict[str, Any] | None:
    """Of `likes`, (users, n) by the rows of the table: how many users, warm and cold items there were, and the three
    figures of the model, of each baseline and of chance. None where no user has liked enough."""
    task = ColdItems.of(likes, fold, TEST)
    if task is None:
        return None
    items = np.concatenate([task.warm, task.cold])
    fitted_on = some(np.arange(len(task.warm)), FITTED) if baselines else None
    return {
        "k": K, "users": len(task.liked), "warm_items": len(task.warm), "cold_items": len(task.cold),
        **{name: task.ranked(cosines) for name, cosines in _everyone(model, items, fitted_on)},
        "chance": task.figures(np.random.default_rng(0).random(task.liked.shape, np.float32)),
    }  # fmt: skip


def _everyone(model: Judged, items: Rows, fitted_on: Rows | None) -> Iterator[tuple[str, Cosines]]:
    with torch.inference_mode():
        yield "model", dense_cosines(Views(model, items).whole.numpy())
    if fitted_on is not None:
        yield from fitted(plain_blocks(model, items), fitted_on, model.encoder.config.dim)
