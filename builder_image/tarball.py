"""A tar stream whose bytes depend on nothing but paths, kinds, execute bits and contents (image-format §3).

Written by hand on POSIX.1-1988 ustar, because `tarfile` reads clocks, owners and modes from the disk and chooses its
PAX records by Python version. `size_of` knows the exact length before a byte is read, so an upload can declare it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from builder_image.hashing import Sha256
from registry.errors import InfrastructureError, UserError

CHUNK = 1 << 20
"""Longest piece that `stream` yields, in bytes."""

MTIME = 315_619_200
"""1980-01-02T00:00:00Z (image-format §3.3): the first day that is inside ZIP's range of years in every time zone."""

CREATED = "1980-01-02T00:00:00Z"

FILE_MODE = 0o644
PROGRAM_MODE = 0o755
FOLDER_MODE = 0o755
LINK_MODE = 0o777

_BLOCK = 512
_LARGEST_USTAR_SIZE = 8**11 - 1  # eleven octal digits

Kind = Literal["file", "dir", "symlink"]


@dataclass(frozen=True)
class Entry:
    """One member of a layer.

    `path` is relative to the root of the image, '/'-separated, without a leading or trailing slash. `size` is the
    length of a file's content and 0 for the others. `source` is where a file's content comes from. `link` is a
    symlink's target. With `sha256` (hex) the content is checked while it is streamed.
    """

    path: str
    mode: int
    size: int
    source: Path | bytes | None
    link: str | None
    kind: Kind
    sha256: str | None = None


def file(path: str, source: Path | bytes, *, program: bool = False, sha256: str | None = None) -> Entry:
    """A regular file; `program` sets the execute bits."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    return Entry(path, PROGRAM_MODE if program else FILE_MODE, size, source, None, "file", sha256)


def folder(path: str) -> Entry:
    return Entry(path, FOLDER_MODE, 0, None, None, "dir")


def symlink(path: str, target: str) -> Entry:
    """A symlink to `target`, absolute in the image or relative; it is written relative (image-format §3.6)."""
    if target.startswith("/"):
        target = posixpath.relpath(target, "/" + posixpath.dirname(path))
    return Entry(path, LINK_MODE, 0, None, target, "symlink")


def folders_above(path: str) -> list[Entry]:
    """The folders that lead to `path`, outermost first, without `path` itself."""
    parts = path.split("/")
    return [folder("/".join(parts[:n])) for n in range(1, len(parts))]


def entries_of_folder(root: Path, prefix: str) -> list[Entry]:
    """Every file, folder and symlink below `root`, placed under `prefix`, with the folders that lead there; sorted.

    Modes are reduced to "may be executed by its owner" (image-format §3.4), so that no umask matters. Raises UserError
    `unsafe_link` for a symlink that is absolute or leaves `root`, and `unsupported_file` for sockets, devices, pipes
    and for names that are not UTF-8.
    """
    prefix = prefix.strip("/")
    entries = [*folders_above(prefix), folder(prefix)] if prefix else []
    pending: list[tuple[str, str]] = [(os.fspath(root), "")]
    while pending:
        where, inside = pending.pop()
        with os.scandir(where) as found:
            for item in found:
                within = f"{inside}/{item.name}" if inside else item.name
                path = f"{prefix}/{within}" if prefix else within
                status = item.stat(follow_symlinks=False)
                if stat.S_ISLNK(status.st_mode):
                    target = os.readlink(item.path)
                    if _leaves(within, target):
                        raise UserError(
                            "unsafe_link",
                            f"{within} is a symlink to {target!r}, which is outside the folder that is packed",
                            field="files",
                            hint="replace the link by the file itself, or by a relative link inside the folder",
                        )
                    entries.append(Entry(path, LINK_MODE, 0, None, target, "symlink"))
                elif stat.S_ISDIR(status.st_mode):
                    entries.append(folder(path))
                    pending.append((item.path, within))
                elif stat.S_ISREG(status.st_mode):
                    mode = PROGRAM_MODE if status.st_mode & stat.S_IXUSR else FILE_MODE
                    entries.append(Entry(path, mode, status.st_size, Path(item.path), None, "file"))
                else:
                    raise UserError(
                        "unsupported_file",
                        f"{within} is neither a file, a folder nor a symlink",
                        field="files",
                        hint="remove sockets, pipes and devices from the folder",
                    )
    return ordered(entries)


def ordered(entries: Iterable[Entry]) -> list[Entry]:
    """The entries in the order of their paths' bytes (image-format §3.2), folders that are named twice only once.

    Raises UserError `duplicate_path` where anything but two equal folders shares a path, or a path is not allowed.
    """
    found: dict[str, Entry] = {}
    for entry in entries:
        _check(entry)
        earlier = found.setdefault(entry.path, entry)
        if earlier is not entry and not (earlier == entry and entry.kind == "dir"):
            raise UserError("duplicate_path", f"{entry.path} is in the layer twice", field="files")
    return sorted(found.values(), key=lambda entry: entry.path.encode())


def stream(entries: Sequence[Entry]) -> Iterator[bytes]:
    """The tar's bytes, in pieces of at most 1 MiB. The entries must be `ordered`.

    Raises InfrastructureError `source_changed` when a file is no longer as long as its entry says, and
    `digest_mismatch` when its content is not what `sha256` says; whatever was made of the pieces so far must then be
    thrown away.
    """
    _check_order(entries)
    for entry in entries:
        yield header(entry)
        if isinstance(entry.source, bytes):
            if len(entry.source) != entry.size:
                raise _changed(entry, len(entry.source))
            if entry.sha256 is not None and hashlib.sha256(entry.source).hexdigest() != entry.sha256:
                raise _mismatch(entry)
            for start in range(0, entry.size, CHUNK):
                yield entry.source[start : start + CHUNK]
        elif entry.source is not None:
            yield from _content(entry, entry.source)
        if padding := -entry.size % _BLOCK:
            yield bytes(padding)
    yield bytes(2 * _BLOCK)


def size_of(entries: Sequence[Entry]) -> int:
    """The exact number of bytes that `stream` yields."""
    return sum(len(header(entry)) + entry.size + -entry.size % _BLOCK for entry in entries) + 2 * _BLOCK


def header(entry: Entry) -> bytes:
    """The blocks before the content of one entry: a ustar header, after a PAX header where a field overflows (§3.5)."""
    _check(entry)
    path = entry.path + "/" if entry.kind == "dir" else entry.path
    records: dict[str, str] = {}
    link = entry.link or ""
    split = _split(path)
    if split is None:
        records["path"] = path
        split = ("", _ascii(path)[:100])
    if not link.isascii() or len(link) > 100:
        records["linkpath"] = link
    size = entry.size
    if size > _LARGEST_USTAR_SIZE:
        records["size"] = str(size)
        size = 0
    prefix, name = split
    kind = {"file": b"0", "dir": b"5", "symlink": b"2"}[entry.kind]
    block = _ustar(prefix, name, entry.mode, size, kind, _ascii(link)[:100])
    return _pax(records) + block if records else block


def _pax(records: dict[str, str]) -> bytes:
    body = b"".join(_record(key, records[key]) for key in sorted(records))
    return _ustar("", "././@PaxHeader", FILE_MODE, len(body), b"x", "") + body + bytes(-len(body) % _BLOCK)


def _record(key: str, value: str) -> bytes:
    """`LENGTH key=value\\n`, where LENGTH counts itself."""
    rest = b" " + key.encode() + b"=" + value.encode() + b"\n"
    length = len(rest) + len(str(len(rest)))
    length = len(rest) + len(str(length))
    return str(length).encode() + rest


def _ustar(prefix: str, name: str, mode: int, size: int, kind: bytes, link: str) -> bytes:
    fields = b"".join(
        [
            name.encode("ascii").ljust(100, b"\0"),
            b"%07o\0" % mode,
            b"0000000\0",  # uid 0 and gid 0: read by all, written by none
            b"0000000\0",
            b"%011o\0" % size,
            b"%011o\0" % MTIME,
            b" " * 8,  # the checksum counts its own field as spaces
            kind,
            link.encode("ascii").ljust(100, b"\0"),
            b"ustar\00000",
            bytes(32 + 32),  # no user or group names: they differ between systems
            b"0000000\0",
            b"0000000\0",
            prefix.encode("ascii").ljust(155, b"\0"),
            bytes(12),
        ]
    )
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


def _split(path: str) -> tuple[str, str] | None:
    """(prefix, name) for ustar's two fields, the prefix as short as may be, or None where the path needs PAX."""
    if not path.isascii():
        return None
    if len(path) <= 100:
        return "", path
    for at, letter in enumerate(path[:156]):
        if letter == "/" and at > 0 and 0 < len(path) - at - 1 <= 100:
            return path[:at], path[at + 1 :]
    return None


def _ascii(text: str) -> str:
    """What a reader without PAX sees."""
    return text.encode("ascii", "replace").decode()


def _content(entry: Entry, source: Path) -> Iterator[bytes]:
    left = entry.size
    check = Sha256(entry.size) if entry.sha256 is not None else None
    try:
        with source.open("rb", buffering=0) as content:
            while left:
                piece = content.read(min(CHUNK, left))
                if not piece:
                    raise _changed(entry, entry.size - left)
                left -= len(piece)
                if check is not None:
                    check.update(piece)
                yield piece
            if content.read(1):
                raise _changed(entry, entry.size + 1)
        if check is not None and check.hexdigest() != entry.sha256:
            raise _mismatch(entry)
    except OSError as error:
        raise InfrastructureError(
            "source_unreadable", f"{entry.path} cannot be read: {error.strerror or error}", hint="look at the disk"
        ) from error
    finally:
        if check is not None:
            check.close()


def _check(entry: Entry) -> None:
    parts = entry.path.split("/")
    problem = None
    if not entry.path or any(part in ("", ".", "..") for part in parts):
        problem = "is not a plain relative path"
    elif "\0" in entry.path or "\0" in (entry.link or ""):
        problem = "holds a NUL"
    elif not _is_text(entry.path) or not _is_text(entry.link or ""):
        problem = "is not UTF-8"
    elif parts[-1].startswith(".wh."):
        problem = "would be read as a whiteout, which deletes files of the layers below"
    elif entry.mode & ~0o777:
        problem = "has special mode bits (setuid, setgid or sticky)"
    if problem:
        shown = entry.path.encode("utf-8", "backslashreplace").decode()
        raise UserError(
            "unsupported_file", f"{shown!r} {problem}", field="files", hint="rename the file or leave it out"
        )
    if (entry.kind == "symlink") != (entry.link is not None) or (entry.kind == "file") != (entry.source is not None):
        raise ValueError(f"{entry.path}: a {entry.kind} with source {entry.source!r} and link {entry.link!r}")


def _check_order(entries: Sequence[Entry]) -> None:
    earlier = b""
    for entry in entries:
        path = entry.path.encode("utf-8", "surrogatepass")
        if path <= earlier:
            raise ValueError(f"{entry.path}: entries must be ordered and unique; use tarball.ordered")
        earlier = path


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leaves(path: str, target: str) -> bool:
    """Whether a symlink at `path` (relative to a root) points out of that root, judged by its text alone."""
    return target.startswith("/") or posixpath.normpath(posixpath.join(posixpath.dirname(path), target)).split("/")[
        0
    ] == ("..")


def _changed(entry: Entry, found: int) -> InfrastructureError:
    return InfrastructureError(
        "source_changed",
        f"{entry.path} was {entry.size} bytes long when the layer was planned and now has {found}"
        + (" or more" if found > entry.size else ""),
        hint="do not change the folder during a build; build again",
    )


def _mismatch(entry: Entry) -> InfrastructureError:
    return InfrastructureError(
        "digest_mismatch",
        f"the content of {entry.path} does not have the SHA-256 of the manifest ({entry.sha256})",
        hint="the stored file is damaged: upload the model again",
    )
