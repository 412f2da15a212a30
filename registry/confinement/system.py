"""What any program needs of a Linux system: which folders it reads, and which devices it reads and writes."""

from __future__ import annotations

import os

_FOLDERS = (
    "/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc", "/opt", "/nix/store", "/gnu/store",
    "/proc", "/sys", "/dev", "/run/systemd/resolve", "/run/resolvconf", "/var/lib/ca-certificates",
)  # fmt: skip
_DEVICES = (
    "/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/shm",
    "/dev/dri", "/dev/kfd",
)  # fmt: skip


def folders() -> list[str]:
    return [path for path in _FOLDERS if os.path.exists(path)]


def devices() -> list[str]:
    """With those of GPUs, and shared memory, which locks between threads and processes are made in."""
    gpus = sorted(name for name in os.listdir("/dev") if name.startswith("nvidia"))
    return [*(path for path in _DEVICES if os.path.exists(path)), *(f"/dev/{name}" for name in gpus)]


def interpreter(python: str) -> str:
    """The installation that an environment's interpreter belongs to."""
    return os.path.dirname(os.path.dirname(os.path.realpath(python)))
