"""Serve an ONNX model with ONNX Runtime on the CPU: tensors by name, text, labels and maps of probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import bentoml

from bentos import serving
from bentos.serving.schema import inputs_schema, outputs_schema

_INTEGERS = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"}
_FLOATS = {"float16": 65504.0, "float": 3.4028234663852886e38, "double": math.inf}
_NUMPY = {"float": "float32", "double": "float64", "string": "object"}


@serving.offer
@bentoml.service(name="onnx", image=serving.image(__file__))
class Onnx:
    def __init__(self) -> None:
        self.model = Model(serving.folder(__file__))
        self.about = self.model.about

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[Any]) -> dict[str, list[Any]]:
        """One value per row: what the model's output holds for it, or an object by name if it has several outputs."""
        answer: dict[str, list[Any]] = await serving.answer(self.model.outputs, inputs)
        return answer


@dataclass(frozen=True)
class Tensor:
    """An input of the model. `shape` is that of one row, without the batch; None for a dimension of any size."""

    name: str
    type: str
    shape: tuple[int | None, ...]
    batched: bool

    @property
    def scalar(self) -> bool:
        """One value a row: a column of a table."""
        return self.shape in ((), (1,))

    @property
    def dtype(self) -> str:
        return _NUMPY.get(self.type, self.type)

    def json_schema(self) -> dict[str, Any]:
        if self.type in _FLOATS:
            schema: dict[str, Any] = {"type": "number"}
        else:
            schema = {"type": {"string": "string", "bool": "boolean"}.get(self.type, "integer")}
        if self.scalar:
            return schema
        for size in reversed(self.shape):
            bounds = {} if size is None else {"minItems": size, "maxItems": size}
            schema = {"type": "array", "items": schema, **bounds}
        return schema

    def example(self) -> Any:
        value: Any = {"string": "", "bool": False}.get(self.type, 0)
        if self.scalar:
            return value
        for size in reversed(self.shape):
            value = [value] * (1 if size is None else size)
        return value


class Model:
    """A session with its tensors. Raises StartError `model_load_failed` when it cannot be served."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        import numpy
        import onnxruntime

        self._numpy = numpy
        path = folder.path(_main_file(folder))
        options = onnxruntime.SessionOptions()
        # one thread: many small requests go side by side, and waiting threads would spin
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            self.tensors = tuple(_tensor(i) for i in self.session.get_inputs())
        except serving.StartError:
            raise
        except Exception as error:  # ONNX Runtime has an exception for each status, without a common base
            message = f"{path.name} cannot be loaded by ONNX Runtime: {str(error)[:500]}"
            hint = "export it for a lower opset, or check it with onnx.checker.check_model"
            raise serving.StartError("model_load_failed", message, hint) from error
        if not self.tensors:
            raise serving.StartError("model_load_failed", f"{path.name} has no inputs", "export a model with inputs")
        self._outputs = self.session.get_outputs()
        self._names = [o.name for o in self._outputs]
        fixed = [i.shape[0] for i in self.session.get_inputs() if i.shape and isinstance(i.shape[0], int)]
        # a model whose batch is fixed, or whose answer has no batch, is asked row by row
        self._whole = all(t.batched for t in self.tensors) and not fixed and all(map(_has_batch, self._outputs))
        if any(size != 1 for size in fixed) and all(t.batched for t in self.tensors):
            message = f"{path.name} takes exactly {fixed[0]} rows at once"
            raise serving.StartError("model_load_failed", message, "export it with a dynamic first dimension")
        example = {"inputs": [self._example()]}
        self.about = serving.About(
            kind="onnx",
            format="onnx",
            folder=folder,
            input=inputs_schema(self._row_schema()),
            output=outputs_schema({}),
            classes=self._classes(),
            example=example,
            details={
                "inputs": [{"name": t.name, "type": t.type, "shape": list(t.shape)} for t in self.tensors],
                "outputs": [{"name": o.name, "type": o.type} for o in self._outputs],
            },
        )

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Answers in the order of the rows. Raises Problem naming the row and tensor that does not fit."""
        rows = [self._cells(row, i) for i, row in enumerate(inputs)]
        if self._whole:
            return self._run(rows, 0)
        return [value for i, row in enumerate(rows) for value in self._run([row], i)]

    def _cells(self, row: Any, i: int) -> list[Any]:
        """The values of one row, one for each tensor."""
        names = [t.name for t in self.tensors]
        if type(row) is dict:
            for name in names:
                if name not in row:
                    hint = f"the inputs are: {', '.join(names)}"
                    raise _problem("missing_column", f"inputs[{i}] has no {name!r}", f"inputs[{i}].{name}", hint)
            unknown = next((k for k in row if k not in names), None)
            if unknown is not None:
                hint = f"the inputs are: {', '.join(names)}"
                raise _problem("unknown_column", f"the model has no input {unknown!r}", f"inputs[{i}].{unknown}", hint)
            return [row[name] for name in names]
        if len(self.tensors) == 1:
            return [row]
        if type(row) is not list or not all(t.scalar for t in self.tensors):
            hint = f"send an object with the inputs: {', '.join(names)}"
            raise _problem("invalid_row", f"inputs[{i}] is not an object by input name", f"inputs[{i}]", hint)
        if len(row) != len(self.tensors):
            detail = f"inputs[{i}] has {len(row)} values; the model has {len(self.tensors)} inputs"
            raise _problem("wrong_width", detail, f"inputs[{i}]", f"the inputs are: {', '.join(names)}")
        return row

    def _run(self, rows: list[list[Any]], first: int) -> list[Any]:
        feed = {t.name: self._array(t, [row[at] for row in rows], first) for at, t in enumerate(self.tensors)}
        try:
            answers = self.session.run(self._names, feed)
        except Exception as error:  # see above; the model itself refuses, such as an embedding an index out of range
            said = str(error).split("\n")[0][:300]
            detail = f"the model cannot take these rows: {said}"
            raise _problem("prediction_refused", detail, f"inputs[{first}]" if len(rows) == 1 else "inputs") from error
        columns = [self._listed(answer, len(rows)) for answer in answers]
        if len(columns) == 1:
            return columns[0]
        return [dict(zip(self._names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _array(self, tensor: Tensor, values: list[Any], first: int) -> Any:
        np = self._numpy
        if tensor.scalar and tensor.shape == (1,):
            # a column of a table: `3` and `[3]` are the same
            values = [v if type(v) is list else [v] for v in values]
        array = self._fitting(tensor, values)
        if array is not None:
            return array if tensor.batched else array[0]
        for i, value in enumerate(values, start=first):
            place = f"inputs[{i}].{tensor.name}" if len(self.tensors) > 1 else f"inputs[{i}]"
            _check(value, tensor.shape, _checker(tensor.type), place)
        try:
            array = np.array(values, dtype=tensor.dtype)
        except (ValueError, TypeError, OverflowError) as error:
            detail = f"the rows do not make one tensor {tensor.name!r}: their shapes differ"
            raise _problem("wrong_shape", detail, "inputs", "send rows of equal shape together") from error
        return array if tensor.batched else array[0]

    def _fitting(self, tensor: Tensor, values: list[Any]) -> Any:
        """The whole batch as a tensor where a few passes in NumPy show that it fits; None where it needs a closer look.

        A picture has 150,000 values: looking at each of them in Python would take longer than the model.
        """
        np = self._numpy
        if tensor.type == "string":
            return None
        try:
            array = np.array(values)
        except (ValueError, OverflowError):
            return None
        sizes = array.shape[1:]
        if len(sizes) != len(tensor.shape) or any(w not in (None, s) for s, w in zip(sizes, tensor.shape, strict=True)):
            return None
        if tensor.type in _FLOATS:
            fits = array.dtype.kind in "iuf" and bool((np.abs(array) <= _FLOATS[tensor.type]).all())
            fits = fits and bool(np.isfinite(array).all())
        elif tensor.type in _INTEGERS:
            limits = np.iinfo(tensor.dtype)
            fits = array.dtype.kind in "iu" and (
                array.size == 0 or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)
            )
        else:
            fits = array.dtype.kind == "b"
        return array.astype(tensor.dtype) if fits else None

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

    def _example(self) -> Any:
        values = [t.example() for t in self.tensors]
        return values[0] if len(values) == 1 else {t.name: v for t, v in zip(self.tensors, values, strict=True)}

    def _row_schema(self) -> dict[str, Any]:
        record = {
            "type": "object",
            "properties": {t.name: t.json_schema() for t in self.tensors},
            "required": [t.name for t in self.tensors],
            "additionalProperties": False,
        }
        return {"anyOf": [self.tensors[0].json_schema(), record]} if len(self.tensors) == 1 else record

    def _classes(self) -> list[Any] | None:
        """The labels of a classifier whose probabilities come as a map; only an answer shows them."""
        if not any(o.type.startswith("seq(map(") for o in self._outputs):
            return None
        try:
            feed = {t.name: self._array(t, [t.example()], 0) for t in self.tensors}
            answers = self.session.run(self._names, feed)
        except Exception:  # the synthetic row may not be one that the model takes; then the labels stay unknown
            return None
        maps = next((a for a in answers if isinstance(a, list) and a and isinstance(a[0], dict)), None)
        return list(maps[0]) if maps else None


def _main_file(folder: serving.ModelFolder) -> str | None:
    """The model beside its external data: the only .onnx file."""
    models = [f for f in folder.files if PurePosixPath(f).suffix.lower() == ".onnx"]
    if len(folder.files) == 1:
        return None
    if len(models) != 1:
        message = f"this version has {len(models)} .onnx files: {', '.join(models)[:300]}"
        raise serving.StartError("model_load_failed", message, "upload one .onnx file with its external data")
    return models[0]


def _tensor(described: Any) -> Tensor:
    kind = described.type
    inner = kind[7:-1] if kind.startswith("tensor(") else ""
    if inner not in _FLOATS and inner not in _INTEGERS and inner not in ("bool", "string"):
        message = f"input {described.name!r} is a {kind}, which cannot be sent as JSON"
        raise serving.StartError("model_load_failed", message, "export the model with tensors of numbers or text")
    sizes = [size if isinstance(size, int) else None for size in described.shape]
    return Tensor(described.name, inner, tuple(sizes[1:]), bool(sizes))


def _has_batch(output: Any) -> bool:
    if not output.type.startswith("tensor("):
        return True
    return bool(output.shape) and not isinstance(output.shape[0], int)


def _checker(kind: str) -> Callable[[Any], str | None]:
    """A function that says what is wrong with one value for a tensor of this type, or None."""
    if kind == "string":
        return lambda value: None if type(value) is str else "not a string"
    if kind == "bool":
        return lambda value: None if value in (0, 1) and type(value) in (bool, int) else "not true or false"
    if kind in _INTEGERS:
        bits = int(kind.lstrip("uint"))
        low, high = (0, 2**bits) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))

        def integer(value: Any) -> str | None:
            if type(value) is float and value.is_integer():
                value = int(value)
            if type(value) not in (int, bool):
                return "not a whole number"
            return None if low <= value < high else f"outside of the range of {kind}"

        return integer
    largest = _FLOATS[kind]

    def number(value: Any) -> str | None:
        if type(value) is float:
            return None if -largest <= value <= largest and abs(value) != math.inf else _not_number(value, kind)
        if type(value) not in (int, bool):
            return "not a number"
        return None if abs(value) <= min(largest, 1.7976931348623157e308) else f"too large for {kind}"

    return number


def _not_number(value: float, kind: str) -> str | None:
    if math.isnan(value):
        return "missing"
    return "not finite" if math.isinf(value) else f"too large for {kind}"


def _check(value: Any, shape: tuple[int | None, ...], wrong: Callable[[Any], str | None], place: str) -> None:
    """Walk one row of a tensor. Raises Problem naming the first element that does not fit."""
    if not shape:
        if said := wrong(value):
            raise _problem("not_finite" if said == "not finite" else "wrong_type", f"{place} is {said}", place)
        return
    if type(value) is not list:
        wanted = "any number of" if shape[0] is None else shape[0]
        raise _problem("wrong_shape", f"{place} is not an array of {wanted} values", place)
    if shape[0] is not None and len(value) != shape[0]:
        raise _problem("wrong_width", f"{place} has {len(value)} values; the model takes {shape[0]}", place)
    rest = shape[1:]
    if not rest:
        for at, item in enumerate(value):
            if said := wrong(item):
                there = f"{place}[{at}]"
                raise _problem("not_finite" if said == "not finite" else "wrong_type", f"{there} is {said}", there)
        return
    for at, item in enumerate(value):
        _check(item, rest, wrong, f"{place}[{at}]")


def _plain(value: Any) -> Any:
    """NumPy values, maps and sequences as JSON values; the keys of a map become text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _problem(code: str, detail: str, field: str, hint: str | None = None) -> serving.Problem:
    return serving.Problem(code, detail[:1500], field=field, hint=hint)
