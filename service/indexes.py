"""Indexes: over the vectors of each version, as Redis knows them; made, changed, watched and dropped.

`service/index.py` says what forms there are, and what the query engine is told of each.
"""

import asyncio
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from redis import exceptions as errors

from itemvec.errors import ConfigError, ItemvecError
from service import scripts
from service.attributes import Kind
from service.exact import ExactIndex
from service.index import (
    Index,
    Mode,
    NoIndex,
    WantedMode,
    check_fingerprint,
    choose_mode,
    create_command,
    says_no_index,
)
from service.keys import BUCKETS, Space, bucket_of, by_bucket, chunks, same_slot
from service.link import Command, Link


@dataclass(frozen=True, slots=True)
class IndexStatus:
    mode: Mode
    dim: int
    docs: int
    percent_indexed: float
    """0 to 1. Below 1 a search answers with partial rows and no error: do not switch to it yet."""

    failures: int
    fields: dict[str, Kind] = field(default_factory=dict)
    """What queries can filter by."""


class Indexes:
    def __init__(self, hot: Link, bulk: Link, wanted: WantedMode) -> None:
        """`wanted`: the mode of new indexes. `bulk` builds them."""
        self._hot, self._bulk, self._wanted = hot, bulk, wanted
        self._known: dict[tuple[str, str], Index] = {}
        self._exact: dict[tuple[str, str], ExactIndex] = {}

    def close(self) -> None:
        for index in self._exact.values():
            index.close()

    async def ensure(
        self,
        name: str,
        fp: str,
        dim: int,
        items_hint: int = 0,
        mode: WantedMode | None = None,
        fields: Mapping[str, Kind] | None = None,
    ) -> bool:
        """Makes the index of one version if it is not there; True if this call made it.

        Call it before anything of that version is loaded: an index made over existing vectors answers partly
        until it has read them all. `items_hint`: how many items are expected, for "auto". `fields`: what queries can
        filter by. Raises `ConfigError` where Redis would evict items or cannot do the mode, and when the index exists
        with another number of dimensions. One that exists keeps its mode and fields: `reindex` changes them.
        """
        check_fingerprint(fp)
        space = Space(name)
        server = await self._bulk.server_info()
        if (record := await self._bulk.command("HGET", space.indexes, fp)) is not None:
            found = Index.from_bytes(record)
            if found.dim != dim:
                raise ConfigError(
                    f"index {space.index(fp, found.number)} in Redis has {found.dim} dimensions, this version {dim}: "
                    "drop that version"
                )
            if found.mode == "exact" or (server.query_engine is not None and await self._exists(name, fp, found)):
                self._known[name, fp] = found
                return False
            await self._bulk.command("HDEL", space.indexes, fp)
        chosen = choose_mode(mode or self._wanted, items_hint, server, self._bulk.address)
        index = Index(chosen, dim, dict(fields or {}), logged=chosen == "exact")
        await self._bulk.command("SREM", space.ready, fp)
        won = bool(await self._bulk.command("HSETNX", space.indexes, fp, index.to_bytes()))
        if won and index.mode == "exact":
            await self._bulk.command("HSET", space.ticks, f"{fp}:made", secrets.token_hex(8))
        elif index.mode != "exact":
            won = await self._create(name, fp, index)
        self._known.pop((name, fp), None)
        return won

    async def reindex(
        self, name: str, fp: str, mode: WantedMode | None = None, fields: Mapping[str, Kind] | None = None
    ) -> bool:
        """Gives a filled index another mode or more fields, while the old one is searched; True if it did.

        It takes as long as the query engine needs to read all vectors. With `mode` "auto" or None it does something
        where the number of items has crossed the bound, or the server can do less than before.
        """
        space = Space(name)
        old, new = await self._reshaped(name, fp, mode, fields)
        if new is None:
            return False
        if new.mode == "exact":
            if old.mode != "exact":
                await self._save(name, fp, replace(old, logged=True))  # from here on writes are noted
                await self._log_all(name, fp)
                # Last: a replica that still takes this index for the exact one of long ago would read half of the log.
                await self._bulk.command("HSET", space.ticks, f"{fp}:made", secrets.token_hex(8))
        else:
            await self._drop(name, fp, new)  # of a try that was cut short
            await self._create(name, fp, new)
            await self._wait_until_filled(name, fp, new)
        await self._save(name, fp, new)
        if old.mode == "exact" != new.mode:
            await self._bulk.command("HDEL", space.ticks, f"{fp}:made")  # so a replica that has not heard of it asks
            await self._unlink(*space.every_log(fp))
        elif old.mode != "exact":
            await self._drop(name, fp, old)
        return True

    async def reindex_wanted(self, name: str, fp: str) -> bool:
        """Would `reindex` do something?"""
        return (await self._reshaped(name, fp, None, None))[1] is not None

    async def status(self, name: str, fp: str) -> IndexStatus:
        """Raises `StoreUnavailable` if there is no such index."""
        space, index = Space(name), await self._read(self._bulk, name, fp)
        if index.mode == "exact":
            logs = [("ZCARD", space.log(fp, bucket)) for bucket in range(BUCKETS)]
            return IndexStatus("exact", index.dim, sum(await self._bulk.pipeline(logs)), 1.0, 0, index.fields)
        info = await self._info(name, fp, index)
        return IndexStatus(
            mode=index.mode,
            dim=index.dim,
            docs=int(info[b"num_docs"]),
            percent_indexed=float(info[b"percent_indexed"]),
            failures=int(info[b"hash_indexing_failures"]),
            fields=index.fields,
        )

    async def drop(self, name: str, fp: str) -> None:
        """Removes the index, then the vectors of one version; unmark it first. May be done twice."""
        space = Space(name)
        self.forget(name, fp)
        if (record := await self._bulk.command("HGET", space.indexes, fp)) is not None:
            index = Index.from_bytes(record)
            await self._drop(name, fp, index)
            await self._drop(name, fp, replace(index, number=index.number + 1))  # a reindex was cut short
        await self._unlink(f"{space.vectors(fp)}*", *space.every_log(fp))
        # Last: as long as it has a record, a drop that was cut short is done again.
        await self._bulk.pipeline([("HDEL", space.ticks, fp, f"{fp}:made"), ("HDEL", space.indexes, fp)])

    async def remove_late(self, name: str, fp: str, keys: Sequence[bytes]) -> None:
        """Removes the vectors that a write gave these ids just after the index had been dropped."""
        space = Space(name)
        self.forget(name, fp)
        late = [space.vector_prefix(fp, bucket_of(key)) + key for key in keys]
        for chunk in chunks(len(late)):
            await self._bulk.pipeline([("UNLINK", late[i]) for i in chunk])
        await self._unlink(*space.every_log(fp))

    async def get(self, name: str, fp: str) -> Index:
        """How it is searched, as far as this replica has heard; raises `NoIndex`."""
        return self._known.get((name, fp)) or await self._read(self._hot, name, fp)

    async def fingerprints(self, name: str) -> set[str]:
        """Of all versions that have an index, live or not."""
        return {fp.decode() for fp in await self._bulk.command("HKEYS", Space(name).indexes)}

    async def covers(self, name: str, fp: str, fields: Mapping[str, Kind]) -> bool:
        """Can queries filter by all of the fields?"""
        try:
            return fields.items() <= (await self._read(self._hot, name, fp)).fields.items()
        except NoIndex:
            return False

    def is_known(self, name: str, fp: str) -> bool:
        """Has this replica heard of it?"""
        return (name, fp) in self._known

    def exact(self, name: str, fp: str, index: Index) -> ExactIndex:
        """Its vectors in the memory of this replica."""
        if (name, fp) not in self._exact:
            self._exact[name, fp] = ExactIndex(name, fp, index.dim, self._hot, self._bulk)
        return self._exact[name, fp]

    def forget(self, name: str, fp: str) -> None:
        """It may have been made again in another form: the next call reads it once more."""
        self._known.pop((name, fp), None)
        self._exact.pop((name, fp), None)

    def keep(self, name: str, live: Collection[str]) -> None:
        """Frees the memory of the model's other indexes. Whichever replica dropped them, no search comes here that
        would notice."""
        for model, fp in [*self._exact]:
            if model == name and fp not in live:
                self.forget(model, fp)

    async def remove_if_orphan(self, name: str, fp: str, keys: Sequence[bytes]) -> None:
        """Removes the vectors of ids that have no item."""
        space, commands = Space(name), list[Command]()
        for bucket, positions in by_bucket(keys).items():
            prefixes = (space.item_prefix(bucket), space.vector_prefix(fp, bucket))
            names = [space.log(fp, bucket), space.gone(fp, bucket)]
            names += [prefix + keys[i] for i in positions for prefix in prefixes]
            commands.append(("EVAL", scripts.REMOVE_ORPHANS, len(names), *names, len(prefixes[0]) + 1))
        await self._bulk.pipeline(commands, [("EVAL", scripts.TICK, 1, space.ticks, fp)])

    async def remove_orphans(self, name: str, fp: str) -> None:
        """Removes vectors without an item: a write that was under way when its version was dropped left them, or an
        item was deleted while the version was not live. To be called when it is: from then on none are left."""
        start = len(Space(name).vector_prefix(fp, 0))
        async for keys in self._bulk.scan(Space(name).vectors(fp) + "*"):
            await self.remove_if_orphan(name, fp, [key[start:] for key in keys])

    # Helpers

    async def _read(self, link: Link, name: str, fp: str) -> Index:
        record = await link.command("HGET", Space(name).indexes, fp)
        if record is None:
            self.forget(name, fp)
            raise NoIndex(name, fp)
        index = self._known[name, fp] = Index.from_bytes(record)
        return index

    async def _save(self, name: str, fp: str, index: Index) -> None:
        await self._bulk.command("HSET", Space(name).indexes, fp, index.to_bytes())
        self._known[name, fp] = index

    async def _reshaped(
        self, name: str, fp: str, mode: WantedMode | None, fields: Mapping[str, Kind] | None
    ) -> tuple[Index, Index | None]:
        """The index as it is, and as it should be if that is otherwise."""
        old, docs = await self._read(self._bulk, name, fp), (await self.status(name, fp)).docs
        wanted = choose_mode(mode or self._wanted, docs, await self._bulk.server_info(), self._bulk.address, old.mode)
        wider = {**old.fields, **(fields or {})}
        if (wanted, wider) == (old.mode, old.fields):
            return old, None
        return old, replace(old, mode=wanted, fields=wider, number=old.number + 1, logged=wanted == "exact")

    async def _create(self, name: str, fp: str, index: Index) -> bool:
        try:
            await self._bulk.command(*create_command(Space(name), fp, index))
        except errors.ResponseError as error:
            if "already exists" not in str(error):
                raise
            return False  # another replica was faster
        return True

    async def _exists(self, name: str, fp: str, index: Index) -> bool:
        try:
            await self._info(name, fp, index)
        except NoIndex:
            return False
        return True

    async def _info(self, name: str, fp: str, index: Index) -> dict[bytes, Any]:
        try:
            info: dict[bytes, Any] = await self._bulk.command("FT.INFO", Space(name).index(fp, index.number))
        except errors.ResponseError as error:
            if says_no_index(error):
                raise NoIndex(name, fp) from error
            raise
        return info

    async def _wait_until_filled(self, name: str, fp: str, new: Index) -> None:
        while True:
            # The old one first: what is written in between is in the new one too. Not by the percentage alone: it is
            # 100 until the query engine has begun to read.
            docs = (await self.status(name, fp)).docs
            info = await self._info(name, fp, new)
            if failures := int(info[b"hash_indexing_failures"]):
                await self._drop(name, fp, new)
                raise ItemvecError(f"{failures} vectors of {name} {fp} were refused by its {new.mode} index")
            if float(info[b"percent_indexed"]) >= 1 and int(info[b"num_docs"]) >= docs:
                return
            await asyncio.sleep(0.05)

    async def _drop(self, name: str, fp: str, index: Index) -> None:
        if index.mode == "exact":
            return
        try:  # never DD: it blocks the server 173 ms per 100,000 vectors
            await self._bulk.command("FT.DROPINDEX", Space(name).index(fp, index.number))
        except errors.ResponseError as error:
            if not says_no_index(error):
                raise
        except ConfigError:  # the query engine is gone, and the index with it
            pass

    async def _log_all(self, name: str, fp: str) -> None:
        """Notes every vector, as if it had just been written."""
        space = Space(name)
        start = len(space.vector_prefix(fp, 0))
        async for keys in self._bulk.scan(space.vectors(fp) + "*"):
            ids = [key[start:] for key in keys]
            commands: list[Command] = []
            for bucket, positions in by_bucket(ids).items():
                names = [space.log(fp, bucket), space.gone(fp, bucket), *(keys[i] for i in positions)]
                commands.append(("EVAL", scripts.LOG, len(names), *names, start + 1))
            await self._bulk.pipeline(commands)

    async def _unlink(self, *patterns: str) -> None:
        for pattern in patterns:
            async for keys in self._bulk.scan(pattern):
                await self._bulk.pipeline([("UNLINK", *same) for same in same_slot(keys)])
