import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from training import targets
from training.config import PredictConfig

SCHEMA = FeatureSchema.from_yaml("name: t\nid: id\nfeatures: {color: {kind: nominal}}")
TABLE = pa.table(
    {
        "id": list("abcdef"),
        "color": list("rgbrgb"),
        "price": pa.array([1.0, 3.0, 1.0, 3.0, None, 7.0]),
        "votes": [0, 9, 99, 0, 9, 99],
        "shelf": ["top", "low", "top", "top", "attic", None],
        "tags": [["x"]] * 6,
    }
)
TRAIN = np.arange(4)


def fitted(name: str, **settings) -> targets.Target:
    return targets.fit(TABLE, SCHEMA, PredictConfig(targets={name: settings}), TRAIN)[0]


def test_numbers_are_scaled_by_the_training_rows():
    # 1, 3, 1, 3: mean 2, deviation 1.
    price = fitted("price", loss="l2")
    assert price.values[[0, 1, 2, 3, 5]].tolist() == [-1.0, 1.0, -1.0, 1.0, 5.0]
    assert price.known.tolist() == [True] * 4 + [False, True]


def test_log_is_of_one_more():
    # log 1, log 10, log 100, log 1: 0, 1, 2, 0 times log 10, of which the mean is 0.75.
    votes = fitted("votes", loss="l2", scale="log")
    step = votes.values[1] - votes.values[0]
    assert votes.values[2] - votes.values[1] == pytest.approx(step.item())
    assert (votes.values[0] / step).item() == pytest.approx(-0.75)


def test_labels_are_numbered_by_how_often_training_has_them():
    shelf = fitted("shelf", loss="cross_entropy")
    assert shelf.classes == 2 and shelf.values.tolist() == [0, 1, 0, 0, targets.UNKNOWN, targets.UNKNOWN]


@pytest.mark.parametrize(
    ("name", "loss", "constant"),
    [
        ("price", "l2", 0.5),  # half of the variance, which is 1
        ("price", "huber", 0.5),  # all values are 1 away from 0
        ("price", "l1", 1.0),
        ("shelf", "cross_entropy", -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        ("shelf", "hinge", 0.5),  # "top" leads by 1: wrong in a quarter of the rows, by 2
    ],
)
def test_the_best_constant_answer_has_loss_1(name, loss, constant):
    target = fitted(name, loss=loss)
    assert target.constant == pytest.approx(constant, abs=1e-5)
    answers = {"cross_entropy": [math.log(3), 0.0], "hinge": [1.0, 0.0]}.get(loss, [target.majority])
    known = target.values[torch.from_numpy(TRAIN)]
    assert target.losses(torch.tensor([answers] * 4), known).mean().item() == pytest.approx(1.0, abs=1e-5)


def test_targets_are_the_same_after_a_round_trip(tmp_path):
    config = PredictConfig(targets={"price": {"loss": "huber"}, "shelf": {"loss": "hinge", "weight": 2}})
    made = targets.fit(TABLE, SCHEMA, config, TRAIN)
    targets.save(made, tmp_path)
    again = targets.load(tmp_path)
    assert [(t.name, t.loss, t.weight, t.classes, t.constant, t.majority) for t in again] == [
        (t.name, t.loss, t.weight, t.classes, t.constant, t.majority) for t in made
    ]
    assert all(torch.equal(a.values[a.known], b.values[b.known]) for a, b in zip(again, made, strict=True))


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("color", {"loss": "cross_entropy"}, "color: the schema has it as an input"),
        ("id", {"loss": "cross_entropy"}, "id: the schema has it as an input"),
        ("weight", {"loss": "l2"}, "weight: the table has no such column"),
        ("shelf", {"loss": "l2"}, "shelf: l2 wants a column of numbers"),
        ("price", {"loss": "hinge"}, "price: hinge wants a column of labels"),
        ("tags", {"loss": "hinge"}, "tags: hinge wants a column of labels"),
    ],
)
def test_a_target_that_cannot_be_one_is_named(name, settings, said):
    with pytest.raises(ConfigError, match=said):
        fitted(name, **settings)


def test_a_target_without_two_values_or_below_zero_for_log_is_named():
    table = TABLE.append_column("same", pa.array([1.0] * 6)).append_column("debt", pa.array([-1.0, 2, 3, 4, 5, 6]))
    for name, settings, said in [
        ("same", {"loss": "l2"}, "same: the training rows have fewer than two"),
        ("debt", {"loss": "l2", "scale": "log"}, "debt: scale: log wants values of 0 or more, one is -1"),
    ]:
        with pytest.raises(ConfigError, match=said):
            targets.fit(table, SCHEMA, PredictConfig(targets={name: settings}), TRAIN)
