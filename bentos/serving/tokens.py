"""Tokens of inference in a file that others write: a line for each SHA-256, in hexadecimal."""

from __future__ import annotations

import os
import time
from pathlib import Path

_SECONDS = 1.0  # between two looks at the file


class TokensFile:
    """While the file is not there, or cannot be read, no token is valid."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._looked = float("-inf")
        self._stamp: tuple[int, int, int] | None = None
        self._digests: tuple[bytes, ...] = ()

    def digests(self) -> tuple[bytes, ...]:
        if time.monotonic() - self._looked >= _SECONDS:
            self._looked = time.monotonic()
            try:
                found = os.stat(self._path)
                stamp = (found.st_ino, found.st_size, found.st_mtime_ns)
                if stamp != self._stamp:
                    self._digests, self._stamp = _parsed(self._path.read_text()), stamp
            except OSError:
                self._digests, self._stamp = (), None
        return self._digests


def _parsed(text: str) -> tuple[bytes, ...]:
    found = (line.strip().lower() for line in text.splitlines())
    return tuple(bytes.fromhex(line) for line in found if len(line) == 64 and set(line) <= set("0123456789abcdef"))
