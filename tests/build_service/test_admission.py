"""Places for uploads: a bound on all, a bound on each caller, and turns among those that wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest

from build_service.admission import Admission, TooManyUploads, caller_of
from build_service.guard import AUTHORIZED
from build_service.intake import Pace, bounded
from registry.errors import UserError


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Places:
    """Callers that take places, in order, and leave them when asked."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.order: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def take(self, name: str) -> None:
        """`name` is the caller's letter and a number."""
        self._leave[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._hold(name))
        await settled()

    async def _hold(self, name: str) -> None:
        async with self.admission.admitted(name[0]):
            self.order.append(name)
            await self._leave[name].wait()

    async def leave(self, name: str) -> None:
        self._leave[name].set()
        await settled()


def test_one_caller_takes_its_share_and_no_more() -> None:
    async def run() -> None:
        places = Places(Admission(4, 2))
        for name in ("a1", "a2", "a3", "a4", "b1"):
            await places.take(name)
        assert places.order == ["a1", "a2", "b1"]
        await places.leave("b1")
        assert places.order == ["a1", "a2", "b1"]
        await places.leave("a1")
        assert places.order == ["a1", "a2", "b1", "a3"]
        for name in ("a2", "a3", "a4"):
            await places.leave(name)
        assert places.order[-1] == "a4"
        await asyncio.gather(*places.tasks.values())
        assert not places.admission._callers

    asyncio.run(run())


def test_callers_that_wait_come_in_turn() -> None:
    async def run() -> None:
        places = Places(Admission(1, 1))
        for name in ("a1", "a2", "a3", "b1", "b2", "c1"):
            await places.take(name)
        for name in ("a1", "b1", "c1", "a2", "b2", "a3"):
            assert places.order[-1] == name
            await places.leave(name)

    asyncio.run(run())


def test_whoever_gives_up_waiting_leaves_no_gap() -> None:
    async def run() -> None:
        places = Places(Admission(1, 1))
        for name in ("a1", "a2", "a3"):
            await places.take(name)
        places.tasks["a2"].cancel()
        await places.leave("a1")  # at the same moment
        assert places.order == ["a1", "a3"]
        places.tasks["a3"].cancel()
        await settled()
        await places.take("b1")
        assert places.order[-1] == "b1"
        await places.leave("b1")
        assert not places.admission._callers
        assert places.admission._running == 0

    asyncio.run(run())


def test_patience_ends_with_an_error_that_says_when_to_come_again() -> None:
    async def run() -> None:
        admission = Admission(2, 1)
        async with admission.admitted("a"):
            with pytest.raises(TooManyUploads) as error:
                async with admission.admitted("a", 0.0):
                    pass
            assert (error.value.status, error.value.code) == (429, "too_many_uploads")
            assert error.value.hint
            async with admission.admitted("b", 0.0):
                pass

    asyncio.run(run())


def test_the_queue_of_a_caller_is_bounded() -> None:
    async def run() -> None:
        admission = Admission(2, 1)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(admission.admitted("a"))
            waiting = [asyncio.create_task(admission.admitted("a").__aenter__()) for _ in range(64)]
            await settled()
            with pytest.raises(TooManyUploads):
                await admission.admitted("a").__aenter__()
            for task in waiting:
                task.cancel()
            await settled()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("scope", "caller"),
    [
        ({"client": ("10.0.0.1", 1), "headers": [(b"authorization", b"Bearer wrong")]}, "10.0.0.1"),
        ({"client": ("127.0.0.1", 1)}, "this machine"),
        ({"client": ("127.9.9.9", 1)}, "this machine"),
        ({"client": ("::1", 1)}, "this machine"),
        ({"client": None}, "this machine"),
        ({}, "this machine"),
        ({"client": ("10.0.0.1", 1)}, "10.0.0.1"),
        ({"client": ("2001:db8:1:2:3::4", 1)}, "2001:db8:1:2::/64"),
        ({"client": ("testclient", 1)}, "this machine"),
    ],
)
def test_a_caller_is_a_checked_token_or_an_address(scope: dict[str, Any], caller: str) -> None:
    assert caller_of(scope) == caller


def test_callers_with_tokens_are_told_apart_wherever_they_are() -> None:
    def scope(token: bytes) -> dict[str, Any]:
        return {"client": ("127.0.0.1", 1), "headers": [(b"authorization", b"Bearer " + token)], AUTHORIZED: True}

    assert len({caller_of(scope(b"a")), caller_of(scope(b"b")), caller_of({"client": ("127.0.0.1", 1)})}) == 3
    assert b"secret" not in caller_of(scope(b"secret")).encode()


# --- how slow a sender may be -----------------------------------------------------------------------------------------


def received(chunks: list[bytes], seconds_each: float, rate: float) -> list[bytes]:
    """What comes through of chunks that each need so many seconds, by a clock of our own."""
    now = iter(_clock(seconds_each))

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def run() -> list[bytes]:
        return [chunk async for chunk in bounded(stream(), Pace(60, rate, lambda: next(now)))]

    return asyncio.run(run())


def _clock(seconds_each: float) -> Iterator[float]:
    """Read before and after each chunk."""
    now = 0.0
    while True:
        yield now
        now += seconds_each
        yield now


def test_a_sender_of_a_byte_a_minute_holds_no_place_for_ever() -> None:
    with pytest.raises(UserError) as error:
        received([b"x"] * 10_000, 59, 1024)
    assert (error.value.code, error.value.status) == ("upload_too_slow", 408)
    assert "EKIBEN_MIN_UPLOAD_RATE" in str(error.value.hint)


def test_a_slow_line_is_no_fault() -> None:
    chunks = [b"x" * 20_000] * 100
    assert received(chunks, 15, 1024) == chunks
    assert received([b"x"] * 100, 59, 0) == [b"x"] * 100
