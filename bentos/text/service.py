"""Label and embed texts."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.serving.bodies import Body, reply
from bentos.text.labelling import Labeller


@serving.offer
@bentoml.service(name="text", image=serving.image(__file__))
class Text:
    def __init__(self) -> None:
        folder = serving.folder(__file__)
        self.labeller = Labeller.load(folder)
        self.about = serving.About(
            kind="text",
            format=folder.format,
            folder=folder,
            input=self.labeller.input_schema(),
            output=self.labeller.output_schema(),
            classes=self.labeller.labels,
            example={"text": "How are you today?"},
            details={**self.labeller.model.details(), "labelled_by": self.labeller.way},
        )

    @bentoml.api(route="/predict")
    async def predict(self, body: Body, /) -> dict[str, Any]:
        """`{"text"}` → `{"label", "score", "scores"}`, `{"texts"}` → `{"predictions": […]}`; embeddings on request."""
        answer: dict[str, Any] = await reply(self.labeller.answer, body.model_extra or {}, inline=False)
        return answer
