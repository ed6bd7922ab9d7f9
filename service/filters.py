"""Filters of a search, from JSON to conditions: which items may be found.

    {"and": [{"in": {"genres": ["Drama", "Comedy"]}},
             {"range": {"release_year": {"gte": 1990, "lt": 2000}}},
             {"not": {"eq": {"age_rating": "R"}}}]}

Each object has one word. `eq`, `in`, `range` and `exists` name a column that the schema marks `filterable`; what they
mean is in `service/conditions.py`. Every mistake is told with its place, all of them at once.
"""

from collections.abc import Mapping
from typing import Any, Final

from itemvec.errors import FieldError
from itemvec.schema import Feature, FeatureSchema
from service import attributes
from service.conditions import And, Condition, Eq, Exists, In, Not, Or, Range
from service.problems import InvalidRequest, escaped, expected

MAX_DEPTH: Final = 32
"""Conditions within each other; beyond it no person wrote them, and readers recurse."""

ENDS: Final = {"gt": "gt", "gte": "ge", "lt": "lt", "lte": "le"}


def read_filter(tree: Any, schema: FeatureSchema, limit: int, pointer: str = "/filter") -> Condition:
    """Raises `InvalidRequest`. `limit` bounds the conditions and values of the tree, counted together."""
    reader = _Reader(schema, limit)
    condition = reader.condition(tree, pointer, 0)
    if reader.errors or condition is None:
        raise InvalidRequest(reader.errors)
    return condition


class _Reader:
    """One reading of one tree. What is wrong becomes an error and None."""

    def __init__(self, schema: FeatureSchema, limit: int) -> None:
        self.errors: list[FieldError] = []
        self._schema, self._limit, self._left = schema, limit, limit
        self._columns: Mapping[str, Feature] = attributes.filterable(schema)

    def condition(self, tree: Any, pointer: str, depth: int) -> Condition | None:
        if not isinstance(tree, dict) or len(tree) != 1:
            words = "an object with one of the words and, or, not, eq, in, range, exists"
            return self._one_expected(pointer, words, tree)
        if depth >= MAX_DEPTH:
            return self._wrong(pointer, f"is nested more than {MAX_DEPTH} conditions deep")
        if not self._spend(1, pointer):
            return None
        [(word, rest)] = tree.items()
        within = f"{pointer}/{escaped(word)}"
        match word:
            case "and" | "or":
                return self._several(word, rest, within, depth)
            case "not":
                part = self.condition(rest, within, depth + 1)
                return None if part is None else Not(part)
            case "exists":
                if not isinstance(rest, str):
                    return self._expected(within, "the name of a column", rest)
                return self._test(word, rest, None, within)
            case "eq" | "in" | "range":
                if not isinstance(rest, dict) or len(rest) != 1:
                    return self._one_expected(within, "an object with one column", rest)
                [(name, wanted)] = rest.items()
                return self._test(word, name, wanted, f"{within}/{escaped(name)}")
        return self._wrong(within, "is no word of a filter; those are and, or, not, eq, in, range, exists")

    def _several(self, word: str, trees: Any, pointer: str, depth: int) -> Condition | None:
        if not isinstance(trees, list) or not trees:
            return self._expected(pointer, "a list of at least one condition", trees)
        parts = []
        for i, tree in enumerate(trees):
            parts.append(self.condition(tree, f"{pointer}/{i}", depth + 1))
            if self._left < 0:
                break
        good = tuple(part for part in parts if part is not None)
        return And(good) if word == "and" else Or(good)

    def _test(self, word: str, name: str, wanted: Any, pointer: str) -> Condition | None:
        feature = self._columns.get(name)
        if feature is None:
            known = any(f.name == name for f in self._schema.features)
            there = ", ".join(self._columns) or "none (the schema says it of a column: filterable: true)"
            why = "is not filterable" if known else "is no column of the schema"
            return self._wrong(pointer, f"{name[:200]!r} {why}; filterable: {there}")
        match word:
            case "eq":
                return self._checked(feature, word, wanted, pointer, Eq(name, wanted))
            case "in":
                if not isinstance(wanted, list) or not wanted:
                    return self._expected(pointer, "a list of at least one value", wanted)
                if not self._spend(len(wanted), pointer):
                    return None
                for i, value in enumerate(wanted):
                    self._checked(feature, word, value, f"{pointer}/{i}", None)
                return In(name, tuple(wanted))
            case "range":
                return self._range(feature, wanted, pointer)
        return self._checked(feature, "exists", None, pointer, Exists(name))

    def _range(self, feature: Feature, ends: Any, pointer: str) -> Condition | None:
        if not isinstance(ends, dict) or not ends:
            return self._expected(pointer, "an object with gt, gte, lt or lte", ends)
        for end, value in ends.items():
            within = f"{pointer}/{escaped(end)}"
            if end not in ENDS:
                self._wrong(within, "is none of gt, gte, lt, lte")
            else:
                self._checked(feature, "range", value, within, None)
        return Range(feature.name, **{ENDS[end]: value for end, value in ends.items() if end in ENDS})

    def _checked(
        self, feature: Feature, word: attributes.Operation, value: Any, pointer: str, made: Condition | None
    ) -> Condition | None:
        wrong = attributes.check(feature, word, value)
        return made if wrong is None else self._wrong(pointer, f"{feature.name!r} {wrong}")

    def _spend(self, count: int, pointer: str) -> bool:
        before, self._left = self._left, self._left - count
        if self._left < 0 <= before:  # told once
            self._wrong(pointer, f"the filter has more than {self._limit} conditions and values, the most it may have")
        return self._left >= 0

    # What is wrong is noted, and None stands in for the condition.

    def _expected(self, pointer: str, wanted: str, got: Any) -> Condition | None:
        self.errors.append(expected(pointer, wanted, got))
        return None

    def _one_expected(self, pointer: str, wanted: str, got: Any) -> Condition | None:
        if isinstance(got, dict):
            return self._wrong(pointer, f"expected {wanted}, got an object with {len(got)} fields")
        return self._expected(pointer, wanted, got)

    def _wrong(self, pointer: str, detail: str) -> Condition | None:
        self.errors.append(FieldError(pointer, detail))
        return None
