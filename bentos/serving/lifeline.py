"""No orphan survives its parent: when the other end of an inherited pipe closes, this process group ends."""

from __future__ import annotations

import os
import signal
import threading


def hold(descriptor: int) -> threading.Thread:
    """Watch the pipe in a thread. At its end of file the group is killed, as there is nobody left to drain for."""
    os.set_inheritable(descriptor, False)
    thread = threading.Thread(target=_watch, args=(descriptor,), name="lifeline", daemon=True)
    thread.start()
    return thread


def _watch(descriptor: int) -> None:
    try:
        while os.read(descriptor, 4096):
            pass
    except OSError:
        pass  # a pipe that cannot be read is as good as closed
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    # the group belongs to somebody else (a shell): end only this process
    os.kill(os.getpid(), signal.SIGKILL)
