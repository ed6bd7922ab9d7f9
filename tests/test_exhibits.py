import numpy as np
import pytest
import scipy.sparse as sp
import torch
from films import SCHEMA, table

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder
from training.config import TrainConfig
from training.data import Prepared
from training.exhibits import _by_label, _by_quantity, _short, exhibits, flat, recognisable
from training.judged import Views, judged


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = TrainConfig(encoder=EncoderConfig(dim=8))
    data = Prepared.make(table(), SCHEMA, config, tmp_path_factory.mktemp("prepared"))
    torch.manual_seed(0)
    encoder, decoder = ItemEncoder(config.encoder, data.layout), Decoder(config.encoder, data.layout)
    return data, judged(data, encoder, decoder)


def test_the_rarest_of_the_frequent_labels_colors_an_item():
    coloring = _by_label("genres", [["Drama"], ["Drama", "Crime"], ["Crime", "Drama"], None, ["Western"], ["Drama"]])
    assert coloring.legend == ["Drama", "Crime"]  # 4 and 2 films; one Western alone has no color
    assert coloring.color == [0, 1, 1, None, None, 0]


def test_a_column_of_one_label_or_of_unique_ones_colors_nothing():
    assert _by_label("kind", ["film"] * 5) is None
    assert _by_label("id", list("abcde")) is None


def test_quantities_are_colored_in_bins_of_as_many_items_each():
    coloring = _by_quantity("year", [*range(1, 17), None])
    assert [coloring.color.count(n) for n in range(8)] == [1, 2, 2, 2, 2, 2, 2, 3]
    assert coloring.legend[0] == "1 to 2" and coloring.legend[-1] == "14 to 16" and coloring.color[-1] is None
    assert _by_quantity("year", [2000, 2000, None]) is None


def test_the_most_liked_items_are_shown_but_no_two_that_are_alike(model):
    _data, judged_model = model
    vectors = torch.eye(240)
    vectors[9] = vectors[7]
    likes = np.zeros((5, 240))
    likes[:, 7], likes[:4, 9], likes[:3, 30] = 1, 1, 1
    chosen = recognisable(judged_model, vectors, np.arange(240), sp.csr_matrix(likes))
    assert chosen[:2] == [7, 30] and 9 not in chosen and len(chosen) == 8


def test_without_likes_the_most_complete_items_are_shown(model):
    _data, judged_model = model
    films = table().to_pylist()
    chosen = recognisable(judged_model, torch.eye(240), np.arange(240), None)
    assert all(None not in films[place].values() for place in chosen)


def test_samples_come_with_their_columns_and_points_with_their_names(model):
    data, judged_model = model
    shown = exhibits(judged_model, table(), SCHEMA, data.fold)
    films = {film["id"]: film for film in table().to_pylist()}
    for sample in shown.samples:
        title, columns = shown.described[sample["id"]]
        film = films[sample["id"]]
        assert title == film["title"] and ("provider: " in columns) == (film["provider"] is not None)
        assert film["provider"] is None or f"provider: {film['provider']}" in columns
        with torch.inference_mode():
            rows = [int(sample["id"].split("-")[1]), int(sample["neighbors"][0]["id"].split("-")[1])]
            one, other = Views(judged_model, np.array(rows)).whole
        assert float(one @ other) == pytest.approx(sample["neighbors"][0]["score"], abs=1e-3)
    assert len(shown.names) == len(shown.points) == len(shown.colorings[0].color)
    assert [c.column for c in shown.colorings][-2:] == ["year", "released"]


def test_the_map_lies_in_the_unit_square_with_near_vectors_near():
    groups = torch.nn.functional.normalize(torch.eye(3).repeat_interleave(30, 0) + 0.05 * torch.randn(90, 3), dim=1)
    placed = flat(groups)
    assert placed.min() == 0 and placed.max() == 1
    middle = placed.reshape(3, 30, 2).mean(1)
    spread = np.linalg.norm(placed.reshape(3, 30, 2) - middle[:, None], axis=2).mean()
    assert spread < 0.5 * np.linalg.norm(middle[0] - middle[1])


def test_a_few_items_are_laid_flat_by_principal_components():
    # Three points on a line keep their order and distances: 0, 1 and 4 become 0, .25 and 1, or the reverse.
    line = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [4.0, 4.0, 4.0]])
    placed = flat(line)[:, 0]
    assert sorted(placed.tolist()) == pytest.approx([0, 0.25, 1]) or sorted(1 - placed) == pytest.approx([0, 0.25, 1])


def test_long_values_are_shortened():
    assert _short([f"actor {n}" for n in range(5)]) == "actor 0, actor 1, actor 2 and 2 more"
    assert _short("x" * 100) == "x" * 59 + "…"
    assert _short(1994.0) == "1994"
