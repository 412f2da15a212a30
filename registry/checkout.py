"""A version's files from a store to a folder: each verified against the manifest, and all there or nothing."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from ulid import ULID

from registry.disk import translated
from registry.errors import InfrastructureError
from registry.manifest import Manifest

_CHUNK = 1024 * 1024


def checkout(open_object: Callable[[str], BinaryIO], prefix: str, into: Path) -> Path:
    """The folder `into`, laid out as in docs/design.md §4. A folder that is there was complete when it got its name.

    InfrastructureError `object_damaged` where bytes are not what the manifest says.
    """
    if into.is_dir():
        return into
    with open_object(f"{prefix}/manifest.json") as stream:
        manifest_bytes = stream.read()
    temporary = into.with_name(f"{into.name}.{ULID()}")
    try:
        for path, size, sha256 in _files(Manifest.parse(manifest_bytes)):
            target = temporary / path
            translated(path, lambda target=target: target.parent.mkdir(parents=True, exist_ok=True))  # type: ignore[misc]
            with open_object(f"{prefix}/{path}") as stream, target.open("xb") as out:
                found = translated(path, lambda stream=stream, out=out: _copy(stream, out))  # type: ignore[misc]
            if found != (size, sha256):
                raise InfrastructureError(
                    "object_damaged",
                    f"{prefix}/{path} is not what was uploaded: {found[0]} bytes with SHA-256 {found[1]}, "
                    f"instead of {size} with {sha256}.",
                    hint="The object store lost or changed it: upload the model again.",
                )
        (temporary / "manifest.json").write_bytes(manifest_bytes)
        try:
            os.rename(temporary, into)
        except OSError:
            if not into.is_dir():  # another thread was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return into


def _files(manifest: Manifest) -> Iterator[tuple[str, int, str]]:
    for file in manifest.files:
        yield f"files/{file.path}", file.size, file.sha256
    for name, attachment in (("sample.json", manifest.sample), ("expected.json", manifest.expected)):
        if attachment is not None:
            yield name, attachment.size, attachment.sha256
    if manifest.requirements is not None:
        yield f"requirements/{manifest.requirements.path}", manifest.requirements.size, manifest.requirements.sha256


def _copy(stream: BinaryIO, out: BinaryIO) -> tuple[int, str]:
    hashed, size = hashlib.sha256(), 0
    while chunk := stream.read(_CHUNK):
        hashed.update(chunk)
        out.write(chunk)
        size += len(chunk)
    return size, hashed.hexdigest()
