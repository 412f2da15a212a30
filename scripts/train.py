"""`make train`: trains every task kind, one after the other, and prints all their metrics in one table.

    python -m scripts.train                                   every kind with a training program
    python -m scripts.train ranker forecast -- --small        some of them; what follows -- goes to each

A kind that cannot be trained (its data cannot be had) does not keep the others from it.
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

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Trained:
    """What became of one kind; no metrics where its training failed."""

    kind: str
    seconds: float
    exit_code: int
    metrics: dict[str, float] = field(default_factory=dict)


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
    options = parser.parse_args(given)
    unknown = [name for name in options.kinds if name not in kinds()]
    if unknown:
        parser.error(f"{unknown[0]} has no training program; there are {', '.join(kinds())}")
    trained = [train(kind, passed) for kind in options.kinds or kinds()]
    print("\n" + report(trained))
    return 1 if any(each.exit_code for each in trained) else 0


def train(kind: str, arguments: Sequence[str]) -> Trained:
    """Run a kind's training program, which prints as it always does."""
    print(f"── {kind}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ekiben-train-") as scratch:
        said = Path(scratch) / "metrics.json"
        command = [sys.executable, "-m", f"bentos.{kind}.train", "--metrics", str(said), *arguments]
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        metrics = json.loads(said.read_text())["metrics"] if code == 0 else {}
    return Trained(kind, time.monotonic() - started, code, metrics)


def report(trained: Sequence[Trained]) -> str:
    rows: list[list[str | float]] = []
    for each in trained:
        if each.exit_code:
            rows.append([each.kind, f"failed (exit {each.exit_code})", "–"])
        rows += [[each.kind, name, value] for name, value in each.metrics.items()]
        rows.append([each.kind, "seconds", f"{each.seconds:.0f}"])
    return table(["kind", "metric", "value"], rows)


if __name__ == "__main__":
    sys.exit(main())
