"""Landlock: a list of what a process may read and write, kept by the kernel (Linux 5.13 and later).

It needs no privilege, no process can take it off again, and all that the process starts inherits it. What is not on the
list can be neither opened nor listed nor made; a process outside of the list can be neither traced nor, from the
kernel's version 6 of Landlock on, signalled. It does not hide names and does not hold for metadata: `stat`, `chmod` and
`utime` of a file that belongs to the same user still work. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat

from registry.confinement.kernel import LINUX, check, keep_privileges_down, libc

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same on every processor
_ASK_VERSION, _PATH_BENEATH = 1, 1
_SCOPED = 1 | 2  # abstract Unix sockets and signals

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 1 << 1, 1 << 2, 1 << 3
_REFER, _TRUNCATE = 1 << 13, 1 << 14
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_FIRST_ALL = (1 << 13) - 1  # all rights of the first version
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_OF_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE


class _Ruleset(ctypes.Structure):
    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version() -> int:
    """The version that the kernel keeps to; 0: none."""
    if not LINUX:
        return 0
    return max(0, int(libc.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_ASK_VERSION))))


def handled(abi: int) -> int:
    """All rights that this version of the kernel takes away where no rule gives them."""
    return _FIRST_ALL | (_REFER if abi >= 2 else 0) | (_TRUNCATE if abi >= 3 else 0)


def confine(read: list[str], write: list[str], devices: list[str]) -> None:
    """Confine this process: it reads and runs what is below `read`, and writes too what is below `write` or `devices`.

    A path that does not exist is left out. Raises OSError.
    """
    abi = version()
    rights = handled(abi)
    attributes = _Ruleset(rights, 0, _SCOPED if abi >= 6 else 0)
    size = 8 if abi < 4 else 16 if abi < 6 else ctypes.sizeof(attributes)
    ruleset = check(
        libc.syscall(_CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(size), ctypes.c_uint32(0)),
        "the kernel has no Landlock",
    )
    try:
        for path in read:
            _allow(ruleset, path, rights & _READ)
        for path in (*write, *devices):
            _allow(ruleset, path, rights & ~(_MAKE_CHAR | _MAKE_BLOCK))
        keep_privileges_down()
        check(libc.syscall(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0)), "Landlock cannot be turned on")
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
            return
        raise
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _OF_FILES
        rule = _Beneath(rights, descriptor)
        done = libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(rule), ctypes.c_uint32(0))
        check(done, f"Landlock cannot allow {path}")
    finally:
        os.close(descriptor)
