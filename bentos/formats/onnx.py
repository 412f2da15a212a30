"""An ONNX model run by ONNX Runtime on the CPU: tensors by name, text, labels and maps of probabilities."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from bentos import serving
from bentos.formats import onnx_graph, onnx_rows
from bentos.formats.onnx_graph import Described, Graph
from bentos.serving import row_proof, trial_rows
from bentos.serving.row_flow import Rows
from bentos.serving.row_proof import Sharing
from bentos.serving.schema import outputs_schema
from bentos.serving.tensors import DTYPES, Tensor, Tensors
from bentos.serving.trial_rows import Trials

_NAMES = {"float": "float32", "double": "float64"}
_MADE_UP = re.compile(r"unk__\d+")
"""Names that exporters give to axes of which they know nothing, another one to each."""
_HINT = "name the first axis of an output in the file like that of the inputs only where it is the rows"


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
            graph = _graph(path)
            self.tensors = Tensors(tuple(_tensor(i, graph) for i in self.session.get_inputs()))
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
        if any(size != 1 for size in fixed) and self.tensors.batched:
            message = f"{path.name} takes exactly {fixed[0]} rows at once"
            raise serving.StartError("model_load_failed", message, "export it with a dynamic first dimension")
        separable = self.tensors.batched and not fixed
        structure = _structure(graph, self.tensors.free)
        trials = trial_rows.of_tensors(self.tensors, folder.sample(), self._takes)
        self._split = self._splits(graph, structure, trials, separable)
        proven = separable and all(isinstance(structure.get(n), Rows) and structure[n].axis == 0 for n in self._names)
        run = self._shared if separable else self._single
        verdict = row_proof.tried(run, trials.rows, trials.extremes, most=row_proof.MOST if proven else 2)
        proven = proven and all(self._split)
        if graph is not None and (onnx_rows.trains(graph) or (verdict.random and not onnx_rows.draws(graph))):
            message = f"{path.name} changes with each call, so an answer depends on the calls before it"
            hint = "export it for inference: model.eval() in PyTorch, training=TrainingMode.EVAL"
            raise serving.StartError("model_load_failed", message, hint)
        self.sharing = row_proof.sharing(Sharing.REQUEST, verdict, proven)
        self.about = serving.About(
            kind="onnx",
            format="onnx",
            folder=folder,
            input=self.tensors.input_schema(),
            output=outputs_schema({}),
            classes=self._classes(),
            example={"inputs": [self.tensors.example_row()]},
            details={
                "inputs": [_described(t) for t in self.tensors.all],
                "outputs": [{"name": o.name, "type": o.type} for o in self._outputs],
                **row_proof.details(self.sharing, verdict, proven, separable),
            },
        )

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Answers in the order of the rows. Raises Problem naming the row and tensor that does not fit."""
        rows = self.tensors.cells(inputs)
        if self.sharing is Sharing.ROW:
            return [self._alone(row, i) for i, row in enumerate(rows)]
        columns = [_listed(answer, len(rows)) for answer in self._call(self.tensors.arrays(rows), rows)]
        if len(columns) == 1:
            return columns[0]
        return [dict(zip(self._names, values, strict=True)) for values in zip(*columns, strict=True)]

    def _alone(self, row: Sequence[Any], i: int) -> Any:
        """The answer to one row in a call of its own: what an output holds for the row, or the whole of it."""
        answers = self._call(self.tensors.arrays([row], i), [row], i)
        values = [
            _listed(answer, 1)[0] if split else _plain(answer)
            for answer, split in zip(answers, self._split, strict=True)
        ]
        return values[0] if len(values) == 1 else dict(zip(self._names, values, strict=True))

    def _call(self, feed: Mapping[str, Any], rows: Sequence[Any], first: int = 0) -> list[Any]:
        try:
            answers: list[Any] = self.session.run(self._names, feed)
        except Exception as error:  # see above; the model itself refuses, such as an embedding an index out of range
            said = str(error).split("\n")[0][:300]
            detail = f"the model cannot take these rows: {said}"
            field = f"inputs[{first}]" if len(rows) == 1 else "inputs"
            raise serving.Problem("prediction_refused", detail, field=field) from error
        return answers

    def _takes(self, row: Any) -> bool:
        try:
            self._single([row])
        except Exception:  # ONNX Runtime has an exception for each status, without a common base
            return False
        return True

    def _single(self, rows: list[Any]) -> list[Any]:
        """Whole answers to rows of arrays, each in a call of its own."""
        answers = []
        for row in rows:
            feed = {t.name: each[None] if t.batched else each for t, each in zip(self.tensors.all, row, strict=True)}
            answers.append(dict(zip(self._names, self.session.run(self._names, feed), strict=True)))
        return answers

    def _shared(self, rows: list[Any]) -> list[Any]:
        """Answers to rows of arrays in one call. Raises Miscounted."""
        columns = zip(*rows, strict=True)
        feed = {t.name: numpy.stack(values) for t, values in zip(self.tensors.all, columns, strict=True)}
        answers = self.session.run(self._names, feed)
        for answer in answers:
            if (count := _count(answer)) != len(rows):
                raise row_proof.Miscounted(count, len(rows))
        return [dict(zip(self._names, values, strict=True)) for values in zip(*answers, strict=True)]

    def _splits(
        self, graph: Graph | None, structure: Mapping[str, Any], trials: Trials, separable: bool
    ) -> tuple[bool, ...]:
        """For each output whether its first axis is that of the rows; the graph says so, or the names of its axes."""
        declared = {each.name: each for each in graph.outputs} if graph else {}
        symbols = {each.shape[0] for each in graph.inputs if each.shape} if graph else set()
        said = [
            _says(o.type, declared.get(o.name), structure.get(o.name), {s for s in symbols if isinstance(s, str)})
            for o in self._outputs
        ]
        return row_proof.split(said, self._counts, trials.rows, separable)

    def _counts(self, rows: list[Any]) -> list[int]:
        """Entries of each output for rows of arrays."""
        columns = zip(*rows, strict=True)
        feed = {
            t.name: numpy.stack(values) if t.batched else values[0]
            for t, values in zip(self.tensors.all, columns, strict=True)
        }
        return [_count(answer) for answer in self.session.run(self._names, feed)]

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


def _graph(path: Path) -> Graph | None:
    """None where only ONNX Runtime can read the file; then nothing is known of its structure."""
    try:
        return onnx_graph.read(path)
    except onnx_graph.Unreadable:
        return None


def _structure(graph: Graph | None, free: bool) -> Mapping[str, Any]:
    return onnx_rows.outputs(graph, free) if graph is not None else {}


def _tensor(described: Any, graph: Graph | None) -> Tensor:
    kind = described.type
    inner = kind[7:-1] if kind.startswith("tensor(") else ""
    inner = _NAMES.get(inner, inner)
    if inner not in DTYPES:
        message = f"input {described.name!r} is a {kind}, which cannot be sent as JSON"
        raise serving.StartError("model_load_failed", message, "export the model with tensors of numbers or text")
    missing = graph is not None and onnx_rows.takes_missing(graph)
    own = next((each for each in graph.inputs if each.name == described.name), None) if graph is not None else None
    if own is not None and own.tensor and own.shape is None:  # ONNX Runtime shows it like a single value
        return Tensor(described.name, inner, None, missing=missing)
    sizes = [size if isinstance(size, int) else None for size in described.shape]
    return Tensor(described.name, inner, tuple(sizes[1:]), bool(sizes), missing=missing)


def _described(tensor: Tensor) -> dict[str, Any]:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": tensor.name, "type": tensor.dtype, "shape": shape}


def _says(kind: str, declared: Described | None, found: Any, symbols: set[str]) -> bool | None:
    """Whether an output's first axis is that of the rows, as the model says; None where it does not say."""
    if isinstance(found, Rows) and found.axis == 0 and not found.blocks:
        return True
    if not kind.startswith("tensor("):
        return None if kind.startswith("seq(map(") else False
    if declared is None or declared.shape is None:
        return None
    first = declared.shape[0] if declared.shape else 0
    if isinstance(first, int):
        return first == 1
    if first is None or _MADE_UP.fullmatch(first):
        return None
    named = {symbol for symbol in symbols if not _MADE_UP.fullmatch(symbol)}
    return first in named if named else None


def _count(answer: Any) -> int:
    """Entries along the first axis; -1 of what has none."""
    if isinstance(answer, list):
        return len(answer)
    return len(answer) if getattr(answer, "ndim", 0) else -1


def _listed(answer: Any, rows: int) -> list[Any]:
    """An output as one JSON value per row. Raises Problem where it has another number of entries."""
    if (count := _count(answer)) != rows:
        raise serving.Problem("prediction_failed", str(row_proof.Miscounted(count, rows)), hint=_HINT, status=500)
    if isinstance(answer, list):  # a sequence, such as the maps of class → probability of a classifier
        return [_plain(value) for value in answer]
    values: list[Any] = answer.tolist()
    return values


def _plain(value: Any) -> Any:
    """NumPy values, maps and sequences as JSON values; the keys of a map become text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.tolist() if hasattr(value, "tolist") else value
