"""A model object of the user's own process as a file that can be served, with the outputs it gives for a sample.

The outputs come from the model as it is in this process, before it is written. The server checks that the served model
gives the same; a difference keeps the version from going live.

    LightGBM   Booster, LGBMModel        → text       model.txt     outputs of Booster.predict
    XGBoost    Booster, XGBModel         → JSON       model.json    outputs of Booster.predict
                                                             (XGBModel: up to its best iteration)
    sklearn    estimator, pipeline       → skops      model.skops   outputs of predict_proba, else of predict
    Keras      Sequential, Model         → Keras v3   model.keras   outputs of the model, called
    ONNX       ModelProto                → protobuf   model.onnx    outputs of ONNX Runtime, where it is installed
    torch      nn.Module                 → ONNX       model/        outputs of the module itself
    transformers  pipeline, model, SentenceTransformer → a folder of safetensors or ONNX; scores or embeddings
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekiben import _sample
from ekiben._errors import ExportError
from ekiben._export import keras, lightgbm, onnx, sklearn, torch, transformers, xgboost
from ekiben._export.written import Written

Writer = Callable[[Any, Path, Any], Written]

_WRITERS: Mapping[tuple[str, str], Writer] = {
    ("keras", "Model"): keras.write,
    ("lightgbm", "Booster"): lightgbm.write,
    ("lightgbm", "LGBMModel"): lightgbm.write,
    ("xgboost", "Booster"): xgboost.write,
    ("xgboost", "XGBModel"): xgboost.write,
    ("onnx", "ModelProto"): onnx.write,
    ("sklearn", "BaseEstimator"): sklearn.write,
    ("sentence_transformers", "SentenceTransformer"): transformers.write_sentences,
    ("transformers", "Pipeline"): transformers.write_pipeline,
    ("transformers", "PreTrainedModel"): transformers.write,
    ("torch", "Module"): torch.write,
}
"""By package and class, a base of the model's own; the first that fits: XGBModel is an estimator of sklearn too, and a
model of transformers a module of torch."""


@dataclass(frozen=True)
class Exported:
    """Files written for a model; `sample` and `expected` are JSON bodies, None where there was no sample."""

    files: tuple[Path, ...]
    sample: dict[str, Any] | None
    expected: dict[str, Any] | None


def export(model: Any, folder: Path, sample: Any = None) -> Exported:
    """Write `model` into `folder` and predict `sample` (a frame, an array, rows, or arrays by input name) with it.

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
    if isinstance(sample, Mapping) and "inputs" not in sample:
        sample = _sample.records(sample)
    if _sample.is_sparse(sample):
        sample = _sample.dense(sample, xgboost=writer is xgboost.write)
    body = None if sample is None else _sample.body(sample)
    if body is not None and not body.get("inputs"):
        raise ExportError(
            "the sample has no rows", code="bad_sample", field="sample", hint="pass some, like X_test[:100]"
        )
    written = writer(model, folder, sample)
    if body is None:
        return Exported((written.file,), None, None)
    if _sample.is_frame(sample):
        body = _sample.body(_sample.fit(sample, written.columns, written.named))
    body.update(written.fields)
    if written.outputs is None:
        return Exported((written.file,), body, None)
    values = _sample.outputs(written.outputs)
    if len(values) != len(body["inputs"]):
        raise ExportError(
            f"the model gave {len(values)} outputs for {len(body['inputs'])} rows", code="bad_sample", field="sample"
        )
    return Exported((written.file,), body, {"outputs": values})


def is_model(value: Any) -> bool:
    """Whether `value` is an object that `export` can write."""
    return _writer(value) is not None


def _writer(model: Any) -> Writer | None:
    bases = {(base.__module__.split(".", 1)[0], base.__name__) for base in type(model).__mro__}
    return next((write for base, write in _WRITERS.items() if base in bases), None)
