"""What each objective counts in the sum that is minimised: as the config says, or found while training."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal

import torch
from torch import Tensor, nn

USUAL: Final[Mapping[str, float]] = {"reconstruct": 1.0, "contrast": 0.1, "predict": 1.0, "co_engage": 0.1}
"""Weights where the config has none and nothing is balanced; and those by which epochs are compared, always."""

EVERY: Final = 16
"""Steps between two looks at the gradients: a look costs the backward pass from an objective to the embedding."""

SPEED: Final = 10.0
"""By how much an uncertainty learns faster than the layers, or the run would be over before it is found."""

MEMORY: Final = 0.7
"""Of a gradient's length, from look to look."""


class Balance(nn.Module):
    """The weights of the objectives. Those that the config gives are kept; the others, if there are several, follow

    - `uncertainty`: a loss counts 1/s, with the s learned that makes loss/s + log s least, so that each counts by how
      far it is from what can be reached (Kendall et al. 2018);
    - `gradient`: all pull the embedding as hard as the first, whose weight is the usual one: a weight is the ratio of
      the lengths of their gradients (GradNorm, Chen et al. 2018, without its rates).
    """

    log_scale: Tensor
    length: Tensor
    looks: Tensor

    def __init__(
        self, weights: Mapping[str, float | Literal["auto"]], method: Literal["none", "uncertainty", "gradient"]
    ) -> None:
        super().__init__()
        self.method = method
        self.fixed = {name: USUAL[name] if weight == "auto" else weight for name, weight in weights.items()}
        """By which epochs are compared: what is learned would compare a sum with another one."""
        free = [name for name, weight in weights.items() if weight == "auto"]
        self.free = free if method != "none" and len(free) > 1 else []
        if method == "uncertainty" and self.free:
            self.log_scale = nn.Parameter(torch.zeros(len(self.free)))
        elif self.free:
            self.register_buffer("length", torch.ones(len(self.free)))
            self.register_buffer("looks", torch.zeros((), dtype=torch.long))

    def forward(self, losses: Mapping[str, Tensor], embedding: Tensor) -> Tensor:
        """The sum to be minimised. `embedding` is what all losses were computed from."""
        total = torch.stack([self._weight(name) * loss for name, loss in losses.items()]).sum()
        if self.method == "uncertainty" and self.free:
            total = total + SPEED * self.log_scale.sum()
        elif self.free and self.training and embedding.requires_grad and losses.keys() >= set(self.free):
            self._look([losses[name] for name in self.free], embedding)
        return total

    def weights(self) -> dict[str, float]:
        """As they are now."""
        with torch.no_grad():
            return {name: float(self._weight(name)) for name in self.fixed}

    def compared(self, losses: Mapping[str, float]) -> float:
        """The sum with weights that do not change."""
        return sum(weight * losses[name] for name, weight in self.fixed.items() if name in losses)

    def _weight(self, name: str) -> float | Tensor:
        if name not in self.free:
            return self.fixed[name]
        place = self.free.index(name)
        if self.method == "uncertainty":
            return torch.exp(-SPEED * self.log_scale[place])
        return USUAL[self.free[0]] * self.length[0] / self.length[place].clamp(min=1e-12)

    def _look(self, losses: Sequence[Tensor], embedding: Tensor) -> None:
        """Takes effect at the next step, so that all workers, which then get the first one's, use the same."""
        if self.looks % EVERY == 0:
            found = [torch.autograd.grad(loss, embedding, retain_graph=True)[0] for loss in losses]
            length = torch.stack([gradient.detach().float().norm() for gradient in found])
            self.length.lerp_(length, 1.0 if self.looks == 0 else 1 - MEMORY)
        self.looks += 1
