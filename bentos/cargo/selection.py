"""Which pictures of a new set are worth a label: by conformal prediction, on nothing but the network's answers.

A conformal predictor (Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2nd ed. 2022, ch. 2 and
4) says how odd an example is beside known ones. It needs a *nonconformity* a(z, y) of an answer z to a label y, and
pictures with labels that were not trained on, the *calibration*. Here, z being the vector of the five probabilities:

    a(z, y) = d(z, c_y)        c_y: mean answer to calibration pictures of material y; d: l1, l2 or cosine distance
    p(z, y) = (1 + #{calibration pictures i of y: a(z_i, y) ≥ a(z, y)}) / (1 + number of these)

The p-value looks at calibration pictures of the material y alone (class-conditional, or *Mondrian*, conformal
prediction: ibid. §4.6), so that a material with vague answers does not hide one with clear answers. For monday's own
pictures the p-value of the true label is uniform: at most a share ε of them has p ≤ ε. The *credibility* of a picture
is its largest p-value over the labels: small when the answer is like the known answers to no material at all. The
centres come from one half of the calibration and the scores from the other, as scores of pictures that made their own
centre would be too small.

Low credibility as the sign of drift, and as the order in which to label and retrain, is the proposal of Jordaney and
others ("Transcend: Detecting Concept Drift in Malware Classification Models", USENIX Security 2017) and of Barbero and
others ("Transcending Transcend", IEEE S&P 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DISTANCES = ("l1", "l2", "cosine")


def distances(answers: Floats, centres: Floats, name: str) -> Floats:
    """From each of `n` answers [n, k] to each of `m` centres [m, k], [n, m]."""
    if name == "l1":
        return np.asarray(np.abs(answers[:, None, :] - centres[None, :, :]).sum(axis=2))
    if name == "l2":
        return np.asarray(np.sqrt(((answers[:, None, :] - centres[None, :, :]) ** 2).sum(axis=2)))
    if name == "cosine":
        lengths = np.linalg.norm(answers, axis=1)[:, None] * np.linalg.norm(centres, axis=1)[None, :]
        return np.asarray(1 - answers @ centres.T / lengths)
    raise ValueError(f"there is no distance {name!r}; known are {', '.join(DISTANCES)}")


@dataclass(frozen=True)
class Calibration:
    """What answers to known pictures look like, by material."""

    distance: str
    centres: Floats  # [k, k]: row y is the mean answer to pictures of y
    scores: tuple[Floats, ...]  # by material, rising: the nonconformity of its calibration pictures to itself

    @classmethod
    def of(cls, answers: Floats, labels: Ints, distance: str) -> Calibration:
        """From answers [n, k] to pictures that were not trained on. Every label needs two of them at least."""
        answers = np.asarray(answers, np.float64)
        centres, scores = [], []
        for label in range(answers.shape[1]):
            own = answers[labels == label]
            if len(own) < 2:
                raise ValueError(
                    f"label {label} has {len(own)} calibration pictures; two are needed, hundreds are good"
                )
            centre = own[::2].mean(axis=0)
            centres.append(centre)
            scores.append(np.sort(distances(own[1::2], centre[None], distance)[:, 0]))
        return cls(distance, np.stack(centres), tuple(scores))

    def nonconformity(self, answers: Floats) -> Floats:
        """a(z, y), [n, k]."""
        return distances(np.asarray(answers, np.float64), self.centres, self.distance)

    def p_values(self, answers: Floats) -> Floats:
        """p(z, y), [n, k]."""
        found = self.nonconformity(answers)
        columns = []
        for label, scores in enumerate(self.scores):
            as_odd = len(scores) - np.searchsorted(scores, found[:, label], side="left")
            columns.append((1 + as_odd) / (1 + len(scores)))
        return np.stack(columns, axis=1)

    def credibility(self, answers: Floats) -> Floats:
        """The largest p-value of each picture, [n]."""
        return np.asarray(self.p_values(answers).max(axis=1))

    def order(self, answers: Floats) -> Ints:
        """Pictures by rising credibility; among equals, the farthest from every known answer first."""
        nearest = self.nonconformity(answers).min(axis=1)
        return np.lexsort((-nearest, self.credibility(answers))).astype(np.int64)


def choose(calibration: Calibration, answers: Floats, budget: int) -> Ints:
    """Indices of `budget` pictures: of each material that the network takes them for in turn, the least credible.

    In turn, as the least credible of all look alike: on tuesday, most of them were taken for the same material.
    """
    order = calibration.order(answers)
    taken_for = np.asarray(answers).argmax(axis=1)[order]
    place = np.zeros(len(order), np.int64)  # of a picture among those that are taken for the same
    for label in range(answers.shape[1]):
        own = taken_for == label
        place[own] = np.arange(own.sum())
    return order[np.argsort(place, kind="stable")][:budget]
