"""What a training program hands over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bentos.serving.model import ModelFolder, write_model


@dataclass(frozen=True)
class Outcome:
    """A trained model with everything that is to be known about it."""

    kind: str
    format: str
    files: Mapping[str, bytes | Path]
    """The model's files by their paths in the version, such as ranker.txt."""
    sample: Any
    expected: Any
    parameters: Mapping[str, str | int | float]
    metrics: Mapping[str, float]
    dataset: str
    """Name of the data."""
    dataset_digest: str
    """SHA-256 of the data, in hex."""
    plots: Mapping[str, bytes] = field(default_factory=dict)
    """Pictures for people, by file name (`calibration.png`); they go to MLflow, not into the version."""

    def write(self, folder: Path) -> ModelFolder:
        """Write the model folder (docs/design.md §4). Raises FileExistsError if `folder` holds something else."""
        return write_model(
            folder,
            kind=self.kind,
            format=self.format,
            files=self.files,
            sample=self.sample,
            expected=self.expected,
        )

    @property
    def labels(self) -> dict[str, str]:
        """What an uploaded version says of its training: its metrics, and digest of the data."""
        return {name: f"{value:.4f}" for name, value in self.metrics.items()} | {"dataset": self.dataset_digest[:16]}


@dataclass(frozen=True)
class Progress:
    """Lines on standard error, each with the seconds since the start. `quiet` says nothing."""

    started: float
    quiet: bool = False

    @classmethod
    def start(cls, quiet: bool = False) -> Progress:
        return cls(time.monotonic(), quiet)

    def __call__(self, message: str) -> None:
        if not self.quiet:
            print(f"{time.monotonic() - self.started:7.1f} s  {message}", file=sys.stderr, flush=True)

    def rounds(self, what: str, total: int) -> Callable[[Any], None]:
        """A LightGBM callback that reports every quarter of the way."""
        step = max(1, total // 4)

        def report(env: Any) -> None:
            done = env.iteration + 1
            if done % step == 0 or done == total:
                self(f"{what}: {done} of {total} trees")

        return report


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]], digits: int = 4) -> str:
    """Rows under a head as aligned text: the first column to the left, numbers to the right.

    >>> print(table(["order", "NDCG@10"], [["random", 0.4], ["learnt", 0.91234]]))
    order   NDCG@10
    random   0.4000
    learnt   0.9123
    """
    cells = [[cell if isinstance(cell, str) else f"{cell:.{digits}f}" for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(head), *cells]) for i in range(len(head))]
    lines = []
    for row in [list(head), *cells]:
        rest = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())
    return "\n".join(lines)
