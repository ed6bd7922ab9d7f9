"""Targets: columns of the table that the embedding has to predict, as numbers; never an input.

Regressions are brought to mean 0 and variance 1 over the training rows, labels are numbered by how often those have
them. A loss is divided by that of the best constant answer, as it is for the columns that are read back.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from itemvec.check import undictionaried
from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from training import losses
from training.config import PredictConfig, TargetConfig

LOSSES: Final = {
    "huber": losses.huber,
    "l2": losses.l2,
    "l1": losses.l1,
    "cross_entropy": losses.nominal,
    "hinge": losses.hinge,
}
UNKNOWN: Final = -1
MOST_CLASSES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Target:
    """One column over the n rows of a table."""

    name: str
    loss: str
    weight: float

    classes: int
    """0 for a regression."""

    constant: float
    """The loss of the best constant answer, per training row that has the target."""

    majority: float
    """The class, or the scaled value, of the best constant answer."""

    values: Tensor
    """(n,) scaled float32, NaN where missing; or the class as int64, UNKNOWN where missing or new to training."""

    @property
    def known(self) -> Tensor:
        """(n,) whether a row has the target."""
        return known(self.values)

    def losses(self, predicted: Tensor, values: Tensor) -> Tensor:
        """(m, classes or 1), (m,) known values -> (m,), 1 on average for the best constant."""
        wanted = values if self.classes else values[:, None]
        return LOSSES[self.loss](predicted, wanted) / self.constant


def known(values: Tensor) -> Tensor:
    return ~values.isnan() if values.is_floating_point() else values != UNKNOWN


def fit(
    table: pa.Table, schema: FeatureSchema, config: PredictConfig, train: npt.NDArray[np.int64]
) -> tuple[Target, ...]:
    """Raises ConfigError where a target is a feature, is not in the table, or does not fit its loss."""
    targets = []
    for name, target in config.targets.items():
        if name in {schema.id, *(f.name for f in schema.features)}:
            raise ConfigError(
                f"predict.targets.{name}: the schema has it as an input, from which it would be copied; take it out of "
                f"the schema to predict it"
            )
        if name not in table.column_names:
            raise ConfigError(f"predict.targets.{name}: the table has no such column")
        column = undictionaried(table.column(name))
        made = _labels if target.loss in {"cross_entropy", "hinge"} else _numbers
        targets.append(made(name, column, target, train))
    return tuple(targets)


def save(targets: tuple[Target, ...], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plain = [{k: v for k, v in _fields(target).items() if k != "values"} for target in targets]
    (folder / "targets.json").write_text(json.dumps(plain), encoding="utf-8")
    for at, target in enumerate(targets):
        np.save(folder / f"{at}.npy", target.values.numpy())


def load(folder: Path) -> tuple[Target, ...]:
    plain: list[dict[str, Any]] = json.loads((folder / "targets.json").read_text(encoding="utf-8"))
    return tuple(
        Target(**fields, values=torch.from_numpy(np.load(folder / f"{at}.npy"))) for at, fields in enumerate(plain)
    )


def _fields(target: Target) -> dict[str, Any]:
    return {name: getattr(target, name) for name in Target.__dataclass_fields__}


def _numbers(name: str, column: pa.ChunkedArray, config: TargetConfig, train: npt.NDArray[np.int64]) -> Target:
    kind = column.type
    if not any(of(kind) for of in (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)):
        raise ConfigError(
            f"predict.targets.{name}: {config.loss} wants a column of numbers, this one is of {kind}; for classes take "
            f"cross_entropy or hinge"
        )
    values = np.array(column.cast(pa.float64(), safe=False).to_numpy())
    values[~np.isfinite(values)] = np.nan
    if config.scale == "log":
        if (lowest := np.nanmin(values, initial=0.0)) < 0:
            raise ConfigError(f"predict.targets.{name}: scale: log wants values of 0 or more, one is {lowest:g}")
        values = np.log1p(values)
    seen = values[train][~np.isnan(values[train])]
    _require_several(name, len(np.unique(seen)))
    scaled = torch.from_numpy(((values - seen.mean()) / seen.std()).astype(np.float32))
    mine = scaled[torch.from_numpy(train)]
    mine = mine[~mine.isnan()].double()
    best = {"l2": lambda: 0.0, "l1": lambda: float(mine.median()), "huber": lambda: losses.best_huber_constant(mine)}
    majority = best[config.loss]()
    constant = float(LOSSES[config.loss](torch.full_like(mine, majority)[:, None], mine[:, None]).mean())
    return Target(name, config.loss, config.weight, 0, constant, majority, scaled)


def _labels(name: str, column: pa.ChunkedArray, config: TargetConfig, train: npt.NDArray[np.int64]) -> Target:
    kind = column.type
    if not any(
        of(kind) for of in (pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean)
    ):
        raise ConfigError(
            f"predict.targets.{name}: {config.loss} wants a column of labels, this one is of {kind}; for numbers take "
            f"huber, l2 or l1"
        )
    counted = pc.value_counts(column.take(pa.array(train)).drop_null())
    order = np.argsort(-counted.field("counts").to_numpy(), kind="stable")
    counts = counted.field("counts").to_numpy()[order]
    _require_several(name, len(counts))
    if len(counts) > MOST_CLASSES:
        raise ConfigError(f"predict.targets.{name}: {len(counts):,} classes are more than {MOST_CLASSES:,}")
    place = pc.index_in(column, counted.field("values").take(pa.array(order)))
    values = torch.from_numpy(place.fill_null(UNKNOWN).to_numpy().astype(np.int64))
    share = counts / counts.sum()
    # Of all constants for the hinge, either the first class leads by 1 or none leads.
    constant = -float(share @ np.log(share)) if config.loss == "cross_entropy" else min(1.0, 2 * (1 - float(share[0])))
    return Target(name, config.loss, config.weight, len(counts), constant, 0, values)


def _require_several(name: str, different: int) -> None:
    if different < 2:
        raise ConfigError(f"predict.targets.{name}: the training rows have fewer than two values of it")
