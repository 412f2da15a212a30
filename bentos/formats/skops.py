"""A scikit-learn estimator or pipeline from a skops file; no type outside of a fixed list is ever loaded."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

from bentos import serving
from bentos.formats import fitted
from bentos.serving import row_proof, row_values, trial_rows
from bentos.serving.row_proof import Sharing
from bentos.serving.schema import inputs_schema, outputs_schema
from bentos.serving.values import date_text

_METHODS = ("predict", "predict_proba")
_JOINT = frozenset({"MiniBatchNMF", "NMF"})
"""Their transform solves for all rows together, until the rows taken together are good enough."""
_ELEMENTWISE = frozenset({"clip", "nan_to_num", "round"})
"""Functions of NumPy beside its ufuncs."""


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
        self.table: serving.Table | None = None
        if width is not None:
            known = None if names is None else [str(name) for name in names]
            shown = _shown_as_text(folder.sample(), int(width), names)
            self._features = fitted.features(self.estimator, known, int(width), shown, folder.path().name)
            self.table = serving.Table(tuple(f.column for f in self._features), named=known is not None)
        labels = _labels(self.estimator, folder.path().name)
        self.methods = tuple(m for m in _METHODS if hasattr(self.estimator, m))
        if "predict" not in self.methods:
            message = f"{folder.path().name} holds a {type(self.estimator).__name__}, which does not predict"
            raise serving.StartError("model_load_failed", message, "save the whole pipeline with its last estimator")
        proven = independent(self.estimator)
        rows, extremes = trial_rows.of_table(self.table, folder.sample())
        verdict = row_proof.tried(self._every_method, rows, extremes, most=row_proof.MOST if proven else 2)
        if verdict.miscounts:
            message = f"{folder.path().name} does not answer one value per row: {verdict.refuted}"
            hint = "save a pipeline whose steps keep the rows and whose last step answers one value for each"
            raise serving.StartError("model_load_failed", message, hint)
        self.sharing = row_proof.sharing(Sharing.REQUEST, verdict, proven)
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
            details={
                "estimator": type(self.estimator).__name__,
                "methods": list(self.methods),
                **row_proof.details(self.sharing, verdict, proven),
            },
        )

    def outputs(self, inputs: list[Any], method: str = "predict") -> list[Any]:
        """Predictions in the order of the rows. Raises Problem naming the row and column that does not fit."""
        if method not in self.methods:
            detail = f"this model has no method {method[:50]!r}"
            raise serving.Problem("unknown_method", detail, field="method", hint=f"one of: {', '.join(self.methods)}")
        if self.sharing is Sharing.REQUEST or len(inputs) < 2:
            return self._answered(inputs, method)
        self._rows(inputs)  # so that a row that does not fit is named by its number
        return [value for row in inputs for value in self._answered([row], method)]

    def _answered(self, inputs: list[Any], method: str) -> list[Any]:
        """What one call of the estimator gives for these rows, one value each."""
        rows = self._rows(inputs)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # unknown categories and the like: the model was made to take them
                values = getattr(self.estimator, method)(rows)
        except (ValueError, TypeError) as error:
            raise self._refused(inputs, error) from error
        try:
            return row_values.listed(values, len(inputs))
        except row_proof.Miscounted as error:
            hint = "save a pipeline whose last step answers one value per row"
            raise serving.Problem("prediction_failed", str(error), hint=hint, status=500) from error

    def _every_method(self, inputs: list[Any]) -> list[Any]:
        """For trials. Raises Miscounted."""
        try:
            answers = [self._answered(inputs, method) for method in self.methods]
        except serving.Problem as problem:
            if isinstance(problem.__cause__, row_proof.Miscounted):
                raise problem.__cause__ from problem
            raise
        return [dict(zip(self.methods, values, strict=True)) for values in zip(*answers, strict=True)]

    def _rows(self, inputs: list[Any]) -> Any:
        if self.table is None:
            for i, row in enumerate(inputs):
                if type(row) is not str:
                    hint = "this model takes texts: every row is a string"
                    raise serving.Problem("wrong_type", f"inputs[{i}] is not a string", field=f"inputs[{i}]", hint=hint)
            return inputs
        table = self.table
        names = list(table.names) if table.named else None
        if all(feature.plain for feature in self._features):
            matrix = table.matrix(inputs)
            if names is None:
                return matrix
            # columns side by side in memory, as in the frames that people train with: sums come out the same
            return self._pandas.DataFrame(self._numpy.asfortranarray(matrix), columns=names)
        columns = table.values(inputs)
        if names is None and (array := fitted.array(self._features, columns)) is not None:
            return array
        # a series has the type of its array, where a frame would take None among texts for NaN
        series = [self._series(feature.array(v)) for feature, v in zip(self._features, columns, strict=True)]
        frame = self._pandas.DataFrame(dict(enumerate(series)))
        return frame if names is None else frame.set_axis(names, axis=1)

    def _series(self, values: Any) -> Any:
        return self._pandas.Series(values, dtype=values.dtype)

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


def independent(estimator: Any) -> bool:
    """Whether nothing in it is known to work on all rows at once: functions over a whole table, joint factorisations.

    What is not known is left to the trials.
    """
    import numpy as np

    waiting, seen = [estimator], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, list | tuple | set):
            waiting += each
        elif isinstance(each, dict):
            waiting += each.values()
        elif type(each).__module__.startswith("sklearn."):
            name = type(each).__name__
            if name in _JOINT:
                return False
            if name == "FunctionTransformer":
                plain = isinstance(each.func, np.ufunc) or getattr(each.func, "__name__", "") in _ELEMENTWISE
                if each.func is not None and (not plain or each.kw_args):
                    return False
            waiting += getattr(each, "__dict__", {}).values()
    return True


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


def _labels(estimator: Any, file: str) -> list[Any] | None:
    """The labels of a classifier as its answers have them. Raises StartError for those that JSON cannot keep."""
    import numpy

    classes = getattr(estimator, "classes_", None)
    for each in classes if isinstance(classes, list) else [classes]:  # several outputs have a list of them
        if isinstance(each, numpy.ndarray) and not _kept(each):
            odd = each.dtype if each.dtype.kind != "O" else f"{type(each[0]).__name__} among others"
            message = f"The classes of {file} are of the type {odd}, which JSON cannot keep."
            hint = "fit the classifier on text, numbers, booleans or dates"
            raise serving.StartError("model_load_failed", message, hint)
    return _listed(classes) if isinstance(classes, numpy.ndarray) else None


def _kept(classes: Any) -> bool:
    if classes.dtype.kind == "O":
        return all(isinstance(label, str | int | float | bool) for label in classes.tolist())
    return classes.dtype.kind in "biuUM" or (classes.dtype.kind == "f" and classes.dtype.itemsize <= 8)


def _listed(values: Any) -> list[Any]:
    """An array as JSON values; dates in ISO 8601."""
    if values.dtype.kind == "M":
        texts = [None if value != value else date_text(value) for value in values.flat]
        values = _array_of(texts, values.shape)
    listed: list[Any] = values.tolist()
    return listed


def _array_of(values: list[Any], shape: tuple[int, ...]) -> Any:
    import numpy

    made = numpy.empty(len(values), dtype=object)
    made[:] = values
    return made.reshape(shape)


def _shown_as_text(sample: Any, width: int, names: Any) -> set[int]:
    rows = sample.get("inputs") if isinstance(sample, dict) else None
    shown: set[int] = set()
    for row in rows if isinstance(rows, list) else []:
        cells = [row.get(str(n)) for n in names] if isinstance(row, dict) and names is not None else row
        if isinstance(cells, list):
            shown |= {i for i, cell in enumerate(cells[:width]) if isinstance(cell, str)}
    return shown
