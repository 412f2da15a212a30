"""Serve an ONNX model with ONNX Runtime on the CPU: tensors by name, text, labels and maps of probabilities."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.formats.onnx import Model


@serving.offer
@bentoml.service(name="onnx", image=serving.image(__file__))
class Onnx:
    def __init__(self) -> None:
        self.model = Model(serving.folder(__file__))
        self.about = self.model.about

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[Any]) -> dict[str, list[Any]]:
        """One value per row: what the model's output holds for it, or an object by name if it has several outputs."""
        answer: dict[str, list[Any]] = await serving.answer(self.model.outputs, inputs, self.model.sharing)
        return answer
