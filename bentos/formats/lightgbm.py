"""A LightGBM model from its text file: regression, binary, multiclass and ranking."""

from __future__ import annotations

import re
from typing import Any

from bentos import serving
from bentos.serving.row_proof import Sharing
from bentos.serving.schema import outputs_schema


class Model:
    """A booster with its columns. Raises StartError `model_load_failed` when the file is not what it should be."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        import lightgbm

        path = folder.path()
        try:
            self.booster = lightgbm.Booster(model_file=str(path))
        except (lightgbm.basic.LightGBMError, ValueError) as error:
            message = f"{path.name} is not a LightGBM model: {error}"
            raise serving.StartError("model_load_failed", message, "save it with Booster.save_model") from error
        header = _header(path.read_text("utf-8", "replace"))
        self.table = _table(self.booster, header, folder.sample())
        objective = header.get("objective", "").split(" ")[0]
        classes = self.booster.num_model_per_iteration()
        value: dict[str, Any] = {"type": "number"}
        labels: list[int] | None = None
        if objective in ("binary", "cross_entropy", "xentropy"):
            labels, value = [0, 1], {"type": "number", "minimum": 0, "maximum": 1, "title": "probability of class 1"}
        elif classes > 1:
            labels = list(range(classes))
            value = {"type": "array", "items": {"type": "number"}, "minItems": classes, "maxItems": classes}
        self.about = serving.About(
            kind="lightgbm",
            format="lightgbm-text",
            folder=folder,
            input=self.table.input_schema(),
            output=outputs_schema(value),
            classes=labels,
            example={"inputs": [self.table.example_row()]},
            details={
                "objective": objective,
                "trees": self.booster.num_trees(),
                "rows_share_a_call": Sharing.REQUEST.value,
            },
        )

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Predictions in the order of the rows. Raises Problem naming the row and column that does not fit."""
        # one thread: a row takes microseconds, and threads that wait for one another take longer than that
        values: list[Any] = self.booster.predict(self.table.matrix(inputs), num_threads=1).tolist()
        return values


def _header(text: str) -> dict[str, str]:
    """The `key=value` lines before the first tree, and the parameters and categories after the last."""
    head, _, rest = text.partition("\nTree=0")
    found = dict(line.split("=", 1) for line in head.splitlines() if "=" in line)
    if match := re.search(r"^\[categorical_feature: ([\d,]*)\]$", rest, re.MULTILINE):
        found["categorical_feature"] = match.group(1)
    return found


def _table(booster: Any, header: dict[str, str], sample: Any) -> serving.Table:
    names = booster.feature_name()
    infos = header.get("feature_infos", "").split(" ")
    infos = infos if len(infos) == len(names) else ["none"] * len(names)
    unnamed = names == [f"Column_{i}" for i in range(len(names))]
    categories = _categories(booster.pandas_categorical or [], names, infos, header, sample)
    return serving.Table(
        tuple(
            serving.Column(name, categories=categories.get(i), example=_example(info))
            for i, (name, info) in enumerate(zip(names, infos, strict=True))
        ),
        named=not unnamed,
    )


def _categories(
    lists: list[list[Any]], names: list[str], infos: list[str], header: dict[str, str], sample: Any
) -> dict[int, tuple[Any, ...]]:
    """Which column each list of pandas categories belongs to.

    LightGBM keeps the lists in column order, but not the columns. They are the categorical features; where ordered
    categories (trained as numbers) or columns made categorical by hand make the count differ, a sample tells.
    """
    if not lists:
        return {}
    told = {int(i) for i in header.get("categorical_feature", "").split(",") if i}
    told |= {i for i, info in enumerate(infos) if ":" in info and not info.startswith("[")}
    rows = sample.get("inputs") if isinstance(sample, dict) else None
    seen: set[int] = set()
    for row in rows if isinstance(rows, list) else []:
        cells = [row.get(n) for n in names] if isinstance(row, dict) else row
        if isinstance(cells, list):
            seen |= {i for i, cell in enumerate(cells[: len(names)]) if isinstance(cell, str)}
    for columns in (sorted(told), sorted(seen), sorted(told | seen)):
        if len(columns) == len(lists) and seen <= set(columns):
            return {i: tuple(values) for i, values in zip(columns, lists, strict=True)}
    raise serving.StartError(
        "model_load_failed",
        f"the model has {len(lists)} columns of categories, and the file does not tell which they are",
        "upload it with a sample whose rows hold a value in each of these columns",
    )


def _example(info: str) -> float:
    """The middle of the range seen in training, from `[low:high]`."""
    match = re.fullmatch(r"\[([^:]+):([^:\]]+)\]", info)
    if not match:
        return 0.0
    low, high = float(match.group(1)), float(match.group(2))
    return low if low == high else float(f"{low + (high - low) / 2:.6g}")
