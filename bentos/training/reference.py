"""What a kind's full training gave: the figures of its README, in `bentos/KIND/metrics.json`.

    {"dataset": "<SHA-256>", "parameters": {…}, "metrics": {"auc": 0.9918, …}, "tolerance": {"*": 0.01, "auc": 0.002}}

The tolerance of a metric is that of the last pattern (of `fnmatch`) that its name matches, absolute: a seed gives the
same model again on the same machine, and nearly the same on another processor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

FILE = "metrics.json"


@dataclass(frozen=True)
class Reference:
    dataset: str
    parameters: Mapping[str, Any]
    metrics: Mapping[str, float]
    tolerance: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path) -> Reference | None:
        """Of a kind's folder; None if it has none."""
        path = folder / FILE
        return cls(**json.loads(path.read_bytes())) if path.exists() else None

    def write(self, folder: Path) -> None:
        body = {"dataset": self.dataset, "parameters": self.parameters, "metrics": self.metrics}
        (folder / FILE).write_text(json.dumps({**body, "tolerance": self.tolerance}, indent=2) + "\n")

    def renewed(self, dataset: str, parameters: Mapping[str, Any], metrics: Mapping[str, float]) -> Reference:
        """With the same tolerance, what another training gave; six digits are more than any table shows."""
        rounded = {name: float(f"{value:.6g}") for name, value in metrics.items()}
        return replace(self, dataset=dataset, parameters=parameters, metrics=rounded)

    def is_of(self, dataset: str, parameters: Mapping[str, Any]) -> bool:
        """Whether that was the same training: only then its figures can be expected again."""
        return self.dataset == dataset and dict(self.parameters) == dict(parameters)

    def allowed(self, metric: str) -> float:
        """By how much it may differ."""
        return [value for pattern, value in self.tolerance.items() if fnmatchcase(metric, pattern)][-1]

    def differs(self, metric: str, value: float) -> bool:
        """NaN does, and so does a metric that there was none of."""
        known = self.metrics.get(metric)
        return known is None or not abs(value - known) <= self.allowed(metric)
