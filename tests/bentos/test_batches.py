"""Adaptive batching: the right answer to everyone, in few calls, without waiting."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.serving import StartError
from bentos.serving.batches import Batches


class Model:
    """Doubles its rows; holds its first call until `go` is set, so that others come in meanwhile."""

    def __init__(self, held: bool = False) -> None:
        self.calls: list[int] = []
        self.go = threading.Event()
        if not held:
            self.go.set()

    def __call__(self, rows: Any) -> Any:
        self.go.wait(30)
        if (rows < 0).any():
            raise ValueError("negative")
        self.calls.append(len(rows))
        return rows * 2


def _rows(*values: int) -> Any:
    return np.array(values)[:, None]


async def _while_busy(model: Model, batches: Batches, requests: list[Any]) -> list[Any]:
    """Sends the first request, and the others once the model is busy with it."""
    first = asyncio.create_task(batches(requests[0]))
    await asyncio.sleep(0)
    others = [asyncio.create_task(batches(rows)) for rows in requests[1:]]
    await asyncio.sleep(0)
    model.go.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def test_what_comes_while_the_model_is_busy_is_one_batch() -> None:
    model = Model(held=True)
    requests = [_rows(1), _rows(2), _rows(3, 4), _rows(5)]
    answers = asyncio.run(_while_busy(model, Batches(model, 32, {}), requests))
    assert [a.tolist() for a in answers] == [[[2]], [[4]], [[6], [8]], [[10]]]
    assert model.calls == [1, 4]


def test_a_batch_is_no_larger_than_the_bound_and_keeps_the_order() -> None:
    model = Model(held=True)
    requests = [_rows(1), _rows(2), _rows(3, 4), _rows(5, 6, 7, 8, 9), _rows(10)]
    answers = asyncio.run(_while_busy(model, Batches(model, 3, {}), requests))
    assert [a.tolist() for a in answers] == [(rows * 2).tolist() for rows in requests]
    assert model.calls == [1, 3, 5, 1]  # a request of five rows goes alone: it is not torn


def test_one_means_no_batching() -> None:
    model = Model(held=True)
    asyncio.run(_while_busy(model, Batches(model, 32, {"EKIBEN_BATCH": "1"}), [_rows(i) for i in range(5)]))
    assert model.calls == [1] * 5


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "²"])
def test_a_bound_that_is_no_number_stops_the_start(text: str) -> None:
    with pytest.raises(StartError) as raised:
        Batches(Model(), 32, {"EKIBEN_BATCH": text})
    assert raised.value.code == "bad_setting"


def test_only_the_request_at_fault_fails() -> None:
    model = Model(held=True)
    requests = [_rows(1), _rows(2), _rows(-1), _rows(3)]
    answers = asyncio.run(_while_busy(model, Batches(model, 32, {}), requests))
    assert [str(a.tolist()) for a in answers if not isinstance(a, Exception)] == ["[[2]]", "[[4]]", "[[6]]"]
    assert isinstance(answers[2], ValueError)


def test_the_model_is_asked_again_after_a_failure() -> None:
    async def both() -> Any:
        batches = Batches(Model(), 4, {})
        with pytest.raises(ValueError, match="negative"):
            await batches(_rows(-1))
        return await batches(_rows(7))

    assert asyncio.run(both()).tolist() == [[14]]


def test_a_caller_that_left_is_not_computed_for() -> None:
    model = Model(held=True)

    async def leaving() -> list[Any]:
        batches = Batches(model, 32, {})
        first = asyncio.create_task(batches(_rows(1)))
        await asyncio.sleep(0)
        gone, kept = asyncio.create_task(batches(_rows(2))), asyncio.create_task(batches(_rows(3)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        model.go.set()
        return await asyncio.gather(first, kept)

    assert [a.tolist() for a in asyncio.run(leaving())] == [[[2]], [[6]]]
    assert model.calls == [1, 1]


def test_a_model_that_loses_rows_is_caught() -> None:
    async def ask() -> Any:
        return await Batches(lambda rows: rows[1:], 4, {})(_rows(1, 2))

    with pytest.raises(ValueError, match="1 answers to 2 rows"):
        asyncio.run(ask())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=5), min_size=1, max_size=30), st.integers(1, 8))
def test_everyone_gets_the_answers_to_their_own_rows(requests: list[list[int]], most: int) -> None:
    model = Model()

    async def all_at_once() -> list[Any]:
        batches = Batches(model, most, {})
        return await asyncio.gather(*(batches(_rows(*rows)) for rows in requests))

    answers = asyncio.run(all_at_once())
    assert [a[:, 0].tolist() for a in answers] == [[2 * v for v in rows] for rows in requests]
    assert sum(model.calls) == sum(map(len, requests))
    assert all(size <= max(most, *map(len, requests)) for size in model.calls)
