"""A request for similar pictures, checked, and its answer."""

from __future__ import annotations

import base64
import io
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.image_search import catalogue
from bentos.image_search.catalogue import Catalogue, Match, Vectors
from bentos.serving import ModelFolder, Problem, StartError, pictures
from bentos.serving.bodies import check_names, whole_number
from bentos.serving.networks import Network

DEFAULT_K = 10
MAX_K = 100
_APART = 1e-4
"""By which the distances of a golden answer differ: the order of the same pictures is then the same on any machine."""
_LONGEST_GOLDEN = 5

Embed = Callable[[NDArray[np.uint8]], Awaitable[Vectors]]
"""[1, height, width, 3] → [1, dimension]."""


@dataclass(frozen=True)
class Query:
    """What is searched for: a picture or a position in the catalogue, and how many answers."""

    k: int
    picture: bytes | None = None
    position: int | None = None


def network_path(folder: ModelFolder) -> Path:
    """Return the network of a version. Raises StartError `model_load_failed`."""
    return folder.path(folder.model_file(lambda name: name == catalogue.NETWORK))


@dataclass(frozen=True)
class Search:
    """A network and the catalogue that was made with it."""

    network: Network
    catalogue: Catalogue

    @classmethod
    def load(cls, folder: ModelFolder, most: int = 32) -> Search:
        """Read the three files of a version. Raises StartError `model_load_failed` where they do not fit together."""
        missing = [n for n in (catalogue.NETWORK, catalogue.INDEX, catalogue.NAMES) if n not in folder.files]
        if missing:
            message = f"this version has no {' and no '.join(missing)}; it has: {', '.join(folder.files)[:300]}"
            hint = f"upload {catalogue.NETWORK}, {catalogue.INDEX} and {catalogue.NAMES} together"
            raise StartError("model_load_failed", message, hint)
        path = network_path(folder)
        made_with = catalogue.digest(path.read_bytes())
        known = catalogue.load(
            folder.path(catalogue.NAMES).read_bytes(), folder.path(catalogue.INDEX).read_bytes(), made_with
        )
        network = Network.load(path, most)
        if network.shape != (known.dimension,):
            message = f"{catalogue.NETWORK} gives vectors of {list(network.shape)}, the catalogue has {known.dimension}"
            raise StartError("model_load_failed", message, "build the catalogue again")
        return cls(network, known)

    def parse(self, fields: Mapping[str, Any]) -> Query:
        """What a request asks for. Raises Problem naming the field that is wrong."""
        check_names(fields, ("picture", "id", "k"))
        k = whole_number(fields, "k", default=DEFAULT_K, low=1, high=MAX_K)
        name = fields.get("id")
        hint = "send a picture, or the id of one that is in the catalogue"
        if name is None and fields.get("picture") is None:
            detail = "there is neither a picture nor an id to search for"
            raise Problem("missing_field", detail, field="picture", hint=hint)
        if name is None:
            return Query(k, picture=pictures.given(fields))
        if fields.get("picture") is not None:
            raise Problem("invalid_field", "there are both a picture and an id to search for", field="id", hint=hint)
        if said := catalogue.wrong_id(name):
            raise Problem("invalid_field", f"id {said}", field="id", hint=hint)
        position = self.catalogue.positions.get(name)
        if position is None:
            detail = f"the catalogue of {len(self.catalogue.ids)} pictures has no {name!r}"
            raise Problem("unknown_id", detail, field="id", hint=hint)
        return Query(k, position=position)

    def pixels(self, picture: bytes) -> NDArray[np.uint8]:
        """A picture as the network takes it, [1, height, width, 3]. Raises Problem."""
        return pictures.read(picture, self.network.height, self.network.width)[None]

    def of_picture(self, vector: Vectors, k: int) -> list[Match]:
        return self.catalogue.near(vector, k)

    def of_position(self, position: int, k: int) -> list[Match]:
        """Without the picture itself."""
        return self.catalogue.near(self.catalogue.vector(position), k, leave_out=position)

    def golden(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A request with the catalogue's sample and its answer, no longer than the distances stand apart."""
        picture = self.catalogue.sample
        (vector,) = self.network.run(self.pixels(picture))
        k = max(1, self.clear(vector))
        return {"picture": base64.b64encode(picture).decode(), "k": k}, document(self.of_picture(vector, k))

    def clear(self, vector: Vectors) -> int:
        """Up to how many answers, at most five, the distances stand apart: as many say the same on any machine."""
        return apart(self.of_picture(vector, _LONGEST_GOLDEN + 1), _APART)

    def input_schema(self) -> dict[str, Any]:
        k = {"type": "integer", "minimum": 1, "maximum": MAX_K, "default": DEFAULT_K, "description": "How many answers"}
        picture = {"type": "string", "contentEncoding": "base64", "description": "A JPEG, PNG or WebP picture"}
        name = {
            "type": "string",
            "minLength": 1,
            "maxLength": catalogue.LONGEST_ID,
            "description": "A picture of the catalogue; it is left out of the answer",
        }
        return {
            "type": "object",
            "properties": {"picture": picture, "id": name, "k": k},
            "additionalProperties": False,
            "oneOf": [{"required": ["picture"]}, {"required": ["id"]}],
        }

    def output_schema(self) -> dict[str, Any]:
        distance = {
            "type": "number",
            "minimum": 0,
            "description": "Cosine distance: 1 minus the cosine of the angle between the two vectors, 0 to 2",
        }
        match = {
            "type": "object",
            "properties": {"id": {"type": "string"}, "distance": distance},
            "required": ["id", "distance"],
        }
        return {
            "type": "object",
            "properties": {"similar": {"type": "array", "items": match, "maxItems": MAX_K}},
            "required": ["similar"],
        }


def apart(matches: list[Match], least: float) -> int:
    """How many of the matches, from the nearest on, are nearer than the next one by `least`."""
    steps = [after.distance - this.distance >= least for this, after in pairwise(matches)]
    return steps.index(False) if False in steps else len(steps)


def document(matches: list[Match]) -> dict[str, Any]:
    return {"similar": [{"id": match.id, "distance": match.distance} for match in matches]}


def png(pixels: NDArray[np.uint8]) -> bytes:
    """[height, width, 3] as a PNG file; the same pixels give the same bytes."""
    from PIL import Image

    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "png")
    return target.getvalue()
