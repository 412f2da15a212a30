"""A model object of the user's own process as a file that can be served, with the outputs it gives for a sample.

The outputs come from the model as it is in this process, before it is written. The server checks that the served model
gives the same; a difference keeps the version from going live.

    LightGBM   Booster, LGBMModel        → text       model.txt     outputs of Booster.predict
    XGBoost    Booster, XGBModel         → JSON       model.json    outputs of Booster.predict at the best iteration
    sklearn    estimator, pipeline       → skops      model.skops   outputs of predict_proba, else of predict
    ONNX       ModelProto                → protobuf   model.onnx    outputs of ONNX Runtime, where it is installed
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiben import _sample
from ekiben._errors import ExportError


@dataclass(frozen=True)
class Exported:
    """Files written for a model; `sample` and `expected` are JSON bodies, None where there was no sample."""

    files: tuple[Path, ...]
    sample: dict[str, Any] | None
    expected: dict[str, Any] | None


@dataclass(frozen=True)
class _Made:
    """A written file; the outputs for the sample; the model's columns, and whether it knows them by name.

    `fields` stand in the sample's request beside its inputs.
    """

    file: Path
    outputs: Any
    columns: list[str] | None = None
    named: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


def export(model: Any, folder: Path, sample: Any = None) -> Exported:
    """Write `model` into `folder` and predict `sample` (a frame, an array or rows) with it.

    Raises ExportError for a model that is not of the table above, is not fitted, or whose sample it cannot predict.
    """
    writer = _writer(model)
    if writer is None:
        raise ExportError(
            f"{type(model).__module__}.{type(model).__qualname__} is no model that Ekiben can export",
            code="unknown_model",
            field="model",
            hint="save it as ONNX, or push a project around it: ekiben init --from FILE",
        )
    body = None if sample is None else _sample.body(sample)
    if body is not None and not body.get("inputs"):
        raise ExportError(
            "the sample has no rows", code="bad_sample", field="sample", hint="pass some, like X_test[:100]"
        )
    made = writer(model, folder, sample)
    if body is None:
        return Exported((made.file,), None, None)
    if _sample.is_frame(sample):
        body = _sample.body(_sample.fit(sample, made.columns, made.named))
    body.update(made.fields)
    if made.outputs is None:
        return Exported((made.file,), body, None)
    values = _sample.outputs(made.outputs)
    if len(values) != len(body["inputs"]):
        raise ExportError(
            f"the model gave {len(values)} outputs for {len(body['inputs'])} rows", code="bad_sample", field="sample"
        )
    return Exported((made.file,), body, {"outputs": values})


def is_model(value: Any) -> bool:
    """Whether `value` is an object that `export` can write."""
    return _writer(value) is not None


def _writer(model: Any) -> Any:
    bases = [(base.__module__.split(".", 1)[0], base.__name__) for base in type(model).__mro__]
    if ("lightgbm", "Booster") in bases or ("lightgbm", "LGBMModel") in bases:
        return _lightgbm
    if ("xgboost", "Booster") in bases or ("xgboost", "XGBModel") in bases:
        return _xgboost
    if ("onnx", "ModelProto") in bases:
        return _onnx
    if ("sklearn", "BaseEstimator") in bases:
        return _sklearn
    return None


def _lightgbm(model: Any, folder: Path, sample: Any) -> _Made:
    booster = model
    if not any(base.__name__ == "Booster" for base in type(model).__mro__):
        try:
            booster = model.booster_
        except Exception as error:  # the class of this error depends on whether scikit-learn is installed
            raise _unfitted(model, error) from None
    outputs = None if sample is None else _predicted(booster.predict, _frame(sample))
    file = folder / "model.txt"
    booster.save_model(str(file))  # up to the best iteration, as predict does
    names = booster.feature_name()
    return _Made(file, outputs, names, named=names != [f"Column_{at}" for at in range(len(names))])


def _xgboost(model: Any, folder: Path, sample: Any) -> _Made:
    xgboost = importlib.import_module("xgboost")
    wrapped = isinstance(model, xgboost.XGBModel)
    try:
        booster = model.get_booster() if wrapped else model
    except Exception as error:
        raise _unfitted(model, error) from None
    outputs = None
    if sample is not None:
        table = _frame(sample)
        named = hasattr(table, "columns")
        missing = model.missing if wrapped and model.missing is not None else math.nan
        names = None if named else booster.feature_names
        types = None if named else booster.feature_types
        outputs = _predicted(
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
    return _Made(file, outputs, booster.feature_names, named=booster.feature_names is not None)


def _best(booster: Any) -> tuple[int, int]:
    # After early stopping XGBModel.predict stops at the best iteration; (0, 0) means all trees.
    best = booster.attr("best_iteration")
    return (0, 0) if best is None else (0, int(best) + 1)


def _sklearn(model: Any, folder: Path, sample: Any) -> _Made:
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
        outputs = _predicted(getattr(model, method), _frame(sample))
    file = folder / "model.skops"
    try:
        io.dump(model, file)
    except Exception as error:
        raise ExportError(
            f"skops cannot write this {type(model).__qualname__}: {_first_line(error)}",
            code="cannot_export",
            field="model",
            hint="joblib.dump it, then ekiben init --from FILE writes a project around it",
        ) from None
    names = getattr(model, "feature_names_in_", None)
    texts = getattr(model, "n_features_in_", None) is None  # a pipeline of texts has no columns at all
    return _Made(file, outputs, None if names is None else list(names), texts or names is not None, fields)


def _onnx(model: Any, folder: Path, sample: Any) -> _Made:
    file = folder / "model.onnx"
    try:
        file.write_bytes(model.SerializeToString())
    except Exception as error:  # protobuf's EncodeError: over 2 GiB
        raise ExportError(
            f"the ONNX model cannot be written as one file: {_first_line(error)}",
            code="cannot_export",
            field="model",
            hint="onnx.save_model(model, path, save_as_external_data=True), then push the files",
        ) from None
    constants = {constant.name for constant in model.graph.initializer}
    inputs = [tensor.name for tensor in model.graph.input if tensor.name not in constants]
    named = len(inputs) > 1 or (_sample.is_frame(sample) and list(map(str, sample.columns)) == inputs)
    if sample is None:
        return _Made(file, None, inputs, named)
    rows = _sample.rows(_sample.fit(sample, inputs, named) if _sample.is_frame(sample) else sample)
    return _Made(file, _onnx_outputs(file, rows), inputs, named)


def _onnx_outputs(file: Path, rows: list[Any]) -> list[Any] | None:
    """One value a row, as the kind `onnx` answers: of the only output, or an object by output name."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        numpy = importlib.import_module("numpy")
    except ImportError:
        return None

    def run() -> list[Any]:
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        inputs, names = session.get_inputs(), [output.name for output in session.get_outputs()]
        feed = {}
        for at, tensor in enumerate(inputs):
            if len(inputs) == 1:
                cells = [row[tensor.name] if isinstance(row, dict) else row for row in rows]
            else:
                cells = [row[tensor.name] if isinstance(row, dict) else row[at] for row in rows]
            kind = tensor.type.removeprefix("tensor(").removesuffix(")")
            dtype = {"float": "float32", "double": "float64", "string": "object"}.get(kind, kind)
            values = numpy.array(cells, dtype=dtype)
            # A column of a table is [rows, 1] to the model; a row of it may be written 3 or [3].
            column = len(tensor.shape) == 2 and tensor.shape[1] == 1
            feed[tensor.name] = values.reshape(-1, 1) if column else values
        answers = [_listed(answer) for answer in session.run(names, feed)]
        if len(names) == 1:
            return answers[0]
        return [dict(zip(names, values, strict=True)) for values in zip(*answers, strict=True)]

    outputs: list[Any] = _predicted(lambda _: run(), rows)
    # A model that has no batch dimension answers otherwise for many rows than row by row; the server then only runs it.
    return outputs if len(outputs) == len(rows) else None


def _listed(answer: Any) -> list[Any]:
    values = list(answer) if isinstance(answer, list) else answer.tolist()
    return [
        {str(key): item for key, item in value.items()}
        if isinstance(value, dict)
        else value[0]
        if isinstance(value, list) and len(value) == 1
        else value
        for value in values
    ]


def _predicted(predict: Any, table: Any) -> Any:
    try:
        return predict(table)
    except Exception as error:
        if type(error).__name__ in ("NotFittedError", "LGBMNotFittedError"):
            raise ExportError(
                "the model is not fitted", code="not_fitted", field="model", hint="fit it first"
            ) from None
        raise ExportError(
            f"the model cannot predict its sample: {_first_line(error)}",
            code="bad_sample",
            field="sample",
            hint="pass rows as the model was trained on, like X_test[:100]",
        ) from error


def _frame(sample: Any) -> Any:
    """The sample as the libraries take it: a list of rows becomes an array, or a frame where rows have names."""
    if isinstance(sample, dict):
        sample = sample.get("inputs", [])
    if not isinstance(sample, (list, tuple)):
        return sample
    if sample and isinstance(sample[0], dict):
        return importlib.import_module("pandas").DataFrame(list(sample))
    return importlib.import_module("numpy").asarray(sample)


def _unfitted(model: Any, error: Exception) -> ExportError:
    return ExportError(
        f"the {type(model).__qualname__} has no trained model in it: {_first_line(error)}",
        code="not_fitted",
        field="model",
        hint="fit it first",
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
