"""Labels for texts, in one of three ways; the version's files say which.

    a classifier        the network itself has classes (config.json: …ForSequenceClassification)
    a head              text.json has `head`: a linear layer on the embedding, as bentos.text.train fits it
    descriptions        text.json has `labels`: sentences for each, which a text is compared with; nothing is trained

Without any of these an encoder answers with embeddings alone. text.json:

    {"head": {"labels": ["ham", "spam"], "weights": [[…], […]], "bias": [0.1, -0.1]}}
    {"labels": {"spam": ["an unsolicited advertisement"], "ham": ["a message of a friend"]}, "scale": 20}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.serving import ModelFolder, Problem, StartError, texts
from bentos.serving.bodies import check_names

FILE = "text.json"
SCALE = 20.0
"""Of similarities before the softmax: a difference of 0.1 is odds of e² to 1."""

_FIELDS = ("text", "texts", "embedding")
_HINT = 'write text.json as {"labels": {"a label": ["a sentence for it"], …}} or with a "head", and upload it again'
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """A linear layer on embeddings: `weights` [classes, width], `bias` [classes]. Odds by softmax."""

    labels: tuple[str, ...]
    weights: Scores
    bias: Scores
    way: str = "head"

    def __call__(self, vectors: Scores) -> Scores:
        return texts.softmax(vectors @ self.weights.T + self.bias)

    def document(self) -> dict[str, Any]:
        """As it stands in text.json."""
        return {"labels": list(self.labels), "weights": self.weights.tolist(), "bias": self.bias.tolist()}


def by_descriptions(model: texts.TextModel, labels: Mapping[str, Sequence[str]], scale: float = SCALE) -> Head:
    """The head that compares a text with the mean direction of each label's sentences, by cosine."""
    means = [model(list(sentences)).values.mean(axis=0) for sentences in labels.values()]
    weights = texts.unit(np.stack(means)) * scale
    return Head(tuple(labels), weights, np.zeros(len(labels)), "descriptions")


class Labeller:
    """A text model with its labels, if it has any."""

    def __init__(self, model: texts.TextModel, head: Head | None) -> None:
        self.model = model
        self.head = head
        self.labels = head.labels if head else model.labels

    @classmethod
    def load(cls, folder: ModelFolder) -> Labeller:
        """Raises StartError `model_load_failed`."""
        model = texts.TextModel.load(folder)
        return cls(model, _head(model, folder))

    @property
    def way(self) -> str:
        if self.head is not None:
            return self.head.way
        return "classifier" if self.model.labels is not None else "none"

    def scores(self, vectors: Scores) -> Scores:
        """Odds of the labels for embeddings, [n, labels]; what a classifier gives are odds already."""
        if self.head is None:
            return vectors
        return self.head(texts.unit(vectors) if self.head.way == "descriptions" else vectors)

    def answer(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises Problem naming the field that is wrong."""
        check_names(body, _FIELDS)
        wanted = body.get("embedding", False)
        if not isinstance(wanted, bool):
            raise Problem("wrong_type", "embedding is not true or false", field="embedding", hint="send true or false")
        if wanted and self.model.labels is not None:
            hint = "leave embedding out, or upload an embedding model"
            raise Problem("no_embedding", "this model is a classifier without embeddings", field="embedding", hint=hint)
        if "text" in body and "texts" in body:
            raise Problem("invalid_field", "text and texts are both there", field="texts", hint="send one of them")
        if "texts" in body:
            rows = texts.checked_all(body["texts"], "texts")
            return {"predictions": self._answers(rows, wanted, "texts[{}]")}
        if "text" not in body:
            hint = 'send {"text": "…"}, or {"texts": ["…", "…"]}'
            raise Problem("missing_field", "text is missing", field="text", hint=hint)
        return self._answers([texts.checked(body["text"], "text")], wanted, "text")[0]

    def _answers(self, rows: list[texts.Text], wanted: bool, place: str) -> list[dict[str, Any]]:
        given = self.model(rows, place.format)
        answers: list[dict[str, Any]] = [{} for _ in rows]
        if self.labels is not None:
            for answer, odds in zip(answers, self.scores(given.values).tolist(), strict=True):
                best = max(range(len(odds)), key=odds.__getitem__)
                by_label = dict(zip(self.labels, odds, strict=True))
                answer |= {"label": self.labels[best], "score": odds[best], "scores": by_label}
        if wanted or self.labels is None:
            for answer, vector in zip(answers, given.values.tolist(), strict=True):
                answer["embedding"] = vector
        for row in given.cut:
            answers[row]["truncated"] = True
        return answers

    def input_schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1, "maxLength": texts.MAX_CHARACTERS}
        properties: dict[str, Any] = {
            "text": text,
            "texts": {"type": "array", "items": text, "minItems": 1, "maxItems": texts.MAX_TEXTS},
        }
        if self.model.labels is None:
            properties["embedding"] = {"type": "boolean", "default": False}
        return {
            "type": "object",
            "properties": properties,
            "oneOf": [{"required": ["text"]}, {"required": ["texts"]}],
            "additionalProperties": False,
        }

    def output_schema(self) -> dict[str, Any]:
        properties: dict[str, Any] = {"truncated": {"const": True}}
        required = []
        if self.labels is not None:
            number = {"type": "number"}
            properties |= {
                "label": {"enum": list(self.labels)},
                "score": number,
                "scores": {"type": "object", "properties": dict.fromkeys(self.labels, number)},
            }
            required = ["label", "score", "scores"]
        if self.model.labels is None:
            size = self.model.width
            properties["embedding"] = {"type": "array", "items": {"type": "number"}, "minItems": size, "maxItems": size}
            required = required or ["embedding"]
        one = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        many = {
            "type": "object",
            "properties": {"predictions": {"type": "array", "items": one}},
            "required": ["predictions"],
            "additionalProperties": False,
        }
        return {"type": "object", "anyOf": [one, many]}


def _head(model: texts.TextModel, folder: ModelFolder) -> Head | None:
    path = f"{model.pretrained.root}{FILE}"
    if path not in folder.files:
        return None
    try:
        body = json.loads(folder.path(path).read_bytes())
        if not isinstance(body, dict) or ("head" in body) == ("labels" in body):
            raise ValueError("it needs either head or labels")
        if model.labels is not None:
            raise ValueError("the network is a classifier with labels of its own")
        return _linear(body["head"], model.width) if "head" in body else _described(model, body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StartError("model_load_failed", f"text.json cannot be used: {error}", _HINT) from error
    except Problem as problem:
        raise StartError("model_load_failed", f"text.json cannot be used: {problem.detail}", _HINT) from problem


def _linear(body: Mapping[str, Any], width: int) -> Head:
    labels = tuple(str(label) for label in body["labels"])
    weights, bias = np.asarray(body["weights"], np.float64), np.asarray(body["bias"], np.float64)
    if len(set(labels)) != len(labels) or len(labels) < 2:
        raise ValueError("its labels must be two or more different texts")
    if weights.shape != (len(labels), width) or bias.shape != (len(labels),):
        raise ValueError(f"weights must be {len(labels)} × {width}, and bias {len(labels)} numbers")
    if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
        raise ValueError("a weight is not finite")
    return Head(labels, weights, bias)


def _described(model: texts.TextModel, body: Mapping[str, Any]) -> Head:
    scale = float(body.get("scale", SCALE))
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError("scale is not a positive number")
    labels: dict[str, list[str]] = {}
    for label, sentences in body["labels"].items():
        given = texts.checked_all([sentences] if isinstance(sentences, str) else sentences, f"labels.{label}")
        labels[label] = [text for text in given if isinstance(text, str)]
    if len(labels) < 2:
        raise ValueError("it needs two or more labels")
    return by_descriptions(model, labels, scale)
