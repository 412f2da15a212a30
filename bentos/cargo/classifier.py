"""A trained network as it is served: pixels in, material and probabilities out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.serving import ModelFolder, StartError
from bentos.serving.networks import Network

NETWORK = "cargo.keras"
ABOUT = "model.json"
MOST = 32
"""Pictures in one call of the network."""


@dataclass(frozen=True)
class Classifier:
    """A network that answers with one probability for each of `materials`."""

    network: Network
    materials: tuple[str, ...]
    """By label."""

    @classmethod
    def load(cls, folder: ModelFolder) -> Classifier:
        """Raises StartError `model_load_failed`."""
        for name in (NETWORK, ABOUT):
            if name not in folder.files:
                message = f"a cargo model holds {NETWORK} and {ABOUT}; this version has {', '.join(folder.files)}"
                raise StartError("model_load_failed", message[:500], "train one: python -m bentos.cargo.train")
        try:
            materials = json.loads(folder.path(ABOUT).read_bytes())["materials"]
            if not materials or not all(isinstance(name, str) for name in materials):
                raise ValueError("materials is no list of names")
        except (OSError, ValueError, KeyError, TypeError) as error:
            message = f"{ABOUT} cannot be read: {error!r}"
            hint = f'{ABOUT} holds {{"materials": [NAME, …]}}, in the order of the network\'s outputs'
            raise StartError("model_load_failed", message[:500], hint) from error
        network = Network.load(folder.path(folder.model_file(lambda name: name == NETWORK)), most=MOST)
        if network.shape != (len(materials),):
            message = f"{NETWORK} answers with {list(network.shape)} values a picture; {ABOUT} names {len(materials)}"
            raise StartError("model_load_failed", message, f"name each output in {ABOUT}")
        return cls(network, tuple(materials))

    def document(self, answer: NDArray[np.float32]) -> dict[str, Any]:
        """The response for one picture's probabilities."""
        label = int(answer.argmax())
        named = dict(zip(self.materials, map(float, answer), strict=True))
        return {"label": label, "name": self.materials[label], "probabilities": named}


def about_bytes(materials: Sequence[str]) -> bytes:
    """The file ABOUT."""
    return (json.dumps({"materials": list(materials)}, indent=2) + "\n").encode()


def input_schema() -> dict[str, Any]:
    """Of the JSON body."""
    picture = {"type": "string", "contentEncoding": "base64", "description": "JPEG, PNG or WebP in base64"}
    path = {"type": "string", "description": "path of a picture in the picture store"}
    return {
        "type": "object",
        "properties": {"picture": picture, "image_path": path},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def output_schema(materials: Sequence[str]) -> dict[str, Any]:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    return {
        "type": "object",
        "properties": {
            "label": {"type": "integer", "minimum": 0, "maximum": len(materials) - 1},
            "name": {"enum": list(materials)},
            "probabilities": {
                "type": "object",
                "properties": dict.fromkeys(materials, share),
                "required": list(materials),
            },
        },
        "required": ["label", "name", "probabilities"],
    }
