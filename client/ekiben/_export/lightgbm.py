"""LightGBM's Booster and LGBMModel as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ekiben._export.written import Written, frame, predicted, unfitted


def write(model: Any, folder: Path, sample: Any) -> Written:
    booster = model
    if not any(base.__name__ == "Booster" for base in type(model).__mro__):
        try:
            booster = model.booster_
        except Exception as error:  # the class of this error depends on whether scikit-learn is installed
            raise unfitted(model, error) from None
    outputs = None if sample is None else predicted(booster.predict, frame(sample))
    file = folder / "model.txt"
    booster.save_model(str(file))  # up to the best iteration, as predict does
    names = booster.feature_name()
    return Written(file, outputs, names, named=names != [f"Column_{at}" for at in range(len(names))])
