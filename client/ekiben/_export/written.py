"""What a writer of one library gives back, and what all of them need."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ekiben._errors import ExportError


@dataclass(frozen=True)
class Written:
    """A written file; the outputs for the sample; the model's columns, and whether it knows them by name.

    `fields` stand in the sample's request beside its inputs.
    """

    file: Path
    outputs: Any
    columns: list[str] | None = None
    named: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)


def predicted(predict: Any, table: Any) -> Any:
    try:
        return predict(table)
    except Exception as error:
        if type(error).__name__ in ("NotFittedError", "LGBMNotFittedError"):
            raise ExportError(
                "the model is not fitted", code="not_fitted", field="model", hint="fit it first"
            ) from None
        raise ExportError(
            f"the model cannot predict its sample: {first_line(error)}",
            code="bad_sample",
            field="sample",
            hint="pass rows as the model was trained on, like X_test[:100]",
        ) from error


def frame(sample: Any) -> Any:
    """The sample as the libraries take it: a list of rows becomes an array, or a frame where rows have names."""
    if isinstance(sample, dict):
        sample = sample.get("inputs", [])
    if not isinstance(sample, (list, tuple)):
        return sample
    if sample and isinstance(sample[0], dict):
        return importlib.import_module("pandas").DataFrame(list(sample))
    return importlib.import_module("numpy").asarray(sample)


def unfitted(model: Any, error: Exception) -> ExportError:
    return ExportError(
        f"the {type(model).__qualname__} has no trained model in it: {first_line(error)}",
        code="not_fitted",
        field="model",
        hint="fit it first",
    )


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
