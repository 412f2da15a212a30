"""A small process that forks children for one upload each: they start in milliseconds, with the recognisers imported.

The service is threaded, and a fork of it would copy its locks and its memory; this program has one thread and holds
nothing. For each upload it gets two sockets:

    channel   goes to the child (`registry.examination`)
    lease     stays here: at its end of file the child is killed, with all that it started; when the child has ended,
              its exit code (as subprocess has it, 4 bytes) is written there

When the service ends, however it ends, all sockets close, the children are killed, and this program ends.

    python -m registry.forkserver DESCRIPTOR MEMORY
"""

from __future__ import annotations

import ctypes
import gc
import os
import selectors
import signal
import socket
import struct
import sys
from contextlib import suppress

from registry import examination

EXIT_CODE = struct.Struct(">i")
_SET_PDEATHSIG, _SET_DUMPABLE, _SET_NO_NEW_PRIVS = 1, 4, 38
# Codecs are imported when they are first used, and a child opens no file by itself.
_CODECS = (
    "ascii",
    "cp437",
    "latin-1",
    "utf-8",
    "utf-8-sig",
    "utf-16",
    "utf-16-le",
    "utf-16-be",
    "utf-32-le",
    "utf-32-be",
)


def main(descriptor: int, memory: int) -> None:
    control = socket.socket(fileno=descriptor)
    for name in _CODECS:
        "".encode(name)
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # the first to go where the machine's memory ends, its children with it
    _prctl(_SET_DUMPABLE, 0)
    gc.freeze()  # so that a child's collector does not write into pages that all share
    _Forkserver(control, memory).run()


def _prctl(option: int, value: int) -> None:
    """Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


class _Forkserver:
    def __init__(self, control: socket.socket, memory: int) -> None:
        self._control, self._memory = control, memory
        self._children: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            os.set_blocking(end, False)

    def run(self) -> None:
        signal.set_wakeup_fd(self._wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service decides when this ends
        self._selector.register(self._control, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._control:
                    if not self._begin():
                        self._end()
                        return
                elif key.fileobj == self._woken:
                    with suppress(BlockingIOError):
                        os.read(self._woken, 4096)
                else:  # the service gave an upload up; this is heard again until the child is gone
                    _kill(key.data)
            self._reap()

    def _begin(self) -> bool:
        """Fork a child for the sockets that came; False when the service has ended."""
        message, descriptors, _, _ = socket.recv_fds(self._control, 1, 2)
        if not message:
            return False
        channel, lease = (socket.socket(fileno=each) for each in descriptors)
        pid = os.fork()
        if pid == 0:
            self._become(channel, lease)
        channel.close()
        self._children[pid] = lease
        self._selector.register(lease, selectors.EVENT_READ, pid)
        return True

    def _become(self, channel: socket.socket, lease: socket.socket) -> None:
        code = 1
        try:
            _prctl(_SET_PDEATHSIG, signal.SIGKILL)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._selector.close()
            for each in (self._control, lease, *self._children.values()):
                each.close()
            for end in (self._woken, self._wake):
                os.close(end)
            examination.confine(self._memory)
            _prctl(_SET_NO_NEW_PRIVS, 1)
            examination.serve(channel)
            code = 0
        finally:
            os._exit(code)

    def _reap(self) -> None:
        for pid in list(self._children):
            if _has_ended(pid):
                _kill_group(pid)  # what it may have started; its number is not free before it was waited for
                _, status = os.waitpid(pid, 0)
                lease = self._children.pop(pid)
                self._selector.unregister(lease)
                with suppress(OSError):
                    lease.sendall(EXIT_CODE.pack(os.waitstatus_to_exitcode(status)))
                lease.close()

    def _end(self) -> None:
        for pid in self._children:
            _kill(pid)


def _has_ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill(pid: int) -> None:
    """End a child that was not waited for yet, so that its number is its own."""
    os.kill(pid, signal.SIGKILL)
    _kill_group(pid)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
