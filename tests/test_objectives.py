import copy
import dataclasses
import math

import pyarrow as pa
import pytest
import torch
from films import SCHEMA, table

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from training import targets
from training.config import (
    CoEngageConfig,
    ContrastConfig,
    CorruptionConfig,
    OptimizerConfig,
    PredictConfig,
    ReconstructConfig,
    TrainConfig,
)
from training.data import Prepared
from training.folds import TEST, TRAIN
from training.loop import Trainer
from training.objectives import CoEngage, Given, Predict, Reconstruct, Task, chosen, dense_loss, ordinal_loss

NETWORK = EncoderConfig(dim=8, embedding_dim=4, hidden=(16,), decoder_hidden=(16,), dropout=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    return Prepared.make(table(), SCHEMA, TrainConfig(), tmp_path_factory.mktemp("prepared"))


def task(data: Prepared, weights=None, **settings) -> Task:
    """`weights` are the schema's, by column."""
    torch.manual_seed(0)
    config = TrainConfig(encoder=settings.pop("encoder", NETWORK), **settings)
    features = tuple(f.model_copy(update={"weight": (weights or {}).get(f.name, 1.0)}) for f in SCHEMA.features)
    transform = copy.copy(data.transform)
    transform.schema = SCHEMA.model_copy(update={"features": features})
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    return Task(encoder, decoder, dataclasses.replace(data, transform=transform), config)


def given(data: Prepared, items: torch.Tensor, paired: torch.Tensor | None = None) -> Given:
    return Given(data.table.clean(items), {t.name: t.values[items] for t in data.targets}, paired)


def constant(data: Prepared, negatives: int) -> Reconstruct:
    """A decoder that answers with the marginals, whatever it is asked."""
    model = task(data, reconstruct=ReconstructConfig(negatives=negatives)).reconstruct
    model.start_from_marginals()
    with torch.no_grad():
        model.decoder.row_weight.zero_()
        model.decoder.dense_head.weight.zero_()
    return model


def test_the_best_constant_answer_has_loss_1_in_every_column(data):
    items = data.items(TRAIN)
    losses = constant(data, negatives=1000)(torch.randn(len(items), 8), data.table.clean(items))
    losses = {name: loss.item() for name, loss in losses.items()}
    # Labels of few items are estimated with half an item more, so that no chance is 0: hence not to the last digit.
    assert losses == {
        name: pytest.approx(1.0, abs=0.02)
        for name in ["reconstruct", *(f"reconstruct.{f.name}" for f in SCHEMA.features)]
    }


def test_sampled_columns_have_the_same_loss_on_average(data):
    items, generator = data.items(TRAIN), torch.manual_seed(0)
    assert generator is not None
    sampled = constant(data, negatives=12)
    assert any(sampled._is_sampled(slot) for slot in data.layout.bags)
    embedding, clean = torch.randn(len(items), 8), data.table.clean(items)
    mean = {}
    for _ in range(60):
        for name, loss in sampled(embedding, clean).items():
            mean[name] = mean.get(name, 0) + loss.item() / 60
    assert mean == {name: pytest.approx(1.0, abs=0.03) for name in mean}


def test_a_column_of_weight_0_is_not_reconstructed(data):
    items = data.items(TRAIN)[:32]
    model = task(data, {"cast": 0.0}, contrast=ContrastConfig(weight=0))
    losses = model(data.table.clean(items), given(data, items)).parts
    assert "reconstruct.cast" not in losses and "reconstruct.genres" in losses


def test_the_total_is_the_weighted_sum(data):
    items = data.items(TRAIN)[:32]
    two = data.table.clean(items.repeat(2))
    settings = {"reconstruct": ReconstructConfig(weight=2.0), "contrast": ContrastConfig(weight=0.5)}
    total, parts = task(data, {"genres": 3.0}, **settings)(two, given(data, items))
    columns = [f.name for f in SCHEMA.features]
    weighted = sum((3 if name == "genres" else 1) * parts[f"reconstruct.{name}"] for name in columns) / (
        len(columns) + 2
    )
    assert parts["reconstruct"].item() == pytest.approx(weighted.item(), rel=1e-5)
    assert total.item() == pytest.approx((2 * parts["reconstruct"] + 0.5 * parts["contrast"]).item(), rel=1e-5)


def test_equal_copies_find_each_other_better_than_copies_of_others(data):
    items = data.items(TRAIN)[:32]
    model = task(data, reconstruct=ReconstructConfig(weight=0)).eval()
    same = model(data.table.clean(items.repeat(2)), given(data, items)).parts["contrast"]
    mixed = model(data.table.clean(torch.cat([items, items.roll(1)])), given(data, items)).parts["contrast"]
    assert same < mixed


@pytest.mark.parametrize(
    "settings", [{}, {"contrast": ContrastConfig(weight=0)}, {"reconstruct": ReconstructConfig(weight=0)}]
)
def test_sparse_and_dense_gradients_are_the_same(data, settings):
    items = data.items(TRAIN)[:32]
    gradients = []
    for sparse in (False, True):
        model = task(data, **{"reconstruct": ReconstructConfig(negatives=12), **settings})
        model.sparse_gradients(sparse)
        torch.manual_seed(1)
        model(data.table.clean(items.repeat(model.views)), given(data, items)).total.backward()
        table_gradient = model.encoder.table.grad
        assert table_gradient.is_sparse == sparse
        gradients.append(table_gradient.to_dense())
        if model.decoder.row_weight.grad is not None:
            gradients.append(model.decoder.row_weight.grad.to_dense())
    half = len(gradients) // 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[:half], gradients[half:], strict=True))


def test_half_precision_moves_the_losses_by_little(data):
    everything = dataclasses.replace(predicting(data), interactions=Couples(data.table.n))
    reconstruct = ReconstructConfig(negatives=12, variational=0.1)
    model = task(everything, reconstruct=reconstruct, co_engage=CoEngageConfig(pairs=8, negatives=4)).eval()
    items, paired = data.items(TRAIN), torch.arange(20)
    batch = data.table.clean(torch.cat([items.repeat(2), paired])), given(everything, items, paired)
    torch.manual_seed(0)
    full = model(*batch).parts
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch).parts
    assert {"reconstruct", "variational", "contrast", "predict", "co_engage"} <= full.keys()
    assert {k: v.item() for k, v in half.items()} == {k: pytest.approx(v.item(), rel=0.02) for k, v in full.items()}


def test_a_missing_ordinal_costs_only_its_flags():
    # Rows: unseen, missing, then a thermometer of three. Sure of "missing", no opinion of the steps.
    logits = torch.tensor([[-20.0, 20.0, 0.0, 0.0, 0.0]])
    assert ordinal_loss(logits, torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]])).item() == pytest.approx(0, abs=1e-6)
    # With rank 1 (the second of three) both questions are open: 2 log 2, and the flag was wrong by 20.
    ranked = ordinal_loss(logits, torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.0]])).item()
    assert ranked == pytest.approx(20 + 2 * 0.693147, abs=1e-4)


def test_a_missing_number_costs_only_its_flag(data):
    slot = next(slot for slot in data.layout.dense if slot.name == "year")
    predicted = torch.zeros(1, data.layout.dense_width)
    predicted[0, slot.start] = 5.0
    truth = torch.zeros(1, data.layout.dense_width)
    truth[0, slot.flag] = 1.0
    assert dense_loss(slot, predicted, truth).item() == pytest.approx(0.693147, abs=1e-5)
    truth[0, slot.flag] = 0.0
    assert dense_loss(slot, predicted, truth).item() == pytest.approx(0.693147 + 4.5, abs=1e-5)


# --- variational ------------------------------------------------------------------------------------------------------


def test_noise_is_for_training_only_and_its_divergence_is_paid_for(data):
    items = data.items(TRAIN)[:32]
    one_view = {"contrast": ContrastConfig(weight=0)}
    plain = task(data, **one_view).eval()
    noisy = task(data, reconstruct=ReconstructConfig(variational=0.5), **one_view).eval()
    noisy.load_state_dict(plain.state_dict(), strict=False)
    batch = data.table.clean(items), given(data, items)
    # Numbers of variance 1 and noise of log variance -3: (1 + e^-3 - 1 + 3) / 2 for each.
    divergence = (math.exp(-3) + 3) / 2
    torch.manual_seed(1)
    without = plain(*batch).parts
    torch.manual_seed(1)
    parts = noisy(*batch).parts
    assert parts["variational"].item() == pytest.approx(divergence, rel=1e-5)
    assert parts["reconstruct"].item() == pytest.approx(without["reconstruct"].item() + 0.5 * divergence, rel=1e-5)
    noisy.train()
    one, other = (noisy.reconstruct._noisy(noisy.encoder(*batch[0]))[0] for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.allclose(one.norm(dim=1), torch.ones(32))


# --- nested prefixes --------------------------------------------------------------------------------------------------


def test_some_steps_train_a_prefix_of_length_one_and_serving_never_cuts(data):
    network = NETWORK.model_copy(update={"nested": (2, 4)})
    model = task(data, encoder=network)
    embedding = torch.nn.functional.normalize(torch.randn(64, 8), dim=1)
    sizes = set()
    for _ in range(50):
        short = model._shortened(embedding)
        size = int((short != 0).any(0).sum())
        assert torch.allclose(short[:, :size], torch.nn.functional.normalize(embedding[:, :size], dim=1))
        sizes.add(size)
    assert sizes == {2, 4, 8}
    assert model.eval()._shortened(embedding) is embedding


# --- predict ----------------------------------------------------------------------------------------------------------


def predicting(data: Prepared) -> Prepared:
    """With the rows' styles as a target: three classes that follow from the columns; and a number, 1 where it is the
    second."""
    style = [(titles or "?")[0] for titles in table().column("title").to_pylist()]
    films = table().append_column("initial", [style]).append_column("second", [[float(s in "lhr") for s in style]])
    config = PredictConfig(targets={"initial": {"loss": "cross_entropy"}, "second": {"loss": "l2"}})
    train = data.items(TRAIN).numpy()
    return dataclasses.replace(data, targets=targets.fit(films, SCHEMA, config, train))


def test_rows_without_a_target_are_left_out_of_its_loss(data):
    predict = Predict(NETWORK, PredictConfig(), predicting(data).targets[1:])
    torch.nn.init.zeros_(predict.heads[0].weight)
    torch.nn.init.zeros_(predict.heads[0].bias)
    constant = predict.targets[0].constant
    loss = predict(torch.randn(3, 8), {"second": torch.tensor([2.0, math.nan, 0.0])})["predict.second"]
    assert loss.item() == pytest.approx((2**2 / 2 + 0) / 2 / constant)
    nobody = predict(torch.randn(2, 8), {"second": torch.tensor([math.nan, math.nan])})
    assert nobody["predict"].item() == 0.0


def test_targets_weigh_as_the_config_says(data):
    made = [dataclasses.replace(t, weight=w) for t, w in zip(predicting(data).targets, (3.0, 1.0), strict=True)]
    parts = Predict(NETWORK, PredictConfig(), made)(torch.randn(8, 8), {t.name: t.values[:8] for t in made})
    expected = (3 * parts["predict.initial"] + parts["predict.second"]) / 4
    assert parts["predict"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_target_is_learned_and_scored_against_the_constant_answer(data):
    with_targets = predicting(data)
    items = data.items(TRAIN)
    off = {"reconstruct": ReconstructConfig(weight=0), "contrast": ContrastConfig(weight=0)}
    model = task(with_targets, predict=PredictConfig(targets={}, hidden=(16,)), **off)
    assert set(model.balance.fixed) == {"predict"}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        model(data.table.clean(items), given(with_targets, items)).total.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        scores = model.predict.scores(model.encoder(*data.table.clean(items)), items)
    initial, second = scores["initial"], scores["second"]
    classes = with_targets.targets[0].values[items]
    assert initial["majority"] == pytest.approx(float((classes == 0).float().mean()), abs=1e-6)
    assert initial["score"] > 0.9 > initial["majority"] and initial["metric"] == "accuracy"
    assert second["score"] > 0.8 and second["majority"] == pytest.approx(0, abs=1e-6) and second["metric"] == "R2"
    assert second["rows"] == len(items)


@pytest.mark.parametrize(("hidden", "low", "high"), [((), -0.2, 0.2), ((16,), 0.99, 1.0)])
def test_xor_of_two_columns_is_predicted_with_a_hidden_layer_and_not_without(tmp_path, hidden, low, high):
    # Without one the vectors of the four kinds of rows are f(a) + g(b), and centred they are two pairs of opposites: a
    # line through 0 says of opposites the opposite, and XOR of them is the same.
    rows = [(str(i), str(i // 2 % 2), str(i % 2), float(i // 2 % 2 != i % 2)) for i in range(400)]
    films = pa.table(dict(zip(["id", "a", "b", "xor"], zip(*rows, strict=True), strict=True)))
    schema = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {a: {kind: nominal}, b: {kind: nominal}}")
    config = TrainConfig(
        encoder=EncoderConfig(dim=4, hidden=hidden, dropout=0),
        corruption=CorruptionConfig(swap=0, mask=0, thin=0, unseen=0),
        reconstruct=ReconstructConfig(weight=0),
        contrast=ContrastConfig(weight=0),
        predict=PredictConfig(targets={"xor": {"loss": "l2"}}),
        optimizer=OptimizerConfig(learning_rate=0.02, schedule="constant"),
        epochs=20, patience=20, batch_size=64,
    )  # fmt: skip
    trainer = Trainer(Prepared.make(films, schema, config, tmp_path), config, torch.device("cpu"))
    list(trainer.epochs())
    held_out, task = trainer.data.items(TEST), trainer.task.eval()
    with torch.no_grad():
        score = task.predict.scores(task.encoder(*trainer.data.table.clean(held_out)), held_out)["xor"]["score"]
    assert low <= score <= high


# --- co_engage --------------------------------------------------------------------------------------------------------


class Couples:
    """Items 2 i and 2 i + 1 are liked by one user each; item 0 is in half of the pairs."""

    def __init__(self, n: int) -> None:
        self.popularity = torch.full((n,), 0.5 / (n - 1))
        self.popularity[0] = 0.5

    def pairs(self, count, fold, generator):
        anchors = torch.randint(20, (count,), generator=generator)
        return anchors, anchors ^ 1


def test_co_engaged_items_come_close(data):
    pairs = Couples(data.table.n)
    engaged = dataclasses.replace(data, interactions=pairs)
    off = {"reconstruct": ReconstructConfig(weight=0), "contrast": ContrastConfig(weight=0)}
    model = task(engaged, co_engage=CoEngageConfig(pairs=16, negatives=4), **off)
    optimizer, generator = torch.optim.Adam(model.parameters(), lr=0.02), torch.Generator().manual_seed(0)
    for _ in range(100):
        anchors, positives = pairs.pairs(16, TRAIN, generator)
        paired = torch.cat([anchors, positives, torch.randint(data.table.n, (4,), generator=generator)])
        some = data.items(TRAIN)[:2]
        optimizer.zero_grad()
        model(data.table.clean(torch.cat([some, paired])), given(engaged, some, paired)).total.backward()
        optimizer.step()
    vectors = model.encoder.eval()(*data.table.clean(torch.arange(20))).detach()
    cosines = vectors @ vectors.T
    cosines.fill_diagonal_(-1)
    assert (cosines.argmax(1) == torch.arange(20) ^ 1).float().mean() >= 0.9


def test_co_engage_knows_how_likely_a_candidate_was_and_which_ones_clash():
    # Two pairs (0, 1) and (2, 1) and one item drawn alike, 0, of four: two draws by popularity, one of four alike.
    popularity = torch.tensor([0.0, 0.5, 0.25, 0.25])
    engage = CoEngage(CoEngageConfig(pairs=2, negatives=1, temperature=1.0), popularity)
    assert engage.log_q.exp().tolist() == pytest.approx([0.25 / 3, 1.25 / 3, 0.75 / 3, 0.75 / 3])
    items, vectors = torch.tensor([0, 2, 1, 1, 0]), torch.eye(5)
    # The first anchor: 1 once more and itself are no negatives, nothing is left. The second: only item 0 is one, and
    # all cosines are 0, so that 1 / q counts: 3 / 1.25 against 3 / 0.25.
    assert engage(vectors, items)["co_engage"].item() == pytest.approx((0 + math.log(1 + 1.25 / 0.25)) / 2)


def test_without_interactions_or_targets_their_objectives_are_off(data):
    assert set(chosen(TrainConfig(), data)) == {"reconstruct", "contrast"}
    engaged = dataclasses.replace(predicting(data), interactions=Couples(data.table.n))
    assert set(chosen(TrainConfig(), engaged)) == {"reconstruct", "contrast", "predict", "co_engage"}


def test_nothing_to_learn_is_said(data):
    off = {"reconstruct": {"weight": 0}, "contrast": {"weight": 0}}
    with pytest.raises(ConfigError, match="nothing to learn: reconstruct, contrast have weight 0"):
        chosen(TrainConfig(**off), data)
