"""The wrapper as the platform starts it: a real process on a real socket."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest


@dataclass
class Served:
    """A wrapper process. `start` does not wait; `ready` does."""

    root: Path
    environment: dict[str, str] = field(default_factory=dict)
    pass_fds: tuple[int, ...] = ()
    process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        self.port = _free_port()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=60, trust_env=False)
        self.log = self.root / f"log-{self.port}.txt"
        self.reason = self.root / f"reason-{self.port}.json"

    def start(self) -> Served:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("EKIBEN_", "BENTOML_"))},
            "EKIBEN_HOST": "127.0.0.1",
            "EKIBEN_PORT": str(self.port),
            "EKIBEN_TERMINATION_LOG": str(self.reason),
            **self.environment,
        }
        with self.log.open("wb") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bentos.serving"],
                cwd=self.root,
                env=environment,
                stderr=stream,
                pass_fds=self.pass_fds,
                start_new_session=True,
            )
        return self

    def ready(self) -> Served:
        assert self.process is not None
        while self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/readyz").status_code == 200:
                    return self
            time.sleep(0.02)
        pytest.fail(f"exit {self.process.returncode}:\n{self.log.read_text()[-4000:]}")

    def exit_code(self) -> int:
        assert self.process is not None
        return self.process.wait(120)

    def stop(self) -> None:
        self.client.close()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def failure(self) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.reason.read_text())
        assert set(body) == {"code", "message", "hint"}
        return body


@pytest.fixture
def starting(tmp_path: Path) -> Iterator[Any]:
    """A factory of wrapper processes, all ended with the test."""
    running: list[Served] = []

    def start(environment: dict[str, str], pass_fds: tuple[int, ...] = ()) -> Served:
        running.append(Served(tmp_path, environment, pass_fds).start())
        return running[-1]

    yield start
    for served in running:
        served.stop()


@pytest.fixture(scope="session")
def wrapper() -> type[Served]:
    """For a process that lives longer than one test."""
    return Served


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
