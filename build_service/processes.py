"""Child processes that never outlive this service and never outgrow their bounds.

Each child leads a session of its own and holds the reading end of a pipe, its lifeline: when this service ends, however
it ends, the pipe closes and the child ends its whole process group. What a child that could not read its lifeline left
behind is found by the next start through a file with its process id and start time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil


class Child:
    """A running child process with its lifeline."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        records: Path,
        stdout: IO[bytes],
        stderr: IO[bytes],
        pass_fds: Sequence[int] = (),
    ) -> None:
        reading, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                list(argv),
                env={**environment, "EKIBEN_LIFELINE_FD": str(reading)},
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
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
        except BaseException:  # a full disk: nobody would know of the child
            self.kill()
            raise

    @property
    def running(self) -> bool:
        return self.poll() is None

    def poll(self) -> int | None:
        """The exit code once the child has ended; what it had started and left behind is ended then too."""
        if self.process.returncode is None:
            if _has_ended(self.pid):
                # Not yet waited for, so its number still names its own group and nobody else's.
                kill_group(self.pid)
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
            kill_group(self.pid)
            self.process.wait()
        self._cleanup()

    def memory(self) -> int:
        """Resident bytes of the child and its descendants together."""
        total = 0
        try:
            family = [psutil.Process(self.pid)]
            family += family[0].children(recursive=True)
        except psutil.Error:
            return 0
        for process in family:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total

    def _cleanup(self) -> None:
        self._record.unlink(missing_ok=True)
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


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
                kill_group(known["pid"])
                ended += 1
        record.unlink(missing_ok=True)
    return ended


def _has_ended(pid: int) -> bool:
    """Whether a child has ended, without waiting for it; False where the system cannot tell."""
    if not hasattr(os, "waitid"):  # macOS before Python 3.13
        return False
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def kill_group(pid: int) -> None:
    """End a process and everything in its session's group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
