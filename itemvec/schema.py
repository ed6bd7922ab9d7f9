"""FeatureSchema: the contract of an item table. It names the id column and the features, each of one kind.

A schema is a small YAML file that a person reads and edits:

    name: movies
    id: id
    features:
      genres: {kind: multi}
      age_rating: {kind: ordinal, order: [G, PG, PG-13, R, NC-17]}
      runtime_minutes: {kind: numeric}

Columns of the table that it does not name are not used. A typo in a setting is an error, not a default.
"""

import difflib
from collections.abc import Collection, Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from itemvec.errors import SchemaError
from itemvec.values import PYTHON_TYPES, canonical

Label = str | int | bool
Dtype = Literal["string", "integer", "boolean"]
ModelName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
"""A model's name is a folder, a part of Redis keys, and a word in URLs: lower case, no `/`, no `@`."""


class Feature(BaseModel):
    """One column of an item table and how it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, max_length=200)

    weight: NonNegativeFloat = 1.0
    """How much this column counts in the training loss against the others; 0 leaves it an input only."""

    filterable: bool = False
    """Whether queries for similar items may be filtered by this column; each such column adds to the index."""

    @property
    def json_type(self) -> dict[str, Any]:
        """JSON Schema of one value, `null` (missing) aside."""
        raise NotImplementedError


class _Labels(Feature):
    dtype: Dtype = "string"
    """The type of the labels; a value of another type is refused, not converted."""

    min_count: PositiveInt = 2
    """Labels of fewer training items share the out-of-vocabulary row. A label of one item alone cannot make two
    items similar, and what it gives up trains the row that every new label will use."""

    max_labels: NonNegativeInt = 1_000_000
    """The most frequent labels that are kept; the rest share the out-of-vocabulary row. Bounds the table's memory."""

    labels: tuple[Label, ...] | None = Field(default=None, min_length=1)
    """The vocabulary, in its order, where it is known beforehand; without it, the labels of the training rows, most
    frequent first. `min_count` and `max_labels` say nothing about named labels."""

    hash_buckets: Annotated[int, Field(ge=0, le=2**24)] = 0
    """Rows that the labels outside the vocabulary share by their hash, instead of all sharing the one
    out-of-vocabulary row. For columns in which most labels are rare or new and still not all alike; with
    `max_labels: 0` there is no vocabulary and every label is hashed."""

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, labels: tuple[Label, ...] | None) -> tuple[Label, ...] | None:
        return None if labels is None else _distinct(labels, "the labels name")

    @model_validator(mode="after")
    def _labels_have_rows(self) -> "_Labels":
        for label in self.labels or ():
            if type(label) is not PYTHON_TYPES[self.dtype]:
                raise ValueError(f"the labels are of dtype {self.dtype}, and {label!r} is not")
        if self.max_labels == 0 and self.labels is None and self.hash_buckets == 0:
            raise ValueError("max_labels: 0 keeps no label; give hash_buckets for them to share")
        return self


class Nominal(_Labels):
    """A column of labels without order, embedded through its own rows of the table."""

    kind: Literal["nominal"] = "nominal"

    @property
    def json_type(self) -> dict[str, Any]:
        return {"type": self.dtype}


class Multi(_Labels):
    """A set of labels: a list, or one string with a separator. Order and repetition say nothing."""

    kind: Literal["multi"] = "multi"

    separator: str | None = Field(default=None, min_length=1)
    """Set where the table holds `Drama|Comedy` rather than a list; white space around the labels is dropped."""

    @model_validator(mode="after")
    def _separated_labels_are_strings(self) -> "Multi":
        if self.separator is not None and self.dtype != "string":
            raise ValueError(f"a separator splits strings, so dtype must be string, not {self.dtype}")
        return self

    @property
    def json_type(self) -> dict[str, Any]:
        listed = {"type": "array", "items": {"type": self.dtype}}
        return listed if self.separator is None else {"anyOf": [listed, {"type": "string"}]}


class Ordinal(Feature):
    """Labels with an order, lowest first: neighbors in the order start out similar."""

    kind: Literal["ordinal"] = "ordinal"

    order: tuple[Label, ...] = Field(min_length=2, max_length=1000)

    @field_validator("order")
    @classmethod
    def _labels_are_distinct(cls, order: tuple[Label, ...]) -> tuple[Label, ...]:
        return _distinct(order, "the order names")

    @property
    def json_type(self) -> dict[str, Any]:
        names = {str: "string", int: "integer", bool: "boolean"}
        return {"type": sorted({names[type(label)] for label in self.order})}


class Numeric(Feature):
    """A quantity. Values beyond the training range are clipped to it, and the answer says so."""

    kind: Literal["numeric"] = "numeric"

    scale: Literal["standard", "log", "quantile"] = "standard"
    """`log` for amounts over orders of magnitude (needs values >= 0), `quantile` where only the rank matters."""

    bins: Annotated[int, Field(ge=0, le=256)] = 16
    """A float per bin beside the value, since what a step means changes along the range (a year, a price): where most
    items are, small differences count. Bins have equally many training items, so there are fewer where values are often
    the same; 0 for the value alone."""

    clip: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """The share of training values at each end that is beyond the range: 0.01 keeps a few absurd values from
    squeezing all others together."""

    @property
    def json_type(self) -> dict[str, Any]:
        return {"type": "number"}


class Timestamp(Feature):
    """A moment: ISO 8601 text, a date, or Unix seconds. Encoded by its age and its place in cycles.

    Age counts from the newest training row, not from now, so that a vector does not change by the hour.
    """

    kind: Literal["timestamp"] = "timestamp"

    cycles: tuple[Literal["year", "week", "day"], ...] = ("year", "week")
    """What repeats: season, day of the week, time of day."""

    @property
    def json_type(self) -> dict[str, Any]:
        return {
            "anyOf": [
                {"type": "string", "format": "date-time"},
                {"type": "string", "format": "date"},
                {"type": "number"},
            ]
        }


class Text(Feature):
    """Free text as a bag of hashed words and character n-grams (Bojanowski et al. 2017): no vocabulary, no download.

    Or, with a sentence encoder that the user installs, as the vector that it gives.
    """

    kind: Literal["text"] = "text"

    buckets: PositiveInt = 16_384
    """Rows that the n-grams share by their hash. More buckets, fewer collisions, more memory."""

    words: Annotated[int, Field(ge=0, le=3)] = 2
    """Longest word n-gram: 2 adds pairs of neighboring words."""

    characters: tuple[int, int] | None = (3, 5)
    """Shortest and longest character n-gram of a word, so that `Matrix` and `Matrices` meet; null for words only."""

    max_characters: PositiveInt = 2_000
    """Text beyond is not read: it bounds the time that one item can take."""

    sentence_encoder: str | None = Field(default=None, min_length=1)
    """Name or folder of a model for `sentence_transformers.SentenceTransformer`. Its vector stands instead of the
    n-grams, and `buckets`, `words` and `characters` say nothing: it knows what words mean, and costs milliseconds."""

    @field_validator("characters")
    @classmethod
    def _ngrams_have_a_range(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and not 1 <= value[0] <= value[1] <= 10:
            raise ValueError("characters is [shortest, longest] with 1 <= shortest <= longest <= 10")
        return value

    @model_validator(mode="after")
    def _reads_something(self) -> "Text":
        if self.words == 0 and self.characters is None and self.sentence_encoder is None:
            raise ValueError("words: 0 and characters: null leave nothing to read")
        return self

    @property
    def json_type(self) -> dict[str, Any]:
        return {"type": "string"}


class Series(Feature):
    """Numbers in time order, oldest first, any length: a week of views, a year of sales. `null` inside is a gap."""

    kind: Literal["series"] = "series"

    scale: Literal["standard", "log"] = "standard"
    """`log` for amounts over orders of magnitude (needs values >= 0)."""

    points: Annotated[int, Field(ge=1, le=256)] = 8
    """Numbers that its course is summed up in: means of equal parts, whatever the length."""

    max_length: PositiveInt = 10_000
    """Of a longer series the newest numbers are read: it bounds the time that one item can take."""

    @property
    def json_type(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": ["number", "null"]}}


class Vector(Feature):
    """A ready embedding of fixed size, such as an image's. It is centred and scaled as a whole, so its angles stay."""

    kind: Literal["vector"] = "vector"

    size: Annotated[int, Field(ge=1, le=65_536)]
    """Numbers in the vector; one of another size is refused."""

    @property
    def json_type(self) -> dict[str, Any]:
        return {"type": "array", "items": {"type": "number"}, "minItems": self.size, "maxItems": self.size}


def _distinct(labels: tuple[Label, ...], they: str) -> tuple[Label, ...]:
    if any(canonical(label) is None for label in labels):
        raise ValueError(f"{they} an empty label, which is a missing value")
    if len({(type(label), canonical(label)) for label in labels}) < len(labels):
        raise ValueError(f"{they} a label twice")
    return labels


AnyFeature = Annotated[
    Nominal | Ordinal | Multi | Numeric | Timestamp | Text | Series | Vector, Field(discriminator="kind")
]
KINDS: dict[str, type[Feature]] = {
    "nominal": Nominal,
    "ordinal": Ordinal,
    "multi": Multi,
    "numeric": Numeric,
    "timestamp": Timestamp,
    "text": Text,
    "series": Series,
    "vector": Vector,
}


class FeatureSchema(BaseModel):
    """An item table's name, its id column, and its features in the order in which they are encoded.

    >>> schema = FeatureSchema.from_yaml('''
    ... name: films
    ... id: tt
    ... features:
    ...   genres: {kind: multi}
    ...   year: {kind: numeric}
    ... ''')
    >>> [f"{f.name}: {f.kind}" for f in schema.features]
    ['genres: multi', 'year: numeric']
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ModelName
    id: str = Field(min_length=1)
    features: tuple[AnyFeature, ...] = Field(min_length=1, max_length=1000)

    @field_validator("features", mode="before")
    @classmethod
    def _mapping_of_features(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple(
                {"name": name, **(body or {})} if isinstance(body, dict | None) else body
                for name, body in value.items()
            )
        return value

    @model_validator(mode="after")
    def _names_are_distinct(self) -> "FeatureSchema":
        names = [f.name for f in self.features]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"features named twice: {', '.join(twice)}")
        if self.id in names:
            raise ValueError(f"the id column {self.id!r} cannot be a feature: it would be learned by heart")
        if "id" in names:
            raise ValueError(f"a feature cannot be named 'id', as over HTTP that is {self.id!r}: rename the column")
        return self

    def feature(self, name: str) -> "AnyFeature":
        for feature in self.features:
            if feature.name == name:
                return feature
        raise SchemaError(
            f"schema {self.name!r} has no feature {name!r}; it has {', '.join(f.name for f in self.features)}"
        )

    @classmethod
    def load(cls, path: str | Path) -> "FeatureSchema":
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise SchemaError(f"no schema at {path}; write one: itemvec schema infer TABLE --out {path}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise SchemaError(f"cannot read the schema {path}: {error}") from None
        return cls.from_yaml(text, source=str(path))

    @classmethod
    def from_yaml(cls, text: str, source: str = "schema") -> "FeatureSchema":
        try:
            content = yaml.load(text, Loader=_StrictLoader)  # noqa: S506 (a SafeLoader)
        except yaml.YAMLError as error:
            raise SchemaError(f"{source} is not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise SchemaError(f"{source} must be a mapping with name, id and features; it is {type(content).__name__}")
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise SchemaError(f"{source}: {_in_one_line(error, content)}") from None

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def to_yaml(self) -> str:
        features = {f.name: f.model_dump(mode="json", exclude={"name"}) for f in self.features}
        body = {"name": self.name, "id": self.id, "features": features}
        return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)

    def json_schema(self) -> dict[str, Any]:
        """JSON Schema (2020-12) of one item as the HTTP API takes it: every feature may be null or absent."""
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": self.name,
            "x-itemvec-id": self.id,
            "type": "object",
            "properties": {
                f.name: {"anyOf": [f.json_type, {"type": "null"}], "x-itemvec-kind": f.kind} for f in self.features
            },
            "additionalProperties": True,
        }


class _StrictLoader(yaml.SafeLoader):
    """YAML lets a key stand twice and keeps the last; in a schema that is a lost column."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def _in_one_line(error: ValidationError, content: dict[str, Any]) -> str:
    """pydantic's report as one sentence per mistake, with features by their names rather than by position."""
    features = content.get("features")
    names = list(features) if isinstance(features, dict) else []
    sentences = []
    for mistake in error.errors():
        if mistake["loc"] == ("features",) and mistake["type"] == "too_short" and names:
            continue  # every feature failed and was counted out; its own sentence says why
        place = mistake["loc"]
        tagged = len(place) > 2 and place[0] == "features"  # features.0.numeric.scale: the kind is pydantic's to say
        where = [str(part) for at, part in enumerate(place) if not (tagged and at == 2)]
        if len(where) > 1 and where[0] == "features" and where[1].isdigit() and int(where[1]) < len(names):
            where[1] = str(names[int(where[1])])
        text = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "union_tag_invalid":
            text = f"kind {mistake['ctx']['tag']!r} is none of {', '.join(KINDS)}"
        elif mistake["type"] == "union_tag_not_found":
            text = f"has no kind; it is one of {', '.join(KINDS)}"
        elif mistake["type"] == "extra_forbidden":
            text = no_such_setting(where[-1], _settings_at(place[:-1]))
        elif mistake["type"] == "string_pattern_mismatch":  # only a model's name has one
            text = f"{mistake['input']!r} is not up to 64 of a-z, 0-9, _, . and -, with a letter or digit first"
        sentences.append(f"{'.'.join(where)}: {text}" if where else text)
    return "; ".join(sentences)


def _settings_at(place: tuple[int | str, ...]) -> Collection[str]:
    """Those of the schema, or of a feature, whose place ends with its kind."""
    if not place:
        return FeatureSchema.model_fields
    return [name for name in KINDS[str(place[-1])].model_fields if name != "name"]


def no_such_setting(name: str, there: Collection[str]) -> str:
    """With the way out, where `there` are those that there are."""
    if close := difflib.get_close_matches(name, there, 1):
        return f"no such setting; did you mean {close[0]}?"
    return f"no such setting; there is {', '.join(there)}"
