"""A trained network as it is served: pictures in, the probability of a violation and a decision out."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.serving import ModelFolder, Problem, StartError, pictures
from bentos.serving.bodies import check_names
from bentos.serving.networks import Network
from bentos.serving.pictures import PICTURE

NETWORK = "violation.keras"
ABOUT = "model.json"
CLASSES = ("animal", "violation")
"""What the picture shows; the network gives the probability of the second."""
SEVERAL = "pictures"
MOST = 32
"""Pictures in one request, and in one call of the network."""


@dataclass(frozen=True)
class Decision:
    """How a probability becomes a decision; the file ABOUT beside the network."""

    threshold: float
    """From this probability on a picture is a violation."""
    rule: str
    """How the threshold was chosen."""
    temperature: float
    """By which the network's logits were divided; its probabilities are calibrated already."""

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    @classmethod
    def read(cls, folder: ModelFolder) -> Decision:
        """Raises StartError `model_load_failed`."""
        hint = f'{ABOUT} holds {{"threshold": 0.5, "rule": "how it was chosen", "temperature": 1.0}}'
        if ABOUT not in folder.files:
            message = f"a violation model has {ABOUT} beside its network; this version has {', '.join(folder.files)}"
            raise StartError("model_load_failed", message[:500], hint)
        try:
            found = json.loads(folder.path(ABOUT).read_bytes())
            decision = cls(float(found["threshold"]), str(found["rule"]), float(found["temperature"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StartError("model_load_failed", f"{ABOUT} cannot be read: {error!r}"[:500], hint) from error
        if not 0 < decision.threshold < 1:
            message = f"the threshold in {ABOUT} is {decision.threshold}, not between 0 and 1"
            raise StartError("model_load_failed", message, hint)
        return decision


@dataclass(frozen=True)
class Request:
    """The pictures of a request as the network takes them, [n, height, width, 3]."""

    pixels: NDArray[np.uint8]
    several: bool
    """They came as a list, and are answered as one."""


@dataclass(frozen=True)
class Detector:
    network: Network
    decision: Decision

    @classmethod
    def load(cls, folder: ModelFolder) -> Detector:
        """Raises StartError `model_load_failed`."""
        decision = Decision.read(folder)
        path = folder.model_file(lambda name: name.endswith(".keras"))
        network = Network.load(folder.path(path), MOST)
        if network.shape != (1,):
            message = f"{path} gives {list(network.shape)} values a picture; one probability is needed"
            raise StartError("model_load_failed", message, "end it with one unit and a sigmoid")
        return cls(network, decision)

    def probabilities(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """[n, height, width, 3] → [n], each from 0 to 1."""
        return self.network.run(pixels)[:, 0]

    def parse(self, fields: Mapping[str, Any]) -> Request:
        """Decodes the pictures of a request. Raises Problem."""
        check_names(fields, (PICTURE, SEVERAL))
        if SEVERAL not in fields:
            return Request(self._read(pictures.given(fields), PICTURE)[None], several=False)
        if PICTURE in fields:
            detail = f"the request has both {PICTURE} and {SEVERAL}"
            raise Problem("several_pictures", detail, field=SEVERAL, hint="send one of them")
        given = fields[SEVERAL]
        if not isinstance(given, list) or not 1 <= len(given) <= MOST:
            detail = f"{SEVERAL} is not a list of 1 to {MOST} pictures"
            raise Problem("invalid_field", detail, field=SEVERAL, hint="send JSON with each picture in base64")
        names = [f"{SEVERAL}[{i}]" for i in range(len(given))]
        read = [self._read(pictures.from_base64(text, name), name) for text, name in zip(given, names, strict=True)]
        return Request(np.stack(read), several=True)

    def document(self, request: Request, probabilities: NDArray[np.float32]) -> dict[str, Any]:
        """The response body. Raises Problem `prediction_not_finite`."""
        said = [self._said(float(each), i, request) for i, each in enumerate(probabilities)]
        return {"outputs": said} if request.several else said[0]

    def _read(self, data: bytes, field: str) -> NDArray[np.uint8]:
        return pictures.read(data, self.network.height, self.network.width, field)

    def _said(self, probability: float, i: int, request: Request) -> dict[str, Any]:
        if not math.isfinite(probability):
            field = f"{SEVERAL}[{i}]" if request.several else PICTURE
            raise Problem("prediction_not_finite", f"the model gives no finite value for {field}", field=field)
        return {"probability": probability, "violation": probability >= self.decision.threshold}


def input_schema() -> dict[str, Any]:
    """Of the JSON body."""
    picture = {"type": "string", "contentEncoding": "base64", "description": "JPEG, PNG or WebP in base64"}
    return {
        "type": "object",
        "properties": {PICTURE: picture, SEVERAL: {"type": "array", "items": picture, "minItems": 1, "maxItems": MOST}},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def output_schema() -> dict[str, Any]:
    said = {
        "type": "object",
        "properties": {"probability": {"type": "number", "minimum": 0, "maximum": 1}, "violation": {"type": "boolean"}},
        "required": ["probability", "violation"],
    }
    several = {"type": "object", "properties": {"outputs": {"type": "array", "items": said}}, "required": ["outputs"]}
    return {"anyOf": [said, several]}
