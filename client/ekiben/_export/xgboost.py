"""XGBoost's Booster and XGBModel as JSON."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from ekiben._export.written import Written, frame, predicted, unfitted


def write(model: Any, folder: Path, sample: Any) -> Written:
    xgboost = importlib.import_module("xgboost")
    wrapped = isinstance(model, xgboost.XGBModel)
    try:
        booster = model.get_booster() if wrapped else model
    except Exception as error:
        raise unfitted(model, error) from None
    outputs = None
    if sample is not None:
        table = frame(sample)
        named = hasattr(table, "columns")
        missing = model.missing if wrapped and model.missing is not None else math.nan
        names = None if named else booster.feature_names
        types = None if named else booster.feature_types
        outputs = predicted(
            lambda rows: booster.predict(
                xgboost.DMatrix(
                    rows, missing=missing, feature_names=names, feature_types=types, enable_categorical=True
                ),
                iteration_range=_best(booster),
            ),
            table,
        )
    file = folder / "model.json"
    booster.save_model(str(file))
    return Written(file, outputs, booster.feature_names, named=booster.feature_names is not None)


def _best(booster: Any) -> tuple[int, int]:
    # After early stopping XGBModel.predict stops at the best iteration; (0, 0) means all trees.
    best = booster.attr("best_iteration")
    return (0, 0) if best is None else (0, int(best) + 1)
