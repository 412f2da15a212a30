"""A scikit-learn estimator or pipeline from a skops file; no type outside of a fixed list is ever loaded."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bentos import serving
from bentos.serving.schema import inputs_schema, outputs_schema

_METHODS = ("predict", "predict_proba")


class Model:
    """An estimator with its columns. Raises StartError `model_load_failed` when the file is not what it should be."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        import numpy
        import pandas

        self._numpy, self._pandas = numpy, pandas
        self.estimator = _load(folder)
        _one_thread(self.estimator)
        width = getattr(self.estimator, "n_features_in_", None)
        names = getattr(self.estimator, "feature_names_in_", None)
        sample = folder.sample()
        self.table = None if width is None else _table(self.estimator, int(width), names, sample)
        self._frame = names is not None
        classes = getattr(self.estimator, "classes_", None)
        labels = classes.tolist() if isinstance(classes, numpy.ndarray) else None
        self.methods = tuple(m for m in _METHODS if hasattr(self.estimator, m))
        if "predict" not in self.methods:
            message = f"{folder.path().name} holds a {type(self.estimator).__name__}, which does not predict"
            raise serving.StartError("model_load_failed", message, "save the whole pipeline with its last estimator")
        row = self.table.row_schema() if self.table else {"type": "string"}
        body = inputs_schema(row)
        body["properties"]["method"] = {"enum": list(self.methods), "default": "predict"}
        self.about = serving.About(
            kind="sklearn",
            format="skops",
            folder=folder,
            input=body,
            output=outputs_schema({"enum": labels} if labels and "predict_proba" not in self.methods else {}),
            classes=labels,
            example={"inputs": [self.table.example_row() if self.table else "some text"]},
            details={"estimator": type(self.estimator).__name__, "methods": list(self.methods)},
        )

    def outputs(self, inputs: list[Any], method: str = "predict") -> list[Any]:
        """Predictions in the order of the rows. Raises Problem naming the row and column that does not fit."""
        if method not in self.methods:
            detail = f"this model has no method {method[:50]!r}"
            raise serving.Problem("unknown_method", detail, field="method", hint=f"one of: {', '.join(self.methods)}")
        rows = self._rows(inputs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # unknown categories and the like: the model was made to take them
                values = getattr(self.estimator, method)(rows)
        except (ValueError, TypeError) as error:
            raise self._refused(inputs, error) from error
        listed: list[Any] = self._numpy.asarray(values).tolist()
        return listed

    def _rows(self, inputs: list[Any]) -> Any:
        if self.table is None:
            for i, row in enumerate(inputs):
                if type(row) is not str:
                    hint = "this model takes texts: every row is a string"
                    raise serving.Problem("wrong_type", f"inputs[{i}] is not a string", field=f"inputs[{i}]", hint=hint)
            return inputs
        table = self.table
        if not any(c.text or c.unused or c.categories is not None for c in table.columns):
            matrix = table.matrix(inputs)
            if not self._frame:
                return matrix
            # columns side by side in memory, as in the frames that people train with: sums come out the same
            return self._pandas.DataFrame(self._numpy.asfortranarray(matrix), columns=list(table.names))
        columns = table.values(inputs)
        series = {i: self._series(v, c) for i, (v, c) in enumerate(zip(columns, table.columns, strict=True))}
        frame = self._pandas.DataFrame(series)
        if not self._frame:
            return frame.to_numpy(dtype=object)
        frame.columns = list(table.names)
        return frame

    def _series(self, values: Sequence[Any], column: serving.Column) -> Any:
        if column.text or column.unused or any(isinstance(c, str) for c in column.categories or ()):
            return self._pandas.Series([math.nan if v is None else v for v in values], dtype=object)
        return self._numpy.array(values, dtype=float)

    def _refused(self, inputs: list[Any], error: Exception) -> serving.Problem:
        said = str(error).split("\n")[0][:500]
        if self.table is not None:
            for i, row in enumerate(self.table.records(inputs)):
                for column, value in zip(self.table.columns, row, strict=True):
                    if value is None or (type(value) is float and math.isnan(value)):
                        place = f"inputs[{i}].{column.name}" if self.table.named else f"inputs[{i}]"
                        detail = f"{place} is missing, and the model does not take that: {said}"
                        return serving.Problem("missing_value", detail, field=place, hint="send a value")
        hint = "compare the rows with those that the model was trained on"
        return serving.Problem("prediction_refused", f"the model refuses these rows: {said}", field="inputs", hint=hint)


def trusted() -> frozenset[str]:
    """The types that a file may hold: exactly those that an upload is accepted with (registry/formats/skops_types.py),
    so that nothing that was accepted fails here for want of trust.

    Trees hold indices that scikit-learn follows unchecked: a crafted file may crash this process, which serves that
    file alone. Nothing on the list calls what the file names: no partial, no bound methods, no code of others.
    """
    listed: list[str] = json.loads(Path(__file__).with_name("trusted.json").read_text("utf-8"))
    return frozenset(listed)


def _load(folder: serving.ModelFolder) -> Any:
    import skops.io

    path = folder.path()
    known = trusted()
    hint = "save it with skops.io.dump; pack other classes with their code as a project"
    try:
        unknown = set(skops.io.get_untrusted_types(file=path)) - known
        if unknown:
            message = f"{path.name} holds types that are not served: {', '.join(sorted(unknown))[:500]}"
            raise serving.StartError("model_load_failed", message, hint)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return skops.io.load(path, trusted=sorted(known))
    except serving.StartError:
        raise
    except Exception as error:  # a damaged zip, array or schema fails in many ways
        message = f"{path.name} cannot be loaded: {type(error).__name__}: {str(error)[:500]}"
        raise serving.StartError("model_load_failed", message, hint) from error


def _one_thread(estimator: Any) -> None:
    """Forests trained with n_jobs=-1 would start threads for each request."""
    for key in estimator.get_params(deep=True):
        if key.split("__")[-1] == "n_jobs":
            estimator.set_params(**{key: None})


def _table(estimator: Any, width: int, names: Any, sample: Any) -> serving.Table:
    """Columns as the encoders at the pipeline's start know them, else as the sample shows them, else numbers."""
    known = _encoded(estimator, width, names)
    shown = _shown_as_text(sample, width, names)
    dropped = _dropped(estimator, width, names)
    columns = []
    for i in range(width):
        name = str(names[i]) if names is not None else f"x{i}"
        categories, closed = known.get(i, (None, False))
        text = i in shown or any(isinstance(c, str) for c in categories or ())
        if i in dropped:
            columns.append(serving.Column(name, unused=True))
        elif categories and closed:
            columns.append(serving.Column(name, categories=tuple(categories)))
        elif text:
            example = next((c for c in categories or () if isinstance(c, str)), "")
            columns.append(serving.Column(name, text=True, example=example))
        else:
            columns.append(serving.Column(name, example=categories[0] if categories else 0.0))
    return serving.Table(tuple(columns), named=names is not None)


def _innermost(estimator: Any) -> Any:
    """The pipeline or estimator that sees the rows as they come, out of searches, calibration and the like."""
    for _ in range(10):
        calibrated = getattr(estimator, "calibrated_classifiers_", None)
        if calibrated:
            estimator = calibrated[0].estimator
        elif hasattr(estimator, "best_estimator_"):
            estimator = estimator.best_estimator_
        elif hasattr(estimator, "regressor_"):
            estimator = estimator.regressor_
        elif not hasattr(estimator, "steps") and hasattr(getattr(estimator, "estimator_", None), "steps"):
            estimator = estimator.estimator_
        else:
            break
    return estimator


def _positions(columns: Any, width: int, places: dict[str, int]) -> list[int] | None:
    """Where a transformer's columns are, given by name or number; None for slices and masks."""
    if isinstance(columns, str):
        return [places[columns]] if columns in places else None
    try:
        listed = list(columns)
    except TypeError:
        return None
    found = []
    for column in listed:
        place: Any = places.get(column) if isinstance(column, str) else column
        if type(place).__name__.startswith("bool") or not hasattr(place, "__index__") or not -width <= place < width:
            return None
        found.append(int(place) % width)
    return found


def _dropped(estimator: Any, width: int, names: Any) -> set[int]:
    """Columns that no transformer of the first step takes."""
    estimator = _innermost(estimator)
    steps = getattr(estimator, "steps", None)
    transformers = getattr(steps[0][1] if steps else estimator, "transformers_", None)
    if transformers is None:
        return set()
    places = {str(n): i for i, n in enumerate(names)} if names is not None else {}
    used: set[int] = set()
    for _, transformer, columns in transformers:
        if isinstance(transformer, str) and transformer == "drop":
            continue
        at = _positions(columns, width, places)
        if at is None:
            return set()
        used.update(at)
    return set(range(width)) - used


def _encoded(estimator: Any, width: int, names: Any) -> dict[int, tuple[list[Any], bool]]:
    """Column → (categories of the encoder that sees it first, whether other values are refused)."""
    estimator = _innermost(estimator)
    steps = getattr(estimator, "steps", None)
    first = steps[0][1] if steps else estimator
    if steps and not hasattr(first, "transformers_") and hasattr(first, "categories_"):
        return _of_encoder(first, list(range(width)))
    found: dict[int, tuple[list[Any], bool]] = {}
    places = {str(n): i for i, n in enumerate(names)} if names is not None else {}
    for _, transformer, columns in getattr(first, "transformers_", ()):
        at = _positions(columns, width, places)
        if at is None:
            continue  # the sample or the model itself will tell
        inner = [s for _, s in transformer.steps] if hasattr(transformer, "steps") else [transformer]
        encoder = next((s for s in inner if hasattr(s, "categories_")), None)
        if encoder is not None and len(encoder.categories_) == len(at):
            found.update(_of_encoder(encoder, at, imputed=encoder is not inner[0]))
    return found


def _of_encoder(encoder: Any, at: list[int], imputed: bool = False) -> dict[int, tuple[list[Any], bool]]:
    closed = getattr(encoder, "handle_unknown", "error") == "error" and not imputed
    found = {}
    for i, categories in zip(at, encoder.categories_, strict=True):
        listed = [c.item() if hasattr(c, "item") else c for c in categories.tolist()]
        values = [c for c in listed if c is not None and c == c]  # NaN stands for missing
        found[i] = (values, closed)
    return found


def _shown_as_text(sample: Any, width: int, names: Any) -> set[int]:
    rows = sample.get("inputs") if isinstance(sample, dict) else None
    shown: set[int] = set()
    for row in rows if isinstance(rows, list) else []:
        cells = [row.get(str(n)) for n in names] if isinstance(row, dict) and names is not None else row
        if isinstance(cells, list):
            shown |= {i for i, cell in enumerate(cells[:width]) if isinstance(cell, str)}
    return shown
