"""Which headers of a request reach a model, and which of its answer reach the caller. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Headers = Iterable[tuple[bytes, bytes]]

CREDENTIALS = frozenset((b"authorization", b"cookie"))
"""What proves to this service, or to a proxy on its origin, who calls. A setting passes them on."""

_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade", b"expect",
    )
)  # fmt: skip
# Proxies say by these who called them. Of a stranger they are only a claim.
_OF_PROXIES = frozenset((b"forwarded", b"x-real-ip", b"x-client-ip", b"x-cluster-client-ip", b"true-client-ip"))
_OF_PROXIES_PREFIXES = (b"x-forwarded-", b"x-original-")
# Which pages may read an answer is the operator's to say (EKIBEN_CORS_ORIGINS), since they share the API's origin.
_OF_ORIGINS = b"access-control-"
# Set by this service itself.
_REPLACED = frozenset((b"date", b"server", b"x-request-id"))
# A Connection header cannot take these away: a caller would undo what a proxy or this service says of it.
_END_TO_END = CREDENTIALS | {b"host", b"content-length", b"content-type", b"content-encoding"}


@dataclass(frozen=True)
class Rules:
    """`passed`: credentials that models get. `proxies`: addresses whose X-Forwarded-* are true."""

    passed: frozenset[bytes] = frozenset()
    proxies: tuple[Network, ...] = ()

    def to_model(
        self,
        headers: Headers,
        *,
        peer: str | None,
        request_id: str,
        has_length: bool,
        upstream_checks: bool = False,
    ) -> list[tuple[str, str]]:
        """Return the headers of the request to a model.

        `peer` is the address that called. `upstream_checks`: the model's own wrapper checks the token and strips it.
        """
        trusted = self._trusts(peer)
        given = list(headers)
        withheld = CREDENTIALS - self.passed - ({b"authorization"} if upstream_checks else set())
        hop = _hop_by_hop(given)
        kept: list[tuple[str, str]] = []
        forwarded_for: list[str] = []
        for key, value in given:
            name = plain(key)
            if name in hop or name in withheld or name in _REPLACED:
                continue
            if name == b"content-length" and not has_length:
                continue
            if b"_" in key and (name in _END_TO_END or _of_proxies(name)):
                continue
            if _of_proxies(name):
                if not trusted:
                    continue
                if name == b"x-forwarded-for":
                    forwarded_for.append(value.decode("latin-1"))
                    continue
            kept.append((key.decode("latin-1"), value.decode("latin-1")))
        kept.append(("X-Request-ID", request_id))
        if peer is not None:
            kept.append(("X-Forwarded-For", ", ".join([*forwarded_for, peer])))
        return kept

    def _trusts(self, peer: str | None) -> bool:
        if peer is None or not self.proxies:
            return False
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])
        except ValueError:
            return False
        return any(address in network for network in self.proxies)


def to_caller(headers: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the headers of a model's answer that its caller gets, in lower case."""
    withheld = _hop_by_hop(headers) | _REPLACED
    return [
        (key.lower(), value)
        for key, value in headers
        if (name := plain(key)) not in withheld and not name.startswith(_OF_ORIGINS)
    ]


def plain(name: bytes) -> bytes:
    """Return a header's name as the frameworks that know no difference between _ and - read it."""
    return name.lower().replace(b"_", b"-")


def _hop_by_hop(headers: Headers) -> frozenset[bytes]:
    """Names of one hop: the usual ones, and those that Connection lists (RFC 9110, 7.6.1)."""
    listed = {
        plain(option.strip()) for key, value in headers if key.lower() == b"connection" for option in value.split(b",")
    }
    return _HOP_BY_HOP | {name for name in listed if name not in _END_TO_END and not _of_proxies(name)}


def _of_proxies(name: bytes) -> bool:
    return name in _OF_PROXIES or name.startswith(_OF_PROXIES_PREFIXES)
