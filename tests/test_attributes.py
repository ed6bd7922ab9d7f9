"""What an item can be filtered by. How filters find it is in test_conditions.py."""

from typing import Any

import pytest

from itemvec.schema import FeatureSchema
from service import attributes
from service.attributes import HAS, fields, filterable

SCHEMA = FeatureSchema.from_yaml("""
name: films
id: id
features:
  maker: {kind: nominal, filterable: true}
  genres: {kind: multi, filterable: true, separator: "|"}
  codes: {kind: multi, dtype: integer, filterable: true}
  age: {kind: ordinal, order: ["3+", "6+"], filterable: true}
  price: {kind: numeric, filterable: true}
  added: {kind: timestamp, filterable: true}
  title: {kind: text, filterable: true}
  cast: {kind: multi}
""")
COLUMNS = filterable(SCHEMA)


def one(**item: Any) -> dict[str, str]:
    [found] = fields(COLUMNS, [item])
    return found


@pytest.mark.parametrize(
    ("item", "kept"),
    [
        ({"maker": "Ada & Co"}, {"f_maker": "tAda_20_26_20Co", HAS: "f_maker"}),
        ({"genres": ["b", "a", "b", ""]}, {"f_genres": "ta,tb", HAS: "f_genres"}),
        ({"genres": "b|a"}, {"f_genres": "ta,tb", HAS: "f_genres"}),
        ({"codes": [2, 1]}, {"f_codes": "t1,t2", HAS: "f_codes"}),
        ({"age": "6+"}, {"f_age": "t1", HAS: "f_age"}),
        ({"price": 3}, {"f_price": "3.0", HAS: "f_price"}),
        ({"added": "1970-01-02"}, {"f_added": "86400.0", HAS: "f_added"}),
        ({"title": "A film"}, {HAS: "f_title"}),
        ({"price": 1, "maker": "x", "cast": ["y"]}, {"f_price": "1.0", "f_maker": "tx", HAS: "f_maker,f_price"}),
    ],
)
def test_values_become_what_the_index_reads(item: dict[str, Any], kept: dict[str, str]):
    assert one(**item) == kept


@pytest.mark.parametrize(
    "item", [{"maker": " "}, {"genres": []}, {"genres": ["", None]}, {"codes": None}, {"price": float("nan")},
             {"price": 10**400}, {"added": ""}, {"title": ""}, {"cast": ["y"]}, {}],
)  # fmt: skip
def test_what_says_nothing_is_not_there(item: dict[str, Any]):
    assert one(**item) == {}


@pytest.mark.parametrize(
    "item", [{"maker": 3}, {"genres": 3}, {"codes": {"a": 1}}, {"age": "7+"}, {"age": 3}, {"price": "much"},
             {"price": True}, {"added": [1]}],
)  # fmt: skip
def test_of_a_value_of_a_wrong_type_it_is_known_that_it_is_there(item: dict[str, Any]):
    [column] = item
    assert one(**item) == {HAS: f"f_{column}"}


def test_true_is_no_label_of_a_column_of_numbers():
    assert one(codes=[1]) == {"f_codes": "t1", HAS: "f_codes"}
    assert one(codes=[True]) == {}
    assert one(codes=[True, 1, 2.0]) == {"f_codes": "t1", HAS: "f_codes"}


def test_each_item_has_its_own():
    assert fields(COLUMNS, [{"price": 1}, {}, {"maker": "x"}]) == [
        {"f_price": "1.0", HAS: "f_price"}, {}, {"f_maker": "tx", HAS: "f_maker"},
    ]  # fmt: skip


def test_no_more_sets_are_remembered_than_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attributes, "MANY", 3)
    monkeypatch.setattr(attributes, "_known_tags", {})
    for i in range(20):
        assert one(genres=[f"g{i}"]) == {"f_genres": f"tg{i}", HAS: "f_genres"}
        assert 1 <= len(attributes._known_tags) <= 3


@pytest.mark.parametrize(
    "labels", ["|" * 65_000, ["a", *[""] * 4000], [chr(0x400 + i) for i in range(100)], ["x" * 121]]
)
def test_the_tags_of_a_long_set_are_made_and_not_remembered(labels: Any):
    before = len(attributes._known_tags)
    one(genres=labels)
    assert len(attributes._known_tags) == before
