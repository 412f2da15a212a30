"""Order pictures for a search phrase and a user."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.ranker import ranking
from bentos.serving.bodies import Body, reply

_INLINE_CANDIDATES = 50
"""Up to here checking and ranking take about a millisecond."""


@serving.offer
@bentoml.service(name="ranker", image=serving.image(__file__))
class Ranker:
    def __init__(self) -> None:
        folder = serving.folder(__file__)
        self.ranker = ranking.Ranker.load(folder.path())
        self.about = serving.About(
            kind="ranker",
            format="lightgbm-text",
            folder=folder,
            input=self.ranker.input_schema(),
            output=self.ranker.output_schema(),
            example=self.ranker.example(),
            details={"features": list(self.ranker.columns.names), "trees": self.ranker.booster.num_trees()},
        )

    @bentoml.api(route="/predict")
    async def predict(self, body: Body, /) -> dict[str, Any]:
        """`{"phrase", "user", "candidates"}` → `{"ranking": [{"id", "score"}, …]}`, best first."""
        request = body.model_extra or {}
        candidates = request.get("candidates")
        short = not isinstance(candidates, list) or len(candidates) <= _INLINE_CANDIDATES
        answer: dict[str, Any] = await reply(self.ranker.answer, request, inline=short)
        return answer
