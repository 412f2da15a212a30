"""Who may do something costly now: a bound on all together and one on each caller, and a fair queue before them.

A caller is a token, or, where none is needed, the address that a request comes from. One caller can fill its own share
and no more; of those that wait, each caller's first goes in turn.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from build_service import guard
from registry.errors import UserError

_MOST_WAITING = 64  # of one caller


class TooManyUploads(UserError):
    """The caller has its share of uploads under way already."""

    status = 429

    def __init__(self, most: int) -> None:
        super().__init__(
            "too_many_uploads",
            f"{most} uploads of this caller are under way already.",
            hint="Send this one again in a moment, and fewer at once; EKIBEN_MAX_CALLER_UPLOADS is the bound.",
        )


@dataclass
class _Caller:
    running: int = 0
    waiting: deque[asyncio.Future[None]] = field(default_factory=deque)


class Admission:
    """At most `total` at once, at most `of_one` of them of one caller. Used from one event loop."""

    def __init__(self, total: int, of_one: int) -> None:
        self._total, self._of_one = total, min(of_one, total)
        self._running = 0
        self._callers: OrderedDict[str, _Caller] = OrderedDict()

    @asynccontextmanager
    async def admitted(self, caller: str, patience: float | None = None) -> AsyncIterator[None]:
        """A place for the time of the block. TooManyUploads where none is free within `patience` seconds (None: waits
        as long as it takes), or where too many of the caller wait already."""
        await self._enter(caller, patience)
        try:
            yield
        finally:
            self._leave(caller)

    async def _enter(self, caller: str, patience: float | None) -> None:
        mine = self._callers.setdefault(caller, _Caller())
        if self._running < self._total and mine.running < self._of_one:
            self._admit(mine)
            return
        if len(mine.waiting) >= _MOST_WAITING:
            raise TooManyUploads(self._of_one)
        place = asyncio.get_running_loop().create_future()
        mine.waiting.append(place)
        try:
            async with asyncio.timeout(patience):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._leave(caller)  # it was admitted at the same moment
            else:
                with suppress(ValueError):  # a place that became free was passed on already
                    mine.waiting.remove(place)
                self._forget(caller)
            if isinstance(error, TimeoutError):
                raise TooManyUploads(self._of_one) from None
            raise

    def _admit(self, caller: _Caller) -> None:
        caller.running += 1
        self._running += 1

    def _leave(self, caller: str) -> None:
        self._callers[caller].running -= 1
        self._running -= 1
        self._callers.move_to_end(caller)  # the others' turn comes first
        self._forget(caller)
        for name, each in self._callers.items():
            if self._running < self._total and each.running < self._of_one and self._admit_first(each):
                self._callers.move_to_end(name)
                break

    def _admit_first(self, caller: _Caller) -> bool:
        """Admit the one of the caller's that waits longest, if any still does."""
        while caller.waiting:
            place = caller.waiting.popleft()
            if not place.done():  # else it was given up at this moment
                place.set_result(None)
                self._admit(caller)
                return True
        return False

    def _forget(self, caller: str) -> None:
        known = self._callers.get(caller)
        if known is not None and not known.running and not known.waiting:
            del self._callers[caller]


def caller_of(scope: Mapping[str, Any]) -> str:
    """Who sends a request: the digest of its token if that was found valid, else its address. All of this machine are
    one caller, and so are the addresses of one IPv6 network: whoever has one of them has all."""
    if scope.get(guard.AUTHORIZED):
        return hashlib.sha256(dict(scope["headers"]).get(b"authorization", b"")).hexdigest()
    client = scope.get("client")
    try:
        address = ipaddress.ip_address(client[0]) if client else None
    except ValueError:
        address = None
    if address is None or address.is_loopback:
        return "this machine"
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
