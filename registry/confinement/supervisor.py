"""Runs one program and is the parent of all that it starts, whatever that does to get away.

    python -I -S supervisor.py < ORDER       an order is that of orders.py
    python -I -S supervisor.py --probe       print what this system can do: {"landlock": VERSION, "mounts": BOOL}

The program starts inside of the order's bounds. The supervisor stays outside: it copies the output into logs of bounded
size and rate, hands SIGTERM on, and when the program ends, or its own parent, it kills every descendant. A process that
forks twice and begins a session of its own is still a descendant, as the supervisor adopts orphans. It ends as the
program did: with its exit code or by its signal. It costs some megabytes, so it imports little.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

if __name__ == "__main__":
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from registry.confinement import kernel
from registry.confinement.orders import Bounds, Cage, Log, Order

FAILED = 125
"""Exit code where the program could not be started inside its bounds; its log says why."""
_ABANDONED = 4
_PIECE = 64 * 1024
_BURST_SECONDS = 4.0  # of the rate, that may be written at once
_LONGEST_WAIT = 0.05  # seconds between two looks at whether more may be written
_KILL_AGAIN = 0.01  # seconds between two looks at what is left to kill


class Sink:
    """A log that never outgrows its bound, and loses what it cannot write: a full disk must not end the program."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._most = log.most // 2 if log.rotated else log.most
        self._open()

    def _open(self) -> None:
        self._file = os.open(self._log.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            while data:
                taken = min(len(data), max(0, self._most - self._size))
                if taken < len(data) and ((end := data.rfind(b"\n", 0, taken) + 1) or self._size):
                    taken = end  # whole lines, but for one that is longer than the file
                if taken:
                    self._size += os.write(self._file, data[:taken])
                    data = data[taken:]
                if data:
                    if not self._log.rotated:
                        return
                    os.rename(self._log.path, f"{self._log.path}.1")
                    os.close(self._file)
                    self._open()


class Supervisor:
    def __init__(self, order: Order) -> None:
        self._order = order
        self._sinks: dict[int, Sink] = {}
        self._writing: list[int] = []
        self._allowed = order.log_rate * _BURST_SECONDS
        self._refilled = time.monotonic()
        self._status: int | None = None
        self._program = 0

    def run(self) -> int:
        """Start the program and return its wait status once nothing of it is left."""
        kernel.adopt_orphans()
        waking, woken = os.pipe()
        os.set_blocking(waking, False)
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, lambda *_: None)
        for log in self._order.logs:
            reading, writing = os.pipe()
            self._sinks[reading] = Sink(log)
            self._writing.append(writing)
        self._program = self._start()
        for descriptor in (*self._writing, *self._order.pass_fds):
            os.close(descriptor)
        os.set_inheritable(self._order.lifeline, False)
        kernel.hide()
        while self._status is None:
            self._turn(waking)
        self._end()
        self._drain()
        return self._status

    def _start(self) -> int:
        """The program's process, in a session of its own, as it expects."""
        parent = os.getpid()
        child = os.fork()
        if child:
            return child
        try:
            os.setsid()
            for number in (signal.SIGCHLD, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.set_wakeup_fd(-1)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(self._writing[0], 1)
            os.dup2(self._writing[-1], 2)
            _become(self._order, parent)
        except BaseException as error:
            os.write(2, f"the program cannot be started inside its bounds: {error}\n".encode())
        os._exit(FAILED)

    def _turn(self, waking: int) -> None:
        """Wait for something to happen, and see to it."""
        now = time.monotonic()
        most = self._order.log_rate * _BURST_SECONDS
        self._allowed = min(most, self._allowed + (now - self._refilled) * self._order.log_rate)
        self._refilled = now
        poller = select.poll()
        poller.register(waking, select.POLLIN)
        poller.register(self._order.lifeline, select.POLLIN)
        full = self._allowed < min(_PIECE, most)
        for reading in () if full else self._sinks:
            poller.register(reading, select.POLLIN)
        for descriptor, _ in poller.poll(_LONGEST_WAIT * 1000 if full else None):
            if descriptor == waking:
                if signal.SIGTERM in os.read(waking, _PIECE):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(self._program, signal.SIGTERM)
                self._reap()
            elif descriptor == self._order.lifeline:
                if not os.read(descriptor, _PIECE):
                    self._end()
                    os._exit(_ABANDONED)
            else:
                self._copy(descriptor)

    def _copy(self, reading: int) -> None:
        data = os.read(reading, _PIECE)
        if data:
            self._allowed -= len(data)
            self._sinks[reading].write(data)
        else:  # every writer has closed it
            del self._sinks[reading]
            os.close(reading)

    def _reap(self) -> bool:
        """Wait for what has ended; False where there are no children at all."""
        with contextlib.suppress(ChildProcessError):
            while True:
                ended, status = os.waitpid(-1, os.WNOHANG)
                if ended == 0:
                    return True
                if ended == self._program:
                    self._status = status
        return False

    def _end(self) -> None:
        """Kill every descendant. Those of one that is killed become children of this process, so the next look finds
        them; a user that only the program has is asked as a whole, which no fork can outrun."""
        cage = self._order.cage
        while self._reap():
            if cage is not None and cage.user is not None:
                _kill_user(cage.user)
            for child in _children():
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            time.sleep(_KILL_AGAIN)

    def _drain(self) -> None:
        """Copy what is left in the pipes."""
        for reading, sink in self._sinks.items():
            os.set_blocking(reading, False)
            with contextlib.suppress(BlockingIOError):
                while data := os.read(reading, _PIECE):
                    sink.write(data)


def _children() -> list[int]:
    """Processes whose parent this one is."""
    me = os.getpid()
    try:
        with open(f"/proc/{me}/task/{me}/children") as listed:
            return [int(word) for word in listed.read().split()]
    except OSError:
        pass  # a kernel that does not list them, or no Linux
    found = []
    with contextlib.suppress(OSError):
        for name in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                with open(f"/proc/{int(name)}/stat") as stat:
                    if int(stat.read().rpartition(")")[2].split()[1]) == me:
                        found.append(int(name))
    return found


def _kill_user(user: int) -> None:
    """Kill every process of a user."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            os.kill(-1, signal.SIGKILL)  # this one is left out
        finally:
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(child, 0)


def _become(order: Order, parent: int) -> None:
    """Take the bounds and become the program. The order matters: each step takes what a later one does not need."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")  # where the whole machine runs out of memory, it is not the service that ends
    for group in order.groups:
        with open(group, "w") as file:
            file.write("0")
    _bound(order.bounds, order.cage)
    if order.cage is not None:
        _confine(order.cage)
    kernel.end_with_parent(parent, signal.SIGKILL)
    for descriptor in (order.lifeline, *order.pass_fds):
        os.set_inheritable(descriptor, True)
    os.chdir(order.folder)
    os.execve(order.argv[0], order.argv, order.environment)


def _bound(bounds: Bounds, cage: Cage | None) -> None:
    import resource

    limits = [(resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, bounds.file_bytes)]
    limits.append((resource.RLIMIT_DATA, bounds.data_bytes))
    if cage is not None and cage.user is not None:
        limits.append((resource.RLIMIT_NPROC, bounds.tasks))
    for which, value in limits:
        if value is not None:
            _, hard = resource.getrlimit(which)
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (most, most if which != resource.RLIMIT_DATA else hard))


def _confine(cage: Cage) -> None:
    # Imported first: inside its bounds a program may not see the folder that this package is in.
    from registry.confinement import landlock, mounts

    if cage.user is not None:
        mounts.view(cage.read, cage.write, cage.cover, cage.shared_memory)
        os.setgroups([])
        os.setresgid(cage.user, cage.user, cage.user)
        os.setresuid(cage.user, cage.user, cage.user)
    elif kernel.LINUX and os.geteuid() == 0:
        kernel.drop_capabilities()
    if kernel.LINUX:
        kernel.keep_privileges_down()
    if cage.landlock:
        landlock.confine(cage.read, cage.write, cage.devices)


def _probe() -> None:
    from registry.confinement import landlock, mounts

    print(json.dumps({"landlock": landlock.version(), "mounts": kernel.LINUX and _can_mount(mounts.view)}))


def _can_mount(view: object) -> bool:
    """Whether this process may give a program a user and mounts of its own: tried in a process that ends."""
    if os.geteuid() != 0:
        return False
    child = os.fork()
    if child == 0:
        try:
            view([], [], [], 1 << 20)  # type: ignore[operator]
            os.setgroups([])
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def main() -> None:
    if sys.argv[1:] == ["--probe"]:
        _probe()
        return
    order = Order.decode(sys.stdin.buffer.read())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    code = os.waitstatus_to_exitcode(Supervisor(order).run())
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
