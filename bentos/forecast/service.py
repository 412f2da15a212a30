"""Forecast the demand of items in stores for the next days."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.forecast import forecasting
from bentos.serving.bodies import Body, reply

_INLINE_ROWS = 200
"""Up to here checking and forecasting take about two milliseconds."""


@serving.offer
@bentoml.service(name="forecast", image=serving.image(__file__))
class Forecast:
    def __init__(self) -> None:
        folder = serving.folder(__file__)
        self.forecaster = forecasting.Forecaster.load(folder.path())
        stores, items = self.forecaster.categories
        self.about = serving.About(
            kind="forecast",
            format="lightgbm-text",
            folder=folder,
            input=self.forecaster.input_schema(),
            output=self.forecaster.output_schema(),
            example=self.forecaster.example(),
            details={
                "stores": list(stores),
                "items": list(items),
                "longest_horizon": self.forecaster.longest,
                "trees": self.forecaster.booster.num_trees(),
            },
        )

    @bentoml.api(route="/predict")
    async def predict(self, body: Body, /) -> dict[str, Any]:
        """`{"history", "horizon", "future"}` → `{"forecast": [{"date", "store", "item", "sales"}, …]}`."""
        request = body.model_extra or {}
        history = request.get("history")
        short = not isinstance(history, list) or len(history) <= _INLINE_ROWS
        answer: dict[str, Any] = await reply(self.forecaster.answer, request, inline=short)
        return answer
