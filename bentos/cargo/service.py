"""Tell the material in a hold from a picture, sent along or named in the picture store."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import bentoml
import numpy as np
from numpy.typing import NDArray

from bentos import serving
from bentos.cargo import classifier, store
from bentos.serving import pictures
from bentos.serving.batches import Batches
from bentos.serving.bodies import check_names, respond
from bentos.serving.uploads import PICTURE, Upload


@serving.offer
@bentoml.service(name="cargo", image=serving.image(__file__))
class Cargo:
    def __init__(self) -> None:
        folder = serving.folder(__file__)
        self.store = store.find(os.environ, folder)
        self.classifier = classifier.Classifier.load(folder)
        self.batches = Batches(self.classifier.network.run, most=classifier.MOST)
        materials, network = self.classifier.materials, self.classifier.network
        self.about = serving.About(
            kind="cargo",
            format="keras-v3",
            folder=folder,
            input=classifier.input_schema(),
            output=classifier.output_schema(materials),
            classes=list(materials),
            details={
                "picture_store": self.store.kind,
                "height": network.height,
                "width": network.width,
                "parameters": network.parameters,
                **network.sharing,
            },
        )

    @bentoml.api(route="/predict")
    async def predict(self, upload: Upload, /) -> dict[str, Any]:
        """A picture, or `{"image_path"}` → `{"label", "name", "probabilities"}`."""
        answer: dict[str, Any] = await respond(self._answer(upload))
        return answer

    async def _answer(self, upload: Upload) -> dict[str, Any]:
        from anyio.to_thread import run_sync

        pixels = await run_sync(self._pixels, upload.fields())
        answers = await self.batches(pixels[None])
        return self.classifier.document(answers[0])

    def _pixels(self, fields: Mapping[str, Any]) -> NDArray[np.uint8]:
        check_names(fields, (PICTURE, store.FIELD))
        network = self.classifier.network
        if store.FIELD not in fields:
            return pictures.read(pictures.given(fields), network.height, network.width)
        if PICTURE in fields:
            detail = f"the request has both {PICTURE} and {store.FIELD}"
            raise serving.Problem("several_pictures", detail, field=store.FIELD, hint="send one of them")
        return pictures.read(self.store.read(fields[store.FIELD]), network.height, network.width, store.FIELD)
