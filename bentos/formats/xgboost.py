"""An XGBoost model from JSON or UBJ: regression, binary, multiclass and ranking.

It answers as `Booster.predict` does: with all rounds, whatever `best_iteration` the file records.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

from bentos import serving
from bentos.serving.row_proof import Sharing
from bentos.serving.schema import outputs_schema

_LARGEST_FLOAT32 = 3.4028234663852886e38
_MISSING = "ekiben.missing"
"""Attribute of a booster: the number that stood for a missing value in training; XGBoost's file has no field."""


class Model:
    """A booster with its columns. Raises StartError `model_load_failed` when the file is not what it should be.

    `estimator` makes it answer as an XGBModel that loaded the file: early stopping's best iteration ends the rounds.
    """

    def __init__(self, folder: serving.ModelFolder, *, estimator: bool = False) -> None:
        import numpy
        import xgboost

        path = folder.path()
        data = path.read_bytes()
        hint = "save it with Booster.save_model"
        if not data.startswith(b"{"):  # XGBoost ends the whole process over an empty file
            message = f"{path.name} is neither JSON nor UBJ, as XGBoost saves models"
            raise serving.StartError("model_load_failed", message, hint)
        self.booster = xgboost.Booster({"nthread": 1})
        try:
            # from memory, as XGBoost would otherwise guess the format from the file's name
            self.booster.load_model(bytearray(data))
            config = json.loads(self.booster.save_config())
        except (xgboost.core.XGBoostError, ValueError) as error:
            said = str(error).split("Stack trace")[0].strip()[:500]
            message = f"{path.name} is not an XGBoost model in JSON or UBJ: {said}"
            raise serving.StartError("model_load_failed", message, hint) from error
        self.booster.set_param({"nthread": 1})
        self._numpy = numpy
        self._matrix = xgboost.DMatrix
        learner = config["learner"]
        # gblinear has no prediction in place, and dart's differs from Booster.predict in the last digits
        self._inplace = learner["gradient_booster"]["name"] == "gbtree"
        rounds = self.booster.num_boosted_rounds()
        best = _best_iteration(self.booster, rounds)
        self._range = (0, best + 1) if estimator and best is not None else (0, 0)
        self._missing = _missing(self.booster)
        self.table = _table(self.booster)
        objective = learner["objective"]["name"]
        classes = int(learner["learner_model_param"].get("num_class", "0"))
        value: dict[str, Any] = {"type": ["number", "array"]}
        labels: list[int] | None = None
        if objective in ("binary:logistic", "binary:logitraw", "binary:hinge"):
            labels, value = [0, 1], {"type": "number"}
        elif classes > 1:
            labels = list(range(classes))
            if objective == "multi:softmax":
                value = {"type": "number"}
            else:
                value = {"type": "array", "items": {"type": "number"}, "minItems": classes, "maxItems": classes}
        self.about = serving.About(
            kind="xgboost",
            format=folder.format,
            folder=folder,
            input=self.table.input_schema(),
            output=outputs_schema(value),
            classes=labels,
            example={"inputs": [self.table.example_row()]},
            details={
                "objective": objective,
                "trees": rounds,
                "missing": None if math.isnan(self._missing) else self._missing,
                "rows_share_a_call": Sharing.REQUEST.value,
            },
            caveats=_caveats(rounds, None if estimator else best, self._missing),
        )

    def outputs(self, inputs: list[Any]) -> list[Any]:
        """Predictions in the order of the rows. Raises Problem naming the row and column that does not fit."""
        matrix = self.table.matrix(inputs)
        if self._inplace:
            # names are checked by the table; XGBoost would only compare them with those of a data frame
            values = self.booster.inplace_predict(
                matrix, iteration_range=self._range, missing=self._missing, validate_features=False
            )
        else:
            rows = self._matrix(matrix, missing=self._missing, nthread=1)
            values = self.booster.predict(rows, iteration_range=self._range, validate_features=False)
        listed: list[Any] = self._numpy.asarray(values).tolist()
        return listed


def _attribute(booster: Any, key: str) -> str | None:
    try:
        value: str | None = booster.attr(key)
    except AssertionError:  # XGBoost's own check of an attribute that is there and empty
        return ""
    return value


def _best_iteration(booster: Any, rounds: int) -> int | None:
    """Return the recorded best iteration, counted from 0, where it would cut rounds off; None otherwise.

    It may be of an earlier training that this one continued, so it does not say what `Booster.predict` uses.
    """
    text = _attribute(booster, "best_iteration")
    if text is None or not text.isdecimal():
        return None
    return int(text) if int(text) + 1 < rounds else None


def _missing(booster: Any) -> float:
    """Return the number that stands for a missing value besides NaN; NaN where the file names none.

    Raises StartError `model_load_failed` for an attribute that is not a finite number.
    """
    text = _attribute(booster, _MISSING)
    if text is None:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        message = f"the attribute {_MISSING} of the model must be a finite number, and is {text[:100]!r}"
        hint = "set it to the `missing` of the DMatrix or estimator: booster.set_attr(**{'ekiben.missing': '-999'})"
        raise serving.StartError("model_load_failed", message, hint)
    return value


def _caveats(rounds: int, best: int | None, missing: float) -> tuple[str, ...]:
    """Return what may make the answers differ from those that a notebook gave."""
    found = []
    if best is not None:
        found.append(
            f"the file records best_iteration {best}, and all {rounds} rounds are used, as Booster.predict does; "
            f"to stop at the best iteration, save booster[:{best + 1}]"
        )
    if math.isnan(missing):
        found.append(
            "the file does not say which number stood for missing values in training; if one did, set it before you "
            "save: booster.set_attr(**{'ekiben.missing': '-999'}), or push the estimator, which knows it"
        )
    return tuple(found)


def _table(booster: Any) -> serving.Table:
    width = booster.num_features()
    names = booster.feature_names
    kinds = booster.feature_types or ["q"] * width
    categories = _categories(booster) if "c" in kinds else {}
    return serving.Table(
        tuple(
            serving.Column(name, categories=categories.get(i))
            for i, name in enumerate(names or [f"f{i}" for i in range(width)])
        ),
        named=names is not None,
        largest=_LARGEST_FLOAT32,
    )


def _categories(booster: Any) -> dict[int, tuple[Any, ...]]:
    """Column → its categories in the order of their codes, from the encoder that XGBoost 3.1 and later store.

    Older models hold codes only; their categorical columns take the code as a number.
    """
    document = json.loads(bytes(booster.save_raw("json")))
    gradient = document["learner"]["gradient_booster"]
    model = gradient.get("model") or gradient.get("gbtree", {}).get("model") or {}
    found: dict[int, tuple[Any, ...]] = {}
    for i, encoder in enumerate(model.get("cats", {}).get("enc", [])):
        values = encoder.get("values", [])
        if not values:
            continue
        if "offsets" in encoder:  # strings: UTF-8 bytes, as signed numbers, with the places where each one starts
            text = bytes(b & 0xFF for b in values)
            ends = encoder["offsets"]
            try:
                # XGBoost 3.2 counts letters where it should count bytes, and cuts the rest off: what is left of a name
                # may still be a word, though another one
                text.decode("utf-8" if document.get("version", [0]) >= [3, 3] else "ascii")
                found[i] = tuple(text[a:b].decode("utf-8") for a, b in pairwise(ends))
            except UnicodeDecodeError as error:
                name = (booster.feature_names or [])[i : i + 1]
                message = f"the categories of column {name or i} are damaged in the file: they are not ASCII"
                hint = "train with ASCII category names, or with their codes as numbers"
                raise serving.StartError("model_load_failed", message, hint) from error
        else:
            found[i] = tuple(values)
    return found
