"""The token of this machine: made by a service that listens on loopback, read by the client of the same user.

Anybody on a machine can reach loopback. What runs code, deletes or changes settings therefore needs proof of being the
user whom the state folder belongs to: a file that nobody else can read.
"""

from __future__ import annotations

import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from build_service.tokens import new_token

FILE = "token"
LISTENING = "listening"
"""File with the address of a running service, as http://ADDRESS:PORT: the client sends the token nowhere else."""

_TOKEN = re.compile(r"ekb_[A-Za-z0-9_-]{43}")
_LONGEST = 100  # bytes


def ensure(root: Path) -> str:
    """Return the token in the state folder. One that is damaged, or that others could have read, is replaced."""
    return _kept(root / FILE) or _make(root / FILE)


def announce(root: Path, host: str, port: int) -> None:
    """Write down where this service listens, in one step."""
    address = "127.0.0.1" if host == "localhost" else f"[{host}]" if ":" in host else host
    fresh = root / f"{LISTENING}.new"
    fresh.write_text(f"http://{address}:{port}\n")
    fresh.replace(root / LISTENING)


def withdraw(root: Path) -> None:
    (root / LISTENING).unlink(missing_ok=True)


def _kept(file: Path) -> str | None:
    try:
        opened = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(opened, "rb") as stream:
        found = os.fstat(opened)
        private = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077
        text = stream.read(_LONGEST).decode("ascii", "replace").strip() if private else ""
    return text if _TOKEN.fullmatch(text) else None


def _make(file: Path) -> str:
    token = new_token()
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".token-")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(token + "\n")
        os.replace(name, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return token
