"""Hosts, origins and targets of requests, read strictly: what two readers could read in two ways is refused. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from build_service.headers import plain
from registry.errors import UserError

_AUTHORITY = re.compile(rb"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_ABSOLUTE = re.compile(rb"(https?)://([^/?#]*)", re.IGNORECASE)
_LARGEST_PORT = 65535
_PORTS = {"http": 80, "https": 443}
# Headers of which a second one may be read in place of the first.
_SINGLE = frozenset((b"host", b"origin", b"authorization", b"content-length", b"content-type", b"transfer-encoding"))

Headers = Sequence[tuple[bytes, bytes]]


@dataclass(frozen=True)
class Authority:
    """HOST or HOST:PORT; the name in lower case, an IPv6 address in brackets."""

    name: str
    port: int | None

    @classmethod
    def parse(cls, text: bytes) -> Authority | None:
        """Return None for what is no HOST or HOST:PORT, such as `localhost:80@evil.example`."""
        found = _AUTHORITY.fullmatch(text)
        if found is None:
            return None
        port = None if found[2] is None else int(found[2])
        if port is not None and port > _LARGEST_PORT:
            return None
        return cls(found[1].decode("ascii").lower(), port)

    def same(self, other: Authority, scheme: str) -> bool:
        """Whether both name one place, a port that is left out being that of the scheme."""
        default = _PORTS[scheme]
        return self.name == other.name and (self.port or default) == (other.port or default)


def check_framing(headers: Headers, http_version: str) -> None:
    """Raise `malformed_request` for repeated headers and for bodies whose end two readers could see in two places."""
    seen: set[bytes] = set()
    for key, value in headers:
        name = plain(key)
        if name not in _SINGLE:
            continue
        if name in seen:
            raise _malformed(f"The request has two headers {name.decode()!r}.", "Send one.")
        seen.add(name)
        if name == b"transfer-encoding" and key == name and (value.lower() != b"chunked" or http_version == "1.0"):
            raise _malformed("The request has a Transfer-Encoding other than 'chunked'.", "Send Content-Length.")


def host_of(headers: Headers) -> Authority | None:
    """Return what Host names, None without one. Raises `bad_host`."""
    given = next((value for key, value in headers if key == b"host"), None)
    if given is None:
        return None
    host = Authority.parse(given)
    if host is None:
        raise UserError(
            "bad_host",
            "The request's Host is no HOST or HOST:PORT.",
            field="Host",
            hint="Send one Host, such as localhost:8000.",
            status=400,
        )
    return host


def check_target(target: bytes, host: Authority | None) -> None:
    """Raise `bad_target` for a fragment, and for an absolute target of another place than Host names."""
    if b"#" in target:
        raise _bad_target("The request's target has a fragment.")
    if target.startswith(b"/") or target == b"*":
        return
    absolute = _ABSOLUTE.match(target)
    named = Authority.parse(absolute[2]) if absolute else None
    if absolute is None or named is None or host is None or not named.same(host, absolute[1].decode().lower()):
        raise _bad_target("The request's target names another place than its Host.")


def same_origin(origin: str, host: Authority | None) -> bool:
    """Whether a page of the origin is one of this service: TLS may end at a proxy before it, so schemes may differ."""
    scheme, _, rest = origin.partition("://")
    named = Authority.parse(rest.encode("latin-1", "replace"))
    return scheme in _PORTS and named is not None and host is not None and named.same(host, scheme)


def _malformed(detail: str, hint: str) -> UserError:
    return UserError("malformed_request", detail, hint=hint, status=400)


def _bad_target(detail: str) -> UserError:
    return UserError("bad_target", detail, hint="Ask for a path, such as GET /models.", status=400)
