"""The token of the service on this machine, for training programs of the same user.

What decides where it is sent is explained in `client/ekiben/_local.py`; kinds and client stand alone, so it is written
twice.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import urlsplit


def of_service(url: str, home: Path) -> tuple[str, str] | None:
    """Return where the running service of the state folder listens, and its token; None if the URL leads elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        address, token = ((home / name).read_text("ascii").strip() for name in ("listening", "token"))
        asked, listening = urlsplit(url), urlsplit(address)
        on_loopback = asked.hostname in ("localhost", "127.0.0.1", "::1")
        same = (asked.scheme, asked.port or 80) == (listening.scheme, listening.port)
        if on_loopback and same and token and _is_locked(home / "lock"):
            return address, token
    return None


def _is_locked(lock: Path) -> bool:
    import fcntl  # not on Windows, where the service does not run either

    with lock.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
