"""Progress of a build: one JSON line a step on a stream that the caller reads, and the seconds of each stage."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from builder_image.spec import Stage


class Progress:
    """Lines are JSON: `{"stage", "message"}` when a stage starts or says something, with `seconds` when it ends. With
    `plain` they are text, for people."""

    def __init__(self, stream: TextIO, *, plain: bool = False) -> None:
        self._stream = stream
        self._plain = plain
        self._stages: list[Stage] = []
        self.current = "start"

    @property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(self._stages)

    @contextmanager
    def stage(self, name: str, message: str) -> Iterator[None]:
        """Name what runs now; an error that leaves the block keeps `current`, so that it can be reported."""
        self.current = name
        self._write({"stage": name, "message": message})
        start = time.monotonic()
        yield
        seconds = round(time.monotonic() - start, 3)
        self._stages.append(Stage(stage=name, seconds=seconds))
        self._write({"stage": name, "message": "done", "seconds": seconds})

    def say(self, message: str) -> None:
        self._write({"stage": self.current, "message": message})

    def _write(self, line: dict[str, object]) -> None:
        if self._plain:
            if line["message"] != "done":
                print(f"{line['stage']}: {line['message']}", file=self._stream, flush=True)
            return
        print(json.dumps(line, ensure_ascii=False), file=self._stream, flush=True)
