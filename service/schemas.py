"""The shapes of requests and answers, for `/openapi.json` and `/docs`.

They document; they do not run. Requests are read by `service/requests.py`, by hand, and `tests/test_openapi.py` holds
the two together: every example here is sent to the service, and every answer is held against its model.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel

from service.requests import DEFAULT_K

ModelRef = Annotated[
    str,
    Field(description="`name`, `name@7`, `name@champion` or `name@challenger`", examples=["movies", "movies@7"]),
]
Item = Annotated[
    dict[str, Any],
    Field(
        description="The columns of one item, as the model's schema names them. A column that is left out or null is "
        "missing; one that the schema does not name is ignored, and the answer says so.",
        examples=[{"title": "A new film", "genres": ["Sci-Fi", "Action"], "release_year": 1999}],
    ),
]
ItemId = Annotated[str, Field(min_length=1, max_length=512, description="Any UTF-8 text up to 512 bytes")]
Columns = Annotated[
    dict[str, Literal["oov", "partly_oov", "missing", "clipped", "ignored"]],
    Field(
        description="The columns that were not plain: `oov` (all labels unseen in training), `partly_oov`, `missing`, "
        "`clipped` (beyond the training range), `ignored` (not in the schema)",
        examples=[{"genres": "partly_oov", "release_year": "missing"}],
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
    input: list[Item] = Field(min_length=1)
    model: ModelRef | None = Field(None, description="The default model if left out")
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="`base64`: the float32 numbers, little endian. Smaller and faster than text."
    )
    dimensions: int | None = Field(None, ge=1, description="Must be what the model has")
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


class UpsertedItem(_OfVersion):
    id: ItemId
    status: Literal["created", "updated"]
    columns: Columns


class BulkItem(BaseModel):
    model_config = ConfigDict(extra="allow")

    id: ItemId


class BulkRequest(_Request):
    items: list[BulkItem] = Field(
        min_length=1,
        description="Items with their ids",
        examples=[[{"id": "tt0133093", "title": "The Matrix", "genres": ["Action", "Sci-Fi"], "release_year": 1999}]],
    )
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


class SimilarRequest(_Request):
    """Exactly one of `id`, `item` and `embedding`."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": ["id"]}, {"required": ["item"]}, {"required": ["embedding"]}],
            "examples": [
                {"id": "tt0133093", "k": 10, "exclude": ["tt0234215"]},
                {"item": {"title": "A new film", "genres": ["Sci-Fi", "Action"], "release_year": 1999}, "k": 5},
            ],
        }
    )

    id: ItemId | None = Field(None, description="A stored item; it is not among its own neighbors")
    item: Item | None = None
    embedding: list[float] | str | None = Field(
        None,
        description="A vector of this very version, as numbers or as base64 of float32; its length does not matter",
    )
    k: int = Field(DEFAULT_K, ge=1, description="How many neighbors; fewer if the store has fewer")
    exclude: list[ItemId] = Field([], description="Items to leave out; the answer still has k")
    model: ModelRef | None = None


class Neighbor(_Answer):
    id: ItemId
    score: float = Field(ge=-1, le=1, description="Cosine of the two vectors: 1 is the same direction")


class Similar(_OfVersion):
    neighbors: list[Neighbor] = Field(description="Best first")
    columns: Columns | None = Field(None, description="Of the item in the request")


class ServedModel(_Answer):
    id: str = Field(description="The model's name")
    object: Literal["model"]
    created: int = Field(description="Unix seconds of its champion")
    owned_by: Literal["itemvec"]
    model: str | None = Field(description="The version that is served")
    fingerprint: str | None
    versions: list[int]
    aliases: dict[str, int]
    items: int | None = Field(description="Stored items; null while the store does not answer")


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
    version: int = Field(ge=1, description="The version to serve; the previous one for a rollback", examples=[4])


class Progress(_Answer):
    done: int
    total: int


class Refusal(FieldProblem):
    id: str


class Job(_Answer):
    id: str
    kind: Literal["promotion"]
    model: str = Field(examples=["movies@4"])
    cause: Literal["request", "registry"]
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
