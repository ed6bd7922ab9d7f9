"""The population stability index, worked out by hand."""

import math
from datetime import date

import pyarrow as pa
import pytest

from itemvec.schema import FeatureSchema
from training.drift import LEAST, drift, profile

SCHEMA = FeatureSchema.from_yaml(
    """
    name: toys
    id: sku
    features: {maker: {kind: nominal}, tags: {kind: multi}, price: {kind: numeric}, added: {kind: timestamp},
               name: {kind: text}}
    """
)


def toys(makers: str, tags: list[list[str] | None], prices: list[float | None]) -> pa.Table:
    n = len(prices)
    return pa.table(
        {
            "sku": [str(i) for i in range(n)], "maker": list(makers), "tags": tags, "price": prices,
            "added": [date(2000 + i, 1, 1) for i in range(n)], "name": ["a toy"] * n,
        }
    )  # fmt: skip


OLD = toys("AAAB", [["wood"], ["wood", "red"], [], None], [1.0, 2.0, 3.0, None])


def test_a_table_has_not_drifted_from_itself():
    assert drift(profile(OLD, SCHEMA), OLD, SCHEMA) == pytest.approx(
        dict.fromkeys(("maker", "tags", "price", "added", "name"), 0)
    )


def test_shares_are_of_labels_the_rest_and_what_is_missing():
    told = profile(OLD, SCHEMA)
    assert told["maker"] == {"bins": ["A", "B"], "shares": [0.75, 0.25, 0, 0]}
    # wood, wood, red, and two items without a tag
    assert told["tags"] == {"bins": ["wood", "red"], "shares": [0.4, 0.2, 0, 0.4]}
    assert told["price"]["shares"][-1] == 0.25 and sum(told["price"]["shares"]) == 1


def test_labels_that_are_new_are_a_drift_by_the_formula():
    new = toys("AABC", [["wood"], ["wood", "red"], [], None], [1.0, 2.0, 3.0, None])
    # A .75 -> .5, B .25 -> .25, the rest 0 (as LEAST) -> .25
    by_hand = -0.25 * math.log(0.5 / 0.75) + (0.25 - LEAST) * math.log(0.25 / LEAST)
    assert drift(profile(OLD, SCHEMA), new, SCHEMA)["maker"] == pytest.approx(by_hand)


def test_numbers_that_have_moved_are_a_drift_and_so_are_values_that_went_missing():
    old = toys("A" * 100, [["wood"]] * 100, [float(i) for i in range(100)])
    known = profile(old, SCHEMA)
    moved = toys("A" * 100, [["wood"]] * 100, [float(i + 50) for i in range(100)])
    gone = toys("A" * 100, [["wood"]] * 100, [float(i) if i % 2 else None for i in range(100)])
    slightly = toys("A" * 100, [["wood"]] * 100, [float(i + 1) for i in range(100)])
    assert drift(known, moved, SCHEMA)["price"] > 0.2 and drift(known, gone, SCHEMA)["price"] > 0.2
    assert drift(known, slightly, SCHEMA)["price"] < 0.1
    assert drift(known, old.drop_columns(["price"]), SCHEMA).keys() == {"maker", "tags", "added", "name"}
