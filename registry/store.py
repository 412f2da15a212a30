"""The object store: named immutable byte strings, written as streams.

`ObjectStore` is one of the two seams of Ekiben. `DirectoryStore` keeps objects as files under one folder; an S3
implementation has the same few methods. Keys are relative paths with forward slashes.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from ulid import ULID

from registry.errors import InfrastructureError, UserError

T = TypeVar("T")

_UNFINISHED = ".unfinished"  # folder of streams that are not committed yet


@dataclass(frozen=True)
class ObjectInfo:
    """A stored object: its key, its size in bytes and when it was written (seconds since 1970)."""

    key: str
    size: int
    modified: float


class ObjectMissing(UserError):
    """The key names no object."""

    status = 404

    def __init__(self, key: str) -> None:
        super().__init__("object_missing", f"There is no stored object {key!r}.")


class ObjectExists(UserError):
    """A conditional write found the key taken."""

    status = 409

    def __init__(self, key: str) -> None:
        super().__init__("object_exists", f"The object {key!r} is already stored.")


class Writer(Protocol):
    """A stream into one object. Nothing is visible under the key before `commit`."""

    def write(self, data: bytes | memoryview) -> None: ...

    def commit(self, *, if_absent: bool = False) -> ObjectInfo:
        """Publish the object in one step; with `if_absent`, raise ObjectExists where the key is taken."""
        ...

    def abort(self) -> None:
        """Leave nothing behind. Harmless after `commit`."""
        ...


class ObjectStore(Protocol):
    def writer(self, key: str) -> Writer: ...

    def open(self, key: str) -> BinaryIO:
        """A seekable stream of the object's bytes; only the ranges that are read are fetched."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """All objects whose key starts with the prefix, in order of their keys."""
        ...

    def delete(self, prefix: str) -> None:
        """Delete the object of this key and all below `prefix/`. Deleting what is not there is fine."""
        ...

    def checkout(self, prefix: str, into: Path) -> Path:
        """A local folder that holds the objects below `prefix/`: `into`, or the store's own where it has one.

        Read-only for the caller.
        """
        ...


class DirectoryStore:
    """Objects as files below one folder, on one file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / _UNFINISHED).mkdir(parents=True, exist_ok=True)

    def writer(self, key: str) -> DirectoryWriter:
        return DirectoryWriter(self._path(key), key, self.root / _UNFINISHED / str(ULID()))

    def open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ObjectMissing(key) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # Only the deepest whole folder of the prefix has to be walked.
        top = self.root / prefix.rpartition("/")[0]
        for folder, folders, files in os.walk(top):
            folders.sort()
            with suppress(ValueError):
                folders.remove(_UNFINISHED)
            for name in sorted(files):
                path = Path(folder, name)
                key = path.relative_to(self.root).as_posix()
                if key.startswith(prefix):
                    with suppress(FileNotFoundError):
                        stat = path.stat()
                        yield ObjectInfo(key, stat.st_size, stat.st_mtime)

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        if path.is_dir():
            # The manifest goes first: what is left of a deletion that was cut short is an unfinished upload.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        # Folders that are empty now go too, but not the top ones: another upload may be about to use them.
        for folder in path.parents:
            if folder.parent in (self.root, self.root.parent):
                break
            try:
                folder.rmdir()
            except OSError:
                break

    def checkout(self, prefix: str, into: Path) -> Path:
        return self._path(prefix)

    def sweep_unfinished(self) -> None:
        """Delete streams that no process writes any more; called before any writer exists."""
        for path in (self.root / _UNFINISHED).iterdir():
            path.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if not key or key.startswith("/") or "\0" in key or any(part in ("", ".", "..", _UNFINISHED) for part in parts):
            raise ValueError(f"not an object key: {key!r}")
        return self.root.joinpath(*parts)


class DirectoryWriter:
    def __init__(self, path: Path, key: str, temporary: Path) -> None:
        self._path, self._key, self._temporary = path, key, temporary
        self._file = _translated(key, lambda: open(temporary, "xb", buffering=0))  # noqa: SIM115 - closed by commit/abort

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = _translated(self._key, lambda view=view: self._file.write(view))  # type: ignore[misc]
            view = view[written:]

    def commit(self, *, if_absent: bool = False) -> ObjectInfo:
        try:
            _translated(self._key, lambda: os.fsync(self._file.fileno()))
            self._file.close()
            _translated(self._key, lambda: self._path.parent.mkdir(parents=True, exist_ok=True))
            if if_absent:
                try:
                    _translated(self._key, lambda: os.link(self._temporary, self._path))
                except FileExistsError:
                    raise ObjectExists(self._key) from None
            else:
                _translated(self._key, lambda: os.replace(self._temporary, self._path))
        finally:
            self.abort()
        stat = self._path.stat()
        return ObjectInfo(self._key, stat.st_size, stat.st_mtime)

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def _translated(key: str, action: Callable[[], T]) -> T:
    try:
        return action()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise InfrastructureError(
                "disk_full",
                f"The object store has no room left for {key!r}.",
                hint="Free some space or point EKIBEN_HOME at a larger disk, then send the upload again.",
                status=507,
            ) from error
        raise
