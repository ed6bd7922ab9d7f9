"""The gate's arithmetic, and which checks there are; whole runs are in test_retrain.py."""

import math

import pytest

from itemvec.errors import ConfigError
from itemvec.schema import FeatureSchema
from training.config import validated
from training.gate import Check, GateConfig, GateRefused, same_columns

OLD = FeatureSchema.from_yaml(
    "name: t\nid: id\nfeatures: {maker: {kind: nominal}, tags: {kind: multi}, price: {kind: numeric}}"
)


def test_a_check_says_by_how_much_it_failed():
    failed = Check("genres micro-F1", new=0.41, champion=0.55, limit=0.45)
    assert not failed.passed
    assert str(failed) == "genres micro-F1 0.41 (champion 0.55, least 0.45) is short by 0.04"
    assert Check("rows", 10, 10, 10).passed


def test_of_some_figures_more_is_worse():
    failed = Check("MB of weights", new=12.5, limit=10, at_most=True)
    assert not failed.passed and Check("MB of weights", 10, 10, at_most=True).passed
    assert str(failed) == "MB of weights 12.5 (most 10) is over by 2.5"


@pytest.mark.parametrize("at_most", [False, True])
def test_what_is_no_number_passes_no_check(at_most):
    assert not Check("mean cosine", math.nan, 0.5, at_most=at_most).passed


def test_columns_that_are_gone_or_of_another_kind_are_named_and_new_ones_are_welcome():
    new = FeatureSchema.from_yaml(
        "name: t\nid: id\nfeatures: {tags: {kind: nominal}, price: {kind: numeric}, color: {kind: nominal}}"
    )
    check = same_columns(new, OLD)
    assert (check.new, check.limit, check.passed) == (1, 3, False)
    assert str(check).endswith("is short by 2: maker is gone, tags was multi and is nominal")
    assert same_columns(OLD, OLD).passed


@pytest.mark.parametrize("name", GateConfig.model_fields)
def test_every_check_can_be_turned_off(name):
    off = validated(GateConfig, {name: False}, "retrain.yaml")  # what YAML makes of `off`
    assert getattr(off, name) is (False if name == "columns" else None)


def test_a_limit_that_makes_no_sense_is_named():
    with pytest.raises(ConfigError, match=r"rows: Input should be less than or equal to 1"):
        validated(GateConfig, {"rows": 2}, "retrain.yaml")


def test_a_refusal_names_every_check_that_failed_and_what_stays():
    failed = [Check("rows", 5, 50, 100), Check("norm", 0.1, 0.5, 5.0)]
    refused = GateRefused.by("films", 3, failed)
    assert refused.exit_status == 3
    assert str(refused) == (
        "not switched, films@3 stays the champion: rows 5 (champion 100, least 50) is short by 45; "
        "norm 0.1 (champion 5, least 0.5) is short by 0.4"
    )
