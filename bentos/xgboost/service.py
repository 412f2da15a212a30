"""Serve an XGBoost model from JSON or UBJ: regression, binary, multiclass and ranking."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.formats.xgboost import Model


@serving.offer
@bentoml.service(name="xgboost", image=serving.image(__file__))
class XGBoost:
    def __init__(self) -> None:
        self.model = Model(serving.folder(__file__))
        self.about = self.model.about

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[Any]) -> dict[str, list[Any]]:
        """One value per row: a number, or a list of numbers for a model with several outputs."""
        answer: dict[str, list[Any]] = await serving.answer(self.model.outputs, inputs)
        return answer
