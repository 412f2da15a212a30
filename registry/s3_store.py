"""The object store in a bucket of an S3 service (`registry.s3`).

What is under way is noted in the bucket itself, below `.unfinished/`: the key and id of each multipart upload. So
whoever comes next can go on with an upload in parts or abort what stands still, on services that cannot list multipart
uploads too. A crash between the beginning of one and its note leaves parts that only the service's own clean-up finds:
MinIO's runs by itself, others have the lifecycle rule AbortIncompleteMultipartUpload.

Objects are not to have versions: a deletion in a bucket with versioning keeps the bytes.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from registry import parts
from registry.checkout import checkout
from registry.errors import InfrastructureError
from registry.parts import Part, UploadComplete, UploadMissing
from registry.s3 import Bucket, MultipartMissing, StoredPart
from registry.store import MANIFEST, MODELS, UNFINISHED, ObjectInfo, ObjectMissing, check_key

_WORKERS = 4  # threads that send parts, of all uploads together
_IN_FLIGHT = 2  # parts of one upload that are being sent; one more is being filled
_GROW_AFTER = 1000  # parts of one size; the next thousand are larger by the first size
_FIRST_WINDOW, _LARGEST_WINDOW = 64 * 1024, 8 * 1024 * 1024  # bytes of one ranged read
_ABORT_PATIENCE = 10.0  # seconds
_BATCH = 1000  # keys of one deletion


def part_size(number: int, first: int) -> int:
    """Bytes of a part: 10,000 parts, S3's bound, of 16 MiB at first hold 859 GiB, yet most uploads stay with little
    memory."""
    return first * (1 + (number - 1) // _GROW_AFTER)


class S3Store:
    """`ObjectStore` and `Presigning` on one bucket. Several services may use it at once."""

    def __init__(self, bucket: Bucket, *, first_part: int = 16 * 1024 * 1024) -> None:
        self._bucket, self._first_part = bucket, first_part
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="s3-parts")

    def prepare(self) -> None:
        """See that the bucket can be used; to be called once, at start."""
        self._bucket.prepare()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._bucket.close()

    def writer(self, key: str) -> S3Writer:
        return S3Writer(self._bucket, self._pool, check_key(key), self._first_part)

    def open(self, key: str) -> BinaryIO:
        stat = self._bucket.stat(check_key(key))
        return cast(BinaryIO, io.BufferedReader(_Reader(self._bucket, key, stat.info.size, stat.etag)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return (info for info in self._bucket.objects(prefix) if not info.key.startswith(f"{UNFINISHED}/"))

    def delete(self, prefix: str) -> None:
        check_key(prefix)
        # The manifest goes first: what is left of a deletion that was cut short is an unfinished upload.
        batch = [f"{prefix}/{MANIFEST}", prefix]
        self._bucket.delete(batch)
        batch = []
        for info in self._bucket.objects(f"{prefix}/"):
            batch.append(info.key)
            if len(batch) == _BATCH:
                self._bucket.delete(batch)
                batch = []
        if batch:
            self._bucket.delete(batch)

    def checkout(self, prefix: str, into: Path) -> Path:
        check_key(prefix)
        return checkout(self.open, prefix, into)

    def uri(self, prefix: str) -> str:
        return f"s3://{self._bucket.name}/{check_key(prefix)}"

    def presign_get(self, key: str, seconds: int) -> str:
        return self._bucket.presign("GET", check_key(key), seconds)

    def presign_put(self, key: str, seconds: int) -> str:
        return self._bucket.presign("PUT", check_key(key), seconds)

    # --- uploads in parts -------------------------------------------------------------------------------------------

    def begin_parts(self, key: str, upload: str | None = None) -> str:
        upload = parts.check_id(upload or parts.new_id())
        _begin(self._bucket, check_key(key), upload)
        return upload

    def put_part(self, upload: str, number: int, data: bytes | bytearray, sha256: str) -> Part:
        parts.check_content(data, sha256)
        note = self._note(upload)
        before = [_part(part) for part in self._stored(note, after=max(0, number - 2))]
        known = parts.check_next(before, number, sha256)
        if known is not None:
            return known
        try:
            return _part(self._bucket.put_part(note.key, note.multipart, number, data))
        except MultipartMissing:
            raise UploadComplete(upload) from None

    def parts(self, upload: str) -> Sequence[Part]:
        return [_part(part) for part in self._stored(self._note(upload))]

    def complete_parts(self, upload: str) -> ObjectInfo:
        note = self._note(upload)
        try:
            stored = self._stored(note)
        except UploadComplete:
            stat = self._bucket.stat(note.key)
            if stat.writer != upload:
                raise UploadMissing(upload) from None
            return stat.info
        parts.check_some([_part(part) for part in stored], upload)
        return self._bucket.complete(note.key, note.multipart, stored, writer=upload)

    def end_parts(self, upload: str) -> None:
        with suppress(UploadMissing):
            self._forget(self._note(upload))

    # --- what is left over ------------------------------------------------------------------------------------------

    def sweep(self, versions: Collection[str], *, stale: float, alone: bool) -> None:
        """As the Protocol says, but nothing counts as given up before it is stale, and a folder with a manifest is
        never deleted: other services may write into the bucket, and a database that was restored, or is a new one, must
        not take its models along."""
        limit = time.time() - stale
        awaited = set()
        for info in self._bucket.objects(f"{UNFINISHED}/"):
            note = self._read_note(info.key)
            if note is None:
                continue
            awaited.add(note.key)
            if info.modified <= limit and self._touched(note) <= limit:
                self._forget(note)
                awaited.remove(note.key)
        for name in self._bucket.folders(MODELS):
            location = f"{MODELS}/{name}"
            if location in versions or any(key.startswith(f"{location}/") for key in awaited):
                continue
            if not self._in_use(location, limit):
                self.delete(location)

    def _in_use(self, location: str, limit: float) -> bool:
        return any(
            info.modified > limit or info.key == f"{location}/{MANIFEST}"
            for info in self._bucket.objects(f"{location}/")
        )

    def _touched(self, note: _Note) -> float:
        """When the newest part came, in seconds since 1970."""
        try:
            return max((part.modified for part in self._bucket.parts(note.key, note.multipart)), default=0.0)
        except MultipartMissing:
            return 0.0

    def _forget(self, note: _Note) -> None:
        self._bucket.abort(note.key, note.multipart)
        self._bucket.delete([note.path])

    def _stored(self, note: _Note, *, after: int = 0) -> Sequence[StoredPart]:
        try:
            return self._bucket.parts(note.key, note.multipart, after=after)
        except MultipartMissing:
            raise UploadComplete(note.upload) from None

    def _note(self, upload: str) -> _Note:
        note = self._read_note(_note_path(parts.check_id(upload)))
        if note is None:
            raise UploadMissing(upload)
        return note

    def _read_note(self, path: str) -> _Note | None:
        try:
            stat = self._bucket.stat(path)
            body = json.loads(self._bucket.get(path, 0, stat.info.size, etag=stat.etag))
            return _Note(path.rpartition("/")[2].removesuffix(".json"), body["key"], body["multipart"])
        except ObjectMissing:
            return None


@dataclass(frozen=True)
class _Note:
    """A multipart upload under way: our id of it, the key of its object, and the service's id."""

    upload: str
    key: str
    multipart: str

    @property
    def path(self) -> str:
        return _note_path(self.upload)


def _note_path(upload: str) -> str:
    return f"{UNFINISHED}/{upload}.json"


def _begin(bucket: Bucket, key: str, upload: str) -> _Note:
    """Begin a multipart upload and note it."""
    note = _Note(upload, key, bucket.begin(key, writer=upload))
    try:
        body = json.dumps({"key": key, "multipart": note.multipart}).encode()
        bucket.put(note.path, body, writer=upload)
    except BaseException:
        bucket.abort(key, note.multipart)
        raise
    return note


def _part(stored: StoredPart) -> Part:
    return Part(stored.number, stored.size, stored.sha256)


class S3Writer:
    """A stream into one object: small ones are sent in one request at `commit`, others in parts as they fill up."""

    def __init__(self, bucket: Bucket, pool: ThreadPoolExecutor, key: str, first_part: int) -> None:
        self._bucket, self._pool, self._key, self._first_part = bucket, pool, key, first_part
        self._id = parts.new_id()
        self._buffer = bytearray()
        self._note: _Note | None = None
        self._sent: list[StoredPart] = []
        self._sending: deque[Future[StoredPart]] = deque()
        self._stop = threading.Event()
        self._ended = False

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            room = part_size(self._begun + 1, self._first_part) - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]
            if view:  # what is exactly full waits: it may be the last part, or all
                self._send()

    def commit(self, *, if_absent: bool = False) -> ObjectInfo:
        try:
            if self._note is None:
                info = self._bucket.put(self._key, self._buffer, writer=self._id, if_absent=if_absent)
            else:
                self._send()
                self._wait(0)
                info = self._bucket.complete(
                    self._key, self._note.multipart, self._sent, writer=self._id, if_absent=if_absent
                )
                self._bucket.delete([self._note.path])
            self._ended = True
        finally:
            self.abort()
        return info

    def abort(self) -> None:
        self._buffer = bytearray()
        if self._ended:
            return
        self._ended = True
        self._stop.set()
        while self._sending:  # a part that arrives after the abort would stay
            future = self._sending.popleft()
            if not future.cancel():
                future.exception()
        if self._note is not None:
            with suppress(InfrastructureError):  # what stays, the next sweep finds by its note
                self._bucket.abort(self._key, self._note.multipart, patience=_ABORT_PATIENCE)
                self._bucket.delete([self._note.path])

    @property
    def _begun(self) -> int:
        return len(self._sent) + len(self._sending)

    def _send(self) -> None:
        """Hand the buffer to a thread; wait while enough are under way."""
        if self._note is None:
            self._note = _begin(self._bucket, self._key, self._id)
        self._wait(_IN_FLIGHT - 1)
        body, self._buffer = self._buffer, bytearray()
        self._sending.append(
            self._pool.submit(
                self._bucket.put_part, self._key, self._note.multipart, self._begun + 1, body, self._stop
            )
        )  # fmt: skip

    def _wait(self, most: int) -> None:
        while len(self._sending) > most:
            self._sent.append(self._sending[0].result())
            self._sending.popleft()


class _Reader(io.RawIOBase):
    """A seekable object. Ranges are fetched whole, and grow while they are read one after the other."""

    def __init__(self, bucket: Bucket, key: str, size: int, etag: str) -> None:
        self._bucket, self._key, self._size, self._etag = bucket, key, size, etag
        self._position = 0
        self._window, self._window_start = memoryview(b""), 0
        self._next_size = _FIRST_WINDOW

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self._position = base + offset
        return self._position

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        offset = self._position - self._window_start
        if not 0 <= offset < len(self._window):
            if self._position >= self._size or not view:
                return 0
            follows = offset == len(self._window) and offset > 0
            self._next_size = min(self._next_size * 2, _LARGEST_WINDOW) if follows else _FIRST_WINDOW
            wanted = min(max(self._next_size, min(len(view), _LARGEST_WINDOW)), self._size - self._position)
            self._window = memoryview(b"")  # the old one goes before the new one comes
            self._window = memoryview(self._bucket.get(self._key, self._position, wanted, etag=self._etag))
            self._window_start, offset = self._position, 0
        count = min(len(view), len(self._window) - offset)
        view[:count] = self._window[offset : offset + count]
        self._position += count
        return count

    def close(self) -> None:
        self._window = memoryview(b"")
        super().close()
