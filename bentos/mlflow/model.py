"""The model of an MLflow folder, by the library of its flavour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import yaml  # type: ignore[import-untyped,unused-ignore]

from bentos import serving
from bentos.mlflow.signature import Signature
from bentos.serving.row_proof import Sharing
from bentos.serving.schema import inputs_schema

_ENTRIES = {"lightgbm": "data", "xgboost": "data", "sklearn": "pickled_model", "onnx": "data"}
_HINT = "upload the folder as MLflow wrote it, of a flavour that is data"


class Model:
    """Raises StartError `model_load_failed` when the folder is not what it should be."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        top, document = _mlmodel(folder)
        flavour, path = _flavour(folder, top, document)
        inner = _load(flavour, document)(replace(folder, kind=flavour, format=None, model=path))
        self._answer: Callable[[list[Any]], list[Any]] = inner.outputs
        if flavour == "sklearn":
            self._answer = partial(inner.outputs, method=_method(document, inner.methods))
        self.sharing: Sharing = getattr(inner, "sharing", Sharing.REQUEST)
        self.signature = Signature.read(document.get("signature"))
        self._put = _put(inner, self.signature) if self.signature is not None else None
        self.about = replace(
            inner.about,
            kind="mlflow",
            format="mlflow",
            folder=folder,
            input=self._input(inner),
            example=self._example(inner),
            details={**inner.about.details, "flavour": flavour, "mlflow": _version(document)},
        )

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Answers in the order of the rows. Raises Problem naming the row and column that does not fit."""
        if self.signature is None or self._put is None:
            return self._answer(inputs)
        return self._answer([self._put(values) for values in self.signature.rows(inputs)])

    def _input(self, inner: Any) -> dict[str, Any]:
        if self.signature is None:
            row: dict[str, Any] = inner.about.input["properties"]["inputs"]["items"]
            return inputs_schema(row)  # without what is the flavour's own, such as scikit-learn's method
        table = getattr(inner, "table", None)
        columns = table.columns if table is not None and len(table.columns) == len(self.signature.columns) else ()
        known = {column.name: column.json_schema() for column in columns if column.categories is not None}
        return self.signature.input_schema(known)

    def _example(self, inner: Any) -> Any:
        row = inner.about.example["inputs"][0]
        if self.signature is None:
            return {"inputs": [row]}
        names = _names(inner)
        if isinstance(row, dict):
            same = set(row) == set(self.signature.names)
            values = [row[name] for name in (self.signature.names if same else names or tuple(row))]
        else:
            values = row if isinstance(row, list) else [row]
        columns = self.signature.columns
        return {"inputs": [{c.name: c.like(value) for c, value in zip(columns, values, strict=False)}]}


def _mlmodel(folder: serving.ModelFolder) -> tuple[PurePosixPath, dict[str, Any]]:
    """The folder that MLflow wrote, and its MLmodel."""
    path = PurePosixPath(folder.model_file(lambda name: PurePosixPath(name).name == "MLmodel"))
    try:
        document = yaml.safe_load(folder.path(str(path)).read_bytes())
    except Exception as error:  # besides its own errors PyYAML raises whatever its constructors run into
        raise serving.StartError("model_load_failed", f"{path} is not YAML: {str(error)[:300]}", _HINT) from error
    if not isinstance(document, dict) or not isinstance(document.get("flavors"), dict):
        raise serving.StartError("model_load_failed", f"{path} names no flavours", _HINT)
    return path.parent, document


def _flavour(folder: serving.ModelFolder, top: PurePosixPath, document: dict[str, Any]) -> tuple[str, str]:
    """The flavour that is served, and the path of its model."""
    for flavour, entry in _ENTRIES.items():
        about = document["flavors"].get(flavour)
        if isinstance(about, dict):
            named = about.get(entry)
            path = str(top / named) if isinstance(named, str) else ""  # aliases of YAML make lists without an end
            if path not in folder.files:
                message = f"MLmodel names a model of the flavour {flavour} that is not there: {path}"
                raise serving.StartError("model_load_failed", message[:500], _HINT)
            return flavour, path
    message = f"none of the flavours {sorted(map(str, document['flavors']))} is served"
    raise serving.StartError("model_load_failed", message[:500], _HINT)


def _load(flavour: str, document: dict[str, Any]) -> Callable[[serving.ModelFolder], Any]:
    """What reads a model of a flavour; only its library is imported."""
    if flavour == "lightgbm":
        from bentos.formats.lightgbm import Model as LightGBM

        return LightGBM
    if flavour == "xgboost":
        from bentos.formats.xgboost import Model as XGBoost

        # MLflow loads the class that was logged, and an XGBModel stops at the best iteration
        return partial(XGBoost, estimator=".sklearn." in str(document["flavors"]["xgboost"].get("model_class")))
    if flavour == "onnx":
        from bentos.formats.onnx import Model as Onnx

        return Onnx
    from bentos.formats.skops import Model as Sklearn

    return Sklearn


def _version(document: dict[str, Any]) -> str | None:
    version = document.get("mlflow_version")
    return version[:40] if isinstance(version, str) else None


def _method(document: dict[str, Any], methods: Sequence[str]) -> str:
    """What MLflow's own server would call: `predict`, unless the model was logged with another pyfunc_predict_fn."""
    plain = document["flavors"].get("python_function")
    wanted = plain.get("predict_fn") if isinstance(plain, dict) else None
    return str(wanted) if wanted in methods else "predict"


def _names(inner: Any) -> tuple[str, ...] | None:
    """The inputs of the model's file in its order; None where it takes no columns but texts or one tensor."""
    if (tensors := getattr(inner, "tensors", None)) is not None:
        return tensors.names if len(tensors.all) > 1 or tensors.all[0].scalar else None
    table = inner.table
    return table.names if table is not None else None


def _put(inner: Any, signature: Signature) -> Callable[[list[Any]], Any]:
    """From the values of a row, in the signature's order, to a row that the model's file takes.

    Names that are the same set are matched, in whatever order; else the order counts, as MLflow hands over a frame.
    """
    names = _names(inner)
    if names is None:
        if getattr(inner, "tensors", None) is not None:
            return lambda values: values
        if len(signature.columns) == 1:  # a model of texts
            return lambda values: values[0]
    if names is None or len(names) != len(signature.columns):
        takes = "texts" if names is None else f"{len(names)} columns"
        message = f"the signature names {len(signature.columns)} columns, and the model takes {takes}"
        raise serving.StartError("model_load_failed", message, "log the model again with a signature of its own inputs")
    table = getattr(inner, "table", None)
    if table is not None and not table.named:
        return lambda values: values
    keys = signature.names if set(names) == set(signature.names) else names
    return lambda values: dict(zip(keys, values, strict=True))
