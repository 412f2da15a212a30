"""What clicks say about pictures, once the place where they were shown is taken out.

People look at the top of a page more than at its end, so a click tells of the picture *and* of its place. The
position-based model (Richardson, Dominowska and Ragno, WWW 2007) writes

    P(click at rank k) = examination(k) · attractiveness(phrase, user, picture)

*Examination* is estimated from randomised swaps (Joachims, Swaminathan and Schnabel, "Unbiased Learning-to-Rank with
Biased Feedback", WSDM 2017, §5.3): in a small share of searches the pictures at rank 1 and at a random rank k change
places by the toss of a coin. Both pictures then stand at either rank equally often, so the ratio of the clicks at the
two ranks is examination(k) / examination(1), whatever the pictures are.

*Debiased click-through rate*: clicks over examined impressions, Σ click / Σ examination. It is the inverse-propensity
mean of click / examination with weights proportional to examination, the choice with the smallest variance for
a constant attractiveness ("clicks over expected clicks", Zhang and Jones, WWW 2007), shrunk towards the mean of all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Log:
    """Searches as they were shown and clicked. `n` searches of `k` places each."""

    shown: Ints  # (n, k): which of the search's candidates stood at that place
    clicked: Bools  # (n, k): by place
    swap: Ints  # (n,): the place (0-based) that took part in a swap with the first; 0: not in the experiment


def swap_first(shown: Ints, share: float, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Runs the experiment: for `share` of the searches, swaps rank 1 with a random rank, by the toss of a coin.

    Returns the changed (n, k) order and, by search, the place drawn (also where the coin said "leave it").
    """
    count, places = shown.shape
    chosen = np.where(rng.random(count) < share, rng.integers(1, places, count), 0)
    moved = np.flatnonzero((chosen > 0) & (rng.random(count) < 0.5))
    result = shown.copy()
    result[moved, 0] = shown[moved, chosen[moved]]
    result[moved, chosen[moved]] = shown[moved, 0]
    return result, chosen


def click(shown: Ints, attractiveness: Floats, examination: Floats, rng: np.random.Generator) -> Bools:
    """Simulates clicks by the position-based model. `attractiveness` is (n, candidates), `examination` (k,)."""
    by_place = np.take_along_axis(attractiveness, shown, axis=1)
    return np.asarray(rng.random(shown.shape) < examination[None, :] * by_place)


def examination(log: Log, floor: float = 0.02) -> Floats:
    """Estimated probability of looking at each place, relative to the first; never rising, never under `floor`.

    The floor bounds the weights (a weight is 1 / examination), so a little bias for much less variance.
    Raises ValueError when no swapped search has a click, as nothing can then be learnt about places.
    """
    places = log.shown.shape[1]
    at_first, at_place = np.zeros(places), np.zeros(places)
    for place in range(1, places):
        rows = log.swap == place
        at_first[place] = log.clicked[rows, 0].sum()
        at_place[place] = log.clicked[rows, place].sum()
    if at_first.sum() == 0:
        raise ValueError("no clicks in swapped searches: log more searches, or swap a larger share of them")
    # Counts are shrunk by half a click towards "as at the end", which keeps an empty place finite.
    ratio = np.concatenate([[1.0], (at_place[1:] + 0.25) / (at_first[1:] + 0.5)])
    weight = np.concatenate([[np.inf], at_first[1:] + 0.5])
    weight[0] = weight[1:].sum() * 1e6  # the first place is 1 by definition
    return np.clip(_never_rising(ratio, weight), floor, 1.0)


def debiased_rate(
    log: Log, pictures: Ints, looked: Floats, count: int, prior_impressions: float = 20.0
) -> tuple[Floats, Ints]:
    """Click-through rate of each of `count` pictures as if always looked at, and its impressions.

    `pictures` (n, candidates) says which picture a candidate is; `looked` (k,) is the examination by place.
    """
    shown = np.take_along_axis(pictures, log.shown, axis=1)
    looks = np.broadcast_to(looked, shown.shape)
    clicks = np.bincount(shown.ravel(), weights=log.clicked.ravel().astype(np.float64), minlength=count)
    expected = np.bincount(shown.ravel(), weights=looks.ravel(), minlength=count)
    mean = clicks.sum() / expected.sum()
    prior = prior_impressions * float(looked.mean())
    impressions = np.bincount(shown.ravel(), minlength=count)
    return (clicks + prior * mean) / (expected + prior), impressions.astype(np.int64)


def _never_rising(values: Floats, weights: Floats) -> Floats:
    """Nearest never-rising sequence by weighted least squares (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        block = (value, weight, 1)
        while blocks and blocks[-1][0] < block[0]:
            mean, mass, length = blocks.pop()
            total = mass + block[1]
            block = ((mean * mass + block[0] * block[1]) / total, total, length + block[2])
        blocks.append(block)
    return np.concatenate([np.full(length, mean) for mean, _, length in blocks])
