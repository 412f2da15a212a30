"""Uploads in parts, that survive both ends: what a part is, which one may come next, and how a folder keeps them.

Parts come in order. Each carries its SHA-256 and is kept before it is acknowledged, so after a break, or a restart of
either side, the sender asks which parts are there and goes on with the next. The same part again is fine.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from ulid import ULID

from registry.disk import translated
from registry.errors import UserError

SMALLEST_PART = 5 * 1024 * 1024  # bytes of every part but the last; S3's bound
LARGEST_PART = 64 * 1024 * 1024  # bytes; a part is held in memory
MOST_PARTS = 10_000  # S3's bound

_ID = re.compile(r"[0-9A-HJKMNP-TV-Z]{26}")


@dataclass(frozen=True)
class Part:
    """A part that is kept: its number from 1, its size in bytes, its SHA-256 in hex (None where a server of S3 keeps no
    checksums)."""

    number: int
    size: int
    sha256: str | None


class UploadMissing(UserError):
    """The id names no upload that is under way."""

    status = 404

    def __init__(self, upload: str) -> None:
        super().__init__(
            "upload_missing",
            f"There is no unfinished upload {upload[:40]!r}.",
            hint="It was ended, or stood still for too long; begin a new one.",
        )


class UploadComplete(UserError):
    """The parts are one object already."""

    status = 409

    def __init__(self, upload: str) -> None:
        super().__init__(
            "upload_complete",
            f"The upload {upload!r} is complete: it has no parts any more.",
            hint="Go on with what comes after its last part.",
        )


def new_id() -> str:
    return str(ULID())


def check_id(upload: str) -> str:
    """The id itself if it can be one; UploadMissing otherwise."""
    if _ID.fullmatch(upload) is None:
        raise UploadMissing(upload)
    return upload


def check_content(data: bytes | bytearray, sha256: str) -> None:
    """UserError unless the data can be a part and is what its sender says it is."""
    if not 0 < len(data) <= LARGEST_PART:
        raise UserError(
            "part_too_large" if data else "part_empty",
            f"A part has 1 to {LARGEST_PART} bytes; this one has {len(data)}.",
            hint="Cut the file into parts of the part_size that the upload's answer names: split -b 16M FILE",
            status=413 if data else 422,
        )
    if hashlib.sha256(data).hexdigest() != sha256.lower():
        raise UserError(
            "part_digest_mismatch",
            "The part's bytes do not have the SHA-256 that was announced for them.",
            hint="It changed on its way: send the part again.",
        )


def check_next(kept: Sequence[Part], number: int, sha256: str) -> Part | None:
    """The part of this number where it is kept already, None where it may come now; UserError otherwise. `kept` needs
    to reach back to the number before."""
    last = kept[-1] if kept else None
    for part in kept:
        if part.number == number:
            if part.sha256 not in (sha256.lower(), None):
                raise UserError(
                    "part_conflict",
                    f"Part {number} is there with other content.",
                    status=409,
                    hint="A part does not change: begin a new upload.",
                )
            return part
    expected = 1 if last is None else last.number + 1
    if number != expected or number > MOST_PARTS:
        raise UserError(
            "part_out_of_order",
            f"Part {number} cannot come now: the next part is {expected}, of at most {MOST_PARTS}.",
            status=409,
            hint="Ask which parts are there, and go on after the last one.",
        )
    if last is not None and last.size < SMALLEST_PART:
        raise UserError(
            "part_too_small",
            f"Part {last.number} has {last.size} bytes; only the last part may have fewer than {SMALLEST_PART}.",
            hint="Begin a new upload with larger parts.",
        )
    return None


def check_some(kept: Sequence[Part], upload: str) -> None:
    if not kept:
        raise UserError(
            "upload_incomplete",
            f"The upload {upload!r} has no part yet.",
            hint=f"PUT /uploads/{upload}/parts/1 is the first.",
            status=409,
        )


class FolderUpload:
    """An upload's parts in a folder: one growing file, and a journal that says how much of it counts.

    key       which object it will be
    content   the bytes; a part that was cut short is beyond what the journal knows, and is overwritten
    parts     a line for each part that is on the disk
    """

    def __init__(self, folder: Path, upload: str) -> None:
        self._folder, self._upload = folder, upload

    @classmethod
    def begin(cls, folder: Path, upload: str, key: str) -> FolderUpload:
        def make() -> None:
            temporary = folder.with_name(f"{folder.name}.new")
            temporary.mkdir()
            (temporary / "key").write_text(key)
            (temporary / "content").touch()
            (temporary / "parts").touch()
            temporary.rename(folder)

        translated(key, make)
        return cls(folder, upload)

    @property
    def key(self) -> str:
        try:
            return (self._folder / "key").read_text()
        except FileNotFoundError:
            raise UploadMissing(self._upload) from None

    @property
    def touched(self) -> float:
        """When the last part came, in seconds since 1970."""
        return max((path.stat().st_mtime for path in self._folder.iterdir()), default=0.0)

    def put(self, number: int, data: bytes | bytearray, sha256: str) -> Part:
        with self._locked() as journal:
            content = self._open_content()
            with content:
                kept, end = _journal(journal)
                known = check_next(kept, number, sha256)
                if known is not None:
                    return known
                part = Part(number, len(data), sha256.lower())
                translated(self.key, lambda: self._append(content, sum(each.size for each in kept), data))
                translated(self.key, lambda: self._append(journal, end, json.dumps(asdict(part)).encode() + b"\n"))
                return part

    def parts(self) -> list[Part]:
        with self._locked() as journal, self._open_content():
            return _journal(journal)[0]

    def complete(self, target: Path) -> None:
        """Publish the parts as one file in one step; fine when that was done before."""
        with self._locked() as journal:
            content = self._folder / "content"
            if not content.exists() and target.exists():
                return
            with self._open_content() as stream:
                kept, _ = _journal(journal)
                check_some(kept, self._upload)
                stream.truncate(sum(part.size for part in kept))
                os.fsync(stream.fileno())
            translated(self.key, lambda: target.parent.mkdir(parents=True, exist_ok=True))
            os.replace(content, target)

    def end(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The journal, for one caller at a time."""
        try:
            journal = (self._folder / "parts").open("r+b", buffering=0)
        except FileNotFoundError:
            raise UploadMissing(self._upload) from None
        with journal:
            fcntl.flock(journal, fcntl.LOCK_EX)
            yield journal

    def _open_content(self) -> BinaryIO:
        try:
            return (self._folder / "content").open("r+b", buffering=0)
        except FileNotFoundError:
            raise UploadComplete(self._upload) from None

    @staticmethod
    def _append(stream: BinaryIO, at: int, data: bytes | bytearray) -> None:
        stream.seek(at)
        stream.truncate()
        view = memoryview(data)
        while view:
            view = view[stream.write(view) :]
        os.fsync(stream.fileno())


def _journal(stream: BinaryIO) -> tuple[list[Part], int]:
    """The parts that are kept, and where the next line goes; a line that was cut short does not count."""
    stream.seek(0)
    whole, newline, _ = stream.read().rpartition(b"\n")
    return [Part(**json.loads(line)) for line in whole.splitlines()], len(whole) + len(newline)
