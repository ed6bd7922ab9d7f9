"""What a search for settings found: a table of its trials, the best settings, and which of them mattered."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from training.config import TrainConfig

Settings = dict[str, Any]
Outcome = Literal["ended", "stopped", "failed"]


@dataclass(frozen=True, slots=True)
class Trial:
    number: int
    settings: Settings
    """What was drawn, by dotted names; none in trial 0, the settings as they were."""
    outcome: Outcome
    """`stopped`: it fell behind."""
    score: float | None
    """Of the epoch that a run would keep; None where it failed."""
    epochs: int = 0
    seconds: float = 0.0
    error: str = ""


@dataclass(frozen=True, slots=True)
class Tuned:
    trials: list[Trial]
    """Best first, those that failed last."""
    metric: str
    config: TrainConfig
    """Of the best."""
    matters: dict[str, float]
    """Per setting the share of the scores' variance that it explains alone, largest first."""

    def summary(self, most: int = 10) -> list[str]:
        """The best trials, the settings as they were, and what mattered, a line each."""
        told = [f"best of {len(self.trials)} trials, by {self.metric} on the validation rows:"]
        for place, trial in enumerate(self.trials):
            if trial.score is not None and (place < most or trial.number == 0):
                told.append(f"  {place + 1:>3}  {trial.score:.4f}  {trial.epochs:>3} epochs  {shown(trial.settings)}")
        mattered = ", ".join(f"{name} {share:.0%}" for name, share in self.matters.items() if share >= 0.01)
        told.append(f"what mattered (share of the variance explained alone): {mattered or 'nothing stands out'}")
        return told

    def write(self, folder: Path) -> None:
        """trials.csv, best.yaml and settings.svg."""
        from training.plots import scores_by_setting  # noqa: PLC0415 - matplotlib takes a second to import

        folder.mkdir(parents=True, exist_ok=True)
        names = list(self.matters)
        with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["trial", "outcome", self.metric, "epochs", "seconds", *names, "error"])
            for t in self.trials:
                drawn = [t.settings.get(name, "") for name in names]
                score = "" if t.score is None else t.score
                rows.writerow([t.number, t.outcome, score, t.epochs, round(t.seconds, 1), *drawn, t.error])
        differs = self.config.model_dump(mode="json", exclude_defaults=True)
        best = self.trials[0]
        head = (
            f"# trial {best.number} of {len(self.trials)}: {self.metric} {best.score:.4f}; all else is as by default\n"
        )
        (folder / "best.yaml").write_text(head + yaml.safe_dump(differs, sort_keys=False), encoding="utf-8")
        scored = [t for t in self.trials if t.score is not None]
        (folder / "settings.svg").write_text(scores_by_setting(self.matters, scored, self.metric), encoding="utf-8")


def shown(settings: Settings) -> str:
    told = (
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in settings.items()
    )
    return ", ".join(told) or "the settings as they are"


def matters(settings: Sequence[Settings], scores: Sequence[float], names: Iterable[str]) -> dict[str, float]:
    """Per setting the share of the variance of `scores` that it explains alone, of a parabola through its values, or of
    the mean of each choice; adjusted for how many numbers those are, so that what is by chance is about 0. Largest
    first."""
    found = {}
    for name in names:
        drawn = [(s[name], score) for s, score in zip(settings, scores, strict=True) if name in s]
        found[name] = _explained([v for v, _ in drawn], np.array([score for _, score in drawn]))
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _explained(values: list[Any], scores: npt.NDArray[np.float64]) -> float:
    columns = _features(values)
    n, free = len(scores), columns.shape[1]
    total = float(np.square(scores - scores.mean()).sum()) if n else 0.0
    if total == 0 or n <= free:
        return 0.0
    fitted = columns @ np.linalg.lstsq(columns, scores, rcond=None)[0]
    left = float(np.square(scores - fitted).sum())
    share: float = 1 - (left / (n - free)) / (total / (n - 1))
    return max(0.0, share)


def _features(values: list[Any]) -> npt.NDArray[np.float64]:
    """(n, f) with a constant: 1, rank and its square of numbers; else a column of zeros and ones for each choice."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        rank = np.unique(values, return_inverse=True)[1] / max(len(set(values)) - 1, 1) if values else np.zeros(0)
        return np.stack([np.ones(len(rank)), rank, rank**2][: min(3, len(set(values)) or 1)], axis=1)
    choices = [str(value) for value in values]
    return np.stack([[choice == one for choice in choices] for one in dict.fromkeys(choices)], axis=1).astype(float)
