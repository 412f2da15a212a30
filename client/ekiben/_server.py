"""The server on this machine: finding its program, starting it in the background, stopping it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ekiben import _config
from ekiben._errors import StartError

_PROGRAM = "ekiben-server"
_INSTALL = "pip install 'ekiben[server]' in this environment, or uv tool install ekiben-server"


@dataclass(frozen=True)
class Running:
    """A server that `ekiben up` started."""

    pid: int
    url: str
    log: Path


def program(environment: Mapping[str, str], interpreter: str = sys.executable) -> Path:
    """`ekiben-server` beside this interpreter, else on PATH. Raises StartError."""
    # Not resolved: in a virtual environment the interpreter is a link, and the scripts are beside the link.
    beside = Path(interpreter).parent / _PROGRAM
    if os.access(beside, os.X_OK):
        return beside
    found = shutil.which(_PROGRAM, path=environment.get("PATH"))
    if found is None:
        raise StartError(
            f"the program {_PROGRAM} is not installed here",
            code="server_not_installed",
            hint=f"{_INSTALL}; or use a server elsewhere: ekiben login URL",
        )
    return Path(found)


def server_python(environment: Mapping[str, str]) -> Path:
    """The interpreter that runs the server, from the first line of its script; for commands that run beside it."""
    script = program(environment)
    with contextlib.suppress(OSError, UnicodeDecodeError):
        with script.open("rb") as stream:
            lines = [stream.readline(4096).decode() for _ in range(2)]
        first = lines[0].removeprefix("#!").strip()
        if Path(first).name.startswith("python") and os.access(first, os.X_OK):
            return Path(first)
        # Installers write `#!/bin/sh` and `'''exec' "/long path/python" "$0" "$@"` where the path is too long for #!.
        for quote in ('"', "'"):
            for word in lines[1].split(quote):
                if Path(word).name.startswith("python") and os.access(word, os.X_OK):
                    return Path(word)
    beside = script.resolve().parent / "python"
    if os.access(beside, os.X_OK):
        return beside
    raise StartError(
        f"{script} does not tell which Python runs it", code="server_not_installed", hint=f"install it anew: {_INSTALL}"
    )


def running(environment: Mapping[str, str]) -> Running | None:
    """The server of `ekiben up`, if its process is still the one that was started."""
    known = _config.local_server(environment)
    if known is None:
        return None
    try:
        pid, started = int(known["pid"]), str(known["started"])
        found = Running(pid, str(known["url"]), Path(str(known["log"])))
    except (KeyError, ValueError):
        return None
    # A number alone may be another process by now; its start time tells them apart.
    return found if _birth(pid) == started else None


def start(
    environment: Mapping[str, str], host: str, port: int, seconds: float, ready: Callable[[str], bool]
) -> Running:
    """Start the server in the background and wait until `ready(url)`. Raises StartError, leaving no process behind."""
    command = program(environment)
    check_port(host, port)
    home = _config.home(environment)
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)  # models, logs and the token are its user's
        log = home / "server.log"
        stream = log.open("ab")
    except OSError as error:
        raise StartError(
            f"the state folder {home} cannot be written: {error.strerror}",
            code="home_not_writable",
            hint="set EKIBEN_HOME to a folder of yours",
        ) from None
    from_byte = log.stat().st_size
    with stream:
        # A session of its own, so that the interrupt of this terminal does not reach it.
        process = subprocess.Popen(
            [str(command)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            cwd=home,
            env={**environment, "EKIBEN_HOME": str(home.absolute()), "EKIBEN_HOST": host, "EKIBEN_PORT": str(port)},
        )
    url = address(host, port)
    deadline = time.monotonic() + seconds
    try:
        while not ready(url):
            if process.poll() is not None:
                raise StartError(
                    f"the server ended at its start (exit code {process.returncode}): {_last_lines(log, from_byte)}",
                    code="start_failed",
                    hint=f"its log: {log}",
                )
            if time.monotonic() > deadline:
                raise StartError(
                    f"the server was not ready after {seconds:g} s: {_last_lines(log, from_byte)}",
                    code="start_timeout",
                    hint=f"its log: {log}; a slow machine may need ekiben up --wait 300",
                )
            time.sleep(0.1)
    except BaseException:
        _end(process.pid)
        process.wait()
        raise
    state = {"pid": process.pid, "started": _birth(process.pid), "url": url, "log": str(log)}
    _config.write_private(home / "up.json", state)
    return Running(process.pid, url, log)


def stop(server: Running, environment: Mapping[str, str], seconds: float) -> bool:
    """Ask the server to end, and wait; after `seconds` it is killed. True when it ended by itself."""
    _end(server.pid)
    deadline = time.monotonic() + seconds
    while running(environment) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    gentle = running(environment) is None
    if not gentle:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGKILL)
    forget(environment)
    return gentle


def forget(environment: Mapping[str, str]) -> None:
    with contextlib.suppress(FileNotFoundError):
        (_config.home(environment) / "up.json").unlink()


def check_port(host: str, port: int) -> None:
    """Raise StartError when the port is taken or may not be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise StartError(
                f"port {port} is not allowed to you", code="port_forbidden", hint="ekiben up --port 8000 (1024 or more)"
            ) from None
        except OSError as error:
            raise StartError(
                f"port {port} of {host} cannot be used: {error.strerror}",
                code="port_taken",
                hint=f"another program has it; ekiben up --port {port + 1}",
            ) from None


def address(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::", "127.0.0.1", "localhost"):
        return f"http://localhost:{port}"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _end(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _birth(pid: int) -> str | None:
    """When a process started, in whatever form the system tells it; None when there is none, or only a zombie."""
    with contextlib.suppress(OSError, IndexError):
        # Field 2 may hold spaces and brackets, so count from the last bracket: state is field 3, starttime field 22.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] == "Z" else fields[19]
    if Path("/proc/self/stat").exists():
        return None
    told = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def _last_lines(log: Path, from_byte: int) -> str:
    with contextlib.suppress(OSError):
        with log.open("rb") as stream:
            stream.seek(from_byte)
            lines = stream.read()[-4000:].decode("utf-8", "replace").strip().splitlines()
        return " | ".join(line.strip() for line in lines[-3:]) or "it wrote nothing"
    return "its log cannot be read"
