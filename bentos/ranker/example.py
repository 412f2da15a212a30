"""`python -m bentos.ranker.example DIR`: a small ranker with its sample and expected ranking, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bentos.ranker.train import Settings, train
from bentos.serving import ModelFolder
from bentos.training.outcome import Progress


def write(root: Path, seed: int = 7) -> ModelFolder:
    """Trains on few searches and writes a model folder."""
    settings = Settings(queries=1500, seed=seed, rounds=80, learning_rate=0.1, min_leaf=100)
    outcome, _ = train(settings, Progress.start(quiet=True))
    return outcome.write(root)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
