"""Uploads in parts: a large file that survives a break of the line, of its sender, or of this service.

The parts, and which of them are there, are the store's own (`registry.parts`). An upload's id is its folder, models/ID:
the file is models/ID/files/PATH once it is whole. A note beside it, upload.json, holds what was announced of the file;
where the version came to lie elsewhere, it holds at last which version that is. Any valid token may go on.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Header, Request

from build_service import metrics, shapes
from build_service.admission import caller_of
from build_service.intake import Limits, Pace, Received, bounded, file_path, too_large
from build_service.threads import Threads
from registry import parts, versions
from registry.database import Database
from registry.errors import InfrastructureError, UserError
from registry.parts import Part, UploadComplete
from registry.store import MODELS, ObjectMissing, ObjectStore

_NOTE = "upload.json"
_MIB = 1024 * 1024
_PART_SIZE = 16 * _MIB
_ARRIVING = 128 * _MIB  # bytes of the parts that come in at once: they are held in memory
_ARRIVING_OF_ONE = parts.LARGEST_PART  # the same of one caller
_REMEMBERED = 1000  # uploads of which is known how far they are
_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):\s*(?:,|$)")  # RFC 9530, §2


@dataclass(frozen=True)
class _Note:
    """What was announced of a file, None for what was not, and the version that it became if that lies elsewhere."""

    filename: str | None = None
    size: int | None = None
    sha256: str | None = None
    version: tuple[str, int] | None = None


@dataclass(frozen=True)
class _Reached:
    """How far an upload was after a part of it."""

    note: _Note
    number: int
    end: int


class Uploads:
    """`local`: the objects are on the disk that `limits` look at."""

    def __init__(self, store: ObjectStore, database: Database, limits: Limits, *, local: bool) -> None:
        self._store, self._database, self._limits, self._local = store, database, limits, local
        self._reached: dict[str, _Reached] = {}
        self._arriving: Counter[str] = Counter()  # bytes by caller

    # --- while parts come -------------------------------------------------------------------------------------------

    def begin(self, wanted: shapes.UploadRequest) -> shapes.UploadView:
        path = file_path(wanted.filename)
        if wanted.size is not None:
            if wanted.size > self._limits.upload:
                raise too_large(self._limits.upload)
            self._limits.check_disk(wanted.size if self._local else 0)
        sha256 = None if wanted.sha256 is None else wanted.sha256.lower()
        upload, note = parts.new_id(), _Note(path, wanted.size, sha256)
        self._write_note(upload, note)
        self._store.begin_parts(f"{_location(upload)}/files/{path}", upload)
        return self._view(upload, note, ())

    def view(self, upload: str) -> shapes.UploadView:
        kept = self._store.parts(upload)
        return self._view(upload, self._note(upload), kept)

    def put(self, upload: str, number: int, data: bytes | bytearray, sha256: str) -> shapes.PartView:
        with self.claimed(upload):
            reached = self._before(upload, number)
            end = reached.end + len(data)
            self._check_end(reached.note, end, len(data))
            self._limits.check_disk(len(data))
            part = self._store.put_part(upload, number, data, sha256)
            if len(self._reached) >= _REMEMBERED:
                self._reached.clear()  # the store knows too
            self._reached[upload] = _Reached(reached.note, number, end)
        metrics.UPLOADED_BYTES.inc(len(data))
        return _part(part)

    def end(self, upload: str) -> None:
        """Forget an upload that is no version yet, with its parts."""
        with self.claimed(upload):
            with suppress(UploadComplete):
                self._store.parts(upload)
            self._store.end_parts(upload)
            with self._database.read() as connection:
                taken = versions.at(connection, _location(upload)) is not None
            if not taken:
                self._store.delete(_location(upload))

    @contextmanager
    def arriving(self, caller: str, size: int) -> Iterator[None]:
        """Memory for a part of so many bytes, or EkibenError at once: a sender that waits would lose its connection."""
        if self._arriving.total() + size > _ARRIVING or self._arriving[caller] + size > _ARRIVING_OF_ONE:
            raise InfrastructureError(
                "too_many_parts",
                f"Parts of uploads of {self._arriving.total() // _MIB} MiB are arriving already.",
                hint="Send the part again in a moment.",
                status=503,
            )
        self._arriving[caller] += size
        try:
            yield
        finally:
            self._arriving[caller] -= size
            if not self._arriving[caller]:
                del self._arriving[caller]

    # --- when all are there -----------------------------------------------------------------------------------------

    @contextmanager
    def claimed(self, upload: str) -> Iterator[None]:
        """The upload for one at a time, of all services that share the database."""
        with self._database.claimed(f"upload/{parts.check_id(upload)}") as free:
            if not free:
                raise UserError(
                    "upload_busy",
                    f"Something else is being done with the upload {upload} at this moment.",
                    hint="Two clients send it, or it is being registered: ask again in a moment.",
                    status=409,
                )
            yield

    def registered(self, upload: str) -> versions.Version | None:
        """The version that the upload became already: the answer that said so may have been lost."""
        elsewhere = self._note(upload).version
        with self._database.read() as connection:
            if elsewhere is None:
                return versions.at(connection, _location(upload))
            name, number = elsewhere
            return next((row for row in versions.of_model(connection, name) if row.number == number), None)

    def complete(self, upload: str) -> Received:
        """The parts as one file; UserError where some are missing. Fine when that was done before."""
        note = self._note(upload)
        try:
            size = sum(part.size for part in self._store.parts(upload))
        except UploadComplete:
            pass
        else:
            if note.size is not None and size != note.size:
                raise UserError(
                    "upload_incomplete",
                    f"{size} of the {note.size} bytes that were announced are there.",
                    field="upload_id",
                    hint=f"GET /uploads/{upload} tells which parts are there: send those after them.",
                    status=409,
                )
            if size > self._limits.upload:
                raise too_large(self._limits.upload)
        info = self._store.complete_parts(upload)
        self._reached.pop(upload, None)
        location = _location(upload)
        return Received(location, info.key.removeprefix(f"{location}/files/"), info.size, note.sha256)

    def finished(self, upload: str, name: str, number: int) -> None:
        """It is a version: the upload ends. What was not kept for that version goes."""
        location = _location(upload)
        with self._database.read() as connection:
            in_place = versions.at(connection, location) is not None
        if not in_place:
            self._write_note(upload, _Note(version=(name, number)))
            for info in list(self._store.list(f"{location}/")):
                if info.key != f"{location}/{_NOTE}":
                    self._store.delete(info.key)
        self._store.end_parts(upload)

    # --- how far it is ----------------------------------------------------------------------------------------------

    def _before(self, upload: str, number: int) -> _Reached:
        """How far the upload is without the part of this number and those after it."""
        reached = self._reached.get(upload)
        if reached is not None and reached.number == number - 1:
            return reached
        kept = [part for part in self._store.parts(upload) if part.number < number]
        return _Reached(self._note(upload), len(kept), sum(part.size for part in kept))

    def _check_end(self, note: _Note, end: int, size: int) -> None:
        if note.size is not None and end > note.size:
            raise UserError(
                "part_beyond_end",
                f"With this part the file has {end} bytes, and {note.size} were announced.",
                hint="The file grew while it was sent, or another one is sent: DELETE the upload, and begin a new one.",
            )
        if note.size is not None and end < note.size and size < parts.SMALLEST_PART:
            raise UserError(
                "part_too_small",
                f"The part has {size} bytes; only the last part may have fewer than {parts.SMALLEST_PART}.",
                hint=f"Cut the file into larger parts: split -b {_PART_SIZE // _MIB}M FILE",
            )
        if end > self._limits.upload:
            raise too_large(self._limits.upload)

    def _view(self, upload: str, note: _Note, kept: Sequence[Part]) -> shapes.UploadView:
        return shapes.UploadView(
            id=upload,
            filename=note.filename,
            size=note.size,
            sha256=note.sha256,
            part_size=_part_size(note.size),
            received=sum(part.size for part in kept),
            parts=[_part(part) for part in kept],
        )

    def _note(self, upload: str) -> _Note:
        try:
            with self._store.open(_note_key(upload)) as stream:
                body = json.load(stream)
        except ObjectMissing:  # the file is checked, and perhaps a version
            return _Note()
        if (version := body.pop("version", None)) is not None:
            body["version"] = (version["model"], version["version"])
        return _Note(**body)

    def _write_note(self, upload: str, note: _Note) -> None:
        body: dict[str, Any] = {"filename": note.filename, "size": note.size, "sha256": note.sha256}
        if note.version is not None:
            body = {"version": {"model": note.version[0], "version": note.version[1]}}
        writer = self._store.writer(_note_key(upload))
        try:
            writer.write(json.dumps(body).encode())
            writer.commit()
        finally:
            writer.abort()


def router(uploads: Uploads, threads: Threads, pace: Pace) -> APIRouter:
    """The endpoints below /uploads; `threads` write the parts."""
    api = APIRouter(tags=["uploads"])
    part_body = {
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    }

    @api.post("/uploads", status_code=201, operation_id="begin_upload")
    def begin(wanted: shapes.UploadRequest) -> shapes.UploadView:
        """Begin an upload in parts. When all are there: POST /models with `upload_id` in place of a file."""
        return uploads.begin(wanted)

    @api.get("/uploads/{upload}", operation_id="get_upload")
    def view(upload: str) -> shapes.UploadView:
        """Which parts are there. 409 `upload_complete` when they are one file already: go on with POST /models."""
        return uploads.view(upload)

    @api.put("/uploads/{upload}/parts/{number}", operation_id="put_part", openapi_extra=part_body)
    async def put(
        upload: str,
        number: int,
        request: Request,
        content_digest: Annotated[
            str | None, Header(description="SHA-256 of the part, as RFC 9530 writes it: sha-256=:BASE64:")
        ] = None,
    ) -> shapes.PartView:
        """The next part, of 5 to 64 MiB; the last may be smaller. It is on the disk when this answers. The same part
        again is fine."""
        sha256 = _announced(content_digest)
        if not 1 <= number <= parts.MOST_PARTS:
            raise UserError(
                "bad_part_number", f"{number} is no part: they count from 1 to {parts.MOST_PARTS}.", field="number",
                hint="Begin a new upload with larger parts, if these are not enough.",
            )  # fmt: skip
        declared = request.headers.get("content-length", "")
        length = int(declared) if declared.isdigit() else 0
        held = min(length, parts.LARGEST_PART) or parts.LARGEST_PART
        with uploads.arriving(caller_of(request.scope), held):
            data = await _body(bounded(request.stream(), pace), length)
            return await threads.run(uploads.put, upload, number, data, sha256)

    @api.delete("/uploads/{upload}", status_code=204, operation_id="end_upload")
    def end(upload: str) -> None:
        """Give an upload up, with its parts."""
        uploads.end(upload)

    return api


async def _body(stream: AsyncIterator[bytes], declared: int) -> bytearray:
    data = bytearray()
    if declared <= parts.LARGEST_PART:
        async for chunk in stream:
            data += chunk
            if len(data) > parts.LARGEST_PART:
                break
    if max(declared, len(data)) > parts.LARGEST_PART:
        raise UserError(
            "part_too_large",
            f"A part has at most {parts.LARGEST_PART} bytes.",
            hint=f"Cut the file into smaller parts: split -b {_PART_SIZE // _MIB}M FILE",
            status=413,
        )
    return data


def _announced(header: str | None) -> str:
    """The SHA-256 of a Content-Digest, in hex."""
    found = _DIGEST.search(header or "")
    if found is None:
        raise UserError(
            "part_digest_missing",
            "The part comes without its SHA-256." if header is None else "Content-Digest names no SHA-256.",
            field="content-digest",
            hint='Content-Digest: sha-256=:BASE64: with BASE64="$(openssl dgst -sha256 -binary PART | base64)"',
        )
    return base64.b64decode(found[1]).hex()


def _part(part: Part) -> shapes.PartView:
    return shapes.PartView(number=part.number, size=part.size, sha256=part.sha256)


def _part_size(size: int | None) -> int:
    """Bytes of a part so that a file of this size has few enough of them."""
    needed = -(-(size or 0) // parts.MOST_PARTS)
    return min(max(_PART_SIZE, -(-needed // _MIB) * _MIB), parts.LARGEST_PART)


def _location(upload: str) -> str:
    return f"{MODELS}/{parts.check_id(upload)}"


def _note_key(upload: str) -> str:
    return f"{_location(upload)}/{_NOTE}"
