"""An upload as the recognisers see it: named files of known sizes that can be read at any place, never executed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn

from registry.errors import UserError
from registry.signature import Signature

OpenFile = Callable[[str], BinaryIO]
"""Opens a file of the upload by its path, for reading and seeking."""


@dataclass(frozen=True)
class Recognised:
    """What an upload is.

    `path` is the file by which the format is known: a loader opens it and finds everything else from there. `parts` are
    the other files that belong to the model, such as shards or external data; they are data, whatever they look like.
    `kind` is set only where the format settles it (`project`), `notes` are plain sentences for the user, `example` is a
    request's body that came with it, `needs` are packages that its kind has not: the version's own requirements must
    name them.
    """

    format: str
    path: str
    kind: str | None = None
    signature: Signature | None = None
    notes: tuple[str, ...] = field(default=())
    example: Any = None
    needs: tuple[str, ...] = ()
    parts: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Upload:
    """`sizes` maps each path to its size in bytes."""

    sizes: dict[str, int]
    open: OpenFile

    def head(self, path: str, count: int) -> bytes:
        """Up to `count` bytes from the start of a file."""
        with self.open(path) as stream:
            return read_up_to(stream, count)


def read_up_to(stream: BinaryIO, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the stream; raw streams may give fewer bytes a call."""
    parts = []
    while count > 0:
        part = stream.read(min(count, 1 << 20))
        if not part:
            break
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def truncated(path: str, what: str, saved_by: str) -> NoReturn:
    """UserError `truncated_model`: the file starts well and ends early."""
    raise UserError(
        "truncated_model",
        f"{shown(path)} is not complete: {what}.",
        field="file",
        hint=f"Copy or upload the file again; if it is short at its source too, save it again with {saved_by}.",
    )


def invalid(path: str, what: str, saved_by: str) -> NoReturn:
    """UserError `invalid_model`: the file is of a known format and not well-formed."""
    raise UserError(
        "invalid_model", f"{shown(path)} is damaged: {what}.", field="file", hint=f"Save it again with {saved_by}."
    )


def shown(text: str) -> str:
    """User text for an error: printable and short."""
    plain = "".join(character if character.isprintable() else "?" for character in text)
    return plain if len(plain) <= 120 else plain[:117] + "..."
