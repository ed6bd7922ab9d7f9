"""What of an item a query can filter by: the columns that its schema marks `filterable`, as fields beside its vector.

Labels become tags of letters, digits and `_`, so that no query needs an escape whatever a label holds; numbers stay
numbers and moments are Unix seconds, as they came and not as they were clipped for the network. The field `has` names
the columns that are there. Other kinds of columns, such as text, can only be asked whether they exist.
"""

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final, Literal

from itemvec.schema import Feature, FeatureSchema, Multi, Nominal, Numeric, Ordinal, Timestamp
from itemvec.values import PYTHON_TYPES, canonical, unix_seconds

Kind = Literal["tag", "number", "none"]
Operation = Literal["eq", "in", "range", "exists"]

HAS: Final = "has"
MAX_TAG: Final = 120
"""Bytes; of a longer label the beginning is kept, with a hash of all of it."""


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


def fields(columns: Mapping[str, Feature], item: Mapping[str, Any]) -> dict[str, str]:
    """The fields of an item that its schema takes.

    >>> columns = {"genres": Multi(name="genres"), "year": Numeric(name="year"), "cast": Multi(name="cast")}
    >>> fields(columns, {"genres": ["Film Noir", "Drama"], "year": 1941, "cast": []})
    {'f_genres': 'tDrama,tFilm_20Noir', 'f_year': '1941.0', 'has': 'f_genres,f_year'}
    """
    found: dict[str, str] = {}
    has = []
    for name, feature in columns.items():
        present, text = _read(feature, item.get(name))
        if present:
            has.append(field_of(name))
            if text:
                found[field_of(name)] = text
    if has:
        found[HAS] = ",".join(has)
    return found


def check(feature: Feature, operation: Operation, value: Any = None) -> str | None:
    """What is wrong with one value in a filter, to follow the name of the column; None if nothing is."""
    kind = kind_of(feature)
    if operation == "exists":
        return None
    if kind == "none":
        return "is no label, number or moment: a filter can only ask whether it exists"
    if isinstance(feature, Ordinal):
        return None if _ranked(feature, value) is not None else f"has the labels {_listed(feature)}, not {value!r:.60}"
    if isinstance(feature, Nominal | Multi):
        if operation == "range":
            return "has labels without an order, so no range: use eq or in"
        if type(value) is not PYTHON_TYPES[feature.dtype] or canonical(value) is None:
            return f"has labels of type {feature.dtype}, not {value!r:.60}"
        return None
    try:
        number(feature, value)
    except (TypeError, ValueError, OverflowError):
        expected = "ISO 8601 times or Unix seconds" if isinstance(feature, Timestamp) else "finite numbers"
        return f"has {expected}, not {value!r:.60}"
    return None


def number(feature: Feature, value: Any) -> float:
    """Raises TypeError, ValueError or OverflowError for what is none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is no number")
    if isinstance(feature, Timestamp):
        read = unix_seconds(value)
    elif isinstance(value, str):
        raise TypeError(f"{value!r} is no number")
    else:
        read = float(value)
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


def _read(feature: Feature, value: Any) -> tuple[bool, str]:
    """Is there a value, and what the index is to hold of it: nothing of one of a wrong type, which may come with a
    vector that is made already."""
    if value is None or (isinstance(value, str) and canonical(value) is None):
        return False, ""
    match feature:
        case Multi():
            labels = value.split(feature.separator) if isinstance(value, str) else value
            if not isinstance(labels, list | tuple | set | frozenset):
                return True, ""
            tags = {_tag(label) for label in labels if type(label) is PYTHON_TYPES[feature.dtype]} - {""}
            return bool(tags), ",".join(sorted(tags))
        case Ordinal():  # a label out of the order is there, but nothing can ask for it
            return True, tag(feature, value) if _ranked(feature, value) is not None else ""
        case Nominal():
            return True, _tag(value) if type(value) is PYTHON_TYPES[feature.dtype] else ""
        case Numeric() | Timestamp():
            try:
                return True, repr(number(feature, value))
            except TypeError:
                return True, ""
            except (ValueError, OverflowError):
                return False, ""  # not a number, which the network takes for missing too
        case _:
            return bool(value), ""


def _ranked(feature: Ordinal, value: Any) -> int | None:
    wanted = canonical(value)
    for place, label in enumerate(feature.order):
        if type(label) is type(wanted) and canonical(label) == wanted:
            return place
    return None


def _listed(feature: Ordinal) -> str:
    shown = ", ".join(repr(label) for label in feature.order[:10])
    return shown + (", ..." if len(feature.order) > 10 else "")


@lru_cache(maxsize=65_536, typed=True)
def _tag(label: Any) -> str:
    """Empty for what is no label."""
    found = canonical(label)
    if found is None:
        return ""
    return "t" + _word(str(found).lower() if isinstance(found, bool) else str(found))


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
