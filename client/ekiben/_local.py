"""The service of this user on this machine, and its token.

The token proves to a service on loopback that the caller is the user whom its state folder belongs to. It is sent to
the very address at which that service listens while it runs, and nowhere else: another user's program may wait at the
same port of another loopback address, or at the same one once the service has ended.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

_LONGEST = 200  # bytes of the files


@dataclass(frozen=True)
class Local:
    """`address` is where the service listens, as http://127.0.0.1:8000."""

    address: str
    token: str = field(repr=False)


def service(url: str, home: Path) -> Local | None:
    """The service of the state folder, if it runs and the URL leads to it; None where it needs no token of its own."""
    try:
        address, token = _text(home / "listening"), _text(home / "token")
        asked, listening = urlsplit(url), urlsplit(address)
        leads_there = (asked.scheme, asked.port or 80) == (listening.scheme, listening.port)
    except (OSError, ValueError):
        return None
    return Local(address, token) if leads_there and token and _runs(home / "lock") else None


def _runs(lock: Path) -> bool:
    """Whether a service works with the state folder: it holds the lock of it as long as it lives."""
    try:
        import fcntl  # not on Windows, where the service does not run either

        with lock.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(stream, fcntl.LOCK_UN)
    except BlockingIOError:
        return True
    except (OSError, ImportError):
        return False
    return False


def _text(file: Path) -> str:
    with file.open("rb") as stream:
        return stream.read(_LONGEST).decode("ascii").strip()
