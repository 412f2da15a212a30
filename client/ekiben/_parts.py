"""Large files in parts: a push that was cut goes on where it stopped.

Each part carries its SHA-256 and is on the server's disk when it is acknowledged. A small file in the user's
configuration folder remembers which upload belongs to which files; which parts are there, the server is asked. They are
compared with the files by digest, so files that changed start again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ekiben import _archive, _config
from ekiben._errors import Conflict, EkibenError, NotFound, Unreachable, UsageError

if TYPE_CHECKING:
    from ekiben._client import Client
    from ekiben._upload import Progress

T = TypeVar("T")

_PATIENCE = 90.0  # seconds that a server may be away between two parts
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0  # seconds between two tries
_PASSING = frozenset({408, 429, 502, 503, 504})
_STARTS = 3  # of one push: the upload may have expired, or another client may send the same


@dataclass(frozen=True)
class Payload:
    """What is sent as one file: a file as it is, several files or a folder as a tar."""

    name: str
    size: int
    stream: Callable[[], Iterator[bytes]]
    paths: tuple[Path, ...]
    files: tuple[Path, ...]

    def stamp(self) -> int:
        """When the newest file was written, in nanoseconds."""
        try:
            return max(file.stat().st_mtime_ns for file in self.files)
        except OSError as error:
            raise UsageError(f"{error.filename} cannot be read: {error.strerror}", code="unreadable") from None


def payload(paths: Sequence[Path]) -> Payload:
    """`paths` are a file, files that belong together, or one folder; `_upload.form` has checked them."""
    first = paths[0]
    if len(paths) == 1 and not first.is_dir():
        size = first.stat().st_size
        return Payload(first.name, size, lambda: _archive.read_exactly(first, size), (first,), (first,))
    if first.is_dir():
        listed, name = _archive.folder(first), first.resolve().name or "model"
    else:
        members = tuple(_archive.Member(path.name, path, path.stat().st_size) for path in paths)
        listed, name = _archive.Folder(first.parent, members), first.name
    files = tuple(member.path for member in listed.members)
    return Payload(f"{name}.tar", listed.size, listed.stream, tuple(paths), files)


@dataclass(frozen=True)
class Remembered:
    """An upload that was begun: for files of this size and time. `digest`, once all is sent: of its parts' digests."""

    id: str
    part_size: int
    size: int
    stamp: int
    digest: str | None = None


class Memory:
    """The file that remembers the upload of these paths to this server."""

    def __init__(self, url: str, paths: Sequence[Path], environment: Mapping[str, str]) -> None:
        known = "\n".join([url, *(os.path.abspath(path) for path in paths)])
        self._file = _config.uploads(environment) / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"

    def read(self) -> Remembered | None:
        try:
            return Remembered(**json.loads(self._file.read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, upload: Remembered) -> None:
        try:
            _config.write_private(self._file, asdict(upload))
        except OSError as error:
            raise UsageError(
                f"{self._file.parent} cannot be written: {error.strerror}",
                code="config_not_writable",
                hint="set XDG_CONFIG_HOME to a folder of yours",
            ) from None

    def forget(self) -> None:
        with contextlib.suppress(OSError):
            self._file.unlink()


def send(
    client: Client, what: Payload, memory: Memory, progress: Progress | None, told: Callable[[str], None] | None
) -> str:
    """The id of an upload that has all parts: gone on with where there is one, else begun. Raises Unsupported."""
    for _ in range(_STARTS):
        try:
            return _Sending(client, what, memory, progress or _silent, told or _silent).run()
        except _StartAgain:
            continue
    raise UsageError(
        f"{what.paths[0]} is not the same twice: it cannot be sent in parts",
        code="file_changed",
        field="file",
        hint="wait for whoever writes it, then push",
    )


class Unsupported(Exception):
    """The server knows no uploads in parts."""


class _StartAgain(Exception):
    """What is remembered or known of the upload is of no use any more."""


class _Sending:
    """One pass over the payload: parts that are there are compared, the others sent."""

    def __init__(
        self,
        client: Client,
        what: Payload,
        memory: Memory,
        progress: Progress,
        told: Callable[[str], None],
    ) -> None:
        self._client, self._what, self._memory, self._progress, self._told = client, what, memory, progress, told
        self._stamp = what.stamp()

    def run(self) -> str:
        upload, kept = self._resumed() or self._begun()
        whole, position = hashlib.sha256(), 0
        for number, data in enumerate(_cut(self._what.stream(), upload.part_size), 1):
            digest = hashlib.sha256(data)
            whole.update(digest.digest())
            if kept is not None and number <= len(kept):
                if not _same(kept[number - 1], len(data), digest.hexdigest()):
                    self._give_up(upload)
            elif kept is not None:
                kept.append(self._put(upload, number, data, digest.digest(), position))
            position += len(data)
            self._progress(position)
        if kept is None and upload.digest != whole.hexdigest():
            self._give_up(upload)
        if self._what.stamp() != self._stamp:
            self._give_up(upload)
        self._memory.write(replace(upload, digest=whole.hexdigest()))
        return upload.id

    def _resumed(self) -> tuple[Remembered, list[dict[str, Any]] | None] | None:
        """The upload that is remembered and the parts that are there; None in place of them when it is complete."""
        upload = self._memory.read()
        if upload is None:
            return None
        if (upload.size, upload.stamp) != (self._what.size, self._stamp):
            self._end(upload)
            return None
        try:
            found = self._client.upload_in_parts(upload.id)  # at once: a server that is not there is told at once
        except NotFound:
            self._memory.forget()
            return None
        except Conflict as error:
            if error.code != "upload_complete":
                raise
            self._told("all parts are there already: going on at 100 %")
            return upload, None
        if found["parts"]:
            self._told(f"resuming at {100 * found['received'] // self._what.size} %")
        return upload, list(found["parts"])

    def _begun(self) -> tuple[Remembered, list[dict[str, Any]] | None]:
        try:
            made = self._client.begin_upload(self._what.name, self._what.size)
        except NotFound as error:
            raise Unsupported from error
        upload = Remembered(made["id"], int(made["part_size"]), self._what.size, self._stamp)
        self._memory.write(upload)
        return upload, []

    def _put(self, upload: Remembered, number: int, data: bytearray, digest: bytes, position: int) -> dict[str, Any]:
        def progress(sent: int) -> None:
            self._progress(position + sent)

        try:
            return again(lambda: self._client.put_part(upload.id, number, data, digest, progress))
        except NotFound:
            self._memory.forget()
            raise _StartAgain from None
        except Conflict as error:
            if error.code == "part_conflict":
                self._give_up(upload)
            if error.code in ("part_out_of_order", "upload_complete"):
                raise _StartAgain from None  # another client sends the same: what is there now is asked again
            raise

    def _give_up(self, upload: Remembered) -> None:
        self._told("the files changed since: starting again")
        self._end(upload)
        raise _StartAgain

    def _end(self, upload: Remembered) -> None:
        self._memory.forget()
        with contextlib.suppress(EkibenError):  # it may be gone, and if not, the server's own clean-up finds it
            self._client.end_upload(upload.id)


def again(action: Callable[[], T], patience: float = _PATIENCE) -> T:
    """What the action gives; while the server is away or busy it is tried again, for `patience` seconds."""
    until, pause = time.monotonic() + patience, _FIRST_PAUSE
    while True:
        try:
            return action()
        except EkibenError as error:
            if not _passing(error) or time.monotonic() + pause > until:
                raise
        time.sleep(pause)
        pause = min(pause * 2, _LONGEST_PAUSE)


def _passing(error: EkibenError) -> bool:
    if isinstance(error, Unreachable):
        return error.code in ("connection_lost", "timeout", "unreachable")
    return error.status in _PASSING or error.code == "upload_busy"


def _same(part: Mapping[str, Any], size: int, sha256: str) -> bool:
    return part["size"] == size and part["sha256"] in (sha256, None)  # some object stores keep no digests


def _cut(stream: Iterator[bytes], size: int) -> Iterator[bytearray]:
    """The same bytes in parts of one size; the last may be smaller."""
    part = bytearray()
    for chunk in stream:
        view = memoryview(chunk)
        while view:
            room = size - len(part)
            part += view[:room]
            view = view[room:]
            if len(part) == size:
                yield part
                part = bytearray()
    if part:
        yield part


def _silent(_: object) -> None:
    pass
