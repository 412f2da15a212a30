"""How a build ends: its exit code, what is said of a failure, and files that are whole or not there."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from builder_image.process import redact
from registry import digest
from registry.errors import EkibenError, InfrastructureError, UserError

OK, USER_ERROR, INFRASTRUCTURE_ERROR, LIMIT = 0, 2, 3, 4
TERMINATION_LOG = "/dev/termination-log"
_LONGEST_NOTE = 4096  # bytes: all that Kubernetes keeps

Problem = dict[str, str | None]


def problem(error: Exception) -> tuple[Problem, int]:
    """What to say of an error, and the exit code."""
    if isinstance(error, EkibenError):
        code = USER_ERROR if isinstance(error, UserError) else INFRASTRUCTURE_ERROR
        return {"code": error.code, "message": redact(error.detail), "hint": error.hint}, code
    import traceback

    traceback.print_exception(error)
    if isinstance(error, MemoryError):
        return {"code": "out_of_memory", "message": "the build ran out of memory", "hint": "give it more memory"}, LIMIT
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        full = InfrastructureError("disk_full", "the disk is full", hint="free some space and try again")
        return problem(full)
    text = redact(f"{type(error).__name__}: {error}")[:500]
    return {"code": "internal_error", "message": text, "hint": "see the build's log"}, INFRASTRUCTURE_ERROR


def note(env: Mapping[str, str], stage: str, said: Problem) -> None:
    """Leave a failure where Kubernetes looks for it (EKIBEN_TERMINATION_LOG), if there is such a place."""
    named = env.get("EKIBEN_TERMINATION_LOG")
    place = Path(named or TERMINATION_LOG)
    if not named and not place.exists():
        return
    whole = {"stage": stage, **said}
    data = digest.canonical_json(whole)
    while len(data) > _LONGEST_NOTE:
        longest = max(("message", "hint"), key=lambda name: len(whole[name] or ""))
        text = whole[longest] or ""
        whole[longest] = text[: len(text) // 2] + "…"
        data = digest.canonical_json(whole)
    try:
        place.write_bytes(data)
    except OSError:
        return  # a build's exit code and log say the same


def write(place: Path, value: object) -> None:
    """A JSON file, whole or not at all: whoever waits for it may read it at once."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=place.parent, delete=False) as file:
        file.write(digest.canonical_json(value))
    os.chmod(file.name, 0o644)
    os.replace(file.name, place)
