"""What a build is told and what it answers: the JSON of docs/design.md §7, checked at the edge.

Plain dataclasses: importing pydantic takes longer than all the pushes of a weights-only build
(docs/decisions/0104-little-to-import.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Compression = Literal["gzip", "zstd", "none"]
T = TypeVar("T")


class BadSpec(ValueError):
    """A spec that is not as docs/design.md §7 says; names the field."""


@dataclass(frozen=True)
class ModelFolder:
    """A model folder: manifest.json, files/, and optionally sample.json, expected.json, requirements/."""

    dir: Path


@dataclass(frozen=True)
class Kind:
    """The kind to serve it with. For an own project the name is `project` and the folder is not read."""

    name: str
    dir: Path


@dataclass(frozen=True)
class Cache:
    """Folders that outlive a build; everything in them is named by content."""

    environments: Path
    bentos: Path

    @property
    def locks(self) -> Path:
        """Resolutions made before."""
        return self.environments / "locks"

    @property
    def layers(self) -> Path:
        """Layers of images, and what is known of those in a registry."""
        return self.environments / "layers"


@dataclass(frozen=True)
class Push:
    """Where an image goes. `insecure` allows plain http; `ca` is a PEM file of a private authority."""

    ref: str
    insecure: bool = False
    ca: Path | None = None


@dataclass(frozen=True)
class ImageOrder:
    base: Path
    platform: str = "linux/amd64"
    push: Push | None = None
    output: Path | None = None
    compression: Compression = "zstd"


@dataclass(frozen=True)
class BuildSpec:
    """One build. Unknown fields are refused, not ignored."""

    schema: Literal["ekiben.build.v1"]
    work: Path
    result: Path
    model: ModelFolder
    kind: Kind
    serving: Path
    cache: Cache
    allow_code: bool = False
    allowed_packages: tuple[str, ...] = ()
    """Names of packages that a kind's version may require without `allow_code`."""
    lock: str | None = None
    image: ImageOrder | None = None

    @classmethod
    def parse(cls, data: bytes) -> BuildSpec:
        """Raises BadSpec."""
        try:
            value = json.loads(data)
        except ValueError as error:
            raise BadSpec(f"the spec is not JSON: {error}") from error
        return _read(cls, value, "the spec")


@dataclass(frozen=True)
class BuiltBento:
    dir: Path
    digest: str
    tag: str


@dataclass(frozen=True)
class BuiltEnvironment:
    dir: Path
    python: str
    lock_digest: str


@dataclass(frozen=True)
class BuiltLayer:
    name: str
    digest: str
    size: int
    reused: bool


@dataclass(frozen=True)
class BuiltImage:
    ref: str | None
    digest: str
    size: int
    layers: tuple[BuiltLayer, ...]


@dataclass(frozen=True)
class Stage:
    stage: str
    seconds: float


@dataclass(frozen=True)
class BuildResult:
    """What result.json holds after a build that succeeded. `schema` is the service's, as BentoML describes it.

    `bento` and `environment` are always there after a build without `image`; one with `image` makes them only where
    no code layer of that Bento was found, and names what it has.
    """

    identity: str
    bento: BuiltBento | None
    environment: BuiltEnvironment | None
    lock: str
    predict: str
    schema: Mapping[str, Any]
    image: BuiltImage | None
    stages: tuple[Stage, ...]


def plain(value: object) -> Any:
    """A result, or a part of one, as JSON knows it."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def _read(kind: type[T], value: object, at: str) -> T:
    """A dataclass of a JSON object that has its fields and no others."""
    if not isinstance(value, dict):
        raise BadSpec(f"{at} must be an object")
    inner = "" if at == "the spec" else f"{at}."
    types = get_type_hints(kind)
    if unknown := sorted(value.keys() - types.keys()):
        raise BadSpec(f"{at} has extra fields: {', '.join(inner + name for name in unknown)}")
    found = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name in value:
            found[field.name] = _value(types[field.name], value[field.name], inner + field.name)
        elif field.default is MISSING:
            raise BadSpec(f"{inner}{field.name} is missing")
    return kind(**found)


def _value(kind: Any, value: object, at: str) -> object:
    if isinstance(kind, UnionType):  # X | None
        return None if value is None else _value(get_args(kind)[0], value, at)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise BadSpec(f"{at} is {value!r}, but must be {' or '.join(map(repr, get_args(kind)))}")
        return value
    if get_origin(kind) is tuple:  # tuple[X, ...]
        if not isinstance(value, list):
            raise BadSpec(f"{at} must be a list")
        return tuple(_value(get_args(kind)[0], each, f"{at}[{i}]") for i, each in enumerate(value))
    if isinstance(kind, type) and is_dataclass(kind):
        return _read(kind, value, at)
    if not isinstance(value, str if kind is Path else kind):
        raise BadSpec(f"{at} must be {'true or false' if kind is bool else 'a text'}")
    return Path(value) if kind is Path and isinstance(value, str) else value
