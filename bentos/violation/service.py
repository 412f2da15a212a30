"""Tell whether a picture shows no animal."""

from __future__ import annotations

from typing import Any

import bentoml
from anyio.to_thread import run_sync

from bentos import serving
from bentos.serving.batches import Batches
from bentos.serving.bodies import respond
from bentos.serving.uploads import Upload
from bentos.violation import detector


@serving.offer
@bentoml.service(name="violation", image=serving.image(__file__))
class Violation:
    def __init__(self) -> None:
        folder = serving.folder(__file__)
        self.detector = detector.Detector.load(folder)
        self.probabilities = Batches(self.detector.probabilities, detector.MOST)
        network, decision = self.detector.network, self.detector.decision
        self.about = serving.About(
            kind="violation",
            format="keras-v3",
            folder=folder,
            input=detector.input_schema(),
            output=detector.output_schema(),
            classes=list(detector.CLASSES),
            details={
                "threshold": decision.threshold,
                "threshold_rule": decision.rule,
                "temperature": decision.temperature,
                "height": network.height,
                "width": network.width,
                "parameters": network.parameters,
                **network.sharing,
            },
        )

    @bentoml.api(route="/predict")
    async def predict(self, upload: Upload, /) -> dict[str, Any]:
        """A picture → `{"probability", "violation"}`; a list of `pictures` → `{"outputs": [the same, …]}`."""
        answer: dict[str, Any] = await respond(self._answer(upload))
        return answer

    async def _answer(self, upload: Upload) -> dict[str, Any]:
        request = await run_sync(self.detector.parse, upload.fields())
        return self.detector.document(request, await self.probabilities(request.pixels))
