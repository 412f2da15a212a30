"""What keeps the processes of models apart from this service, from each other and from what they share, on one machine.

As root: a user of its own for each process, and mounts in which the state folder is not there. With Landlock, for root
and for any user: nothing is read but the system and what the model needs, nothing is written but its scratch folder.
What each system can is found out at the start and can be seen at /version (docs/decisions/0301-one-machine.md).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import structlog

from build_service.processes import SUPERVISOR
from registry.confinement import system
from registry.confinement.orders import Cage
from registry.errors import EkibenError

log = structlog.get_logger(__name__)

USERS = range(60578, 61184)
"""User ids that neither Debian, Fedora nor systemd hand out, and that a container with 65536 ids has too."""

_PROBE_SECONDS = 30.0


class Users:
    """User ids for processes, one each on this machine: a lock on a file tells other services too that an id is taken.

    Whoever has an id alone may kill all processes of it.
    """

    def __init__(self, folder: Path = Path("/run/ekiben-users")) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder, self._lock = folder, threading.Lock()
        self._taken: dict[int, int] = {}  # user id → descriptor that holds its lock

    def take(self) -> int | None:
        """A user id that no other process has; None where all are taken."""
        # From anywhere, as the processes of a service that was killed may take a moment to end.
        first = secrets.randbelow(len(USERS))
        candidates: list[int] = [*USERS[first:], *USERS[:first]]
        with self._lock:
            for user in candidates:
                if user in self._taken:
                    continue
                held = os.open(self._folder / str(user), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    os.close(held)
                    continue
                self._taken[user] = held
                return user
        return None

    def give_back(self, user: int) -> None:
        with self._lock:
            os.close(self._taken.pop(user))


@dataclass(frozen=True)
class Isolation:
    """What this system can, of what the settings want."""

    landlock: int = 0
    """Version of Landlock; 0: none."""
    users: Users | None = None
    """Where a process can have a user and mounts of its own."""

    @property
    def confines(self) -> bool:
        return self.users is not None or self.landlock > 0

    def __str__(self) -> str:
        means = [] if self.users is None else ["own users", "own mounts"]
        return ", ".join([*means, f"Landlock {self.landlock}"] if self.landlock else means) or "none"

    def cage(
        self, *, read: Iterable[Path | str], scratch: Path, state: Path, user: int | None, shared_memory: int
    ) -> Cage | None:
        """The bounds of a process that reads the system and `read`, writes `scratch` and sees nothing of `state`."""
        if not self.confines:
            return None
        return Cage(
            read=[*system.folders(), *dict.fromkeys(map(str, read))],
            write=[str(scratch)],
            devices=system.devices(),
            cover=[str(state)],
            user=user,
            landlock=self.landlock > 0,
            shared_memory=shared_memory,
        )


def find(wanted: str) -> Isolation:
    """What this system can. `wanted` is off, auto or required; with the last EkibenError where there is nothing."""
    if wanted == "off":
        log.warning("models are not isolated", reason="EKIBEN_ISOLATION=off")
        return Isolation()
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SUPERVISOR), "--probe"],
        env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False,
    )  # fmt: skip
    can = json.loads(done.stdout) if done.returncode == 0 else {"landlock": 0, "mounts": False}
    users = None
    if can["mounts"]:
        with contextlib.suppress(OSError):  # no /run that can be written
            users = Users()
    found = Isolation(int(can["landlock"]), users)
    if found.confines:
        log.info("models are isolated", by=str(found))
    elif wanted == "required":
        raise EkibenError(
            "isolation_unavailable",
            "EKIBEN_ISOLATION=required, but this system has neither Landlock nor is the service root with mounts.",
            hint="Use a kernel with Landlock (5.13 or newer), or set EKIBEN_ISOLATION=auto.",
        )
    else:
        log.warning("models are not isolated", reason="no Landlock, and not root with mounts")
    return found


def open_to_all(folder: Path, sign: str) -> None:
    """Let another user read a folder inside the state folder, which only the service enters. `sign` is a file in it
    that says whether that is so already."""
    try:
        if (folder / sign).stat().st_mode & 0o004:
            return
    except OSError:
        return
    for here, _, names in os.walk(folder):
        for path in (here, *(os.path.join(here, name) for name in names)):
            if not os.path.islink(path):
                mode = os.stat(path).st_mode & 0o7777
                os.chmod(path, mode | 0o044 | (0o011 if mode & 0o100 else 0))
