"""Bytecode for environments that serving processes cannot write to.

A process says which modules it had to compile. Only their names count: what is compiled are the environment's own
sources, by its interpreter, without running any of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
from pathlib import Path

_LONGEST_LIST = 4 << 20  # bytes
_SECONDS = 600.0
_COMPILE = """
import os, py_compile, sys
os.nice(19)
for line in sys.stdin:
    try:
        py_compile.compile(line.rstrip("\\n"), doraise=True)
    except Exception:
        pass
"""


class Compiler:
    """Compiles for one process after the other, in a thread that nothing waits for."""

    def __init__(self) -> None:
        self._lock, self._closed = threading.Lock(), False
        self._process: subprocess.Popen[str] | None = None

    def compile(self, environment: Path, listed: Path) -> None:
        """Compile what a process has listed of the modules of its environment; returns at once."""
        sources = _sources(environment, listed)
        if sources:
            threading.Thread(target=self._run, args=(environment, sources), name="bytecode", daemon=True).start()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(AttributeError):
            self._process.kill()  # type: ignore[union-attr]

    def _run(self, environment: Path, sources: list[str]) -> None:
        with self._lock:
            if self._closed:
                return
            self._process = subprocess.Popen(
                [str(environment / "bin" / "python"), "-I", "-S", "-c", _COMPILE],
                env={}, cwd=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                text=True, start_new_session=True,
            )  # fmt: skip
            try:
                self._process.communicate("".join(f"{source}\n" for source in sources), timeout=_SECONDS)
            except (subprocess.TimeoutExpired, OSError):
                self._process.kill()
                self._process.wait()


def _sources(environment: Path, listed: Path) -> list[str]:
    """The sources below the environment that are named in the list, which is read as one reads an upload."""
    try:
        descriptor = os.open(listed, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return []
    with open(descriptor, "rb") as file:
        try:
            names = json.loads(file.read(_LONGEST_LIST))
        except (OSError, ValueError, RecursionError):
            return []
    inside = os.path.realpath(environment / "lib") + "/"
    found = (name for name in names if isinstance(name, str)) if isinstance(names, list) else ()
    sources = [name for name in found if name.endswith(".py") and "\n" not in name]
    return [name for name in sources if os.path.realpath(name).startswith(inside)]
