"""What the supervisor is asked to start, as one JSON document on its standard input."""

from __future__ import annotations

import json
from typing import Any, NamedTuple


class Cage(NamedTuple):
    """What a program may do. Paths that do not exist are left out."""

    read: list[str]
    """What it reads and runs."""
    write: list[str]
    """What it reads, runs and writes."""
    devices: list[str]
    """Device files and folders of them that it reads and writes: for Landlock, as mounts do not hold for devices."""
    cover: list[str]
    """Folders of which it sees nothing but what it reads and writes; only with `user`."""
    user: int | None
    """Of this user and group, in mounts of its own, which only root can have made; None: the supervisor's."""
    landlock: bool
    shared_memory: int
    """Bytes of its own /dev/shm; only with `user`."""


class Bounds(NamedTuple):
    """Limits that the kernel keeps; None: as the supervisor's."""

    file_bytes: int | None = None
    """Of one file."""
    data_bytes: int | None = None
    """Of private writable memory of one process, used or not."""
    tasks: int | None = None
    """Processes and threads of the user together; only where the program has a user of its own."""


class Log(NamedTuple):
    """A file that takes what a program writes."""

    path: str
    most: int
    """Bytes that it may have together with its predecessor PATH.1."""
    rotated: bool
    """Whether it is begun again when it is full; if not, what follows is dropped."""


class Order(NamedTuple):
    argv: list[str]
    environment: dict[str, str]
    folder: str
    """Where the program starts."""
    pass_fds: list[int]
    lifeline: int
    """The reading end of a pipe: when it closes, everything ends."""
    logs: list[Log]
    """Of standard output and standard error, or one for both."""
    log_rate: int
    """Bytes a second that the logs take together; the program waits when it writes more."""
    groups: list[str]
    """cgroup.procs of the control groups that the program joins."""
    bounds: Bounds
    cage: Cage | None

    def encode(self) -> bytes:
        order = self._asdict()
        order["logs"] = [log._asdict() for log in self.logs]
        order["bounds"] = self.bounds._asdict()
        order["cage"] = None if self.cage is None else self.cage._asdict()
        return json.dumps(order).encode()

    @classmethod
    def decode(cls, data: bytes) -> Order:
        order: dict[str, Any] = json.loads(data)
        order["logs"] = [Log(**log) for log in order["logs"]]
        order["bounds"] = Bounds(**order["bounds"])
        order["cage"] = None if order["cage"] is None else Cage(**order["cage"])
        return cls(**order)
