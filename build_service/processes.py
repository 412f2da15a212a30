"""Child processes that never outlive this service, and nothing that they start outlives them.

Each child runs below a supervisor (registry/confinement), which holds the reading end of a pipe, its lifeline: when
this service ends, however it ends, the pipe closes and the supervisor kills all of its descendants. A supervisor that
hangs is found by the next start through a file with its process id and start time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from registry.confinement import supervisor
from registry.confinement.orders import Bounds, Cage, Log, Order

SUPERVISOR = Path(supervisor.__file__)
LOG_RATE = 1024 * 1024  # bytes a second of a child's output; it waits when it writes more
_KILL_SECONDS = 5.0  # that a supervisor may take to kill what it supervises


class Child:
    """A running program with its supervisor and its lifeline. `logs`: of standard output and error, or one for both."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        records: Path,
        logs: Sequence[Log],
        pass_fds: Sequence[int] = (),
        bounds: Bounds | None = None,
        cage: Cage | None = None,
        groups: Sequence[str] = (),
    ) -> None:
        for log in logs:  # for those who look for them before the supervisor has begun
            Path(log.path).touch(mode=0o600)
        reading, self._lifeline = os.pipe()
        try:
            order = Order(
                argv=list(argv),
                environment={**environment, "EKIBEN_LIFELINE_FD": str(reading)},
                folder=str(folder),
                pass_fds=list(pass_fds),
                lifeline=reading,
                logs=list(logs),
                log_rate=LOG_RATE,
                groups=list(groups),
                bounds=bounds or Bounds(),
                cage=cage,
            )
            with tempfile.TemporaryFile() as asked, Path(logs[-1].path).open("ab") as errors:
                asked.write(order.encode())
                asked.seek(0)
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(SUPERVISOR)],
                    env={},  # what it has, it gives to the program by the order alone
                    cwd=folder,
                    stdin=asked,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=(reading, *pass_fds),
                    start_new_session=True,
                )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(reading)
        self.pid = self.process.pid
        self._record = records / f"{self.pid}.json"
        try:
            record(records, self.pid)
        except BaseException:  # a full disk: a next service would not know of the child
            self.kill()
            raise

    @property
    def running(self) -> bool:
        return self.poll() is None

    def poll(self) -> int | None:
        """The exit code once the program has ended, with all that it had started."""
        if self.process.poll() is None:
            return None
        self._cleanup()
        return self.process.returncode

    def terminate(self) -> None:
        """Ask the child to finish its requests and end."""
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child and everything it started."""
        if self.process.returncode is None:
            self._cut()
            try:
                self.process.wait(_KILL_SECONDS)
            except subprocess.TimeoutExpired:
                kill_tree(self.pid)
                self.process.wait()
        self._cleanup()

    def memory(self) -> int:
        """Resident bytes of the program and its descendants together."""
        total = 0
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def pids(self) -> list[int]:
        """Of the program and its descendants."""
        return [process.pid for process in self._family()]

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            return []

    def _cut(self) -> None:
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _cleanup(self) -> None:
        self._record.unlink(missing_ok=True)
        self._cut()


def record(records: Path, pid: int) -> Path:
    """Write down that a child leads a group of its own, for a next service that has to end it."""
    path = records / f"{pid}.json"
    with contextlib.suppress(psutil.Error):
        path.write_text(json.dumps({"pid": pid, "started": psutil.Process(pid).create_time()}))
    return path


def sweep(records: Path) -> int:
    """End the processes that an earlier service recorded and could not end; how many there were."""
    records.mkdir(parents=True, exist_ok=True)
    ended = 0
    for record in records.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            known = json.loads(record.read_text())
            process = psutil.Process(known["pid"])
            if abs(process.create_time() - known["started"]) < 1:  # not another process with the same number
                kill_tree(known["pid"])
                ended += 1
        record.unlink(missing_ok=True)
    return ended


def kill_tree(pid: int) -> None:
    """End a process with its group, and all of its descendants in whatever group they are."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(pid).children(recursive=True)
    kill_group(pid)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()


def kill_group(pid: int) -> None:
    """End a process and everything in its session's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
