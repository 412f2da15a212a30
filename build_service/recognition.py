"""Recognition and unpacking of uploads in bounded children, one for each upload.

A child (`registry.forkserver`, `registry.examination`) has a bound on memory, CPU time and wall time, no credential and
no hand in the store: the service opens files for it and writes what it unpacks. Its answers are checked here as a
request is: a child that was taken over by a file can say no more than a user could have.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, NoReturn, Protocol, Self

import structlog
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from registry import archive, examination, formats
from registry.errors import EkibenError, UserError
from registry.examination import Broken, Cut, Frame
from registry.forkserver import EXIT_CODE
from registry.formats import OpenFile, Recognised
from registry.manifest import check_path
from registry.store import ObjectMissing

log = structlog.get_logger(__name__)

_WALL_FACTOR = 6  # wall time allowed for each second of CPU time: others work on this machine too
_WALL_BASE = 60.0  # seconds on top: the store may be slow, and the forkserver not up yet
_END_SECONDS = 10.0  # in which the forkserver tells how a child ended
_SLOT_SECONDS = 0.2  # between two looks whether an upload that waits for its turn was given up
_MOST_HANDLES = 32  # files of a remote store that a child has open
_MESSAGES: dict[Frame, int] = {
    Frame.OPEN: examination.LARGEST_TEXT,
    Frame.READ: 64,
    Frame.CLOSE: examination.HANDLE.size,
    Frame.AGAIN: 0,
    Frame.MEMBER: examination.LARGEST_TEXT,
    Frame.PIECE: examination.LARGEST_PIECE,
    Frame.END: 0,
    Frame.FOUND: examination.LARGEST_ANSWER,
    Frame.PROBLEM: examination.LARGEST_ANSWER,
    Frame.COSTLY: 0,
    Frame.FAULT: 64 << 10,
}
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass(frozen=True)
class Bounds:
    """`memory`: bytes of a child. `seconds`: CPU time, and one second more for each `rate` bytes of an upload.
    `at_once`: children that run side by side; further uploads wait for their turn."""

    memory: int
    seconds: float
    at_once: int = 4
    rate: float = 8 << 20


class Cancelled(Exception):
    """The upload was given up."""


class Examination(Protocol):
    """The examination of one upload, from one thread at a time; `cancel` may come from another."""

    def unpack(self, path: str, size: int, open_file: OpenFile, limits: archive.Limits, sink: archive.Sink) -> bool:
        """Give the members of the file to the sink if it is an archive; whether it is one."""
        ...

    def recognise(self, sizes: Sequence[tuple[str, int]], open_file: OpenFile) -> Recognised: ...

    def cancel(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


Examine = Callable[[], Examination]
"""Begins the examination of an upload."""


class InProcess:
    """An examination without bounds, in the caller's thread: what a bounded one is compared with."""

    def unpack(self, path: str, size: int, open_file: OpenFile, limits: archive.Limits, sink: archive.Sink) -> bool:
        with open_file(path) as stream:
            packed = archive.is_archive(stream)
            if packed:
                archive.unpack(stream, limits, sink)
        return packed

    def recognise(self, sizes: Sequence[tuple[str, int]], open_file: OpenFile) -> Recognised:
        return formats.recognise(sizes, open_file)

    def cancel(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Forkserver:
    """The process that children are forked from. It is started when it is first needed, and again if it was killed."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds
        self._slots = threading.BoundedSemaphore(bounds.at_once)
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self) -> None:
        """Have it ready: it needs some tenths of a second to import the recognisers."""
        with self._lock:
            self._running()

    def begin(self) -> Bounded:
        """An examination in a child of its own, which is forked when it is first asked for something."""
        return Bounded(self._fork, self._bounds, self._slots)

    def close(self) -> None:
        """End it and its children."""
        with self._lock:
            self._closed = True
            self._end()

    def _fork(self) -> tuple[socket.socket, socket.socket]:
        """(channel, lease) of a new child."""
        channel, theirs = socket.socketpair()
        lease, kept = socket.socketpair()
        try:
            with theirs, kept, self._lock:
                for attempt in (1, 2):
                    try:
                        socket.send_fds(self._running(), [b"+"], [theirs.fileno(), kept.fileno()])
                        break
                    except OSError:
                        self._end()
                        if attempt == 2:
                            raise
        except BaseException:
            channel.close()
            lease.close()
            raise
        return channel, lease

    def _running(self) -> socket.socket:
        if self._closed:
            raise Cancelled
        if self._process is not None and self._process.poll() is not None:
            log.warning("forkserver ended", code=self._process.returncode)
            self._end()
        if self._control is None:
            self._control, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-s", "-P", "-m", "registry.forkserver", str(theirs.fileno()),
                     str(self._bounds.memory)],
                    # Where this process finds its packages, and nothing else that it knows.
                    env={"PYTHONPATH": os.pathsep.join(place for place in sys.path if place), "PYTHONUTF8": "1"},
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )  # fmt: skip
        return self._control

    def _end(self) -> None:
        if self._control is not None:
            self._control.close()  # at this end of file it kills its children, and ends
            self._control = None
        if self._process is not None:
            try:
                self._process.wait(_END_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


class Bounded:
    """An examination in a child with bounds."""

    def __init__(
        self,
        fork: Callable[[], tuple[socket.socket, socket.socket]],
        bounds: Bounds,
        slots: threading.BoundedSemaphore | None = None,
    ) -> None:
        self._fork, self._bounds = fork, bounds
        self._slots = slots or threading.BoundedSemaphore(bounds.at_once)
        self._has_slot = False
        self._lock = threading.Lock()
        self._sockets: tuple[socket.socket, socket.socket] | None = None
        self._cancelled = False
        self._handles: dict[int, BinaryIO] = {}
        self._next_handle = 1
        self._deadline = 0.0

    def unpack(self, path: str, size: int, open_file: OpenFile, limits: archive.Limits, sink: archive.Sink) -> bool:
        order = {"job": "unpack", "path": path, "limits": limits.__dict__}
        answer = self._ask(order, size, {path: size}, open_file, _Members(sink))
        try:
            return _Unpacked.model_validate_json(answer).archive
        except ValidationError as error:
            self._broken(str(error))

    def recognise(self, sizes: Sequence[tuple[str, int]], open_file: OpenFile) -> Recognised:
        order = {"job": "recognise", "sizes": [list(pair) for pair in sizes]}
        answer = self._ask(order, sum(size for _, size in sizes), dict(sizes), open_file, None)
        try:
            found = _RECOGNISED.validate_json(answer, strict=True)
        except ValidationError as error:
            self._broken(str(error))
        if found.format not in formats.FORMATS or found.kind not in (None, formats.project.KIND):
            self._broken(f"a format {found.format!r} of the kind {found.kind!r}")
        return found

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._sockets is not None:
                channel, lease = self._sockets
                with suppress(OSError):
                    lease.shutdown(socket.SHUT_RDWR)  # the forkserver kills the child
                with suppress(OSError):
                    channel.shutdown(socket.SHUT_RDWR)  # whoever waits for it is woken

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._handles.values():
            stream.close()
        self._handles = {}
        with self._lock:
            if self._sockets is not None:
                for each in self._sockets:
                    each.close()
                self._sockets = None
        if self._has_slot:
            self._has_slot = False
            self._slots.release()

    # --- talking with the child -------------------------------------------------------------------------------------

    def _child(self) -> tuple[socket.socket, socket.socket]:
        while not self._has_slot:
            if self._cancelled:
                raise Cancelled
            self._has_slot = self._slots.acquire(timeout=_SLOT_SECONDS)
        with self._lock:
            if self._cancelled:
                raise Cancelled
            if self._sockets is None:
                self._sockets = self._fork()
            return self._sockets

    def _ask(
        self,
        order: Mapping[str, object],
        size: int,
        known: dict[str, int],
        open_file: OpenFile,
        members: _Members | None,
    ) -> bytes:
        """The child's answer to an order; meanwhile its files are opened and its members are stored."""
        channel, lease = self._child()
        seconds = self._bounds.seconds + size / self._bounds.rate
        self._deadline = time.monotonic() + seconds * _WALL_FACTOR + _WALL_BASE
        whole = {**order, "size": size, "cpu_base": self._bounds.seconds, "cpu_rate": self._bounds.rate}
        try:
            self._send(channel, Frame.ORDER, json.dumps(whole).encode())
            while True:
                kind, content = self._next(channel)
                if kind is Frame.FOUND:
                    return content
                if kind in (Frame.PROBLEM, Frame.COSTLY, Frame.FAULT):
                    self._failed(kind, content)
                if kind in (Frame.OPEN, Frame.READ, Frame.CLOSE):
                    self._file(channel, kind, content, known, open_file)
                elif members is not None:
                    members.take(kind, content)
                    self._deadline += len(content) / self._bounds.rate * _WALL_FACTOR
                else:
                    raise Broken(f"a frame {kind.name}")
        except Cut:
            self._ended(lease)
        except TimeoutError:
            self._refuse_costly("more time")
        except Broken as broken:
            self._broken(str(broken))

    def _next(self, channel: socket.socket) -> tuple[Frame, bytes]:
        self._watch(channel)
        return examination.read_frame(channel, _MESSAGES)

    def _send(self, channel: socket.socket, kind: Frame, content: bytes = b"") -> None:
        self._watch(channel)
        examination.write_frame(channel, kind, content)

    def _watch(self, channel: socket.socket) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        channel.settimeout(left)

    def _file(
        self, channel: socket.socket, kind: Frame, content: bytes, known: dict[str, int], open_file: OpenFile
    ) -> None:
        if kind is Frame.CLOSE:
            (handle,) = examination.HANDLE.unpack(content.ljust(examination.HANDLE.size, b"\0"))
            if (stream := self._handles.pop(handle, None)) is not None:
                stream.close()
        elif kind is Frame.READ:
            handle, place, count = examination.unpack_read(content)
            if (stream := self._handles.get(handle)) is None:
                raise Broken("a READ of what is not open")
            stream.seek(place)
            self._send(channel, Frame.CONTENT, stream.read(count))
        else:
            self._open(channel, content, known, open_file)

    def _open(self, channel: socket.socket, content: bytes, known: dict[str, int], open_file: OpenFile) -> None:
        path = _text(content)
        if path not in known:
            raise Broken(f"an OPEN of {path[:100]!r}")
        try:
            stream = open_file(path)
        except ObjectMissing:
            self._send(channel, Frame.MISSING)
            return
        try:
            descriptor = stream.fileno()
        except (OSError, AttributeError, io.UnsupportedOperation):
            if len(self._handles) >= _MOST_HANDLES:
                stream.close()
                raise Broken("too many open files") from None
            handle, self._next_handle = self._next_handle, self._next_handle + 1
            self._handles[handle] = stream
            self._send(channel, Frame.REMOTE, examination.HANDLE.pack(handle) + known[path].to_bytes(8, "big"))
        else:
            with stream:
                self._watch(channel)
                examination.write_descriptor(channel, descriptor)

    # --- what went wrong --------------------------------------------------------------------------------------------

    def _failed(self, kind: Frame, content: bytes) -> NoReturn:
        if kind is Frame.COSTLY:
            self._refuse_costly(f"more than {self._bounds.memory >> 20} MiB of memory")
        if kind is Frame.FAULT:
            log.error("recognition failed", trace=content.decode(errors="replace"))
            _refuse_failed("its examination failed")
        try:
            told = _Problem.model_validate_json(content)
        except ValidationError as error:
            self._broken(str(error))
        raise UserError(told.code, told.detail, field=told.field, hint=told.hint, status=told.status)

    def _ended(self, lease: socket.socket) -> NoReturn:
        """The channel was closed: the upload was given up, or the child has ended."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
        lease.settimeout(_END_SECONDS)
        try:
            (code,) = EXIT_CODE.unpack(lease.recv(EXIT_CODE.size).ljust(EXIT_CODE.size, b"\0"))
        except OSError:
            code = 0
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            self._refuse_costly("more time or memory")
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"code {code}"
        log.error("recognition ended", code=code)
        _refuse_failed(f"the process that examined it ended with {name}")

    def _broken(self, what: str) -> NoReturn:
        self.cancel()
        log.error("recognition broke its protocol", what=what[:500])
        _refuse_failed("its examination gave no usable answer")

    def _refuse_costly(self, what: str) -> NoReturn:
        self.cancel()
        raise UserError(
            "upload_too_costly",
            f"Examining the upload needs {what} than an upload of its size may take."
            if what.startswith("more time")
            else f"Examining the upload needs {what}.",
            field="file",
            hint="Save the model again without what is not part of it; for a model that needs more, raise "
            "EKIBEN_RECOGNITION_MEMORY or EKIBEN_RECOGNITION_SECONDS.",
        )


class _Members:
    """Frames of an archive's members, in their only possible order, for a sink."""

    def __init__(self, sink: archive.Sink) -> None:
        self._sink, self._open = sink, False

    def take(self, kind: Frame, content: bytes) -> None:
        if (kind in (Frame.PIECE, Frame.END)) != self._open:
            raise Broken(f"a frame {kind.name} in the wrong place")
        if kind is Frame.MEMBER:
            self._sink.begin_file(check_path(_text(content), code="archive_unsafe_path", field="file"))
            self._open = True
        elif kind is Frame.PIECE:
            self._sink.write(content)
        elif kind is Frame.END:
            self._sink.end_file()
            self._open = False
        else:
            self._sink.begin_again()


class _Unpacked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    archive: bool


class _Problem(BaseModel):
    """An error that the child may raise: a user's, never one that looks like the service's own."""

    model_config = ConfigDict(strict=True)

    code: str = Field(pattern=_CODE.pattern, max_length=64)
    detail: str = Field(max_length=4000)
    status: int = Field(ge=400, le=499)
    field: str | None = Field(None, max_length=500)
    hint: str | None = Field(None, max_length=4000)


_RECOGNISED = TypeAdapter(Recognised)


def _text(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Broken("a path that is not UTF-8") from None


def _refuse_failed(what: str) -> NoReturn:
    raise UserError(
        "recognition_failed",
        f"The upload cannot be examined: {what}.",
        field="file",
        hint="Save the model again and upload it; if it fails again, report it with the service's log.",
    )


__all__ = ["Bounded", "Bounds", "Cancelled", "EkibenError", "Examination", "Examine", "Forkserver", "InProcess"]
