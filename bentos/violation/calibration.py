"""How far probabilities can be taken at their word, and where to draw the line between yes and no."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BINS = 15
FALSE_ALARMS = 0.02
RULE = f"the lowest threshold that at most {FALSE_ALARMS:.0%} of the validation split's animal pictures reach"


@dataclass(frozen=True)
class Bin:
    """Pictures of about the same probability."""

    count: int
    probability: float
    """Mean."""
    share: float
    """Of them that are violations."""


def bins(probabilities: Floats, violations: Bools) -> list[Bin]:
    """BINS of equal width; those without a picture are left out."""
    place = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    found = [place == i for i in range(BINS)]
    return [Bin(int(b.sum()), float(probabilities[b].mean()), float(violations[b].mean())) for b in found if b.any()]


def calibration_error(probabilities: Floats, violations: Bools) -> float:
    """Expected calibration error (Naeini and others, 2015): |share − probability| of a bin, mean over pictures."""
    return sum(b.count * abs(b.share - b.probability) for b in bins(probabilities, violations)) / len(probabilities)


def brier(probabilities: Floats, violations: Bools) -> float:
    """Mean squared error of the probabilities (Brier, 1950)."""
    return float(np.mean((probabilities - violations) ** 2))


def auc(scores: Floats, violations: Bools) -> float:
    """Area under the ROC curve: how often a violation scores higher than an animal picture; ties count one half."""
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2  # mean of the ranks that equal scores share
    positive, negative = int(violations.sum()), int((~violations).sum())
    return float((rank[place][violations].sum() - positive * (positive + 1) / 2) / (positive * negative))


def temperature(logits: Floats, violations: Bools) -> float:
    """By which to divide the logits for the least log loss (Guo and others, ICML 2017), to two per cent."""
    candidates = np.exp(np.linspace(-2, 2, 201))
    signed = np.where(violations, -1.0, 1.0) * logits
    losses = [np.logaddexp(0, signed / candidate).mean() for candidate in candidates]
    return float(candidates[int(np.argmin(losses))])


def threshold(probabilities: Floats, violations: Bools) -> float:
    """By RULE; halfway between two animal pictures, so that no rounding moves one over the line. Always below 1."""
    animals = np.sort(probabilities[~violations])[::-1]
    under = animals[int(FALSE_ALARMS * len(animals))]
    over = min([*animals[animals > under], 1.0])
    return min(float((under + over) / 2), float(np.nextafter(1, 0)))


def at_threshold(probabilities: Floats, violations: Bools, line: float) -> dict[str, float]:
    """What the decisions are worth: recall, precision, false alarms among animal pictures, accuracy."""
    said = probabilities >= line
    hits = int((said & violations).sum())
    return {
        "recall": hits / int(violations.sum()),
        "precision": hits / max(1, int(said.sum())),
        "false_alarms": float(said[~violations].mean()),
        "accuracy": float((said == violations).mean()),
    }


def plot(before: Floats, after: Floats, violations: Bools) -> bytes:
    """A reliability diagram as PNG: what was said, what came, and how many pictures it was said of."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(5, 6), sharex=True, height_ratios=[3, 1], layout="constrained"
    )
    above.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect")
    for probabilities, name, style in ((before, "as trained", "o--"), (after, "calibrated", "s-")):
        found = bins(probabilities, violations)
        error = calibration_error(probabilities, violations)
        shares = [b.share for b in found]
        above.plot([b.probability for b in found], shares, style, label=f"{name} (error {error:.4f})")
    above.set(ylabel="share of violations", xlim=(0, 1), ylim=(0, 1))
    above.legend(loc="upper left")
    below.hist(after, bins=BINS, range=(0, 1), log=True, color="tab:orange")
    below.set(xlabel="probability of a violation", ylabel="pictures")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()
