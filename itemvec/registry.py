"""Registry: where model versions are published, and which of them is the champion.

    ROOT/movies/versions/1/ 2/ 3/     model versions, each whole or absent, never edited
    ROOT/movies/aliases.json          {"champion": 3, "previous": 2}
    ROOT/movies/runs/                 what each retraining did (`itemvec/runs.py`)

A root is a folder or an fsspec URL (`itemvec/roots.py`).
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from itemvec.errors import ModelNotFound, RegistryError, VersionCorrupt, VersionNotFound
from itemvec.roots import open_root
from itemvec.version import MANIFEST, Manifest, ModelVersion, parse_manifest, read_manifest

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)
_ALIASES_FILE = "aliases.json"
_Aliases = TypeAdapter(dict[str, int])
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_NUMBER = re.compile(r"[0-9]{1,9}")


class Registry:
    """Model versions under one root.

    A reference is `movies` (its champion), `movies@7`, or `movies@challenger`.
    """

    def __init__(self, root: str | Path) -> None:
        self.url = str(root)
        self.root = open_root(root)

    def names(self) -> list[str]:
        return self.root.names()

    def versions(self, name: str) -> list[int]:
        """Published versions, oldest first. Raises ModelNotFound."""
        versions = self.root.versions(name) if _NAME.fullmatch(name) else None
        if versions is None:
            raise ModelNotFound(name, self.names())
        return versions

    def aliases(self, name: str) -> dict[str, int]:
        return self._parsed(name, self.root.read(name, _ALIASES_FILE))

    def resolve(self, ref: str) -> tuple[str, int]:
        """(name, version). Raises ModelNotFound, VersionNotFound."""
        name, at, which = ref.partition("@")
        which = which if at else CHAMPION
        versions = self.versions(name)
        version = int(which) if _NUMBER.fullmatch(which) else self.aliases(name).get(which)
        if version is None or version not in versions:
            raise VersionNotFound(name, which[:40], versions)
        return name, version

    def path(self, name: str, version: int) -> Path:
        """A local folder with the version's files."""
        self._require(name, version)
        try:
            return self.root.fetch(name, version)
        except FileNotFoundError:  # it was removed meanwhile
            raise VersionCorrupt(f"{name}@{version}", "a file of it is gone") from None

    def manifest(self, name: str, version: int) -> Manifest:
        self._require(name, version)
        content = self.root.read(name, f"versions/{version}/{MANIFEST}")
        return parse_manifest(content or b"", f"{name}@{version}")

    def load(self, ref: str, device: str = "cpu") -> ModelVersion:
        """Raises ModelNotFound, VersionNotFound, VersionCorrupt."""
        name, version = self.resolve(ref)
        return ModelVersion.load(self.path(name, version), device, f"{name}@{version}")

    def publish(self, name: str, write: Callable[[Path, int], Any], alias: str | None = None) -> int:
        """Publishes what `write(folder, version)` leaves in the folder it is given, and returns the version.

        If `write` fails nothing is published, and its number is not used again.
        """
        version = self.root.claim(name)
        draft = self.root.draft(name)
        try:
            write(draft, version)
            read_manifest(draft, f"{name}@{version}")
            self.root.publish(draft, name, version)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        if alias is not None:
            self.set_alias(name, alias, version)
        return version

    def set_alias(self, name: str, alias: str, version: int) -> None:
        self._require(name, version)
        self._edit_aliases(name, lambda aliases: {**aliases, _known(alias): version})

    def promote(self, name: str, version: int, after: int | None = None) -> None:
        """`version` becomes the champion and the champion becomes `previous`, in one step. Raises RegistryError where
        `after` is given and is not the champion at that moment."""
        self._require(name, version)

        def promoted(aliases: dict[str, int]) -> dict[str, int]:
            champion = aliases.get(CHAMPION)
            if after is not None and champion not in (after, version):
                raise RegistryError(f"{name}@{champion} became the champion meanwhile, in place of {name}@{after}")
            return _promoted(aliases, version)

        self._edit_aliases(name, promoted)

    def rollback(self, name: str) -> int:
        """The previous champion becomes the champion again. Raises RegistryError if there is none."""
        self.versions(name)

        def rolled_back(aliases: dict[str, int]) -> dict[str, int]:
            if PREVIOUS not in aliases:
                raise RegistryError(f"model {name!r} has no previous champion to roll back to")
            self._require(name, aliases[PREVIOUS])
            return _promoted(aliases, aliases[PREVIOUS])

        return self._edit_aliases(name, rolled_back)[CHAMPION]

    def remove(self, name: str, version: int) -> None:
        """Removes a version for good; its number is not used again. Raises RegistryError if an alias names it."""
        self._require(name, version)
        with self.root.lock(name):
            held = [alias for alias, named in self.aliases(name).items() if named == version]
            if held:
                raise RegistryError(f"{name}@{version} is the {held[0]}: it cannot be removed")
            self.root.remove(name, version)

    def _require(self, name: str, version: int) -> None:
        if version not in (versions := self.versions(name)):
            raise VersionNotFound(name, version, versions)

    def _edit_aliases(self, name: str, change: Callable[[dict[str, int]], dict[str, int]]) -> dict[str, int]:
        """What `change` made of the aliases, which it may be asked again where another process was faster."""
        made: dict[str, int] = {}

        def edited(content: bytes | None) -> bytes | None:
            before = self._parsed(name, content)
            made.clear()
            made.update(change(before))
            return None if made == before else json.dumps(made, indent=1).encode()

        self.root.edit(name, _ALIASES_FILE, edited)
        return made

    def _parsed(self, name: str, content: bytes | None) -> dict[str, int]:
        try:
            return _Aliases.validate_json(content) if content is not None else {}
        except ValueError:
            raise RegistryError(f"{self.url}/{name}/{_ALIASES_FILE} is not alias names with versions") from None


def _promoted(aliases: dict[str, int], version: int) -> dict[str, int]:
    champion = aliases.get(CHAMPION)
    if champion == version:
        return aliases
    others = {alias: v for alias, v in aliases.items() if (alias, v) != (CHALLENGER, version)}
    return others | ({} if champion is None else {PREVIOUS: champion}) | {CHAMPION: version}


def _known(alias: str) -> str:
    if alias not in ALIASES:
        raise RegistryError(f"no alias {alias!r}; there is {', '.join(ALIASES)}")
    return alias
