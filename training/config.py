"""TrainConfig: every setting of a training run, each with its reason. A typo is an error.

epochs: 12
encoder: {dim: 32}
corruption: {mask: 0.3}
"""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from itemvec.encoder import EncoderConfig
from itemvec.errors import ConfigError

Share = Annotated[float, Field(ge=0, lt=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CorruptionConfig(_Settings):
    """How an item is damaged before it is encoded, so that each column has to be inferred from the others.

    `swap` and `mask` are of whole columns, `thin` and `unseen` of single labels.
    """

    swap: Share = 0.1
    """Columns that are taken from another item: the encoder learns to doubt what does not fit the rest."""

    mask: Share = 0.2
    """Columns that are taken away: at serving time new items lack columns too, and this trains the missing rows."""

    thin: Share = 0.2
    """Labels taken out of their sets, so that no single actor or word carries a film."""

    unseen: Share = 0.05
    """Labels replaced by the out-of-vocabulary row, which is trained by this."""

    @model_validator(mode="after")
    def _leave_something(self) -> "CorruptionConfig":
        if self.swap + self.mask + self.unseen > 0.95:
            raise ValueError("swap, mask and unseen together may take at most 0.95 of the columns")
        return self


class ReconstructConfig(_Settings):
    weight: NonNegativeFloat = 1.0
    """What the decoder's loss counts in the sum of the objectives; 0 turns it off, and no column can be read back
    then."""

    negatives: PositiveInt = 512
    """Labels that a large column is scored on in a step, besides those that the items have. Columns of twice as many
    labels or fewer are scored whole."""


class ContrastConfig(_Settings):
    weight: NonNegativeFloat = 0.1
    """What it counts; with 0 a step encodes one damaged copy of an item instead of two. It lifts neighbors over what
    reconstruction alone gives; from about 0.3 on it costs what can be read back, and gains no more."""

    temperature: PositiveFloat = 0.2
    """Lower looks at the hardest of the other items only."""


class OptimizerConfig(_Settings):
    """AdamW for the layers; for the two tables Adam, on CPU with the gradients of the rows that a batch used."""

    learning_rate: PositiveFloat = 2e-3

    table_learning_rate: PositiveFloat = 5e-3
    """Rows of rare labels see few steps, so theirs are longer."""

    weight_decay: NonNegativeFloat = 0.01
    warmup: Share = 0.05
    """Share of the steps over which the rate rises; from there it falls to 0 along a cosine."""

    clip: PositiveFloat = 1.0
    """Largest length of the layers' gradient."""


class TrainConfig(_Settings):
    encoder: EncoderConfig = EncoderConfig()
    corruption: CorruptionConfig = CorruptionConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()
    contrast: ContrastConfig = ContrastConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    epochs: PositiveInt = 8

    batch_size: Annotated[int, Field(ge=2)] = 256
    """Items a step, over all workers together; a table with fewer is one batch."""

    patience: PositiveInt = 4
    """Epochs without a better loss on the validation rows after which training stops. The best epoch's weights are
    kept."""

    test: Share = 0.1
    """Rows, by a hash of their id, that nothing is fitted or chosen on: what the evaluation is measured on. The hash
    makes them the same rows in every version of the table."""

    validation: Share = 0.05
    """Rows that decide when to stop."""

    seed: NonNegativeInt = 0
    """Runs of one worker on one machine repeat to the bit."""

    checkpoint_seconds: PositiveFloat = 30.0
    """What a killed worker or driver loses at most, besides the epoch that it was in."""

    @model_validator(mode="after")
    def _has_an_objective(self) -> "TrainConfig":
        if not self.reconstruct.weight and not self.contrast.weight:
            raise ValueError("reconstruct.weight and contrast.weight are both 0: there is nothing to learn")
        if self.test + self.validation > 0.9:
            raise ValueError("test and validation together leave less than a tenth of the rows to train on")
        return self

    @classmethod
    def load(cls, path: Path | None, settings: dict[str, Any], default: dict[str, Any] | None = None) -> "TrainConfig":
        """The file at `path`, or else `default`, with `settings` such as {"encoder.dim": 32} over it. Raises
        ConfigError."""
        content: Any = copy.deepcopy(default or {})
        if path is not None:
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            except FileNotFoundError:
                raise ConfigError(f"no config file at {path}") from None
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
                raise ConfigError(f"cannot read the config {path}: {' '.join(str(error).split())}") from None
            if not isinstance(content, dict):
                raise ConfigError(f"{path} must hold settings by name; it is a {type(content).__name__}")
        for name, value in settings.items():
            place = content
            *groups, last = name.split(".")
            for group in groups:
                place = place.setdefault(group, {})
                if not isinstance(place, dict):
                    raise ConfigError(f"{name}: {group} is a value, not a group of settings")
            place[last] = value
        return validated(cls, content, str(path or "settings"))


AnySettings = TypeVar("AnySettings", bound=BaseModel)


def validated(model: type[AnySettings], content: Any, source: str) -> AnySettings:
    """`content` as settings; ConfigError with one sentence per mistake."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        said = (f"{'.'.join(map(str, e['loc']))}: {_plain(e)}".removeprefix(": ") for e in error.errors())
        raise ConfigError(f"{source}: {'; '.join(said)}") from None


def _plain(mistake: Any) -> str:
    if mistake["type"] == "extra_forbidden":
        return "no such setting"
    text: str = mistake["msg"].removeprefix("Value error, ")
    return text


Device = Literal["auto", "cpu", "gpu"]


class ClusterConfig(_Settings):
    """Where and on what a run goes. No part of what is learned, so two runs that differ here are the same model."""

    workers: PositiveInt = 1
    """Ray Train workers; each takes an equal part of every batch."""

    cpus_per_worker: PositiveFloat = 1.0

    device: Device = "auto"
    """`auto` takes GPUs where the cluster has one per worker."""

    address: str | None = None
    """A Ray cluster's address, `auto` for one that runs on this machine; without it the run brings its own."""

    max_failures: NonNegativeInt = 2
    """Times that lost workers are started again from the last checkpoint."""

    start_seconds: PositiveFloat = 60.0
    """How long to wait for a cluster that could hold the workers but is busy."""
