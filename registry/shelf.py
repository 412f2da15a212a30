"""A folder of results that are named by content, made by some processes, used by others and removed by one.

What is under its final name is whole. The time of its last change is when it was last wanted; who wants it says so
under the lock that its removal takes, so nothing is taken away from somebody who has just found it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from ulid import ULID

_REMOVED = ".removed-"


@contextlib.contextmanager
def locked(shelf: Path, name: str, *, wait: bool = True) -> Iterator[bool]:
    """Alone with `shelf/name`: nobody else makes, finds or removes it. Without `wait`, False where somebody is.

    The kernel releases the lock when its holder dies.
    """
    file = shelf / f".{name}.lock"
    while True:
        with open(file, "w") as holder:
            try:
                fcntl.flock(holder, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if _is_at(holder.fileno(), file):  # else who held it before has removed it, and the next locks another
                yield True
                return


def wanted(shelf: Path, name: str, whole: Callable[[], bool]) -> bool:
    """Whether `shelf/name` is there and whole. Then it is marked as wanted now."""
    if not whole():
        return False
    with locked(shelf, name):
        if whole():
            mark(shelf / name)
            return True
    return False


def mark(path: Path) -> None:
    """Wanted now."""
    with contextlib.suppress(OSError):
        os.utime(path)


def remove(shelf: Path, name: str, *, before: float, beside: str | None = None) -> Path | None:
    """Take `shelf/name` away, and its file `beside` it, unless it was wanted since `before` or is being made.

    What is returned is out of everybody's reach and is to be deleted by `delete`; if that never happens, by `rest`.
    """
    with locked(shelf, name, wait=False) as alone:
        if not alone:
            return None
        gone = rename(shelf, name, before=before)
        place = shelf / name
        if beside is not None and not place.exists() and (shelf / beside).exists():
            (shelf / beside).unlink()
        if not place.exists():
            (shelf / f".{name}.lock").unlink(missing_ok=True)
        return gone


def rename(shelf: Path, name: str, *, before: float) -> Path | None:
    """As `remove`, for what nobody makes or uses under a lock."""
    gone = shelf / f"{_REMOVED}{ULID()}"
    try:
        if (shelf / name).stat().st_mtime >= before:
            return None
        os.rename(shelf / name, gone)
    except FileNotFoundError:
        return None
    return gone


def rest(shelf: Path) -> list[Path]:
    """What was taken away and not deleted, because its process was killed."""
    return sorted(shelf.glob(f"{_REMOVED}*"))


def unfinished(shelf: Path) -> list[Path]:
    """What makers that were killed left under `.NAME.PID.tmp`, taken away; while one works, it holds the lock."""
    found = []
    for draft in sorted(shelf.glob(".*.tmp")):
        with locked(shelf, draft.name[1:].rsplit(".", 2)[0], wait=False) as alone:
            if alone and draft.exists():
                found.append(shelf / f"{_REMOVED}{ULID()}")
                os.rename(draft, found[-1])
                draft.with_suffix(".json").unlink(missing_ok=True)
    return found


def delete(path: Path) -> int:
    """Delete a folder; the bytes that are free now. A file that has another name elsewhere frees nothing."""
    freed = 0
    for here, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                known = os.lstat(os.path.join(here, name))
                freed += known.st_size if stat.S_ISREG(known.st_mode) and known.st_nlink == 1 else 0
    shutil.rmtree(path, ignore_errors=True)
    return freed


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
