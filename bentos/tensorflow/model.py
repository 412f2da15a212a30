"""A network that answers rows of JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from bentos import serving
from bentos.serving import batches, row_proof, trial_rows
from bentos.serving.answers import aside
from bentos.serving.batches import Batches
from bentos.serving.row_flow import Rows
from bentos.serving.row_proof import Sharing
from bentos.serving.schema import outputs_schema
from bentos.tensorflow.network import Output, load

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
        tensors, outputs = self.network.inputs, self.network.outputs
        trials = trial_rows.of_tensors(tensors, folder.sample(), self._takes)
        separable, structure = self.network.separable, self.network.structure
        said = [_says(output, found) for output, found in zip(outputs, structure, strict=True)]
        self._split = row_proof.split(said, self._counts, trials.rows, separable)
        proven = separable and all(self._split) and all(isinstance(f, Rows) and f.axis == 0 for f in structure)
        run = self._shared if separable else self._single
        verdict = row_proof.tried(run, trials.rows, trials.extremes, most=_AT_ONCE if proven else 2)
        most = Sharing.REQUESTS if batches.bound(os.environ, _AT_ONCE) > 1 else Sharing.REQUEST
        self.sharing = row_proof.sharing(most, verdict, proven)
        self._batches = Batches(self._run, 1 if self.sharing is Sharing.ROW else _AT_ONCE)
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
                **row_proof.details(self.sharing, verdict, proven, separable),
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
        """One answer a row; rows of equal shapes go through the network together, where that changes no answer."""
        answers = self._numpy.empty(len(rows), object)
        if self.sharing is Sharing.ROW:
            for i, row in enumerate(rows):
                answers[i] = self._alone(row)
            return answers
        alike: dict[Any, list[int]] = {}
        for i, row in enumerate(rows):
            alike.setdefault(tuple(self._numpy.shape(each) for each in row), []).append(i)
        for places in alike.values():
            for start in range(0, len(places), _AT_ONCE):
                some = places[start : start + _AT_ONCE]
                columns = [_listed(array, len(some)) for array in self._arrays([rows[i] for i in some])]
                for place, *values in zip(some, *columns, strict=True):
                    answers[place] = self._named(values)
        return answers

    def _alone(self, row: tuple[Any, ...]) -> Any:
        """The answer to one row in a call of its own: what an output holds for the row, or the whole of it."""
        arrays = self._arrays([row])
        return self._named(
            [_listed(array, 1)[0] if split else _plain(array) for array, split in zip(arrays, self._split, strict=True)]
        )

    def _named(self, values: list[Any]) -> Any:
        names = [output.name for output in self.network.outputs]
        return values[0] if len(values) == 1 else dict(zip(names, values, strict=True))

    def _arrays(self, rows: Sequence[tuple[Any, ...]]) -> list[NDArray[Any]]:
        """The outputs of one call."""
        inputs = self.network.inputs
        answer = self.network.call(
            {
                t.name: self._numpy.stack(values) if t.batched else values[0]
                for t, values in zip(inputs.all, zip(*rows, strict=True), strict=True)
            }
        )
        return [self._array(answer[output.name]) for output in self.network.outputs]

    def _array(self, tensor: Any) -> NDArray[Any]:
        array = self._numpy.asarray(tensor.numpy())
        return array.astype(self._numpy.float32) if array.dtype.kind == "V" else array  # bfloat16

    def _takes(self, row: Any) -> bool:
        try:
            self._arrays([row])
        except self._refusals:
            return False
        return True

    def _single(self, rows: list[Any]) -> list[Any]:
        return [dict(enumerate(self._arrays([row]))) for row in rows]

    def _shared(self, rows: list[Any]) -> list[Any]:
        arrays = self._arrays(rows)
        for array in arrays:
            if (count := _count(array)) != len(rows):
                raise row_proof.Miscounted(count, len(rows))
        return [dict(enumerate(values)) for values in zip(*arrays, strict=True)]

    def _counts(self, rows: list[Any]) -> list[int]:
        return [_count(array) for array in self._arrays(rows)]

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


def _says(output: Output, found: Any) -> bool | None:
    """Whether an output's first axis is that of the rows, as its graph or its shape says; None where neither does."""
    if isinstance(found, Rows) and found.axis == 0 and not found.blocks:
        return True
    if output.batched:
        return None
    return output.single


def _count(array: NDArray[Any]) -> int:
    return len(array) if array.ndim else -1


def _listed(array: NDArray[Any], rows: int) -> list[Any]:
    """An output as one JSON value per row. Raises Problem where it has another number of entries."""
    if (count := _count(array)) != rows:
        hint = "export the model with one entry per row in each output"
        raise serving.Problem("prediction_failed", str(row_proof.Miscounted(count, rows)), hint=hint, status=500)
    values: list[Any] = array.tolist()
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
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


def _described(name: str, dtype: str, shape: tuple[int | None, ...] | None) -> dict[str, Any]:
    return {"name": name, "type": dtype, "shape": None if shape is None else list(shape)}
