"""What may share a call of a model: trials refute, and only graphs whose operators are known prove."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from bentos.serving import row_flow as flow
from bentos.serving import row_proof, row_values
from bentos.serving.answers import answer
from bentos.serving.row_flow import BLOCKS, ROWS, Fixed, Rows, Sizes
from bentos.serving.row_proof import Miscounted, Sharing, sharing, tried

ROWS_OF_FOUR = list(np.random.default_rng(0).normal(size=(5, 4)))
NOT_A_NUMBER = np.full(4, np.nan)


def _run(function: Callable[[Any], Any]) -> Callable[[list[Any]], Any]:
    return lambda rows: list(function(np.stack(rows)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x - x.mean(axis=0),
        lambda x: np.exp(x) / np.exp(x).sum(axis=0),
        lambda x: x.cumsum(axis=0),
        lambda x: x - x[0],
        lambda x: x[::-1],
        lambda x: x / len(x),
        lambda x: x + (len(x) > 40),
        lambda x: x + 1e-12 * x.sum(),  # only a neighbour that is no number shows it
        lambda x: x[:-1] if len(x) > 1 else x,
        lambda x: x.argmax(axis=0) if len(x) == 4 else x,
    ],
)
def test_rows_that_change_one_another_are_found(function: Callable[[Any], Any]) -> None:
    verdict = tried(_run(function), ROWS_OF_FOUR, [NOT_A_NUMBER])
    assert not verdict.holds
    assert sharing(Sharing.REQUESTS, verdict) is Sharing.ROW


def test_rounding_is_no_difference_and_what_is_not_proven_is_asked_alone() -> None:
    weights = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    verdict = tried(_run(lambda x: np.float32(x) @ weights), ROWS_OF_FOUR, [NOT_A_NUMBER])
    assert verdict.holds
    assert sharing(Sharing.REQUESTS, verdict, proven=True) is Sharing.REQUESTS
    assert sharing(Sharing.REQUESTS, verdict, proven=False) is Sharing.ROW


def test_a_trial_of_too_few_rows_says_nothing() -> None:
    assert "fewer than two rows" in (tried(_run(lambda x: x), ROWS_OF_FOUR[:1]).refuted or "")


def test_the_same_row_with_two_answers_is_random() -> None:
    rng = np.random.default_rng(2)
    assert tried(_run(lambda x: rng.normal(size=x.shape)), ROWS_OF_FOUR).random


def test_counts_of_one_by_chance_are_not_the_rows() -> None:
    def places(rows: list[Any]) -> list[int]:
        return [len(rows), int((np.stack(rows) > 0.5).sum()), -1]

    assert row_proof.split([None, None, None], places, ROWS_OF_FOUR, together=True) == (True, False, False)
    assert row_proof.split([False, None, None], places, ROWS_OF_FOUR, together=True) == (False, False, False)


@pytest.mark.parametrize(
    ("values", "rows", "truth"),
    [
        (np.array([1, 2]), 2, [1, 2]),
        ([np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([[1.0], [0.5]])], 2, [[[0.1, 0.9], [1.0]], [[0.8, 0.2], [0.5]]]),
        (["a", "b"], 2, ["a", "b"]),
        (np.array([np.array([1, 2]), np.array([3])], dtype=object), 2, [[1, 2], [3]]),
    ],
)
def test_whatever_a_library_returns_is_one_value_per_row(values: Any, rows: int, truth: list[Any]) -> None:
    assert row_values.listed(values, rows) == truth


def test_sparse_matrices_and_frames_are_rows_too() -> None:
    pandas = pytest.importorskip("pandas")
    sparse = pytest.importorskip("scipy.sparse")
    assert row_values.listed(sparse.csr_matrix([[0, 1], [1, 0]]), 2) == [[0, 1], [1, 0]]
    assert row_values.listed(pandas.DataFrame({"a": [1, 2], "b": [3, 4]}), 2) == [[1, 3], [2, 4]]


@pytest.mark.parametrize("values", [3.0, np.float64(2), np.zeros(3), ["a"], [np.zeros(2), np.zeros(2)], []])
def test_another_count_is_refused(values: Any) -> None:
    with pytest.raises(Miscounted):
        row_values.listed(values, 2)


def test_every_answer_is_counted() -> None:
    import asyncio

    response = asyncio.run(answer(lambda rows: rows[1:], [1, 2]))
    assert (response.status_code, json.loads(response.body)["code"]) == (500, "prediction_failed")


X = Rows(2)


@pytest.mark.parametrize(
    ("found", "truth"),
    [
        (flow.elementwise([X, Fixed((4,))]), X),
        (flow.elementwise([X, Fixed((3, 4))]), None),  # a constant for each of three rows
        (flow.elementwise([X, Rows(1)]), None),  # as many columns as rows, by chance
        (flow.multiplied(X, Fixed((4, 3))), X),
        (flow.multiplied(X, Rows(2, 1)), None),
        (flow.multiplied(Rows(3), Rows(3)), Rows(3)),
        (flow.along(X, 0), None),
        (flow.along(X, -1), X),
        (flow.reduced(X, [1], keep=False), Rows(1)),
        (flow.reduced(X, None, keep=True), None),
        (flow.reduced(Rows(3, 1), [0], keep=False), X),
        (flow.transposed(Rows(3), [1, 0, 2]), Rows(3, 1)),
        (flow.transposed(Rows(3, blocks=True), [1, 0, 2]), None),
        (flow.reshaped(X, Sizes((ROWS, 2, 2)), free=True), Rows(3)),
        (flow.reshaped(X, Fixed((2,), (1, -1)), free=False), None),
        (flow.reshaped(X, Fixed((2,), (-1, 2)), free=False), Rows(2, blocks=True)),
        (flow.reshaped(X, Fixed((2,), (-1, 2)), free=True), None),
        (flow.reshaped(X, Sizes((BLOCKS, 2)), free=True), Rows(2, blocks=True)),
        (flow.arithmetic(Sizes((ROWS,), True), Fixed((), (3,)), "Mul"), Sizes((BLOCKS,), True)),
        (flow.arithmetic(Sizes((ROWS,), True), Fixed((), (3,)), "Add"), Sizes(("other",), True)),
        (flow.gathered(X, Fixed((1,), (0,)), 0), None),
        (flow.gathered(Fixed((9, 3)), X, 0), Rows(3)),
        (flow.expanded(Fixed((1, 1, 8)), Sizes((ROWS, 1, 8))), Rows(3)),
        (flow.joined([X, X], 1), X),
        (flow.joined([X, Fixed((1, 4))], 0), None),
        (flow.contracted("abc,cd->abd", [Rows(3), Fixed((5, 6))]), Rows(3)),
        (flow.contracted("ab,cb->ac", [X, X]), None),
        (flow.sliced(X, [0]), None),
    ],
)
def test_rows_are_followed_through_operators(found: Any, truth: Any) -> None:
    assert found == truth
