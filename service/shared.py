"""What the encoder made of items, in Redis for all replicas: the second level of `service/cache.py`."""

from collections.abc import Mapping, Sequence

from service.link import Link


class SharedCache:
    def __init__(self, link: Link) -> None:
        self._link = link

    async def read(self, keys: Sequence[str]) -> list[bytes | None]:
        """Parallel to `keys`, which have the hash tags of `keys.cache_key`."""
        values: list[bytes | None] = [None] * len(keys)
        groups: dict[str, list[int]] = {}
        clustered = await self._link.is_cluster()
        for i, key in enumerate(keys):
            groups.setdefault(key[: key.index("}")] if clustered else "", []).append(i)
        replies = await self._link.pipeline([("MGET", *(keys[i] for i in some)) for some in groups.values()])
        for some, found in zip(groups.values(), replies, strict=True):
            for i, value in zip(some, found, strict=True):
                values[i] = value
        return values

    async def write(self, entries: Mapping[str, bytes], seconds: float) -> None:
        await self._link.pipeline([("SET", key, value, "PX", int(seconds * 1000)) for key, value in entries.items()])
