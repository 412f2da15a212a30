"""Serve a Hugging Face folder that classifies or embeds texts, with ONNX Runtime on the CPU."""

from __future__ import annotations

from typing import Any

import bentoml

from bentos import serving
from bentos.serving import texts
from bentos.serving.bodies import reply
from bentos.serving.schema import inputs_schema, outputs_schema

_VECTOR = {"type": "array", "items": {"type": "number"}}
_ROW = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": texts.MAX_CHARACTERS},
        {
            "type": "object",
            "properties": {"text": {"type": "string"}, "text_pair": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        },
    ]
}


@serving.offer
@bentoml.service(name="transformers", image=serving.image(__file__))
class Transformers:
    def __init__(self) -> None:
        self.model = Model(serving.folder(__file__))
        self.about = self.model.about

    @bentoml.api(route="/predict")
    async def predict(self, inputs: list[Any]) -> dict[str, list[Any]]:
        """One value per text: `{"label", "score", "scores"}` of a classifier, a vector of an encoder."""
        answer: dict[str, list[Any]] = await reply(self.model.answer, inputs, inline=False)
        return answer


class Model:
    """What the kind answers. Raises StartError `model_load_failed` when the folder cannot be served."""

    def __init__(self, folder: serving.ModelFolder) -> None:
        self.network = texts.TextModel.load(folder)
        labels = self.network.labels
        self.about = serving.About(
            kind="transformers",
            format=folder.format,
            folder=folder,
            input=inputs_schema(_ROW),
            output=outputs_schema(_VECTOR if labels is None else {"type": "object"}),
            classes=labels,
            example={"inputs": ["How are you today?"]},
            details=self.network.details(),
        )

    def answer(self, inputs: Any) -> dict[str, Any]:
        """`outputs`, one a text; `truncated` lists the rows whose end the model did not read, if there are any."""
        rows = texts.checked_all(inputs, "inputs", _row)
        given = self.network(rows, "inputs[{}]".format)
        labels = self.network.labels
        outputs = given.values.tolist() if labels is None else [labelled(labels, row) for row in given.values.tolist()]
        return {"outputs": outputs, **({"truncated": list(given.cut)} if given.cut else {})}


def labelled(labels: tuple[str, ...], scores: list[float]) -> dict[str, Any]:
    best = max(range(len(scores)), key=scores.__getitem__)
    return {"label": labels[best], "score": scores[best], "scores": dict(zip(labels, scores, strict=True))}


def _row(value: Any, place: str) -> texts.Text:
    if not isinstance(value, dict):
        return texts.checked(value, place)
    for name in value:
        if name not in ("text", "text_pair"):
            raise serving.Problem(
                "unknown_column", f"{place} has a field {name!r}", field=f"{place}.{name}", hint="send text, text_pair"
            )
    if "text" not in value:
        raise serving.Problem("missing_column", f"{place} has no text", field=f"{place}.text", hint="send a text")
    first = texts.checked(value["text"], f"{place}.text")
    return (first, texts.checked(value["text_pair"], f"{place}.text_pair")) if "text_pair" in value else first
