"""The layout of the store in Redis. Every key is named here, and only `service/store.py` and its parts use one.

    iv:item:{name.bNN}:<id>              hash  raw (the item as JSON), rev (new at every write)
    iv:vec:<name>:<fp>:{name.bNN}:<id>   hash  v (float32, little endian); of a model with filterable columns also
                                               `a` (their values as JSON) and a field for each of them
    iv:log:<name>:<fp>:{name.bNN}        zset  id -> when its vector last changed; where the index is exact
    iv:gone:<name>:<fp>:{name.bNN}       zset  id -> when its vector was removed, for an hour
    iv:count:{name.bNN}                  items in the bucket
    iv:live:{name}                       hash  fingerprint -> version; every write must reach each of them
    iv:ready:{name}                      set   fingerprints whose index has every item
    iv:index:{name}                      hash  fingerprint -> how it is searched (JSON, `service/index.py`)
    iv:tick:{name}                       hash  fingerprint -> number, higher after each write to an exact index,
                                               and <fp>:made -> new whenever that index is made
    iv:idx:<name>:<fp>:<n>               index of the query engine over the prefix iv:vec:<name>:<fp>:
    iv:switch:{name}                     who switches the model's version now; expires
    iv:job:<id>                          a job's record; expires
    iv:enc:<fp>:{eNN}:<digest>           what the encoder made of an item (`service/cache.py`); expires

NN = crc32(id) % 64. The braces are the hash tag of Redis Cluster: an item, its vectors, their log and the counter share
a slot, so one script changes them together or not at all.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from zlib import crc32

from itemvec.values import MAX_ID_BYTES

BUCKETS = 64
CHUNK = 512  # items a round trip in bulk: beyond it nothing gets faster, and other clients wait longer
SCRIPT = 32
"""Items that one script changes, while everybody else waits. Each script costs what storing an item does once more."""


class Space:
    """The keys of one model."""

    __slots__ = ("_name", "every_item", "indexes", "live", "ready", "switch", "ticks")

    def __init__(self, name: str) -> None:
        # Colons and braces separate the parts of a key; `*` and `[` would be patterns.
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,128}", name):
            raise ValueError(f"{name!r} cannot name a model: letters, digits, '_', '.' and '-' only")
        self._name = name
        self.live = f"iv:live:{{{name}}}"
        self.ready = f"iv:ready:{{{name}}}"
        self.indexes = f"iv:index:{{{name}}}"
        self.ticks = f"iv:tick:{{{name}}}"
        self.switch = f"iv:switch:{{{name}}}"
        self.every_item = f"iv:item:{{{name}.b[0-9][0-9]}}:*"

    def item_prefix(self, bucket: int) -> bytes:
        return f"iv:item:{{{self._name}.b{bucket:02}}}:".encode()

    def vector_prefix(self, fp: str, bucket: int) -> bytes:
        return f"{self.vectors(fp)}{{{self._name}.b{bucket:02}}}:".encode()

    def vectors(self, fp: str) -> str:
        return f"iv:vec:{self._name}:{fp}:"

    def log(self, fp: str, bucket: int) -> bytes:
        return f"iv:log:{self._name}:{fp}:{{{self._name}.b{bucket:02}}}".encode()

    def gone(self, fp: str, bucket: int) -> bytes:
        return f"iv:gone:{self._name}:{fp}:{{{self._name}.b{bucket:02}}}".encode()

    def every_log(self, fp: str) -> tuple[str, str]:
        return f"iv:log:{self._name}:{fp}:*", f"iv:gone:{self._name}:{fp}:*"

    def index(self, fp: str, number: int) -> str:
        return f"iv:idx:{self._name}:{fp}:{number}"

    def count(self, bucket: int) -> bytes:
        return f"iv:count:{{{self._name}.b{bucket:02}}}".encode()


def cache_key(fp: str, digest: bytes) -> str:
    return f"iv:enc:{fp}:{{e{digest[0] % BUCKETS:02}}}:{digest.hex()}"


def encode_ids(ids: Sequence[str]) -> list[bytes]:
    """Raises `ValueError` for an id that cannot be kept."""
    keys = [item_id.encode() for item_id in ids]
    for item_id, key in zip(ids, keys, strict=True):
        if not 1 <= len(key) <= MAX_ID_BYTES:
            raise ValueError(f"an id has 1 to {MAX_ID_BYTES} bytes of UTF-8, {item_id[:40]!r} has {len(key)}")
    return keys


def bucket_of(key: bytes) -> int:
    return crc32(key) % BUCKETS


def by_bucket(keys: Sequence[bytes]) -> dict[int, list[int]]:
    """Bucket -> the positions of its keys."""
    groups: dict[int, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(bucket_of(key), []).append(position)
    return groups


def round_trips(keys: Sequence[bytes], most: int = SCRIPT) -> Iterator[list[tuple[int, list[int]]]]:
    """The scripts that change these keys: the bucket and the positions of each, `most` of them and `CHUNK` a round
    trip. A key that comes twice is changed in that order.

    >>> list(round_trips([b"a", b"b", b"a"], most=1))
    [[(3, [0]), (3, [2]), (57, [1])]]
    """
    trip: list[tuple[int, list[int]]] = []
    room = CHUNK
    for bucket, positions in by_bucket(keys).items():
        for start in range(0, len(positions), most):
            some = positions[start : start + most]
            if len(some) > room:
                yield trip
                trip, room = [], CHUNK
            trip.append((bucket, some))
            room -= len(some)
    if trip:
        yield trip


def same_slot(keys: Iterable[bytes]) -> Iterable[list[bytes]]:
    groups: dict[bytes, list[bytes]] = {}
    for key in keys:
        groups.setdefault(key[: key.index(b"}")], []).append(key)
    return groups.values()


def chunks(count: int) -> Iterable[range]:
    return (range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))
