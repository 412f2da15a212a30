"""`python -m bentos.cargo.example DIR`: a small network with its sample and expected answer, in seconds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from bentos.cargo.train import Settings, train
from bentos.serving import ModelFolder
from bentos.training.outcome import Progress


def write(root: Path, seed: int = 7) -> ModelFolder:
    """Trains on few pictures and writes a model folder."""
    settings = replace(Settings.small(seed), budgets=(30,), rounds=(1,))
    outcome, _ = train(settings, Progress.start(quiet=True))
    return outcome.write(root)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
