"""The object store: named immutable byte strings, written as streams.

`ObjectStore` is one of the two seams of Ekiben. `DirectoryStore` keeps objects as files under one folder;
`registry.s3_store.S3Store` keeps them in a bucket. Keys are relative paths with forward slashes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from ulid import ULID

from registry import parts
from registry.disk import translated
from registry.errors import UserError
from registry.parts import FolderUpload, Part, UploadMissing

UNFINISHED = ".unfinished"  # folder of what is not committed yet; no key may have it
MODELS = "models"  # folder of the versions' folders
MANIFEST = "manifest.json"  # written last: without it a version's folder is an unfinished upload


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
        """A local folder that holds the version below `prefix/`: `into`, or the store's own where it has one.

        Read-only for the caller.
        """
        ...

    def uri(self, prefix: str) -> str:
        """Where the objects below `prefix/` are, for other programs: file:// or s3://."""
        ...

    def begin_parts(self, key: str, upload: str | None = None) -> str:
        """Begin an upload in parts of the object `key`: the upload's id, a new one (`parts.new_id`) unless it is given.
        See `registry.parts`."""
        ...

    def put_part(self, upload: str, number: int, data: bytes | bytearray, sha256: str) -> Part:
        """Keep a part; when this returns it outlives the service. The same part again is fine."""
        ...

    def parts(self, upload: str) -> Sequence[Part]:
        """The parts that are kept, in order; UploadMissing or UploadComplete where there are none to list."""
        ...

    def complete_parts(self, upload: str) -> ObjectInfo:
        """Publish the parts as the object in one step. Fine when that was done before, until `end_parts`."""
        ...

    def end_parts(self, upload: str) -> None:
        """Forget the upload, with its parts if they are not complete. Harmless where there is none."""
        ...

    def sweep(self, versions: Collection[str], *, stale: float, alone: bool) -> None:
        """Delete what was left unfinished: streams, and uploads in parts that stood still for `stale` seconds, and
        folders of models/ that are no version's (`versions`: the locations of all). `alone`: the caller knows that
        nothing is being written at the moment."""
        ...


class Presigning(Protocol):
    """What a store can do besides when it is reached by HTTP: URLs that work without credentials, for a while."""

    def presign_get(self, key: str, seconds: int) -> str:
        """A URL to read the object."""
        ...

    def presign_put(self, key: str, seconds: int) -> str:
        """A URL to write the object, in one request."""
        ...


def check_key(key: str) -> str:
    """The key itself if it stays inside the store; ValueError otherwise."""
    if "\0" in key or any(part in ("", ".", "..", UNFINISHED) for part in key.split("/")):
        raise ValueError(f"not an object key: {key!r}")
    return key


class DirectoryStore:
    """Objects as files below one folder, on one file system."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / UNFINISHED).mkdir(parents=True, exist_ok=True)

    def writer(self, key: str) -> DirectoryWriter:
        return DirectoryWriter(self._path(key), key, self.root / UNFINISHED / str(ULID()))

    def open(self, key: str) -> BinaryIO:
        try:
            return self._path(key).open("rb")
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ObjectMissing(key) from error

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        # Only the deepest whole folder of the prefix has to be walked.
        for path in _files(self.root / prefix.rpartition("/")[0]):
            key = path.relative_to(self.root).as_posix()
            if key.startswith(prefix):
                with suppress(FileNotFoundError):
                    stat = path.stat()
                    yield ObjectInfo(key, stat.st_size, stat.st_mtime)

    def delete(self, prefix: str) -> None:
        path = self._path(prefix)
        if path.is_dir():
            # The manifest goes first: what is left of a deletion that was cut short is an unfinished upload.
            (path / MANIFEST).unlink(missing_ok=True)
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

    def uri(self, prefix: str) -> str:
        return self._path(prefix).absolute().as_uri()

    def begin_parts(self, key: str, upload: str | None = None) -> str:
        self._path(key)
        upload = parts.check_id(upload or parts.new_id())
        FolderUpload.begin(self.root / UNFINISHED / f"{upload}.parts", upload, key)
        return upload

    def put_part(self, upload: str, number: int, data: bytes | bytearray, sha256: str) -> Part:
        parts.check_content(data, sha256)
        return self._upload(upload).put(number, data, sha256)

    def parts(self, upload: str) -> Sequence[Part]:
        return self._upload(upload).parts()

    def complete_parts(self, upload: str) -> ObjectInfo:
        under_way = self._upload(upload)
        path = self._path(under_way.key)
        under_way.complete(path)
        stat = path.stat()
        return ObjectInfo(under_way.key, stat.st_size, stat.st_mtime)

    def end_parts(self, upload: str) -> None:
        with suppress(UploadMissing):
            self._upload(upload).end()

    def sweep(self, versions: Collection[str], *, stale: float, alone: bool) -> None:
        limit = time.time() - stale
        awaited = set()
        for path in (self.root / UNFINISHED).iterdir():
            with suppress(FileNotFoundError, UploadMissing):
                if path.suffix == ".parts":
                    under_way = FolderUpload(path, path.stem)
                    if under_way.touched <= limit:
                        self._give_up(under_way, versions)
                    else:
                        awaited.add(under_way.key)
                elif path.is_dir():  # of an upload in parts that was just beginning
                    if alone or path.stat().st_mtime <= limit:
                        shutil.rmtree(path, ignore_errors=True)
                elif alone or path.stat().st_mtime <= limit:
                    path.unlink(missing_ok=True)
        models = self.root / MODELS
        for folder in models.iterdir() if alone and models.exists() else ():
            location = f"{MODELS}/{folder.name}"
            if location not in versions and not any(key.startswith(f"{location}/") for key in awaited):
                self.delete(location)

    def _give_up(self, under_way: FolderUpload, versions: Collection[str]) -> None:
        """End an upload in parts, with the file that it became if no version has it."""
        location = "/".join(under_way.key.split("/")[:2])
        under_way.end()
        path = self._path(location)
        if location.startswith(f"{MODELS}/") and location not in versions and not (path / MANIFEST).exists():
            self.delete(location)

    def _upload(self, upload: str) -> FolderUpload:
        return FolderUpload(self.root / UNFINISHED / f"{parts.check_id(upload)}.parts", upload)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*check_key(key).split("/"))


def _files(folder: Path) -> Iterator[Path]:
    """All files below the folder, in order of their paths as text: `a.txt` comes before `a/b`."""
    with suppress(FileNotFoundError, NotADirectoryError):
        entries = [(f"{entry.name}/" if entry.is_dir() else entry.name, entry) for entry in os.scandir(folder)]
        for name, entry in sorted(entries, key=lambda pair: pair[0]):
            if not name.endswith("/"):
                yield Path(entry.path)
            elif name != f"{UNFINISHED}/":
                yield from _files(Path(entry.path))


class DirectoryWriter:
    def __init__(self, path: Path, key: str, temporary: Path) -> None:
        self._path, self._key, self._temporary = path, key, temporary
        self._file = translated(key, lambda: open(temporary, "xb", buffering=0))  # noqa: SIM115 - closed by commit/abort

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            written = translated(self._key, lambda view=view: self._file.write(view))  # type: ignore[misc]
            view = view[written:]

    def commit(self, *, if_absent: bool = False) -> ObjectInfo:
        try:
            translated(self._key, lambda: os.fsync(self._file.fileno()))
            self._file.close()
            translated(self._key, lambda: self._path.parent.mkdir(parents=True, exist_ok=True))
            if if_absent:
                try:
                    translated(self._key, lambda: os.link(self._temporary, self._path))
                except FileExistsError:
                    raise ObjectExists(self._key) from None
            else:
                translated(self._key, lambda: os.replace(self._temporary, self._path))
        finally:
            self.abort()
        stat = self._path.stat()
        return ObjectInfo(self._key, stat.st_size, stat.st_mtime)

    def abort(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)
