import dataclasses
import json
import math
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
import torch
from films import SCHEMA, table
from ray._private import state as ray_state

from itemvec.encoder import EncoderConfig
from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from training import cluster
from training.config import ClusterConfig, CoEngageConfig, OptimizerConfig, TrainConfig
from training.data import Prepared
from training.folds import TRAIN, VALIDATION
from training.interactions import Interactions
from training.loop import Trainer
from training.optimize import Optimization
from training.parent import Parent
from training.progress import of_columns

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


def test_what_a_gpu_does_otherwise_learns_as_much(data, monkeypatch):
    """bf16 where the trainer asks for it, dense gradients, fused optimizers: here on the CPU, which has all three."""
    config = CONFIG.model_copy(update={"epochs": 10})
    [*_, plain] = Trainer(data, config, CPU).epochs()

    asked = []

    class Bf16(torch.autocast):
        def __init__(self, kind, dtype=None, enabled=True):
            asked.append((dtype, enabled))  # by the trainer for a step, and by losses that are to be exact
            super().__init__(kind, torch.bfloat16, enabled=dtype is not None)

    for name in ("AdamW", "Adam"):
        method = getattr(torch.optim, name)
        monkeypatch.setattr(torch.optim, name, lambda *a, _method=method, **k: _method(*a, **{**k, "fused": True}))
    monkeypatch.setattr(torch, "autocast", Bf16)
    trainer = Trainer(data, config, CPU)
    trainer.sparse = False
    trainer.task.sparse_gradients(False)
    layers, tables = trainer.task.layer_parameters(), trainer.task.table_parameters()
    trainer.optimization = Optimization(layers, tables, config.optimizer, 10, trainer.steps, sparse=False)
    [*_, other] = trainer.epochs()
    assert [one.param_groups[0]["fused"] for one in trainer.optimization.optimizers] == [True, True]
    assert asked.count((torch.bfloat16, False)) == 10 * trainer.steps, "enabled on a GPU only"
    assert asked.count((None, False)) > 0
    assert other["validation"]["total"] == pytest.approx(plain["validation"]["total"], rel=0.02)


def test_an_epoch_may_be_shorter_than_once_through(data):
    whole, short = (Trainer(data, CONFIG.model_copy(update={"epoch_steps": most}), CPU) for most in (None, 2))
    assert whole.steps == len(data.items(TRAIN)) // 64 == 3
    assert short.steps == 2 and len(list(short.epochs())) == 4


def test_a_seed_repeats_to_the_bit_and_another_does_not(data):
    def trained(seed):
        trainer = Trainer(data, CONFIG.model_copy(update={"seed": seed, "epochs": 2}), CPU)
        list(trainer.epochs())
        return weights(trainer)

    assert torch.equal(trained(1), trained(1))
    assert not torch.equal(trained(1), trained(2))


EVERYTHING = {
    "encoder": {**NETWORK.model_dump(), "cross": 1, "nested": [2, 4]},
    "reconstruct": {"variational": 0.1},
    "contrast": {"weight": "auto"},
    "predict": {"targets": {"style": {"loss": "hinge"}, "age": {"loss": "huber"}}, "hidden": [8]},
}


def with_targets(rows: int = 240) -> pa.Table:
    """Two columns that are no features but follow from them; the second is missing here and there."""
    films = table(rows)
    styles = [cast[0].split("-")[0] if cast else None for cast in films.column("cast").to_pylist()]
    ages = [2020 - year if year else None for year in films.column("year").to_pylist()]
    return films.append_column("style", [styles]).append_column("age", [ages])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**EVERYTHING, "balance": "gradient", "optimizer": {"schedule": "one_cycle"}},
        {**EVERYTHING, "balance": "uncertainty", "optimizer": {"method": "sgd", "schedule": "plateau", "every": 1}},
    ],
)
def test_a_run_taken_up_from_a_checkpoint_ends_as_if_it_had_not_been_stopped(tmp_path, settings):
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **settings})
    data = Prepared.make(with_targets(), SCHEMA, config, tmp_path)
    whole = Trainer(data, config, CPU)
    list(whole.epochs())
    first = Trainer(data, config, CPU)
    epochs = first.epochs()
    next(epochs)
    next(epochs)
    torch.save(first.state(), tmp_path / "state.pt")
    second = Trainer(data, config, CPU)
    second.restore(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [m["epoch"] for m in second.epochs()] == [3, 4]
    assert torch.equal(weights(whole), weights(second))
    assert second.best_epoch == whole.best_epoch
    assert second.optimization.rate == whole.optimization.rate
    assert second.history[2:] == [
        m | {"seconds": t["seconds"], "items_per_second": t["items_per_second"]}
        for m, t in zip(whole.history[2:], second.history[2:], strict=True)
    ]


def test_training_stops_when_the_validation_rows_gain_nothing_and_keeps_the_best(data):
    still = OptimizerConfig(learning_rate=1e-12, table_learning_rate=1e-12)
    trainer = Trainer(data, CONFIG.model_copy(update={"optimizer": still, "epochs": 50, "patience": 3}), CPU)
    history = list(trainer.epochs())
    assert len(history) == trainer.best_epoch + 3 < 50
    assert history[trainer.best_epoch - 1]["best"]


def test_a_loss_that_is_no_number_ends_the_run(data):
    wild = OptimizerConfig(learning_rate=1e30, table_learning_rate=1e30, clip=1e30)
    with pytest.raises(RuntimeError, match=r"optimizer\.learning_rate"):
        list(Trainer(data, CONFIG.model_copy(update={"optimizer": wild}), CPU).epochs())


def test_every_worker_takes_the_same_number_of_steps_of_the_same_size(data, monkeypatch):
    monkeypatch.setattr(Trainer, "_distributed", lambda self: self.task)
    alone = CONFIG.model_copy(update={"start": "random"})  # components are sent, and nobody is there
    workers = [Trainer(data, alone, CPU, rank, workers=3) for rank in range(3)]
    assert len({(w.steps, w.batch) for w in workers}) == 1
    assert workers[0].steps * workers[0].batch * 3 <= len(workers[0].train_items)


@pytest.mark.parametrize("features", ["{year: {kind: numeric}}", "{genres: {kind: multi}}"])
def test_tables_without_labels_or_without_numbers_train(tmp_path, features):
    schema = FeatureSchema.from_yaml(f"name: films\nid: id\nfeatures: {features}")
    few = Prepared.make(table(60), schema, CONFIG, tmp_path)
    assert all(math.isfinite(m["validation"]["total"]) for m in Trainer(few, CONFIG, CPU).epochs())


def test_epochs_are_compared_by_weights_that_do_not_move(tmp_path):
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **EVERYTHING})
    trainer = Trainer(Prepared.make(with_targets(), SCHEMA, config, tmp_path), config, CPU)
    for metrics in trainer.epochs():
        for losses in (metrics["train"], metrics["validation"]):
            usual = losses["reconstruct"] + 0.1 * losses["contrast"] + losses["predict"]
            assert losses["total"] == pytest.approx(usual, rel=1e-5)
        assert metrics["weights"]["reconstruct"] == 1.0 != metrics["weights"]["predict"]


def test_a_column_may_be_called_as_the_sum_is(tmp_path):
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {total: {kind: numeric}, genres: {kind: multi}}")
    films = table(60).rename_columns({"year": "total"})
    metrics = next(Trainer(Prepared.make(films, schema, CONFIG, tmp_path), CONFIG, CPU).epochs())
    assert of_columns(metrics["validation"]).keys() == {"total", "genres"}
    both = sum(weight * metrics["validation"][name] for name, weight in metrics["weights"].items())
    assert metrics["validation"]["total"] == pytest.approx(both)


def of_like_minded(data: Prepared, users: int = 300) -> Interactions:
    """Every user liked ten of the items that have one row of the first column in common."""
    first = data.table.rows[data.table.starts[: data.table.n * data.table.bag_count : data.table.bag_count]].numpy()
    groups = [rows for row in np.unique(first) if len(rows := np.flatnonzero(first == row)) >= 10]
    dice = np.random.default_rng(0)
    liked = np.concatenate([dice.choice(groups[user % len(groups)], 10, replace=False) for user in range(users)])
    shape = (users, data.table.n)
    return Interactions(
        sp.csr_matrix((np.ones(len(liked)), (np.repeat(np.arange(users), 10), liked)), shape), data.fold
    )


def test_interactions_are_learned_from_in_training_and_judged_on_the_validation_fold(data):
    engaged = dataclasses.replace(data, interactions=of_like_minded(data))
    config = CONFIG.model_copy(update={"co_engage": CoEngageConfig(pairs=32, negatives=8)})
    trainer = Trainer(engaged, config, CPU)
    seen = []
    trainer.task.co_engage.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    history = list(trainer.epochs())
    assert history[-1]["train"]["co_engage"] < history[0]["train"]["co_engage"]
    assert "co_engage" in history[0]["validation"]
    # The epoch that is kept is the one whose vectors recommend the validation rows best, whatever the losses.
    recommended = [epoch["validation"]["cold_start"] for epoch in history]
    assert trainer.best_epoch == recommended.index(max(recommended)) + 1
    assert trainer.best_loss == pytest.approx(1 - max(recommended))
    validation = set(data.items(VALIDATION).tolist())
    for paired in seen:
        anchors, positives, drawn = paired[:32].tolist(), paired[32:64].tolist(), paired[64:].tolist()
        assert len(drawn) == 8 and not validation & {*anchors, *drawn}
        assert set(positives) <= validation or not validation & set(positives)


# --- on Ray ----------------------------------------------------------------------------------------------------


def fit(folder: Path, config: TrainConfig = CONFIG, **settings):
    Prepared.make(table(), SCHEMA, config, folder)
    told = []
    with cluster.connected(ClusterConfig()):
        state = cluster.fit(folder, config, ClusterConfig(**settings), told.append)
    return state, told


@pytest.mark.slow
def test_ray_trains_what_the_bare_loop_trains(ray_cluster, data, tmp_path):
    state, told = fit(tmp_path)
    bare = Trainer(data, CONFIG, CPU)
    list(bare.epochs())
    assert torch.equal(state["best"]["encoder"]["table"], bare.best["encoder"]["table"])
    assert [m["epoch"] for m in told if "train" in m] == [1, 2, 3, 4]
    started = {actor["ActorClassName"] for actor in ray_state.actors().values()}
    assert {"TrainController", "RayTrainWorker"} <= started
    assert not started & {"DatasetManager", "PlacementGroupCleaner", "PreemptionWatcher"}, "each costs a second"


@pytest.mark.slow
def test_two_workers_train_as_well_as_one_at_every_objective(ray_cluster, tmp_path):
    """Both go on from the same version."""
    config = TrainConfig.model_validate({**CONFIG.model_dump(), **EVERYTHING, "compatible": 1, "epochs": 8})
    data = Prepared.make(with_targets(), SCHEMA, config, tmp_path)
    first = Trainer(data, config.model_copy(update={"epochs": 2, "compatible": 0}), CPU)
    [begin, _] = first.epochs()
    encoder, decoder = (first.best[name] for name in ("encoder", "decoder"))
    with torch.no_grad():
        vectors = first.task.encoder.eval()(*data.table.clean(torch.arange(data.table.n)))
    data = data.with_parent(Parent(1, torch.arange(len(vectors)), vectors, torch.eye(8), encoder, decoder), tmp_path)
    with cluster.connected(ClusterConfig()):
        two = cluster.fit(tmp_path, config, ClusterConfig(workers=2))
    bare = Trainer(data, config, CPU)
    list(bare.epochs())
    assert two["best_loss"] == pytest.approx(bare.best_loss, rel=0.1)
    [again, *_] = json.loads(two["history"])
    assert again["train"]["reconstruct"] < begin["train"]["reconstruct"], "from the weights of the version"
    assert 0 < again["train"]["compatible"] < 0.5, "one minus the cosine to the version's vector"


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


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9"])
def test_a_cluster_that_is_not_there_is_said_at_once(address):
    began = time.monotonic()
    with pytest.raises(ConfigError, match=rf"Ray is not at '{address}': Connection refused"):
        cluster.require_reachable(address)
    assert time.monotonic() - began < 5
    cluster.require_reachable("auto")  # for Ray to find
