"""Requests and answers of the API, as OpenAPI shows them."""

from __future__ import annotations

from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from build_service.quantities import check_cpu, parse_memory

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    items: list[Item]
    next: str | None = Field(None, description="Cursor of the next page, to be sent as ?after=; null at the end.")


class StoredFile(BaseModel):
    path: str
    size: int = Field(description="Bytes.")
    sha256: str


class Checked(BaseModel):
    """Outcome of the golden sample."""

    verified: str = Field(description="expected | sample | synthetic | none")
    rows: int = 0
    matched: int = 0


class Seconds(BaseModel):
    """How long the stages took."""

    upload: float | None = None
    build: float | None = None
    rollout: float | None = None


class VersionView(BaseModel):
    model: str
    version: int
    digest: str
    kind: str
    format: str
    state: str = Field(description="queued | building | built | rolling | live | superseded | rolled_back | failed")
    size: int
    created: str
    labels: dict[str, str]
    files: list[StoredFile]
    signature: dict[str, Any] | None = None
    verified: str | None = None
    checked: Checked | None = None
    build: str | None = None
    stage: str | None = Field(None, description="What the build is doing.")
    code: str | None = None
    reason: str | None = None
    hint: str | None = None
    url: str
    docs: str
    logs: str
    seconds: Seconds


class LabelsRequest(BaseModel):
    """What is learnt about a version after its upload; all the rest of it never changes."""

    model_config = ConfigDict(extra="forbid")

    labels: dict[str, str | None] = Field(description="Labels to set; null takes one away. Others stay as they are.")


class UploadRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    filename: str = Field(min_length=1, max_length=1024, description="Name of the file, as in a form.")
    size: int | None = Field(None, gt=0, le=2**63 - 1, description="Bytes of the whole file, to be checked.")
    sha256: str | None = Field(
        None, pattern=r"^[0-9a-fA-F]{64}$", description="SHA-256 of the whole file in hex, to be checked."
    )


class PartView(BaseModel):
    number: int = Field(description="From 1.")
    size: int = Field(description="Bytes.")
    sha256: str | None = Field(description="In hex; null where the object store keeps none.")


class UploadView(BaseModel):
    id: str
    filename: str | None
    size: int | None = Field(description="Bytes that were announced.")
    sha256: str | None = Field(description="The digest that was announced.")
    part_size: int = Field(description="Bytes of a part that suit this file; 5 to 64 MiB are taken.")
    received: int = Field(description="Bytes of the parts that are there.")
    parts: list[PartView]


class ModelView(BaseModel):
    name: str
    latest: int
    live: int | None
    kind: str
    versions: int
    url: str


class BuildView(BaseModel):
    id: str
    model: str
    version: int
    identity: str
    state: str = Field(description="queued | running | succeeded | failed | cancelled")
    stage: str | None
    stages: list[dict[str, Any]]
    attempts: int
    code: str | None
    reason: str | None
    hint: str | None
    image: dict[str, Any] | None = None
    created: str
    finished: str | None
    logs: str


class Push(BaseModel):
    model_config = ConfigDict(extra="forbid")

    ref: str = Field(min_length=3, max_length=512, pattern=r"^[A-Za-z0-9._\-/:@\[\]]+$")
    insecure: bool = False


class ImageRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    base: str | None = Field(None, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    platform: Literal["linux/amd64", "linux/arm64"] = "linux/amd64"
    push: Push | None = None
    output: str | None = Field(None, max_length=4096, description="Path of a file on the server's machine.")
    compression: Literal["gzip", "zstd", "none"] = "zstd"


class BuildRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    image: ImageRequest | None = None


class Target(BaseModel):
    model: str
    version: int


class Resources(BaseModel):
    """Amounts in Kubernetes' notation."""

    model_config = ConfigDict(extra="forbid")

    cpu: str | None = None
    memory: str | None = None
    gpu: int | None = Field(None, ge=0, le=64, description="Whole GPUs.")

    def amounts(self) -> dict[str, str]:
        return {name: str(value) for name, value in self.model_dump(exclude_none=True).items()}

    @field_validator("cpu")
    @classmethod
    def _cpu(cls, value: str | None) -> str | None:
        return value if value is None else check_cpu(value)

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None:
            parse_memory(value)
        return value


class Autoscale(BaseModel):
    """More replicas while they are busy."""

    model_config = ConfigDict(extra="forbid")

    max: int = Field(ge=2, le=64, description="Replicas at most; `replicas` are the least.")
    cpu: int = Field(70, ge=10, le=100, description="Percent of the reserved CPU that replicas shall be at.")


class DeploymentRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: int = Field(ge=1, le=2**31 - 1)
    model: str | None = Field(None, description="Default: the model of the deployment's name.")
    replicas: int = Field(1, ge=1, le=64)
    resources: Resources = Resources()
    strategy: Literal["rolling", "replace"] = "rolling"
    autoscale: Autoscale | None = Field(None, description="On Kubernetes: a HorizontalPodAutoscaler.")
    default: bool | None = Field(None, description="Answer /inference/PATH too.")


class RollbackRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    revision: int | None = Field(None, ge=1, le=2**31 - 1, description="Default: the one that was live before.")


class DeploymentView(BaseModel):
    name: str
    state: str = Field(description="pending | rolling | live | rolled_back | failed")
    default: bool
    target: Target
    wanted: Target
    revision: int
    replicas: int
    ready: int
    resources: dict[str, str]
    strategy: str
    autoscale: Autoscale | None
    code: str | None
    reason: str | None
    hint: str | None
    url: str
    docs: str
    logs: str
    updated: str


class RevisionView(BaseModel):
    revision: int
    model: str
    version: int
    state: str
    reason: str | None
    created: str
    rollback_of: int | None


class EventView(BaseModel):
    time: str
    type: str
    reason: str
    message: str


class KindView(BaseModel):
    name: str
    title: str
    description: str
    generic: bool
    formats: list[str]
    device: str


class TokenRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=64)


class TokenView(BaseModel):
    id: str
    name: str
    created: str
    revoked: bool
    token: str | None = Field(None, description="Shown once, when it is made.")
