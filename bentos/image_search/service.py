"""The pictures of a catalogue that are most like a given one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import bentoml
from anyio.to_thread import run_sync

from bentos import serving
from bentos.image_search import catalogue, searching
from bentos.serving.batches import Batches
from bentos.serving.bodies import respond
from bentos.serving.uploads import Upload

_MOST = 32


@serving.offer
@bentoml.service(name="image_search", image=serving.image(__file__))
class ImageSearch:
    def __init__(self) -> None:
        folder = serving.folder(__file__)
        self.search = searching.Search.load(folder, _MOST)
        self.vectors = Batches(self.search.network.run, _MOST)
        known = self.search.catalogue
        self.about = serving.About(
            kind="image_search",
            format="keras-v3",
            folder=folder,
            input=self.search.input_schema(),
            output=self.search.output_schema(),
            example={"id": known.ids[0], "k": 3},
            details={
                "pictures": len(known.ids),
                "dimension": known.dimension,
                "distance": catalogue.METRIC,
                "recall_10": known.recall,
                "largest_k": searching.MAX_K,
                "height": self.search.network.height,
                "width": self.search.network.width,
                "parameters": self.search.network.parameters,
                **self.search.network.sharing,
                "network_sha256": known.network,
            },
        )

    @bentoml.api(route="/predict")
    async def predict(self, upload: Upload, /) -> dict[str, Any]:
        """A picture or the id of one, and `k` → `{"similar": [{"id", "distance"}, …]}`, nearest first."""
        answer: dict[str, Any] = await respond(self._answer(upload))
        return answer

    async def _answer(self, upload: Upload) -> Mapping[str, Any]:
        query = self.search.parse(upload.fields())
        if query.position is not None:
            return searching.document(self.search.of_position(query.position, query.k))
        assert query.picture is not None
        pixels = await run_sync(self.search.pixels, query.picture)
        (vector,) = await self.vectors(pixels)
        return searching.document(self.search.of_picture(vector, query.k))
