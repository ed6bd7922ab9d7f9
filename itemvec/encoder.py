"""ItemEncoder: the numbers of a Batch -> one unit-length vector per item; and the Decoder that reads columns back.

n items, F bag columns, D dense floats, W width of the shared embedding table, H hidden width, dim the embedding's size.

    indices, weights, lengths --one look-up--> (n, F, W) --used part--+
                                                                      +--> x --> layers --> z --> (z - mean), length 1
    dense (n, D) -----------------------------------------------------+    `---- skip ----^
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn import functional

from itemvec.features import Batch, Layout

Activation = Literal["relu", "gelu", "silu", "tanh", "sigmoid"]
Width = Annotated[int, Field(ge=1, le=8192)]

_ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


class EncoderConfig(BaseModel):
    """The shape of the network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    dim: Annotated[int, Field(ge=2, le=4096)] = 64
    """Numbers in the embedding. 64 float32 are 256 bytes an item; below 16 the columns crowd each other out."""

    embedding_dim: Width = 32
    """Width of the shared table, and of a column's part of the input. Columns of few labels use less of it
    (`feature_width`)."""

    hidden: tuple[Width, ...] = (256,)
    """Widths of the layers between the columns and the embedding; `[]` makes the encoder linear."""

    activation: Activation = "gelu"

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    normalization: Literal["layer", "batch", "none"] = "layer"
    """`layer` does not depend on the other items of a batch, so training and serving compute the same."""

    skip: bool = True
    """Adds a linear path around the hidden layers: what a linear method finds is in reach of the first epoch."""

    centre: bool = True
    """Subtracts the mean embedding before the length is made 1; without it every two items look alike by their mean."""

    decoder_hidden: tuple[Width, ...] = (64,)
    """Widths of the decoder's layers, used in training, evaluation and `/v1/decode` only. It has a row as wide as the
    last for every label, and that is most of a training step's work; on films 128 was no better."""


def feature_width(rows: int, widest: int) -> int:
    """How many numbers of the shared table a column of so many rows uses: 1.6 rows^0.56, the rule of fast.ai's tables.

    >>> [feature_width(rows, widest=32) for rows in (4, 23, 3000)]
    [3, 9, 32]
    """
    return min(widest, round(1.6 * math.pow(rows, 0.56)))


def _layers(inputs: int, widths: Sequence[int], config: EncoderConfig) -> nn.Sequential:
    modules: list[nn.Module] = []
    for width in widths:
        modules.append(nn.Linear(inputs, width))
        if config.normalization == "layer":
            modules.append(nn.LayerNorm(width))
        elif config.normalization == "batch":
            modules.append(nn.BatchNorm1d(width))
        modules += [_ACTIVATIONS[config.activation](), nn.Dropout(config.dropout)]
        inputs = width
    return nn.Sequential(*modules)


class ItemEncoder(nn.Module):
    """See the picture above. One table for all columns: a call into torch costs more than one item's arithmetic."""

    table: Tensor
    mean: Tensor
    used: Tensor

    def __init__(self, config: EncoderConfig, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        widths = [feature_width(bag.rows, config.embedding_dim) for bag in layout.bags]
        self.table = nn.Parameter(torch.randn(layout.table_rows, config.embedding_dim) * config.embedding_dim**-0.5)
        used = [f * config.embedding_dim + w for f, width in enumerate(widths) for w in range(width)]
        self.register_buffer("used", torch.tensor(used, dtype=torch.long), persistent=False)
        inputs = len(used) + layout.dense_width
        self.layers = _layers(inputs, config.hidden, config)
        self.out = nn.Linear(config.hidden[-1] if config.hidden else inputs, config.dim)
        self.skip = nn.Linear(inputs, config.dim, bias=False) if config.skip and config.hidden else None
        self.register_buffer("mean", torch.zeros(config.dim))
        self.sparse_gradients = False
        """Set by training on CPU: only the rows that a batch used get a gradient."""

    def forward(self, dense: Tensor, indices: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """(n, D), (nnz,), (nnz,), (n, F) -> (n, dim), each row of length 1. Training subtracts the batch's own mean."""
        z = self.uncentred(dense, indices, weights, lengths)
        if self.config.centre:
            if self.training and len(z) > 1:
                mean = z.mean(0)
                self.mean.lerp_(mean.detach().to(self.mean.dtype), 0.05)
                z = z - mean
            else:
                z = z - self.mean
        return functional.normalize(z, dim=1)

    def uncentred(self, dense: Tensor, indices: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """(n, dim) before the mean is subtracted and the length made 1."""
        ends = lengths.reshape(-1).cumsum(0)
        offsets = functional.pad(ends[:-1], (1, 0)) if len(ends) else ends
        bags = functional.embedding_bag(
            indices,
            self.table,
            offsets,
            mode="sum",
            per_sample_weights=weights.to(self.table.dtype),
            sparse=self.sparse_gradients,
        )  # (n * F, W)
        used = bags.view(len(dense), len(self.layout.bags) * self.config.embedding_dim).index_select(1, self.used)
        x = torch.cat([used, dense], dim=1)
        z: Tensor = self.out(self.layers(x))
        return z if self.skip is None else z + self.skip(x)

    def encode(self, batch: Batch) -> npt.NDArray[np.float32]:
        """(n, dim) on whatever device the encoder is; the vectors that are served, stored and judged."""
        was_training = self.training
        if was_training:
            self.eval()
        with torch.inference_mode():
            vectors: npt.NDArray[np.float32] = self(*tensors(batch, self.mean.device)).float().cpu().numpy()
        if was_training:
            self.train()
        return vectors


class Decoder(nn.Module):
    """Reads an item's columns back from its embedding: a score for every row of the table, and the dense columns.

    The rows are those of the encoder's table, so a column's head is a slice, and a large one can be scored on a sample.
    """

    def __init__(self, config: EncoderConfig, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.layers = _layers(config.dim, config.decoder_hidden, config)
        width = config.decoder_hidden[-1] if config.decoder_hidden else config.dim
        self.row_weight = nn.Parameter(torch.randn(layout.table_rows, width) * 0.1 * width**-0.5)
        self.row_bias = nn.Parameter(torch.zeros(layout.table_rows))
        self.dense_head = nn.Linear(width, layout.dense_width) if layout.dense_width else None
        self._scale = float(config.dim) ** 0.5

    def forward(self, embedding: Tensor) -> Tensor:
        """(n, dim) -> hidden (n, H), from which `rows` and `dense` read. Unit vectors are scaled to a variance of 1."""
        hidden: Tensor = self.layers(embedding * self._scale)
        return hidden

    def rows(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        """(n, H) -> (n, len(rows)) logits."""
        return functional.linear(hidden, self.row_weight[rows], self.row_bias[rows])

    def dense(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, D): the scaled values; for each column's last one, the missing flag, a logit."""
        if self.dense_head is None:
            return hidden[:, :0]
        values: Tensor = self.dense_head(hidden)
        return values


def tensors(batch: Batch, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch in the order of `ItemEncoder.forward`; no copy on the CPU."""
    arrays = (batch.dense, batch.indices, batch.weights, batch.lengths)
    dense, indices, weights, lengths = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return dense, indices, weights, lengths
