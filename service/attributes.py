"""What of an item a query can filter by: the columns that its schema marks `filterable`, as fields beside its vector.

Labels become tags of letters, digits and `_`, so that no query needs an escape whatever a label holds; numbers stay
numbers and moments are Unix seconds, as they came and not as they were clipped for the network. The field `has` names
the columns that are there. Other kinds of columns, such as text, can only be asked whether they exist.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from functools import lru_cache, partial
from hashlib import blake2b
from typing import Any, Final, Literal

from itemvec.schema import Feature, FeatureSchema, Multi, Nominal, Numeric, Ordinal, Timestamp
from itemvec.values import PYTHON_TYPES, canonical, unix_seconds

Kind = Literal["tag", "number", "none"]
Operation = Literal["eq", "in", "range", "exists"]

HAS: Final = "has"
MAX_TAG: Final = 120
"""Bytes; of a longer label the beginning is kept, with a hash of all of it."""

FEW, SHORT = 16, 120
"""Labels of one set, and characters of all of them together, up to which its tags are remembered: long ones would fill
the memory."""

MANY: Final = 16_384
"""Sets whose tags are remembered."""

SETS: Final = (list, tuple, set, frozenset)


def filterable(schema: FeatureSchema) -> dict[str, Feature]:
    """By the name of the column."""
    return {feature.name: feature for feature in schema.features if feature.filterable}


def kind_of(feature: Feature) -> Kind:
    match feature:
        case Nominal() | Multi() | Ordinal():
            return "tag"
        case Numeric() | Timestamp():
            return "number"
        case _:
            return "none"


def index_fields(schema: FeatureSchema) -> dict[str, Kind]:
    """Field -> how it is indexed, of all filterable columns."""
    return {field_of(name): kind_of(feature) for name, feature in filterable(schema).items()}


def fields(columns: Mapping[str, Feature], items: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The fields of each item, which its schema takes.

    >>> columns = {"genres": Multi(name="genres"), "year": Numeric(name="year"), "cast": Multi(name="cast")}
    >>> fields(columns, [{"genres": ["Film Noir", "Drama"], "year": 1941, "cast": []}])
    [{'f_genres': 'tDrama,tFilm_20Noir', 'f_year': '1941.0', 'has': 'f_genres,f_year'}]
    """
    found: list[dict[str, str]] = [{} for _ in items]
    has: list[list[str]] = [[] for _ in items]
    for name, feature in columns.items():
        field, read = field_of(name), _reader(feature)
        for own, there, item in zip(found, has, items, strict=True):
            value = item.get(name)
            if value is not None and (text := read(value)) is not None:
                there.append(field)
                if text:
                    own[field] = text
    for own, there in zip(found, has, strict=True):
        if there:
            own[HAS] = ",".join(there)
    return found


def check(feature: Feature, operation: Operation, value: Any = None) -> str | None:
    """What is wrong with one value in a filter, to follow the name of the column; None if nothing is."""
    kind = kind_of(feature)
    if operation == "exists":
        return None
    if kind == "none":
        return "is no label, number or moment: a filter can only ask whether it exists"
    if isinstance(feature, Ordinal):
        return None if _ranked(feature, value) is not None else f"has the labels {_listed(feature)}, not {_got(value)}"
    if isinstance(feature, Nominal | Multi):
        if operation == "range":
            return "has labels without an order, so no range: use eq or in"
        if type(value) is not PYTHON_TYPES[feature.dtype] or canonical(value) is None:
            return f"has labels of type {feature.dtype}, not {_got(value)}"
        return None
    try:
        number(feature, value)
    except (TypeError, ValueError, OverflowError):
        expected = "ISO 8601 times or Unix seconds" if isinstance(feature, Timestamp) else "finite numbers"
        return f"has {expected}, not {_got(value)}"
    return None


def number(feature: Feature, value: Any) -> float:
    """Raises TypeError, ValueError or OverflowError for what is none."""
    read: float | None
    if type(value) is float or type(value) is int:
        read = float(value)
    elif isinstance(value, str | date) and isinstance(feature, Timestamp):
        read = unix_seconds(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        read = float(value)
    else:
        raise TypeError(f"{_got(value)} is no number")
    if read is None or not math.isfinite(read):
        raise ValueError(f"{value!r} is no finite number")
    return read


def rank(feature: Ordinal, value: Any) -> float:
    """The place of a label in its order, from 0; raises ValueError if it has none."""
    found = _ranked(feature, value)
    if found is None:
        raise ValueError(f"{value!r} is not in the order of {feature.name!r}")
    return found


def tag(feature: Feature, value: Any) -> str:
    if isinstance(feature, Ordinal):
        return f"t{rank(feature, value):g}"
    return _tag(value)


@lru_cache(maxsize=4096)
def field_of(column: str) -> str:
    return "f_" + _word(column)


def column_of(field: str) -> str:
    """The column of such a field; only the beginning of a very long name.

    >>> column_of(field_of("minutes, total"))
    'minutes, total'
    """
    data = re.sub(rb"_([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()), field.removeprefix("f_").encode())
    return data.decode("utf-8", "replace")


def _reader(feature: Feature) -> Callable[[Any], str | None]:
    """What gives the text that the index is to hold of a value, and None where there is none. The text is empty where
    there is a value but of a wrong type, which may come with a vector that is made already."""
    match feature:
        case Multi():
            return partial(_tags, PYTHON_TYPES[feature.dtype], feature.separator)
        case Ordinal():  # a label out of the order is there, but nothing can ask for it
            return lambda value: (
                None if _is_blank(value) else "" if _ranked(feature, value) is None else tag(feature, value)
            )
        case Nominal():
            kind: type = PYTHON_TYPES[feature.dtype]
            return lambda value: (_tag(value) if type(value) is kind else "") or (None if _is_blank(value) else "")
        case Numeric() | Timestamp():
            return partial(_number_text, feature)
        case _:
            return lambda value: "" if value and not _is_blank(value) else None


def _tags(kind: type, separator: str | None, value: Any) -> str | None:
    if isinstance(value, str):
        if _is_blank(value):
            return None
        value = value.split(separator)
    elif not isinstance(value, SETS):
        return ""
    labels = tuple(value)
    if kind is not str:
        return _made_tags(label for label in labels if type(label) is kind)
    try:
        return _known_tags[labels]
    except (KeyError, TypeError):  # new, or one of them is no label and has no hash
        pass
    made = _made_tags(label for label in labels if type(label) is str)
    if made and len(labels) <= FEW and {*map(type, labels)} == {str} and sum(map(len, labels)) <= SHORT:
        if len(_known_tags) >= MANY:
            _known_tags.clear()
        _known_tags[labels] = made
    return made


def _made_tags(labels: Iterable[Any]) -> str | None:
    return ",".join(sorted({*map(_tag, labels)} - {""})) or None


_known_tags: dict[tuple[str, ...], str] = {}
"""Of few and short labels, which come together again and again. Of strings alone, since in a dict True and 1 are the
same."""


def _number_text(feature: Feature, value: Any) -> str | None:
    if _is_blank(value):
        return None
    try:
        return repr(number(feature, value))
    except TypeError:
        return ""
    except (ValueError, OverflowError):
        return None  # not a number, which the network takes for missing too


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and canonical(value) is None


def _ranked(feature: Ordinal, value: Any) -> int | None:
    wanted = canonical(value)
    for place, label in enumerate(feature.order):
        if type(label) is type(wanted) and canonical(label) == wanted:
            return place
    return None


def _got(value: Any) -> str:
    """As text, but for what may be nested more deeply than Python writes."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"{value!r:.60}"


def _listed(feature: Ordinal) -> str:
    shown = ", ".join(repr(label) for label in feature.order[:10])
    return shown + (", ..." if len(feature.order) > 10 else "")


def _tag(label: Any) -> str:
    """Empty for what is no label."""
    return _made_tag(label) if isinstance(label, str) and len(label) > SHORT else _kept_tag(label)


def _made_tag(label: Any) -> str:
    found = canonical(label)
    if found is None:
        return ""
    return "t" + _word(str(found).lower() if isinstance(found, bool) else str(found))


_kept_tag = lru_cache(maxsize=65_536, typed=True)(_made_tag)
"""Of short ones."""


def _word(text: str) -> str:
    """ASCII letters and digits as they are, any other byte as `_` and two hex digits: no two texts share a word.

    >>> _word("Amélie"), _word("a_b")
    ('Am_c3_a9lie', 'a_5fb')
    """
    data = text.encode("utf-8", "surrogatepass")
    word = re.sub(rb"[^A-Za-z0-9]", lambda found: b"_%02x" % found[0][0], data).decode()
    if len(word) <= MAX_TAG:
        return word
    return f"{word[: MAX_TAG - 34]}_h{blake2b(data, digest_size=16).hexdigest()}"
