"""`python -m bentos.violation.example DIR`: a small network of drawn pictures with its sample, in seconds."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from bentos.serving import ModelFolder
from bentos.training.outcome import Progress
from bentos.violation.train import Settings, train


def write(root: Path, seed: int = 7) -> ModelFolder:
    """Trains on few drawn pictures and writes a model folder."""
    settings = Settings.small(seed)
    few = replace(settings, pictures=1000, recipe=replace(settings.recipe, epochs=4))
    return train(few, Progress.start(quiet=True))[0].write(root)


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
