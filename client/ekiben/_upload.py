"""A multipart form that streams from disk: its length is known before, its memory is one chunk.

Fields come before files, so that a server knows the name and the kind before the first byte of a model arrives.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiben import _archive
from ekiben._errors import UsageError

Progress = Callable[[int], None]
"""Called with the bytes sent so far, from the first to the last."""


@dataclass(frozen=True)
class Part:
    """One part of the form: its header, its size in bytes, and how to read its body once more."""

    header: bytes
    size: int
    body: Callable[[], Iterator[bytes]]


@dataclass(frozen=True)
class Form:
    """A multipart body that can be sent more than once."""

    parts: tuple[Part, ...]
    boundary: str = field(default_factory=lambda: "ekiben-" + secrets.token_hex(16))

    @property
    def content_type(self) -> str:
        return f"multipart/form-data; boundary={self.boundary}"

    @property
    def size(self) -> int:
        opening = len(self.boundary) + 4
        return sum(opening + len(part.header) + part.size + 2 for part in self.parts) + opening + 2

    def stream(self, progress: Progress | None = None) -> Iterator[bytes]:
        sent = 0
        for chunk in self._chunks():
            yield chunk
            # After the yield: the transport took the chunk, so the count is of bytes handed over, not of bytes read.
            sent += len(chunk)
            if progress is not None:
                progress(sent)

    def _chunks(self) -> Iterator[bytes]:
        opening = b"--" + self.boundary.encode() + b"\r\n"
        for part in self.parts:
            yield opening + part.header
            yield from part.body()
            yield b"\r\n"
        yield b"--" + self.boundary.encode() + b"--\r\n"


def form(
    paths: Sequence[Path],
    *,
    fields: Mapping[str, str | None],
    documents: Mapping[str, Any] | None = None,
    requirements: Path | None = None,
) -> Form:
    """The upload of one version.

    `paths` are model files, or one folder, which is sent as a tar; `fields` are short texts (None is left out);
    `documents` are JSON values or bytes for `sample` and `expected`; `requirements` is a lock or requirements file.
    With no paths the fields say where the model is: in MLflow, or in an upload in parts.
    """
    if not paths and not any(fields.get(name) for name in ("run_id", "model_uri", "upload_id")):
        raise UsageError("there is nothing to push", code="no_file", field="file", hint="ekiben push MODEL_FILE")
    folders = [path for path in paths if path.is_dir()]
    if folders and len(paths) > 1:
        raise UsageError(
            f"{folders[0]} is a folder, and a folder is pushed alone",
            code="folder_and_files",
            field="file",
            hint="push the files of one model together, or one folder",
        )
    parts = [_field(name, value) for name, value in fields.items() if value is not None]
    for name, document in (documents or {}).items():
        if document is not None:
            parts.append(_bytes(name, f"{name}.json", "application/json", _document(name, document)))
    if requirements is not None:
        parts.append(_file("requirements", requirements))
    if folders:
        listed = _archive.folder(folders[0])
        name = f"{folders[0].resolve().name or 'model'}.tar"
        parts.append(Part(_header("file", name, "application/x-tar"), listed.size, listed.stream))
    else:
        names = [path.name for path in paths]
        if len(set(names)) != len(names):
            raise UsageError(
                "two files have the same name", code="duplicate_file", field="file", hint="push their folder"
            )
        parts.extend(_file("file", path) for path in paths)
    return Form(tuple(parts))


def _field(name: str, value: str) -> Part:
    return _part(_header(name), value.encode())


def _bytes(name: str, filename: str, media_type: str, value: bytes) -> Part:
    return _part(_header(name, filename, media_type), value)


def _part(header: bytes, value: bytes) -> Part:
    return Part(header, len(value), lambda: iter((value,) if value else ()))


def _file(name: str, path: Path) -> Part:
    try:
        size = path.stat().st_size
        regular = path.is_file()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}", code="no_such_file", field=name, hint="check the path") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", code="unreadable", field=name) from None
    if not regular:
        raise UsageError(f"{path} is not a regular file", code="not_a_file", field=name, hint="copy it to a file first")
    if size == 0:
        raise UsageError(f"{path} is empty", code="empty_file", field=name, hint="was it written to its end?")
    return Part(_header(name, path.name, "application/octet-stream"), size, lambda: _archive.read_exactly(path, size))


def _header(name: str, filename: str | None = None, media_type: str | None = None) -> bytes:
    lines = f'Content-Disposition: form-data; name="{_quoted(name)}"'
    if filename is not None:
        lines += f'; filename="{_quoted(filename)}"'
    if media_type is not None:
        lines += f"\r\nContent-Type: {media_type}"
    return lines.encode() + b"\r\n\r\n"


def _quoted(text: str) -> str:
    # The HTML standard's rule for multipart/form-data: these three and no others.
    return text.replace('"', "%22").replace("\r", "%0D").replace("\n", "%0A")


def _document(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name} has no JSON form: {error}", code=f"bad_{name}", field=name) from None
