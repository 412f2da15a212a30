"""Archives, streamed member by member; nothing is ever extracted by a library, and nothing is written here.

    for member in archive.members(stream):      # tar, tar.gz, tar.bz2, tar.xz (any stream) or zip (a seekable one)
        store(member.path, member.reader)
    archive.unpack(stream, limits, sink)        # the same without a folder that all files share

A bad archive raises a UserError, possibly after some members were given: the upload fails whole, so whoever stores must
throw away what was stored. `scan` finds every fault beforehand where the stream can be read twice.
Codes: archive_unsafe_path, archive_link, archive_device, archive_duplicate, archive_case_collision, archive_bomb,
archive_too_many_files, archive_too_large, archive_truncated, archive_encrypted, archive_unsupported, archive_empty.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, Protocol

from registry import archive_zip
from registry.archive_tar import is_tar, tar_members
from registry.errors import UserError
from registry.manifest import check_path, collision_key

_CHUNK = 1 << 16
_RATIO_FROM = 64 << 20  # unpacked bytes below which no ratio is too high
_XZ_MEMORY = 128 << 20

# Folders and files that no model needs; a link or a device inside them does no harm, as it is passed over
CLUTTER_FOLDERS = frozenset(
    {"__MACOSX", ".git", ".hg", ".svn", "__pycache__", ".venv", "venv", ".tox", ".nox", ".mypy_cache", ".ruff_cache",
     ".pytest_cache", ".ipynb_checkpoints", ".idea", ".vscode", "node_modules"}
)  # fmt: skip
CLUTTER_FILES = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})


@dataclass(frozen=True)
class Limits:
    """`files` members that count, `total` unpacked bytes, `ratio` of unpacked to packed bytes, `depth` of folders,
    `headers` bytes of what a tar says of its members besides their own headers: long names, extended headers."""

    files: int = 10_000
    total: int = 64 << 30
    ratio: int = 200
    depth: int = 16
    headers: int = 32 << 20

    @property
    def entries(self) -> int:
        """Members and headers of any sort, folders and clutter too: each costs time."""
        return 10 * self.files + 1000


@dataclass(frozen=True)
class Member:
    """A regular file: its safe relative path, its size in bytes, and its bytes, to be read before the next member."""

    path: str
    size: int
    reader: BinaryIO


def sort_of(head: bytes) -> str | None:
    """`zip`, `tar`, `gz`, `bz2`, `xz`, or None, from a file's first 512 bytes. A gz need not hold a tar."""
    if archive_zip.is_zip(head):
        return "zip"
    if head.startswith(b"\x1f\x8b\x08"):
        return "gz"
    if head.startswith(b"BZh") and head[4:10] == b"1AY&SY":
        return "bz2"
    if head.startswith(b"\xfd7zXZ\0"):
        return "xz"
    return "tar" if is_tar(head) else None


def is_archive(stream: BinaryIO) -> bool:
    """Whether a seekable file is an archive of files; a zip that is a model itself (skops, .keras, torch's) is none.
    The stream is left at its start."""
    stream.seek(0)
    try:
        head = stream.read(512)
        sort = sort_of(head)
        if sort == "zip":
            names = {entry.name for entry in archive_zip.entries(stream, Limits().entries)}
            return not (
                "schema.json" in names
                or {"config.json", "metadata.json"} <= names
                or any(name == "data.pkl" or name.endswith("/data.pkl") for name in names)
            )
        if sort in ("gz", "bz2", "xz"):
            stream.seek(0)
            return is_tar(_read_block(unpacked(stream, sort)))
        return sort == "tar"
    except UserError:
        # a damaged one is an archive all the same: its fault is better told as an archive's
        return True
    finally:
        stream.seek(0)


class Sink(Protocol):
    """Takes the files of an archive, one after the other. After `begin_again` those given before do not count."""

    def begin_again(self) -> None: ...

    def begin_file(self, path: str) -> None: ...

    def write(self, data: bytes | memoryview) -> None: ...

    def end_file(self) -> None: ...


def members(stream: BinaryIO, limits: Limits | None = None, *, clutter: bool = False) -> Iterator[Member]:
    """The regular files of an archive, one at a time, each path checked.

    `clutter` keeps version control, caches and virtual environments, which are passed over otherwise.
    """
    yield from _members(stream, limits or Limits(), strip=False, clutter=clutter)


def unpack(stream: BinaryIO, limits: Limits, sink: Sink) -> None:
    """Give the regular files of a seekable archive to the sink, without the folder that all of them share, if there is
    one (`model/a`, `model/b`). It is read once, or twice where a later file does not share the first one's folder."""
    start = stream.tell()
    try:
        _give(_members(stream, limits, strip=True, clutter=False), sink)
    except _NoSharedFolder:
        sink.begin_again()
        stream.seek(start)
        _give(_members(stream, limits, strip=False, clutter=False), sink)


def _give(inner: Iterator[Member], sink: Sink) -> None:
    for member in inner:
        sink.begin_file(member.path)
        while data := member.reader.read(1 << 20):
            sink.write(data)
        sink.end_file()


def scan(stream: BinaryIO, limits: Limits | None = None, *, clutter: bool = False) -> list[tuple[str, int]]:
    """(path, size) of each file, once the whole archive was read and found sound."""
    found = []
    for member in _members(stream, limits or Limits(), strip=False, clutter=clutter):
        while member.reader.read(1 << 20):
            pass
        found.append((member.path, member.size))
    return found


class _NoSharedFolder(Exception):
    """The files of the archive do not share the folder that its first ones have."""


def _members(stream: BinaryIO, limits: Limits, *, strip: bool, clutter: bool) -> Iterator[Member]:
    head, stream = _peeked(stream)
    sort = sort_of(head)
    if sort is None:
        known = {b"7z\xbc\xaf\x27\x1c": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd"}
        name = next((word for magic, word in known.items() if head.startswith(magic)), None)
        _refuse(
            "archive_unsupported",
            f"The file is {'a ' + name if name else 'no'} archive{'' if name else ' that is known here'}.",
            "Send a .tar.gz or a .zip.",
        )
    check = _Check(limits, strip, clutter)
    inner = _zip(stream, check) if sort == "zip" else _tar(stream, sort, check)
    empty = True
    for member in inner:
        empty = False
        yield member
    if empty:
        _refuse("archive_empty", "The archive holds no file.", "Put the model's files into it.")


class _Check:
    """What one archive has shown so far."""

    def __init__(self, limits: Limits, strip: bool, clutter: bool) -> None:
        self.limits = limits
        self._top: str | None = None if strip else ""  # None: the first file says
        self._clutter = clutter
        self._seen: dict[str, tuple[str, bool]] = {}
        self._files = self._entries = self._total = self._headers = 0

    def path(self, name: str, sort: str) -> str | None:
        """The path to give a regular file; None for what is passed over."""
        self._count_entry()
        while name.startswith("./"):
            name = name[2:].lstrip("/")
        if sort == "folder":
            name = name.rstrip("/")
            if name in ("", "."):
                return None
        check_path(name, code="archive_unsafe_path", field="file")
        parts = name.split("/")
        if len(parts) - 1 > self.limits.depth:
            _refuse(
                "archive_unsafe_path",
                f"{name[:100]!a} lies more than {self.limits.depth} folders deep.",
                "Pack the model's own folder, without the folders above it.",
            )
        if not self._clutter and (
            not CLUTTER_FOLDERS.isdisjoint(parts if sort == "folder" else parts[:-1])
            or (sort != "folder" and (parts[-1] in CLUTTER_FILES or parts[-1].startswith("._")))
            or (sort == "link" and parts[-1] in CLUTTER_FOLDERS)
        ):
            return None
        if sort == "link":
            _refuse(
                "archive_link",
                f"{name[:100]!a} is a link.",
                "Pack the files themselves: tar --dereference --hard-dereference -czf model.tar.gz FOLDER.",
            )
        if sort == "device":
            _refuse("archive_device", f"{name[:100]!a} is a device or a pipe.", "Pack regular files only.")
        self._collide(parts, sort == "folder")
        if sort == "folder":
            return None
        self._files += 1
        if self._files > self.limits.files:
            self._too_many(self._files - 1)
        return self._stripped(name)

    def _stripped(self, name: str) -> str:
        if self._top is None:
            self._top = name.partition("/")[0] if "/" in name else ""
        if not self._top:
            return name
        if not name.startswith(f"{self._top}/"):
            raise _NoSharedFolder
        return name.removeprefix(f"{self._top}/")

    def header(self, size: int) -> None:
        """Counts a header that says more of members, of so many bytes."""
        self._count_entry()
        self._headers += size
        if self._headers > self.limits.headers:
            _refuse(
                "archive_bomb",
                f"The archive has more than {self.limits.headers} bytes of extended headers.",
                "Pack the files without their extended attributes: tar --format=ustar -czf model.tar.gz FOLDER.",
            )

    def _count_entry(self) -> None:
        self._entries += 1
        if self._entries > self.limits.entries:
            self._too_many(self._entries - 1)

    def size(self, name: str, size: int) -> None:
        """Counts the unpacked bytes of a member, passed over or not."""
        self._total += size
        if self._total > self.limits.total:
            _refuse_total(self.limits, f"at {name[:100]!a}")

    def _collide(self, parts: list[str], folder: bool) -> None:
        for end in range(1, len(parts) + 1):
            path, is_folder = "/".join(parts[:end]), folder or end < len(parts)
            key = collision_key(path)
            there = self._seen.get(key)
            if there is None:
                self._seen[key] = (path, is_folder)
            elif there[0] != path:
                _refuse(
                    "archive_case_collision",
                    f"{path[:100]!a} and {there[0][:100]!a} are one name on some systems.",
                    "Rename one of them.",
                )
            elif not (is_folder and there[1]):
                what = "is there twice" if is_folder == there[1] else "is both a file and a folder"
                _refuse("archive_duplicate", f"{path[:100]!a} {what}.", "Make the archive anew.")

    def _too_many(self, count: int) -> NoReturn:
        _refuse(
            "archive_too_many_files",
            f"The archive holds more than {count} members.",
            "Pack the model's files only, without data sets or environments.",
            413,
        )


def _tar(stream: BinaryIO, sort: str, check: _Check) -> Iterator[Member]:
    plain = stream if sort == "tar" else unpacked(stream, sort, check.limits)
    if sort != "tar":
        head, plain = _peeked(plain)
        if not is_tar(head):
            _refuse(
                "archive_unsupported",
                f"The file is {sort}-compressed and holds no tar archive.",
                "Send it unpacked, or pack it with: tar -czf model.tar.gz FILE.",
            )
    for member in tar_members(plain, check.header):
        path = check.path(member.name, member.sort)
        check.size(member.name, member.size)
        if path is not None:
            yield Member(path, member.size, member.reader)


def _zip(stream: BinaryIO, check: _Check) -> Iterator[Member]:
    if not stream.seekable():
        raise ValueError("a zip needs a seekable stream")
    found = archive_zip.entries(stream, check.limits.entries)
    paths = []
    packed = unpacked = 0
    for entry in found:
        sort = "folder" if entry.folder else "link" if entry.is_link else "device" if entry.is_special else "file"
        path = check.path(entry.name, sort)
        check.size(entry.name, entry.size)
        packed, unpacked = packed + entry.packed, unpacked + entry.size
        if path is not None and entry.encrypted:
            _refuse("archive_encrypted", f"{entry.name[:100]!a} is encrypted.", "Make the zip without a password.")
        paths.append(path)
    _check_ratio(packed, unpacked, check.limits)
    for entry, path in zip(found, paths, strict=True):
        if path is not None:
            yield Member(path, entry.size, archive_zip.open_entry(stream, entry))


def check_zip(found: Sequence[archive_zip.Entry], limits: Limits | None = None) -> None:
    """UserError where the members of a zip that stays packed, as a model does, unpack to too much: whoever loads it
    unpacks it."""
    limits = limits or Limits()
    for entry in found:
        _check_ratio(entry.packed, entry.size, limits)
    total = sum(entry.size for entry in found)
    _check_ratio(sum(entry.packed for entry in found), total, limits)
    if total > limits.total:
        _refuse_total(limits, "its members together")


def _check_ratio(packed: int, unpacked: int, limits: Limits) -> None:
    if unpacked > _RATIO_FROM and unpacked > packed * limits.ratio:
        _refuse(
            "archive_bomb",
            f"The archive unpacks to more than {limits.ratio} times its size.",
            "If the model really is that empty, upload its files without packing them.",
        )


def _peeked(stream: BinaryIO) -> tuple[bytes, BinaryIO]:
    """The first 512 bytes, and a stream that still gives them."""
    if stream.seekable():
        start = stream.tell()
        head = _read_block(stream)
        stream.seek(start)
        return head, stream
    head = _read_block(stream)
    return head, io.BufferedReader(_Joined(head, stream), 1 << 20)


def _read_block(stream: BinaryIO) -> bytes:
    head = b""
    while len(head) < 512 and (part := stream.read(512 - len(head))):
        head += part
    return head


class _Joined(io.RawIOBase):
    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        part = self._head[: len(target)] if self._head else self._rest.read(len(target))
        self._head = self._head[len(part) :]
        target[: len(part)] = part
        return len(part)


def unpacked(stream: BinaryIO, sort: str, limits: Limits | None = None) -> BinaryIO:
    """What a `gz`, `bz2` or `xz` stream holds, unpacked as it is read, within the limits on total and ratio."""
    return io.BufferedReader(_Unpacked(stream, sort, limits or Limits()), _CHUNK)


class _Unpacked(io.RawIOBase):
    """gzip, bzip2 or xz, unpacked as it is read, with a bound on size and ratio; several in a row are one stream."""

    def __init__(self, stream: BinaryIO, sort: str, limits: Limits) -> None:
        self._stream = stream
        self._sort = sort
        self._limits = limits
        self._machine: Any = self._new()
        self._pending = b""
        self._packed = self._given = 0
        self._over = False

    def readable(self) -> bool:
        return True

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        part = self._next(min(len(target), 1 << 20))
        self._given += len(part)
        _check_ratio(self._packed, self._given, self._limits)
        # headers and padding come on top of the members, which are counted themselves
        if self._given > self._limits.total + (self._limits.entries + 40) * 2048:
            _refuse(
                "archive_too_large",
                f"The archive unpacks to more than {self._limits.total} bytes.",
                "Send a smaller model, or raise the limit in the service's settings.",
                413,
            )
        target[: len(part)] = part
        return len(part)

    def _new(self) -> Any:
        if self._sort == "gz":
            return zlib.decompressobj(31)
        if self._sort == "bz2":
            return bz2.BZ2Decompressor()
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)

    def _more(self) -> bytes:
        part = self._stream.read(_CHUNK)
        self._packed += len(part)
        return part

    def _next(self, count: int) -> bytes:
        while not self._over:
            if self._machine.eof:
                rest = self._machine.unused_data or self._pending or self._more()
                while rest and not rest.strip(b"\0"):
                    rest = self._more()  # padding
                if not rest:
                    self._over = True
                    break
                self._machine, self._pending = self._new(), rest.lstrip(b"\0")
            asks = self._sort == "gz" or self._machine.needs_input
            data = (self._pending or self._more()) if asks else b""
            try:
                part: bytes = self._machine.decompress(data, count)
            except (zlib.error, OSError, lzma.LZMAError, EOFError) as error:
                _refuse(
                    "archive_truncated",
                    f"The {self._sort}-compressed data is damaged ({type(error).__name__}).",
                    "Make the archive anew and upload it again.",
                )
            self._pending = self._machine.unconsumed_tail if self._sort == "gz" else b""
            if part:
                return part
            if asks and not data and not self._machine.eof:
                _refuse("archive_truncated", "The compressed data ends early.", "Upload the archive again, whole.")
        return b""


def _refuse_total(limits: Limits, where: str) -> NoReturn:
    _refuse(
        "archive_too_large",
        f"The archive unpacks to more than {limits.total} bytes ({where}).",
        "Send a smaller model, or raise the limit in the service's settings.",
        413,
    )


def _refuse(code: str, detail: str, hint: str, status: int | None = None) -> NoReturn:
    raise UserError(code, detail, field="file", hint=hint, status=status)
