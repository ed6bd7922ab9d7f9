"""`itemvec tune`: many short trainings on one prepared table, each with settings drawn from a declared space.

    prepare the table once -> trial 0: the settings as they are; 1, 2, ...: drawn -> table, best settings, picture

Ray Tune runs as many trials at once as the cluster has room for, and stops those early that fall behind at an epoch
(ASHA, Li et al. 2020). A trial's draw follows from the seed and its number alone, and what it reached is in a file of
its own, so the same command goes on where it was killed, and with more trials where it ended.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
import torch
import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler

from itemvec.errors import ConfigError, ItemvecError
from itemvec.table import table_digest
from training import cluster as ray_cluster
from training.coldstart import cold_start
from training.config import TrainConfig
from training.data import Prepared
from training.folds import TEST, VALIDATION
from training.items import forget
from training.judged import Views, judged, measured_rows, searched_rows, truth_of
from training.loop import Trainer
from training.objectives import chosen
from training.progress import Display
from training.retrieval import retrieve
from training.run import Job, best_of, locked, prepared, read_items, run_digest, settle
from training.tuned import Outcome, Settings, Trial, Tuned, matters, shown

Metric = Literal["precision", "ndcg", "loss"]
"""Of the validation rows: mean precision@10 of neighbors for hidden columns; NDCG@20 of new items for users, where
there are likes; the loss, which compares settings only if no objective's weight or temperature is among them."""

FIXED = ("test", "validation", "predict", "interactions", "checkpoint_seconds")
"""Settings that decide how the table is prepared, which all trials share, or that a trial has no use for."""

UNSEEN = 3
"""The fold of the test rows: not even a choice of settings may see them."""

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # TensorBoard, CSV and JSON of every trial: ours says what there is
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a summary even where nothing is to be said
}

WORST = -1e9
"""What a trial that failed is compared with others by; no infinity, which the scheduler would interpolate."""

TRIES = 100
"""Draws until one is valid: settings can contradict each other."""

DEFAULT_SPACE = """\
optimizer.learning_rate: {loguniform: [0.0002, 0.01]}
optimizer.table_learning_rate: {loguniform: [0.0002, 0.05]}
encoder.hidden: {choice: [[], [128], [256], [512], [256, 128]]}
encoder.dropout: {uniform: [0.0, 0.3]}
contrast.weight: {loguniform: [0.01, 0.5]}
corruption.mask: {uniform: [0.0, 0.4]}
corruption.swap: {uniform: [0.0, 0.2]}
corruption.thin: {uniform: [0.0, 0.4]}
"""


@dataclass(frozen=True, slots=True)
class Range:
    """What a setting is drawn from."""

    kind: Literal["choice", "uniform", "loguniform", "int"]
    values: tuple[Any, ...]
    """The choices, or the least and the largest value."""

    def draw(self, dice: np.random.Generator) -> Any:
        if self.kind == "choice":
            return self.values[int(dice.integers(len(self.values)))]
        low, high = self.values
        if self.kind == "int":
            return int(dice.integers(low, high + 1))
        number = dice.uniform(low, high) if self.kind == "uniform" else low * (high / low) ** dice.uniform()
        return float(f"{number:.4g}")  # what a person would write


Space = Mapping[str, Range]


def read_space(text: str, source: str) -> dict[str, Range]:
    """Settings of TrainConfig by their dotted names, each with `choice`, `uniform`, `loguniform` or `int`. Raises
    ConfigError.

    >>> read_space("encoder.cross: {int: [0, 2]}", "space.yaml")
    {'encoder.cross': Range(kind='int', values=(0, 2))}
    """
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"{source} must name settings, each with what it is drawn from: {_EXAMPLE}")
    return {str(name): _range(str(name), body, source) for name, body in content.items()}


_EXAMPLE = "encoder.dropout: {uniform: [0, 0.3]}"


def _range(name: str, body: Any, source: str) -> Range:
    if name.partition(".")[0] in FIXED:
        raise ConfigError(f"{source}: {name} is the same for all trials: give it with --set")
    if not isinstance(body, dict) or len(body) != 1:
        raise ConfigError(f"{source}: {name} needs one of choice, uniform, loguniform and int, as in {_EXAMPLE}")
    ((kind, values),) = body.items()
    if kind not in ("choice", "uniform", "loguniform", "int"):
        raise ConfigError(f"{source}: {name}: no {kind!r}; there is choice, uniform, loguniform and int")
    if not isinstance(values, list) or not values:
        raise ConfigError(f"{source}: {name}: {kind} takes a list, and not {values!r}")
    if kind != "choice":
        number = int if kind == "int" else (int, float)
        if len(values) != 2 or not all(isinstance(v, number) and not isinstance(v, bool) for v in values):
            raise ConfigError(f"{source}: {name}: {kind} takes the least and the largest value, and not {values}")
        if values[0] >= values[1] or (kind == "loguniform" and values[0] <= 0):
            raise ConfigError(f"{source}: {name}: {kind} must grow{' from above 0' * (kind == 'loguniform')}: {values}")
    return Range(kind, tuple(values))


def drawn(space: Space, base: TrainConfig, seed: int, number: int) -> Settings:
    """The settings of a trial; none of trial 0, which is the base. Raises ConfigError where no draw is valid."""
    if number == 0:
        return {}
    dice = np.random.default_rng([seed, number])
    for _ in range(TRIES):
        settings = {name: ranged.draw(dice) for name, ranged in space.items()}
        try:
            configured(base, settings)
        except ConfigError as error:
            refused = error
            continue
        return settings
    raise ConfigError(f"{TRIES} draws in a row make no valid settings: {refused}")


def configured(base: TrainConfig, settings: Settings) -> TrainConfig:
    return TrainConfig.load(None, settings, base.model_dump(mode="json"))


def tune(job: Job, space: Space, trials: int, metric: Metric, display: Display) -> Tuned:
    """Runs what is left of trials 0 to `trials` - 1. Raises ConfigError where the space or the metric makes no sense,
    ItemvecError where every trial failed."""
    settings = [drawn(space, job.config, job.config.seed, number) for number in range(trials)]
    folder = job.runs / f"tune-{job.name}-{_digest(job, space, metric)}"
    with locked(folder / "lock", f"another process tunes {job.name} on this table with this space"):
        left = [number for number in range(trials) if _kept(folder, number) is None]
        if len(left) < trials:
            display.line(f"{trials - len(left)} of {trials} trials were run before")
        if left:
            _run(job, folder, settings, left, metric, display)
        done = [trial for number in range(trials) if (trial := _kept(folder, number)) is not None]
        if len(done) < trials:
            raise ItemvecError(f"{trials - len(done)} of {trials} trials did not end; the same command goes on")
        for path in folder.iterdir():  # what they reached stays, for the same command with more of them
            if path.name not in ("trials", "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    forget(job.runs)
    best_first = ranked(done, metric)
    scores = [trial.score for trial in done if trial.score is not None]
    if not scores:
        raise ItemvecError(f"every trial failed; the first one: {done[0].error}")
    counted = matters([trial.settings for trial in done if trial.score is not None], scores, space)
    return Tuned(best_first, metric, configured(job.config, best_first[0].settings), counted)


def _digest(job: Job, space: Space, metric: Metric) -> str:
    likes = table_digest(job.interactions) if job.interactions else None
    what = [run_digest(job, table_digest(job.table), likes), metric, {n: asdict(r) for n, r in space.items()}]
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]


def _run(
    job: Job, folder: Path, settings: Sequence[Settings], left: Sequence[int], metric: Metric, display: Display
) -> None:
    display.say("read", f"reading {job.table}")
    data = prepared(job, read_items(job), folder, display)
    chosen(job.config, data)
    if metric == "ndcg" and data.interactions is None:
        raise ConfigError("ndcg is of users' likes: name their table with --interactions, or take another --metric")
    shutil.rmtree(folder / "ray", ignore_errors=True)
    most = max(configured(job.config, drawn).epochs for drawn in settings)
    fixed = {"folder": str(folder.resolve()), "config": job.config.model_dump(mode="json"), "metric": metric}
    with ray_cluster.connected(job.cluster):
        nodes = ray_cluster.alive_nodes()
        each = ray_cluster.resources_per_worker(job.cluster, nodes)
        logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is ours to say
        display.say("tune", f"{len(left)} trials to run, {ray_cluster.held(nodes, each)} at once")
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(run_trial, {name.lower(): amount for name, amount in each.items()}),
            param_space={
                **fixed, "trial": ray_tune.grid_search([{"number": n, "settings": settings[n]} for n in left])
            },
            tune_config=ray_tune.TuneConfig(
                metric="gain", mode="max", reuse_actors=True,
                scheduler=ASHAScheduler(max_t=most, grace_period=max(1, math.ceil(most / 4))),
            ),
            run_config=ray_tune.RunConfig(
                name="ray", storage_path=str(folder.resolve()), verbose=0,
                callbacks=[_Told(folder, settings, metric, display)],
            ),
        )  # fmt: skip
        with ray_cluster.environment(ENVIRONMENT):
            tuner.fit()


def run_trial(task: dict[str, Any]) -> None:
    """What Ray Tune runs in a process of its own."""
    try:
        config = configured(TrainConfig.model_validate(task["config"]), task["trial"]["settings"])
        trainer = Trainer(
            Prepared.open(Path(task["folder"])), config, torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        )
        score = math.nan
        for metrics in trainer.epochs():
            if metrics["best"]:
                score = score_of(trainer, task["metric"])
            gain = -score if task["metric"] == "loss" else score
            ray_tune.report({"gain": gain, "score": score, "ended": trainer.finished, "error": ""})
    except (RuntimeError, ItemvecError) as error:  # a loss that is no number: of this trial, and no reason to end
        why = " ".join(str(error).split())
        ray_tune.report({"gain": WORST, "score": None, "ended": True, "error": why})


def score_of(trainer: Trainer, metric: Metric) -> float:
    """Of the best epoch so far, on the validation rows."""
    if metric == "loss":
        loss: float = trainer.history[trainer.best_epoch - 1]["validation"]["total"]
        return loss
    data, config = trainer.data, trainer.config
    encoder, decoder = best_of({"best": trainer.best}, config, data)
    settle(encoder, decoder, data)
    model = judged(data, encoder, decoder)
    fold = np.select([data.fold == VALIDATION, data.fold == TEST], [TEST, UNSEEN], data.fold).astype(np.int8)
    if metric == "ndcg":
        cold = cold_start(model, data.interactions.likes, fold, baselines=False) if data.interactions else None
        if cold is None:
            raise ConfigError("ndcg: no user liked 5 training items and one of the validation rows")
        ndcg: float = cold["model"]["ndcg"]
        return ndcg
    with torch.inference_mode():
        found, _ = retrieve(
            Views(model, searched_rows(fold)), len(measured_rows(fold)), truth_of(model), baselines=False
        )
    if not found["mean"]:
        raise ConfigError("precision: no column of labels to hide; take --metric loss")
    precision: float = found["mean"]["precision"]
    return precision


class _Told(ray_tune.Callback):
    """Writes what a trial reached into its file, and tells it."""

    def __init__(self, folder: Path, settings: Sequence[Settings], metric: Metric, display: Display) -> None:
        self.folder, self.settings, self.metric, self.display = folder, settings, metric, display
        self.began, self.ran = time.monotonic(), 0

    def __getstate__(self) -> dict[str, Any]:
        """Ray saves what it runs, and a terminal cannot be saved; it is the files that a later run goes on from."""
        return {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        ended = sum(one.is_finished() for one in trials)
        running = sum((one.last_result or {}).get("training_iteration", 0) for one in trials if not one.is_finished())
        self.display.bar(f"{ended} of {len(trials)} trials, {running} epochs in those that run", ended, len(trials))

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        last = trial.last_result
        outcome: Outcome = "failed" if last["error"] else "ended" if last["ended"] else "stopped"
        self._keep(trial, outcome, last["score"], last["training_iteration"], last["time_total_s"], last["error"])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._keep(trial, "failed", None, 0, 0.0, "its process died; of too little memory, if nobody ended it")

    def _keep(
        self, trial: Any, outcome: Outcome, score: float | None, epochs: int, seconds: float, error: str = ""
    ) -> None:
        number: int = trial.config["trial"]["number"]
        kept = Trial(number, self.settings[number], outcome, score, epochs, seconds, error)
        path = _file(self.folder, number)
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(kept)), encoding="utf-8")
        draft.replace(path)
        done = [t for n in range(len(self.settings)) if (t := _kept(self.folder, n)) is not None]
        best = ranked(done, self.metric)[0]
        self.ran += 1
        left = (len(self.settings) - len(done)) * (time.monotonic() - self.began) / self.ran
        told = f"{self.metric} {score:.4f}" if score is not None else f"failed: {error}"
        took = f"{epochs} epochs, {seconds:.0f} s" + ", fell behind" * (outcome == "stopped")
        so_far = "  [green]best so far[/]" * (best.number == number and score is not None)
        self.display.line(
            f"{len(done):>3} of {len(self.settings)}  trial {number}: {told}  ({took})  {left:.0f} s left{so_far}"
        )
        self.display.line(f"  [dim]{shown(kept.settings)}[/]")


def ranked(trials: Sequence[Trial], metric: str) -> list[Trial]:
    """Best first, those that failed last."""
    sign = 1 if metric == "loss" else -1
    return sorted(trials, key=lambda trial: math.inf if trial.score is None else sign * trial.score)


def _file(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number}.json"


def _kept(folder: Path, number: int) -> Trial | None:
    path = _file(folder, number)
    return Trial(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
