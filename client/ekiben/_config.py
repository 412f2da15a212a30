"""Which server, with which token and which certificate authority.

An explicit value wins over the environment, which wins over `ekiben login`, which wins over the server that `ekiben up`
started on this machine. A stored token belongs to one address and is sent to no other. Without any, the client sends
the token that the service of this machine made (`_local.py`).
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ekiben._errors import UsageError

DEFAULT_URL = "http://localhost:8000"
PART_UPLOAD_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class Connection:
    """Where to call and how to prove who calls. The token is never shown."""

    url: str
    token: str | None = field(default=None, repr=False)
    ca: str | None = None
    source: str = "default"

    @property
    def loopback(self) -> bool:
        return is_loopback(self.url)


def connection(
    url: str | None = None,
    token: str | None = None,
    ca: str | None = None,
    environment: Mapping[str, str] | None = None,
) -> Connection:
    """Resolve the connection; `environment` is os.environ unless a test gives its own."""
    env = os.environ if environment is None else environment
    stored = load(env)
    if url:
        address, source = url, "argument"
    elif env.get("EKIBEN_URL"):
        address, source = env["EKIBEN_URL"], "EKIBEN_URL"
    elif stored.get("url"):
        address, source = str(stored["url"]), "login"
    elif local := local_server(env):
        address, source = str(local["url"]), "up"
    else:
        port = env.get("EKIBEN_PORT")
        address, source = (f"http://localhost:{port}" if port else DEFAULT_URL), "default"
    address = normal(address)
    known = stored.get("servers", {}).get(address, {})
    return Connection(
        url=address,
        token=token or env.get("EKIBEN_TOKEN") or known.get("token"),
        ca=ca or env.get("EKIBEN_CA") or known.get("ca"),
        source=source,
    )


def normal(url: str) -> str:
    """The address without a trailing slash; `host:port` alone means http on loopback and https elsewhere."""
    text = url.strip()
    if "://" not in text:
        text = f"{'http' if is_loopback('http://' + text) else 'https'}://{text}"
    parts = urlsplit(text)
    try:
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"{url!r} is not the address of a server", code="bad_url", hint="like http://localhost:8000")
    if parts.username or parts.password:
        raise UsageError(
            "an address must not hold a password",
            code="bad_url",
            hint="ekiben login URL --token TOKEN, or EKIBEN_TOKEN",
        )
    if parts.query or parts.fragment:
        raise UsageError(f"{url!r} has a query or a fragment", code="bad_url", hint="like http://localhost:8000")
    return text.rstrip("/")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def home(environment: Mapping[str, str] | None = None) -> Path:
    """The state folder of the server on this machine, EKIBEN_HOME."""
    env = os.environ if environment is None else environment
    return Path(env.get("EKIBEN_HOME") or Path.home() / ".ekiben").expanduser()


def local_server(environment: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """What `ekiben up` wrote: {"pid", "started", "url", "log"}, or None."""
    return _read(home(environment) / "up.json")


def path(environment: Mapping[str, str] | None = None) -> Path:
    env = os.environ if environment is None else environment
    base = env.get("XDG_CONFIG_HOME")
    # The XDG specification says that a relative path there is to be ignored.
    folder = Path(base) if base and Path(base).is_absolute() else Path.home() / ".config"
    return folder / "ekiben" / "config.json"


def uploads(environment: Mapping[str, str] | None = None) -> Path:
    """The folder that remembers uploads in parts."""
    return path(environment).with_name("uploads")


def part_upload_bytes(environment: Mapping[str, str] | None = None) -> int:
    """From how many bytes on a push is sent in parts, EKIBEN_PART_UPLOAD_BYTES."""
    env = os.environ if environment is None else environment
    text = env.get("EKIBEN_PART_UPLOAD_BYTES") or str(PART_UPLOAD_BYTES)
    if not text.isdecimal():
        raise UsageError(
            f"EKIBEN_PART_UPLOAD_BYTES={text[:40]} is no number of bytes",
            code="bad_setting",
            hint=f"unset it for {PART_UPLOAD_BYTES}",
        )
    return int(text)


def load(environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """{"url": the server of `ekiben login`, "servers": {url: {"token", "ca"}}}; empty when there is none."""
    file = path(environment)
    try:
        stored = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} cannot be read: {error}", code="bad_config", hint="mend or delete it, then ekiben login URL"
        ) from None
    servers = stored.get("servers", {}) if isinstance(stored, dict) else None
    if not isinstance(servers, dict) or not all(isinstance(server, dict) for server in servers.values()):
        raise UsageError(
            f"{file} is not a configuration of ekiben", code="bad_config", hint="delete it, then log in again"
        )
    return dict(stored)


def remember(url: str, token: str | None, ca: str | None, environment: Mapping[str, str] | None = None) -> Path:
    """Store the server as the default one and return the file, which only its owner can read."""
    stored = load(environment)
    servers = dict(stored.get("servers", {}))
    known = {"token": token, "ca": str(Path(ca).absolute()) if ca else None}
    servers[url] = {name: value for name, value in known.items() if value}
    return write_private(path(environment), {**stored, "url": url, "servers": servers})


def write_private(file: Path, value: dict[str, Any]) -> Path:
    """Replace a JSON file in one step, mode 0600 from its first byte on."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=".tmp-")  # mkstemp makes it 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, sort_keys=True)
            stream.write("\n")
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    return file


def _read(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) and "url" in value else None
