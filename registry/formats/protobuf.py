"""Protobuf's wire format, walked field by field with bounded memory and time; no parser of others sees the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_WINDOW = 1 << 16
_MOST_FIELDS = 20_000_000  # bounds the time
_LONGEST_TEXT = 1 << 16
_LARGEST_KEY = (1 << 32) - 1


class Fault(Exception):
    """The bytes are not what they should be."""

    def __init__(self, what: str, *, cut: bool = False) -> None:
        super().__init__(what)
        self.cut = cut


class Wire:
    """Reads at any place of a file through one window of 64 KiB."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream = stream
        self.size = size
        self._window = b""
        self._start = 0
        self._fields = 0
        self.last = (0, 0)  # number and wire type of the field that was begun last

    def read(self, at: int, count: int) -> bytes:
        offset = at - self._start
        if offset < 0 or offset + count > len(self._window):
            self._stream.seek(at)
            parts, missing = [], max(count, _WINDOW)
            while missing > 0:
                part = self._stream.read(missing)
                if not part:
                    break
                parts.append(part)
                missing -= len(part)
            self._window, self._start, offset = b"".join(parts), at, 0
        data = self._window[offset : offset + count]
        if len(data) < count:
            raise Fault("it ends within a field", cut=True)
        return data

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """(value, place after it)."""
        value = shift = 0
        while True:
            if at >= end:
                raise Fault("a number reaches past its message", cut=end >= self.size)
            offset = at - self._start
            byte = self._window[offset] if 0 <= offset < len(self._window) else self.read(at, 1)[0]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, at
            shift += 7
            if shift > 63:
                raise Fault("a number is too long")

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """(field number, wire type, place or value, length) of each field of a message. For wire type 0 the third is
        the value; else it is the place of the bytes."""
        at = start
        while at < end:
            self._fields += 1
            if self._fields > _MOST_FIELDS:
                raise Fault("it has too many fields")
            key, at = self.varint(at, end)
            if key > _LARGEST_KEY:
                # protobuf's own parser drops the upper bits, and would see another field than is seen here
                raise Fault("a field's key is too large")
            number, wire = self.last = key >> 3, key & 7
            if number == 0:
                raise Fault("a field has number 0")
            if wire == 0:
                value, at = self.varint(at, end)
                yield number, wire, value, 0
                continue
            if wire == 2:
                length, at = self.varint(at, end)
            elif wire in (1, 5):
                length = 8 if wire == 1 else 4
            else:
                raise Fault(f"a field has wire type {wire}")
            if length > end - at:
                raise Fault("a field reaches past its message", cut=end >= self.size)
            yield number, wire, at, length
            at += length

    def once(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """The same of a message whose fields are all singular. One that comes twice is a Fault: protobuf would take the
        last, or merge them."""
        seen: set[int] = set()
        for entry in self.fields(start, end):
            if entry[0] in seen:
                raise Fault(f"field {entry[0]} comes twice")
            seen.add(entry[0])
            yield entry

    def text(self, at: int, length: int) -> str:
        if length > _LONGEST_TEXT:
            raise Fault("a name is too long")
        try:
            return self.read(at, length).decode()
        except UnicodeDecodeError as error:
            raise Fault("a name is not UTF-8") from error
