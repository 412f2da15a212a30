"""Threads by purpose: many uploads at once must not take those in which everything else is answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")


class Threads:
    """Runs calls in worker threads, at most `most` of them at once; the others wait without a thread of their own."""

    def __init__(self, most: int) -> None:
        self._limiter = CapacityLimiter(most)

    async def run(
        self, call: Callable[Arguments, Answer], /, *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Answer:
        return await to_thread.run_sync(partial(call, *arguments, **named), limiter=self._limiter)
