"""A torch module as ONNX, traced with the user's own sample; the first dimension may then be of any size."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from ekiben._errors import ExportError
from ekiben._export.written import Written, first_line, frame, predicted

OPSET = 17


def write(model: Any, folder: Path, sample: Any) -> Written:
    torch = importlib.import_module("torch")
    if sample is None:
        raise ExportError(
            "a torch module does not say what it takes: it is exported with a sample",
            code="bad_sample",
            field="sample",
            hint="ekiben.push(model, sample=X_test[:100])",
        )
    rows = _tensor(torch, model, sample)
    with evaluating(torch, model):
        outputs = predicted(model, rows)
        if not isinstance(outputs, torch.Tensor):
            raise ExportError(
                f"the model answers a {type(outputs).__name__}, not one tensor",
                code="cannot_export",
                field="model",
                hint="wrap it in a module whose forward gives one tensor",
            )
        # two rows, where there are so many: a trace with one may take its size for a constant
        file = to_onnx(torch, model, (rows[:2],), folder / "model", {"input": {0: "n"}}, {"output": {0: "n"}})
    return Written(file, outputs.detach().cpu().double().tolist(), None, named=False)


def to_onnx(
    torch: Any,
    model: Any,
    inputs: tuple[Any, ...],
    folder: Path,
    axes: dict[str, dict[int, str]],
    answers: dict[str, dict[int, str]],
) -> Path:
    """Write `folder`/model.onnx (beside it what does not fit into one message) and give the folder.

    `axes` and `answers` name inputs and outputs in their order, with the dimensions of any size.
    """
    folder.mkdir(exist_ok=True)
    # the exporter by tracing: the newer one needs packages of its own (onnxscript)
    traced = {"dynamo": False} if "dynamo" in inspect.signature(torch.onnx.export).parameters else {}
    try:
        torch.onnx.export(
            model,
            inputs,
            str(folder / "model.onnx"),
            input_names=list(axes),
            output_names=list(answers),
            dynamic_axes={**axes, **answers},
            opset_version=OPSET,
            **traced,
        )
    except Exception as error:  # torch has no common base for what its exporter raises
        raise ExportError(
            f"torch cannot export this {type(model).__qualname__} as ONNX: {first_line(error)}",
            code="cannot_export",
            field="model",
            hint="export it yourself with torch.onnx.export and push the file, or ekiben init --from FILE",
        ) from error
    return folder


class evaluating:
    """The model without dropout and gradients; as it was, afterwards."""

    def __init__(self, torch: Any, model: Any) -> None:
        self._model, self._still = model, torch.no_grad()

    def __enter__(self) -> None:
        self._training = self._model.training
        self._model.eval()
        self._still.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._still.__exit__(*error)
        self._model.train(self._training)


def _tensor(torch: Any, model: Any, sample: Any) -> Any:
    """The sample as one tensor, on the model's device; fractions in the model's own precision."""
    try:
        if hasattr(sample, "to_numpy"):
            sample = sample.to_numpy()
        rows = torch.as_tensor(frame(sample))
    except Exception as error:
        raise ExportError(
            f"the sample is no tensor: {first_line(error)}",
            code="bad_sample",
            field="sample",
            hint="pass an array or a tensor whose first dimension is the rows",
        ) from error
    weights = next(iter(model.parameters()), None)
    if weights is None:
        return rows.to(torch.float32) if rows.is_floating_point() else rows
    return rows.to(weights.device, weights.dtype if rows.is_floating_point() else rows.dtype)
