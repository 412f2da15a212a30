"""Calls of the Linux kernel that Python has no function for, each raising OSError with what was asked."""

from __future__ import annotations

import ctypes
import os
import sys

LINUX = sys.platform == "linux"

_PDEATHSIG, _DUMPABLE, _CAPBSET_DROP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 24, 36, 38
_CAPABILITY_VERSION = 0x20080522
_LAST_CAPABILITY = 63

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """The result of a call; OSError where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, argument: int, what: str) -> None:
    check(libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0), what)


def hide() -> None:
    """Make this process not dumpable: no process of the same user reads its memory, its environment or its files in
    /proc, or attaches a debugger, and it leaves no core. A program that it starts is dumpable again."""
    if LINUX:
        prctl(_DUMPABLE, 0, "the process cannot be made non-dumpable")


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent has ended."""
    if LINUX:
        prctl(_SUBREAPER, 1, "the process cannot be made a subreaper")


def end_with_parent(parent: int, number: int) -> None:
    """Receive a signal when the parent ends. To be called after the last change of the user, which resets it."""
    if LINUX:
        prctl(_PDEATHSIG, number, "the signal of the parent's death cannot be set")
        if os.getppid() != parent:
            os.kill(os.getpid(), number)


def keep_privileges_down() -> None:
    """Take from this process and all that it starts the means to gain rights by starting a program."""
    prctl(_NO_NEW_PRIVS, 1, "no_new_privs cannot be set")


def drop_capabilities() -> None:
    """Drop every capability for good; what belongs to the user is still its own."""
    for number in range(_LAST_CAPABILITY + 1):
        if libc.prctl(_CAPBSET_DROP, ctypes.c_ulong(number), 0, 0, 0) < 0:
            break  # the kernel knows no more of them, or none may be dropped
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    check(libc.capset(header, (ctypes.c_uint32 * 6)()), "capabilities cannot be dropped")
