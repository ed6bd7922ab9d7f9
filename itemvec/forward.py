"""Forward: the encoder's network as it is served, with all that is constant worked out once.

A request has one item or a few, and a call into torch costs more than their arithmetic. So the weights are numpy
arrays: normalization by the training's mean and variance is part of the layer before it, the means that a layer
normalization takes out are taken out of the weights, and the mean embedding out of the last bias. Every encoder that
`EncoderConfig` describes has this form. What training computes by `ItemEncoder.forward` differs by rounding, some 1e-7.

And the first layer is linear, so what a row of the table comes to there is worked out for each of them: a film's 30
rows are added up in place of 414 times 320 products.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from itemvec.encoder import Activation, Cross, ItemEncoder
from itemvec.features import BagSlot, Batch

Floats = npt.NDArray[np.float32]

FEW = 64
"""Items whose GELU a few calls into numpy are through with before a call into torch has begun."""

WORKED_OUT: Final = 1 << 26
"""Bytes that the rows of the table may take where the first layer is worked out: for the films 59 MB of it, five times
the table. Each replica has them, once for each version that it holds."""

FEW_ROWS: Final = 100
"""Rows of the table an item, up to which adding them up there takes less time than adding narrow ones and one matrix
product. For 9 columns and one item that was so up to 500 rows, for a thousand items up to 150."""


AT: Final = np.float32(0.28)
TAIL: Final = [np.float32(c) for c in (-0.215109895, 0.793980243, -0.497035958, 0.556364423, 0.127583151, 0.234217939)]
"""The probability that a normal number lies beyond a >= 0 on either side is e^(-a^2 / 2) (c0 t^6 + ... + c5 t) with
t = 1 / (1 + 0.28 a). The form is Hastings' (Abramowitz and Stegun 1964, 7.1.26); the numbers are fitted so that half
of a times it is exact but for 4e-9."""


def gelu(x: Floats) -> Floats:
    """x times the probability that a normal number is below x, which is max(x, 0) - |x| times that of one above |x|. A
    call into torch takes as long as several into numpy."""
    if len(x) > FEW:
        many: Floats = functional.gelu(torch.from_numpy(x)).numpy()
        return many
    size = np.abs(x)
    t = size * AT
    t += 1
    np.reciprocal(t, t)
    y = t * TAIL[0]
    for c in TAIL[1:]:
        y += c
        y *= t
    np.square(x, t)
    t *= -0.5
    y *= np.exp(t, t)
    size *= 0.5
    y *= size
    few: Floats = np.subtract(np.maximum(x, 0), y, y)
    return few


def _by_torch(activation: Callable[[Tensor], Tensor]) -> Callable[[Floats], Floats]:
    return lambda x: activation(torch.from_numpy(x)).numpy()


_ACTIVATIONS: dict[Activation, Callable[[Floats], Floats]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": gelu,
    "silu": _by_torch(functional.silu),
    "tanh": np.tanh,
    "sigmoid": _by_torch(torch.sigmoid),
}


@dataclass(frozen=True, slots=True)
class _Layer:
    """x -> x weight + bias"""

    weight: Floats
    bias: Floats
    normalized: "_Normalized | None" = None

    def __call__(self, x: Floats) -> Floats:
        return self.after(x @ self.weight)

    def after(self, y: Floats) -> Floats:
        """Of x weight, in place."""
        y += self.bias
        return y if self.normalized is None else self.normalized(y)


@dataclass(frozen=True, slots=True)
class _Normalized:
    """Layer normalization of what has mean 0 already: to length 1, times scale, plus shift. `scale` has the root of the
    width in it, by which a length is more than a deviation, and epsilon has the width."""

    scale: Floats
    shift: Floats
    epsilon: float

    def __call__(self, y: Floats) -> Floats:
        y = _to_length_one(y, self.epsilon)
        y *= self.scale
        y += self.shift
        return y


def _to_length_one(y: Floats, epsilon: float) -> Floats:
    """Each row by the root of its square and epsilon, in place."""
    if len(y) == 1:  # a third of the calls into numpy
        y *= 1.0 / math.sqrt(y[0] @ y[0] + epsilon)
    else:
        y /= np.sqrt(np.vecdot(y, y) + np.float32(epsilon))[:, None]
    return y


class Forward:
    """An `ItemEncoder` that learns no more, on the CPU. The table is the encoder's own, other weights are copies; what
    was worked out of both is of the moment that this was made."""

    def __init__(self, encoder: ItemEncoder) -> None:
        config = encoder.config
        self._table = encoder.table.detach().float()
        self._used = encoder.used.numpy()
        self._inputs = len(self._used) + encoder.layout.dense_width
        self._crosses = [_folded_cross(layer) for layer in encoder.cross if isinstance(layer, Cross)]
        self._activation = _ACTIVATIONS[config.activation]
        weight, bias = _linear(encoder.out)
        out = _layer(weight, bias - _doubles(encoder.mean) if config.centre else bias)
        self._first, *self._others = [*_folded_layers(encoder.layers), out]
        self._split = self._first.weight.shape[1]
        self._weight = self._first.weight
        """(inputs, width): of the first layer, and behind `_split` of the way around the layers."""
        if encoder.skip is not None:
            self._weight = np.concatenate([self._weight, _as_floats(_linear(encoder.skip)[0])], 1)
        self._rows = self._worked_out(encoder.layout.bags)

    def __call__(self, batch: Batch) -> Floats:
        """(n, dim), each row of length 1: as `ItemEncoder.encode`."""
        reached = self._reached(batch)
        z = self._first.after(reached[:, : self._split])
        for layer in self._others:
            z = layer(self._activation(z))
        if reached.shape[1] > self._split:
            z += reached[:, self._split :]
        return _to_length_one(z, 1e-24)

    def _reached(self, batch: Batch) -> Floats:
        """(n, width): the columns times the weight."""
        n, nnz = len(batch), len(batch.indices)
        if self._rows is None or not 0 < nnz <= n * FEW_ROWS:
            x = self._columns(batch)
            if not self._crosses:
                return x @ self._weight
            y = x
            for narrow, wide in self._crosses:
                y = y + x * wide(y @ narrow)
            return np.concatenate([y @ self._weight[:, : self._split], x @ self._weight[:, self._split :]], 1)
        if n == 1:
            reached = batch.weights[None] @ self._rows.take(batch.indices, 0)
        else:
            items = batch.lengths.sum(1, dtype=np.int64)
            reached = _added(torch.from_numpy(self._rows), batch, items.cumsum() - items)
        reached += batch.dense @ self._weight[len(self._used) :]
        return reached

    def _columns(self, batch: Batch) -> Floats:
        """(n, inputs): the used part of each column's bag, and the dense columns."""
        n, lengths = batch.lengths.shape[0], batch.lengths.ravel()
        x = np.empty((n, self._inputs), np.float32)
        if lengths.size:
            bags = _added(self._table, batch, lengths.cumsum(dtype=np.int64) - lengths)
            x[:, : len(self._used)] = bags.reshape(n, -1).take(self._used, 1)
        x[:, len(self._used) :] = batch.dense
        return x

    def _worked_out(self, bags: Sequence[BagSlot]) -> Floats | None:
        """(rows, width): of each row of the table its part of `_reached`. None where the columns are multiplied with
        each other first, and where it takes too much memory."""
        rows, (_, width) = len(self._table), self._weight.shape
        if self._crosses or not 0 < 4 * rows * width <= WORKED_OUT:
            return None
        each = np.zeros((len(bags) * self._table.shape[1], width), np.float32)
        each[self._used] = self._weight[: len(self._used)]
        found = np.empty((rows, width), np.float32)
        for bag, weight in zip(bags, np.split(each, len(bags)), strict=True):
            own = slice(bag.base, bag.base + bag.rows)
            np.matmul(self._table[own].numpy(), weight, out=found[own])
        return found


def _added(table: Tensor, batch: Batch, starts: npt.NDArray[Any]) -> Floats:
    """(len(starts), width): the rows of the table from each start to the next, as often as each counts."""
    where, weights = torch.from_numpy(batch.indices), torch.from_numpy(batch.weights)
    added: Floats = functional.embedding_bag(
        where, table, torch.from_numpy(starts), mode="sum", per_sample_weights=weights
    ).numpy()
    return added


Doubles = npt.NDArray[np.float64]


def _folded_layers(modules: nn.Sequential) -> list[_Layer]:
    """Of `fully_connected`, activations and dropout aside."""
    layers: list[_Layer] = []
    for module in modules:
        if isinstance(module, nn.Linear):
            weight, bias = _linear(module)
            layers.append(_layer(weight, bias))
        elif isinstance(module, nn.LayerNorm):
            width = len(bias)
            scale, shift = _as_floats(_doubles(module.weight) * width**0.5), _as_floats(_doubles(module.bias))
            after = _Normalized(scale, shift, module.eps * width)
            centred = weight - weight.mean(1, keepdims=True)
            layers[-1] = _Layer(_as_floats(centred), _as_floats(bias - bias.mean()), after)
        elif isinstance(module, nn.BatchNorm1d):
            mean, variance = _doubles(module.running_mean), _doubles(module.running_var)
            times = _doubles(module.weight) / np.sqrt(variance + module.eps)
            layers[-1] = _layer(weight * times, (bias - mean) * times + _doubles(module.bias))
    return layers


def _folded_cross(cross: Cross) -> tuple[Floats, _Layer]:
    return _as_floats(_linear(cross.narrow)[0]), _layer(*_linear(cross.wide))


def _linear(module: nn.Linear) -> tuple[Doubles, Doubles]:
    """(inputs, outputs) weight and (outputs,) bias."""
    weight = _doubles(module.weight).T
    return weight, _doubles(module.bias)


def _layer(weight: Doubles, bias: Doubles) -> _Layer:
    return _Layer(_as_floats(weight), _as_floats(bias))


def _doubles(values: Tensor | None) -> Doubles:
    """Zero for a bias that is not there."""
    return np.zeros(1) if values is None else values.detach().double().numpy()


def _as_floats(values: Doubles) -> Floats:
    return np.ascontiguousarray(values, np.float32)
