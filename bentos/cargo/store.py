"""The picture store: one folder, from which callers may name pictures by their paths in it. Nothing else is opened.

A path is opened part by part, each relative to the folder opened before it and never through a link (`openat` with
O_NOFOLLOW), so that no change in the folder while it is read leads anywhere else. That is what openat2's
RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS do on Linux, which Python does not offer.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bentos.serving import ModelFolder, Problem, StartError
from bentos.serving.pictures import MAX_BYTES

VARIABLE = "EKIBEN_FOLDER"
FIELD = "image_path"
OWN_FOLDER = "pictures"
"""In the version's own files: the store where VARIABLE is not set."""

_LONGEST_PATH = 1024
_HINT = "send the path of a picture in the store, such as monday/brick/test-00001.png"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def find(environ: Mapping[str, str], model: ModelFolder) -> Store:
    """The store that the operator named, else the pictures that came with the version, else none.

    Raises StartError `bad_setting` where VARIABLE names no folder that can be read.
    """
    named = environ.get(VARIABLE)
    if named:
        try:
            os.close(os.open(named, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        except (OSError, ValueError) as error:
            message = f"{VARIABLE}: {named!r} is no folder that can be read: {error}"
            raise StartError("bad_setting", message, f"mount the pictures there, or correct {VARIABLE}") from error
        return Store(Path(named).absolute(), "operator")
    if any(name.startswith(f"{OWN_FOLDER}/") for name in model.files):
        return Store(model.root / "files" / OWN_FOLDER, "version")
    return Store(None, None)


@dataclass(frozen=True)
class Store:
    """Reads pictures below `folder`; without a folder it refuses every path."""

    folder: Path | None
    kind: str | None
    """Whose it is: `operator`, `version`, or None where there is none."""

    def read(self, path: Any) -> bytes:
        """The file's bytes, at most MAX_BYTES.

        Raises Problem, always of image_path: `bad_image_path` for what is no path in the store, `no_such_picture`
        (404), `unreadable_picture`, `picture_too_large`, `no_picture_store`; `picture_store_failed` (503).
        """
        parts = _parts(path)
        if self.folder is None:
            hint = f"send the picture itself, or let the operator set {VARIABLE}"
            raise _problem("no_picture_store", "this deployment has no picture store", hint)
        # opened anew each time: the operator may put another folder in its place
        try:
            at = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            detail = f"the picture store cannot be read: {error.strerror}"
            raise Problem("picture_store_failed", detail, field=FIELD, hint="try again later", status=503) from error
        try:
            for part in parts[:-1]:
                _refuse_link(at, part, path)
                below = os.open(part, _FOLDER, dir_fd=at)
                os.close(at)
                at = below
            return _read_file(at, parts[-1], path)
        except OSError as error:
            raise _translated(error, path) from error
        finally:
            os.close(at)


def _parts(path: Any) -> list[str]:
    """The parts of a plain relative path. Raises Problem `bad_image_path`."""
    if not isinstance(path, str):
        raise _problem("bad_image_path", f"{FIELD} is not text")
    if not path or len(path) > _LONGEST_PATH:
        raise _problem("bad_image_path", f"{FIELD} has {len(path)} characters, not 1 to {_LONGEST_PATH}")
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) < 0xE000 for c in path):
        raise _problem("bad_image_path", f"{FIELD} holds a character that no path in the store has")
    if _URL.match(path):
        raise _problem("bad_image_path", f"{FIELD} is a URL: pictures are read from the store only, never fetched")
    if path.startswith(("/", "\\", "~")) or "\\" in path:
        raise _problem("bad_image_path", f"{FIELD} is no relative path with /")
    parts = path.split("/")
    if ".." in parts:
        raise _problem("bad_image_path", f"{FIELD} leaves the store by ..")
    if any(not part or part.startswith(".") for part in parts):
        raise _problem("bad_image_path", f"{FIELD} has a part that is empty or starts with a dot")
    return parts


def _read_file(folder: int, name: str, path: str) -> bytes:
    _refuse_link(folder, name, path)
    if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise _problem("unreadable_picture", f"{FIELD} {path!r} is no file")
    descriptor = os.open(name, _FILE, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # it was another thing when it was looked at
            raise _problem("unreadable_picture", f"{FIELD} {path!r} is no file")
        parts, size = [], 0
        while size <= MAX_BYTES and (part := os.read(descriptor, MAX_BYTES + 1 - size)):
            parts.append(part)
            size += len(part)
    finally:
        os.close(descriptor)
    if size > MAX_BYTES:
        raise _problem("picture_too_large", f"{FIELD} {path!r} has more than {MAX_BYTES} bytes", "name a smaller file")
    return b"".join(parts)


def _refuse_link(folder: int, name: str, path: str) -> None:
    """For the reason alone: what opens the part does not follow a link either."""
    if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise _linked(path)


def _linked(path: str) -> Problem:
    return _problem("bad_image_path", f"{FIELD} {path!r} goes through a link, and links are not followed")


def _translated(error: OSError, path: str) -> Problem:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
        return _problem("no_such_picture", f"the store has no picture {path!r}", status=404)
    if error.errno == errno.ELOOP:
        return _linked(path)
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENXIO):
        return _problem("unreadable_picture", f"{FIELD} {path!r} cannot be read: {error.strerror}")
    detail = f"the picture store failed: {error.strerror}"
    return Problem("picture_store_failed", detail, field=FIELD, hint="try again later", status=503)


def _problem(code: str, detail: str, hint: str = _HINT, status: int = 422) -> Problem:
    return Problem(code, detail, field=FIELD, hint=hint, status=status)
