"""Serve an MLflow model folder: the model by its own library, its callers' columns by MLflow's signature."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.mlflow.model import Model


@serving.offer
@bentoml.service(name="mlflow", image=serving.image(__file__))
class MLflow:
    def __init__(self) -> None:
        self.model = Model(serving.folder(__file__))
        self.about = self.model.about

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[Any]) -> dict[str, list[Any]]:
        """One value per row: what the model's library answers for it."""
        answer: dict[str, list[Any]] = await serving.answer(self.model.outputs, inputs, self.model.sharing)
        return answer
