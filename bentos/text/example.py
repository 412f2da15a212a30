"""`python -m bentos.text.example DIR`: a small labeller with its sample and expected answers, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bentos.serving import ModelFolder
from bentos.text.train import Settings, train
from bentos.training.outcome import Progress


def write(root: Path, seed: int = 7) -> ModelFolder:
    """Fits a head on few invented messages and writes a model folder."""
    outcome, _ = train(Settings(seed=seed, draws=0, invented=(200, 100)), Progress.start(quiet=True))
    return outcome.write(root)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
