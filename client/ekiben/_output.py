"""What a command prints. Results go to stdout; progress, notes and errors to stderr.

With `--json`, stdout holds one JSON value (or one a line, for logs) and nothing else, and errors are JSON on stderr.
Without a terminal everything is plain lines: no colours, no bars, nothing that moves.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ekiben._errors import EkibenError

_GREEN, _RED, _DIM, _RESET = "\x1b[32m", "\x1b[31m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Output:
    """`as_json`: machine output; `colour`: stdout is a terminal; `live`: stderr is one, so bars may move on it."""

    as_json: bool = False
    colour: bool = False
    live: bool = False

    def value(self, value: Any) -> None:
        """Print a JSON value, indented for a human."""
        _write(sys.stdout, json.dumps(value, indent=2, ensure_ascii=False))

    def line(self, text: str = "") -> None:
        _write(sys.stdout, text)

    def ticks(self, *done: str) -> None:
        """Things that are done, with a tick each, in one line."""
        mark = f"{_GREEN}✓{_RESET}" if self.colour else "✓"
        _write(sys.stdout, "   ".join(f"{mark} {text}" for text in done))

    def note(self, text: str) -> None:
        """Something that the user should know and no program reads."""
        _write(sys.stderr, text)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], empty: str) -> None:
        """Aligned columns; `empty` says what to do when there are no rows."""
        if not rows:
            self.note(empty)
            return
        cells = [[cell(row.get(name)) for name in columns] for row in rows]
        heads = [name.upper() for name in columns]
        widths = [max(len(line[at]) for line in [heads, *cells]) for at in range(len(columns))]
        for number, line in enumerate([heads, *cells]):
            text = "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
            _write(sys.stdout, f"{_DIM}{text}{_RESET}" if self.colour and number == 0 else text)

    def error(self, error: EkibenError) -> None:
        if self.as_json:
            _write(sys.stderr, json.dumps({"error": error.problem()}, ensure_ascii=False))
            return
        head = f"{_RED}error{_RESET}" if self.live else "error"
        where = f" (field {error.field})" if error.field else ""
        _write(sys.stderr, f"{head}: {error.code}: {error.message}{where}")
        if error.hint:
            _write(sys.stderr, f"  hint: {error.hint}")

    @contextmanager
    def uploading(self, label: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
        """Two functions, for the total and the sent bytes. A bar on a terminal, one line elsewhere, else nothing."""
        if self.as_json:
            yield (lambda _total: None), (lambda _sent: None)
        elif not self.live:
            yield (lambda total: self.note(f"uploading {label} ({size(total)})")), (lambda _sent: None)
        else:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as Speed

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), Speed(), TimeRemainingColumn())
            with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task(f"uploading {label}", total=None)
                yield (
                    (lambda total: bar.update(task, total=total)),
                    (lambda sent: bar.update(task, completed=sent)),
                )

    @contextmanager
    def stages(self) -> Iterator[Callable[[str], None]]:
        """A function that shows the stage reached: a spinner on a terminal, a line per new stage elsewhere."""
        if self.as_json:
            yield lambda _stage: None
        elif not self.live:
            last = ""

            def say(stage: str) -> None:
                nonlocal last
                if stage != last:
                    last = stage
                    self.note(stage)

            yield say
        else:
            from rich.console import Console

            with Console(stderr=True).status("") as status:
                yield lambda stage: status.update(stage)


def output(as_json: bool, environment: Mapping[str, str]) -> Output:
    """The output for this process; NO_COLOR and TERM=dumb are honoured."""
    plain = as_json or bool(environment.get("NO_COLOR")) or environment.get("TERM") == "dumb"
    return Output(
        as_json=as_json,
        colour=not plain and sys.stdout.isatty(),
        live=not as_json and environment.get("TERM") != "dumb" and sys.stderr.isatty(),
    )


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list)):
        return json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split())


def size(count: float) -> str:
    """Bytes as a human reads them, in powers of 1000 as disks and file managers count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def when(moment: Any) -> str:
    """A time of the API, ISO 8601 or seconds since 1970, as local time."""
    import datetime

    try:
        if isinstance(moment, (int, float)):
            time = datetime.datetime.fromtimestamp(moment, datetime.UTC)
        else:
            time = datetime.datetime.fromisoformat(str(moment))
    except (ValueError, OverflowError, OSError):
        return cell(moment)
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _write(stream: Any, text: str) -> None:
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # a terminal that cannot write ✓ shall still show the rest
        encoding = stream.encoding or "ascii"
        print(text.replace("✓", "+").encode(encoding, "replace").decode(encoding), file=stream, flush=True)
