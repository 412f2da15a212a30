"""ONNX's ModelProto as its protobuf."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ekiben import _sample
from ekiben._errors import ExportError
from ekiben._export.written import Written, first_line, predicted


def write(model: Any, folder: Path, sample: Any) -> Written:
    file = folder / "model.onnx"
    try:
        file.write_bytes(model.SerializeToString())
    except Exception as error:  # protobuf's EncodeError: over 2 GiB
        raise ExportError(
            f"the ONNX model cannot be written as one file: {first_line(error)}",
            code="cannot_export",
            field="model",
            hint="onnx.save_model(model, path, save_as_external_data=True), then push the files",
        ) from None
    constants = {constant.name for constant in model.graph.initializer}
    inputs = [tensor.name for tensor in model.graph.input if tensor.name not in constants]
    named = len(inputs) > 1 or (_sample.is_frame(sample) and list(map(str, sample.columns)) == inputs)
    if sample is None:
        return Written(file, None, inputs, named)
    rows = _sample.rows(_sample.fit(sample, inputs, named) if _sample.is_frame(sample) else sample)
    return Written(file, _onnx_outputs(file, rows), inputs, named)


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

    outputs: list[Any] = predicted(lambda _: run(), rows)
    # A model that has no batch dimension answers otherwise for many rows than row by row; the server then only runs it.
    return outputs if len(outputs) == len(rows) else None


def _listed(answer: Any) -> list[Any]:
    values = list(answer) if isinstance(answer, list) else answer.tolist()
    return [{str(key): item for key, item in value.items()} if isinstance(value, dict) else value for value in values]
