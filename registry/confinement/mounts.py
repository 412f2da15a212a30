"""A view of the file system for one program: read-only, with its own folders and without those of the service.

As root, another user's process cannot enter the folders that only root may (its home, the state folder). They are
covered by an empty file system in a mount namespace of the program's own; what it needs is mounted at its usual path.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from registry.confinement.kernel import check, libc

_NEW_NAMESPACE = 0x20000
_RDONLY, _NOSUID, _NODEV, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MOUNT_SETATTR, _AT_FDCWD, _AT_RECURSIVE = 442, -100, 0x8000
_ATTR_RDONLY, _ATTR_NOSUID = 1, 2
_SHARED_MEMORY = "/dev/shm"


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "namespace")]


def view(read: list[str], write: list[str], cover: list[str], shared_memory: int) -> None:
    """Move this process into a namespace where everything is read-only but `write`, and below the folders `cover`
    nothing is there but `read` and `write`. /dev/shm is its own, of that many bytes. Raises OSError.
    """
    check(libc.unshare(_NEW_NAMESPACE), "a mount namespace cannot be made")
    _mount(None, "/", None, _REC | _PRIVATE)
    _set(b"/", _AT_RECURSIVE, added=_ATTR_RDONLY | _ATTR_NOSUID)
    needed = [(path, path in write) for path in sorted({*read, *write}, key=len)]
    places = [(each, writable, os.path.realpath(each)) for each, writable in needed if os.path.exists(each)]
    covers = _topmost([os.path.realpath(path) for path in cover] + [c for _, _, real in places for c in _closed(real)])
    sources = {real: os.open(real, os.O_PATH | os.O_CLOEXEC) for _, _, real in places}
    try:
        for path in covers:
            _mount("tmpfs", path, "tmpfs", _NOSUID | _NODEV, "mode=0755,size=1m")
        for path, writable, real in places:
            # Where it is, and under the name by which it is asked for, which may lead over links.
            for target in dict.fromkeys((real, _through(path))):
                covered = any(_below(target, each) for each in covers)
                if covered:
                    _make(target, stat.S_ISDIR(os.fstat(sources[real]).st_mode))
                if covered or writable:
                    _mount(f"/proc/self/fd/{sources[real]}", target, None, _BIND | _REC)
                if writable:
                    _set(os.fsencode(target), 0, removed=_ATTR_RDONLY)
    finally:
        for descriptor in sources.values():
            os.close(descriptor)
    for path in covers:
        _mount(None, path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    if os.path.isdir(_SHARED_MEMORY):
        _mount("tmpfs", _SHARED_MEMORY, "tmpfs", _NOSUID | _NODEV, f"mode=1777,size={shared_memory}")


def _closed(path: str) -> list[str]:
    """Folders above a path that another user may not enter."""
    parents = []
    while (path := os.path.dirname(path)) != "/":
        parents.append(path)
    return [parent for parent in parents if not os.stat(parent).st_mode & stat.S_IXOTH]


def _topmost(paths: list[str]) -> list[str]:
    found: list[str] = []
    for path in sorted(set(paths), key=len):
        if os.path.isdir(path) and not any(_below(path, each) for each in found):
            found.append(path)
    return found


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _through(path: str) -> str:
    """The path with its absolute folders as they are named; `..` is gone."""
    return os.path.normpath(os.path.abspath(path))


def _make(target: str, folder: bool) -> None:
    """A mount point of the right kind."""
    if os.path.lexists(target):
        return
    os.makedirs(target if folder else os.path.dirname(target), mode=0o755, exist_ok=True)
    if not folder:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    done = libc.mount(encoded[0], encoded[1], encoded[2], ctypes.c_ulong(flags), encoded[3])
    check(done, f"{target} cannot be mounted")


def _set(target: bytes, flags: int, *, added: int = 0, removed: int = 0) -> None:
    attributes = _Attributes(added, removed, 0, 0)
    try:
        size = ctypes.c_size_t(ctypes.sizeof(attributes))
        done = libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, target, flags, ctypes.byref(attributes), size)
        check(done, f"{os.fsdecode(target)} cannot be mounted read-only")
    except OSError as error:
        if error.errno != errno.ENOSYS:  # before Linux 5.12: the user's rights and Landlock are what is left
            raise
