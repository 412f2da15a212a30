"""An ONNX model run by ONNX Runtime on the CPU: tensors by name, text, labels and maps of probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bentos import serving
from bentos.serving.schema import outputs_schema
from bentos.serving.tensors import DTYPES, Tensor, Tensors

_NAMES = {"float": "float32", "double": "float64"}


class Model:
    """A session with its tensors. Raises StartError `model_load_failed` when it cannot be served."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        import onnxruntime

        path = folder.path(folder.model_file(lambda name: name.lower().endswith(".onnx")))
        options = onnxruntime.SessionOptions()
        # one thread: many small requests go side by side, and waiting threads would spin
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # by its name alone a file would be read as ONNX Runtime's own format, which no upload was checked as
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.tensors = Tensors(tuple(_tensor(i) for i in self.session.get_inputs()))
        except serving.StartError:
            raise
        except Exception as error:  # ONNX Runtime has an exception for each status, without a common base
            message = f"{path.name} cannot be loaded by ONNX Runtime: {str(error)[:500]}"
            hint = "export it for a lower opset, or check it with onnx.checker.check_model"
            raise serving.StartError("model_load_failed", message, hint) from error
        if not self.tensors.all:
            raise serving.StartError("model_load_failed", f"{path.name} has no inputs", "export a model with inputs")
        self._outputs = self.session.get_outputs()
        self._names = [o.name for o in self._outputs]
        fixed = [i.shape[0] for i in self.session.get_inputs() if i.shape and isinstance(i.shape[0], int)]
        # a model whose batch is fixed, or whose answer has no batch, is asked row by row
        self._whole = self.tensors.batched and not fixed and all(map(_has_batch, self._outputs))
        if any(size != 1 for size in fixed) and self.tensors.batched:
            message = f"{path.name} takes exactly {fixed[0]} rows at once"
            raise serving.StartError("model_load_failed", message, "export it with a dynamic first dimension")
        self.about = serving.About(
            kind="onnx",
            format="onnx",
            folder=folder,
            input=self.tensors.input_schema(),
            output=outputs_schema({}),
            classes=self._classes(),
            example={"inputs": [self.tensors.example_row()]},
            details={
                "inputs": [{"name": t.name, "type": t.dtype, "shape": list(t.shape or ())} for t in self.tensors.all],
                "outputs": [{"name": o.name, "type": o.type} for o in self._outputs],
            },
        )

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Answers in the order of the rows. Raises Problem naming the row and tensor that does not fit."""
        rows = self.tensors.cells(inputs)
        if self._whole:
            return self._run(rows, 0)
        return [value for i, row in enumerate(rows) for value in self._run([row], i)]

    def _run(self, rows: Sequence[Sequence[Any]], first: int) -> list[Any]:
        feed = self.tensors.arrays(rows, first)
        try:
            answers = self.session.run(self._names, feed)
        except Exception as error:  # see above; the model itself refuses, such as an embedding an index out of range
            said = str(error).split("\n")[0][:300]
            detail = f"the model cannot take these rows: {said}"
            field = f"inputs[{first}]" if len(rows) == 1 else "inputs"
            raise serving.Problem("prediction_refused", detail, field=field) from error
        columns = [self._listed(answer, len(rows)) for answer in answers]
        if len(columns) == 1:
            return columns[0]
        return [dict(zip(self._names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _listed(self, answer: Any, rows: int) -> list[Any]:
        """An output as one value per row."""
        if isinstance(answer, list):  # a sequence, such as the maps of class → probability of a classifier
            values = [_plain(v) for v in answer]
        elif self._whole or (answer.ndim and answer.shape[0] == rows):
            values = answer.tolist()
        else:
            return [_plain(answer)]
        if len(values) != rows:
            if rows == 1:
                return [values]
            detail = f"the model answered {len(values)} values for {rows} rows"
            raise serving.Problem("prediction_failed", detail, status=500)
        return values

    def _classes(self) -> list[Any] | None:
        """The labels of a classifier whose probabilities come as a map; only an answer shows them."""
        if not any(o.type.startswith("seq(map(") for o in self._outputs):
            return None
        try:
            feed = self.tensors.arrays(self.tensors.cells([self.tensors.example_row()]))
            answers = self.session.run(self._names, feed)
        except Exception:  # the synthetic row may not be one that the model takes; then the labels stay unknown
            return None
        maps = next((a for a in answers if isinstance(a, list) and a and isinstance(a[0], dict)), None)
        return list(maps[0]) if maps else None


def _tensor(described: Any) -> Tensor:
    kind = described.type
    inner = kind[7:-1] if kind.startswith("tensor(") else ""
    inner = _NAMES.get(inner, inner)
    if inner not in DTYPES:
        message = f"input {described.name!r} is a {kind}, which cannot be sent as JSON"
        raise serving.StartError("model_load_failed", message, "export the model with tensors of numbers or text")
    sizes = [size if isinstance(size, int) else None for size in described.shape]
    return Tensor(described.name, inner, tuple(sizes[1:]), bool(sizes))


def _has_batch(output: Any) -> bool:
    if not output.type.startswith("tensor("):
        return True
    return bool(output.shape) and not isinstance(output.shape[0], int)


def _plain(value: Any) -> Any:
    """NumPy values, maps and sequences as JSON values; the keys of a map become text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
