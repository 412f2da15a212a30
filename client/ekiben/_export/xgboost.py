"""XGBoost's Booster and XGBModel as JSON."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

from ekiben._errors import ExportError
from ekiben._export.written import Written, frame, predicted, unfitted

_MISSING = "ekiben.missing"  # the attribute that the kind xgboost reads


def write(model: Any, folder: Path, sample: Any) -> Written:
    xgboost = importlib.import_module("xgboost")
    wrapped = isinstance(model, xgboost.XGBModel)
    try:
        booster = model.get_booster() if wrapped else model
    except Exception as error:
        raise unfitted(model, error) from None
    best = _best_iteration(model) if wrapped else None
    missing = _missing(model.missing if wrapped else booster.attr(_MISSING))
    outputs = None
    if sample is not None:
        table = frame(sample)
        named = hasattr(table, "columns")
        names = None if named else booster.feature_names
        types = None if named else booster.feature_types
        outputs = predicted(
            lambda rows: booster.predict(
                xgboost.DMatrix(
                    rows, missing=missing, feature_names=names, feature_types=types, enable_categorical=True
                ),
                iteration_range=(0, 0) if best is None else (0, best + 1),
            ),
            table,
        )
    file = folder / "model.json"
    _as_predicted(booster, best, missing).save_model(str(file))
    return Written(file, outputs, booster.feature_names, named=booster.feature_names is not None)


def _best_iteration(model: Any) -> int | None:
    """Return the iteration, counted from 0, at which the estimator's own `predict` stops; None: it uses all rounds."""
    try:
        return None if model.booster == "gblinear" else int(model.best_iteration)
    except AttributeError:  # trained without early stopping
        return None


def _missing(given: Any) -> float:
    """Return `missing` as a number; NaN is missing whatever it is. Raises ExportError for what is not a number."""
    if given is None:
        return math.nan
    try:
        value = float(given)
    except (TypeError, ValueError):
        raise ExportError(
            f"the model's `missing` must be a number, and is {str(given)[:100]!r}",
            code="bad_model",
            field="model",
            hint="train with missing=numpy.nan or a number",
        ) from None
    return math.nan if math.isinf(value) else value  # JSON has no infinity, so no row can hold one


def _as_predicted(booster: Any, best: int | None, missing: float) -> Any:
    """Return a booster whose own `predict` answers as the estimator does: its rounds end at the best iteration, and an
    attribute says which number is missing. The estimator's own booster stays as it is."""
    made = booster if best is None or best + 1 >= booster.num_boosted_rounds() else booster[: best + 1]
    if math.isnan(missing):
        return made
    made = made.copy() if made is booster else made
    made.set_attr(**{_MISSING: repr(missing)})
    return made
