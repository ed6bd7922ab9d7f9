import itertools
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from films import SCHEMA, table

from itemvec.encoder import EncoderConfig
from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from training import cluster
from training.config import ClusterConfig, OptimizerConfig, TrainConfig
from training.data import Prepared
from training.loop import Trainer

NETWORK = EncoderConfig(dim=8, embedding_dim=4, hidden=(16,), decoder_hidden=(16,))
CONFIG = TrainConfig(encoder=NETWORK, epochs=4, batch_size=64)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    return Prepared.make(table(), SCHEMA, CONFIG, tmp_path_factory.mktemp("prepared"))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in trainer.task.parameters()])


def test_the_loss_falls(data):
    history = list(Trainer(data, CONFIG.model_copy(update={"epochs": 10}), CPU).epochs())
    assert history[-1]["validation"]["reconstruct"] < 0.95 * history[0]["validation"]["reconstruct"]
    assert [m["epoch"] for m in history] == list(range(1, 11))


def test_a_seed_repeats_to_the_bit_and_another_does_not(data):
    def trained(seed):
        trainer = Trainer(data, CONFIG.model_copy(update={"seed": seed, "epochs": 2}), CPU)
        list(trainer.epochs())
        return weights(trainer)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


def test_a_run_taken_up_from_a_checkpoint_ends_as_if_it_had_not_been_stopped(data, tmp_path):
    whole = Trainer(data, CONFIG, CPU)
    list(whole.epochs())
    first = Trainer(data, CONFIG, CPU)
    epochs = first.epochs()
    next(epochs)
    next(epochs)
    torch.save(first.state(), tmp_path / "state.pt")
    second = Trainer(data, CONFIG, CPU)
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [m["epoch"] for m in second.epochs()] == [3, 4]
    assert torch.equal(weights(whole), weights(second))
    assert second.best_epoch == whole.best_epoch


def test_training_stops_when_the_validation_rows_gain_nothing_and_keeps_the_best(data):
    still = OptimizerConfig(learning_rate=1e-12, table_learning_rate=1e-12)
    trainer = Trainer(data, CONFIG.model_copy(update={"optimizer": still, "epochs": 50, "patience": 3}), CPU)
    history = list(trainer.epochs())
    assert len(history) == trainer.best_epoch + 3 < 50
    assert history[trainer.best_epoch - 1]["best"]


def test_the_learning_rate_rises_and_falls_to_nothing(data):
    trainer = Trainer(data, CONFIG.model_copy(update={"epochs": 100}), CPU)
    rates = [trainer._rate(step) for step in range(100 * trainer.steps)]
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert top / len(rates) == pytest.approx(0.05, abs=0.02)
    assert rates[-1] < 1e-3 and rates[top] > 0.9


def test_a_loss_that_is_no_number_ends_the_run(data):
    wild = OptimizerConfig(learning_rate=1e30, table_learning_rate=1e30, clip=1e30)
    with pytest.raises(RuntimeError, match=r"optimizer\.learning_rate"):
        list(Trainer(data, CONFIG.model_copy(update={"optimizer": wild}), CPU).epochs())


def test_every_worker_takes_the_same_number_of_steps_of_the_same_size(data, monkeypatch):
    monkeypatch.setattr(Trainer, "_distributed", lambda self: self.task)
    workers = [Trainer(data, CONFIG, CPU, rank, workers=3) for rank in range(3)]
    assert len({(w.steps, w.batch) for w in workers}) == 1
    assert workers[0].steps * workers[0].batch * 3 <= len(workers[0].train_items)


@pytest.mark.parametrize("features", ["{year: {kind: numeric}}", "{genres: {kind: multi}}"])
def test_tables_without_labels_or_without_numbers_train(tmp_path, features):
    schema = FeatureSchema.from_yaml(f"name: films\nid: id\nfeatures: {features}")
    few = Prepared.make(table(60), schema, CONFIG, tmp_path)
    assert all(math.isfinite(m["validation"]["total"]) for m in Trainer(few, CONFIG, CPU).epochs())


# --- on Ray ----------------------------------------------------------------------------------------------------


def fit(folder: Path, config: TrainConfig = CONFIG, **settings):
    Prepared.make(table(), SCHEMA, config, folder)
    told = []
    with cluster.connected(ClusterConfig()):
        state = cluster.fit(folder, config, ClusterConfig(**settings), told.append)
    return state, told


def descendants(ancestor: int, name: str) -> list[int]:
    """Processes below `ancestor` whose command line has `name` in it."""
    parents, found = {}, []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if name in (process / "cmdline").read_text():
                found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile

    def line(pid: int) -> set[int]:
        return set() if pid not in parents else {pid} | line(parents[pid])

    return [pid for pid in found if ancestor in line(pid)]


@pytest.mark.slow
def test_ray_trains_what_the_bare_loop_trains(ray_cluster, data, tmp_path):
    state, told = fit(tmp_path)
    bare = Trainer(data, CONFIG, CPU)
    list(bare.epochs())
    assert torch.equal(state["best"]["encoder"]["table"], bare.best["encoder"]["table"])
    assert [m["epoch"] for m in told if "train" in m] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_workers_train_as_well_as_one(ray_cluster, data, tmp_path):
    config = CONFIG.model_copy(update={"epochs": 8})
    two, _ = fit(tmp_path, config, workers=2)
    bare = Trainer(data, config, CPU)
    list(bare.epochs())
    assert two["best_loss"] == pytest.approx(bare.best_loss, rel=0.05)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_goes_on_from_the_checkpoint(ray_cluster, tmp_path):
    config = CONFIG.model_copy(update={"epochs": 60, "patience": 60, "checkpoint_seconds": 0.5})
    epochs: list[int] = []
    killed: list[int] = []

    def told(metrics) -> None:
        epochs.append(metrics["epoch"])
        if not killed and (tmp_path / "ray" / "checkpoint_manager_snapshot.json").exists():
            killed.extend(descendants(os.getpid(), "RayTrainWorker"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    Prepared.make(table(), SCHEMA, config, tmp_path)
    with cluster.connected(ClusterConfig()):
        state = cluster.fit(tmp_path, config, ClusterConfig(), told)
    assert len(killed) == 1 and state["epoch"] == epochs[-1] == 60
    again = [after for before, after in itertools.pairwise(epochs) if after <= before]
    assert len(again) == 1 and again[0] > 1, "it went back once, and not to the beginning"


@pytest.mark.slow
def test_what_fails_on_a_worker_is_one_line_here(ray_cluster, tmp_path):
    wild = OptimizerConfig(learning_rate=1e30, table_learning_rate=1e30, clip=1e30)
    with pytest.raises(cluster.TrainingFailed) as failed:
        fit(tmp_path, CONFIG.model_copy(update={"optimizer": wild}), max_failures=0)
    assert "optimizer.learning_rate" in str(failed.value) and "\n" not in str(failed.value)
    assert "Traceback" in (tmp_path / "error.log").read_text()


@pytest.mark.slow
def test_more_workers_than_the_cluster_holds_are_refused_at_once(ray_cluster, tmp_path):
    began = time.monotonic()
    with pytest.raises(ConfigError, match="holds 4 of 5 workers"):
        fit(tmp_path, workers=5)
    assert time.monotonic() - began < 5


def test_a_worker_is_not_split_over_two_nodes():
    nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
    assert cluster.resources_per_worker(ClusterConfig(workers=2, cpus_per_worker=2), nodes) == {"CPU": 2.0}
    with pytest.raises(ConfigError, match="holds 2 of 3 workers"):
        cluster.resources_per_worker(ClusterConfig(workers=3, cpus_per_worker=2), nodes)


def test_gpus_are_taken_where_there_is_one_for_each_worker():
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    assert "GPU" in cluster.resources_per_worker(ClusterConfig(workers=2), nodes)
    assert "GPU" not in cluster.resources_per_worker(ClusterConfig(workers=3), nodes)
    assert "GPU" not in cluster.resources_per_worker(ClusterConfig(workers=2, device="cpu"), nodes)
    with pytest.raises(ConfigError, match="2 GPU"):
        cluster.resources_per_worker(ClusterConfig(workers=3, device="gpu"), nodes)
