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
from typing import Any

import httpx


def program(name: str) -> str | None:
    """A program by its name, where Debian puts PostgreSQL's too."""
    found = shutil.which(name)
    if found is None or name in ("postgres", "initdb"):
        beside = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
        found = str(beside[-1]) if beside else found
    return found


BCRYPT_OF_HUNTER2 = "$2y$05$abcdefghijklmnopqrstuuoXuKqgZXLiJqzfmMXDDhSFPIvxV7t8."
"""For an htpasswd of a registry: the password `hunter2`."""


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


class PostgreSQL:
    """A PostgreSQL server; as root it runs as another user, since it refuses to run as root. On another address than
    this machine's own it asks for a password."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.host = host
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
        if host != "127.0.0.1":
            with (self._folder / "data" / "pg_hba.conf").open("a") as allowed:
                allowed.write("host all all all scram-sha-256\n")
        self.start()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://ekiben@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        addresses = ",".join(dict.fromkeys(("127.0.0.1", self.host)))
        self._process = subprocess.Popen(
            [_needed("postgres"), "-D", self._folder / "data", "-p", str(self.port), "-h", addresses,
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

    def create_for(self, user: str, password: str) -> str:
        """A new empty database of the user's name and own, who is made; its URL, with the password."""
        import psycopg
        from psycopg import sql

        with psycopg.connect(f"postgresql://ekiben@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            named = {"user": sql.Identifier(user), "password": sql.Literal(password)}
            connection.execute(sql.SQL("CREATE ROLE {user} LOGIN PASSWORD {password}").format(**named))
            connection.execute(sql.SQL("CREATE DATABASE {user} OWNER {user}").format(**named))
        return f"postgresql+psycopg://{user}:{password}@{self.host}:{self.port}/{user}"

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


class DockerRegistry:
    """Debian's docker-registry with an empty store in `folder`, on a free port. `auth` and `http` are added to its
    configuration (YAML); `verify` is for asking it over https."""

    def __init__(
        self,
        folder: Path,
        *,
        address: str = "127.0.0.1",
        auth: str = "",
        http: str = "",
        scheme: str = "http",
        verify: Any = True,
    ) -> None:
        self.folder, self.host, self.log = folder, f"{address}:{free_port()}", folder / "log"
        folder.mkdir()
        config = folder / "config.yml"
        config.write_text(
            f"version: 0.1\nlog: {{level: warn}}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}, delete: {{enabled: true}}}}\n"
            f"http:\n  addr: {self.host}\n  secret: fixed\n{http}{auth}"
        )
        with self.log.open("wb") as out:
            self._process = subprocess.Popen([_needed("docker-registry"), "serve", config], stdout=out, stderr=out)
        for _ in range(200):
            try:
                httpx.get(f"{scheme}://{self.host}/v2/", verify=verify, trust_env=False)
                break
            except httpx.TransportError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"docker-registry ended: {self.log.read_text()}") from None
                time.sleep(0.05)

    def requests(self, method: str) -> list[str]:
        """Paths of the requests with a method, from the registry's own access log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split(f'"{method} ')[1].split(" ")[0] for line in lines if f'"{method} ' in line]

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


def _needed(name: str) -> str:
    found = program(name)
    assert found is not None, f"{name} is not installed"
    return found
