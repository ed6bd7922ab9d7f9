import pytest
import torch
from films import SCHEMA, table

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from training.config import ContrastConfig, ReconstructConfig, TrainConfig
from training.data import TRAIN, Prepared
from training.objectives import Reconstruct, Task, dense_loss, ordinal_loss

NETWORK = EncoderConfig(dim=8, embedding_dim=4, hidden=(16,), decoder_hidden=(16,), dropout=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Prepared:
    return Prepared.make(table(), SCHEMA, TrainConfig(), tmp_path_factory.mktemp("prepared"))


def task(data: Prepared, weights=None, **settings) -> Task:
    torch.manual_seed(0)
    config = TrainConfig(encoder=NETWORK, **settings)
    encoder, decoder = ItemEncoder(NETWORK, data.layout), Decoder(NETWORK, data.layout)
    return Task(encoder, decoder, data.layout, data.marginals, weights or {}, config)


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
        name: pytest.approx(1.0, abs=0.02) for name in [f.name for f in SCHEMA.features] + ["reconstruct"]
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
    clean = data.table.clean(items)
    losses = task(data, {"cast": 0.0}, contrast=ContrastConfig(weight=0))(clean, clean).parts
    assert "cast" not in losses and "genres" in losses


def test_the_total_is_the_weighted_sum(data):
    items = data.items(TRAIN)[:32]
    two = data.table.clean(items.repeat(2))
    settings = {"reconstruct": ReconstructConfig(weight=2.0), "contrast": ContrastConfig(weight=0.5)}
    total, parts = task(data, {"genres": 3.0}, **settings)(two, data.table.clean(items))
    columns = [f.name for f in SCHEMA.features]
    weighted = sum((3 if name == "genres" else 1) * parts[name] for name in columns) / (len(columns) + 2)
    assert parts["reconstruct"].item() == pytest.approx(weighted.item(), rel=1e-5)
    assert total.item() == pytest.approx((2 * parts["reconstruct"] + 0.5 * parts["contrast"]).item(), rel=1e-5)


def test_equal_copies_find_each_other_better_than_copies_of_others(data):
    items = data.items(TRAIN)[:32]
    clean = data.table.clean(items)
    model = task(data, reconstruct=ReconstructConfig(weight=0)).eval()
    same = model(data.table.clean(items.repeat(2)), clean).parts["contrast"]
    mixed = model(data.table.clean(torch.cat([items, items.roll(1)])), clean).parts["contrast"]
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
        model(data.table.clean(items.repeat(model.views)), data.table.clean(items)).total.backward()
        table_gradient = model.encoder.table.grad
        assert table_gradient.is_sparse == sparse
        gradients.append(table_gradient.to_dense())
        if model.decoder.row_weight.grad is not None:
            gradients.append(model.decoder.row_weight.grad.to_dense())
    half = len(gradients) // 2
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[:half], gradients[half:], strict=True))


def test_half_precision_moves_the_losses_by_little(data):
    items = data.items(TRAIN)
    model = task(data, reconstruct=ReconstructConfig(negatives=12)).eval()
    batch = data.table.clean(items.repeat(2)), data.table.clean(items)
    torch.manual_seed(0)
    full = model(*batch).parts
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*batch).parts
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
    truth[0, slot.start + 1] = 1.0
    assert dense_loss(slot, predicted, truth).item() == pytest.approx(0.693147, abs=1e-5)
    truth[0, slot.start + 1] = 0.0
    assert dense_loss(slot, predicted, truth).item() == pytest.approx(0.693147 + 4.5, abs=1e-5)
