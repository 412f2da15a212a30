"""Walks through JSON and UBJSON of any size with bounded memory: wanted values are kept, all others are skipped.

`path` below is a tuple of object keys from the root. Raised are only `Cut` (the bytes end early), `Malformed`, and what
the stream itself raises.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

from registry.formats import bounded_json

Path = tuple[str, ...]

_CHUNK = 1 << 20
_DEEPEST = 200
_LONGEST_KEY = 1 << 20
_LARGEST_KEPT = 16 << 20  # bytes, of all kept values together
_MOST_VALUES = 30_000_000  # bounds the time of a UBJSON walk
_STRUCTURE = re.compile(rb'["{}\[\]]')
# A run of scalars, strings without escapes and flat arrays: most of a model, passed over at once. The group is not
# possessive, as Python 3.11.2 (Debian 12) matches too much then; its bound keeps the memory of what it remembers small.
_FLAT = re.compile(rb'(?:[^"{}\[\]]++|"[^"\\]*+"|\[[^"{}\[\]]*+\]){1,4096}')
_STRING_END = re.compile(rb'["\\]')
_SCALAR_END = re.compile(rb"[,\]}\s]")
_NOT_SPACE = re.compile(rb"[^ \t\r\n]")


class Cut(Exception):
    """The stream ends within a value."""


class Malformed(Exception):
    """The bytes are not what they should be; the message says why."""


def json_values(stream: BinaryIO, wanted: Callable[[Path], bool], inside: Callable[[Path], bool]) -> dict[Path, Any]:
    """The wanted values of a JSON document, by path. Objects for whose path `inside` is true are entered."""
    walk = _Json(stream, wanted, inside)
    walk.document()
    return walk.found


def ubjson_values(stream: BinaryIO, wanted: Callable[[Path], bool], inside: Callable[[Path], bool]) -> dict[Path, Any]:
    """The same of a UBJSON document (draft 12, big-endian, as XGBoost writes it)."""
    walk = _Ubjson(stream, wanted, inside)
    walk.document()
    return walk.found


class _Json:
    def __init__(self, stream: BinaryIO, wanted: Callable[[Path], bool], inside: Callable[[Path], bool]) -> None:
        self._stream = stream
        self._wanted = wanted
        self._inside = inside
        self._buffer = b""
        self._at = 0
        self._kept: list[bytes] | None = None
        self._kept_size = 0
        self.found: dict[Path, Any] = {}

    def document(self) -> None:
        self._value(())
        while self._fill():
            if _NOT_SPACE.search(self._buffer, self._at):
                raise Malformed("something follows its end")
            self._at = len(self._buffer)

    def _fill(self) -> bool:
        """Makes sure that a byte is there; False at the end of the stream."""
        if self._at < len(self._buffer):
            return True
        self._buffer, self._at = self._stream.read(_CHUNK), 0
        return bool(self._buffer)

    def _take(self, end: int) -> None:
        """Consumes the buffer up to `end`."""
        if self._kept is not None:
            self._kept.append(self._buffer[self._at : end])
            self._kept_size += end - self._at
            if self._kept_size > _LARGEST_KEPT:
                raise Malformed("its description is too large")
        self._at = end

    def _peek(self) -> int:
        """The next byte that is no space."""
        while self._fill():
            match = _NOT_SPACE.search(self._buffer, self._at)
            if match:
                self._take(match.start())
                return self._buffer[self._at]
            self._take(len(self._buffer))
        raise Cut

    def _expect(self, byte: bytes) -> None:
        if self._peek() != byte[0]:
            raise Malformed(f"a {byte.decode()!r} is missing")
        self._take(self._at + 1)

    def _value(self, path: Path) -> None:
        first = self._peek()
        if self._wanted(path):
            self._keep(path)
        elif first == 0x7B and self._inside(path):
            self._object(path)
        else:
            self._skip()

    def _keep(self, path: Path) -> None:
        if path in self.found:
            raise Malformed(f"it has {path[-1] if path else 'a value'!r} twice")
        self._kept = []
        self._skip()
        text, self._kept = b"".join(self._kept), None
        self.found[path] = _decoded(text)

    def _object(self, path: Path) -> None:
        self._expect(b"{")
        if self._peek() == 0x7D:
            self._take(self._at + 1)
            return
        while True:
            if self._peek() != 0x22:
                raise Malformed("a key is missing")
            size = self._kept_size
            self._kept = []
            self._skip()
            key, self._kept = b"".join(self._kept), None
            if self._kept_size - size > _LONGEST_KEY:
                raise Malformed("a key is too long")
            self._kept_size = size
            self._expect(b":")
            self._value((*path, str(_decoded(key))))
            if self._peek() == 0x7D:
                self._take(self._at + 1)
                return
            self._expect(b",")

    def _skip(self) -> None:
        first = self._peek()
        if first == 0x22:
            self._take(self._at + 1)
            self._string()
        elif first in b"{[":
            self._nested()
        elif first in b"]}:,":
            raise Malformed("a value is missing")
        else:
            self._scalar()

    def _scalar(self) -> None:
        length = 0
        while self._fill():
            match = _SCALAR_END.search(self._buffer, self._at)
            end = match.start() if match else len(self._buffer)
            length += end - self._at
            if length > 1000:
                raise Malformed("a number is too long")
            self._take(end)
            if match:
                return

    def _string(self) -> None:
        while self._fill():
            match = _STRING_END.search(self._buffer, self._at)
            if match is None:
                self._take(len(self._buffer))
                continue
            self._take(match.end())
            if match.group() == b'"':
                return
            if not self._fill():
                break
            self._take(self._at + 1)
        raise Cut

    def _nested(self) -> None:
        open_ones = bytearray()
        while self._fill():
            if open_ones and (flat := _FLAT.match(self._buffer, self._at)):
                self._take(flat.end())
                continue
            match = _STRUCTURE.search(self._buffer, self._at)
            if match is None:
                self._take(len(self._buffer))
                continue
            self._take(match.end())
            mark = match.group()
            if mark == b'"':
                self._string()
            elif mark in b"{[":
                open_ones += mark
                if len(open_ones) > _DEEPEST:
                    raise Malformed("it is nested too deeply")
            elif not open_ones or open_ones.pop() != (0x7B if mark == b"}" else 0x5B):
                raise Malformed("its brackets do not match")
            if not open_ones:
                return
        raise Cut


def _decoded(text: bytes) -> Any:
    bounded_json.check(text, "what it says of itself")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Malformed("it is not JSON") from error


_NUMBERS = {
    0x69: struct.Struct(">b"),
    0x55: struct.Struct(">B"),
    0x49: struct.Struct(">h"),
    0x6C: struct.Struct(">i"),
    0x4C: struct.Struct(">q"),
    0x64: struct.Struct(">f"),
    0x44: struct.Struct(">d"),
}
_LITERALS = {0x5A: None, 0x54: True, 0x46: False}


class _Ubjson:
    def __init__(self, stream: BinaryIO, wanted: Callable[[Path], bool], inside: Callable[[Path], bool]) -> None:
        self._stream = stream
        self._wanted = wanted
        self._inside = inside
        self._buffer = b""
        self._at = 0
        self._values = 0
        self._kept_size = 0
        self.found: dict[Path, Any] = {}

    def document(self) -> None:
        self._value((), self._byte(), keep=False, depth=0)
        if self._at < len(self._buffer) or self._stream.read(1):
            raise Malformed("something follows its end")

    def _read(self, count: int) -> bytes:
        if self._at + count > len(self._buffer):
            parts = [self._buffer[self._at :]]
            missing = count - len(parts[0])
            while missing > 0:
                part = self._stream.read(max(missing, 1 << 16))
                if not part:
                    raise Cut
                parts.append(part)
                missing -= len(part)
            self._buffer, self._at = b"".join(parts), 0
        self._at += count
        return self._buffer[self._at - count : self._at]

    def _byte(self) -> int:
        return self._read(1)[0]

    def _pass(self, count: int) -> None:
        while count > 0:
            step = min(count, _CHUNK)
            self._read(step)
            count -= step

    def _length(self) -> int:
        marker = self._byte()
        if marker not in b"iUIlL":
            raise Malformed("a length is missing")
        number = _NUMBERS[marker]
        length: int = number.unpack(self._read(number.size))[0]
        if length < 0:
            raise Malformed("a length is negative")
        return length

    def _charge(self, count: int) -> None:
        self._kept_size += count
        if self._kept_size > _LARGEST_KEPT:
            raise Malformed("its description is too large")

    def _text(self, length: int) -> str:
        if length > _LONGEST_KEY:
            raise Malformed("a name is too long")
        try:
            return self._read(length).decode()
        except UnicodeDecodeError as error:
            raise Malformed("a name is not UTF-8") from error

    def _value(self, path: Path, marker: int, *, keep: bool, depth: int) -> Any:
        """The value if it is to be kept, else None; `found` is filled on the way."""
        self._values += 1
        if self._values > _MOST_VALUES:
            raise Malformed("it has too many values")
        if depth > _DEEPEST:
            raise Malformed("it is nested too deeply")
        if not keep and self._wanted(path):
            if path in self.found:
                raise Malformed(f"it has {path[-1] if path else 'a value'!r} twice")
            self.found[path] = self._value(path, marker, keep=True, depth=depth)
            return None
        if keep:
            self._charge(8)
        if marker in _NUMBERS:
            number = _NUMBERS[marker]
            return number.unpack(self._read(number.size))[0]
        if marker in _LITERALS:
            return _LITERALS[marker]
        if marker == 0x53:
            length = self._length()
            if keep:
                self._charge(length)
                return self._text(length)
            return self._pass(length)
        if marker == 0x43:
            return chr(self._byte())
        if marker == 0x5B:
            return self._array(path, keep=keep, depth=depth)
        if marker == 0x7B:
            return self._object(path, keep=keep, depth=depth)
        raise Malformed(f"an unknown marker {marker:#04x}")

    def _sized(self) -> tuple[int | None, int | None, int]:
        """(type, count, first marker) of a container; type and count are None where it has none."""
        marker = self._byte()
        kind = None
        if marker == 0x24:
            kind = self._byte()
            marker = self._byte()
            if marker != 0x23:
                raise Malformed("a typed container has no length")
        if marker == 0x23:
            return kind, self._length(), 0
        return None, None, marker

    def _array(self, path: Path, *, keep: bool, depth: int) -> list[Any] | None:
        kind, count, marker = self._sized()
        items: list[Any] = []
        inner = (*path, "*")  # no path of a value that anybody wants
        if count is not None:
            if kind in _NUMBERS and not keep:
                self._pass(_NUMBERS[kind].size * count)
                return None
            if kind in _LITERALS:
                raise Malformed("an array without content")
            for _ in range(count):
                item = self._value(inner, self._byte() if kind is None else kind, keep=keep, depth=depth + 1)
                if keep:
                    items.append(item)
            return items if keep else None
        while marker != 0x5D:
            if marker != 0x4E:
                item = self._value(inner, marker, keep=keep, depth=depth + 1)
                if keep:
                    items.append(item)
            marker = self._byte()
        return items if keep else None

    def _object(self, path: Path, *, keep: bool, depth: int) -> dict[str, Any] | None:
        kind, count, marker = self._sized()
        if kind in _LITERALS:
            raise Malformed("an object without content")
        body: dict[str, Any] = {}
        enter = not keep and self._inside(path)
        seen = 0
        while True:
            if count is None:
                if marker == 0x7D:
                    break
                if marker == 0x4E:
                    marker = self._byte()
                    continue
                self._at -= 1  # the marker belongs to the key's length
            elif seen == count:
                break
            seen += 1
            length = self._length()
            if keep or enter:
                key = self._text(length)
            else:
                self._pass(length)
                key = "*"
            item = self._value(
                (*path, key) if enter else (*path, "*"),
                self._byte() if kind is None else kind,
                keep=keep,
                depth=depth + 1,
            )
            if keep:
                self._charge(length + 8)
                body[key] = item
            if count is None:
                marker = self._byte()
        return body if keep else None
