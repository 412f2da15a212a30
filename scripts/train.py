"""`make train`: trains every task kind, one after the other, and prints all their metrics in one table.

    python -m scripts.train                                   every kind with a training program
    python -m scripts.train ranker forecast -- --small        some of them; what follows -- goes to each
    python -m scripts.train --keep cargo                      what came is what the kind's README is to say from now on

A kind that cannot be trained (its data cannot be had) does not keep the others from it. A training with the data and
parameters of a kind's metrics.json, which its README shows, has to give the same metrics within the tolerance stated
there; where it does not, the table says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bentos.training.outcome import table
from bentos.training.reference import FILE, Reference

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Trained:
    """What became of one kind; no metrics where its training failed, no reference where it was another training."""

    kind: str
    seconds: float
    exit_code: int
    metrics: dict[str, float] = field(default_factory=dict)
    reference: Reference | None = None

    def differing(self) -> list[str]:
        """Metrics that are not what they were."""
        if self.reference is None:
            return []
        gone = [name for name in self.reference.metrics if name not in self.metrics]
        return gone + [name for name, value in self.metrics.items() if self.reference.differs(name, value)]


def kinds() -> list[str]:
    """The kinds that have a training program."""
    programs = (ROOT / "bentos").glob("*/train.py")
    return sorted(path.parent.name for path in programs if (path.parent / "kind.toml").exists())


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    passed: list[str] = []
    if "--" in given:
        at = given.index("--")
        given, passed = given[:at], given[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="make train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"which (default: all): {', '.join(kinds())}")
    parser.add_argument("--keep", action="store_true", help=f"write the metrics that come to bentos/KIND/{FILE}")
    options = parser.parse_args(given)
    unknown = [name for name in options.kinds if name not in kinds()]
    if unknown:
        parser.error(f"{unknown[0]} has no training program; there are {', '.join(kinds())}")
    trained = [train(kind, passed, keep=options.keep) for kind in options.kinds or kinds()]
    print("\n" + report(trained))
    differing = [f"{each.kind}: {name}" for each in trained for name in each.differing()]
    if differing:
        print(f"\nnot what the READMEs say: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing or any(each.exit_code for each in trained) else 0


def train(kind: str, arguments: Sequence[str], *, keep: bool = False) -> Trained:
    """Run a kind's training program, which prints as it always does."""
    print(f"── {kind}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ekiben-train-") as scratch:
        said = Path(scratch) / "metrics.json"
        command = [sys.executable, "-m", f"bentos.{kind}.train", "--metrics", str(said), *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        seconds = time.monotonic() - started
        if code:
            return Trained(kind, seconds, code)
        told = json.loads(said.read_text())
    folder = ROOT / "bentos" / kind
    reference = Reference.read(folder)
    if keep:
        reference = (reference or Reference("", {}, {}, {"*": 0.01})).renewed(
            told["dataset"], told["parameters"], told["metrics"]
        )
        reference.write(folder)
    elif reference is not None and not reference.is_of(told["dataset"], told["parameters"]):
        print(f"{kind}: not the data or the parameters of its README, so not compared with it")
        reference = None
    return Trained(kind, seconds, 0, told["metrics"], reference)


def report(trained: Sequence[Trained]) -> str:
    rows: list[list[str | float]] = []
    for each in trained:
        if each.exit_code:
            rows.append([each.kind, f"failed (exit {each.exit_code})", "–", "", ""])
        for name, value in each.metrics.items():
            rows.append([each.kind, name, value, *_beside(each.reference, name, value)])
        rows.append([each.kind, "seconds", f"{each.seconds:.0f}", "", ""])
    return table(["kind", "metric", "value", "README", ""], rows)


def _beside(reference: Reference | None, name: str, value: float) -> tuple[str, str]:
    if reference is None or name not in reference.metrics:
        return "", "" if reference is None else "new"
    return f"{reference.metrics[name]:.4f}", "differs" if reference.differs(name, value) else ""


if __name__ == "__main__":
    sys.exit(main())
