"""What a run knows of the version that it follows: the weights to begin with, and the vectors to stay near.

`training.warm` makes it once, in the driver; every worker opens the same files.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

Weights = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Parent:
    version: int

    rows: Tensor | None
    """(m,) ascending: the rows of the prepared table whose vectors are known; all of them where the run is to be
    `compatible`"""

    vectors: Tensor | None
    """(m, dim) of these as the version serves them; None where its dim is another one"""

    basis: Tensor | None
    """(dim, dim) turns them to the axes that the version was trained on, and so those that training begins with"""

    encoder: Weights | None
    decoder: Weights | None
    """To begin with; None where training begins anew."""

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("encoder", "decoder"):
            if (weights := getattr(self, name)) is not None:
                save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")
        for name in ("rows", "vectors", "basis"):
            if (numbers := getattr(self, name)) is not None:
                np.save(folder / f"{name}.npy", numbers.numpy())
        (folder / "version").write_text(str(self.version))

    @classmethod
    def open(cls, folder: Path) -> "Parent | None":
        if not (folder / "version").exists():
            return None
        found: dict[str, Any] = {"version": int((folder / "version").read_text())}
        for name in ("encoder", "decoder"):
            path = folder / f"{name}.safetensors"
            found[name] = load_file(path) if path.exists() else None
        for name in ("rows", "vectors", "basis"):
            path = folder / f"{name}.npy"
            found[name] = torch.from_numpy(np.load(path, mmap_mode="c")) if path.exists() else None
        return cls(**found)

    def as_trained(self, items: Tensor) -> Tensor | None:
        """(B,) items -> (B, dim) their vectors as the losses of the version read them, of length 1."""
        if self.rows is None or self.vectors is None or self.basis is None:
            return None
        return functional.normalize(self.vectors[torch.searchsorted(self.rows, items)] @ self.basis.T, dim=1)
