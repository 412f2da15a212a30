"""What a build is told and what it answers: the JSON of docs/design.md §7, checked at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Compression = Literal["gzip", "zstd", "none"]


class _Frozen(BaseModel):
    # built when used: a weights-only build uses few of these models, and building all takes longer than its pushes
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class ModelFolder(_Frozen):
    """A model folder: manifest.json, files/, and optionally sample.json, expected.json, requirements/."""

    dir: Path


class Kind(_Frozen):
    """The kind to serve it with. For an own project the name is `project` and the folder is not read."""

    name: str
    dir: Path


class Cache(_Frozen):
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


class Push(_Frozen):
    """Where an image goes. `insecure` allows plain http; `ca` is a PEM file of a private authority."""

    ref: str
    insecure: bool = False
    ca: Path | None = None


class ImageOrder(_Frozen):
    base: Path
    platform: str = "linux/amd64"
    push: Push | None = None
    output: Path | None = None
    compression: Compression = "zstd"


class BuildSpec(_Frozen):
    """One build. Unknown fields are refused, not ignored."""

    schema_: Literal["ekiben.build.v1"] = Field(alias="schema")
    work: Path
    result: Path
    model: ModelFolder
    kind: Kind
    serving: Path
    cache: Cache
    allow_code: bool = False
    lock: str | None = None
    image: ImageOrder | None = None


class BuiltBento(_Frozen):
    dir: Path
    digest: str
    tag: str


class BuiltEnvironment(_Frozen):
    dir: Path
    python: str
    lock_digest: str


class BuiltLayer(_Frozen):
    name: str
    digest: str
    size: int
    reused: bool


class BuiltImage(_Frozen):
    ref: str | None
    digest: str
    size: int
    layers: tuple[BuiltLayer, ...]


class Stage(_Frozen):
    stage: str
    seconds: float


class BuildResult(BaseModel):
    """What result.json holds after a build that succeeded. `schema` is the service's, as BentoML describes it.

    `bento` and `environment` are always there after a build without `image`; one with `image` makes them only where
    no code layer of that Bento was found, and names what it has.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, defer_build=True)

    identity: str
    bento: BuiltBento | None
    environment: BuiltEnvironment | None
    lock: str
    predict: str
    schema_: dict[str, Any] = Field(alias="schema")
    image: BuiltImage | None
    stages: tuple[Stage, ...]
