"""How much a few labelled pictures of tuesday help, by how they were chosen: retraining in rounds.

A fair comparison: every retraining starts from the same weights, takes the same number of steps at the same rates, and
its batches are half monday, half chosen pictures. In each round all methods choose from the same random two thirds of
the pool, and draw their batches by the same seed, so that rounds differ in luck and methods within a round do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bentos.cargo import selection
from bentos.cargo.data import Data, Pictures
from bentos.cargo.learning import Draw, Ints, Trainer, Weights, from_both, from_one
from bentos.cargo.selection import Floats
from bentos.training.outcome import Progress

METHODS = ("random", *selection.DISTANCES)
NAMES = {
    "random": "random",
    "l1": "conformal, l1",
    "l2": "conformal, l2",
    "cosine": "conformal, cosine",
}


@dataclass(frozen=True)
class Result:
    """Accuracy on held-out pictures of both days."""

    tuesday: float
    monday: float


@dataclass(frozen=True)
class Comparison:
    """Of methods and budgets, by round; `before` any retraining, and after it with `none` of tuesday and with `all`."""

    budgets: tuple[int, ...]
    before: Result
    none: tuple[Result, ...]
    all: tuple[Result, ...]
    chosen: dict[tuple[str, int], tuple[Result, ...]]

    def tuesday(self, method: str, budget: int) -> Floats:
        return np.array([result.tuesday for result in self.chosen[method, budget]])

    def monday(self, method: str, budget: int) -> Floats:
        return np.array([result.monday for result in self.chosen[method, budget]])


@dataclass(frozen=True)
class Retrainer:
    """Retrains from the same weights each time."""

    trainer: Trainer
    start: Weights
    data: Data
    steps: int
    rate: float

    def choose(self, method: str, pool: Pictures, answers: Any, budget: int, seed: int) -> Ints:
        """Indices of `budget` of the pool's pictures. `answers`: of the network before retraining, [n, 5] each to the
        calibration and to the pool."""
        if method == "random":
            return np.random.default_rng([seed, budget]).permutation(len(pool))[:budget]
        known, new = answers
        calibration = selection.Calibration.of(known, self.data.parts["monday-calibration"].labels, method)
        return selection.choose(calibration, new, budget)

    def retrain(self, pictures: Pictures | None, seed: int) -> None:
        """On monday and these pictures; on monday alone without."""
        monday = self.data.parts["monday-train"]
        draw: Draw = from_one(monday) if pictures is None else from_both(monday, pictures)
        self.trainer.weights = self.start
        self.trainer.run(draw, self.steps, self.rate, seed)

    def result(self) -> Result:
        parts = self.data.parts
        return Result(*(accuracy(self.trainer, parts[name]) for name in ("tuesday-test", "monday-test")))


def accuracy(trainer: Trainer, pictures: Pictures) -> float:
    return float((trainer.answers(pictures.images).argmax(axis=1) == pictures.labels).mean())


def compare(
    retrainer: Retrainer, budgets: Sequence[int], rounds: Sequence[int], seed: int, progress: Progress
) -> Comparison:
    """`rounds`: how many of them each budget has."""
    data, trainer = retrainer.data, retrainer.trainer
    trainer.weights = retrainer.start
    before = retrainer.result()
    known = trainer.answers(data.parts["monday-calibration"].images)
    pool = data.parts["tuesday-pool"]
    pool_answers = trainer.answers(pool.images)
    none: list[Result] = []
    everything: list[Result] = []
    chosen: dict[tuple[str, int], list[Result]] = {(m, b): [] for m in METHODS for b in budgets}
    total = sum(rounds) * len(METHODS) + 2 * max(rounds)
    with progress.bar("retraining", total, "trainings") as done:
        for number in range(max(rounds)):
            own = seed * 1000 + number
            part = np.sort(np.random.default_rng([seed, number]).permutation(len(pool))[: len(pool) * 2 // 3])
            for pictures, results in ((None, none), (pool.some(part), everything)):
                retrainer.retrain(pictures, own)
                results.append(retrainer.result())
                done(1)
            for budget, count in zip(budgets, rounds, strict=True):
                for method in METHODS if number < count else ():
                    answers = (known, pool_answers[part])
                    picked = retrainer.choose(method, pool.some(part), answers, budget, own)
                    retrainer.retrain(pool.some(part[picked]), own)
                    chosen[method, budget].append(retrainer.result())
                    done(1)
    return Comparison(tuple(budgets), before, tuple(none), tuple(everything), {k: tuple(v) for k, v in chosen.items()})
