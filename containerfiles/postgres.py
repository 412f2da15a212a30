"""Start PostgreSQL as any user: makes the database folder at the first start, then becomes the server.

It takes the settings of the public image, so that either can be named: PGDATA, POSTGRES_USER, POSTGRES_DB,
POSTGRES_PASSWORD_FILE, and SQL files in /docker-entrypoint-initdb.d. Arguments go to the server. The folder is made
under another name and renamed when it is complete: a first start that was killed begins anew.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

PROGRAMS = Path("/usr/lib/postgresql/15/bin")
FIRST = Path("/docker-entrypoint-initdb.d")


def main(arguments: list[str]) -> None:
    place = Path(os.environ.get("PGDATA", "/var/lib/postgresql/data"))
    if not (place / "PG_VERSION").exists():
        make(place)
    rest = arguments[1:] if arguments[:1] == ["postgres"] else arguments
    server = str(PROGRAMS / "postgres")
    # what compiles expressions (LLVM) is not in the image
    os.execv(server, [server, "-D", str(place), "-c", "listen_addresses=*", "-c", "jit=off", *rest])


def make(place: Path) -> None:
    """A database folder with one database, reachable by its owner's password alone."""
    fresh = place.with_name(place.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    user = os.environ.get("POSTGRES_USER", "postgres")
    subprocess.run(
        [
            PROGRAMS / "initdb", "--pgdata", fresh, "--username", user, "--encoding", "UTF8", "--locale", "C.UTF-8",
            "--pwfile", os.environ["POSTGRES_PASSWORD_FILE"], "--auth-host", "scram-sha-256", "--auth-local", "trust",
            "--data-checksums",
        ],
        check=True,
    )  # fmt: skip
    with (fresh / "pg_hba.conf").open("a") as rules:
        rules.write("host all all all scram-sha-256\n")
    name = os.environ.get("POSTGRES_DB", user).replace('"', '""')
    if name != "postgres":
        run(fresh, "postgres", f'CREATE DATABASE "{name}";')
    for file in sorted(FIRST.glob("*.sql")):
        run(fresh, name, file.read_text())
    os.rename(fresh, place)


def run(folder: Path, database: str, sql: str) -> None:
    """SQL without a server; a statement ends with its line, and one that fails ends the start."""
    lines = " ".join(line for line in sql.splitlines() if not line.startswith("--")).replace(";", ";\n")
    subprocess.run(
        [PROGRAMS / "postgres", "--single", "-c", "exit_on_error=on", "-D", folder, database],
        input=lines.encode(),
        check=True,
    )


if __name__ == "__main__":
    main(sys.argv[1:])
