"""How weights follow gradients: the optimizers of a run and the course of their learning rates, all of them torch's."""

import math
from collections.abc import Sequence
from typing import Any

from torch import nn, optim
from torch.optim import lr_scheduler

from training.config import OptimizerConfig


class Optimization:
    """Steps the layers by the config's method and the tables by Adam, at rates that follow the schedule.

    Call `step` after every backward pass and `epoch_ended` after every epoch; `steps` are those of one epoch,
    `weighted` as in `OptimizerConfig.rates`.
    """

    def __init__(
        self,
        layers: Sequence[nn.Parameter],
        tables: Sequence[nn.Parameter],
        config: OptimizerConfig,
        epochs: int,
        steps: int,
        sparse: bool,
        weighted: bool = False,
    ) -> None:
        self.config, self.sparse, self._layers = config, sparse, list(layers)
        rate, table_rate = config.rates(weighted)
        self.optimizers: list[optim.Optimizer] = [_of_layers(layers, config, rate)]
        if tables and sparse:
            self.optimizers.append(optim.SparseAdam(tables, lr=table_rate))
        elif tables:
            self.optimizers.append(optim.Adam(tables, lr=table_rate, fused=tables[0].is_cuda))
        self._by_step = [_by_step(optimizer, config, epochs, steps) for optimizer in self.optimizers]
        self._by_loss = [
            lr_scheduler.ReduceLROnPlateau(optimizer, factor=config.factor, patience=config.every - 1, threshold=0.0)
            for optimizer in self.optimizers
            if config.schedule == "plateau"
        ]

    @property
    def rate(self) -> float:
        """The layers' learning rate at the next step."""
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        nn.utils.clip_grad_norm_(self._layers, self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
        for schedule in self._by_step:
            schedule.step()

    def epoch_ended(self, loss: float) -> None:
        """`loss` on the validation rows."""
        for schedule in self._by_loss:
            schedule.step(loss)

    def state_dict(self) -> dict[str, Any]:
        return {name: [part.state_dict() for part in parts] for name, parts in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, parts in self._parts().items():
            for part, saved in zip(parts, state[name], strict=True):
                part.load_state_dict(saved)

    def _parts(self) -> dict[str, Sequence[Any]]:
        return {"optimizers": self.optimizers, "by_step": self._by_step, "by_loss": self._by_loss}


def _of_layers(layers: Sequence[nn.Parameter], config: OptimizerConfig, rate: float) -> optim.Optimizer:
    decay, fused = config.weight_decay, layers[0].is_cuda
    if config.method == "sgd":
        return optim.SGD(layers, lr=rate, momentum=config.momentum, weight_decay=decay, fused=fused)
    if config.method == "adam":
        return optim.Adam(layers, lr=rate, weight_decay=decay, fused=fused)
    return optim.AdamW(layers, lr=rate, weight_decay=decay, fused=fused)


def _by_step(optimizer: optim.Optimizer, config: OptimizerConfig, epochs: int, steps: int) -> lr_scheduler.LRScheduler:
    total = epochs * steps
    rise = config.warmup * total + 1
    if config.schedule == "one_cycle":
        highest = optimizer.param_groups[0]["lr"]
        return lr_scheduler.OneCycleLR(optimizer, max_lr=highest, total_steps=total, cycle_momentum=False)
    if config.schedule == "plateau":  # the one that leaves alone what another schedule made of the rate
        return lr_scheduler.LinearLR(optimizer, start_factor=1 / rise, total_iters=math.ceil(rise) - 1)

    def share(step: int) -> float:
        """Of the full rate."""
        risen = min(1.0, (step + 1) / rise)
        if config.schedule == "cosine":
            return risen * 0.5 * (1 + math.cos(math.pi * step / total))
        if config.schedule == "step":
            return risen * config.factor ** (step // (config.every * steps))
        return risen

    return lr_scheduler.LambdaLR(optimizer, share)
