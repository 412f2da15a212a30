"""The evaluation gate: a new model is released only if it is not worse than the one that is live.

Both are evaluated on the same held-out data, by the same program, from the files that the service keeps: what was
logged at another time, on other data, says nothing here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bentos.serving.model import ModelFolder

RELEASED = "released"
HELD = "held back"


@dataclass(frozen=True)
class Gate:
    """`metric` of the new model may be worse than the live one's by `tolerance`, in the metric's own unit."""

    metric: str
    better: str
    """`higher` or `lower`."""
    tolerance: float
    evaluate: Callable[[ModelFolder], Mapping[str, float]]
    """The metrics of a saved model on the held-out data of this training."""

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower"):
            raise ValueError(f"better is {self.better!r}; a gate knows higher and lower")

    def figure(self, folder: ModelFolder) -> float:
        return float(self.evaluate(folder)[self.metric])

    def decide(self, value: float, live: float | None, live_version: int | None = None) -> Decision:
        """Whether a model with this figure may take the place of the one that is live (None: nothing is)."""
        if live is None:
            holds = math.isfinite(value)
        else:
            loss = live - value if self.better == "higher" else value - live
            holds = loss <= self.tolerance  # not so for NaN
        return Decision(holds, self.metric, self.better, value, live, live_version, self.tolerance)


@dataclass(frozen=True)
class Decision:
    """What the gate said, with the figures it said so by."""

    holds: bool
    metric: str
    better: str
    value: float
    live: float | None
    live_version: int | None
    tolerance: float

    @property
    def labels(self) -> dict[str, str]:
        """As it is recorded on the version."""
        return {
            "gate.decision": RELEASED if self.holds else HELD,
            "gate.metric": f"{self.metric} ({self.better} is better)",
            "gate.value": repr(self.value),
            "gate.live": "nothing was live" if self.live is None else repr(self.live),
            "gate.live_version": "none" if self.live_version is None else str(self.live_version),
            "gate.tolerance": repr(self.tolerance),
        }

    def __str__(self) -> str:
        beside = "nothing is live"
        if self.live is not None:
            beside = f"live version {self.live_version} has {self.live:.6g}"
        word = "it may be released" if self.holds else "it is held back"
        return (
            f"{self.metric} {self.value:.6g}, {beside} ({self.better} is better, tolerance {self.tolerance:g}): {word}"
        )
