"""MLflow model folders: `MLmodel` says which file is the model, and how its callers see it. Nothing of it is imported.

A folder is taken where one of its flavours is data: a booster, an ONNX file, a skops file. Its signature, if it has
one, names the columns. A Keras or SavedModel flavour is that model, with MLflow's files beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from contextlib import suppress
from dataclasses import replace
from typing import Any, NoReturn

import yaml

from registry.errors import UserError
from registry.formats import keras, tensorflow
from registry.formats.upload import Recognised, Upload, invalid, shown
from registry.signature import Column, Signature

FORMAT = "mlflow"
MLMODEL = "MLmodel"
# What MLflow writes into a model's folder besides the model.
BOOKKEEPING = frozenset(
    (
        MLMODEL, "conda.yaml", "python_env.yaml", "requirements.txt", "constraints.txt", "registered_model_meta",
        "input_example.json", "serving_input_example.json", "uv.lock", "pyproject.toml", ".python-version",
    )
)  # fmt: skip
# How a model of a flavour is logged so that it is data.
LOGGED_AS_DATA: Mapping[str, str] = {
    "sklearn": "Log it as data: mlflow.sklearn.log_model(model, name='model', serialization_format='skops').",
    "lightgbm": "Log its booster: mlflow.lightgbm.log_model(model.booster_, name='model').",
    "xgboost": "Log it as data: mlflow.xgboost.log_model(model, name='model', model_format='ubj').",
    "pytorch": "Export it: torch.onnx.export(model, example, 'model.onnx', dynamo=True), and upload that file.",
    "transformers": "Upload one folder of model and tokenizer: pipeline.save_pretrained('folder').",
    "sentence_transformers": "Upload one folder of model and tokenizer: model.save_pretrained('folder').",
    "catboost": "Save it as ONNX: model.save_model('model.onnx', format='onnx'), and upload that file.",
}

_SAVE = "mlflow.FLAVOUR.save_model"
_SMALL = 1 << 20  # bytes of MLmodel or of an input example
_EXAMPLE_ROWS = 100
_MOST_COLUMNS = 100_000
# The entry that names the model, and the formats that it may have.
_SERVED: Mapping[str, tuple[str, frozenset[str]]] = {
    "lightgbm": ("data", frozenset({"lightgbm-text"})),
    "xgboost": ("data", frozenset({"xgboost-json", "xgboost-ubj"})),
    "sklearn": ("pickled_model", frozenset({"skops"})),
    "onnx": ("data", frozenset({"onnx"})),
}
_DTYPES = {
    "boolean": "bool", "integer": "int", "long": "int", "float": "number", "double": "number", "string": "string",
}  # fmt: skip

File = Callable[[Upload, str], Recognised | None]
"""What a single file is."""


def recognise(upload: Upload, file: File) -> Recognised | None:
    """The MLflow model in an upload, None if there is no MLmodel with flavours in it."""
    found = [path for path in upload.sizes if path.rpartition("/")[2] == MLMODEL]
    if not found:
        return None
    path = min(found, key=lambda place: (place.count("/"), place))
    body = _mlmodel(upload, path)
    flavours = body.get("flavors")
    if not isinstance(flavours, dict):
        return None
    top = path.rpartition("/")[0]
    inside = _below(upload, top)
    for flavour, (entry, formats) in _SERVED.items():
        if isinstance(about := flavours.get(flavour), dict):
            inner = _model(inside, file, flavour, about, entry)
            if inner.format not in formats:
                _refuse(flavour, f"its model {shown(inner.path)} is {inner.format}")
            known = _signature(body.get("signature"), inner.signature)
            note = f"An MLflow model of the flavour {flavour} ({inner.format})."
            parts = _above(top, {inner.path, *inner.parts})
            notes = (note, *inner.notes)
            return Recognised(FORMAT, path, signature=known, notes=notes, example=_example(inside), parts=parts)
    for flavour in ("tensorflow", "keras"):
        if isinstance(about := flavours.get(flavour), dict):
            _refuse_code(flavour, about)
            return _network(inside, file, flavour, top)
    names = [str(name) for name in flavours if name != "python_function"]
    _refuse(names[0] if names else "python_function", "it is loaded by code or a pickle")


def example_rows(example: Any) -> list[Any] | None:
    """The rows of an input example as MLflow writes it, where it is a table or arrays."""
    if isinstance(example, list):
        return example
    if not isinstance(example, dict):
        return None
    columns, table = example.get("columns"), example.get("data")
    if isinstance(table, list):
        if isinstance(columns, list) and all(isinstance(name, str) for name in columns):
            return [dict(zip(columns, row, strict=False)) for row in table if isinstance(row, list)]
        return table
    if isinstance(example.get("inputs"), list):
        return list(example["inputs"])
    values = list(example.values())
    if values and all(isinstance(each, list) and len(each) == len(values[0]) for each in values):  # tensors by name
        return [dict(zip(example, row, strict=True)) for row in zip(*values, strict=True)]
    return None


def _mlmodel(upload: Upload, path: str) -> dict[str, Any]:
    if upload.sizes[path] > _SMALL:
        invalid(path, f"it has more than {_SMALL} bytes", _SAVE)
    try:
        body = yaml.safe_load(upload.head(path, _SMALL))
    except Exception as error:  # besides its own errors PyYAML raises whatever its constructors run into
        raise UserError(
            "invalid_model",
            f"{shown(path)} is not YAML: {shown(str(error).partition(chr(10))[0])}.",
            field="file",
            hint="Upload the folder as MLflow wrote it.",
        ) from error
    return body if isinstance(body, dict) else {}


def _below(upload: Upload, folder: str) -> Upload:
    """The part of an upload below a folder, by its paths there."""
    prefix = f"{folder}/" if folder else ""
    sizes = {path.removeprefix(prefix): size for path, size in upload.sizes.items() if path.startswith(prefix)}
    return Upload(sizes, lambda path: upload.open(prefix + path))


def _above(folder: str, paths: Set[str]) -> frozenset[str]:
    """The paths in the whole upload of files below a folder."""
    return frozenset(f"{folder}/{path}" if folder else path for path in paths)


def _model(inside: Upload, file: File, flavour: str, about: dict[str, Any], entry: str) -> Recognised:
    _refuse_code(flavour, about)
    path = about.get(entry)
    if not isinstance(path, str) or path not in inside.sizes:
        # what is no text is not shown: a few aliases of YAML make a list that has no end as a text
        named = shown(path) if isinstance(path, str) else "by something else than a path"
        _refuse(flavour, f"MLmodel names the model {named}, which is not there", way=False)
    others = {} if flavour != "onnx" else {k: v for k, v in inside.sizes.items() if k not in BOOKKEEPING}
    try:
        found = file(Upload({**others, path: inside.sizes[path]}, inside.open), path)
    except UserError as error:
        if error.code not in ("pickle_refused", "skops_untrusted_type"):
            raise
        hint = f"{LOGGED_AS_DATA[flavour]} {error.hint or ''}".strip() if flavour in LOGGED_AS_DATA else error.hint
        raise UserError(error.code, error.detail, field=error.field, hint=hint, status=error.status) from error
    if found is None:
        _refuse(flavour, f"its model {shown(path)} is in no format that is data")
    return found


def _network(inside: Upload, file: File, flavour: str, top: str) -> Recognised:
    """A Keras file or a SavedModel in MLflow's folder, as it would be recognised alone."""
    if (found := tensorflow.recognise(inside)) is None:
        files = [path for path in sorted(inside.sizes) if path.endswith(".keras")]
        found = file(inside, files[0]) if len(files) == 1 else None
        if found is None or found.format != keras.FORMAT:
            _refuse(flavour, "it holds neither one .keras file nor a SavedModel")
    (path,) = _above(top, {found.path})
    return replace(found, path=path, example=_example(inside), parts=_above(top, found.parts))


def _refuse_code(flavour: str, about: dict[str, Any]) -> None:
    if about.get("code"):
        _refuse(flavour, "it brings code of its own", way=False)


def _refuse(flavour: str, what: str, *, way: bool = True) -> NoReturn:
    known = LOGGED_AS_DATA.get(flavour) if way else None
    taken = f"Flavours that are data: {', '.join(_SERVED)}, tensorflow and keras."
    raise UserError(
        "mlflow_flavour",
        f"The MLflow model of the flavour {shown(flavour)} cannot be served: {what}.",
        field="file",
        hint=f"{known or 'Pack it with its code: ekiben init --from FILE.'} {taken}",
    )


def _signature(given: Any, inner: Signature | None) -> Signature | None:
    """The columns as MLflow's signature names them; what the model's own file knows better stays (levels, task)."""
    columns = _columns(given.get("inputs")) if isinstance(given, dict) else None
    if columns is None:
        return inner
    if inner is None or inner.tensors:
        return Signature(columns=columns, named=True, n_features=len(columns))
    if inner.n_features not in (None, len(columns)):
        width = inner.n_features
        _refuse("of its signature", f"that has {len(columns)} columns, and the model takes {width}", way=False)
    levels = {column.name: column for column in inner.columns if column.categories is not None}
    if not inner.named:
        at = dict(zip((column.name for column in columns), inner.columns, strict=False))
        levels = {name: column for name, column in at.items() if column.categories is not None}
    merged = tuple(
        replace(column, dtype="category", categories=levels[column.name].categories)
        if column.name in levels
        else column
        for column in columns
    )
    return replace(inner, columns=merged, named=True, n_features=len(merged))


def _columns(inputs: Any) -> tuple[Column, ...] | None:
    """Named columns of a signature; None where it has tensors or columns without names."""
    with suppress(ValueError, RecursionError, TypeError):
        listed = json.loads(inputs) if isinstance(inputs, str) else None
        if isinstance(listed, list) and 0 < len(listed) <= _MOST_COLUMNS:
            columns = [_column(each) for each in listed]
            named = tuple(column for column in columns if column is not None)
            if len(named) == len(columns) and len({column.name for column in named}) == len(named):
                return named
    return None


def _column(body: Any) -> Column | None:
    if not isinstance(body, dict) or body.get("type") == "tensor" or not isinstance(body.get("name"), str):
        return None
    return Column(
        body["name"], _DTYPES.get(str(body.get("type")), "unknown"), required=body.get("required") is not False
    )


def _example(inside: Upload) -> Any:
    """MLflow's input example as a request's body."""
    name = "input_example.json"
    if not 0 < inside.sizes.get(name, 0) <= _SMALL:
        return None
    with suppress(ValueError, RecursionError):
        rows = example_rows(json.loads(inside.head(name, _SMALL), parse_constant=lambda _: None))
        if rows:
            body = {"inputs": rows[:_EXAMPLE_ROWS]}
            json.dumps(body, allow_nan=False)  # a number like 1e999 is none
            return body
    return None
