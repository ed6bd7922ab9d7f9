"""ItemEncoder: the numbers of a Batch -> one unit-length vector per item; and the Decoder that reads columns back.

n items, F bag columns, D dense floats, W width of the shared embedding table, H hidden width, dim the embedding's size.

    indices, weights, lengths --look-up--> (n, F, W) --used part--+
                                                                  +--> x --> cross, layers --> z --> z - mean, length 1
    dense (n, D) -------------------------------------------------+    `-------- skip --------^
"""

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional

from itemvec.errors import ConfigError
from itemvec.features import Batch, Layout

WHITENING_FLOOR = 1e-3
"""Share of the mean variance that is added to each number's before whitening."""

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

    embedding_dim: Width = 64
    """Width of the shared table, and of a column's part of the input. Columns of few labels use less of it
    (`feature_width`)."""

    widths: dict[str, Width] = {}
    """How much of it columns use, by their names, where the rule should not decide; at most `embedding_dim`."""

    cross: Annotated[int, Field(ge=0, le=16)] = 0
    """Layers before the hidden ones that multiply the columns with each other (`Cross`): pairs of labels, and from the
    second layer on triples, that together mean something else than each alone."""

    cross_rank: Width = 32
    """Products of a cross layer; more see more pairs and take longer."""

    hidden: tuple[Width, ...] = (256,)
    """Widths of the layers between the columns and the embedding; `[]` makes the encoder linear."""

    activation: Activation = "gelu"

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1

    normalization: Literal["layer", "batch", "none"] = "layer"
    """`layer` does not depend on the other items of a batch, so training and serving compute the same."""

    skip: bool = True
    """Adds a linear path around the hidden layers, the decoder's too: what a linear method finds is in reach of the
    first epoch."""

    centre: bool = True
    """Subtracts the mean embedding before the length is made 1; without it every two items look alike by their mean."""

    whiten: bool = False
    """Makes the variances of all directions alike as well, so that none that many columns share decides on its own who
    is a neighbor; small differences come to count as much as large ones. On films that was worse."""

    nested: tuple[int, ...] = ()
    """Prefixes of the embedding that are trained to be embeddings themselves, such as [16, 32] (Kusupati et al. 2022).
    Without it the numbers are ordered by their variance after training, so that every prefix is the best that can be
    had of the whole vector: on films its neighbors are better than those of trained prefixes, and the whole vector
    loses nothing. Trained ones are read back with a lower loss."""

    decoder_hidden: tuple[Width, ...] = (128,)
    """Widths of the decoder's layers, used in training, evaluation and `/v1/decode` only. It has a row as wide as the
    last for every label, and that is most of a training step's work; on films 128 was no better."""

    @field_validator("nested")
    @classmethod
    def _grows(cls, nested: tuple[int, ...]) -> tuple[int, ...]:
        if list(nested) != sorted(set(nested)) or any(size < 2 for size in nested):
            raise ValueError(f"nested must grow from at least 2: {list(nested)}")
        return nested

    @model_validator(mode="after")
    def _fits(self) -> "EncoderConfig":
        if self.nested and self.nested[-1] >= self.dim:
            raise ValueError(f"nested must stay below dim ({self.dim}): {list(self.nested)}")
        if wide := {name: width for name, width in self.widths.items() if width > self.embedding_dim}:
            raise ValueError(f"widths beyond embedding_dim ({self.embedding_dim}): {wide}")
        if self.whiten and not self.centre:
            raise ValueError("whiten needs centre: without the mean taken out there is nothing to measure spread from")
        return self


def feature_width(rows: int, widest: int) -> int:
    """How many numbers of the shared table a column of so many rows uses: 1.6 rows^0.56, the rule of fast.ai's tables.

    >>> [feature_width(rows, widest=32) for rows in (4, 23, 3000)]
    [3, 9, 32]
    """
    return min(widest, round(1.6 * math.pow(rows, 0.56)))


def fully_connected(inputs: int, widths: Sequence[int], config: EncoderConfig) -> nn.Sequential:
    """(n, inputs) -> (n, last of widths), or as it is where there are none; everything else as the config says."""
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


class Cross(nn.Module):
    """x + x0 * (U V x + b): products of the columns, through a few directions (low-rank DCN-v2, Wang et al. 2021).

    It begins as the identity.
    """

    def __init__(self, inputs: int, rank: int) -> None:
        super().__init__()
        self.narrow = nn.Linear(inputs, rank, bias=False)
        self.wide = nn.Linear(rank, inputs)
        nn.init.zeros_(self.wide.weight)
        nn.init.zeros_(self.wide.bias)

    def forward(self, x: Tensor, columns: Tensor) -> Tensor:
        """(n, inputs) of the layer before, (n, inputs) the columns themselves -> (n, inputs)"""
        crossed: Tensor = x + columns * self.wide(self.narrow(x))
        return crossed


class ItemEncoder(nn.Module):
    """See the picture above. One table for all columns: a call into torch costs more than one item's arithmetic."""

    table: Tensor
    mean: Tensor
    used: Tensor

    def __init__(self, config: EncoderConfig, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        names = [bag.name for bag in layout.bags]
        if unknown := sorted(config.widths.keys() - set(names)):
            raise ConfigError(
                f"encoder.widths names {', '.join(unknown)}; the columns with rows in the table are {', '.join(names)}"
            )
        by_rule = {bag.name: feature_width(bag.rows, config.embedding_dim) for bag in layout.bags}
        widths = (by_rule | config.widths).values()
        self.table = nn.Parameter(torch.randn(layout.table_rows, config.embedding_dim) * config.embedding_dim**-0.5)
        used = [f * config.embedding_dim + w for f, width in enumerate(widths) for w in range(width)]
        self.register_buffer("used", torch.tensor(used, dtype=torch.long), persistent=False)
        inputs = len(used) + layout.dense_width
        self.cross = nn.ModuleList(Cross(inputs, config.cross_rank) for _ in range(config.cross))
        self.layers = fully_connected(inputs, config.hidden, config)
        self.out = nn.Linear(config.hidden[-1] if config.hidden else inputs, config.dim)
        self.skip = nn.Linear(inputs, config.dim, bias=False) if config.skip and config.hidden else None
        self.register_buffer("mean", torch.zeros(config.dim))
        self.sparse_gradients = False
        """Set by training on CPU: only the rows that a batch used get a gradient."""

    def forward(self, dense: Tensor, indices: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """(n, D), (nnz,), (nnz,), (n, F) -> (n, dim), each row of length 1. Training subtracts the batch's own mean."""
        return functional.normalize(self.unscaled(dense, indices, weights, lengths), dim=1)

    def unscaled(self, dense: Tensor, indices: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """(n, dim) before the length is made 1."""
        z = self.uncentred(dense, indices, weights, lengths)
        if not self.config.centre:
            return z
        if self.training and len(z) > 1:
            mean = z.mean(0)
            self.mean.lerp_(mean.detach().to(self.mean.dtype), 0.05)
            return z - mean
        return z - self.mean

    def uncentred(self, dense: Tensor, indices: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
        """(n, dim) before the mean is subtracted."""
        lengths = lengths.reshape(-1)
        offsets = lengths.cumsum(0) - lengths
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
        crossed = x
        for layer in self.cross:
            crossed = layer(crossed, x)
        z: Tensor = self.out(self.layers(crossed))
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
    It is trained before the numbers are turned and whitened (`finish`), and so turns them back first.
    """

    basis: Tensor

    def __init__(self, config: EncoderConfig, layout: Layout) -> None:
        super().__init__()
        self.config, self.layout = config, layout
        self.layers = fully_connected(config.dim, config.decoder_hidden, config)
        width = config.decoder_hidden[-1] if config.decoder_hidden else config.dim
        self.skip = nn.Linear(config.dim, width, bias=False) if config.skip and config.decoder_hidden else None
        self.row_weight = nn.Parameter(torch.randn(layout.table_rows, width) * 0.1 * width**-0.5)
        self.row_bias = nn.Parameter(torch.zeros(layout.table_rows))
        self.dense_head = nn.Linear(width, layout.dense_width) if layout.dense_width else None
        self.register_buffer("basis", torch.eye(config.dim))
        self._scale = float(config.dim) ** 0.5

    def forward(self, embedding: Tensor) -> Tensor:
        """(n, dim) -> hidden (n, H), from which `rows` and `dense` read. Unit vectors are scaled to a variance of 1."""
        x = self.as_trained(embedding) * self._scale
        hidden: Tensor = self.layers(x)
        return hidden if self.skip is None else hidden + self.skip(x)

    def as_trained(self, embedding: Tensor) -> Tensor:
        """(n, dim) -> (n, dim): unit vectors as they were while the losses read them."""
        before = functional.linear(embedding, self.basis)
        return functional.normalize(before, dim=1) if self.config.whiten else before

    def rows(self, hidden: Tensor, rows: Tensor | slice) -> Tensor:
        """(n, H) -> (n, len(rows)) logits."""
        return functional.linear(hidden, self.row_weight[rows], self.row_bias[rows])

    def dense(self, hidden: Tensor) -> Tensor:
        """(n, H) -> (n, D): the scaled values; for each column's last one, the missing flag, a logit."""
        if self.dense_head is None:
            return hidden[:, :0]
        values: Tensor = self.dense_head(hidden)
        return values


@torch.no_grad()
def finish(encoder: ItemEncoder, decoder: Decoder, mean: Tensor, covariance: Tensor) -> None:
    """Takes the mean out of the vectors, orders their numbers by variance, and whitens them, as the encoder's config
    says. (dim,) mean and (dim, dim) covariance of the uncentred training rows, in float64.

    All of it goes into the encoder's last layer, so that serving pays nothing. Numbers are turned to the principal
    axes, which changes no angle between whole vectors; trained prefixes stay where they are, and the Cholesky factor,
    of all whitenings (Kessy et al. 2018), keeps them: the first k whitened numbers follow from the first k.
    """
    config = encoder.config
    onto = torch.eye(config.dim, dtype=torch.float64)
    if not config.nested:
        onto = torch.linalg.eigh(covariance).eigenvectors.flip(1).T
    if config.whiten:
        turned = onto @ covariance @ onto.T
        least = WHITENING_FLOOR * turned.diagonal().mean()
        onto = torch.linalg.inv(torch.linalg.cholesky(turned + torch.diag(least.expand(config.dim)))) @ onto
    if config.centre:
        encoder.mean.copy_(mean)
    turn(encoder, decoder, onto)


@torch.no_grad()
def turn(encoder: ItemEncoder, decoder: Decoder, onto: Tensor) -> None:
    """Multiplies the vectors, before their length is made 1, by (dim, dim) `onto`, in float64; the decoder turns them
    back."""
    for weight in (encoder.out.weight, encoder.out.bias, None if encoder.skip is None else encoder.skip.weight):
        if weight is not None:
            weight.copy_(onto @ weight.double())
    encoder.mean.copy_(onto @ encoder.mean.double())
    decoder.basis.copy_(decoder.basis.double() @ torch.linalg.inv(onto))


def tensors(batch: Batch, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A batch in the order of `ItemEncoder.forward`; no copy on the CPU."""
    arrays = (batch.dense, batch.indices, batch.weights, batch.lengths)
    dense, indices, weights, lengths = (torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
    return dense, indices, weights, lengths
