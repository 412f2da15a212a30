"""scikit-learn's estimators and pipelines as skops."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ekiben._errors import ExportError
from ekiben._export.written import Written, first_line, frame, predicted


def write(model: Any, folder: Path, sample: Any) -> Written:
    try:
        io = importlib.import_module("skops.io")
    except ImportError:
        raise ExportError(
            "a scikit-learn model is sent as skops, which is not installed here",
            code="skops_missing",
            field="model",
            hint="pip install skops",
        ) from None
    outputs: Any = None
    fields: dict[str, Any] = {}
    if sample is not None:
        # Probabilities tell more than labels: a model that drifted a little still gives the same labels.
        method = "predict_proba" if hasattr(model, "predict_proba") else "predict"
        fields = {} if method == "predict" else {"method": method}
        outputs = predicted(getattr(model, method), _table(sample))
    file = folder / "model.skops"
    try:
        io.dump(model, file)
    except Exception as error:
        raise ExportError(
            f"skops cannot write this {type(model).__qualname__}: {first_line(error)}",
            code="cannot_export",
            field="model",
            hint="joblib.dump it, then ekiben init --from FILE writes a project around it",
        ) from None
    names = getattr(model, "feature_names_in_", None)
    texts = getattr(model, "n_features_in_", None) is None  # a pipeline of texts has no columns at all
    return Written(file, outputs, None if names is None else list(names), texts or names is not None, fields)


def _table(sample: Any) -> Any:
    """The sample as scikit-learn takes it. Lists of values stay lists, of which NumPy would make one type."""
    rows = sample.get("inputs", []) if isinstance(sample, dict) else sample
    nested = isinstance(rows, (list, tuple)) and bool(rows) and all(isinstance(row, (list, tuple)) for row in rows)
    return [list(row) for row in rows] if nested else frame(sample)
