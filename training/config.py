"""TrainConfig: every setting of a training run, each with its reason. A typo is an error.

epochs: 12
encoder: {dim: 32}
corruption: {mask: 0.3}
"""

import copy
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

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

from itemvec.encoder import EncoderConfig, Width
from itemvec.errors import ConfigError
from itemvec.schema import no_such_setting

Share = Annotated[float, Field(ge=0, lt=1)]
Weight = NonNegativeFloat | Literal["auto"]
"""What an objective's loss counts in the sum; `auto` leaves it to `balance`, and 0 turns the objective off."""


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(cls, path: Path | None, settings: dict[str, Any], default: dict[str, Any] | None = None) -> Self:
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


class CorruptionConfig(Settings):
    """How an item is damaged before it is encoded, so that each column has to be inferred from the others.

    `swap` and `mask` are of whole columns, `thin` and `unseen` of single labels.
    """

    whole: Share = 0.2
    """Items that are not damaged: what is whole is read back more exactly, and neighbors depend more on single
    columns."""

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


class ReconstructConfig(Settings):
    weight: Weight = "auto"
    """With 0 no column can be read back."""

    negatives: PositiveInt = 512
    """Labels that a large column is scored on in a step, besides those that the items have. Columns of twice as many
    labels or fewer are scored whole."""

    variational: NonNegativeFloat = 0.0
    """Above 0 the decoder reads a noisy copy of the embedding, and a step pays this much for each nat by which the
    noise of a number differs from that of the prior: a smoother space, that is read back less exactly. Noise is for
    training only."""


class ContrastConfig(Settings):
    weight: Weight = 0.2
    """With 0 a step encodes one damaged copy of an item instead of two. It lifts neighbors over what reconstruction
    alone gives, and costs a little of what can be read back."""

    temperature: PositiveFloat = 0.5
    """Lower looks at the hardest of the other items only: of a table with few columns those are items that are rightly
    near. On the validation rows of films and of streamed titles neighbors are better than at 0.2."""


class TargetConfig(Settings):
    """A column of the table that the embedding has to predict. It must not be a feature: its own value would leak."""

    loss: Literal["huber", "l2", "l1", "cross_entropy", "hinge"]
    """The first three are regressions, of a column of numbers: `l1` for the median, `l2` for the mean, `huber` between
    them. The others tell the classes of a column of labels apart: `hinge` stops where the right one leads by 1."""

    scale: Literal["standard", "log"] = "standard"
    """Of a regression; `log` for amounts over orders of magnitude (needs values >= 0)."""

    weight: NonNegativeFloat = 1.0
    """Against the other targets."""


class PredictConfig(Settings):
    """Targets by the names of their columns, such as {revenue: {loss: huber, scale: log}}."""

    weight: Weight = "auto"

    targets: dict[str, TargetConfig] = {}
    """Rows that lack a target are left out of its loss."""

    hidden: tuple[Width, ...] = ()
    """Widths of the layers between embedding and prediction; `[]` asks for what a linear model can read."""


class CoEngageConfig(Settings):
    """Items that the same users liked attract each other; it is learned where there are interactions."""

    weight: Weight = "auto"

    pairs: PositiveInt = 256
    """Pairs of items a step, over all workers together."""

    temperature: PositiveFloat = 0.1

    popularity_correction: Annotated[float, Field(ge=0, le=1)] = 1.0
    """1 takes out that popular items are in every batch (Yi et al. 2019), and embeddings recommend; 0 leaves it in, and
    they are similar. Between them it is taken out in part."""

    negatives: NonNegativeInt = 0
    """Items drawn alike from the whole table that every pair is told apart from, besides those of the batch (mixed
    negatives, Yang et al. 2020): without them items that nobody likes are never pushed away."""

    hard: NonNegativeInt = 0
    """Negatives that a pair keeps of all these, those nearest to its anchor at the time; 0 keeps all."""


class InteractionsConfig(Settings):
    """The columns of the table of interactions, a row of which says that a user met an item."""

    user: str = "user_id"
    item: str = "item_id"

    weight: str | None = None
    """The column that says how much the user liked the item; without it every row is a like."""

    least: float | None = None
    """Rows of at least this weight are likes."""

    @model_validator(mode="after")
    def _compares_something(self) -> "InteractionsConfig":
        if (self.weight is None) != (self.least is None):
            raise ValueError("weight names the column that least is compared with: give both or neither")
        return self


class OptimizerConfig(Settings):
    """One method for the layers; for the tables Adam, on CPU with the gradients of the rows that a batch used."""

    method: Literal["adamw", "adam", "sgd"] = "adamw"
    """Of the layers. `adam` decays weights by way of the gradient; `sgd` wants a `learning_rate` of its own."""

    learning_rate: PositiveFloat | None = None
    """Of the layers. None is 0.004, and 0.00025 where likes have weighted the columns that training starts from: likes
    are few, and longer steps learn by heart who was in a film that was liked."""

    table_learning_rate: PositiveFloat | None = None
    """None is 0.02, since rows of rare labels see few steps; and 0.00025 in that other case, where they would be the
    first to learn by heart."""

    momentum: Share = 0.9
    """Of `sgd`."""

    weight_decay: NonNegativeFloat = 0.01

    schedule: Literal["cosine", "constant", "one_cycle", "step", "plateau"] = "cosine"
    """How the rates move: `cosine` rises over `warmup` and falls to 0; `one_cycle` rises over 0.3 of the steps from a
    25th (Smith and Topin 2017); `step` and `plateau` are multiplied by `factor`, at every `every`-th epoch or after so
    many without a better validation loss."""

    warmup: Share = 0.05
    """Share of the steps over which the rates rise; `one_cycle` has its own rise."""

    factor: Annotated[float, Field(gt=0, lt=1)] = 0.3
    every: PositiveInt = 3

    clip: PositiveFloat = 1.0
    """Largest length of the layers' gradient."""

    def rates(self, weighted: bool) -> tuple[float, float]:
        """Of the layers and of the tables; `weighted`: whether likes have weighted the columns."""
        layers, tables = (2.5e-4, 2.5e-4) if weighted else (4e-3, 2e-2)
        return self.learning_rate or layers, self.table_learning_rate or tables


class TrainConfig(Settings):
    encoder: EncoderConfig = EncoderConfig()
    corruption: CorruptionConfig = CorruptionConfig()
    reconstruct: ReconstructConfig = ReconstructConfig()
    contrast: ContrastConfig = ContrastConfig()
    predict: PredictConfig = PredictConfig()
    co_engage: CoEngageConfig = CoEngageConfig()
    interactions: InteractionsConfig = InteractionsConfig()

    start: Literal["components", "random"] = "components"
    """Where the encoder starts: at the principal components of the columns, so that it begins with what a linear method
    knows; with interactions, each column first gets the weight by which likes are best foreseen."""

    warm: bool = True
    """Where a run follows a version (`itemvec retrain`, or `itemvec train --from`) and the network has the same shape,
    it starts with that version's weights instead: known labels keep their rows, new ones begin as unseen ones did."""

    compatible: NonNegativeFloat = 0.0
    """What it counts that an item's vector stays where that version has it (backward-compatible training, Shen et al.
    2020), so that old and new vectors can be compared; what is learned anew then moves less."""

    balance: Literal["gradient", "uncertainty", "none"] = "gradient"
    """How objectives whose weight is `auto` are weighted, where there are several: so that they pull the embedding
    equally hard, by their learned uncertainty, or each by 1 (`contrast` and `co_engage` by 0.1)."""

    optimizer: OptimizerConfig = OptimizerConfig()

    epochs: PositiveInt = 8

    batch_size: Annotated[int, Field(ge=2)] = 256
    """Items a step, over all workers together; a table with fewer is one batch."""

    epoch_steps: PositiveInt | None = None
    """Steps of an epoch at most, each epoch of other rows: where once through a large table is too long to wait for a
    validation and a checkpoint. None is once through."""

    patience: PositiveInt = 4
    """Epochs without a better loss on the validation rows, or with interactions without better recommendations of
    them, after which training stops. The best epoch's weights are kept."""

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
    def _leaves_rows(self) -> "TrainConfig":
        if self.test + self.validation > 0.9:
            raise ValueError("test and validation together leave less than a tenth of the rows to train on")
        return self


AnySettings = TypeVar("AnySettings", bound=BaseModel)


def validated(model: type[AnySettings], content: Any, source: str) -> AnySettings:
    """`content` as settings; ConfigError with one sentence per mistake."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        said = (f"{'.'.join(map(str, e['loc']))}: {_plain(e, model)}".removeprefix(": ") for e in error.errors())
        raise ConfigError(f"{source}: {'; '.join(said)}") from None


def _plain(mistake: Any, model: type[BaseModel]) -> str:
    if mistake["type"] != "extra_forbidden":
        text: str = mistake["msg"].removeprefix("Value error, ")
        return text
    *path, name = mistake["loc"]
    there: Any = model
    for part in path:
        field = there.model_fields.get(part) if _has_fields(there) else None
        there = field and field.annotation
    if not _has_fields(there):
        return "no such setting"
    return no_such_setting(str(name), there.model_fields)


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


Device = Literal["auto", "cpu", "gpu"]


class ClusterConfig(Settings):
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
