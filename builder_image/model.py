"""A model folder (docs/design.md §4), read and verified before anything is made of it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from registry.errors import InfrastructureError, UserError
from registry.manifest import Manifest

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Model:
    dir: Path
    manifest: Manifest

    @property
    def files(self) -> dict[str, Path]:
        """The user's files by path, and where each one is."""
        return {file.path: self.dir / "files" / file.path for file in self.manifest.files}

    @property
    def parts(self) -> dict[str, Path]:
        """Every file of the folder, the manifest included, by its path in the folder."""
        found = {f"files/{path}": place for path, place in self.files.items()}
        for path, _, _ in attachments(self.manifest):
            found[path] = self.dir / path
        found[MANIFEST] = self.dir / MANIFEST
        return found

    def verify_files(self, *, content: bool = True) -> None:
        """Hold the user's files against the manifest. Raises as `read`."""
        for file in self.manifest.files:
            _verify(self.dir, f"files/{file.path}", file.size, file.sha256 if content else None)

    @property
    def requirements(self) -> Path | None:
        attachment = self.manifest.requirements
        return None if attachment is None or attachment.path is None else self.dir / "requirements" / attachment.path


def read(folder: Path, *, files: bool = True) -> Model:
    """Read the manifest and verify every file's size and SHA-256; with `files` false, the user's files' size only,
    because whoever reads them next checks them in the same pass.

    Raises UserError `bad_manifest`, InfrastructureError `digest_mismatch` or `model_missing`: the store handed over
    something else than what was uploaded, and may do better next time.
    """
    try:
        manifest = Manifest.parse((folder / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise InfrastructureError(
            "model_missing", f"there is no {MANIFEST} in the model folder {folder.name}", hint="upload the model again"
        ) from error
    for path, size, sha256 in attachments(manifest):
        _verify(folder, path, size, sha256)
    found = Model(folder, manifest)
    found.verify_files(content=files)
    return found


def attachments(manifest: Manifest) -> list[tuple[str, int, str]]:
    """(path, size, SHA-256) of the files beside the user's."""
    found = []
    for name, attachment in (("sample.json", manifest.sample), ("expected.json", manifest.expected)):
        if attachment is not None:
            found.append((name, attachment.size, attachment.sha256))
    if manifest.requirements is not None:
        one = manifest.requirements
        found.append((f"requirements/{one.path}", one.size, one.sha256))
    return found


def _verify(folder: Path, path: str, size: int, sha256: str | None) -> None:
    try:
        # a link would let a folder of the user's own making name any file of the machine
        descriptor = os.open(folder / path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise _mismatch(path, f"cannot be read ({error.strerror})") from error
    with open(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor).st_size
        if found != size:
            raise _mismatch(path, f"has {found} bytes, the manifest says {size}")
        if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise _mismatch(path, "has another SHA-256 than the manifest says")


def _mismatch(path: str, why: str) -> UserError | InfrastructureError:
    return InfrastructureError(
        "digest_mismatch", f"{path} {why}", hint="the stored copy is damaged: upload the model again as a new version"
    )
