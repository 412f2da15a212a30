"""The service's own log, which `ekiben up` opens for it: begun again when it is full."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from build_service.logs import predecessor

_EVERY = 5.0  # seconds between two looks


class OwnLog:
    """Looks at standard error in a thread, and acts only where that is the log of the state folder: an operator's file
    or journal is the operator's to bound."""

    def __init__(self, path: Path, most: int) -> None:
        self._path, self._most = path, most
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="own-log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            with contextlib.suppress(OSError):
                self.look()

    def look(self, error: int = 2, output: int = 1) -> None:
        """Begin the log again if it is full. Its writers keep their descriptors, so that no line is lost."""
        written = os.fstat(error)
        if not os.path.samestat(written, os.stat(self._path)) or written.st_size <= self._most // 2:
            return
        both = os.path.samestat(written, os.fstat(output))
        os.replace(self._path, predecessor(self._path))
        fresh = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            os.dup2(fresh, error)
            if both:
                os.dup2(fresh, output)
        finally:
            os.close(fresh)
