"""A strict reader of tar streams: forward only, with bounded memory, nothing ever written.

Python's tarfile resolves links, honours sparse maps and takes names and sizes from several places with its own rules;
several escapes came from there (CVE-2025-4517, CVE-2025-4330). Here only regular files and folders are known, a second
opinion on a name or a size is refused, and whoever reads decides where bytes go.
Source: POSIX.1-2017 pax; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from registry.errors import UserError

_BLOCK = 512
_LARGEST_EXTRA = 1 << 20  # bytes of a pax header or a long name
_MOST_RECORDS = 1000  # of one pax header
_CHUNK = 1 << 20
_ZEROS = bytes(_BLOCK)


class TarFault(UserError):
    """The tar is not acceptable. `code` is an archive code of registry.archive."""

    def __init__(self, code: str, what: str, hint: str | None = None) -> None:
        super().__init__(
            code,
            f"The tar archive cannot be used: {what}.",
            field="file",
            hint=hint or "Make it anew with: tar -czf model.tar.gz FOLDER; and upload it again.",
        )


@dataclass(frozen=True)
class TarMember:
    """`sort` is file, folder, link or device; `reader` gives a file's bytes until the next member is asked for."""

    name: str
    sort: str
    size: int
    reader: BinaryIO


def is_tar(head: bytes) -> bool:
    """Whether a file whose first 512 bytes are `head` is a tar."""
    return len(head) >= _BLOCK and head[:_BLOCK] != _ZEROS and _checksum_fits(head[:_BLOCK])


def tar_members(stream: BinaryIO, count_header: Callable[[int], None]) -> Iterator[TarMember]:
    """The members of a tar, in order. TarFault where it is cut, or anything but an ordinary archive.

    `count_header` is called with the size in bytes of each header that is no member, before it is read."""
    long_name: bytes | None = None
    pax: dict[str, str] | None = None
    while True:
        header = _read(stream, _BLOCK)
        if len(header) < _BLOCK:
            _cut("its end is missing")
        if header == _ZEROS:
            break
        if not _checksum_fits(header):
            raise TarFault("archive_truncated", "a header is damaged")
        size = _number(header[124:136], "size")
        flag = header[156:157]
        if flag in (b"L", b"K", b"x", b"g"):
            count_header(size)
            content = _extra(stream, size)
            if flag == b"L":
                if long_name is not None:
                    _odd("a member has two long names")
                long_name = content.rstrip(b"\0")
            elif flag == b"x":
                if pax is not None:
                    _odd("a member has two extended headers")
                pax = _pax(content)
            elif flag == b"g" and not {"path", "linkpath", "size"}.isdisjoint(_pax(content)):
                _odd("a global header sets names or sizes")
            continue
        name, size = _resolved(header, size, long_name, pax)
        long_name = pax = None
        sort = _sort(flag, name)
        if sort != "file" and size:
            _odd(f"a {sort} has content")
        reader = _Content(stream, size)
        yield TarMember(name, sort, size, io.BufferedReader(reader, _CHUNK))
        reader.finish()
        padding = -size % _BLOCK
        if len(_read(stream, padding)) < padding:
            _cut("it ends within a member")
    if long_name is not None or pax is not None:
        _cut("its last member is missing")
    while rest := stream.read(_CHUNK):
        if rest.strip(b"\0"):
            _odd("something follows its end")


def _resolved(header: bytes, size: int, long_name: bytes | None, pax: dict[str, str] | None) -> tuple[str, int]:
    if long_name is not None and pax is not None and "path" in pax:
        _odd("a member has two long names")
    raw = long_name
    if raw is None:
        raw = header[:100].partition(b"\0")[0]
        if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
            raw = prefix + b"/" + raw
    if pax is not None:
        if any(key.startswith("GNU.sparse") for key in pax):
            _odd("it has sparse files", "Make it without --sparse (-S).")
        if "size" in pax:
            text = pax["size"]
            if not text.isascii() or not text.isdigit() or len(text) > 18:
                _odd("a size is no number")
            size = int(text)
        if "path" in pax:
            return pax["path"], size
    try:
        return raw.decode(), size
    except UnicodeDecodeError:
        raise TarFault("archive_unsafe_path", "the name of a member is not UTF-8") from None


def _sort(flag: bytes, name: str) -> str:
    if flag in (b"0", b"\0", b"7"):
        # the oldest tars mark folders by the name alone
        return "folder" if name.endswith("/") else "file"
    if flag == b"5":
        return "folder"
    if flag in (b"1", b"2"):
        return "link"
    if flag in (b"3", b"4", b"6"):
        return "device"
    if flag == b"S":
        _odd("it has sparse files", "Make it without --sparse (-S).")
    _odd(f"it has a member of type {flag.decode('latin-1')!r}")


def _pax(content: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n`."""
    records: dict[str, str] = {}
    at = count = 0
    while at < len(content):
        count += 1
        if count > _MOST_RECORDS:
            raise TarFault("archive_bomb", f"an extended header has more than {_MOST_RECORDS} records")
        space = content.find(b" ", at, at + 12)
        digits = content[at:space] if space > at else b""
        if not digits.isdigit():
            _odd("an extended header is malformed")
        end = at + int(digits)
        if end > len(content) or end <= space + 2 or content[end - 1 : end] != b"\n":
            _odd("an extended header is malformed")
        key, equals, value = content[space + 1 : end - 1].partition(b"=")
        try:
            word, text = key.decode(), value.decode()
        except UnicodeDecodeError:
            if key in (b"path", b"linkpath"):
                raise TarFault("archive_unsafe_path", "the name of a member is not UTF-8") from None
            word, text = "?", ""  # owners, attributes: of no interest
        if not equals or (word in records and word in ("path", "size", "linkpath")):
            _odd("an extended header is malformed")
        if word == "hdrcharset" and text != "ISO-IR 10646 2000 UTF-8":
            _odd("its names are not in UTF-8")
        records[word] = text
        at = end
    return records


def _extra(stream: BinaryIO, size: int) -> bytes:
    if size > _LARGEST_EXTRA:
        raise TarFault("archive_bomb", f"an extended header has {size} bytes")
    content = _read(stream, size + -size % _BLOCK)
    if len(content) < size + -size % _BLOCK:
        _cut("it ends within a header")
    return content[:size]


def _number(field: bytes, what: str) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    if field[0] == 0xFF:
        _odd(f"a {what} is negative")
    text = field.rstrip(b"\0 ").lstrip(b" ")
    if not text:
        return 0
    if not all(0x30 <= digit <= 0x37 for digit in text):
        _odd(f"a {what} is no number")
    return int(text, 8)


def _checksum_fits(header: bytes) -> bool:
    text = header[148:156].strip(b"\0 ")
    if not text or not all(0x30 <= digit <= 0x37 for digit in text):
        return False
    plain = header[:148] + b" " * 8 + header[156:]
    # some old tars sum signed bytes
    return int(text, 8) in (sum(plain), sum(plain) - 256 * sum(byte > 127 for byte in plain))


def _read(stream: BinaryIO, count: int) -> bytes:
    parts = []
    while count > 0:
        part = stream.read(count)
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _cut(what: str) -> NoReturn:
    raise TarFault("archive_truncated", what)


def _odd(what: str, hint: str | None = None) -> NoReturn:
    raise TarFault("archive_unsupported", what, hint)


class _Content(io.RawIOBase):
    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self._left = size
        self._over = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        if self._over:
            raise ValueError("this member was left behind: read it before asking for the next one")
        count = min(len(target), self._left)
        if not count:
            return 0
        part = self._stream.read(count)
        if not part:
            _cut("it ends within a member")
        self._left -= len(part)
        target[: len(part)] = part
        return len(part)

    def finish(self) -> None:
        """Passes over what nobody read."""
        self._over = True
        while self._left:
            part = self._stream.read(min(self._left, _CHUNK))
            if not part:
                _cut("it ends within a member")
            self._left -= len(part)
