"""The filter of system calls: as the kernel holds to it here, and as its program reads for each processor."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from builder_image import sandbox

UNIX, INET, INET6, NETLINK, PACKET, ALG, VSOCK = 1, 2, 10, 16, 17, 38, 40
ALLOWED, KILLED = 0x7FFF0000, 0x80000000
X86_64, AARCH64, I386, ARM = 0xC000003E, 0xC00000B7, 0x40000003, 0x40000028
here = pytest.mark.skipif(sandbox.unavailable() is not None, reason="this system has no filter of system calls")


def refused(number: int) -> int:
    return 0x00050000 | number


def verdict(machine: str, architecture: int, number: int, argument: int = 0) -> int:
    """What the kernel would say, by its rules for such programs (classic BPF)."""
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, architecture, 0, argument & (1 << 64) - 1, 0, 0, 0, 0, 0)
    program, at, value = sandbox.program(sandbox.MACHINES[machine]), 0, 0
    while True:
        code, true, false, operand = program[at]
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
        elif code == 0x15:
            at += true if value == operand else false
        elif code == 0x35:
            at += true if value >= operand else false
        else:
            assert code == 0x06
            return operand


@pytest.mark.parametrize(
    ("machine", "architecture", "socket", "socketpair"), [("x86_64", X86_64, 41, 53), ("aarch64", AARCH64, 198, 199)]
)
def test_only_unix_sockets_are_made(machine: str, architecture: int, socket: int, socketpair: int) -> None:
    for call in (socket, socketpair):
        assert verdict(machine, architecture, call, UNIX) == ALLOWED
        for family in (0, INET, INET6, NETLINK, PACKET, ALG, VSOCK):
            assert verdict(machine, architecture, call, family) == refused(errno.EACCES)
        # the kernel looks at 32 bits of the family only, so that more of them must not matter
        assert verdict(machine, architecture, call, 1 << 32 | INET) == refused(errno.EACCES)
    for call in (0, 1, 60, 220, 435):
        assert verdict(machine, architecture, call) == ALLOWED


@pytest.mark.parametrize(
    ("machine", "architecture", "calls"),
    [
        ("x86_64", X86_64, [425, 426, 427, 438, 101, 310, 311, 321, 298]),
        ("aarch64", AARCH64, [425, 426, 427, 438, 117, 270, 271, 280, 241]),
    ],
)
def test_ways_around_are_closed(machine: str, architecture: int, calls: list[int]) -> None:
    for call in calls:
        assert verdict(machine, architecture, call, UNIX) == refused(errno.EPERM)


def test_a_foreign_abi_of_the_same_kernel_is_none() -> None:
    assert verdict("x86_64", I386, 359, INET) == KILLED  # socket, as i386 counts
    assert verdict("x86_64", I386, 1) == KILLED
    assert verdict("aarch64", ARM, 281, INET) == KILLED
    for call in (0x40000000 | 41, 0x40000000, 0x40000001, 0xFFFFFFFF):
        assert verdict("x86_64", X86_64, call, UNIX) == refused(errno.ENOSYS)


def inside(source: str, network: bool = False, tmp: Path | None = None) -> subprocess.CompletedProcess[str]:
    order = json.dumps({"memory": None, "network": network})
    argv = [sys.executable, "-I", "-S", sandbox.__file__, order, sys.executable, "-c", source]
    return subprocess.run(argv, capture_output=True, text=True, cwd=tmp, check=False)


@here
def test_a_program_and_what_it_starts_have_no_network() -> None:
    source = """
import asyncio, socket, subprocess, sys, threading
def families():
    found = []
    for family in (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK, socket.AF_UNIX):
        try:
            socket.socket(family).close()
            found.append("made")
        except PermissionError:
            found.append("refused")
    print(*found)
families()
thread = threading.Thread(target=families)
thread.start()
thread.join()
if len(sys.argv) == 1:
    subprocess.run([sys.executable, "-c", SOURCE, "again"], check=True)
asyncio.run(asyncio.sleep(0))
print("loop")
"""
    source = f"SOURCE = {source!r}\n{source}"
    done = inside(source)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line != "loop"] == ["refused refused refused made"] * 4
    assert lines.count("loop") == 2


@here
def test_sockets_and_memory_of_other_processes_are_out_of_reach() -> None:
    source = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
numbers = {"x86_64": (101, 310, 438, 425), "aarch64": (117, 270, 438, 425)}[os.uname().machine]
for number in numbers:
    assert libc.syscall(number, 16, os.getppid(), 0, 0, 0, 0) == -1
    print(ctypes.get_errno())
print(open("/proc/self/status").read().split("NoNewPrivs:")[1].split()[0])
"""
    done = inside(source)
    assert done.stdout.split() == [str(errno.EPERM)] * 4 + ["1"], done.stderr


@here
def test_the_filter_cannot_be_taken_off() -> None:
    source = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
for argument in range(3):
    libc.prctl(22, argument, 0, 0, 0)
libc.prctl(38, 0, 0, 0, 0)
try:
    socket.socket()
except PermissionError:
    print("refused")
"""
    assert inside(source).stdout == "refused\n"


@here
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="for x86-64, whose kernel knows i386 too")
def test_a_call_of_i386_ends_the_program() -> None:
    source = """
import ctypes, mmap
code = bytes([0xB8, 0x67, 0x01, 0, 0, 0xBB, 2, 0, 0, 0, 0xB9, 1, 0, 0, 0, 0xBA, 0, 0, 0, 0, 0xCD, 0x80, 0xC3])
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(b"\\x53" + code[:-1] + b"\\x5b\\xc3")  # socket(AF_INET, SOCK_STREAM, 0) by int 0x80
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
print("before", flush=True)
print(call())
"""
    done = inside(source)
    assert done.stdout == "before\n", done.stderr
    assert done.returncode in (-31, -11)  # SIGSYS; SIGSEGV where the kernel has no i386 at all


@here
def test_with_the_network_nothing_is_refused() -> None:
    assert inside("import socket; socket.socket(); print('made')", network=True).stdout == "made\n"


def test_a_program_that_is_not_there_is_told_apart_from_its_failure() -> None:
    order = json.dumps({"memory": None, "network": True})
    done = subprocess.run(
        [sys.executable, "-I", "-S", sandbox.__file__, order, "/nowhere/python"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == sandbox.FAILED
    assert "sandbox" in done.stderr


@here
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_who_may_read_more_than_its_user_can_still_does(tmp_path: Path) -> None:
    """In a namespace of its own it would lose that, and with it an interpreter in a folder that only root may enter."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "program").write_text("#!/bin/sh\necho started\n")
    (closed / "program").chmod(0o755)
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    reading = [*nobody, "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    command = [sys.executable, "-I", "-S", sandbox.__file__, json.dumps({"memory": None, "network": False})]
    done = subprocess.run([*reading, *command, str(closed / "program")], capture_output=True, text=True, check=False)
    assert done.stdout == "started\n", done.stderr
