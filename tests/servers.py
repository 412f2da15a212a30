"""Real servers that tests start for themselves, on loopback, with a folder of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path


def program(name: str) -> str | None:
    """A program by its name, where Debian puts PostgreSQL's too."""
    found = shutil.which(name)
    if found is None or name in ("postgres", "initdb"):
        beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
        found = str(beside[-1]) if beside else found
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class PostgreSQL:
    """A PostgreSQL server; as root it runs as another user, since it refuses to run as root."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ekiben-postgres-"))
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user is not None:
            shutil.chown(self._folder, self._user)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None
        subprocess.run(
            [_needed("initdb"), "-D", self._folder / "data", "-U", "ekiben", "--auth=trust", "--no-sync", "-E", "UTF8"],
            check=True, stdout=subprocess.DEVNULL, user=self._user, cwd=self._folder,
        )  # fmt: skip
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://ekiben@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        self._process = subprocess.Popen(
            [_needed("postgres"), "-D", self._folder / "data", "-p", str(self.port), "-h", "127.0.0.1",
             "-k", self._folder, "-F", "-c", "max_connections=200"],
            stdout=subprocess.DEVNULL, stderr=(self._folder / "log").open("ab"), user=self._user, cwd=self._folder,
        )  # fmt: skip
        while not self._answers():
            if self._process.poll() is not None:
                raise RuntimeError((self._folder / "log").read_text())
            time.sleep(0.05)

    def stop(self) -> None:
        """At once, as when the machine loses it: open connections are cut."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def create(self, database: str) -> str:
        """A new empty database; its URL."""
        import psycopg

        with psycopg.connect(f"postgresql://ekiben@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{database}"')  # type: ignore[call-overload]
        return self.url(database)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(f"postgresql://ekiben@127.0.0.1:{self.port}/postgres", connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True


def _needed(name: str) -> str:
    found = program(name)
    assert found is not None, f"{name} is not installed"
    return found
