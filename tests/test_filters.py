"""Filters as they come in JSON: each mistake is told with its place, and none becomes a search for something else."""

from typing import Any

import pytest

from itemvec.schema import FeatureSchema
from service.conditions import And, Eq, Exists, In, Not, Or, Range
from service.filters import MAX_DEPTH, read_filter
from service.problems import InvalidRequest

SCHEMA = FeatureSchema.from_yaml(
    """
    name: films
    id: tt
    features:
      title: {kind: text}
      plot: {kind: text, filterable: true}
      a/b: {kind: nominal, filterable: true}
      genres: {kind: multi, filterable: true}
      season: {kind: nominal, dtype: integer, filterable: true}
      rating: {kind: ordinal, order: [G, PG, R], filterable: true}
      year: {kind: numeric, filterable: true}
      released: {kind: timestamp, filterable: true}
    """
)


def test_a_tree_becomes_the_condition_that_it_says():
    tree = {
        "and": [
            {"or": [{"eq": {"genres": "Drama"}}, {"in": {"season": [1, 2]}}]},
            {"not": {"range": {"year": {"gt": 1990, "lte": 2000}}}},
            {"range": {"rating": {"gte": "PG", "lt": "R"}}},
            {"exists": "plot"},
        ]
    }
    assert read_filter(tree, SCHEMA, 100) == And(
        (
            Or((Eq("genres", "Drama"), In("season", (1, 2)))),
            Not(Range("year", gt=1990, le=2000)),
            Range("rating", ge="PG", lt="R"),
            Exists("plot"),
        )
    )


WRONG: dict[str, tuple[Any, list[str]]] = {
    "no object": ("genres", [""]),
    "null": (None, [""]),
    "an empty object": ({}, [""]),
    "two words": ({"eq": {"year": 1}, "in": {"year": [1]}}, [""]),
    "no word of ours": ({"equals": {"year": 1}}, ["/equals"]),
    "and of an object": ({"and": {"eq": {"year": 1}}}, ["/and"]),
    "and of nothing": ({"and": []}, ["/and"]),
    "not of a list": ({"not": [{"exists": "year"}]}, ["/not"]),
    "eq without a column": ({"eq": {}}, ["/eq"]),
    "eq of two columns": ({"eq": {"year": 1, "genres": "a"}}, ["/eq"]),
    "eq of a list": ({"eq": ["year", 1]}, ["/eq"]),
    "a column that is not there": ({"eq": {"yaer": 1}}, ["/eq/yaer"]),
    "a column that is not filterable": ({"exists": "title"}, ["/exists"]),
    "exists of a number": ({"exists": 3}, ["/exists"]),
    "text can only exist": ({"eq": {"plot": "x"}}, ["/eq/plot"]),
    "a column with a slash": ({"eq": {"a/b": 3}}, ["/eq/a~1b"]),
    "a number for a label": ({"eq": {"genres": 3}}, ["/eq/genres"]),
    "text for a whole number": ({"eq": {"season": "3"}}, ["/eq/season"]),
    "a boolean for a number": ({"eq": {"year": True}}, ["/eq/year"]),
    "null for a value": ({"eq": {"year": None}}, ["/eq/year"]),
    "an empty label": ({"eq": {"genres": " "}}, ["/eq/genres"]),
    "a label that is out of the order": ({"eq": {"rating": "X"}}, ["/eq/rating"]),
    "in of no list": ({"in": {"genres": "Drama"}}, ["/in/genres"]),
    "in of nothing": ({"in": {"genres": []}}, ["/in/genres"]),
    "in with wrong values": ({"in": {"genres": ["a", 3, None]}}, ["/in/genres/1", "/in/genres/2"]),
    "a range of labels without an order": ({"range": {"genres": {"gte": "A"}}}, ["/range/genres/gte"]),
    "a range of no object": ({"range": {"year": [1, 2]}}, ["/range/year"]),
    "a range without ends": ({"range": {"year": {}}}, ["/range/year"]),
    "a range with unknown ends": ({"range": {"year": {"from": 1, "to": 2}}}, ["/range/year/from", "/range/year/to"]),
    "a range of a wrong type": ({"range": {"year": {"gte": "1990"}}}, ["/range/year/gte"]),
    "a range with null": ({"range": {"year": {"gte": None}}}, ["/range/year/gte"]),
    "no time": ({"range": {"released": {"lt": "yesterday"}}}, ["/range/released/lt"]),
    "several mistakes": (
        {"and": [{"eq": {"yaer": 1}}, {"exists": "year"}, {"not": {"in": {"genres": [1]}}}]},
        ["/and/0/eq/yaer", "/and/2/not/in/genres/0"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_with_its_place(case):
    tree, places = WRONG[case]
    with pytest.raises(InvalidRequest) as refused:
        read_filter(tree, SCHEMA, 100, "/filter")
    assert [error.pointer for error in refused.value.errors] == ["/filter" + place for place in places]


def test_a_refused_column_names_those_that_can_be_filtered_by():
    with pytest.raises(InvalidRequest, match="'title' is not filterable; filterable: plot, a/b, genres, season"):
        read_filter({"exists": "title"}, SCHEMA, 100)
    without = FeatureSchema.from_yaml("{name: films, id: tt, features: {year: {kind: numeric}}}")
    with pytest.raises(InvalidRequest, match=r"filterable: none .*filterable: true"):
        read_filter({"exists": "year"}, without, 100)


def test_conditions_and_values_are_limited_together():
    tree = {"or": [{"in": {"season": [1, 2, 3]}}, {"exists": "year"}]}  # or, in, three values, exists
    assert read_filter(tree, SCHEMA, 6)
    with pytest.raises(InvalidRequest, match="more than 5 conditions and values"):
        read_filter(tree, SCHEMA, 5)
    wide = {"or": [{"exists": "year"}] * 100_000}
    with pytest.raises(InvalidRequest) as refused:
        read_filter(wide, SCHEMA, 1000)
    assert len(refused.value.errors) == 1


def test_a_tree_is_no_deeper_than_anybody_would_write_it():
    def nested(depth: int) -> Any:
        return {"not": nested(depth - 1)} if depth else {"exists": "year"}

    assert read_filter(nested(MAX_DEPTH - 1), SCHEMA, 1000)
    with pytest.raises(InvalidRequest, match="nested more than"):
        read_filter(nested(MAX_DEPTH), SCHEMA, 1000)
    with pytest.raises(InvalidRequest, match="nested more than"):
        read_filter(nested(900), SCHEMA, 1000)
