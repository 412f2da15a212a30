"""Large files in parts: a push that was killed goes on where it stopped, and files that changed start again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightgbm
import numpy as np
import pytest

import ekiben

Running = Any  # tests/client/conftest.py, which tests cannot import

MIB = 1024 * 1024
PARTS = 10
PART = 16 * MIB  # what the server asks for at this size
SIZE = PARTS * PART


class Line:
    """A forwarder to the server that counts what goes there, and stands still after so many bytes."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.sent, self.most = 0, sys.maxsize
        self.still = threading.Event()
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            for way in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass_on, args=way, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, out: bool) -> None:
        try:
            while data := source.recv(256 * 1024):
                if out and self.sent + len(data) > self.most:
                    self.still.set()
                    return
                self.sent += len(data) if out else 0
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def cut(self) -> None:
        for each in self._sockets:
            each.close()
        self._sockets.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@pytest.fixture
def line(server: Running) -> Iterator[Line]:
    made = Line(server.url)
    yield made
    made.close()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with a booster and ten parts of what belongs to it."""
    rng = np.random.default_rng(4)
    table = rng.normal(size=(200, 3))
    model = lightgbm.train({"objective": "regression", "verbose": -1}, lightgbm.Dataset(table, table[:, 0]), 3)
    folder = tmp_path / "large"
    folder.mkdir()
    model.save_model(folder / "model.txt")
    with (folder / "catalogue.bin").open("wb") as out:
        for _ in range(PARTS):
            out.write(rng.bytes(PART))
    return folder


def environment(server: Running, url: str, tmp_path: Path) -> dict[str, str]:
    own = {"EKIBEN_URL": url, "EKIBEN_PART_UPLOAD_BYTES": str(MIB), "XDG_CONFIG_HOME": str(tmp_path / "config")}
    return {**server.environment, **own}


def push(server: Running, line: Line, tmp_path: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return server.at(line.url, environment(server, line.url, tmp_path)).ekiben("push", *map(str, words), "--no-deploy")


def killed(server: Running, line: Line, tmp_path: Path, folder: Path, name: str, *, at: float) -> None:
    """A push whose sender dies once this share of the bytes went through."""
    line.most = int(at * SIZE)
    process = subprocess.Popen(
        [sys.executable, "-m", "ekiben", "push", str(folder), "--name", name, "--no-deploy"],
        env=environment(server, line.url, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not line.still.wait(0.1):
        assert process.poll() is None, process.stderr and process.stderr.read()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    line.cut()
    line.most = sys.maxsize


def test_a_push_that_was_killed_at_90_percent_sends_at_most_one_part_again(
    server: Running, line: Line, large: Path, tmp_path: Path
) -> None:
    killed(server, line, tmp_path, large, "killed", at=0.9)
    before = line.sent
    assert before > 0.85 * SIZE
    done = push(server, line, tmp_path, large, "--name", "killed")
    assert done.returncode == 0, done.stderr
    assert "resuming at " in done.stderr
    assert line.sent <= SIZE + PART + MIB  # with the requests' heads
    with ekiben.Client(server.url) as client:
        (version,) = client.versions("killed")
        assert version["size"] > SIZE
    assert not list((tmp_path / "config" / "ekiben" / "uploads").iterdir())


def test_a_file_that_changed_meanwhile_is_sent_anew(server: Running, line: Line, large: Path, tmp_path: Path) -> None:
    killed(server, line, tmp_path, large, "changed", at=0.5)
    file = large / "catalogue.bin"
    seen = file.stat()
    with file.open("r+b") as out:  # in a part that was acknowledged; of the same size, and the time of before
        out.seek(PART)
        out.write(b"another")
    os.utime(file, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    done = push(server, line, tmp_path, large, "--name", "changed")
    assert done.returncode == 0, done.stderr
    assert "the files changed since: starting again" in done.stderr
    assert line.sent > 1.3 * SIZE


def test_a_line_that_is_cut_meanwhile_is_no_failure(server: Running, line: Line, large: Path, tmp_path: Path) -> None:
    line.most = SIZE // 2

    def mend() -> None:
        line.still.wait(240)
        line.most = sys.maxsize
        line.cut()

    helper = threading.Thread(target=mend)
    helper.start()
    done = push(server, line, tmp_path, large, "--name", "shaky")
    helper.join()
    assert done.returncode == 0, done.stderr
    assert line.still.is_set()
    assert line.sent <= SIZE + PART + MIB
