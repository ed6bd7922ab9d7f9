"""The shapes of requests and answers, for `/openapi.json` and `/docs`.

They document; they do not run. Requests are read by `service/requests.py`, by hand, and `tests/test_openapi.py` holds
the two together: every example here is sent to the service, and every answer is held against its model.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from itemvec.runs import Run
from service.queries import DEFAULT_K, NEGATIVE_SHARE
from service.requests import DEFAULT_TOP, MAX_FINGERPRINT

ModelRef = Annotated[
    str,
    Field(
        description="`name`, `name@7`, `name@champion`, `name@previous` or `name@challenger`",
        examples=["movies", "movies@7"],
    ),
]
Item = Annotated[
    dict[str, Any],
    Field(
        description="The columns of one item, as the model's schema names them. A column that is left out or null is "
        "missing; one that the schema does not name is ignored, and the answer says so.",
        examples=[{"title": "A new film", "genres": ["Sci-Fi", "Action"], "release_year": 1999}],
    ),
]
WantedVersion = Annotated[int, Field(ge=1)] | Literal["previous", "challenger"]
ItemId = Annotated[str, Field(min_length=1, max_length=512, description="Any UTF-8 text up to 512 bytes")]
Columns = Annotated[
    dict[str, Literal["oov", "partly_oov", "missing", "clipped", "ignored"]],
    Field(
        description="The columns that were not plain: `oov` (all labels unseen in training), `partly_oov`, `missing`, "
        "`clipped` (beyond the training range), `ignored` (not in the schema)",
        examples=[{"genres": "partly_oov", "release_year": "missing"}],
    ),
]


Contributions = Annotated[
    dict[str, float],
    Field(
        description="What each column of the query gave to the score, largest first: the score, minus the score of the "
        "same query without that column. They do not add up to the score.",
        examples=[{"genres": 0.31, "title": 0.12, "release_year": -0.02}],
    ),
]
Vector = list[float] | str

ARROW_EMBEDDINGS = (
    "Sent: one row an item, its columns named as in the schema, and `id` if there is to be one in the answer. "
    "Answered: `id`, `embedding` (fixed-size list of float32) and `columns` (map: column -> status); the schema's "
    "metadata holds `model`, `fingerprint` and `degraded`. The header Accept chooses the form of the answer."
)
ARROW_ITEMS = (
    "Sent: one row an item, with `id` (text). Vectors that the served version made may come as `embedding`, with "
    "its `fingerprint` in the schema's metadata, and are not made again. Answered: `id`, `status`, `columns` (map) and "
    "`errors` (list of `pointer` and `detail`; null where the item was taken); the schema's metadata holds `model` and "
    "`fingerprint`."
)


Made = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_FINGERPRINT,
        description="What made the vectors in the request; 422 where that is not the version that answers",
    ),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _OfVersion(_Answer):
    model: str = Field(description="The version that answered, `name@version`", examples=["movies@3"])
    fingerprint: str = Field(
        description="Hash of schema, transform and weights. Vectors are comparable if their fingerprints are equal.",
        examples=["9f86d081884c7d65"],
    )


class EmbeddingsRequest(_Request):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"input": [{"title": "A new film", "genres": ["Sci-Fi", "Action"], "release_year": 1999}]},
                {"input": [{"title": "A new film"}], "encoding_format": "base64", "dimensions": 4},
            ]
        }
    )

    input: list[Item] = Field(min_length=1)
    model: ModelRef | None = Field(None, description="The default model if left out")
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="`base64`: the float32 numbers, little endian. Smaller and faster than text."
    )
    dimensions: int | None = Field(
        None,
        ge=1,
        description="The first so many numbers, brought to length 1: those of most variance, or a prefix that the "
        "model was trained for (`dimensions` of /v1/models)",
    )
    user: str | None = Field(None, description="Taken for the sake of OpenAI's clients, and not used")


class Embedding(_Answer):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str = Field(description="A vector of length 1", examples=[[0.12, -0.08, 0.31]])
    columns: Columns


class Usage(_Answer):
    prompt_tokens: int = Field(description="Encoded items: there are no tokens here")
    total_tokens: int


class Embeddings(_OfVersion):
    object: Literal["list"]
    data: list[Embedding]
    usage: Usage
    degraded: bool | None = Field(None, description="True while the item store is down; the vectors are not affected")


class ItemRequest(RootModel[Item]):
    """The columns of one item."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"title": "The Matrix", "genres": ["Action", "Sci-Fi"], "release_year": 1999}]}
    )


class UpsertedItem(_OfVersion):
    id: ItemId
    status: Literal["created", "updated"]
    columns: Columns


class BulkItem(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: ItemId


class BulkRequest(_Request):
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "items": [
                        {"id": "tt0133093", "title": "The Matrix", "genres": ["Action", "Sci-Fi"]},
                        {"id": "tt0234215", "title": "The Matrix Reloaded", "release_year": 2003},
                    ],
                    "model": "movies",
                }
            ]
        }
    )

    items: list[BulkItem] = Field(min_length=1, description="Items with their ids")
    model: ModelRef | None = Field(None, description="A model's name; its champion decides what is refused")


class FieldProblem(BaseModel):
    pointer: str = Field(description="JSON pointer (RFC 6901) into the request", examples=["/input/1/runtime_minutes"])
    detail: str = Field(examples=["expected a number, got the string 'long'"])


class Problem(BaseModel):
    """What went wrong, as RFC 9457 has it."""

    type: str = Field(examples=["urn:itemvec:problem:invalid-item"])
    title: str = Field(examples=["Invalid item"])
    status: int = Field(examples=[422])
    detail: str = Field(examples=["/input/1/runtime_minutes: expected a number, got the string 'long'"])
    request_id: str
    instance: str | None = None
    errors: list[FieldProblem] | None = Field(None, description="The values that are wrong, at most 100 of them")
    message: str | None = Field(None, description="`detail` once more, where OpenAI's clients look for it")


class BulkEntry(_Answer):
    id: str | None
    status: Literal["created", "updated", "refused"]
    columns: Columns | None = None
    problem: Problem | None = Field(None, description="Why it was refused")


class BulkAnswer(_OfVersion):
    items: list[BulkEntry] = Field(description="One entry an item, in the order they came")
    created: int
    updated: int
    refused: int


class StoredItem(_OfVersion):
    id: ItemId
    item: dict[str, Any] = Field(description="The columns as they were sent")
    embedding: list[float] | None = Field(description="Its vector; null if this version does not have it")


class SimilarQuery(_Request):
    """Exactly one of `id`, `item`, `embedding` and `positive`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name]} for name in ("id", "item", "embedding", "positive")],
        }
    )

    id: ItemId | None = Field(None, description="A stored item; it is not among its own neighbors")
    item: Item | None = None
    embedding: Vector | None = Field(
        None,
        description="A vector of this very version, as numbers or as base64 of float32; its length does not matter",
    )
    positive: list[ItemId | Item | list[float]] | None = Field(
        None, min_length=1, description="Examples to be near to: ids, items, or vectors as numbers"
    )
    negative: list[ItemId | Item | list[float]] = Field(
        [],
        description=f"Examples to be far from. The query is mean(positive) - {NEGATIVE_SHARE} * mean(negative).",
    )
    k: int = Field(DEFAULT_K, ge=1, description="How many neighbors; fewer if the store has fewer")
    exclude: list[ItemId] = Field([], description="Items to leave out; the answer still has k")
    filter: dict[str, Any] | None = Field(
        None,
        description="Only items that fulfil it: `eq`, `in`, `range` and `exists` over columns that the schema marks "
        "`filterable`, within `and`, `or` and `not`. Of a set, any label will do; an item that misses the column "
        "fulfils only a `not`.",
    )
    override: Item | None = Field(None, description="The same item but for these columns; null takes a column away")
    ignore: list[str] = Field([], description="Columns of the item that shall not count")
    explain: bool = Field(False, description="Adds `contributions` to each neighbor; one encoding for each column")
    partial: bool = Field(
        False,
        description="The item is a description: the columns that it lacks say nothing. Otherwise items that lack them, "
        "too, are nearer",
    )


class SimilarRequest(SimilarQuery):
    """One query, or many under `queries`, which then stands alone beside `model`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name]} for name in ("id", "item", "embedding", "positive", "queries")],
            "examples": [
                {"id": "tt0133093", "k": 10, "exclude": ["tt0234215"]},
                {"item": {"title": "A new film", "genres": ["Sci-Fi", "Action"], "release_year": 1999}, "k": 5},
                {"item": {"title": "Star", "genres": ["Sci-Fi"]}, "partial": True, "k": 5},
                {"positive": ["tt0133093", "tt0234215"], "negative": [{"genres": ["Horror"]}]},
                {"id": "tt0133093", "override": {"genres": ["Comedy"]}, "ignore": ["title"], "explain": True, "k": 3},
                {
                    "id": "tt0133093",
                    "filter": {
                        "and": [
                            {"in": {"genres": ["Drama", "Sci-Fi"]}},
                            {"range": {"release_year": {"gte": 1990, "lt": 2000}}},
                            {"not": {"eq": {"genres": "Horror"}}},
                        ]
                    },
                },
                {"queries": [{"id": "tt0133093"}, {"item": {"title": "A new film"}, "k": 3}], "model": "movies"},
            ],
        }
    )

    queries: list[SimilarQuery] | None = Field(None, min_length=1, description="Each is answered by itself, in order")
    model: ModelRef | None = None
    fingerprint: Made = None


class Neighbor(_Answer):
    id: ItemId
    score: float = Field(ge=-1, le=1, description="Cosine of the two vectors, to six places: 1 is the same direction")
    contributions: Contributions | None = None


class ExampleColumns(_Answer):
    pointer: str = Field(examples=["/negative/0"])
    columns: Columns


class _Neighbors(_Answer):
    neighbors: list[Neighbor] = Field(description="Best first")
    columns: Columns | None = Field(None, description="Of the item that was encoded for the query")
    examples: list[ExampleColumns] | None = Field(
        None, description="Of several examples, the items whose columns were not plain"
    )


class Similar(_Neighbors, _OfVersion):
    pass


class RefusedQuery(_Answer):
    problem: Problem


class ManySimilar(_OfVersion):
    results: list[_Neighbors | RefusedQuery] = Field(description="One a query, in the order they came")


class DecodeRequest(_Request):
    """Either `embedding` or `embeddings`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["embedding"]}, {"required": ["embeddings"]}],
            "examples": [{"embedding": [0.31, -0.22, 0.14, 0.58, -0.41, 0.09, 0.52, -0.25], "top": 3}],
        }
    )

    embedding: Vector | None = Field(None, description="A vector of this very version, as numbers or base64")
    embeddings: list[Vector] | None = Field(None, min_length=1)
    top: int = Field(DEFAULT_TOP, ge=1, description="Candidates of a column")
    model: ModelRef | None = None
    fingerprint: Made = None


class Candidate(_Answer):
    value: str | int | bool
    probability: float = Field(ge=0, le=1)


class DecodedColumn(_Answer):
    value: Any = Field(
        description="The most likely: a label, the labels of a set whose probability is at least .5, a number in its "
        "own unit, a time as ISO 8601 text, or a list of numbers"
    )
    missing: float = Field(ge=0, le=1, description="Probability that the item has no value here")
    candidates: list[Candidate] | None = Field(
        None, description="Of labels, the most likely ones, best first, given that there is a value"
    )


class DecodedItem(_Answer):
    index: int
    columns: dict[str, DecodedColumn] = Field(description="All but text, of which only hashes are known")


class Decoded(_OfVersion):
    data: list[DecodedItem]


class ServedModel(_Answer):
    id: str = Field(description="The model's name")
    object: Literal["model"]
    created: int = Field(description="Unix seconds of its champion")
    owned_by: Literal["itemvec"]
    model: str | None = Field(description="The version that is served")
    fingerprint: str | None
    dimensions: list[int] | None = Field(
        description="Sizes of its embeddings: the prefixes that it was trained to have, and the whole"
    )
    filterable: list[str] | None = Field(description="Columns that a filter may name")
    versions: list[int]
    aliases: dict[str, int]
    items: int | None = Field(description="Stored items; null while the store does not answer")
    index: Literal["flat", "hnsw", "exact"] | None = Field(
        description="How neighbors are found: all vectors compared in Redis (flat), by a graph (hnsw), or compared in "
        "the service (exact, where Redis has no query engine)"
    )


class Models(_Answer):
    object: Literal["list"]
    data: list[ServedModel]


class VersionDetail(_OfVersion):
    manifest: dict[str, Any] = Field(description="Lineage, files with their sha256, configuration")
    item_schema: dict[str, Any] = Field(description="JSON Schema of one item")
    evaluation: dict[str, Any] = Field(description="What training measured on held-out items")


class ModelDetail(ServedModel):
    item_schema: dict[str, Any] | None = Field(description="JSON Schema of one item of the served version")
    evaluation: dict[str, Any] | None


class AliasRequest(_Request):
    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 2}, {"version": "previous"}]})

    version: WantedVersion = Field(description="The version to serve, by number or alias; `previous` for a rollback")


class BackfillRequest(_Request):
    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 2}]})

    version: WantedVersion = Field(description="The version whose index is to be made, by number or alias")


class Progress(_Answer):
    done: int
    total: int


class Refusal(FieldProblem):
    id: str


class Job(_Answer):
    id: str
    kind: Literal["promotion", "backfill", "reindex"]
    model: str = Field(examples=["movies@4"])
    fingerprint: str | None = Field(description="Of that version; null until it is loaded")
    cause: Literal["request", "registry", "size"]
    state: Literal["running", "succeeded", "failed"]
    stage: str
    progress: Progress = Field(description="Stored items that were encoded with the new version")
    refused: int = Field(description="Stored items that the new version cannot encode; they will not be found")
    refusals: list[Refusal] = Field(description="The first of them")
    started_at: str
    updated_at: str
    problem: Problem | None = Field(description="Why it failed")


class JobStarted(_Answer):
    job: Job


class RunList(_Answer):
    object: Literal["list"]
    data: list[Run]


class Health(_Answer):
    status: Literal["ok"]


class Readiness(_Answer):
    ready: bool
    models: dict[str, str] = Field(description="Name -> the version that is served", examples=[{"movies": "movies@3"}])
    store: Literal["ok", "filling", "loading", "unavailable"] = Field(
        description="`filling`: the index of the served version is being made, and searches are refused so long; "
        "`loading`: there are fewer items than `ready_items`; "
        "`unavailable`: Redis does not answer. Items are encoded in any case."
    )
