"""Log files of builds and serving processes: read once, or followed while they grow."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

_LONGEST_LINE = 64 * 1024
_TAIL = 64 * 1024  # bytes of a log's end that a follower sees first


def lines(path: Path, *, follow: bool, finished: Callable[[], bool]) -> Iterator[str]:
    """Lines of a file without their ends; with `follow`, new ones as they come, until `finished()`.

    An empty string means that there is nothing at the moment: the consumer waits as it likes before it asks again. This
    never sleeps, so a thread that is shared with others is never held.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        return
    rest = b""
    with stream:
        while True:
            ended = finished()  # asked before reading: what was written before the end is not missed
            chunk = stream.read(_LONGEST_LINE)
            if chunk:
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line.decode(errors="replace")
                if len(rest) > _LONGEST_LINE:
                    yield rest.decode(errors="replace")
                    rest = b""
                continue
            if not follow or ended:
                if rest:
                    yield rest.decode(errors="replace")
                return
            yield ""


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
    open_files: dict[Path, _Tail] = {}
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


class _Tail:
    """A file that is read while it grows."""

    def __init__(self, stream: BinaryIO, start: int) -> None:
        self._stream, self._rest = stream, b""
        self.at_end = False
        if start > 0:
            stream.seek(start - 1)
            stream.readline()  # a line that was begun before: not shown by half

    def read(self, *, whole: bool) -> list[str]:
        """The next complete lines; with `whole`, an unfinished one at the end too."""
        chunk = self._stream.read(_LONGEST_LINE)
        self.at_end = not chunk
        *found, self._rest = (self._rest + chunk).split(b"\n")
        if self._rest and (len(self._rest) > _LONGEST_LINE or (whole and self.at_end)):
            found.append(self._rest)
            self._rest = b""
        return [line.decode(errors="replace") for line in found]

    def close(self) -> None:
        self._stream.close()


def _open(open_files: dict[Path, _Tail], path: Path, *, tail: bool) -> None:
    try:
        stream = path.open("rb")
    except FileNotFoundError:  # the oldest ones are deleted
        return
    open_files[path] = _Tail(stream, path.stat().st_size - _TAIL if tail else 0)
