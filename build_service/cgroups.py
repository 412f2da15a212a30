"""Control groups that bound the memory of a child, where this process may make some: v1 and v2, by files alone.

v1: a group below the service's own in the memory hierarchy. v2: the same where the service has a subtree of its own
(a container, or systemd's `Delegate=yes`): a group that has processes cannot hand controllers on, so the service moves
into a leaf first, if it is alone in its group. Anywhere else there are none: RLIMIT_DATA and measurement bound memory.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path

_PREFIX = "ekiben."
_LEAF = f"{_PREFIX}service"
_REMOVE_SECONDS = 1.0  # that a group may stay busy after its last process has ended


@dataclass(frozen=True)
class Group:
    """The group of one child."""

    folder: Path
    version: int

    @property
    def procs(self) -> str:
        return str(self.folder / "cgroup.procs")

    def bound(self, memory: int) -> None:
        """Change the limit. Where more is used already, the kernel may refuse: measurement ends the child then."""
        with contextlib.suppress(OSError):
            (self.folder / _limit(self.version)).write_text(str(memory))

    def killed(self) -> bool:
        """Whether the kernel has ended a process of the group because of its limit."""
        file = "memory.oom_control" if self.version == 1 else "memory.events"
        with contextlib.suppress(OSError, ValueError):
            lines = dict(line.split() for line in (self.folder / file).read_text().splitlines())
            return int(lines.get("oom_kill", 0)) > 0
        return False

    def remove(self) -> None:
        end = time.monotonic() + _REMOVE_SECONDS
        while self.folder.exists() and time.monotonic() < end:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.01)


@dataclass(frozen=True)
class Groups:
    """Where this service makes its groups."""

    parent: Path
    version: int

    def make(self, name: str, memory: int) -> Group | None:
        """A group with a limit; None where it cannot be made at the moment."""
        group = Group(self.parent / f"{_PREFIX}{os.getpid()}.{name}", self.version)
        try:
            group.folder.mkdir(exist_ok=True)
            (group.folder / _limit(self.version)).write_text(str(memory))
        except OSError:
            with contextlib.suppress(OSError):
                group.folder.rmdir()
            return None
        return group


def find(groups: str | None = None, mounts: str | None = None) -> Groups | None:
    """Where groups can be made; what an earlier service left there is removed. The arguments are the texts of
    /proc/self/cgroup and /proc/self/mountinfo."""
    try:
        groups = Path("/proc/self/cgroup").read_text() if groups is None else groups
        mounts = Path("/proc/self/mountinfo").read_text() if mounts is None else mounts
    except OSError:
        return None
    for version, folder in _own(groups, mounts):
        with contextlib.suppress(OSError):
            if version == 2 and not _handed_on(folder):
                continue
            for stale in folder.glob(f"{_PREFIX}*"):
                if not _is_of_a_service(stale.name):
                    with contextlib.suppress(OSError):  # its processes are about to end
                        stale.rmdir()
            trial = folder / f"{_PREFIX}{os.getpid()}.trial"
            trial.mkdir()
            try:
                with (trial / _limit(version)).open("r+") as file:
                    file.write(str(1 << 30))
            finally:
                trial.rmdir()
            return Groups(folder, version)
    return None


def _is_of_a_service(name: str) -> bool:
    """Whether the service that made a group is there still: a group may be empty only because it is new."""
    pid = name.removeprefix(_PREFIX).partition(".")[0]
    return not pid.isdigit() or Path("/proc", pid).exists()


def _limit(version: int) -> str:
    return "memory.limit_in_bytes" if version == 1 else "memory.max"


def _own(groups: str, mounts: str) -> list[tuple[int, Path]]:
    """(version, folder) of this process's groups that could bound memory."""
    found = []
    for line in groups.splitlines():
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        for mount in mounts.splitlines():
            fields, _, rest = mount.partition(" - ")
            kind, _, options = rest.split(" ", 2)
            root, point = fields.split()[3:5]
            if kind != ("cgroup2" if version == 2 else "cgroup"):
                continue
            if version == 1 and "memory" not in options.split(","):
                continue
            if path == root or path.startswith(root.rstrip("/") + "/"):
                below = path[len(root.rstrip("/")) :].strip("/")
                found.append((version, Path(point, below) if below else Path(point)))
    return found


def _handed_on(folder: Path) -> bool:
    """See that groups below `folder` get the memory controller."""
    controllers, subtree = folder / "cgroup.controllers", folder / "cgroup.subtree_control"
    if "memory" not in controllers.read_text().split():
        return False
    if "memory" in subtree.read_text().split():
        return True
    procs = (folder / "cgroup.procs").read_text().split()
    if any(int(pid) != os.getpid() for pid in procs):
        return False  # somebody else's processes are in this group too: it is not the service's to divide
    leaf = folder / _LEAF
    leaf.mkdir(exist_ok=True)
    (leaf / "cgroup.procs").write_text(str(os.getpid()))
    subtree.write_text("+memory")
    return True
