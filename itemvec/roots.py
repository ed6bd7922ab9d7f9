"""Where a registry keeps its files: a folder, or any fsspec URL (s3://, gs://, memory://, ...).

A folder has renames and locks; an object store has neither, but it shows a file whole or not at all. So a folder gets a
version by one rename, and a store by writing the manifest last; a version without a manifest is no version for either.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

from itemvec.errors import ConfigError, RegistryError
from itemvec.version import MANIFEST

EDITS = 20
"""Tries to change a file that others change as well."""

_NUMBER = re.compile(r"(?:\.claim-)?(\d+)")


class Root(ABC):
    """`names` and `versions` list what is published; the rest reads and writes one thing each."""

    @abstractmethod
    def names(self) -> list[str]: ...

    @abstractmethod
    def versions(self, name: str) -> list[int] | None:
        """None where there is no such model."""

    @abstractmethod
    def claim(self, name: str) -> int:
        """The next version number, ours alone: made by creating a file that only one process can create."""

    @abstractmethod
    def draft(self, name: str) -> Path:
        """A new local folder for a version in the making."""

    @abstractmethod
    def publish(self, draft: Path, name: str, version: int) -> None: ...

    @abstractmethod
    def fetch(self, name: str, version: int) -> Path:
        """The version's files in a local folder; the caller verifies them."""

    @abstractmethod
    def read(self, name: str, file: str) -> bytes | None: ...

    @abstractmethod
    def replace(self, name: str, file: str, content: bytes) -> None:
        """In one step: a reader sees the old content or the new one."""

    @abstractmethod
    def edit(self, name: str, file: str, change: Callable[[bytes | None], bytes | None]) -> None:
        """Replaces a file by what `change` makes of its content, None for leave it; no other edit comes between reading
        and writing. Where one did `change` is asked again."""

    @abstractmethod
    def create(self, name: str, file: str, content: bytes) -> bool:
        """Whether this process was the one that made the file."""

    @abstractmethod
    def files(self, name: str, folder: str) -> list[str]:
        """Names of the files in a folder of the model; none where there is no such folder."""

    @abstractmethod
    def delete(self, name: str, file: str) -> None:
        """One that is gone already is no error."""

    @abstractmethod
    def remove(self, name: str, version: int) -> None:
        """A version, in such an order that a reader finds it whole or not at all."""

    @abstractmethod
    def lock(self, name: str) -> contextlib.AbstractContextManager[Any]: ...


def open_root(url: str | Path) -> Root:
    return RemoteRoot(str(url)) if "://" in str(url) else FolderRoot(Path(url))


class FolderRoot(Root):
    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir() if (p / "versions").is_dir()) if self.root.is_dir() else []

    def versions(self, name: str) -> list[int] | None:
        folder = self.root / name / "versions"
        if not folder.is_dir():
            return None
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file())

    def claim(self, name: str) -> int:
        folder = self.root / name / "versions"
        folder.mkdir(parents=True, exist_ok=True)
        version = _next(p.name for p in folder.iterdir())
        while True:
            try:
                (folder / f".claim-{version}").touch(exist_ok=False)
            except FileExistsError:
                version += 1
            else:
                return version

    def draft(self, name: str) -> Path:
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=self.root / name / "versions"))
        draft.chmod(0o755)
        return draft

    def publish(self, draft: Path, name: str, version: int) -> None:
        draft.rename(self.root / name / "versions" / str(version))

    def fetch(self, name: str, version: int) -> Path:
        return self.root / name / "versions" / str(version)

    def read(self, name: str, file: str) -> bytes | None:
        try:
            return (self.root / name / file).read_bytes()
        except FileNotFoundError:
            return None

    def replace(self, name: str, file: str, content: bytes) -> None:
        path = self.root / name / file
        self._written(path, content).replace(path)

    def edit(self, name: str, file: str, change: Callable[[bytes | None], bytes | None]) -> None:
        with self.lock(name):
            if (content := change(self.read(name, file))) is not None:
                self.replace(name, file, content)

    def create(self, name: str, file: str, content: bytes) -> bool:
        path = self.root / name / file
        new = self._written(path, content)
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        finally:
            new.unlink()
        return True

    def files(self, name: str, folder: str) -> list[str]:
        path = self.root / name / folder
        return sorted(p.name for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []

    def delete(self, name: str, file: str) -> None:
        (self.root / name / file).unlink(missing_ok=True)

    def remove(self, name: str, version: int) -> None:
        folder = self.root / name / "versions"
        gone = folder / f".removed-{version}"
        (folder / str(version)).rename(gone)
        shutil.rmtree(gone)

    def _written(self, path: Path, content: bytes) -> Path:
        """A file beside `path` that can be renamed to it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as new:
            new.write(content)
            new.flush()
            os.fsync(new.fileno())
        Path(new.name).chmod(0o644)
        return Path(new.name)

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        with (self.root / name / ".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class RemoteRoot(Root):
    """An object store. It has no locks; on S3 a conditional write takes their place (`edit`). On others the later of
    two promotions at one instant stands."""

    def __init__(self, url: str) -> None:
        try:
            storage, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"cannot use the registry {url}: {error}") from None
        self.fs: Any = _Storage(storage, url)
        self.root = PurePosixPath(path)
        self.conditional = url.split(":", 1)[0] in {"s3", "s3a"}
        self.bucket = self.root.parts[0] if BUCKETED.intersection(url.split(":", 1)[:1]) else None
        self.cache = Path.home() / ".cache" / "itemvec" / hashlib.sha256(url.encode()).hexdigest()[:16]

    def names(self) -> list[str]:
        return sorted(name for name in self._list(self.root) if self.versions(name))

    def versions(self, name: str) -> list[int] | None:
        folder = self.root / name / "versions"
        listed = self._list(folder)
        if not listed:
            return None
        return sorted(int(n) for n in listed if n.isdigit() and self.fs.exists(str(folder / n / MANIFEST)))

    def claim(self, name: str) -> int:
        folder = self.root / name / "versions"
        version = _next(self._list(folder))
        self._make(folder)
        while True:
            try:
                with self.fs.open(str(folder / f".claim-{version}"), "xb") as file:
                    file.write(b"claimed")
            except FileExistsError:
                version += 1
            else:
                return version

    def draft(self, name: str) -> Path:
        return Path(tempfile.mkdtemp(prefix="itemvec-draft-"))

    def publish(self, draft: Path, name: str, version: int) -> None:
        files = [p for p in sorted(draft.rglob("*")) if p.is_file() and p != draft / MANIFEST]
        for path in (*files, draft / MANIFEST):
            target = self.root / name / "versions" / str(version) / path.relative_to(draft).as_posix()
            self._make(target.parent)
            self.fs.put_file(str(path), str(target))
        shutil.rmtree(draft)

    def fetch(self, name: str, version: int) -> Path:
        """Into a cache folder: a file is read again only if its size or sha256 is not what the manifest says."""
        folder, source = self.cache / name / str(version), self.root / name / "versions" / str(version)
        manifest = self.fs.cat_file(str(source / MANIFEST))
        for file, entry in json.loads(manifest)["files"].items():
            if ".." in PurePosixPath(file).parts or PurePosixPath(file).is_absolute():
                raise RegistryError(f"{source}: its manifest names the file {file!r}, outside of its folder")
            local = folder / file
            if not (local.is_file() and _sha256(local) == entry["sha256"]):
                local.parent.mkdir(parents=True, exist_ok=True)
                # Another process may fetch the same file now: each writes its own and renames.
                part = local.with_name(f".{local.name}-{os.getpid()}")
                self.fs.get_file(str(source / file), str(part))
                part.replace(local)
        (folder / MANIFEST).write_bytes(manifest)
        return folder

    def read(self, name: str, file: str) -> bytes | None:
        try:
            content: bytes = self.fs.cat_file(str(self.root / name / file))
        except FileNotFoundError:
            return None
        return content

    def replace(self, name: str, file: str, content: bytes) -> None:
        path = self.root / name / file
        self._make(path.parent)
        self.fs.pipe_file(str(path), content)

    def edit(self, name: str, file: str, change: Callable[[bytes | None], bytes | None]) -> None:
        path = self.root / name / file
        self._make(path.parent)
        for _ in range(EDITS):
            mark = self._mark(path)  # before the content: what is newer than its mark is not written
            if (content := change(self.read(name, file))) is None:
                return
            with contextlib.suppress(FileExistsError):
                self.fs.pipe_file(str(path), content, **mark)
                return
        raise RegistryError(f"{self.fs}/{name}/{file} is changed by others all the time: try again")

    def _mark(self, path: PurePosixPath) -> dict[str, Any]:
        """The condition of a write that has to fail where the file is not as it is now. S3 knows one (its ETag); of the
        others fsspec can only say that there must be no file yet."""
        self.fs.invalidate_cache(str(path.parent))
        try:
            info = self.fs.info(str(path))
        except FileNotFoundError:
            return {"mode": "create"}
        return {"IfMatch": info["ETag"]} if self.conditional else {}

    def create(self, name: str, file: str, content: bytes) -> bool:
        path = self.root / name / file
        self._make(path.parent)
        try:
            with self.fs.open(str(path), "xb") as new:
                new.write(content)
        except FileExistsError:
            return False
        return True

    def files(self, name: str, folder: str) -> list[str]:
        return sorted(self._list(self.root / name / folder))

    def delete(self, name: str, file: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(str(self.root / name / file))

    def remove(self, name: str, version: int) -> None:
        folder = self.root / name / "versions" / str(version)
        self.fs.rm_file(str(folder / MANIFEST))
        self.fs.rm(str(folder), recursive=True)
        shutil.rmtree(self.cache / name / str(version), ignore_errors=True)

    def lock(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _list(self, folder: PurePosixPath) -> list[str]:
        self.fs.invalidate_cache(str(folder))
        try:
            return [PurePosixPath(path.rstrip("/")).name for path in self.fs.ls(str(folder), detail=False)]
        except FileNotFoundError:
            if self.bucket is not None and not self.fs.exists(self.bucket):
                raise RegistryError(f"there is no bucket {self.bucket!r} for the registry {self.fs}") from None
            return []

    def _make(self, folder: PurePosixPath) -> None:
        """Buckets have no folders, and s3fs would make the bucket itself where its name is misspelt."""
        if self.bucket is None:
            self.fs.makedirs(str(folder), exist_ok=True)


BUCKETED = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az"})


OVERTAKEN = frozenset({"PreconditionFailed", "ConditionalRequestConflict"})
"""What S3 says of a conditional write where another was faster."""


class _Storage:
    """A file system of fsspec that says of which registry its errors are. Each has its own for what is not a missing
    file: no credentials, no access, no answer."""

    def __init__(self, fs: fsspec.AbstractFileSystem, url: str) -> None:
        self._fs, self._url = fs, url

    def __str__(self) -> str:
        return self._url

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._fs, name)

        def told(*args: Any, **kwargs: Any) -> Any:
            try:
                return call(*args, **kwargs)
            except (FileNotFoundError, FileExistsError):
                raise
            except Exception as error:
                answer = getattr(error.__cause__, "response", None) or {}
                if answer.get("Error", {}).get("Code") in OVERTAKEN:
                    raise FileExistsError(str(error)) from error
                raise RegistryError(f"cannot use the registry {self._url}: {' '.join(str(error).split())}") from error

        return told


def _next(names: Iterator[str] | list[str]) -> int:
    taken = [int(match[1]) for name in names if (match := _NUMBER.fullmatch(name))]
    return max(taken, default=0) + 1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
