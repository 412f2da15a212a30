"""Adaptive batching without waiting: what comes in while the model is busy is its next batch.

A model that is free answers at once; one that is not finds everything that came meanwhile, and runs it in one go.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentos.serving.problems import StartError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[Any]
    Run = Callable[[NDArray[Any]], NDArray[Any]]

_logger = logging.getLogger("ekiben.serving")


@dataclass(frozen=True)
class _Waiting:
    rows: Rows
    result: asyncio.Future[Rows]


class Batches:
    """Calls `run` with the rows of many requests at once, in a thread of its own, one call after the other.

    `run` takes [n, …] and gives [n, …], row by row; `most` is the largest n of a call, but for a request that has more
    rows by itself. Rows of all requests have the same shape and type. EKIBEN_BATCH bounds `most`; 1: no batching.
    """

    def __init__(self, run: Run, most: int, environ: Mapping[str, str] = os.environ) -> None:
        self._run = run
        self._most = min(most, bound(environ, most))
        self._waiting: deque[_Waiting] = deque()
        self._work: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "model")

    async def __call__(self, rows: Rows) -> Rows:
        """The answers to these rows, in their order. Raises what `run` raises for them."""
        waiting = _Waiting(rows, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._until_idle())
        return await waiting.result

    async def _until_idle(self) -> None:
        while batch := self._next():
            try:
                answers = await self._call([each.rows for each in batch])
            except Exception as error:
                if len(batch) == 1:
                    _fail(batch[0], error)
                    continue
                _logger.exception("a batch of %d requests failed; each is tried alone", len(batch))
                for each in batch:  # so that the others do not fail with the one that is at fault
                    await self._alone(each)
            else:
                for each, answer in zip(batch, answers, strict=True):
                    _settle(each, answer)

    def _next(self) -> list[_Waiting]:
        """The first requests whose rows fit in one call; nobody waits for those that were given up meanwhile."""
        batch: list[_Waiting] = []
        count = 0
        while self._waiting:
            first = self._waiting[0]
            if not first.result.done():
                if batch and count + len(first.rows) > self._most:
                    break
                batch.append(first)
                count += len(first.rows)
            self._waiting.popleft()
        return batch

    async def _alone(self, waiting: _Waiting) -> None:
        try:
            (answer,) = await self._call([waiting.rows])
        except Exception as error:
            _fail(waiting, error)
        else:
            _settle(waiting, answer)

    async def _call(self, parts: list[Rows]) -> list[Rows]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._together, parts)

    def _together(self, parts: list[Rows]) -> list[Rows]:
        import numpy as np

        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        answers = self._run(rows)
        if len(answers) != len(rows):
            raise ValueError(f"the model gave {len(answers)} answers to {len(rows)} rows")
        return np.split(answers, np.cumsum([len(part) for part in parts])[:-1])


def _settle(waiting: _Waiting, answer: Rows) -> None:
    if not waiting.result.done():
        waiting.result.set_result(answer)


def _fail(waiting: _Waiting, error: Exception) -> None:
    if not waiting.result.done():
        waiting.result.set_exception(error)


def bound(environ: Mapping[str, str], most: int) -> int:
    """EKIBEN_BATCH, or `most`. Raises StartError `bad_setting`."""
    text = environ.get("EKIBEN_BATCH") or str(most)
    if not text.isascii() or not text.isdigit() or int(text[:9]) < 1:
        raise StartError("bad_setting", "EKIBEN_BATCH is not a whole number from 1", "correct or unset EKIBEN_BATCH")
    return int(text[:9])
