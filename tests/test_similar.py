"""Searches beyond one id: several examples, changed items, filters, explanations, many queries in one call."""

from typing import Any

import numpy as np
import pytest
from serving import DIM, ITEMS, TOY, Running, assert_problem, post

from service.queries import NEGATIVE_SHARE
from service.similar import without_empty

pytestmark = pytest.mark.anyio


@pytest.fixture
async def loaded(toys: Running) -> Running:
    await toys.load()
    return toys


def encoded(service: Running, *items: dict[str, Any]) -> Any:
    return service.models.champion().encode(items).vectors


def nearest(service: Running, query: Any, k: int, without: set[str]) -> list[str]:
    """The search that the service is to agree with: all of them, by numpy."""
    ids = [sku for sku in ITEMS if sku not in without]
    scores = encoded(service, *(ITEMS[sku] for sku in ids)) @ (query / np.linalg.norm(query))
    return [ids[i] for i in np.argsort(-scores, kind="stable")[:k]]


async def neighbors(service: Running, query: dict[str, Any]) -> list[str]:
    answer = await post(service, "/v1/similar", query)
    assert answer.status_code == 200, answer.text
    return [near["id"] for near in answer.json()["neighbors"]]


# Several examples


async def test_examples_are_the_mean_of_the_positive_less_half_that_of_the_negative(loaded: Running) -> None:
    liked, disliked = ["toy 3", "toy 8"], ["toy 20"]
    p, q, n = encoded(loaded, *(ITEMS[sku] for sku in liked + disliked))
    wanted = nearest(loaded, (p + q) / 2 - NEGATIVE_SHARE * n, 5, {*liked, *disliked})
    assert await neighbors(loaded, {"positive": liked, "negative": disliked, "k": 5}) == wanted


async def test_an_example_is_an_id_an_item_or_a_vector(loaded: Running) -> None:
    vector = [float(x) for x in encoded(loaded, ITEMS["toy 8"])[0]]
    found = [
        await neighbors(loaded, {"positive": ["toy 3", example], "exclude": ["toy 8"], "k": 5})
        for example in ("toy 8", ITEMS["toy 8"], vector)
    ]
    assert len(found[0]) == 5
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("many", [False, True])
async def test_a_vector_of_another_version_is_refused_where_it_says_whose_it_is(loaded: Running, many: bool) -> None:
    version = loaded.models.champion()
    query = {"embedding": [float(x) for x in encoded(loaded, TOY)[0]]}
    body = {"queries": [query]} if many else query
    assert (await post(loaded, "/v1/similar", {**body, "fingerprint": version.fingerprint})).status_code == 200
    refused = await post(loaded, "/v1/similar", {**body, "fingerprint": "0123456789abcdef"})
    detail = assert_problem(refused, 422, "/fingerprint")["errors"][0]["detail"]
    assert "0123456789abcdef" in detail and version.fingerprint in detail
    assert_problem(await post(loaded, "/v1/similar", {**body, "fingerprint": ""}), 422, "/fingerprint")


async def test_the_items_among_several_examples_tell_their_odd_columns(loaded: Running) -> None:
    answer = await post(loaded, "/v1/similar", {"positive": ["toy 3", {**TOY, "maker": "Nobel", "weight": 2}]})
    body = answer.json()
    assert "columns" not in body
    assert body["examples"] == [{"pointer": "/positive/1", "columns": {"maker": "oov", "weight": "ignored"}}]


async def test_examples_that_cancel_out_leave_nothing_to_look_for(loaded: Running) -> None:
    one = [1.0] + [0.0] * (DIM - 1)
    body = {"positive": [one, [-x for x in one]]}
    assert "cancel" in assert_problem(await post(loaded, "/v1/similar", body), 422, "/positive")["detail"]


# The same, but for


async def test_an_override_is_the_item_with_these_columns_replaced(loaded: Running) -> None:
    changed = {**ITEMS["toy 3"], "maker": "Bell", "price": 40.0}
    wanted = nearest(loaded, encoded(loaded, changed)[0], 5, {"toy 3"})
    override = {"maker": "Bell", "price": 40.0}
    assert await neighbors(loaded, {"id": "toy 3", "override": override, "k": 5}) == wanted
    by_item = await neighbors(loaded, {"item": TOY, "override": override, "k": 6})
    assert [sku for sku in by_item if sku != "toy 3"][:5] == wanted


async def test_ignored_columns_are_as_if_they_were_not_there(loaded: Running) -> None:
    rest = {name: value for name, value in TOY.items() if name not in {"price", "tags"}}
    wanted = nearest(loaded, encoded(loaded, rest)[0], 5, {"toy 3"})
    answer = (await post(loaded, "/v1/similar", {"id": "toy 3", "ignore": ["price", "tags"], "k": 5})).json()
    assert [near["id"] for near in answer["neighbors"]] == wanted
    assert answer["columns"] == {}  # that they are missing was the caller's wish
    assert await neighbors(loaded, {"id": "toy 3", "override": {"price": None, "tags": None}, "k": 5}) == wanted


async def test_an_override_tells_what_its_columns_were(loaded: Running) -> None:
    answer = await post(loaded, "/v1/similar", {"id": "toy 3", "override": {"maker": "Nobel"}})
    assert answer.json()["columns"] == {"maker": "oov"}


async def test_from_a_partial_item_is_taken_what_it_has_in_common_with_an_empty_one(loaded: Running) -> None:
    item = {"maker": "Ada"}
    mine, empty = encoded(loaded, item, {})
    assert mine @ empty > 0.1
    said = mine - (mine @ empty) * empty
    wanted = nearest(loaded, said, 5, set())
    assert wanted != nearest(loaded, mine, 5, set())
    assert await neighbors(loaded, {"item": item, "partial": True, "k": 5}) == wanted
    rest = [name for name in TOY if name != "maker"]
    changed = {"id": "toy 3", "override": item, "ignore": rest, "partial": True, "k": 5}
    assert await neighbors(loaded, changed) == nearest(loaded, said, 5, {"toy 3"})


async def test_a_partial_item_without_any_column_is_the_empty_one(loaded: Running) -> None:
    wanted = nearest(loaded, encoded(loaded, {})[0], 5, set())
    assert await neighbors(loaded, {"item": {}, "partial": True, "k": 5}) == wanted


def test_a_vector_that_points_away_from_the_empty_one_stays() -> None:
    empty = np.array([1, 0], np.float32)
    vectors = np.array([[0.6, 0.8], [-0.6, 0.8], [1, 0]], np.float32)
    assert without_empty(vectors, empty).tolist() == [[0, 1], pytest.approx([-0.6, 0.8]), [1, 0]]


# Explanations


async def test_a_contribution_is_what_the_score_loses_without_the_column(loaded: Running) -> None:
    body = (await post(loaded, "/v1/similar", {"id": "toy 3", "k": 4, "explain": True})).json()
    whole, without = encoded(loaded, TOY, {c: v for c, v in TOY.items() if c != "tags"})
    for near in body["neighbors"]:
        [vector] = encoded(loaded, ITEMS[near["id"]])
        assert near["contributions"]["tags"] == pytest.approx(float((whole - without) @ vector), abs=1e-5)
        gained = list(near["contributions"].values())
        assert gained == sorted(gained, reverse=True)
        assert set(near["contributions"]) == set(TOY)


async def test_contributions_to_a_partial_item_are_those_to_its_own_score(loaded: Running) -> None:
    item = {"maker": "Ada", "price": 7.0}
    query = {"item": item, "partial": True, "explain": True, "k": 4}
    body = (await post(loaded, "/v1/similar", query)).json()
    whole, without, empty = encoded(loaded, item, {"maker": "Ada"}, {})
    for near in body["neighbors"]:
        [vector] = encoded(loaded, ITEMS[near["id"]])
        said = [mine - max(mine @ empty, 0) * empty for mine in (whole, without)]
        scores = [(mine / np.linalg.norm(mine)) @ vector for mine in said]
        assert near["score"] == pytest.approx(float(scores[0]), abs=1e-5)
        assert near["contributions"]["price"] == pytest.approx(float(scores[0] - scores[1]), abs=1e-5)


async def test_only_columns_with_a_value_are_explained(loaded: Running) -> None:
    item = {"maker": "Ada", "tags": [], "price": 7.0, "shelf": 3}
    body = (await post(loaded, "/v1/similar", {"item": item, "ignore": ["price"], "explain": True, "k": 1})).json()
    assert list(body["neighbors"][0]["contributions"]) == ["maker"]


async def test_without_being_asked_nothing_is_explained(loaded: Running) -> None:
    body = (await post(loaded, "/v1/similar", {"item": TOY})).json()
    assert all(set(near) == {"id", "score"} for near in body["neighbors"])


# Filters


FILTERS: dict[str, tuple[dict[str, Any], Any]] = {
    "a label": ({"eq": {"maker": "Ada"}}, lambda t: t["maker"] == "Ada"),
    "a label of a set": ({"eq": {"tags": "wood"}}, lambda t: "wood" in t["tags"]),
    "one of some": ({"in": {"maker": ["Ada", "Bell"]}}, lambda t: t["maker"] in {"Ada", "Bell"}),
    "a number": ({"eq": {"price": 8}}, lambda t: t["price"] == 8.0),
    "one of some numbers": ({"in": {"price": [8, 9.0]}}, lambda t: t["price"] in {8.0, 9.0}),
    "a range": ({"range": {"price": {"gte": 10, "lt": 20}}}, lambda t: 10 <= t["price"] < 20),
    "an open end": ({"range": {"price": {"gt": 40}}}, lambda t: t["price"] > 40),
    "a range of an order": ({"range": {"age": {"gt": "3+"}}}, lambda t: t["age"] in {"6+", "12+"}),
    "a time": ({"range": {"added": {"lt": "2013-01-01"}}}, lambda t: t["added"] < "2013"),
    "not": ({"not": {"eq": {"maker": "Ada"}}}, lambda t: t["maker"] != "Ada"),
    "and, or": (
        {"and": [
            {"or": [{"eq": {"tags": "wood"}}, {"eq": {"tags": "metal"}}]}, {"not": {"range": {"price": {"lt": 20}}}}
        ]},
        lambda t: {"wood", "metal"} & set(t["tags"]) and t["price"] >= 20,
    ),
    "there is a value": ({"exists": "price"}, lambda _: True),
    "there is none": ({"not": {"exists": "price"}}, lambda _: False),
    "an unseen label": ({"eq": {"maker": "Nobel, {Alfred} | -@x:*"}}, lambda _: False),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERS)
async def test_a_filter_leaves_the_nearest_of_those_that_fulfil_it(loaded: Running, case: str) -> None:
    tree, fulfils = FILTERS[case]
    without = {sku for sku, toy in ITEMS.items() if not fulfils(toy)} | {"toy 3"}
    wanted = nearest(loaded, encoded(loaded, TOY)[0], 10, without) if len(without) < len(ITEMS) else []
    assert await neighbors(loaded, {"id": "toy 3", "filter": tree, "k": 10}) == wanted


async def test_an_item_is_filtered_by_what_it_is_now(loaded: Running) -> None:
    query = {"item": TOY, "filter": {"eq": {"maker": "Nobel"}}}
    assert await neighbors(loaded, query) == []
    await loaded.client.put("/v1/items/new", json={**TOY, "maker": "Nobel"})
    assert await neighbors(loaded, query) == ["new"]
    await loaded.client.put("/v1/items/new", json={**TOY, "maker": None})
    assert await neighbors(loaded, query) == []
    assert await neighbors(loaded, {"item": TOY, "filter": {"not": {"exists": "maker"}}}) == ["new"]


async def test_what_can_be_filtered_is_told(loaded: Running) -> None:
    detail = assert_problem(await post(loaded, "/v1/similar", {"id": "toy 3", "filter": {"eq": {"name": "x"}}}), 422)
    assert "filterable: maker, tags, price, age, added" in detail["detail"]
    [model] = (await loaded.client.get("/v1/models")).json()["data"]
    assert model["filterable"] == ["maker", "tags", "price", "age", "added"]


# Many queries


async def test_many_queries_are_answered_as_each_alone(loaded: Running) -> None:
    queries: list[dict[str, Any]] = [
        {"id": "toy 3", "k": 3},
        {"item": {**TOY, "maker": "Nobel"}, "k": 2},
        {"positive": ["toy 1", "toy 2"], "negative": ["toy 9"], "k": 4},
        {"id": "toy 5", "override": {"price": 30.0}, "ignore": ["tags"], "explain": True, "k": 2},
        {"id": "toy 7", "filter": {"eq": {"maker": "Ada"}}, "exclude": ["toy 8"]},
        {"item": {"maker": "Ada", "price": 7.0}, "partial": True, "explain": True, "k": 3},
        {"item": {"maker": "Ada"}, "partial": True, "k": 3},
    ]
    body = (await post(loaded, "/v1/similar", {"queries": queries, "model": "toys@1"})).json()
    assert (body["model"], body["fingerprint"]) == ("toys@1", loaded.models.champion().fingerprint)
    for query, result in zip(queries, body["results"], strict=True):
        alone = (await post(loaded, "/v1/similar", query)).json()
        assert [n["id"] for n in result["neighbors"]] == [n["id"] for n in alone["neighbors"]]
        assert result.get("columns") == alone.get("columns")
        for ours, its in zip(result["neighbors"], alone["neighbors"], strict=True):
            assert ours["score"] == pytest.approx(its["score"], abs=2e-6)  # both are rounded to six digits
            assert ours.get("contributions") == pytest.approx(its.get("contributions"), abs=1e-5)


async def test_a_wrong_query_is_refused_alone_with_its_place(loaded: Running) -> None:
    queries = [
        {"id": "toy 3", "k": 0},
        {"item": {**TOY, "price": "much"}},
        {"id": "toy 3", "k": 2},
        {"id": "nobody"},
        {"id": "toy 3", "filter": {"eq": {"name": "x"}}},
        {"id": "toy 3", "override": {"tags": 5}},
        "no query",
        {"embedding": [1.0]},
        {"positive": ["toy 3", {"price": "much"}]},
    ]
    results = (await post(loaded, "/v1/similar", {"queries": queries})).json()["results"]
    problems = [result.get("problem") for result in results]
    seen = [p and (p["status"], [e["pointer"] for e in p.get("errors", [])]) for p in problems]
    assert seen == [
        (422, ["/queries/0/k"]), (422, ["/queries/1/item/price"]), None, (404, []),
        (422, ["/queries/4/filter/eq/name"]),
        (422, ["/queries/5/override/tags"]), (422, ["/queries/6"]), (422, ["/queries/7/embedding"]),
        (422, ["/queries/8/positive/1/price"]),
    ]  # fmt: skip
    assert len(results[2]["neighbors"]) == 2


async def test_a_stored_item_that_the_version_refuses_is_told_as_that(loaded: Running) -> None:
    space = loaded.models.champion()
    await loaded.store.put("toys", ["odd"], [b'{"price": "much"}'], {space.fingerprint: encoded(loaded, TOY)})
    problem = assert_problem(await post(loaded, "/v1/similar", {"id": "odd", "ignore": ["tags"]}), 422, "/id")
    assert "/price" in problem["detail"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ids and examples": ({"id": "toy 3", "positive": ["toy 3"]}, ""),
    "negative alone": ({"negative": ["toy 3"]}, ""),
    "negative beside an id": ({"id": "toy 3", "negative": ["toy 4"]}, "/negative"),
    "no positive": ({"positive": []}, "/positive"),
    "positive not a list": ({"positive": "toy 3"}, "/positive"),
    "too many examples": ({"positive": ["toy 3"] * 101}, "/positive"),
    "an example that is a number": ({"positive": [3]}, "/positive/0"),
    "an example that is null": ({"positive": ["toy 3", None]}, "/positive/1"),
    "a vector example of another size": ({"positive": ["toy 3"], "negative": [[1.0, 0.0]]}, "/negative/0"),
    "a wrong value in an example": ({"positive": [{"price": "x"}, "toy 3"]}, "/positive/0/price"),
    "override of a vector": ({"embedding": [1.0] * DIM, "override": {"maker": "Ada"}}, "/override"),
    "ignore with examples": ({"positive": ["toy 3"], "ignore": ["maker"]}, "/ignore"),
    "explain of a vector": ({"embedding": [1.0] * DIM, "explain": True}, "/explain"),
    "override not an object": ({"id": "toy 3", "override": ["maker"]}, "/override"),
    "override of a column that is not there": ({"id": "toy 3", "override": {"makr": "Ada"}}, "/override/makr"),
    "override of the wrong type": ({"id": "toy 3", "override": {"price": "x"}}, "/override/price"),
    "ignore not a list": ({"id": "toy 3", "ignore": "maker"}, "/ignore"),
    "ignore of numbers": ({"id": "toy 3", "ignore": [1]}, "/ignore"),
    "ignore of a column that is not there": ({"id": "toy 3", "ignore": ["maker", "makr"]}, "/ignore/1"),
    "override and ignore of one column": (
        {"id": "toy 3", "override": {"maker": "Ada"}, "ignore": ["maker"]}, "/override/maker"
    ),
    "partial of a vector": ({"embedding": [1.0] * DIM, "partial": True}, "/partial"),
    "partial with examples": ({"positive": ["toy 3"], "partial": True}, "/partial"),
    "partial not a boolean": ({"item": TOY, "partial": "yes"}, "/partial"),
    "explain not a boolean": ({"id": "toy 3", "explain": 1}, "/explain"),
    "queries beside an id": ({"id": "toy 3", "queries": [{"id": "toy 3"}]}, "/id"),
    "queries not a list": ({"queries": {"id": "toy 3"}}, "/queries"),
    "no queries": ({"queries": []}, "/queries"),
    "too many queries": ({"queries": [{"id": "toy 3"}] * 101}, "/queries"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
async def test_a_query_that_cannot_be_meant_is_told_with_its_place(loaded: Running, case: str) -> None:
    body, pointer = WRONG[case]
    assert_problem(await post(loaded, "/v1/similar", body), 422, pointer)


async def test_queries_that_ask_for_too_many_encodings_are_refused_together(loaded: Running) -> None:
    queries = [{"id": "toy 3", "explain": True}] * 100
    assert len((await post(loaded, "/v1/similar", {"queries": queries})).json()["results"]) == 100
    examples = {"positive": [TOY] * 100}
    problem = assert_problem(await post(loaded, "/v1/similar", {"queries": [examples] * 50}), 422, "/queries")
    assert "5000 encodings" in problem["detail"] and "4096" in problem["detail"]
