"""The table of the embedded router: which processes answer for a deployment. Written by the local platform."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(eq=False)
class Upstream:
    """One serving process, or a cluster's Service. `in_flight` counts the requests that the router has open to it.

    A process on this machine listens on the Unix socket at the path `socket`. Without one, `authority` (HOST:PORT) is
    called by TCP, and what answers there checks the caller's token itself.
    """

    revision: int
    authority: str = "localhost"
    socket: str | None = None
    in_flight: int = 0


class RouteTable:
    """Replaced as a whole per deployment, so that a request sees either the old processes or the new ones."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._table: dict[str, tuple[Upstream, ...]] = {}

    def set(self, deployment: str, upstreams: Sequence[Upstream]) -> None:
        with self._lock:
            self._table = {**self._table, deployment: tuple(upstreams)}

    def remove(self, deployment: str) -> None:
        with self._lock:
            self._table = {name: value for name, value in self._table.items() if name != deployment}

    def take(self, deployment: str, avoid: Upstream | None = None) -> Upstream | None:
        """The least busy process, with one more request counted on it. The caller must `release` it."""
        with self._lock:
            choices = [up for up in self._table.get(deployment, ()) if up is not avoid]
            if not choices:
                return None
            chosen = min(choices, key=lambda up: up.in_flight)
            chosen.in_flight += 1
            return chosen

    def known(self, deployment: str) -> bool:
        """Whether the deployment has ever been live here, so that waiting for a process makes sense."""
        return deployment in self._table

    def uses(self, upstream: Upstream) -> bool:
        """Whether a request is open to the process, or a new one may be."""
        return upstream.in_flight > 0 or any(upstream in row for row in self._table.values())

    def release(self, upstream: Upstream) -> None:
        with self._lock:
            upstream.in_flight -= 1
