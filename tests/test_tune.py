"""A search for settings: what is drawn, what is kept, and that it goes on where it was killed."""

import csv
import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import scipy.sparse as sp
import torch
import yaml
from click.testing import CliRunner
from films import SCHEMA, table
from realservice import eventually
from test_run import films

from itemvec.cli import cli
from itemvec.encoder import EncoderConfig
from itemvec.errors import ConfigError, ItemvecError
from training.colditems import ColdItems
from training.config import TrainConfig
from training.data import Prepared
from training.folds import TEST, VALIDATION
from training.interactions import Interactions
from training.loop import Trainer
from training.tune import DEFAULT_SPACE, Range, drawn, ranked, read_space, score_of
from training.tuned import Trial, Tuned, matters

SMALL = TrainConfig(encoder=EncoderConfig(dim=8, hidden=(16,), decoder_hidden=(16,)), epochs=3)
SPACE = """
encoder.dim: {choice: [4, 8]}
encoder.hidden: {choice: [[], [16]]}
encoder.dropout: {uniform: [0.1, 0.3]}
encoder.cross: {int: [1, 2]}
optimizer.learning_rate: {loguniform: [0.0001, 0.01]}
"""


def test_draws_are_of_their_ranges_and_follow_from_seed_and_number():
    space = read_space(SPACE, "space.yaml")
    settings = [drawn(space, SMALL, 0, number) for number in range(1, 200)]
    assert {s["encoder.dim"] for s in settings} == {4, 8} and {s["encoder.cross"] for s in settings} == {1, 2}
    assert all(0.1 <= s["encoder.dropout"] <= 0.3 for s in settings)
    rates = np.array([s["optimizer.learning_rate"] for s in settings])
    assert rates.min() >= 0.0001 and rates.max() <= 0.01
    assert 0.4 < (rates < 0.001).mean() < 0.6  # half of a log-uniform draw is below the geometric mean
    assert drawn(space, SMALL, 0, 7) == settings[6] != drawn(space, SMALL, 1, 7)
    assert drawn(space, SMALL, 0, 0) == {}


def test_a_draw_that_contradicts_itself_is_drawn_again():
    # nested must stay below dim: of the four pairs just 8 with [4] will do.
    space = read_space("encoder.dim: {choice: [4, 8]}\nencoder.nested: {choice: [[4], [8]]}", "space.yaml")
    settings = [drawn(space, SMALL, 0, number) for number in range(1, 20)]
    assert all(s == {"encoder.dim": 8, "encoder.nested": [4]} for s in settings)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ("", "must name settings"),
        ("encoder.dim: 8", "encoder.dim needs one of choice, uniform, loguniform and int"),
        ("encoder.dim: {normal: [0, 1]}", "no 'normal'; there is choice, uniform, loguniform and int"),
        ("encoder.dim: {int: [8]}", "int takes the least and the largest value"),
        ("encoder.dim: {int: [8.5, 9]}", "int takes the least and the largest value"),
        ("encoder.dropout: {uniform: [0.3, 0.1]}", "uniform must grow"),
        ("optimizer.learning_rate: {loguniform: [0, 0.1]}", "loguniform must grow from above 0"),
        ("test: {uniform: [0.1, 0.2]}", "test is the same for all trials: give it with --set"),
        ("encoder.dimm: {int: [8, 9]}", "encoder.dimm: no such setting"),
        ("corruption: {choice: [", "is not YAML"),
    ],
)
def test_a_space_that_makes_no_sense_is_an_error_that_says_so(space, said):
    with pytest.raises(ConfigError) as error:
        drawn(read_space(space, "space.yaml"), SMALL, 0, 1)
    assert said in str(error.value)


def test_the_default_space_is_of_settings_that_there_are():
    for number in range(1, 50):
        drawn(read_space(DEFAULT_SPACE, "default"), TrainConfig(), 0, number)


def test_what_mattered_is_the_share_of_the_variance_that_a_setting_explains():
    dice = np.random.default_rng(0)
    settings = [{"a": float(a), "b": str(b), "c": float(c)} for a, b, c in dice.integers(0, 3, (300, 3))]
    # The variance of 2 [b = 1] is 4 * 1/3 * 2/3 = 8/9, that of (a - 1)^2, which is 1, 0 or 1, is 2/9: 80 % and 20 %.
    scores = [2 * (s["b"] == "1") + (s["a"] - 1) ** 2 for s in settings]
    shares = matters(settings, scores, ["a", "b", "c"])
    assert list(shares) == ["b", "a", "c"]
    assert shares == pytest.approx({"b": 0.8, "a": 0.2, "c": 0.0}, abs=0.05)
    assert matters(settings[:2], scores[:2], ["a"]) == {"a": 0.0}  # two trials explain nothing


def test_a_loss_is_best_where_it_is_low_and_a_failed_trial_is_last():
    trials = [
        Trial(0, {}, "ended", 0.5), Trial(1, {}, "failed", None, error="no"), Trial(2, {}, "stopped", 0.4)
    ]  # fmt: skip
    assert [t.number for t in ranked(trials, "precision")] == [0, 2, 1]
    assert [t.number for t in ranked(trials, "loss")] == [2, 0, 1]


def table_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_what_is_written_can_be_read_again(tmp_path):
    best = TrainConfig.load(None, {"encoder.dim": 12, "encoder.hidden": [8], "optimizer.learning_rate": 0.001})
    trials = [
        Trial(1, {"encoder.dim": 12, "encoder.hidden": [8]}, "ended", 0.5, 3, 1.0), Trial(0, {}, "ended", 0.4, 3, 1.0),
        Trial(2, {"encoder.dim": 4, "encoder.hidden": []}, "failed", None, error="the loss is nan"),
    ]  # fmt: skip
    tuned = Tuned(trials, "precision", best, {"encoder.dim": 0.4, "encoder.hidden": 0.0})
    tuned.write(tmp_path)
    assert TrainConfig.load(tmp_path / "best.yaml", {}) == best
    assert set(yaml.safe_load((tmp_path / "best.yaml").read_text())) == {"encoder", "optimizer"}
    rows = table_in(tmp_path)
    assert [row["trial"] for row in rows] == ["1", "0", "2"] and rows[2]["error"] == "the loss is nan"
    assert "encoder.dim: 40%" in (tmp_path / "settings.svg").read_text()


def test_a_score_is_of_the_validation_rows_and_the_test_rows_have_no_say(tmp_path):
    items = table(600)
    data = Prepared.make(items, SCHEMA, SMALL, tmp_path)
    decades = np.array([year is not None and year >= 2010 for year in items.column("year").to_pylist()])
    dice = np.random.default_rng(0)
    users = np.stack([(decades == user % 2) & (dice.random(600) < 0.2) for user in range(60)])  # each likes one decade
    data = dataclasses.replace(data, interactions=Interactions(sp.csr_matrix(users.astype(np.float32)), data.fold))
    trainer = Trainer(data, SMALL, torch.device("cpu"))
    history = list(trainer.epochs())
    scores = {metric: score_of(trainer, metric) for metric in ("precision", "ndcg", "loss")}
    assert scores["loss"] == history[trainer.best_epoch - 1]["validation"]["total"]
    assert 0.4 < scores["precision"] < 1  # a film's style is one of three
    chance = ColdItems.of(data.interactions.likes, data.fold, VALIDATION)
    at_random = chance.figures(dice.random(chance.liked.shape, np.float32))["ndcg"]
    assert at_random + 0.1 < scores["ndcg"] <= 1  # and so is its decade of two

    starts, bags = data.table.starts, data.table.bag_count
    rows = data.table.rows.clone()
    for item in np.flatnonzero(data.fold == TEST):
        rows[starts[item * bags] : starts[(item + 1) * bags]] = 0
    trainer.data = dataclasses.replace(data, table=dataclasses.replace(data.table, rows=rows))
    assert scores == {metric: score_of(trainer, metric) for metric in scores}


# --- on Ray ----------------------------------------------------------------------------------------------------

TINY = [
    "--set", "encoder.hidden=[16]", "--set", "encoder.decoder_hidden=[16]", "--dim", "8", "--epochs", "2",
]  # fmt: skip


def arguments(folder: Path, trials: int) -> list[str]:
    """With as many CPUs for a trial as Ray has here, since another process takes longer to start than a trial runs."""
    (folder / "space.yaml").write_text("encoder.dropout: {uniform: [0, 0.3]}\ncontrast.weight: {uniform: [0, 1]}\n")
    return [
        "tune", *films(folder, 400), *TINY, "--space", str(folder / "space.yaml"), "--trials", str(trials),
        "--out", str(folder / "out"), "--cpus-per-worker", "4",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_with_more_trials_if_asked(ray_cluster, tmp_path):
    command = [sys.executable, "-m", "itemvec", *arguments(tmp_path, 4)]
    command += ["--ray-address", ray.get_runtime_context().gcs_address]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as search:
        eventually(lambda: search.poll() is not None or list(tmp_path.glob("runs/*/trials/*.json")), 120)
        search.kill()
    assert search.returncode == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in tmp_path.glob("runs/*/trials/*.json")}
    assert kept and not (tmp_path / "out").exists()

    done = CliRunner().invoke(cli, arguments(tmp_path, 5))
    assert done.exit_code == 0, done.output
    assert f"{len(kept)} of 5 trials were run before" in done.output
    assert all(path.read_bytes() == content for path, content in kept.items()), "what was run is not run again"
    rows = table_in(tmp_path / "out")
    assert sorted(int(row["trial"]) for row in rows) == list(range(5))
    scores = [float(row["precision"]) for row in rows]
    assert scores == sorted(scores, reverse=True) and 0 < scores[0] <= 1
    assert "settings as they are" in done.output and "what mattered" in done.output
    best = TrainConfig.load(tmp_path / "out" / "best.yaml", {})
    drawn_dropout = rows[0]["encoder.dropout"]
    assert best.encoder.dim == 8 and (not drawn_dropout or best.encoder.dropout == float(drawn_dropout))

    (folder,) = tmp_path.glob("runs/tune-*")
    assert {path.name for path in folder.iterdir()} == {"trials", "lock"}, (
        "what the trials reached is kept, and no more"
    )


@pytest.mark.slow
def test_a_trial_that_fails_is_said_and_the_others_count(ray_cluster, tmp_path):
    given = arguments(tmp_path, 3)
    (tmp_path / "space.yaml").write_text(
        "optimizer.learning_rate: {choice: [1.0e+30]}\noptimizer.clip: {choice: [1.0e+30]}"
    )
    done = CliRunner().invoke(cli, given)
    assert done.exit_code == 0, done.output
    reached = [json.loads(path.read_text()) for path in tmp_path.glob("runs/*/trials/*.json")]
    by_number = {trial["number"]: trial for trial in reached}
    assert by_number[0]["outcome"] == "ended"
    assert all("a lower optimizer.learning_rate may help" in by_number[n]["error"] for n in (1, 2))
    assert "failed: " in done.output


def test_likes_are_needed_for_ndcg(tmp_path):
    done = CliRunner().invoke(cli, [*arguments(tmp_path, 2), "--metric", "ndcg"])
    assert isinstance(done.exception, ItemvecError) and "--interactions" in str(done.exception)


def test_a_space_can_be_written_by_hand():
    assert read_space("encoder.cross: {int: [0, 2]}", "s") == {"encoder.cross": Range("int", (0, 2))}
