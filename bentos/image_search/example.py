"""`python -m bentos.image_search.example DIR`: a small network and catalogue of drawn shapes, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bentos.image_search.train import Settings, train
from bentos.serving import ModelFolder
from bentos.training.outcome import Progress


def write(root: Path, seed: int = 7) -> ModelFolder:
    """Trains on few pictures and writes a model folder."""
    outcome, _ = train(Settings.small(seed), Progress.start(quiet=True))
    return outcome.write(root)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
