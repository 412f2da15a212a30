"""The client's own token: read by the user of the state folder, sent to the service that made it and nowhere else."""

from __future__ import annotations

import fcntl
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ekiben
from ekiben import _local

TOKEN = "ekb_" + "x" * 43


class Listener:
    """A server that notes what it is sent."""

    def __init__(self, address: str = "127.0.0.1", port: int = 0) -> None:
        heard: list[str | None] = []

        class Answer(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                heard.append(self.headers["Authorization"])
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b'{"items": [], "next": null}')

            def log_message(self, *words: object) -> None: ...

        self.heard = heard
        self._server = http.server.HTTPServer((address, port), Answer)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    made = Listener()
    yield made
    made.close()


@pytest.fixture
def home(tmp_path: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A state folder as a running service has it."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "listening").write_text(f"http://127.0.0.1:{listener.port}\n")
    for name in ("EKIBEN_URL", "EKIBEN_TOKEN", "EKIBEN_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield tmp_path


def sent(listener: Listener, url: str) -> str | None:
    with ekiben.Client(url) as client:
        client.models()
    return listener.heard.pop()


def test_the_token_goes_to_the_running_service(home: Path, listener: Listener) -> None:
    for host in ("localhost", "127.0.0.1"):
        assert sent(listener, f"http://{host}:{listener.port}") == f"Bearer {TOKEN}"


def test_the_token_goes_nowhere_else(home: Path, listener: Listener) -> None:
    other = Listener()
    try:
        assert sent(other, f"http://localhost:{other.port}") is None
    finally:
        other.close()
    for url in (f"https://localhost:{listener.port}", "http://localhost", "http://localhost:99999"):
        assert _local.service(url, home) is None
    assert ekiben.Client(f"http://models.example:{listener.port}")._address()[1] == {}


def test_the_service_is_called_at_its_own_address_and_not_at_another_of_the_same_name(
    home: Path, listener: Listener
) -> None:
    """`localhost` may lead to ::1 first, where a program of another user listens."""
    try:
        other = Listener6(listener.port)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    try:
        assert sent(listener, f"http://localhost:{listener.port}") == f"Bearer {TOKEN}"
        assert other.heard == []
    finally:
        other.close()


class Listener6(Listener):
    def __init__(self, port: int) -> None:
        import socket

        family, http.server.HTTPServer.address_family = http.server.HTTPServer.address_family, socket.AF_INET6
        try:
            super().__init__("::1", port)
        finally:
            http.server.HTTPServer.address_family = family


def test_what_an_ended_service_left_is_not_believed(home: Path, listener: Listener) -> None:
    """Another user's program may have taken its port."""
    (home / "lock").unlink()
    assert sent(listener, f"http://localhost:{listener.port}") is None
    (home / "lock").write_text("")
    assert sent(listener, f"http://localhost:{listener.port}") is None


def test_a_given_token_wins(home: Path, listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_TOKEN", "given")
    assert sent(listener, f"http://localhost:{listener.port}") == "Bearer given"


def test_a_folder_without_a_token_or_with_nonsense_gives_none(home: Path, listener: Listener) -> None:
    url = f"http://localhost:{listener.port}"
    for file, content in (("listening", "nonsense\n"), ("listening", "http://[\n"), ("token", "")):
        kept = (home / file).read_text()
        (home / file).write_text(content)
        assert sent(listener, url) is None
        (home / file).write_text(kept)
    (home / "token").unlink()
    assert sent(listener, url) is None
    assert TOKEN not in repr(_local.Local(url, TOKEN))
