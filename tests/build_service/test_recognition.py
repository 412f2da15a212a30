"""Uploads are examined in children with bounds, which say no more than a user could."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import psutil
import pytest

from build_service.recognition import Bounded, Bounds, Cancelled, Forkserver
from registry import archive, examination, formats
from registry.errors import UserError
from registry.examination import Frame

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]

MIB = 1 << 20
BOUNDS = Bounds(memory=64 * MIB, seconds=0.1)


@pytest.fixture(scope="module")
def forkserver() -> Iterator[Forkserver]:
    server = Forkserver(BOUNDS)
    server.start()
    yield server
    server.close()


def process(forkserver: Forkserver) -> psutil.Process:
    assert forkserver._process is not None
    return psutil.Process(forkserver._process.pid)


def opened(data: bytes, tmp_path: Path) -> Callable[[str], BinaryIO]:
    file = tmp_path / "model"
    file.write_bytes(data)
    return lambda _path: file.open("rb")


def safetensors(note: bytes) -> bytes:
    header = b'{"__metadata__":{"note":"' + note + b'"}}'
    return len(header).to_bytes(8, "little") + header


def endless() -> bytes:
    """UBJSON of so many values that a walk through it takes many seconds."""
    count = 8_000_000
    return b"{U\x07learner{U\x01a[#l" + struct.pack(">i", count) + b"i\x01" * count + b"}}"


def test_what_a_child_finds_is_what_the_recognisers_find(forkserver: Forkserver, tmp_path: Path) -> None:
    data = safetensors(b"small")
    expected = formats.recognise([("m.safetensors", len(data))], lambda _: io.BytesIO(data))
    with forkserver.begin() as examined:
        assert examined.recognise([("m.safetensors", len(data))], opened(data, tmp_path)) == expected
    with forkserver.begin() as examined:  # of a store without local files
        assert examined.recognise([("m.safetensors", len(data))], lambda _: io.BytesIO(data)) == expected
    shards = [(f"{number}.safetensors", len(data)) for number in range(3)]
    with forkserver.begin() as examined:
        found = examined.recognise(shards, opened(data, tmp_path))
    assert (found.path, found.parts) == ("0.safetensors", frozenset({"1.safetensors", "2.safetensors"}))


def test_an_error_of_the_user_comes_through_whole(forkserver: Forkserver, tmp_path: Path) -> None:
    data = b"\x80\x04pickle."
    with pytest.raises(UserError) as told, forkserver.begin() as examined:
        examined.recognise([("m.pkl", len(data))], opened(data, tmp_path))
    with pytest.raises(UserError) as expected:
        formats.recognise([("m.pkl", len(data))], lambda _: io.BytesIO(data))
    assert told.value.problem() == expected.value.problem()
    assert told.value.code == "pickle_refused"


def test_memory_is_bounded(forkserver: Forkserver, tmp_path: Path) -> None:
    data = safetensors(b"x" * (60 * MIB))
    with pytest.raises(UserError) as error, forkserver.begin() as examined:
        examined.recognise([("m.safetensors", len(data))], opened(data, tmp_path))
    assert (error.value.code, error.value.status) == ("upload_too_costly", 422)
    assert "64 MiB of memory" in error.value.detail
    assert error.value.hint


def test_cpu_time_is_bounded(tmp_path: Path) -> None:
    forkserver = Forkserver(Bounds(memory=512 * MIB, seconds=0.1, rate=1 << 40))
    data = endless()
    try:
        with pytest.raises(UserError) as error, forkserver.begin() as examined:
            examined.recognise([("m.ubj", len(data))], opened(data, tmp_path))
        assert error.value.code == "upload_too_costly"
        assert not process(forkserver).children()
    finally:
        forkserver.close()


def test_an_upload_that_is_given_up_ends_its_child(forkserver: Forkserver, until: Callable[..., Any]) -> None:
    examined = forkserver.begin()

    def open_file(_path: str) -> BinaryIO:
        assert len(process(forkserver).children()) == 1
        examined.cancel()
        return io.BytesIO(b"tree\n")

    with pytest.raises(Cancelled), examined:
        examined.recognise([("m.txt", 5)], open_file)
    until(lambda: not process(forkserver).children())
    with pytest.raises(Cancelled), examined:
        examined.recognise([("m.txt", 5)], open_file)


def test_uploads_beyond_the_bound_wait_for_their_turn_and_can_be_given_up_meanwhile(tmp_path: Path) -> None:
    server = Forkserver(Bounds(memory=64 * MIB, seconds=0.1, at_once=1))
    data = safetensors(b"small")
    order = [("m.safetensors", len(data))]
    found: list[str] = []

    def examine(examined: Any) -> None:
        try:
            with examined:
                found.append(examined.recognise(order, opened(data, tmp_path)).format)
        except Cancelled:
            found.append("given up")

    try:
        waits, given_up = server.begin(), server.begin()
        threads = [threading.Thread(target=examine, args=(each,)) for each in (waits, given_up)]

        def open_file(_path: str) -> BinaryIO:
            if not found:  # a model is opened more than once
                for thread in threads:
                    thread.start()
                given_up.cancel()
                threads[1].join(30)
            assert found == ["given up"]
            assert len(process(server).children()) == 1
            return io.BytesIO(data)

        with server.begin() as examined:
            examined.recognise(order, open_file)
        threads[0].join(30)
        assert found == ["given up", "safetensors"]
    finally:
        server.close()


def test_a_child_that_crashes_takes_nothing_along(forkserver: Forkserver) -> None:
    def open_file(_path: str) -> BinaryIO:
        process(forkserver).children()[0].send_signal(signal.SIGSEGV)
        return io.BytesIO(b"tree\n")

    with pytest.raises(UserError, match="SIGSEGV") as error, forkserver.begin() as examined:
        examined.recognise([("m.txt", 5)], open_file)
    assert error.value.code == "recognition_failed"
    data = safetensors(b"small")
    with forkserver.begin() as examined:
        assert examined.recognise([("m", len(data))], lambda _: io.BytesIO(data)).format == "safetensors"


def test_a_forkserver_that_was_killed_is_started_again(forkserver: Forkserver, until: Callable[..., Any]) -> None:
    killed = process(forkserver)
    killed.kill()
    until(lambda: killed.status() == psutil.STATUS_ZOMBIE)
    data = safetensors(b"small")
    with forkserver.begin() as examined:
        assert examined.recognise([("m", len(data))], lambda _: io.BytesIO(data)).format == "safetensors"


def test_children_end_with_the_service(until: Callable[..., Any]) -> None:
    forkserver = Forkserver(BOUNDS)
    with forkserver.begin() as examined:
        examined._child()
        family = [process(forkserver)]
        until(lambda: family[0].children())
        family += family[0].children()
        forkserver.close()
        until(lambda: not any(each.is_running() for each in family))


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Linux shows a process's variables")
def test_nothing_that_the_service_knows_is_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_TOKEN", "very-secret")
    forkserver = Forkserver(BOUNDS)
    forkserver.start()
    try:
        with forkserver.begin() as examined:
            examined._child()
            if os.geteuid() == 0:  # others may not look: it is not dumpable
                told = Path(f"/proc/{process(forkserver).pid}/environ").read_bytes()
                assert {entry.partition(b"=")[0] for entry in told.split(b"\0") if entry} <= {
                    b"PYTHONPATH",
                    b"PYTHONUTF8",
                }
    finally:
        forkserver.close()


# --- a child that was taken over --------------------------------------------------------------------------------------


class Taken:
    """The other end of an examination, in the hands of whoever wrote the file."""

    def __init__(self, *frames: tuple[Frame, bytes]) -> None:
        self._frames = frames
        self.seen: list[bytes] = []

    def fork(self) -> tuple[socket.socket, socket.socket]:
        channel, theirs = socket.socketpair()
        lease, kept = socket.socketpair()
        threading.Thread(target=self._play, args=(theirs, kept), daemon=True).start()
        return channel, lease

    def _play(self, channel: socket.socket, lease: socket.socket) -> None:
        with channel, lease, suppress(examination.Cut):
            examination.read_frame(channel, {Frame.ORDER: MIB})
            for kind, content in self._frames:
                examination.write_frame(channel, kind, content)
            lease.recv(1)  # until the service gives it up


class Kept:
    def __init__(self) -> None:
        self.paths: list[str] = []

    def begin_again(self) -> None:
        self.paths = []

    def begin_file(self, path: str) -> None:
        self.paths.append(path)

    def write(self, data: bytes | memoryview) -> None: ...

    def end_file(self) -> None: ...


FOUND = {
    "format": "safetensors",
    "path": "m",
    "kind": None,
    "signature": None,
    "notes": [],
    "example": None,
    "needs": [],
}


@pytest.mark.parametrize(
    "frames",
    [
        [(Frame.FOUND, b"not json")],
        [(Frame.FOUND, json.dumps({**FOUND, "format": "pickle"}).encode())],
        [(Frame.FOUND, json.dumps({**FOUND, "kind": "ranker"}).encode())],
        [(Frame.FOUND, json.dumps({**FOUND, "path": 3}).encode())],
        [(Frame.FOUND, json.dumps({**FOUND, "notes": "text"}).encode())],
        [(Frame.PROBLEM, json.dumps({"code": "internal_error", "detail": "x", "status": 500}).encode())],
        [(Frame.PROBLEM, json.dumps({"code": "UPPER CASE", "detail": "x", "status": 422}).encode())],
        [(Frame.OPEN, b"../../ekiben.db")],
        [(Frame.OPEN, b"\xff")],
        [(Frame.READ, bytes(16))],
        [(Frame.READ, b"short")],
        [(Frame.MEMBER, b"a")],
        [(Frame.ORDER, b"{}")],
        [(Frame.FOUND, b" " * (examination.LARGEST_ANSWER + 1))],
    ],
    ids=lambda frames: f"{frames[0][0].name}-{frames[0][1][:40]!r}",
)
def test_what_a_child_may_not_say_is_not_believed(frames: list[tuple[Frame, bytes]]) -> None:
    taken = Taken(*frames)
    with pytest.raises(UserError) as error, Bounded(taken.fork, BOUNDS) as examined:
        examined.recognise([("m", 1)], lambda _: io.BytesIO(b"x"))
    assert error.value.code == "recognition_failed"


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([(Frame.MEMBER, b"../evil")], "archive_unsafe_path"),
        ([(Frame.MEMBER, b"/etc/passwd")], "archive_unsafe_path"),
        ([(Frame.PIECE, b"x")], "recognition_failed"),
        ([(Frame.MEMBER, b"a"), (Frame.MEMBER, b"b")], "recognition_failed"),
        ([(Frame.MEMBER, b"a"), (Frame.AGAIN, b"")], "recognition_failed"),
        ([(Frame.FOUND, b'{"archive": "yes"}')], "recognition_failed"),
    ],
)  # fmt: skip
def test_members_go_only_where_an_archive_could_send_them(frames: list[tuple[Frame, bytes]], code: str) -> None:
    taken = Taken(*frames)
    with pytest.raises(UserError) as error, Bounded(taken.fork, BOUNDS) as examined:
        examined.unpack("m.tar", 1, lambda _: io.BytesIO(b"x"), archive.Limits(), Kept())
    assert error.value.code == code


# --- in the service ---------------------------------------------------------------------------------------------------


def test_an_examination_ends_when_its_client_goes(server: Home, until: Callable[..., Any]) -> None:
    before = server.objects()
    body = endless()
    host, port = server.url.removeprefix("http://").rsplit(":", 1)
    connection = socket.create_connection((host, int(port)))
    connection.sendall(
        f"POST /models?filename=m.ubj&name=gone HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n".encode()
    )
    connection.sendall(body)
    assert server.process is not None

    def children() -> list[psutil.Process]:
        service = psutil.Process(server.process.pid)
        return [
            child
            for each in service.children()
            if "registry.forkserver" in " ".join(each.cmdline())
            for child in each.children()
        ]

    until(children)
    connection.close()
    until(lambda: not children())
    until(lambda: server.objects() == before)
    with server.http() as client:
        assert client.get("/models/gone").status_code == 404
