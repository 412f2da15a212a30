"""What a bounded child does with an upload, and the frames in which it talks with the service.

The child (`registry.forkserver`) holds no path, no credential and no address: it asks the service for each file that it
reads, and gets a descriptor, or ranges of bytes where the store has no local file. What it unpacks and what it finds
goes back as frames, which the service checks as it checks a request.

A frame is a letter, the length of its content (4 bytes, big-endian), and the content.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import socket
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from types import FrameType
from typing import Any, BinaryIO, cast

from registry import archive, formats
from registry.errors import EkibenError
from registry.formats.upload import Recognised

LARGEST_ANSWER = 4 << 20  # bytes of what was found
LARGEST_TEXT = 64 << 10  # bytes of a path or an order's small values
LARGEST_PIECE = 256 << 10  # bytes of content in one frame
LARGEST_ORDER = 64 << 20  # bytes of an order: it lists every file of the upload
_LONGEST_FAULT = 4000  # characters of a traceback
_DEEPEST_EXAMPLE = 32
_HEADER = struct.Struct(">cI")
_READ = struct.Struct(">IQI")
HANDLE = struct.Struct(">I")
_MIB = 1 << 20
_ORDINARY_SECONDS = 0.25  # CPU time after which a child is no ordinary upload's, and gets a lower priority


class Frame(StrEnum):
    """What a frame is: orders and contents come from the service, all others from the child."""

    ORDER = "o"
    DESCRIPTOR = "d"  # the answer to OPEN: a descriptor comes along
    REMOTE = "r"  # the answer to OPEN: the handle of a file that is read by READ
    CONTENT = "c"  # the answer to READ
    MISSING = "m"  # the answer to OPEN or READ: the file cannot be read
    OPEN = "O"  # a path
    READ = "R"  # handle, place, count
    CLOSE = "C"  # a handle
    AGAIN = "A"  # forget the members given so far
    MEMBER = "M"  # a path; its PIECEs follow, then END
    PIECE = "P"
    END = "E"
    FOUND = "F"  # the answer to an order: a JSON document
    PROBLEM = "X"  # the same: an error's document
    COSTLY = "Y"  # the same: more memory was needed than there may be
    FAULT = "Z"  # the same: a traceback


class Cut(Exception):
    """The other side has gone."""


class Broken(Exception):
    """The other side sent what it must not."""


def write_frame(channel: socket.socket, kind: Frame, content: bytes | memoryview = b"") -> None:
    try:
        channel.sendall(_HEADER.pack(kind.value.encode(), len(content)))
        if content:
            channel.sendall(content)
    except OSError as error:
        raise Cut from error


def write_descriptor(channel: socket.socket, descriptor: int) -> None:
    try:
        socket.send_fds(channel, [_HEADER.pack(Frame.DESCRIPTOR.value.encode(), 0)], [descriptor])
    except OSError as error:
        raise Cut from error


def read_frame(channel: socket.socket, longest: dict[Frame, int]) -> tuple[Frame, bytes]:
    """The next frame, if it is of a kind in `longest` and no longer than that says."""
    kind, length = _kind(_exactly(channel, _HEADER.size), longest)
    return kind, _exactly(channel, length)


def _kind(header: bytes, longest: dict[Frame, int]) -> tuple[Frame, int]:
    letter, length = _HEADER.unpack(header)
    try:
        kind = Frame(letter.decode("latin-1"))
    except ValueError:
        raise Broken(f"a frame {letter!r}") from None
    if length > longest.get(kind, -1):
        raise Broken(f"a frame {kind.name} of {length} bytes")
    return kind, length


def _exactly(channel: socket.socket, count: int) -> bytes:
    data = bytearray(count)
    view, at = memoryview(data), 0
    try:
        while at < count:
            got = channel.recv_into(view[at:])
            if not got:
                raise Cut
            at += got
    except TimeoutError:
        raise
    except OSError as error:
        raise Cut from error
    return bytes(data)


# --- the child's side -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Seconds of CPU time that a job may take: `base`, and one more for each `rate` bytes that it reads or gives."""

    base: float
    rate: float

    def seconds(self, size: int) -> float:
        return self.base + size / self.rate


def serve(channel: socket.socket) -> None:
    """Do what the service orders until it hangs up."""
    with suppress(Cut):
        while True:
            _, order = read_frame(channel, {Frame.ORDER: LARGEST_ORDER})
            _answer(channel, json.loads(order))


def _answer(channel: socket.socket, order: dict[str, Any]) -> None:
    try:
        clock = _Clock(Budget(order["cpu_base"], order["cpu_rate"]), order["size"])
        found = _JOBS[order["job"]](channel, order, clock)
    except EkibenError as error:
        problem = {**error.problem(), "detail": error.detail}
        write_frame(channel, Frame.PROBLEM, json.dumps(problem).encode()[:LARGEST_ANSWER])
    except MemoryError:
        write_frame(channel, Frame.COSTLY)
    except Cut:
        raise
    except Exception:  # a fault of a recogniser: told to the operator, not to the user
        write_frame(channel, Frame.FAULT, traceback.format_exc()[-_LONGEST_FAULT:].encode(errors="replace"))
    else:
        write_frame(channel, Frame.FOUND, found)


def _recognise(channel: socket.socket, order: dict[str, Any], clock: _Clock) -> bytes:
    del clock
    sizes = {str(path): int(size) for path, size in order["sizes"]}
    return encoded(formats.recognise(sizes, _opener(channel)))


def _unpack(channel: socket.socket, order: dict[str, Any], clock: _Clock) -> bytes:
    limits = archive.Limits(**order["limits"])
    with _opener(channel)(order["path"]) as stream:
        packed = archive.is_archive(stream)
        if packed:
            archive.unpack(stream, limits, _Sender(channel, clock))
    return json.dumps({"archive": packed}).encode()


_JOBS: dict[str, Callable[[socket.socket, dict[str, Any], Any], bytes]] = {"recognise": _recognise, "unpack": _unpack}


def encoded(found: Recognised) -> bytes:
    """What was recognised, as JSON of at most LARGEST_ANSWER bytes. What is too much for that is left out, the least
    important first: the files that belong to the model, the example, then the columns' levels, then the columns."""
    body: dict[str, Any] = {
        **found.__dict__,
        "signature": None if found.signature is None else found.signature.to_json(),
        "parts": sorted(found.parts),
        "example": found.example if _depth(found.example) <= _DEEPEST_EXAMPLE else None,
    }
    for leave_out in (_nothing, _without_parts, _without_example, _without_levels, _without_columns):
        leave_out(body)
        with suppress(ValueError, RecursionError):
            data = json.dumps(body, allow_nan=False).encode()
            if len(data) <= LARGEST_ANSWER:
                return data
    raise EkibenError(
        "invalid_model",
        "The description of the model's inputs and outputs is too large, or holds numbers that are not finite.",
        field="file",
        hint="Give the model fewer inputs and outputs, or shorter names.",
        status=422,
    )


def _nothing(body: dict[str, Any]) -> None: ...


def _without_parts(body: dict[str, Any]) -> None:
    body["parts"] = []  # the service asks for the model's path alone


def _without_example(body: dict[str, Any]) -> None:
    body["example"] = None


def _without_levels(body: dict[str, Any]) -> None:
    if (signature := body["signature"]) is not None:
        signature["classes"] = None
        for column in signature["columns"]:
            column.pop("categories", None)
        body["notes"] = [*body["notes"], "The levels of its columns are too many to be checked."]


def _without_columns(body: dict[str, Any]) -> None:
    if (signature := body["signature"]) is not None:
        signature["columns"], signature["named"] = [], False


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level and depth <= _DEEPEST_EXAMPLE:
        depth += 1
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return depth


class _Clock:
    """This process's limit of CPU time, which grows with what it has given."""

    def __init__(self, budget: Budget, size: int) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        self._budget = budget
        self._end = used.ru_utime + used.ru_stime + budget.seconds(size)
        self._set()

    def gave(self, count: int) -> None:
        before = int(self._end)
        self._end += count / self._budget.rate
        if int(self._end) > before:
            self._set()

    def _set(self) -> None:
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (int(self._end) + 1, hard))


class _Sender:
    """Members of an archive as frames."""

    def __init__(self, channel: socket.socket, clock: _Clock) -> None:
        self._channel, self._clock = channel, clock

    def begin_again(self) -> None:
        write_frame(self._channel, Frame.AGAIN)

    def begin_file(self, path: str) -> None:
        write_frame(self._channel, Frame.MEMBER, path.encode())

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for at in range(0, len(view), LARGEST_PIECE):
            write_frame(self._channel, Frame.PIECE, view[at : at + LARGEST_PIECE])
        self._clock.gave(len(view))

    def end_file(self) -> None:
        write_frame(self._channel, Frame.END)


def _opener(channel: socket.socket) -> Callable[[str], BinaryIO]:
    def open_file(path: str) -> BinaryIO:
        write_frame(channel, Frame.OPEN, path.encode())
        header, descriptors, _, _ = socket.recv_fds(channel, _HEADER.size, 1)
        header += _exactly(channel, _HEADER.size - len(header))
        longest = {Frame.DESCRIPTOR: 0, Frame.REMOTE: HANDLE.size + 8, Frame.MISSING: 0}
        kind, length = _kind(header, longest)
        content = _exactly(channel, length)
        if kind is Frame.DESCRIPTOR:
            return open(descriptors[0], "rb", buffering=_MIB)
        if kind is Frame.MISSING:
            raise OSError(f"{path!r} cannot be read")
        (handle,), size = HANDLE.unpack_from(content), int.from_bytes(content[HANDLE.size :], "big")
        return cast(BinaryIO, io.BufferedReader(_Remote(channel, handle, size), LARGEST_PIECE))

    return open_file


class _Remote(io.RawIOBase):
    """A file that the service reads for us, range by range."""

    def __init__(self, channel: socket.socket, handle: int, size: int) -> None:
        self._channel, self._handle, self._size = channel, handle, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, target: memoryview) -> int:  # type: ignore[override]
        count = min(len(target), LARGEST_PIECE, max(0, self._size - self._at))
        if not count:
            return 0
        write_frame(self._channel, Frame.READ, _READ.pack(self._handle, self._at, count))
        kind, data = read_frame(self._channel, {Frame.CONTENT: count, Frame.MISSING: 0})
        if kind is Frame.MISSING:
            raise OSError("the store did not give the file")
        target[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            with suppress(Cut):
                write_frame(self._channel, Frame.CLOSE, HANDLE.pack(self._handle))
        super().close()


def unpack_read(content: bytes) -> tuple[int, int, int]:
    """(handle, place, count) of a READ."""
    if len(content) != _READ.size:
        raise Broken("a READ of another length")
    handle, place, count = _READ.unpack(content)
    if count > LARGEST_PIECE:
        raise Broken("a READ of too much")
    return handle, place, count


def confine(memory: int) -> None:
    """Bound this process for good, before it sees a byte of an upload. `memory`: bytes on top of what it has mapped."""
    os.setsid()
    limits = [
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (getattr(resource, "RLIMIT_NPROC", None), 0),
        (resource.RLIMIT_AS, _mapped() + memory if sys.platform == "linux" else None),
    ]
    for limit, value in limits:
        if limit is not None and value is not None:
            with suppress(ValueError, OSError):  # macOS knows some of them by name alone
                resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGPROF, _step_back)
    signal.setitimer(signal.ITIMER_PROF, _ORDINARY_SECONDS)


def _step_back(_signal: int, _frame: FrameType | None) -> None:
    """From now on all that answers requests goes first."""
    with suppress(OSError):
        os.nice(10)


def _mapped() -> int:
    """Bytes of this process's address space."""
    with open("/proc/self/statm") as counts:
        return int(counts.read().split()[0]) * resource.getpagesize()
