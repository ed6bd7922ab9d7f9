"""Registry: where model versions are published, and which of them is the champion.

    ROOT/movies/versions/1/ 2/ 3/     model versions, each whole or absent, never edited
    ROOT/movies/aliases.json          {"champion": 3, "previous": 2}

A root is a folder. Publishing writes under a temporary name and renames; the number is claimed first, so that two
publishers never get one. Aliases are one small file replaced in one step, under a lock.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from itemvec.errors import ModelNotFound, RegistryError, VersionNotFound
from itemvec.version import Manifest, ModelVersion, read_manifest

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)
_REF = re.compile(r"(?P<name>[a-z0-9][a-z0-9_.-]{0,63})(?:@(?P<which>[a-z0-9]+))?")


class Registry:
    """Model versions under one root folder.

    A reference is `movies` (its champion), `movies@7`, or `movies@challenger`.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if (p / "versions").is_dir())

    def versions(self, name: str) -> list[int]:
        """Published versions, oldest first. Raises ModelNotFound."""
        folder = self.root / name / "versions"
        if not folder.is_dir():
            raise ModelNotFound(name, self.names())
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / "manifest.json").is_file())

    def aliases(self, name: str) -> dict[str, int]:
        try:
            content: dict[str, int] = json.loads(self._aliases_file(name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RegistryError(f"cannot read {self._aliases_file(name)}: {error}") from None
        return content

    def resolve(self, ref: str) -> tuple[str, int]:
        """(name, version). Raises ModelNotFound, VersionNotFound."""
        match = _REF.fullmatch(ref)
        if match is None:
            raise ModelNotFound(ref, self.names())
        name, which = match["name"], match["which"] or CHAMPION
        versions = self.versions(name)
        version = int(which) if which.isdigit() else self.aliases(name).get(which)
        if version is None or version not in versions:
            raise VersionNotFound(name, which, versions)
        return name, version

    def path(self, name: str, version: int) -> Path:
        return self.root / name / "versions" / str(version)

    def manifest(self, name: str, version: int) -> Manifest:
        if version not in (versions := self.versions(name)):
            raise VersionNotFound(name, version, versions)
        return read_manifest(self.path(name, version))

    def load(self, ref: str, device: str = "cpu") -> ModelVersion:
        """Raises ModelNotFound, VersionNotFound, VersionCorrupt."""
        return ModelVersion.load(self.path(*self.resolve(ref)), device)

    def publish(self, name: str, write: Callable[[Path, int], Any], alias: str | None = None) -> int:
        """Publishes what `write(folder, version)` leaves in the folder it is given, and returns the version.

        If `write` fails nothing is published, and its number is not used again.
        """
        folder = self.root / name / "versions"
        folder.mkdir(parents=True, exist_ok=True)
        version = self._claim(folder)
        draft = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=folder))
        try:
            write(draft, version)
            read_manifest(draft)
            draft.chmod(0o755)
            draft.rename(folder / str(version))
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        if alias is not None:
            self.set_alias(name, alias, version)
        return version

    @staticmethod
    def _claim(folder: Path) -> int:
        """The next number, ours alone: a file that only one process can create."""
        taken = [
            int(p.name.removeprefix(".claim-")) for p in folder.iterdir() if re.fullmatch(r"(\.claim-)?\d+", p.name)
        ]
        version = max(taken, default=0) + 1
        while True:
            try:
                os.close(os.open(folder / f".claim-{version}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                version += 1
            else:
                return version

    def set_alias(self, name: str, alias: str, version: int) -> None:
        with self._edited_aliases(name, version) as aliases:
            aliases[_known(alias)] = version

    def promote(self, name: str, version: int) -> None:
        """`version` becomes the champion and the champion becomes `previous`, in one step."""
        with self._edited_aliases(name, version) as aliases:
            champion = aliases.get(CHAMPION)
            if champion == version:
                return
            if champion is not None:
                aliases[PREVIOUS] = champion
            aliases[CHAMPION] = version
            if aliases.get(CHALLENGER) == version:
                del aliases[CHALLENGER]

    def rollback(self, name: str) -> int:
        """The previous champion becomes the champion again. Raises RegistryError if there is none."""
        previous = self.aliases(name).get(PREVIOUS)
        if previous is None:
            raise RegistryError(f"model {name!r} has no previous champion to roll back to")
        self.promote(name, previous)
        return previous

    @contextlib.contextmanager
    def _edited_aliases(self, name: str, version: int) -> Iterator[dict[str, int]]:
        if version not in (versions := self.versions(name)):
            raise VersionNotFound(name, version, versions)
        path = self._aliases_file(name)
        with (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            aliases = self.aliases(name)
            before = dict(aliases)
            yield aliases
            if aliases != before:
                with tempfile.NamedTemporaryFile(
                    "w", dir=path.parent, prefix=".aliases-", delete=False, encoding="utf-8"
                ) as new:
                    json.dump(aliases, new, indent=1)
                    new.flush()
                    os.fsync(new.fileno())
                Path(new.name).chmod(0o644)
                Path(new.name).replace(path)

    def _aliases_file(self, name: str) -> Path:
        return self.root / name / "aliases.json"


def _known(alias: str) -> str:
    if alias not in ALIASES:
        raise RegistryError(f"no alias {alias!r}; there is {', '.join(ALIASES)}")
    return alias
