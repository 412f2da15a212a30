"""A Keras model as a `.keras` file (Keras 3, any backend)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekiben import _sample
from ekiben._errors import ExportError
from ekiben._export.written import Written, first_line, predicted


def write(model: Any, folder: Path, sample: Any) -> Written:
    if importlib.import_module("keras").__version__.startswith("2."):  # as TensorFlow had it up to 2.15
        raise ExportError(
            "this model is of Keras 2, whose files Keras 3 does not read",
            code="cannot_export",
            field="model",
            hint="model.export('folder') writes a SavedModel: push that folder",
        )
    inputs = _inputs(model)
    _refuse_code(model)
    names = [name for name, _ in inputs]
    named = len(inputs) > 1
    outputs = None
    if sample is not None:
        rows = _sample.rows(_sample.fit(sample, names, named) if _sample.is_frame(sample) else _listed(sample))
        outputs = predicted(lambda table: _answers(model, inputs, table), rows)
    file = folder / "model.keras"
    try:
        model.save(str(file))
    except Exception as error:
        raise ExportError(
            f"Keras cannot write this {type(model).__qualname__}: {first_line(error)}",
            code="cannot_export",
            field="model",
            hint="give its layers get_config, or model.export('folder') and push that folder",
        ) from None
    return Written(file, outputs, names, named)


def _listed(sample: Any) -> Any:
    return sample["inputs"] if isinstance(sample, dict) else sample


def _inputs(model: Any) -> list[tuple[str, Any]]:
    """Name and Keras tensor of each input, as the server names them."""
    try:
        flat = list(model.inputs)
    except (AttributeError, TypeError, ValueError):
        raise ExportError(
            f"the {type(model).__qualname__} does not say what it takes",
            code="not_fitted",
            field="model",
            hint="begin it with keras.Input, or fit it first; a subclass of keras.Model goes as a SavedModel: "
            "model.export('folder'), then push that folder",
        ) from None
    taken = None if _chain(model) else model.input
    if isinstance(taken, dict):
        return list(taken.items())
    return [(tensor.name, tensor) for tensor in flat]


def _chain(model: Any) -> bool:
    return any(base.__name__ == "Sequential" for base in type(model).__mro__)


def _refuse_code(model: Any) -> None:
    """What the server would refuse: layers that are not Keras' own, whose code is not in the file."""
    for layer in _layers(model):
        kind = type(layer)
        if kind.__module__.split(".", 1)[0] != "keras" or kind.__name__ == "Lambda":
            raise ExportError(
                f"the layer {layer.name} is a {kind.__qualname__}, which is code of your own",
                code="cannot_export",
                field="model",
                hint="take Keras' own layers, or model.export('folder') and push that folder",
            )


def _layers(model: Any) -> Iterator[Any]:
    for layer in model.layers:
        yield layer
        yield from _layers(layer) if hasattr(layer, "layers") else ()


def _answers(model: Any, inputs: list[tuple[str, Any]], rows: list[Any]) -> list[Any]:
    """One value a row, as the kind `tensorflow` answers: of the only output, or an object by output name."""
    keras = importlib.import_module("keras")
    feed = {}
    for at, (name, tensor) in enumerate(inputs):
        if len(inputs) == 1:
            cells = [row[name] if isinstance(row, dict) else row for row in rows]
        else:
            cells = [row[name] if isinstance(row, dict) else row[at] for row in rows]
        if tuple(tensor.shape[1:]) == (1,):  # a column of a table: 3 and [3] are the same
            cells = [cell if isinstance(cell, list) else [cell] for cell in cells]
        feed[name] = keras.ops.convert_to_tensor(cells, dtype=tensor.dtype)
    values = list(feed.values())
    taken = None if _chain(model) else model.input
    if isinstance(taken, dict):
        answer = model(feed, training=False)
    elif taken is None:
        answer = model(values[0], training=False)
    else:
        answer = model(keras.tree.pack_sequence_as(taken, values), training=False)
    names, columns = _outputs(keras, model, answer)
    if len(columns) == 1:
        return columns[0]
    return [dict(zip(names, each, strict=True)) for each in zip(*columns, strict=True)]


def _outputs(keras: Any, model: Any, answer: Any) -> tuple[list[str], list[list[Any]]]:
    if isinstance(answer, dict):
        names, tensors = list(answer), list(answer.values())
    else:
        tensors = keras.tree.flatten(answer)
        names = list(dict.fromkeys(getattr(model, "output_names", ())))
        if len(names) != len(tensors):
            names = [f"output_{at}" for at in range(len(tensors))]
    return names, [[_plain(value) for value in keras.ops.convert_to_numpy(each).tolist()] for each in tensors]


def _plain(value: Any) -> Any:
    """Texts come as bytes."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
