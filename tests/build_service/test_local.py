"""The local platform alone, with serving processes that misbehave as the test says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from build_service import local
from build_service.local import LocalPlatform
from build_service.platform import RevisionOrder
from build_service.routes import RouteTable
from build_service.settings import Settings
from registry.kinds import Kinds
from registry.store import DirectoryStore
from registry.versions import Version

# Stands where a model's process would: hangs when it is asked, or is ready once another was asked and hangs.
PROCESS = """#!{python}
import http.server, os, pathlib, socket, threading, time
threading.Thread(target=lambda: (os.read(int(os.environ["EKIBEN_LIFELINE_FD"]), 1), os._exit(0)), daemon=True).start()
folder = pathlib.Path({folder!r})
name = os.environ["EKIBEN_MODEL_NAME"]
class Answer(http.server.BaseHTTPRequestHandler):
    def log_message(self, *words):  # it would name the caller's address, and a Unix socket has none
        pass
    def do_GET(self):
        if name.startswith("hangs"):
            (folder / name).write_text("asked")
            time.sleep(3600)
        self.send_response(200 if len(list(folder.glob("hangs*"))) == {hanging} else 503)
        self.end_headers()
        self.wfile.write(b"{{}}")
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer, bind_and_activate=False)
server.socket = socket.socket(fileno=int(os.environ["EKIBEN_SOCKET_FD"]))
server.socket.listen()
server.serve_forever()
"""
HANGING = 3


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[LocalPlatform]:
    made = LocalPlatform(
        # Without isolation, as the programs leave signs in a folder of the test's.
        Settings(home=tmp_path / "home", isolation="off"),
        DirectoryStore(tmp_path / "objects"),
        Kinds(()),
        RouteTable(),
        lambda: None,
        dict(os.environ),
    )
    yield made
    made.close()


def order(name: str, environment: Path) -> RevisionOrder:
    version = Version(
        id="01", name=name, number=1, digest="sha256:1", kind="k", format="f", size=1, location="models/1",
        manifest={}, signature=None, labels={}, lock=None, checked=None, upload_seconds=None, created=0, deleted=None,
    )  # fmt: skip
    build: dict[str, Any] = {"environment": {"dir": str(environment)}, "bento": {"dir": str(environment)}}
    return RevisionOrder(name, 1, version, build, 1, {}, "rolling")


def test_processes_that_hang_do_not_hold_up_the_readiness_of_others(
    platform: LocalPlatform, tmp_path: Path, until: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_PROBE_SECONDS", 3600.0)  # no answer ends a question: only the processes' end does
    asked, environment = tmp_path / "asked", tmp_path / "environment"
    asked.mkdir()
    (environment / "bin").mkdir(parents=True)
    program = environment / "bin" / "python"
    program.write_text(PROCESS.format(python=sys.executable, folder=str(asked), hanging=HANGING))
    program.chmod(0o755)
    for number in range(HANGING):
        platform.apply(order(f"hangs-{number}", environment))
    platform.apply(order("answers", environment))
    until(lambda: platform.observe("answers").ready == 1)
    assert [platform.observe(f"hangs-{number}").ready for number in range(HANGING)] == [0] * HANGING
