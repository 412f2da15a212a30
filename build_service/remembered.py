"""Answers of the database that every request needs: asked for in a thread, and kept until something is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

T = TypeVar("T")


class Remembered(Generic[T]):
    """`seconds` bounds how long another replica's writes go unnoticed; our own call `forget`."""

    def __init__(self, ask: Callable[[], T], seconds: float = 1.0) -> None:
        self._ask, self._seconds = ask, seconds
        self._generation = 0
        self._kept: tuple[int, float, T] | None = None

    def forget(self) -> None:
        self._generation += 1

    async def get(self) -> T:
        kept, generation = self._kept, self._generation
        if kept is not None and kept[0] == generation and time.monotonic() < kept[1]:
            return kept[2]
        value = await run_in_threadpool(self._ask)
        # What was read before something was written carries the generation of then, and is not used again.
        self._kept = (generation, time.monotonic() + self._seconds, value)
        return value
