"""`python -m bentos.forecast.example DIR`: a small forecaster with its sample and expected forecast, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bentos.forecast.train import Settings, train
from bentos.serving import ModelFolder
from bentos.training.outcome import Progress


def write(root: Path, seed: int = 7) -> ModelFolder:
    """Trains on few days and writes a model folder."""
    settings = Settings(stores=1, days=600, seed=seed, rounds=60, learning_rate=0.1, leaves=15, per_origin=2, real=())
    outcome, _ = train(settings, Progress.start(quiet=True))
    return outcome.write(root)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
