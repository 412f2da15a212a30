"""Programs that a build starts: argv lists, never a shell, an environment made for them, and no orphans.

The builder is started with a pipe (`--lifeline-fd`) whose other end its parent holds. When the parent dies, however it
dies, the pipe reaches its end and the builder takes itself and everything it started along.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_KEPT = {
    "PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "NETRC",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "SSL_CLIENT_CERT",
}  # fmt: skip
# settings of uv that say where packages come from and where it may write; those that change what is installed
# (UV_PRERELEASE, UV_CONSTRAINT, UV_PYTHON, …) stay outside, or one lock would give two environments
_KEPT_UV = (
    "UV_INDEX", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_NO_INDEX", "UV_INSECURE_HOST",
    "UV_CACHE_DIR", "UV_NO_CACHE", "UV_OFFLINE", "UV_NATIVE_TLS", "UV_SYSTEM_CERTS", "UV_KEYRING_PROVIDER",
    "UV_HTTP_", "UV_REQUEST_TIMEOUT", "UV_CONCURRENT_", "UV_CONFIG_FILE", "UV_LINK_MODE", "UV_PYTHON_DOWNLOADS",
    "UV_PYTHON_INSTALL_", "UV_EXCLUDE_NEWER", "UV_CREDENTIALS_DIR",
)  # fmt: skip
_CREDENTIALS = re.compile(r"://[^/\s@]+@")
_LONGEST_OUTPUT = 256 * 1024
_PIECE = 64 * 1024
_LAST_WORDS_SECONDS = 1.0  # that the end of the output may take after the program's end


@dataclass(frozen=True)
class Completed:
    code: int
    output: str
    """The end of standard output and standard error together, in the order they came."""
    timed_out: bool = False


class Processes:
    """Starts programs and knows which groups are alive, so that one call ends them all."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._tools: set[int] = set()

    def run(
        self,
        argv: Sequence[str | Path],
        *,
        env: Mapping[str, str],
        cwd: Path,
        seconds: float | None = None,
        own_session: bool = False,
    ) -> Completed:
        """Run to the end, or for `seconds`.

        Tools stay in the builder's process group, so that whoever ends that group ends them too. A user's code gets a
        session of its own: nothing that it started outlives it.
        """
        process = subprocess.Popen(
            [str(part) for part in argv],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=own_session,
        )
        assert process.stdout is not None
        output = _End(process.stdout)
        alive = self._groups if own_session else self._tools
        alive.add(process.pid)
        timed_out = False
        try:
            process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if own_session:
                _kill(process.pid)
            elif process.poll() is None:
                process.kill()
            process.wait()
            alive.discard(process.pid)
        return Completed(process.returncode, redact(output.text()), timed_out)

    def kill(self) -> None:
        for group in list(self._groups):
            _kill(group)
        for tool in list(self._tools):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(tool, signal.SIGKILL)


class _End:
    """The end of what a program writes: however much that is, no more is kept, in memory or on the disk."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._kept = b""
        self._thread = threading.Thread(target=self._read, args=(stream,), name="output", daemon=True)
        self._thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while piece := os.read(stream.fileno(), _PIECE):
                self._kept = (self._kept + piece)[-_LONGEST_OUTPUT:]

    def text(self) -> str:
        """What it was, once the program has ended; a process that it left behind is not waited for."""
        self._thread.join(_LAST_WORDS_SECONDS)
        return self._kept.decode(errors="replace")


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


def hold_lifeline(descriptor: int, processes: Processes) -> None:
    """Watch the pipe in a thread; at its end, end everything at once. Nothing needs to be saved: half-made folders
    are never under their final name."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1):
                pass
        processes.kill()
        if os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(4)

    os.set_inheritable(descriptor, False)
    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def end_on_sigterm(processes: Processes) -> None:
    """End at once, with everything that was started, when asked to: as process 1 of a container nothing else would."""

    def end(*_: object) -> None:
        processes.kill()
        os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def tool_environment(outer: Mapping[str, str]) -> dict[str, str]:
    """What uv and compileall may see of the builder's environment: paths, proxy, certificates, package index."""
    kept = {key: value for key, value in outer.items() if key in _KEPT or key.startswith(_KEPT_UV)}
    return {**kept, "LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "NO_COLOR": "1", "UV_NO_PROGRESS": "1"}


def redact(text: str) -> str:
    """Without user names and passwords in URLs: an index often carries them."""
    return _CREDENTIALS.sub("://***@", text)
