"""Serve a scikit-learn estimator or pipeline from a skops file; no type outside of a fixed list is ever loaded."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.formats.skops import Model


@serving.offer
@bentoml.service(name="sklearn", image=serving.image(__file__))
class Sklearn:
    def __init__(self) -> None:
        self.model = Model(serving.folder(__file__))
        self.about = self.model.about

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[Any], method: str = "predict") -> dict[str, list[Any]]:
        """One value per row; with `"method": "predict_proba"` a list of probabilities, in the order of /label."""
        answer: dict[str, list[Any]] = await serving.answer(
            lambda rows: self.model.outputs(rows, method), inputs, self.model.sharing
        )
        return answer
