"""Filters of a search: each mode of the index finds what plain Python finds."""

import datetime
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest

from itemvec.errors import StoreUnavailable
from itemvec.schema import FeatureSchema
from service import attributes
from service.conditions import And, Condition, Eq, Exists, In, Not, Or, Range, passes, query, resolve
from service.index import Mode
from service.store import Encoded, Query, Store

pytestmark = pytest.mark.anyio

SCHEMA = FeatureSchema.from_yaml("""
name: films
id: tt
features:
  title: {kind: text, filterable: true}
  genre: {kind: nominal, filterable: true}
  tags: {kind: multi, separator: "|", filterable: true}
  stars: {kind: nominal, dtype: integer, filterable: true}
  silent: {kind: nominal, dtype: boolean, filterable: true}
  rating: {kind: ordinal, order: [G, PG, R], filterable: true}
  "minutes, total": {kind: numeric, filterable: true}
  added: {kind: timestamp, filterable: true}
  studio: {kind: nominal}
""")
GENRES = [
    "Film Noir",
    "film noir",
    "a,b",
    "{x}|*",
    "-",
    "\u65e5\u672c",
    "Caf\u00e9",
    "x" * 300,
    "x" * 299 + "y",
    '"',
    "\\",
    "%",
]
ITEMS: list[dict[str, Any]] = [
    {
        "title": "a title" if i % 2 else None,
        "genre": GENRES[i % len(GENRES)] if i % 5 else None,
        "tags": "|".join(["red", "blue", "deep red"][: i % 4]),
        "stars": i % 7 - 3,
        "silent": bool(i % 3),
        "rating": ["G", "PG", "R", "unrated", None][i % 5],
        "minutes, total": (i - 100) * 1e5 / 3 if i % 4 else None,
        "added": f"20{10 + i % 10}-0{1 + i % 9}-15" if i % 6 else None,
        "studio": "secret",
    }
    for i in range(200)
]
DIM = 4


def year(item: dict[str, Any]) -> int:
    return int(item["added"][:4]) if item["added"] else 0


CASES: list[tuple[Condition, Callable[[dict[str, Any]], bool]]] = [
    *[(Eq("genre", genre), lambda item, genre=genre: item["genre"] == genre) for genre in GENRES],
    (Eq("genre", " Cafe\u0301 "), lambda item: item["genre"] == "Caf\u00e9"),
    (Eq("genre", "no such"), lambda item: False),
    (In("genre", ("-", "%")), lambda item: item["genre"] in {"-", "%"}),
    (In("genre", ()), lambda item: False),
    (Eq("tags", "red"), lambda item: "red" in item["tags"].split("|")),
    (In("tags", ("blue", "deep red")), lambda item: {"blue", "deep red"} & set(item["tags"].split("|")) != set()),
    (Eq("stars", -2), lambda item: item["stars"] == -2),
    (Eq("silent", True), lambda item: item["silent"]),
    (Eq("rating", "PG"), lambda item: item["rating"] == "PG"),
    (Range("rating", ge="PG"), lambda item: item["rating"] in {"PG", "R"}),
    (Range("rating", gt="G", lt="R"), lambda item: item["rating"] == "PG"),
    (Range("minutes, total", gt=0), lambda item: (item["minutes, total"] or 0) > 0),
    (
        Range("minutes, total", ge=-1e5 / 3, lt=1e5 / 3),
        lambda item: item["minutes, total"] is not None and -1e5 / 3 <= item["minutes, total"] < 1e5 / 3,
    ),
    (Eq("minutes, total", 1e5 / 3), lambda item: item["minutes, total"] == 1e5 / 3),
    (Range("added", ge="2015-01-01", lt="2017-01-01"), lambda item: year(item) in {2015, 2016}),
    (
        Range("added", gt=datetime.datetime(2016, 7, 15, tzinfo=datetime.UTC).timestamp()),
        lambda item: (item["added"] or "") > "2016-07-15",
    ),
    (Exists("title"), lambda item: item["title"] is not None),
    (Exists("tags"), lambda item: item["tags"] != ""),
    (Not(Exists("genre")), lambda item: item["genre"] is None),
    (Not(Eq("genre", "-")), lambda item: item["genre"] != "-"),
    (Not(Not(Exists("genre"))), lambda item: item["genre"] is not None),
    (
        And((Exists("genre"), Not(In("genre", ("-", "%"))), Range("minutes, total", lt=0))),
        lambda item: item["genre"] not in {None, "-", "%"} and (item["minutes, total"] or 0) < 0,
    ),
    (
        Or((Eq("rating", "G"), And((Eq("silent", False), Not(Or((Exists("added"), Eq("stars", 0)))))))),
        lambda item: item["rating"] == "G" or (not item["silent"] and not item["added"] and item["stars"] != 0),
    ),
]


@pytest.fixture(params=["flat", "hnsw", "exact"])
async def films(request: pytest.FixtureRequest, empty_redis: str) -> AsyncIterator[tuple[Store, np.ndarray[Any, Any]]]:
    mode: Mode = request.param
    vectors = np.random.default_rng(0).standard_normal((len(ITEMS), DIM)).astype(np.float32)
    async with Store(empty_redis, timeout=5.0, index=mode) as store:
        await store.indexes.ensure("films", "aa", DIM, fields=attributes.index_fields(SCHEMA))
        await store.mark_live("films", "aa", "films@1")
        assert (await store.indexes.status("films", "aa")).mode == mode
        columns = attributes.filterable(SCHEMA)
        encoded = Encoded(vectors, attributes=attributes.fields(columns, ITEMS))
        await store.put("films", [str(i) for i in range(len(ITEMS))], [b"{}"] * len(ITEMS), {"aa": encoded})
        yield store, vectors


async def test_a_filter_passes_what_plain_python_passes_nearest_first(films: Any) -> None:
    store, vectors = films
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    queries = [Query(vectors[0], 200, where=condition) for condition, _ in CASES]
    for (condition, fulfils), found in zip(CASES, await store.search_many("films", "aa", queries, SCHEMA), strict=True):
        expected = {str(i) for i, item in enumerate(ITEMS) if fulfils(item)}
        assert {neighbor.id for neighbor in found} == expected, condition
        scores = [neighbor.score for neighbor in found]
        assert scores == sorted(scores, reverse=True)
        assert scores == pytest.approx([float(unit[int(n.id)] @ unit[0]) for n in found], abs=1e-5)
    some = await store.search("films", "aa", vectors[0], 3, exclude=["1"], where=Eq("stars", -2), schema=SCHEMA)
    order = [str(i) for i in np.argsort(-(unit @ unit[0])) if ITEMS[i]["stars"] == -2 and i != 1]
    assert [neighbor.id for neighbor in some] == order[:3]


async def test_what_an_item_lost_no_longer_passes(films: Any) -> None:
    store, vectors = films
    columns = attributes.filterable(SCHEMA)
    changed = {**ITEMS[6], "genre": None, "minutes, total": None, "tags": "green"}
    encoded = Encoded(vectors[6:7], attributes=attributes.fields(columns, [changed]))
    await store.put("films", ["6"], [b"{}"], {"aa": encoded})
    for condition, stays in (
        (Exists("genre"), False),
        (Range("minutes, total", lt=1e12), False),
        (Eq("tags", "blue"), False),
        (Eq("tags", "green"), True),
        (Not(Exists("minutes, total")), True),
    ):
        found = await store.search("films", "aa", vectors[6], 200, where=condition, schema=SCHEMA)
        assert ("6" in {neighbor.id for neighbor in found}) is stays, condition
    await store.put("films", ["6"], [b"{}"], {"aa": vectors[6:7]})
    found = await store.search("films", "aa", vectors[6], 200, where=Eq("stars", ITEMS[6]["stars"]), schema=SCHEMA)
    assert "6" not in {neighbor.id for neighbor in found}
    await store.delete("films", ["7"])
    found = await store.search("films", "aa", vectors[7], 200, where=Eq("stars", ITEMS[7]["stars"]), schema=SCHEMA)
    assert "7" not in {neighbor.id for neighbor in found}


async def test_recall_stays_with_a_filter_that_few_pass(empty_redis: str) -> None:
    """1 % of 5,000 items, in a graph index, where the query is far from all of them."""
    schema = FeatureSchema.from_yaml("{name: m, id: i, features: {c: {kind: nominal, filterable: true}}}")
    dice = np.random.default_rng(0)
    vectors = dice.standard_normal((5000, 32)).astype(np.float32)
    vectors[:50] += 3.0
    columns = attributes.filterable(schema)
    rare = attributes.fields(columns, [{"c": "rare" if i < 50 else "common"} for i in range(5000)])
    async with Store(empty_redis, timeout=5.0, index="hnsw") as store:
        await store.indexes.ensure("m", "aa", 32, fields=attributes.index_fields(schema))
        await store.put("m", [str(i) for i in range(5000)], [b"{}"] * 5000, {"aa": Encoded(vectors, attributes=rare)})
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        hits = 0
        for probe in -np.ones((20, 32)) + dice.standard_normal((20, 32)):
            found = await store.search("m", "aa", probe, 10, where=Eq("c", "rare"), schema=schema)
            assert len(found) == 10
            best = np.argsort(-(unit[:50] @ probe))[:10]
            hits += len({int(n.id) for n in found} & set(best.tolist()))
    assert hits / 200 >= 0.99


@pytest.mark.parametrize("mode", ["flat", "hnsw"])
async def test_what_a_not_excludes_is_not_found_among_thousands(empty_redis: str, mode: Mode) -> None:
    """Items of a label lie close together, so that the nearest are often those that the filter excludes."""
    schema = FeatureSchema.from_yaml("""
        {name: m, id: i, features: {label: {kind: nominal, dtype: integer, filterable: true},
        tags: {kind: multi, filterable: true}, year: {kind: numeric, filterable: true}}}""")
    dice, count = np.random.default_rng(0), 12_000
    labels = dice.integers(0, 40, count)
    vectors = dice.standard_normal((40, 16))[labels] + 0.5 * dice.standard_normal((count, 16))
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    tags = [[f"t{t}" for t in dice.choice(12, dice.integers(1, 4), replace=False)] for _ in range(count)]
    items = [{"label": int(n), "tags": t, "year": 1950 + 2 * int(n) % 70} for n, t in zip(labels, tags, strict=True)]

    def tree(depth: int) -> tuple[Condition, Callable[[dict[str, Any]], bool]]:
        kind = dice.integers(6) if depth else dice.integers(3)
        if kind == 0:
            some = tuple(map(int, dice.choice(40, 24, replace=False)))
            return In("label", some), lambda item: item["label"] in some
        if kind == 1:
            few = {f"t{t}" for t in dice.choice(12, 2)}
            return In("tags", tuple(few)), lambda item: bool(few & set(item["tags"]))
        if kind == 2:
            low, high = sorted(map(int, dice.integers(1950, 2020, 2)))
            return Range("year", ge=low, lt=high), lambda item: low <= item["year"] < high
        (one, first), (two, second) = tree(depth - 1), tree(depth - 1)
        if kind == 3:
            return And((one, two)), lambda item: first(item) and second(item)
        if kind == 4:
            return Or((one, two)), lambda item: first(item) or second(item)
        return Not(one), lambda item: not first(item)

    async with Store(empty_redis, timeout=10.0, bulk_timeout=60.0, index=mode) as store:
        await store.indexes.ensure("m", "aa", 16, fields=attributes.index_fields(schema))
        encoded = Encoded(
            vectors.astype(np.float32), attributes=attributes.fields(attributes.filterable(schema), items)
        )
        await store.put("m", [str(i) for i in range(count)], [b"{}"] * count, {"aa": encoded})
        for row in range(100):
            part, fulfils = tree(2)
            passing = {str(i) for i, item in enumerate(items) if not fulfils(item)}
            found = {n.id for n in await store.search("m", "aa", vectors[row], 10, where=Not(part), schema=schema)}
            assert found <= passing, part
            assert len(found) == min(10, len(passing)), part
            like = await store.search_like("m", "aa", str(row), 10, where=Not(part), schema=schema)
            assert like is not None
            assert {n.id for n in like} <= passing, part
            if mode == "flat":
                scores = unit @ unit[row]
                best = sorted(passing, key=lambda i: -scores[int(i)])[:10]
                assert found == set(best), part


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_test_passes_the_fields_of_what_plain_python_passes(case: int) -> None:
    condition, fulfils = CASES[case]
    test = resolve(condition, SCHEMA)
    fields = attributes.fields(attributes.filterable(SCHEMA), ITEMS)
    assert [passes(test, own) for own in fields] == [bool(fulfils(item)) for item in ITEMS]


@pytest.mark.parametrize("mode", ["flat", "exact"])
async def test_a_column_that_another_replica_has_filled_can_be_filtered_by(empty_redis: str, mode: Mode) -> None:
    async with Store(empty_redis, timeout=5.0, index=mode) as one, Store(empty_redis, timeout=5.0, index=mode) as two:
        await one.indexes.ensure("films", "aa", DIM)
        fields = attributes.fields(attributes.filterable(SCHEMA), ITEMS[:1])
        await one.put("films", ["a"], [b"{}"], {"aa": Encoded(np.ones((1, DIM), np.float32), attributes=fields)})
        assert len(await two.search("films", "aa", np.ones(DIM), 1)) == 1
        await one.indexes.reindex("films", "aa", fields=attributes.index_fields(SCHEMA))
        where = Eq("stars", ITEMS[0]["stars"])
        assert len(await two.search("films", "aa", np.ones(DIM), 1, where=where, schema=SCHEMA)) == 1
        like = await two.search_like("films", "aa", "a", 1, where=where, schema=SCHEMA)
        assert like == []


async def test_a_column_that_the_index_has_not_got_yet_is_an_error_and_not_an_empty_answer(empty_redis: str) -> None:
    async with Store(empty_redis, timeout=5.0) as store:
        await store.indexes.ensure("films", "aa", DIM)
        with pytest.raises(StoreUnavailable, match="has no column minutes, total yet"):
            await store.search("films", "aa", np.ones(DIM), 1, where=Exists("minutes, total"), schema=SCHEMA)


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        (Eq("studio", "secret"), "'studio' is not filterable; there is title, genre, tags"),
        (Eq("genre", 3), "'genre' has labels of type string, not 3"),
        (Eq("genre", "  "), "'genre' has labels of type string"),
        (Eq("stars", True), "'stars' has labels of type integer, not True"),
        (Range("genre", ge="a"), "without an order, so no range: use eq or in"),
        (Eq("title", "a title"), "can only ask whether it exists"),
        (Eq("rating", "NC-17"), r"has the labels 'G', 'PG', 'R', not 'NC-17'"),
        (Range("minutes, total", ge="long"), "has finite numbers, not 'long'"),
        (Range("minutes, total", ge=float("nan")), "has finite numbers, not nan"),
        (Range("added", ge="yesterday"), "has ISO 8601 times or Unix seconds, not 'yesterday'"),
        (Range("added"), "needs a bound"),
        (And(()), "at least one part"),
    ],
)
def test_what_a_filter_cannot_ask(condition: Condition, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        resolve(condition, SCHEMA)


def test_long_labels_that_differ_at_the_end_have_different_tags() -> None:
    genre = SCHEMA.feature("genre")
    tags = {attributes.tag(genre, label) for label in ("x" * 300, "x" * 299 + "y", "x" * 301)}
    assert len(tags) == 3
    assert max(map(len, tags)) <= attributes.MAX_TAG + 1


def test_of_two_bounds_the_closer_one_binds() -> None:
    assert query(resolve(Range("minutes, total", ge=1, gt=1, lt=5, le=4), SCHEMA)) == "@f_minutes_2c_20total:[(1.0 4.0]"
