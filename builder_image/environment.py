"""Virtual environments, one a lock, kept by content: made beside their place and renamed into it.

A folder under its final name is complete. Two builders that want the same one wait for each other on a lock file that
the kernel releases when its holder dies; what a dead builder left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builder_image.installer import Tools
from builder_image.lock import Lock
from registry import digest, shelf
from registry.errors import InfrastructureError, UserError

FORMAT = 1
OLDEST_PYTHON = (3, 11)
_MARKER = "ekiben-environment.json"


@dataclass(frozen=True)
class Environment:
    dir: Path
    python: str
    """Minor version, such as `3.11`."""
    lock_digest: str
    reused: bool

    @property
    def interpreter(self) -> Path:
        return self.dir / "bin" / "python"


def minor(python: str | None) -> str:
    """The minor version to use: the one asked for, else that of the running interpreter."""
    if python is None:
        return f"{sys.version_info.major}.{sys.version_info.minor}"
    found = re.fullmatch(r"(3)\.(\d{1,2})(?:\.\d{1,3})?", python)
    if found is None or (int(found[1]), int(found[2])) < OLDEST_PYTHON:
        raise UserError(
            "bad_python",
            f"Python {python[:40]} cannot be served; it must be 3.11 or newer",
            field="python",
            hint="leave `python` out, or give a version such as 3.11",
        )
    return f"{found[1]}.{found[2]}"


def key(lock: Lock, python: str) -> str:
    """The name of an environment's folder: what it holds, for which Python and platform."""
    platform = f"{sys.platform}-{os.uname().machine}"
    return digest.of_json([FORMAT, lock.digest, python, platform]).removeprefix("sha256:")


def ensure(
    lock: Lock,
    *,
    python: str,
    cache: Path,
    tools: Tools,
    wheels: Path | None = None,
) -> Environment:
    """The environment of a lock, made when it is not there yet. Nothing but wheels with the lock's hashes is installed.

    Raises UserError `no_wheel` when a pinned package has no wheel for this Python and machine, `python_unavailable`,
    or InfrastructureError `index_unreachable`, `disk_full`, `install_failed`.
    """
    name = key(lock, python)
    place = cache / name
    if shelf.wanted(cache, name, lambda: _complete(place)):
        return Environment(place, python, lock.digest, reused=True)
    with made_once(cache, name) as fresh:
        if _complete(place):  # another builder made it while we waited
            shelf.mark(place)
            return Environment(place, python, lock.digest, reused=True)
        shutil.rmtree(place, ignore_errors=True)  # incomplete: its interpreter is gone
        _install(fresh, place, lock, python, tools, wheels)
        os.replace(fresh, place)
    return Environment(place, python, lock.digest, reused=False)


@contextlib.contextmanager
def made_once(cache: Path, name: str) -> Iterator[Path]:
    """A path for a new folder beside `cache/name`, for one builder at a time; it is removed if it was not renamed."""
    cache.mkdir(parents=True, exist_ok=True)
    with shelf.locked(cache, name):
        for stale in cache.glob(f".{name}.*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        for stale in cache.glob(f".{name}.*.json"):
            stale.unlink(missing_ok=True)
        fresh = cache / f".{name}.{os.getpid()}.tmp"
        try:
            yield fresh
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _complete(place: Path) -> bool:
    return (place / _MARKER).is_file() and (place / "bin" / "python").exists()


def _install(
    fresh: Path,
    place: Path,
    lock: Lock,
    python: str,
    tools: Tools,
    wheels: Path | None,
) -> None:
    base = interpreter(python)
    made = tools.processes.run(
        tools.uv.argv("venv", "--relocatable", "--quiet", "--python", base, fresh), env=tools.env, cwd=fresh.parent
    )
    if made.code != 0:
        raise UserError(
            "python_unavailable",
            f"Python {python} is neither on this machine nor could it be fetched: {made.output[-400:].strip()}",
            field="python",
            hint=f"install Python {python} where Ekiben runs, or leave `python` out",
        )
    requirements = fresh / "requirements.txt"
    requirements.write_text(lock.text)
    install(requirements, fresh / "bin" / "python", (), python, tools, wheels)
    (fresh / _MARKER).write_text(json.dumps({"lock": lock.digest, "python": python}))


def interpreter(python: str) -> str:
    """The base interpreter of the running program when the version fits, else the version, for uv to find."""
    if python == minor(None):
        return os.path.realpath(getattr(sys, "_base_executable", sys.executable))
    return python


def install(
    requirements: Path,
    target: Path,
    options: tuple[str, ...],
    python: str,
    tools: Tools,
    wheels: Path | None,
) -> None:
    """Install a lock, as it is and nothing else, into the environment of the interpreter `target`."""
    own = ("--find-links", str(wheels)) if wheels is not None and wheels.is_dir() else ()
    argv = tools.uv.argv(
        "pip", "install", "--quiet", "--python", target, "--requirements", requirements,
        "--require-hashes", "--only-binary", ":all:", "--no-deps", *own, *options,
    )  # fmt: skip
    done = tools.processes.run(argv, env=tools.env, cwd=requirements.parent)
    if done.code == 0:
        return
    text = " ".join(line.strip() for line in done.output.splitlines() if line.strip())
    lower = text.lower()
    if "no space left" in lower:
        raise InfrastructureError("disk_full", f"the disk is full: {text}", hint="free some space and try again")
    wheel = re.search(r"([A-Za-z0-9._-]+)==(\S+) has no (?:usable )?wheels", text)
    if wheel is not None or "no solution found" in lower:
        package = f"{wheel[1]} {wheel[2]}" if wheel else "a package of the lock"
        raise UserError(
            "no_wheel",
            f"there is no wheel of {package} for Python {python} on this platform: {text}",
            field="requirements",
            hint="put its wheel into wheels/ of a project, or choose another version",
        )
    if "hash mismatch" in lower:
        raise InfrastructureError(
            "digest_mismatch",
            f"the package index offers another file than was locked: {text}",
            hint="resolve the requirements again, and ask whoever runs the index why the file changed",
        )
    if any(word in lower for word in ("failed to fetch", "error sending request", "timed out", "connect")):
        raise InfrastructureError(
            "index_unreachable",
            f"the package index could not be read: {text}",
            hint="check the network, HTTPS_PROXY, SSL_CERT_FILE and UV_DEFAULT_INDEX",
        )
    raise InfrastructureError("install_failed", f"the packages could not be installed: {text}")
