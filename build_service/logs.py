"""Log files of builds and serving processes: read once, or followed while they grow."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

_LONGEST_LINE = 64 * 1024
_TAIL = 64 * 1024  # bytes of a log's end that a follower sees first


def lines(path: Path, *, follow: bool, finished: Callable[[], bool]) -> Iterator[str]:
    """Lines of a log without their ends, those before its last rotation too; with `follow`, new ones as they come,
    until `finished()`.

    An empty string means that there is nothing at the moment: the consumer waits as it likes before it asks again. This
    never sleeps, so a thread that is shared with others is never held.
    """
    for part in (predecessor(path), path):
        try:
            log = _Log(part)
        except FileNotFoundError:
            continue
        following = follow and part == path
        try:
            while True:
                ended = finished()  # asked before reading: what was written before the end is not missed
                found = log.read(whole=not following or ended)
                yield from found
                if log.at_end and (not following or ended):
                    break
                if log.at_end:
                    yield ""
        finally:
            log.close()


def predecessor(path: Path) -> Path:
    """What a log was before it was begun again because it was full."""
    return path.with_name(f"{path.name}.1")


def printed(files: Sequence[Path], title: Callable[[Path], str]) -> Iterator[str]:
    """What the files hold now, one after the other; each under its title where there are several."""
    for path in files:
        if len(files) > 1:
            yield title(path)
        yield from lines(path, follow=False, finished=lambda: True)


def followed(
    files: Callable[[], Collection[Path]],
    written: Callable[[], Collection[Path]],
    title: Callable[[Path], str],
    *,
    ended: Callable[[], bool],
) -> Iterator[str]:
    """The end of the files that are being `written`, then what comes in them and in new ones, until `ended()`.

    `files` are all there are: one that was not there before is read from its start. A change from one file to another
    is told by a line with its `title`. Where none is being written at first, the newest by name stands for them. An
    empty string means that there is nothing at the moment, as in `lines`.
    """
    open_files: dict[Path, _Log] = {}
    known: set[Path] = set()
    told: Path | None = None
    first = True
    try:
        while True:
            # All three are asked before reading: what was written before is not missed.
            last = ended()
            alive, present = set(written()), sorted(files())
            for path in present if not first else sorted(alive & set(present)) or present[-1:]:
                if path not in known:
                    _open(open_files, path, tail=first)
            known = set(present)
            first = first and not present
            quiet = True
            for path, tail in list(open_files.items()):
                for line in tail.read(whole=path not in alive):
                    if path != told:
                        if told is not None or len(open_files) > 1:
                            yield title(path)
                        told = path
                    quiet = False
                    yield line
                if path not in alive and tail.at_end:
                    open_files.pop(path).close()
            if quiet:
                if last:
                    return
                yield ""
    finally:
        for tail in open_files.values():
            tail.close()


class _Log:
    """A log that is read while it grows, and begun again by its writer when it is full."""

    def __init__(self, path: Path, start: int = 0) -> None:
        self._path, self._stream, self._rest = path, path.open("rb"), b""
        self.at_end = False
        if start > 0:
            self._stream.seek(start - 1)
            self._stream.readline()  # a line that was begun before: not shown by half

    def read(self, *, whole: bool) -> list[str]:
        """The next complete lines; with `whole`, an unfinished one at the end too."""
        chunk = self._next()
        self.at_end = not chunk
        *found, self._rest = (self._rest + chunk).split(b"\n")
        if self._rest and (len(self._rest) > _LONGEST_LINE or (whole and self.at_end)):
            found.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace") for line in found]

    def _next(self) -> bytes:
        chunk = self._stream.read(_LONGEST_LINE)
        if chunk or not self._begun_again():
            return chunk
        chunk = self._stream.read(_LONGEST_LINE)  # what came between the last look and the rotation
        if not chunk:
            fresh = self._path.open("rb")
            self._stream.close()
            self._stream = fresh
            chunk = self._stream.read(_LONGEST_LINE)
        return chunk

    def _begun_again(self) -> bool:
        try:
            return not os.path.samestat(os.fstat(self._stream.fileno()), os.stat(self._path))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self._stream.close()


def _open(open_files: dict[Path, _Log], path: Path, *, tail: bool) -> None:
    try:
        open_files[path] = _Log(path, path.stat().st_size - _TAIL if tail else 0)
    except FileNotFoundError:  # the oldest ones are deleted
        return
