import numpy as np
import pytest
import scipy.sparse as sp
import torch
from films import SCHEMA, table
from sklearn.decomposition import PCA

from itemvec.encoder import EncoderConfig
from training.baselines import ColumnPCA, principal_coordinates
from training.config import TrainConfig
from training.data import TEST, TRAIN, Prepared
from training.evaluate import _precision, effective_rank, evaluate, judged, measured_rows, one_hot, searched_rows
from training.loop import Trainer
from training.run import centre

CONFIG = TrainConfig(
    encoder=EncoderConfig(dim=16, embedding_dim=8, hidden=(32,), decoder_hidden=(32,), dropout=0),
    epochs=25,
    batch_size=64,
    test=0.3,
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    data = Prepared.make(table(600), SCHEMA, CONFIG, tmp_path_factory.mktemp("prepared"))
    trainer = Trainer(data, CONFIG, torch.device("cpu"))
    list(trainer.epochs())
    encoder, decoder = trainer.task.encoder, trainer.task.decoder
    centre(encoder, data)
    return data, judged(data, encoder, decoder), evaluate(judged(data, encoder, decoder), data.fold)


def test_the_decoder_beats_the_majority_on_rows_that_it_never_saw(evaluated):
    _, _, result = evaluated
    for name in ("provider", "genres", "year"):
        assert result["columns"][name]["score"] > result["columns"][name]["majority"] + 0.1, name
    for name in ("provider", "genres", "cast", "rating", "year"):
        assert result["columns"][name]["loss"] < 0.9, name
    assert result["columns"]["rating"]["score"] < result["columns"]["rating"]["majority"]  # an error: lower is better


def test_a_hidden_column_is_inferred_from_the_others_and_noise_is_not(evaluated):
    _, _, result = evaluated
    # The provider follows from the decade, which year and release date know; nothing tells which actors of the style.
    assert result["columns"]["provider"]["inferred"] > 0.9
    assert result["columns"]["provider"]["majority"] < 0.7
    assert result["columns"]["cast"]["inferred"] < 0.3


def test_neighbors_share_what_was_hidden(evaluated):
    _, _, result = evaluated
    genres = result["retrieval"]["columns"]["genres"]
    assert genres["precision"] > 2 * genres["base_rate"]
    assert set(genres) == {"precision", "base_rate", "pca", "pca_unit_variance"}
    assert result["retrieval"]["mean"]["precision"] == pytest.approx(
        np.mean([c["precision"] for c in result["retrieval"]["columns"].values()])
    )


def test_the_space_is_centred_and_in_use(evaluated):
    _, model, result = evaluated
    assert abs(result["space"]["mean_cosine"]) < 0.1
    assert 2 < result["space"]["effective_rank"] <= 16
    assert model.encoder.mean.abs().sum() > 0


def test_the_measured_rows_are_held_out_and_come_first_in_the_search(evaluated):
    data, _, result = evaluated
    measured = measured_rows(data.fold)
    assert set(data.fold[measured]) == {TEST} and len(measured) == result["rows"]["measured"]
    searched = searched_rows(data.fold).numpy()
    assert (searched[: len(measured)] == measured).all() and set(data.fold[searched[len(measured) :]]) == {TRAIN}


def test_precision_counts_the_ten_nearest_but_not_the_item_itself():
    # Twelve items on a quarter circle. Item 0's ten nearest are 1..10, and the odd ones share its label: 5 of 10.
    angle = np.linspace(0, np.pi / 2, 12)
    vectors = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    shares = np.zeros((1, 12), bool)
    shares[0, 1::2] = True  # 11 too, which is the one that is not near
    shares[0, 0] = True
    assert _precision(vectors, np.array([0]), shares).tolist() == pytest.approx([0.5])


def test_one_hot_has_a_1_per_label(evaluated):
    data, _, _ = evaluated
    f, slot = next((f, s) for f, s in enumerate(data.layout.bags) if s.name == "genres")
    hot = one_hot(data.table, f, slot)
    vocabulary = data.transform.column("genres").vocabulary
    genres = table(600).column("genres").to_pylist()
    for item in (0, 7, 599):
        assert sorted(hot[item].indices) == sorted({vocabulary.row(g) for g in genres[item] or []} or {1})


def test_principal_coordinates_are_scikit_learn_s_up_to_sign():
    x = np.random.default_rng(0).standard_normal((60, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32)
    ours, theirs = principal_coordinates(x @ x.T, 4), PCA(4).fit_transform(x)
    assert np.abs(ours) == pytest.approx(np.abs(theirs), abs=1e-2)


@pytest.mark.parametrize("unit_variance", [False, True])
def test_a_column_is_left_out_as_if_it_had_never_been_there(unit_variance):
    rng = np.random.default_rng(0)
    blocks = {
        "labels": sp.csr_matrix((rng.random((50, 30)) < 0.1).astype(np.float32)),
        "numbers": rng.standard_normal((50, 3)).astype(np.float32),
        "other": sp.csr_matrix((rng.random((50, 8)) < 0.3).astype(np.float32)),
    }
    without = ColumnPCA({k: v for k, v in blocks.items() if k != "labels"}, unit_variance).embedding(3)
    assert np.abs(ColumnPCA(blocks, unit_variance).embedding(3, "labels")) == pytest.approx(np.abs(without), abs=1e-3)


def test_effective_rank_of_a_line_is_1_and_of_a_ball_its_dimension():
    line = torch.randn(200, 1) * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1.0)
    assert effective_rank(torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))) == pytest.approx(
        3.0, abs=0.01
    )
