"""No network and no hands on other processes, for programs that import a user's code.

A filter of system calls (seccomp-bpf) that no program can take off again, and that everything it starts inherits. It
needs no privilege and works in any container: `socket` gives nothing but Unix sockets, and the ways around it
(io_uring, another ABI of the same kernel, the sockets and memory of other processes) are closed. What it guards, and
what it does not: docs/decisions/0105-what-each-step-may-write.md.

    python -I -S sandbox.py '{"memory": BYTES | null, "network": false, "files": null}' PROGRAM ARGUMENT…

runs a program inside. `files` is {"read": [path, …], "write": [path, …], "devices": [path, …]}, kept to where the
kernel has Landlock. This file imports nothing but the standard library and registry.confinement, because it runs before
anything else does.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FAILED = 125
"""Exit code of the script where the sandbox could not be made; the program was not started then."""

_LARGEST_FILE = 1 << 30  # bytes that a service may write into one file while it is imported

_SET_NO_NEW_PRIVS, _GET_SECCOMP, _SET_PDEATHSIG, _SET_DUMPABLE = 38, 21, 1, 4
_SET_MODE_FILTER, _TO_ALL_THREADS = 1, 1
_ALLOW, _KILL, _REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in the kernel's struct seccomp_data
_UNIX = 1
_X32 = 0x40000000
_SYS_ADMIN = 21

Instruction = tuple[int, int, int, int]
"""code, jump if true, jump if false, operand"""


@dataclass(frozen=True)
class Machine:
    """The numbers of system calls of one kind of processor."""

    architecture: int
    socket: int
    socketpair: int
    seccomp: int
    refused: tuple[int, ...]
    has_x32: bool = False


_IO_URING = (425, 426, 427)
_PIDFD_GETFD = 438
MACHINES: Mapping[str, Machine] = {
    "x86_64": Machine(
        0xC000003E, 41, 53, 317, has_x32=True,
        # ptrace, process_vm_readv, process_vm_writev, add_key, request_key, keyctl, perf_event_open, bpf, userfaultfd
        refused=(*_IO_URING, _PIDFD_GETFD, 101, 310, 311, 248, 249, 250, 298, 321, 323),
    ),
    "aarch64": Machine(
        0xC00000B7, 198, 199, 277,
        refused=(*_IO_URING, _PIDFD_GETFD, 117, 270, 271, 217, 218, 219, 241, 280, 282),
    ),
}  # fmt: skip


def unavailable() -> str | None:
    """Why there can be no filter on this machine; None where there can."""
    if sys.platform != "linux":
        return f"{sys.platform} has no filter of system calls"
    if os.uname().machine not in MACHINES or sys.maxsize < 1 << 32:
        return f"the filter is not made for {os.uname().machine} and this Python"
    if ctypes.CDLL(None).prctl(_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return "the kernel was built without seccomp"
    return None


def confine() -> None:
    """Take the network from this process, all its threads and everything it starts, for good. Raises OSError."""
    machine = MACHINES[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    code = program(machine)
    filters = (_Filter * len(code))(*(_Filter(*instruction) for instruction in code))
    whole = _Program(len(code), filters)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs cannot be set")
    if libc.syscall(machine.seccomp, _SET_MODE_FILTER, _TO_ALL_THREADS, ctypes.byref(whole)) != 0:
        raise OSError(ctypes.get_errno(), "the filter of system calls was not taken")


def hide() -> None:
    """Keep this process's memory and variables from programs of the same user, which find them in /proc otherwise."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0)


def program(machine: Machine) -> list[Instruction]:
    """The filter. A foreign ABI (i386 on x86-64, 32-bit ARM) has other numbers, so that its first call is its last."""
    code: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, machine.architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER),
    ]
    if machine.has_x32:
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    for number in machine.refused:
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    return [
        *code,
        (_EQUAL, 2, 0, machine.socket),
        (_EQUAL, 1, 0, machine.socketpair),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),  # its low half: the kernel takes the family as an int
        (_EQUAL, 0, 1, _UNIX),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _REFUSE | errno.EACCES),
    ]


class _Filter(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("true", ctypes.c_uint8),
        ("false", ctypes.c_uint8),
        ("operand", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filters", ctypes.POINTER(_Filter))]


def main(order: str, argv: Sequence[str]) -> None:
    """Become the program, inside what the order says."""
    wanted = json.loads(order)
    try:
        _bound(wanted["memory"])
        if not wanted["network"]:
            _leave_network()
            if unavailable() is None:
                confine()
        if wanted.get("files") is not None:
            _keep_to(wanted["files"])
        os.execv(argv[0], list(argv))
    except OSError as error:
        print(f"the sandbox could not be made: {error}", file=sys.stderr)
        sys.exit(FAILED)


def _bound(memory: int | None) -> None:
    """Limits that the program inherits, and death with the builder."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, _LARGEST_FILE))
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    with contextlib.suppress(Exception):
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL)  # Linux only


def _keep_to(files: Mapping[str, list[str]]) -> None:
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from registry.confinement import landlock

    if landlock.version() > 0:
        landlock.confine(**files)


def _leave_network() -> None:
    """Move into an empty network too where the kernel lets us, as root or in a user namespace of our own: that hides
    this machine's abstract Unix sockets. Who may read more files than its user can would lose that in the namespace."""
    new_user, new_net = 0x10000000, 0x40000000
    with contextlib.suppress(Exception):
        libc = ctypes.CDLL(None, use_errno=True)
        user, group = os.geteuid(), os.getegid()
        if capabilities := _capabilities():
            if capabilities >> _SYS_ADMIN & 1:
                libc.unshare(new_net)
        elif libc.unshare(new_user | new_net) == 0:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)


def _capabilities() -> int:
    """The effective ones, a bit each."""
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("CapEff:")), 16)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
