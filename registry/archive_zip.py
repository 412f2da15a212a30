"""A strict reader of zip files over any seekable stream, with bounded memory.

Python's zipfile takes the whole directory of a file into memory at once and accepts entries that overlap or disagree
with their own headers; both are ways to attack whoever unpacks. Here only what an ordinary writer makes is accepted:
stored or deflated members, names and sizes that agree, no overlap, CRC checked. Source: PKWARE APPNOTE 6.3.10.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

from registry.errors import UserError

_END = struct.Struct("<4s4H2LH")
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LARGEST_DIRECTORY = 64 << 20
_STORED, _DEFLATED = 0, 8
_CHUNK = 1 << 16


class ZipFault(UserError):
    """The zip is not acceptable. `code` is an archive code of registry.archive, `what` says what is wrong with it."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(
            code,
            f"The zip file cannot be used: {what}.",
            field="file",
            hint="Make it anew with an ordinary zip program, without a password, and upload it again.",
        )
        self.what = what


@dataclass(frozen=True)
class Entry:
    """A member as the directory describes it. Sizes in bytes; `mode` is the Unix mode or 0."""

    name: str
    size: int
    packed: int
    crc: int
    method: int
    encrypted: bool
    mode: int
    folder: bool
    data: int  # place of its first packed byte

    @property
    def is_link(self) -> bool:
        return self.mode & 0o170000 == 0o120000

    @property
    def is_special(self) -> bool:
        return self.mode & 0o170000 not in (0, 0o100000, 0o040000, 0o120000)


def is_zip(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a zip; self-extracting ones are not meant."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


def entries(stream: BinaryIO, most: int, *, model: bool = False) -> list[Entry]:
    """All members in the order of their places in the file. ZipFault if there are more than `most`, or anything odd.

    A `model` is read again by its library through Python's zipfile. What zipfile would read in another way than this
    reader does is refused there: a name given twice or by an extra field, and comments, which may hold a second end.
    """
    size = stream.seek(0, io.SEEK_END)
    count, directory_size, directory, tail = _end(stream, size, model=model)
    if count > most:
        raise ZipFault("archive_too_many_files", f"it has {count} members, {most} are allowed")
    if directory_size > _LARGEST_DIRECTORY:
        raise ZipFault("archive_too_large", f"its directory takes {directory_size} bytes")
    if directory + directory_size != tail:
        raise ZipFault("archive_unsupported", "its directory is not where its end says")
    stream.seek(directory)
    raw = _exactly(stream, directory_size)
    found: list[Entry] = []
    at = 0
    while at < len(raw):
        if len(found) == count:
            raise ZipFault("archive_unsupported", "its directory holds more members than its end says")
        entry, at = _central(raw, at, model=model)
        found.append(_local(stream, entry, directory))
    if len(found) != count:
        raise ZipFault("archive_truncated", "its directory holds fewer members than its end says")
    found.sort(key=lambda entry: entry.data)
    for before, after in pairwise(found):
        # the next one's local header, at least 30 bytes, must begin past the end of this one
        if before.data + before.packed + _LOCAL.size > after.data:
            raise ZipFault("archive_unsupported", "two of its members overlap")
    if model and len({entry.name for entry in found}) != len(found):
        raise ZipFault("archive_unsupported", "it holds a name twice")
    return found


def open_entry(stream: BinaryIO, entry: Entry) -> BinaryIO:
    """A member's bytes, unpacked as they are read. Size and CRC are checked at the end (ZipFault)."""
    if entry.encrypted:
        raise ZipFault("archive_encrypted", f"the member {entry.name!r} is encrypted")
    if entry.method not in (_STORED, _DEFLATED):
        raise ZipFault("archive_unsupported", f"the member {entry.name!r} is packed with method {entry.method}")
    return io.BufferedReader(_Unpacked(stream, entry), _CHUNK)


def _exactly(stream: BinaryIO, count: int) -> bytes:
    parts, missing = [], count
    while missing > 0:
        part = stream.read(missing)
        if not part:
            raise ZipFault("archive_truncated", "it ends early")
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _end(stream: BinaryIO, size: int, *, model: bool) -> tuple[int, int, int, int]:
    """(members, size of the directory, its place, place of the first byte after it)."""
    length = min(size, _END.size + 65535)
    stream.seek(size - length)
    tail = _exactly(stream, length)
    # the last signature that has a whole record after it, as in zipfile; an earlier one would be another directory
    at = tail.rfind(b"PK\x05\x06", 0, len(tail) - _END.size + 4)
    if at < 0:
        raise ZipFault("archive_truncated", "its directory at the end is missing")
    _, disk, first_disk, here, count, directory_size, directory, comment = _END.unpack_from(tail, at)
    if at + _END.size + comment != len(tail):
        raise ZipFault("archive_truncated", "something follows its end")
    if model and comment:
        raise ZipFault("archive_unsupported", "it has a comment")
    place = size - length + at
    if (found := _end64(stream, place)) is not None:
        old = (disk, first_disk, here, count, directory_size, directory)
        disk, first_disk, here, count, directory_size, directory, place = found
        if any(
            value not in (full, now)
            for value, now, full in zip(old, found, (*[0xFFFF] * 4, *[0xFFFFFFFF] * 2), strict=False)
        ):
            raise ZipFault("archive_unsupported", "its end and its 64-bit end differ")
    if disk or first_disk or here != count:
        raise ZipFault("archive_unsupported", "it is spread over several files")
    return count, directory_size, directory, place


def _end64(stream: BinaryIO, place: int) -> tuple[int, int, int, int, int, int, int] | None:
    """The 64-bit end that lies before the end at `place`, and its own place; None where there is none.

    It counts wherever its locator is, as in zipfile, which writes it from 2 GiB on.
    """
    if place < _END64_LOCATOR.size + _END64.size:
        return None
    stream.seek(place - _END64_LOCATOR.size)
    signature, disk, place64, disks = _END64_LOCATOR.unpack(_exactly(stream, _END64_LOCATOR.size))
    if signature != b"PK\x06\x07":
        return None
    if place64 != place - _END64_LOCATOR.size - _END64.size or disk or disks > 1:
        raise ZipFault("archive_unsupported", "it is spread over several files or damaged")
    stream.seek(place64)
    end = _END64.unpack(_exactly(stream, _END64.size))
    if end[0] != b"PK\x06\x06":
        raise ZipFault("archive_truncated", "its 64-bit end is damaged")
    return end[4], end[5], end[6], end[7], end[8], end[9], place64


def _central(raw: bytes, at: int, *, model: bool) -> tuple[Entry, int]:
    if len(raw) - at < _CENTRAL.size or raw[at : at + 4] != b"PK\x01\x02":
        raise ZipFault("archive_truncated", "its directory is damaged")
    fields = _CENTRAL.unpack_from(raw, at)
    made_by, flags, method, crc, packed, size = fields[1], fields[3], fields[4], *fields[7:10]
    name_length, extra_length, comment_length, disk, attributes, place = *fields[10:14], *fields[15:17]
    start = at + _CENTRAL.size
    end = start + name_length + extra_length + comment_length
    if end > len(raw):
        raise ZipFault("archive_truncated", "its directory is damaged")
    name_bytes = raw[start : start + name_length]
    extra = raw[start + name_length : start + name_length + extra_length]
    if 0xFFFFFFFF in (size, packed, place):
        size, packed, place = _extra64(extra, size, packed, place)
    if disk not in (0, 0xFFFF):
        raise ZipFault("archive_unsupported", "it is spread over several files")
    if flags & 0x20 or flags & 0x2000:
        raise ZipFault("archive_unsupported", "it has patched members or a hidden directory")
    if b"\0" in name_bytes:  # where zipfile ends a name
        raise ZipFault("archive_unsafe_path", "the name of a member has a NUL")
    if model and (_names_again(extra) or not (flags & 0x800 or name_bytes.isascii())):
        raise ZipFault("archive_unsupported", "the name of a member can be read in two ways")
    try:
        # without the UTF-8 flag the bytes are cp437 by the letter, yet many writers put UTF-8 there
        name = name_bytes.decode("utf-8")
    except UnicodeDecodeError:
        if flags & 0x800:
            raise ZipFault("archive_unsafe_path", "the name of a member is not UTF-8") from None
        name = name_bytes.decode("cp437")
    # the high half holds the Unix mode only where a Unix made the zip (3), or macOS (19)
    mode = attributes >> 16 if made_by >> 8 in (3, 19) else 0
    folder = name.endswith("/") or mode & 0o170000 == 0o040000
    return Entry(name, size, packed, crc, method, bool(flags & 1 or flags & 0x40), mode, folder, place), end


def _names_again(extra: bytes) -> bool:
    """Whether an extra field holds a name (Info-ZIP's Unicode path), or the fields are not whole."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 0x7075:
            return True
        at += 4 + length
    return at != len(extra)


def _extra64(extra: bytes, size: int, packed: int, place: int) -> tuple[int, int, int]:
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field = extra[at + 4 : at + 4 + length]
            values = []
            for value in (size, packed, place):
                if value == 0xFFFFFFFF:
                    if len(field) < 8:
                        raise ZipFault("archive_unsupported", "a 64-bit size is missing")
                    value, field = int.from_bytes(field[:8], "little"), field[8:]
                values.append(value)
            return values[0], values[1], values[2]
        at += 4 + length
    raise ZipFault("archive_unsupported", "a 64-bit size is missing")


def _local(stream: BinaryIO, entry: Entry, directory: int) -> Entry:
    """The entry with the place of its data, once its local header agrees with the directory."""
    stream.seek(entry.data)
    header = _LOCAL.unpack(_exactly(stream, _LOCAL.size))
    if header[0] != b"PK\x03\x04":
        raise ZipFault("archive_truncated", "a member is not where its directory says")
    flags, method, crc, packed, size, name_length, extra_length = header[2], header[3], *header[6:11]
    local_name = _exactly(stream, name_length)
    if local_name not in (_encoded(entry.name, "utf-8"), _encoded(entry.name, "cp437")):
        raise ZipFault("archive_unsupported", "the name of a member differs between its header and the directory")
    if method != entry.method or (flags & 1 and not entry.encrypted):
        raise ZipFault("archive_unsupported", "the packing of a member differs between its header and the directory")
    data = entry.data + _LOCAL.size + name_length + extra_length
    if data + entry.packed > directory:
        raise ZipFault("archive_unsupported", "a member reaches into the directory")
    if not flags & 8:
        # without a data descriptor sizes stand in the header; 64-bit ones in its extra field
        if 0xFFFFFFFF in (packed, size):
            size, packed, _ = _extra64(_exactly(stream, extra_length), size, packed, 0)
        if (size, packed, crc) != (entry.size, entry.packed, entry.crc):
            raise ZipFault("archive_unsupported", "the size of a member differs between its header and the directory")
    if entry.method == _STORED and entry.size != entry.packed and not entry.encrypted:
        raise ZipFault("archive_unsupported", "a stored member has two sizes")
    return Entry(**{**entry.__dict__, "data": data})


class Reopened(io.RawIOBase):
    """A seekable view of a stream that goes forward only: it is opened again to go back."""

    def __init__(self, open_stream: Callable[[], BinaryIO], size: int) -> None:
        self._open, self._size = open_stream, size
        self._stream: BinaryIO | None = None
        self._at = self._read = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        if self._stream is None or self._at < self._read:
            self._stream, self._read = self._open(), 0
        while self._read < self._at:
            skipped = self._stream.read(min(self._at - self._read, 1 << 20))
            if not skipped:
                return 0
            self._read += len(skipped)
        data = self._stream.read(len(target))
        target[: len(data)] = data
        self._read += len(data)
        self._at = self._read
        return len(data)


def _encoded(name: str, encoding: str) -> bytes | None:
    try:
        return name.encode(encoding)
    except UnicodeEncodeError:
        return None


class _Unpacked(io.RawIOBase):
    def __init__(self, stream: BinaryIO, entry: Entry) -> None:
        self._stream = stream
        self._entry = entry
        self._at = entry.data
        self._left = entry.packed
        self._given = 0
        self._crc = 0
        self._inflate = zlib.decompressobj(-15) if entry.method == _DEFLATED else None
        self._unpack: Callable[[int], bytes] = self._deflated if entry.method == _DEFLATED else self._stored
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        part = self._unpack(min(len(target), _CHUNK)) if len(target) else b""
        self._given += len(part)
        self._crc = zlib.crc32(part, self._crc)
        if self._given > self._entry.size:
            raise ZipFault("archive_bomb", f"the member {self._entry.name!r} is larger than its directory says")
        if not part and len(target):
            if self._given != self._entry.size or self._left or self._pending:
                raise ZipFault("archive_truncated", f"the member {self._entry.name!r} ends early")
            if self._crc != self._entry.crc:
                raise ZipFault("archive_truncated", f"the member {self._entry.name!r} has a wrong checksum")
        target[: len(part)] = part
        return len(part)

    def _packed(self, count: int) -> bytes:
        # other readers may have moved the stream
        self._stream.seek(self._at)
        part = self._stream.read(min(count, self._left))
        if not part and self._left:
            raise ZipFault("archive_truncated", f"the member {self._entry.name!r} ends early")
        self._at += len(part)
        self._left -= len(part)
        return part

    def _stored(self, count: int) -> bytes:
        return self._packed(count)

    def _deflated(self, count: int) -> bytes:
        inflate = self._inflate
        assert inflate is not None
        while not inflate.eof:
            packed = self._pending or self._packed(_CHUNK)
            try:
                part = inflate.decompress(packed, count)
            except zlib.error as error:
                raise ZipFault("archive_truncated", f"the member {self._entry.name!r} is damaged") from error
            self._pending = inflate.unconsumed_tail
            if part:
                return part
            if not packed:
                raise ZipFault("archive_truncated", f"the member {self._entry.name!r} ends early")
        if inflate.unused_data:
            raise ZipFault("archive_unsupported", f"something follows the member {self._entry.name!r}")
        return b""
