"""What is wrong with this machine or the way to the server, each finding with its remedy."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from ekiben import _config, _server
from ekiben._errors import EkibenError

_LITTLE_DISK = 5 * 10**9  # a build's environment takes up to 1 GB; five leave room for a few kinds
_NO_DISK = 10**9
_INDEX_SECONDS = 30.0


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `level` is ok, warning or error; a remedy comes with the last two."""

    topic: str
    level: str
    message: str
    remedy: str | None = None

    @property
    def mark(self) -> str:
        return {"ok": "✓", "warning": "!", "error": "✗"}[self.level]

    def shape(self) -> dict[str, Any]:
        return asdict(self)


def findings(url: str | None, registry: str | None, environment: Mapping[str, str]) -> list[Finding]:
    """Look at everything; never raises for what it finds."""
    found = [*_python(), *_server_program(environment), *_disk(environment)]
    try:
        connection = _config.connection(url, environment=environment)
    except EkibenError as error:
        return [*found, Finding("configuration", "error", error.message, error.hint)]
    found += [*_authority(connection, environment), *_proxy(connection, environment), *_reach(connection, environment)]
    found += [*_index(connection, environment), *_registry(registry)]
    return found


def _python() -> Iterator[Finding]:
    text = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", f"{text} at {sys.executable}")
    if sys.platform != "linux":
        yield Finding(
            "system", "warning", f"{sys.platform} is untested", "the client should work; run the server on Linux"
        )


def _server_program(environment: Mapping[str, str]) -> Iterator[Finding]:
    try:
        yield Finding("server program", "ok", str(_server.program(environment)))
    except EkibenError as error:
        yield Finding("server program", "warning", error.message, error.hint)


def _disk(environment: Mapping[str, str]) -> Iterator[Finding]:
    home = _config.home(environment)
    place = home
    while not place.exists() and place != place.parent:
        place = place.parent
    if not os.access(place, os.W_OK):
        yield Finding("disk", "error", f"{place} cannot be written", "set EKIBEN_HOME to a folder of yours")
        return
    free = shutil.disk_usage(place).free
    from ekiben._output import size

    message = f"{size(free)} free for {home}"
    remedy = "free some space, or set EKIBEN_HOME to a larger disk"
    if free < _NO_DISK:
        yield Finding("disk", "error", message, remedy)
    else:
        yield Finding(
            "disk", "warning" if free < _LITTLE_DISK else "ok", message, remedy if free < _LITTLE_DISK else None
        )


def _authority(connection: _config.Connection, environment: Mapping[str, str]) -> Iterator[Finding]:
    import ssl

    for name, file in (("EKIBEN_CA", connection.ca), ("SSL_CERT_FILE", environment.get("SSL_CERT_FILE"))):
        if not file:
            continue
        try:
            ssl.create_default_context(cafile=file)
            yield Finding("certificates", "ok", f"{name} {file}")
        except (OSError, ssl.SSLError) as error:
            yield Finding(
                "certificates",
                "error",
                f"{name} {file} cannot be used: {error}",
                "name a readable PEM file of certificates",
            )


def _proxy(connection: _config.Connection, environment: Mapping[str, str]) -> Iterator[Finding]:
    names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    proxies = {name: environment[name] for name in names if environment.get(name)}
    if not proxies:
        yield Finding("proxy", "ok", "none")
        return
    for name, proxy in proxies.items():
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        shown = f"{parts.hostname}:{parts.port}" if parts.port else str(parts.hostname)  # without a password
        if parts.hostname and not _connects(parts.hostname, parts.port or 80):
            yield Finding(
                "proxy",
                "warning",
                f"{name} {shown} takes no connection",
                f"correct or unset {name}; NO_PROXY names exceptions",
            )
        else:
            yield Finding("proxy", "ok", f"{name} {shown}" + (", not used for loopback" if connection.loopback else ""))


def _reach(connection: _config.Connection, environment: Mapping[str, str]) -> Iterator[Finding]:
    from ekiben._client import Client

    where = f"{connection.url} ({connection.source})"
    with Client(connection.url, connection.token, connection.ca) as client:
        try:
            client.kinds()  # needs a token where tokens are needed; readiness does not
            about = {**client.machine(), **client.about()}
        except EkibenError as error:
            level = "error"
            remedy = error.hint
            if error.code == "unreachable" and connection.loopback:
                yield from _port(connection, environment)
                level = "warning" if connection.source in ("default", "up") else "error"
                remedy = "ekiben up"
            yield Finding("server", level, f"{where}: {error.message}", remedy)
            return
        yield Finding("server", "ok", f"{where}, version {about['version']}")
        yield from _isolation(about)
        import ekiben

        mine, theirs = ekiben.__version__.split(".")[:2], str(about["version"]).split(".")[:2]
        if mine != theirs:
            yield Finding(
                "versions",
                "warning",
                f"client {ekiben.__version__}, server {about['version']}",
                "install the client of the server's version",
            )


def _isolation(about: Mapping[str, Any]) -> Iterator[Finding]:
    """What keeps models apart on the server's machine; a cluster and an older server say nothing of it."""
    by = about.get("isolation")
    if by == "none":
        remedy = "a kernel with Landlock (Linux 5.13), or a service that runs as root, keeps models from its files"
        yield Finding("isolation", "warning", "nothing keeps models from the server's files", remedy)
    elif by:
        yield Finding("isolation", "ok", f"{by}; memory by {about.get('memory')}")


def _port(connection: _config.Connection, environment: Mapping[str, str]) -> Iterator[Finding]:
    port = urlsplit(connection.url).port or 80
    try:
        _server.check_port("127.0.0.1", port)
        yield Finding("port", "ok", f"{port} is free")
    except EkibenError as error:
        yield Finding("port", "error", error.message, error.hint)


def _index(connection: _config.Connection, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Builds on this machine install packages, so their index must answer: uv asks it, as it is set up for builds."""
    uv = _uv(environment) if connection.loopback else None
    if uv is None:
        return
    named = next((n for n in ("UV_DEFAULT_INDEX", "UV_INDEX_URL") if environment.get(n)), None)
    where = f"{named} ({urlsplit(environment[named].rpartition('=')[2]).hostname})" if named else "as uv is set up"
    patience = {"UV_HTTP_TIMEOUT": "5", "UV_HTTP_RETRIES": "0"}
    # One small package's page, nothing cached; from an empty folder, where no project's settings count.
    argv = [uv, "pip", "compile", "-", "--no-deps", "--no-cache", "--no-header", "--quiet", "--color", "never"]
    try:
        with tempfile.TemporaryDirectory(prefix="ekiben-") as folder:
            done = subprocess.run(
                argv, env={**patience, **environment}, cwd=folder, input="pip\n",
                capture_output=True, text=True, timeout=_INDEX_SECONDS, check=False,
            )  # fmt: skip
        why = None if done.returncode == 0 else _cause(done.stderr)
    except subprocess.TimeoutExpired:
        why = f"no answer within {_INDEX_SECONDS:g} s"
    except OSError as error:
        why = f"uv cannot be run: {error.strerror}"
    if why is None:
        yield Finding("package index", "ok", where)
    else:
        remedy = "without it only cached environments can be built; set UV_DEFAULT_INDEX, HTTPS_PROXY or SSL_CERT_FILE"
        yield Finding("package index", "warning", f"{where}, gives no packages: {why}", remedy)


def _uv(environment: Mapping[str, str]) -> str | None:
    """The uv that builds use: beside the server's interpreter, else on PATH."""
    try:
        beside = _server.server_python(environment).with_name("uv")
    except EkibenError:
        return None  # no server here, so nothing is built here
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("uv", path=environment.get("PATH"))


def _cause(text: str) -> str:
    """The innermost reason that uv gives."""
    lines = [line.strip(" ╰─▶├×│") for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "uv failed")[:200]


def _registry(registry: str | None) -> Iterator[Finding]:
    """A registry is needed for images only."""
    if not registry:
        return
    import httpx

    from ekiben._errors import UsageError

    host = registry.split("/", 1)[0]
    try:
        url = _config.normal(host)
        with httpx.Client(timeout=5.0, trust_env=not _config.is_loopback(url)) as client:
            status = client.get(f"{url}/v2/").status_code
    except (httpx.HTTPError, OSError, UsageError) as error:
        remedy = "is the name right, is the registry up, is its certificate trusted (SSL_CERT_FILE)?"
        yield Finding("registry", "error", f"{host} cannot be reached: {type(error).__name__}", remedy)
        return
    if status in (200, 401):
        yield Finding("registry", "ok", f"{host} speaks the registry protocol")
    else:
        yield Finding("registry", "error", f"{host} answers {status} at /v2/", "--registry HOST names an OCI registry")


def _connects(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=3).close()
    except OSError:
        return False
    return True
