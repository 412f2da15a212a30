"""A folder as a tar stream whose length is known before its first byte, in constant memory.

The same files give the same bytes: names sorted, times and owners fixed. So a second push of an unchanged project is
recognised as the version that is already there.
"""

from __future__ import annotations

import fnmatch
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ekiben._errors import UsageError

_BLOCK = 512
_CHUNK = 1024 * 1024
_MOST_FILES = 100_000

# What no server needs: history, environments, caches. A project's .gitignore is not read, because it usually lists the
# model files; what a project wants to leave out besides goes into .bentoignore, as with `bentoml build`.
EXCLUDED_FOLDERS = frozenset(
    {
        ".git", ".hg", ".svn", "__pycache__", ".venv", "venv", ".tox", ".nox", "node_modules", ".ipynb_checkpoints",
        ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".idea", ".vscode", ".ekiben",
    }
)  # fmt: skip
EXCLUDED_FILES = ("*.pyc", "*.pyo", ".DS_Store", "*.swp", ".env")
IGNORE_FILE = ".bentoignore"


@dataclass(frozen=True)
class Member:
    """One file: its name in the archive, where it is, its size in bytes and whether it may be executed."""

    name: str
    path: Path
    size: int
    executable: bool = False

    def header(self) -> bytes:
        info = tarfile.TarInfo(self.name)
        info.size = self.size
        info.mode = 0o755 if self.executable else 0o644
        return info.tobuf(tarfile.PAX_FORMAT)

    @property
    def padding(self) -> int:
        return -self.size % _BLOCK


@dataclass(frozen=True)
class Folder:
    """A folder's files as they were when it was listed; `stream` fails when one has changed its size since."""

    root: Path
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        """Bytes of the tar stream."""
        content = sum(len(member.header()) + member.size + member.padding for member in self.members)
        return content + 2 * _BLOCK

    def stream(self) -> Iterator[bytes]:
        for member in self.members:
            yield member.header()
            yield from read_exactly(member.path, member.size)
            if member.padding:
                yield bytes(member.padding)
        yield bytes(2 * _BLOCK)


def folder(root: Path) -> Folder:
    """List a folder's files. Links are followed (a server refuses links in archives), each folder once."""
    patterns = _patterns(root)
    seen = {os.path.realpath(root)}
    members: list[Member] = []
    waiting = [root]
    while waiting:
        current = waiting.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise UsageError(f"the folder {current} cannot be read: {error.strerror}", code="unreadable") from None
        for entry in entries:
            path = Path(entry.path)
            name = path.relative_to(root).as_posix()
            if entry.is_dir():
                real = os.path.realpath(path)
                if entry.name in EXCLUDED_FOLDERS or _ignored(name, True, patterns) or real in seen:
                    continue
                seen.add(real)
                waiting.append(path)
            elif entry.is_file():
                if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in EXCLUDED_FILES):
                    continue
                if _ignored(name, False, patterns):
                    continue
                status = entry.stat()
                members.append(Member(name, path, status.st_size, bool(status.st_mode & 0o100)))
            elif entry.is_symlink():
                raise UsageError(
                    f"{path} is a link to nothing", code="broken_link", hint=f"delete it, or name it in {IGNORE_FILE}"
                )
            if len(members) > _MOST_FILES:
                raise UsageError(
                    f"{root} holds more than {_MOST_FILES} files",
                    code="too_many_files",
                    hint=f"push the project's own folder; name in {IGNORE_FILE} what it does not need",
                )
    if not members:
        raise UsageError(
            f"the folder {root} holds no files", code="empty_folder", hint="push a model file or a project"
        )
    return Folder(root, tuple(sorted(members, key=lambda member: member.name)))


def read_exactly(path: Path, size: int) -> Iterator[bytes]:
    """A file's bytes in chunks; a file that became shorter or longer is an error, not a wrong upload."""
    left = size
    try:
        with path.open("rb") as stream:
            while left > 0 and (chunk := stream.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
            longer = left == 0 and bool(stream.read(1))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", code="unreadable", field="file") from None
    if left or longer:
        raise UsageError(
            f"{path} changed while it was uploaded",
            code="file_changed",
            field="file",
            hint="wait for its writer, then push",
        )


def _patterns(root: Path) -> list[str]:
    try:
        lines = (root / IGNORE_FILE).read_text("utf-8").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _ignored(name: str, is_folder: bool, patterns: list[str]) -> bool:
    """Git's rules in short: the last pattern that matches decides, `!` takes back, `/` at the end means folders."""
    verdict = False
    for pattern in patterns:
        wanted = pattern.removeprefix("!")
        if wanted.endswith("/"):
            if not is_folder:
                continue
            wanted = wanted[:-1]
        # A pattern with a slash is anchored at the root, one without matches at any depth.
        target = name if "/" in wanted else name.rsplit("/", 1)[-1]
        if fnmatch.fnmatchcase(target, wanted.removeprefix("/")):
            verdict = not pattern.startswith("!")
    return verdict
