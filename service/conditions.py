"""What a query may ask of an item's columns: a tree of `and`, `or`, `not` over `eq`, `in`, `range` and `exists`.

`Condition` speaks of columns and their values. `resolve` checks it against a schema and turns it into a `Test` of the
fields that are kept beside a vector (`service/attributes.py`), which the query engine reads as text (`query`) and the
exact index as a set of rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from itemvec.schema import Feature, FeatureSchema, Ordinal
from service import attributes
from service.attributes import HAS, field_of


@dataclass(frozen=True, slots=True)
class Eq:
    column: str
    value: Any


@dataclass(frozen=True, slots=True)
class In:
    column: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers, moments, or labels of an order. Bounds that are None do not bind."""

    column: str
    gt: Any = None
    ge: Any = None
    lt: Any = None
    le: Any = None


@dataclass(frozen=True, slots=True)
class Exists:
    column: str


@dataclass(frozen=True, slots=True)
class And:
    parts: "tuple[Condition, ...]"


@dataclass(frozen=True, slots=True)
class Or:
    parts: "tuple[Condition, ...]"


@dataclass(frozen=True, slots=True)
class Not:
    """Every other item, those that miss the column too."""

    part: "Condition"


Condition = Eq | In | Range | Exists | And | Or | Not


@dataclass(frozen=True, slots=True)
class TagIn:
    """The field has one of the tags; without any, no item passes."""

    field: str
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Between:
    field: str
    low: float
    high: float
    without_low: bool
    without_high: bool


@dataclass(frozen=True, slots=True)
class AllOf:
    parts: "tuple[Test, ...]"


@dataclass(frozen=True, slots=True)
class AnyOf:
    parts: "tuple[Test, ...]"


@dataclass(frozen=True, slots=True)
class NoneOf:
    part: "Test"


Test = TagIn | Between | AllOf | AnyOf | NoneOf


def resolve(condition: Condition, schema: FeatureSchema) -> Test:
    """Raises `ValueError` for a column that cannot be filtered by, or a value that it cannot have.

    >>> schema = FeatureSchema.from_yaml('''
    ... {name: films, id: tt, features: {genre: {kind: nominal, filterable: true}}}''')
    >>> query(resolve(And((Exists("genre"), Not(Eq("genre", "Sci-Fi")))), schema))
    '((@has:{f_genre}) (-(@f_genre:{tSci_2dFi})))'
    """
    return _resolve(condition, attributes.filterable(schema))


def _resolve(condition: Condition, columns: Mapping[str, Feature]) -> Test:
    match condition:
        case And(parts) | Or(parts) if not parts:
            raise ValueError("and, or need at least one part")
        case And(parts):
            return AllOf(tuple(_resolve(part, columns) for part in parts))
        case Or(parts):
            return AnyOf(tuple(_resolve(part, columns) for part in parts))
        case Not(part):
            return NoneOf(_resolve(part, columns))
    if (feature := columns.get(condition.column)) is None:
        raise ValueError(f"{condition.column!r} is not filterable; there is {', '.join(columns) or 'none'}")
    match condition:
        case Exists(column):
            return TagIn(HAS, (field_of(column),))
        case Eq(column, value):
            return _one_of(feature, "eq", (value,))
        case In(column, values):
            return _one_of(feature, "in", values)
        case Range():
            return _within(feature, condition)


def _one_of(feature: Feature, operation: attributes.Operation, values: tuple[Any, ...]) -> Test:
    for value in values:
        _check(feature, operation, value)
    field = field_of(feature.name)
    if attributes.kind_of(feature) == "tag":
        return TagIn(field, tuple(sorted({attributes.tag(feature, value) for value in values})))
    numbers = [attributes.number(feature, value) for value in values]
    if not numbers:
        return TagIn(HAS, ())
    return AnyOf(tuple(Between(field, n, n, False, False) for n in numbers))


def _within(feature: Feature, bounds: Range) -> Test:
    given = [value for value in (bounds.gt, bounds.ge, bounds.lt, bounds.le) if value is not None]
    if not given:
        raise ValueError(f"a range of {feature.name!r} needs a bound")
    for value in given:
        _check(feature, "range", value)

    def at(value: Any) -> float:
        return attributes.rank(feature, value) if isinstance(feature, Ordinal) else attributes.number(feature, value)

    # Of two lower bounds the higher binds; of equal ones that without its end.
    low, without_low = max(
        [(at(v), without) for v, without in ((bounds.gt, True), (bounds.ge, False)) if v is not None],
        default=(float("-inf"), False),
    )
    high, with_high = min(
        [(at(v), with_) for v, with_ in ((bounds.lt, False), (bounds.le, True)) if v is not None],
        default=(float("inf"), True),
    )
    if isinstance(feature, Ordinal):
        ranks = range(len(feature.order))
        inside = [
            r for r in ranks if (low < r or (r == low and not without_low)) and (r < high or (r == high and with_high))
        ]
        return TagIn(field_of(feature.name), tuple(attributes.tag(feature, feature.order[r]) for r in inside))
    return Between(field_of(feature.name), low, high, without_low, not with_high)


def _check(feature: Feature, operation: attributes.Operation, value: Any) -> None:
    if (wrong := attributes.check(feature, operation, value)) is not None:
        raise ValueError(f"{feature.name!r} {wrong}")


def query(test: Test) -> str:
    """The test in the language of the query engine, dialect 2. Tags need no escapes: `attributes.tag` sees to it."""
    match test:
        case TagIn(field, tags):
            return f"@{field}:{{{'|'.join(tags)}}}" if tags else f"@{HAS}:{{nothing}}"
        case Between(field, low, high, without_low, without_high):
            return f"@{field}:[{'(' if without_low else ''}{_bound(low)} {'(' if without_high else ''}{_bound(high)}]"
        case AllOf(parts):
            return "(" + " ".join(f"({query(part)})" for part in parts) + ")"
        case AnyOf(parts):
            return "(" + "|".join(f"({query(part)})" for part in parts) + ")"
        case NoneOf(part):
            return f"-({query(part)})"


def size(test: Test) -> int:
    """How many tags and ranges it asks for."""
    match test:
        case TagIn(_, tags):
            return len(tags)
        case AllOf(parts) | AnyOf(parts):
            return sum(map(size, parts))
        case NoneOf(part):
            return size(part)
    return 1


def negates(test: Test | None) -> bool:
    """Whether there is a `not` in it."""
    match test:
        case NoneOf():
            return True
        case AllOf(parts) | AnyOf(parts):
            return any(map(negates, parts))
    return False


def passes(test: Test, fields: Mapping[str, str]) -> bool:
    """Whether an item does, by the text of its fields.

    >>> passes(NoneOf(Between("f_year", 1990.0, 1999.0, False, False)), {"f_year": "1991.0"})
    False
    """
    match test:
        case TagIn(field, tags):
            return not set(tags).isdisjoint(fields.get(field, "").split(","))
        case Between(field, low, high, without_low, without_high):
            if field not in fields:
                return False
            number = float(fields[field])
            return (low < number or (low == number and not without_low)) and (
                number < high or (number == high and not without_high)
            )
        case AllOf(parts):
            return all(passes(part, fields) for part in parts)
        case AnyOf(parts):
            return any(passes(part, fields) for part in parts)
        case NoneOf(part):
            return not passes(part, fields)


def _bound(number: float) -> str:
    return {float("inf"): "+inf", float("-inf"): "-inf"}.get(number) or f"{number!r}"


def fields_in(test: Test) -> set[str]:
    """The fields that a test reads."""
    match test:
        case TagIn(field, tags):
            return {field, *tags} if field == HAS else {field}
        case Between(field):
            return {field}
        case AllOf(parts) | AnyOf(parts):
            return set().union(*(fields_in(part) for part in parts))
        case NoneOf(part):
            return fields_in(part)
