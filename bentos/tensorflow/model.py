"""A network that answers rows of JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from bentos import serving
from bentos.serving.answers import aside
from bentos.serving.batches import Batches
from bentos.serving.schema import outputs_schema
from bentos.tensorflow.network import load

if TYPE_CHECKING:
    from numpy.typing import NDArray

_AT_ONCE = 64
"""Rows in one call of the network: what its layers hold in between is bounded by that."""


class Model:
    """Raises StartError `model_load_failed` when the version's files are not what they should be."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        import numpy
        import tensorflow

        self._numpy = numpy
        self._refusals = (tensorflow.errors.InvalidArgumentError, tensorflow.errors.OutOfRangeError)
        self.network = load(folder)
        self._batches = Batches(self._run, _AT_ONCE)
        tensors, outputs = self.network.inputs, self.network.outputs
        example = {"inputs": [tensors.example_row()]}
        value = (
            outputs[0].json_schema()
            if len(outputs) == 1
            else {
                "type": "object",
                "properties": {o.name: o.json_schema() for o in outputs},
                "required": [o.name for o in outputs],
            }
        )
        self.about = serving.About(
            kind="tensorflow",
            format=folder.format,
            folder=folder,
            input=tensors.input_schema(),
            output=outputs_schema(value),
            example=example,
            details={
                "inputs": [_described(t.name, t.dtype, t.shape) for t in tensors.all],
                "outputs": [_described(o.name, o.dtype, o.shape) for o in outputs],
                **self.network.details,
            },
        )
        # the first call makes the kernels ready; a row of zeros need not be one that the model takes
        with suppress(serving.Problem):
            self.outputs(example["inputs"])

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Answers in the order of the rows. Raises Problem naming the row and the place in it that does not fit."""
        with self._refusing(inputs):
            return list(self._run(self._rows(inputs)))

    async def together(self, inputs: list[Any]) -> list[Any]:
        """The same, run along with the rows of other requests."""
        rows = await aside(self._rows, inputs)
        with self._refusing(inputs):
            return list(await self._batches(rows))

    def _rows(self, inputs: list[Any]) -> NDArray[Any]:
        """An array of rows, each a tuple of its tensors."""
        tensors = self.network.inputs
        rows = self._numpy.empty(len(inputs), object)
        cells = tensors.cells(inputs)
        if tensors.batched and not tensors.free:
            feed = tensors.arrays(cells)
            for i in range(len(inputs)):
                rows[i] = tuple(feed[name][i] for name in tensors.names)
        else:  # rows of different sizes are no one tensor
            for i, row in enumerate(cells):
                feed = tensors.arrays([row], i)
                rows[i] = tuple(feed[t.name][0] if t.batched else feed[t.name] for t in tensors.all)
        return rows

    def _run(self, rows: NDArray[Any]) -> NDArray[Any]:
        """One answer a row; rows of equal shapes go through the network together."""
        answers = self._numpy.empty(len(rows), object)
        alike: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(tuple(self._numpy.shape(each) for each in row) if self.network.whole else i, []).append(i)
        for places in alike.values():
            for start in range(0, len(places), _AT_ONCE):
                some = places[start : start + _AT_ONCE]
                for place, value in zip(some, self._call([rows[i] for i in some]), strict=True):
                    answers[place] = value
        return answers

    def _call(self, rows: list[tuple[Any, ...]]) -> list[Any]:
        inputs, outputs = self.network.inputs, self.network.outputs
        answer = self.network.call(
            {
                t.name: self._numpy.stack(values) if t.batched else values[0]
                for t, values in zip(inputs.all, zip(*rows, strict=True), strict=True)
            }
        )
        columns = [self._listed(answer[output.name], output.batched, len(rows)) for output in outputs]
        if len(columns) == 1:
            return columns[0]
        names = [output.name for output in outputs]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]

    @contextmanager
    def _refusing(self, inputs: list[Any]) -> Iterator[None]:
        """The model itself refuses rows, such as an embedding an index out of range."""
        try:
            yield
        except self._refusals as error:
            field = "inputs[0]" if len(inputs) == 1 else "inputs"
            hint = "compare the rows with those that the model was trained on"
            detail = f"the model cannot take these rows: {_said(error)}"
            raise serving.Problem("prediction_refused", detail, field=field, hint=hint) from error

    def _listed(self, tensor: Any, batched: bool, rows: int) -> list[Any]:
        """An output as one value per row."""
        array = tensor.numpy()
        if not isinstance(array, self._numpy.ndarray):  # a scalar, such as a text
            return [_plain(array)]
        if array.dtype.kind == "V":  # bfloat16
            array = array.astype(self._numpy.float32)
        values = array.tolist()
        if not array.ndim or (not batched and array.shape[0] != rows):
            return [_plain(values)]
        if len(values) != rows:
            detail = f"the model answered {len(values)} values for {rows} rows"
            raise serving.Problem("prediction_failed", detail, status=500)
        return [_plain(value) for value in values] if array.dtype.kind == "O" else values


def _said(error: Exception) -> str:
    """What an operator said, without where in the graph it stands: the last line before its node is named."""
    lines = [line.strip() for line in str(error).partition("[[{{node")[0].splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:300]


def _plain(value: Any) -> Any:
    """Texts come as bytes."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def _described(name: str, dtype: str, shape: tuple[int | None, ...] | None) -> dict[str, Any]:
    return {"name": name, "type": dtype, "shape": None if shape is None else list(shape)}
