"""Ray Train's trainer of torch models, with no more processes than a run of ours needs."""

from typing import Any

from ray.train.torch import TorchTrainer

UNUSED = frozenset({"DatasetsCallback", "PlacementGroupCleanerCallback"})
"""Each starts a process of its own, a second and a half of a core: one hands out Ray Data, which the workers do not
read; the other frees the workers' room when their controller dies, which Ray does too when the driver ends."""


class LeanTrainer(TorchTrainer):
    """Where another release of Ray names these differently, they are there again and nothing else is lost."""

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc] # mypy sees the trainer of Ray Train 1
        return [callback for callback in made if type(callback).__name__ not in UNUSED]
