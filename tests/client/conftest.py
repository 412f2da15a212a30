"""A real server for the client's tests: started by `ekiben up`, in a state folder and on a port of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest


@dataclass(frozen=True)
class Running:
    """The server and an environment in which `ekiben` finds it."""

    url: str
    environment: Mapping[str, str] = field(repr=False)

    def at(self, url: str, environment: Mapping[str, str]) -> Running:
        """The same for another environment: `ekiben` run from it, no server started."""
        return Running(url, environment)

    def ekiben(self, *arguments: str, stdin: str = "", timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ekiben", *arguments],
            env=dict(self.environment),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("ekiben")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EKIBEN_", "XDG_"))}
    # A proxy that nobody runs: calls of loopback must not go there.
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    environment = {**kept, **proxies, "EKIBEN_HOME": str(folder / "home"), "XDG_CONFIG_HOME": str(folder / "config")}
    running = Running(f"http://localhost:{port}", environment)
    done = running.ekiben("up", "--port", str(port))
    assert done.returncode == 0, done.stderr
    yield running
    done = running.ekiben("down")
    assert done.returncode == 0, done.stderr
