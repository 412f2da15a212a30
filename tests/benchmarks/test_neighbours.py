"""Some of the models of the figure `uploads.neighbours`: no answer is unlike the model's own to the row alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.neighbour_models import families
from benchmarks.neighbours import tried

SOME = {
    "onnx": [
        "mlp", "normalised over the rows", "softmax over the rows", "less the first", "by their size", "a rare signal",
        "reversed", "rolled", "boxes", "boxes under a wrong name", "boxes unnamed", "turned", "each with each",
        "mean of all", "one of all", "a value and boxes", "a sequence", "quantised", "mixed by a reshape",
        "turned, as wide as rows", "time first", "time first within", "a scalar beside",
    ],
    "sklearn": ["as many outputs as rows", "a factorisation"],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in SOME.items() for name in names])
def test_every_answer_is_the_models_own_to_that_row_alone(tmp_path: Path, kind: str, name: str) -> None:
    outcome = tried(families(kind)[name](np.random.default_rng(0)), tmp_path / "m")
    assert (outcome.refused, outcome.different, outcome.errors) == (None, [], [])
    assert outcome.answers >= len(outcome.case.rows) * 7
