"""Log files of builds and serving processes: read once, or followed while they grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

_LONGEST_LINE = 64 * 1024


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
