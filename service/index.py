"""How one version's vectors are searched: `Index`, the modes, and what the query engine is told.

flat    the query engine compares every vector: exact, and its cost grows with the number of items
hnsw    the query engine walks a graph (Malkov & Yashunin 2018): nearly exact, and nearly as fast however many
exact   every replica compares all vectors in its own memory (`service/exact.py`): any Redis or Valkey will do
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import orjson
from numpy.typing import NDArray
from redis import exceptions as errors

from itemvec.errors import ConfigError, StoreUnavailable
from service.attributes import HAS, Kind, column_of
from service.conditions import Test, fields_in, negates, passes, query
from service.keys import Space
from service.link import NO_ENGINE, ServerInfo

Mode = Literal["flat", "hnsw", "exact"]
WantedMode = Literal["auto", "flat", "hnsw", "exact"]
Vectors = NDArray[np.float32]

FLAT_UP_TO = 50_000
"""Items up to which comparing every vector is fast enough; above it the index is a graph."""

FLAT_DOWN_TO = 25_000
"""A graph becomes flat again below this: a store whose size swings about one number is not indexed again each time."""

EFFORT = 100
"""Candidates that a graph search keeps, or twice those it is asked for if that is more: with just as many, the last of
them are guesses (recall@100 among a million films .989, with twice as many .999). The server's default is 10."""

ALL = f"(-@{HAS}:{{nothing}})"
"""For the query engine: what every item fulfils."""


class Neighbor(NamedTuple):
    id: str
    score: float
    """Cosine, as `rounded`."""


@dataclass(frozen=True, slots=True)
class Index:
    mode: Mode
    dim: int
    fields: dict[str, Kind]
    """What a query can filter by, as `attributes.index_fields` gives it."""

    number: int = 1
    """The how-many-eth index over these vectors: the next one is filled while this one is searched."""

    logged: bool = False
    """Each write notes which vectors it changed. So an exact index follows."""

    def to_bytes(self) -> bytes:
        return orjson.dumps(asdict(self))

    @classmethod
    def from_bytes(cls, record: bytes) -> "Index":
        return cls(**orjson.loads(record))

    def check(self, test: Test) -> None:
        """Raises `NoColumn` for a test of fields that are not indexed yet."""
        if missing := fields_in(test) - self.fields.keys() - {HAS}:
            raise NoColumn(missing)


def choose_mode(wanted: WantedMode, items: int, server: ServerInfo, address: str, now: Mode | None = None) -> Mode:
    """The mode for so many items; raises `ConfigError` for one that the server cannot do.

    `now`: the mode it has. It is kept while the number of items is between the two bounds.
    """
    if server.evicts:
        raise ConfigError(
            f"Redis at {address} evicts keys when its memory is full, and items would vanish from "
            "the results: set its maxmemory-policy to noeviction"
        )
    if wanted == "exact":
        return "exact"
    if server.query_engine is None or server.cluster:
        if wanted == "auto":
            return "exact"
        if server.cluster:
            raise ConfigError(f"Redis at {address} is a cluster, where the index is exact: leave ITEMVEC_INDEX at auto")
        raise ConfigError(NO_ENGINE.format(address=address))
    if wanted != "auto":
        return wanted
    return "flat" if items < (FLAT_DOWN_TO if now == "hnsw" else FLAT_UP_TO) else "hnsw"


def create_command(space: Space, fp: str, index: Index) -> list[object]:
    settings: list[object] = ["TYPE", "FLOAT32", "DIM", index.dim, "DISTANCE_METRIC", "COSINE"]
    if index.mode == "hnsw":
        settings += ["M", 16, "EF_CONSTRUCTION", 200]
    command: list[object] = ["FT.CREATE", space.index(fp, index.number), "ON", "HASH", "PREFIX", 1, space.vectors(fp)]
    command += ["SCHEMA", "v", "VECTOR", index.mode.upper(), len(settings), *settings]
    for field, kind in index.fields.items():
        if kind == "tag":
            command += [field, "TAG", "SEPARATOR", ",", "CASESENSITIVE"]
        elif kind == "number":
            command += [field, "NUMERIC"]
    return [*command, HAS, "TAG", "SEPARATOR", ",", "CASESENSITIVE"]


def search_command(
    space: Space,
    fp: str,
    index: Index,
    vector: bytes,
    n: int,
    test: Test | None,
    milliseconds: int,
    exhaustive: bool = False,
) -> list[object]:
    """The n nearest of those that pass the test, in any order; `exhaustive`: not through the graph. The vector comes
    last, where a script can put it.

    Of a test with a `not` the query engine (2.10.5) finds wrong items where it looks in batches: one such filter in
    nine, and then often all of them. Where it compares every vector one by one it finds none, so it is told to if
    there is no graph. With one it is told of the `not` beside what all items fulfil, which leaves two such filters in a
    thousand; so the tested fields come along, for `read_neighbors` to look at.
    """
    params: list[object] = ["n", n]
    which, how, told = "*" if test is None else f"({query(test)})", "", ["d"]
    if exhaustive or (index.mode == "flat" and negates(test)):
        # Only with a filter may the query engine be told to compare every vector.
        which, how = ALL if test is None else which, " HYBRID_POLICY ADHOC_BF"
    elif index.mode == "hnsw":
        how, params = " EF_RUNTIME $ef", [*params, "ef", max(EFFORT, 2 * n)]
        if (doubted := to_check(index, test)) is not None:
            which, told = f"({ALL} {which})", ["d", *sorted({HAS} | fields_in(doubted) & index.fields.keys())]
    command: list[object] = ["FT.SEARCH", space.index(fp, index.number), f"{which}=>[KNN $n @v $q{how} AS d]"]
    command += ["RETURN", len(told), *told, "LIMIT", 0, n, "TIMEOUT", milliseconds, "DIALECT", 2]
    return [*command, "PARAMS", len(params) + 2, *params, "q", vector]


def to_check(index: Index, test: Test | None) -> Test | None:
    """The test, where what the graph found has to be held against it."""
    return test if index.mode == "hnsw" and negates(test) else None


def read_neighbors(reply: Mapping[bytes, Any], start: int, test: Test | None = None) -> list[Neighbor]:
    """`start`: where the id begins in a key. With a warning, results are missing: not to pass for all. `test`: those
    that do not pass it are left out, by the fields that came along."""
    if warnings := reply.get(b"warning"):
        raise StoreUnavailable("the search was cut short: " + b"; ".join(warnings).decode())
    found = []
    for result in reply[b"results"]:
        told = result[b"extra_attributes"]
        if test is None or passes(test, {name.decode(): value.decode() for name, value in told.items()}):
            found.append(Neighbor(result[b"id"][start:].decode(), rounded(1.0 - float(told[b"d"]))))
    found.sort(key=lambda neighbor: (-neighbor.score, neighbor.id))
    return found


def rounded(cosine: float) -> float:
    """To six places: what float32 has beyond them differs between the index modes, and means nothing."""
    return round(min(1.0, max(-1.0, cosine)), 6) + 0.0  # no -0.0


def checked_rows(what: str, matrix: NDArray[np.floating[Any]], count: int, dim: int) -> Vectors:
    """The vectors as Redis keeps them. It would take wrong ones without a word and find nonsense: ValueError."""
    if matrix.shape != (count, dim):
        raise ValueError(f"{what} takes vectors of shape {(count, dim)}, not {matrix.shape}")
    matrix = np.ascontiguousarray(matrix, "<f4")
    # A length that overflows, or is too small to divide by, is as useless as none.
    squares = np.einsum("ij,ij->i", matrix, matrix)
    bad = np.flatnonzero(~(np.isfinite(squares) & (squares > 0)))
    if bad.size:
        raise ValueError(f"vector {bad[0]} for {what} has no direction: all zero, NaN or infinite")
    return matrix


def check_fingerprint(fp: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", fp):
        raise ValueError(f"{fp!r} cannot be a fingerprint")


def says_no_index(error: errors.ResponseError) -> bool:
    text = str(error).lower()  # "no such index", "unknown index name": the words differ between versions
    return "no such index" in text or "unknown index name" in text or "index not found" in text


class NoColumn(StoreUnavailable):
    def __init__(self, fields: Iterable[str]) -> None:
        names = ", ".join(sorted(map(column_of, fields)))
        super().__init__(f"the index has no column {names} yet", retry_after=5.0)


class NoIndex(StoreUnavailable):
    def __init__(self, name: str, fp: str) -> None:
        super().__init__(f"{name} has no index for fingerprint {fp}: that version is not loaded", retry_after=5.0)
