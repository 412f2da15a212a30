"""Unix sockets of serving processes: only this service's user can reach them, so the router cannot be passed by."""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path

from build_service.routes import Upstream
from registry.errors import InfrastructureError

_LONGEST_PATH = 100  # bytes of a socket's path: the kernel has 108 on Linux and 104 on macOS, with a zero at the end
_NAME_BYTES = 8
_PREFIX = "ekiben-sockets-"


class SocketFolder:
    """The folder of the sockets, mode 0700, emptied of what an earlier service left there.

    It is `sockets` in the state folder. Where that path is too long for a socket, `sockets` is a link to a folder among
    the system's temporary files.
    """

    def __init__(self, root: Path) -> None:
        self._link = root / "sockets"
        _remove(self._link)
        self._folder = self._link
        if _fits(self._link):
            self._link.mkdir(mode=0o700)
        else:
            self._folder = _short_folder()
            self._link.symlink_to(self._folder)

    def bind(self) -> tuple[socket.socket, str]:
        """Return a socket that is bound and does not listen yet, and its path."""
        path = str(self._folder / secrets.token_hex(_NAME_BYTES))
        bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            bound.bind(path)
            os.chmod(path, 0o600)
        except BaseException:
            bound.close()
            raise
        return bound, path

    def remove(self, upstream: Upstream) -> None:
        """Remove the socket of a process that has ended."""
        if upstream.socket is not None:
            Path(upstream.socket).unlink(missing_ok=True)

    def close(self) -> None:
        _remove(self._link)


class UnixConnection(http.client.HTTPConnection):
    """A connection of the standard library's client to a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder)) + 1 + 2 * _NAME_BYTES <= _LONGEST_PATH


def _short_folder() -> Path:
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):
        with contextlib.suppress(OSError):
            made = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # mkdtemp makes it 0700
            if _fits(made):
                return made
            made.rmdir()
    raise InfrastructureError(
        "home_too_long",
        "The paths of the state folder and of the folder for temporary files are too long for a Unix socket.",
        hint="Set EKIBEN_HOME to a shorter path.",
    )


def _remove(link: Path) -> None:
    """Remove the folder, and the one that it is a link to if this module made it."""
    if link.is_symlink():
        target = Path(os.readlink(link))
        if target.name.startswith(_PREFIX) and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
