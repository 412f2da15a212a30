"""What a training program hands over."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bentos.serving.model import ModelFolder, write_model

ARTIFACT = "model"
"""Where in its run the model folder is."""
MOST_LABELS = 48
"""A version takes 64 labels; the rest is for the gate, and for people."""


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
    model: str | None = None
    """The file that holds the model, where there are several."""
    plots: Mapping[str, bytes] = field(default_factory=dict)
    """Pictures for people, by file name (`calibration.png`); they go to MLflow, not into the version."""
    run: str | None = None
    """Its run in MLflow, once it was logged; the version leads back to it."""

    @property
    def name(self) -> str:
        """What the model is called where it is uploaded: the kind as a name of an endpoint may be."""
        return self.kind.replace("_", "-")

    def write(self, folder: Path) -> ModelFolder:
        """Write the model folder (docs/design.md §4). Raises FileExistsError if `folder` holds something else."""
        return write_model(
            folder,
            kind=self.kind,
            format=self.format,
            files=self.files,
            sample=self.sample,
            expected=self.expected,
            model=self.model,
        )

    @property
    def labels(self) -> dict[str, str]:
        """What an uploaded version says of its training: its first MOST_LABELS metrics, the data's digest, its run."""
        metrics = list(self.metrics.items())[:MOST_LABELS]
        origin = {"mlflow.run_id": self.run, "mlflow.artifact_path": ARTIFACT} if self.run else {}
        return (
            {name: f"{value:.4f}" for name, value in metrics} | {"dataset": short_digest(self.dataset_digest)} | origin
        )


@dataclass(frozen=True)
class Progress:
    """What a training says while it runs, on standard error: lines with the seconds since the start, and bars.

    On a terminal a bar moves; elsewhere it is a line every quarter of the way. `quiet` says nothing.
    """

    started: float
    quiet: bool = False

    @classmethod
    def start(cls, quiet: bool = False) -> Progress:
        return cls(time.monotonic(), quiet)

    def __call__(self, message: str) -> None:
        if not self.quiet:
            print(f"{time.monotonic() - self.started:7.1f} s  {message}", file=sys.stderr, flush=True)

    @contextmanager
    def bar(self, what: str, total: int, unit: str = "steps") -> Iterator[Callable[[int], None]]:
        """A way of `total` steps; the block calls what it gets with the number of steps done since it called last."""
        if not self.quiet and sys.stderr.isatty():
            from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

            with tqdm(total=total, desc=what, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True) as shown:
                yield shown.update
            return
        step, done = max(1, total // 4), 0

        def advance(steps: int = 1) -> None:
            nonlocal done
            before, done = done, done + steps
            if done // step > before // step or done >= total > before:
                self(f"{what}: {done} of {total} {unit}")

        yield advance

    @contextmanager
    def rounds(self, what: str, total: int) -> Iterator[Callable[[Any], None]]:
        """The LightGBM callback of a training of `total` trees."""
        with self.bar(what, total, "trees") as advance:
            yield lambda _: advance(1)


def short_digest(digest: str) -> str:
    """As much of a digest of data as a label shows."""
    return digest[:16]


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
