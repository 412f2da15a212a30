"""SHA-256 beside the pass that uses the bytes.

A layer of weights is hashed twice while it is read once: each file against the manifest, and the whole tar for the
layer's digest. hashlib lets go of the interpreter for large pieces, so each of the two runs in a thread of its own, and
the pass itself only reads and writes.
"""

from __future__ import annotations

import hashlib
import threading
from queue import SimpleQueue

_WORTH_A_THREAD = 4 << 20
_AHEAD = 4
"""Pieces that may wait for their hash: what bounds the memory."""


class Sha256:
    """The hash of a stream of about `size` bytes, given in immutable pieces; a small one is hashed on the spot.

    `hexdigest` ends it and may be asked again. `close` gives its thread back where it does not come to that.
    """

    def __init__(self, size: int) -> None:
        self._hash = hashlib.sha256()
        self._pieces: SimpleQueue[bytes | None] = SimpleQueue()
        self._room = threading.Semaphore(_AHEAD)
        self._thread: threading.Thread | None = None
        self._large = size >= _WORTH_A_THREAD

    def update(self, piece: bytes) -> None:
        if not self._large:
            self._hash.update(piece)
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
            self._thread.start()
        self._room.acquire()
        self._pieces.put(piece)

    def hexdigest(self) -> str:
        self.close()
        return self._hash.hexdigest()

    def close(self) -> None:
        if self._thread is not None:
            self._pieces.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (piece := self._pieces.get()) is not None:
            self._hash.update(piece)
            self._room.release()
