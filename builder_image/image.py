"""Images as values: base and layers become a config and a manifest, pure functions of their inputs (image-format §5).

An image with a StreamedLayer has no digest yet: `config_bytes`, `manifest_bytes` and `digest` raise until it is
`sealed`, which whoever writes or pushes the layers does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from builder_image import layers as _layers
from builder_image.layers import AnyLayer, Layer
from builder_image.tarball import CREATED
from registry import digest as _digest
from registry.errors import InfrastructureError, UserError

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

LAYER_NAME = "io.ekiben.layer"
"""Annotation on a layer's descriptor: deps, code or model; base layers have none."""

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
"""Annotations in an index: the OCI layout names an image by the first, containerd by the second."""

FORMAT_LABEL = "io.ekiben.image-format"
USER = "65532:65532"

Document = Callable[[str, Literal["manifest", "config"]], bytes]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_OCI_LAYER_TYPES = {
    "application/vnd.docker.image.rootfs.diff.tar": _layers.TAR,
    "application/vnd.docker.image.rootfs.diff.tar.gzip": _layers.TAR_GZIP,
    "application/vnd.docker.image.rootfs.diff.tar.zstd": _layers.TAR_ZSTD,
}


@dataclass(frozen=True)
class Platform:
    os: str
    architecture: str
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Platform:
        """`linux/amd64`, `linux/arm64` or `linux/arm/v7`; arm64's v8 is left out. UserError `bad_platform`."""
        parts = text.split("/")
        if len(parts) not in (2, 3) or not all(re.fullmatch(r"[a-z0-9_.-]+", part) for part in parts):
            raise UserError(
                "bad_platform", f"{text!r} is not a platform", field="platform", hint="use linux/amd64 or linux/arm64"
            )
        architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(parts[1], parts[1])
        variant = parts[2] if len(parts) == 3 else None
        return cls(parts[0], architecture, None if (architecture, variant) == ("arm64", "v8") else variant)

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Platform:
        """From an image config or an index's descriptor."""
        parts = [str(value.get("os", "")), str(value.get("architecture", "")), str(value.get("variant") or "")]
        return cls.parse("/".join(part for part in parts if part))

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def fields(self) -> dict[str, str]:
        found = {"architecture": self.architecture, "os": self.os}
        return found | {"variant": self.variant} if self.variant else found


@dataclass(frozen=True)
class Run:
    """How the image's program is started. `env` is laid over the base's; `user` must be a number other than 0."""

    env: Mapping[str, str] = field(default_factory=dict)
    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    user: str = USER
    workdir: str = "/home/bentoml/bento"
    ports: Sequence[int] = (3000,)
    labels: Mapping[str, str] = field(default_factory=dict)
    stop_signal: str = "SIGTERM"


@dataclass(frozen=True)
class BaseImage:
    """What an image stands on: the layers and config of a base for one platform, and the digest that pins it."""

    digest: str
    platform: Platform
    layers: tuple[Layer, ...]
    config: Mapping[str, Any]

    @property
    def env(self) -> dict[str, str]:
        return environment(self.config)


@dataclass(frozen=True)
class Image:
    """Layers in order, lowest first, with a config. `config` lacks `rootfs`, which follows from the layers.

    An image that was read from somewhere keeps its stored `manifest` and `config` bytes, so that its digest stays.
    """

    layers: tuple[AnyLayer, ...]
    config: Mapping[str, Any]
    annotations: Mapping[str, str] = field(default_factory=dict)
    stored: tuple[bytes, bytes] | None = None

    @property
    def platform(self) -> Platform:
        return Platform.of(self.config)

    @property
    def is_sealed(self) -> bool:
        return all(isinstance(layer, Layer) for layer in self.layers)

    def sealed(self, layers: Iterable[Layer]) -> Image:
        """The same image with every layer known."""
        return replace(self, layers=tuple(layers))

    def known_layers(self) -> tuple[Layer, ...]:
        known = tuple(layer for layer in self.layers if isinstance(layer, Layer))
        if len(known) != len(self.layers):
            raise InfrastructureError(
                "layer_not_read",
                "the image has a streamed layer whose digest is known only after its bytes were written or pushed",
                hint="use the image that write_layout, write_archive or push_image returns",
            )
        return known

    @property
    def config_bytes(self) -> bytes:
        if self.stored is not None:
            return self.stored[1]
        diff_ids = [layer.diff_id for layer in self.known_layers()]
        return _digest.canonical_json({**self.config, "rootfs": {"type": "layers", "diff_ids": diff_ids}})

    @property
    def manifest_bytes(self) -> bytes:
        if self.stored is not None:
            return self.stored[0]
        config = self.config_bytes
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": {"mediaType": CONFIG, "digest": _digest.of_bytes(config), "size": len(config)},
            "layers": [_descriptor(layer) for layer in self.known_layers()],
        }
        if self.annotations:
            manifest["annotations"] = dict(self.annotations)
        return _digest.canonical_json(manifest)

    @property
    def media_type(self) -> str:
        return str(json.loads(self.manifest_bytes).get("mediaType", MANIFEST)) if self.stored else MANIFEST

    @property
    def digest(self) -> str:
        """The digest of the manifest: the image's identity."""
        return _digest.of_bytes(self.manifest_bytes)

    @property
    def config_digest(self) -> str:
        return _digest.of_bytes(self.config_bytes)

    @property
    def size(self) -> int:
        """Bytes of everything the image is made of, as stored."""
        return len(self.manifest_bytes) + len(self.config_bytes) + sum(layer.size for layer in self.layers)

    def descriptor(self) -> dict[str, Any]:
        manifest = self.manifest_bytes
        return {
            "mediaType": self.media_type,
            "digest": _digest.of_bytes(manifest),
            "size": len(manifest),
            "platform": self.platform.fields(),
        }


def assemble(base: BaseImage, layers: Sequence[AnyLayer], run: Run) -> Image:
    """An image of the base's layers and then `layers`, started as `run` says (image-format §5).

    Times are fixed, lists are sorted where order has no meaning, and nothing of this machine enters.
    """
    if not re.fullmatch(r"[1-9][0-9]*(:[0-9]+)?", run.user):
        raise UserError(
            "root_user",
            f"the image's user is {run.user!r}; it must be a number other than 0",
            hint=f"use {USER}: a name would have to be looked up in the base, and root is refused",
        )
    env = {**base.env, **run.env}
    labels = {FORMAT_LABEL: _layers.FORMAT, "org.opencontainers.image.base.digest": base.digest, **run.labels}
    started: dict[str, Any] = {
        "User": run.user,
        "WorkingDir": run.workdir,
        "Env": [f"{name}={value}" for name, value in env.items()],
        "Labels": labels,
        "StopSignal": run.stop_signal,
    }
    if run.entrypoint:
        started["Entrypoint"] = list(run.entrypoint)
    if run.cmd:
        started["Cmd"] = list(run.cmd)
    if run.ports:
        started["ExposedPorts"] = {f"{port}/tcp": {} for port in run.ports}
    history = [
        *_base_history(base),
        *({"created": CREATED, "created_by": f"ekiben layer {layer.name}", "comment": "ekiben"} for layer in layers),
    ]
    config = {**base.platform.fields(), "created": CREATED, "config": started, "history": history}
    return Image((*base.layers, *layers), config, {"org.opencontainers.image.base.digest": base.digest})


def read(manifest: bytes, config: bytes, openers: Mapping[str, _layers.Opener]) -> Image:
    """The image that stored bytes describe; `openers` gives each layer's bytes by its digest.

    Docker's media types become their OCI equals in the layers; the stored bytes stay as they are. Raises UserError
    `bad_image` for anything that is not a complete image.
    """
    try:
        described, configured = json.loads(manifest), json.loads(config)
        descriptors = described["layers"]
        diff_ids = configured["rootfs"]["diff_ids"]
        if len(descriptors) != len(diff_ids):
            raise ValueError(f"{len(descriptors)} layers, but {len(diff_ids)} diff_ids")
        layers = tuple(
            _layer(descriptor, diff_id, openers) for descriptor, diff_id in zip(descriptors, diff_ids, strict=True)
        )
        Platform.of(configured)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "bad_image",
            f"the image's manifest or config is not usable: {error}",
            hint="the image must be an OCI or Docker schema 2 image of layers",
        ) from error
    plain = {key: value for key, value in configured.items() if key != "rootfs"}
    return Image(layers, plain, described.get("annotations") or {}, (manifest, config))


def choose(
    index: Any,
    document: Document,
    opener: Callable[[str], _layers.Opener],
    platform: Platform | None,
    ref: str | None,
    place: str,
) -> Image:
    """The one image of an index that fits `platform` and `ref`, wherever its blobs are kept.

    `document` gives a manifest or config by its digest, verified; `opener` the opener of a layer. Raises UserError
    `base_platform_missing` and `bad_image`; `place` is what messages call the source.
    """
    try:
        choices = list(_choices(index, document, ref, depth=3))
        if platform is not None:
            others = ", ".join(sorted(str(choice[0]) for choice in choices)) or "none"
            choices = [choice for choice in choices if choice[0] == platform]
            if not choices:
                raise UserError(
                    "base_platform_missing",
                    f"{place} has no image for {platform}; it has {others}",
                    field="platform",
                    hint="name one of these platforms, or take another image",
                )
        digests = {choice[1] for choice in choices}
        if len(digests) != 1:
            found = ", ".join(sorted(str(choice[0]) for choice in choices)) or "none"
            raise UserError(
                "bad_image",
                f"{place} should hold one image that fits, but holds {len(digests)} ({found})",
                hint="name the platform, and the reference, of one of them",
            )
        manifest = document(digests.pop(), "manifest")
        described = json.loads(manifest)
        config = document(checked_digest(described["config"]["digest"]), "config")
        return read(manifest, config, {item["digest"]: opener(item["digest"]) for item in described["layers"]})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            "bad_image", f"{place} is not a usable image: {error}", hint="it must be an OCI or Docker schema 2 image"
        ) from error


def platforms(index: Any, document: Document) -> list[Platform]:
    """The platforms that an index has images for, in its order."""
    return list(dict.fromkeys(choice[0] for choice in _choices(index, document, None, depth=3)))


def environment(config: Mapping[str, Any]) -> dict[str, str]:
    """The `Env` of an image config as a mapping, in its order."""
    lines = (config.get("config") or {}).get("Env") or []
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def checked_digest(text: object) -> str:
    """The digest, which must be SHA-256: it becomes part of file names and URLs. Raises ValueError."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ValueError(f"{text!r} is not a sha256 digest")
    return text


def _choices(index: Any, document: Document, ref: str | None, depth: int) -> Iterator[tuple[Platform, str]]:
    """(platform, manifest digest) of every image that an index leads to."""
    if depth == 0:
        raise ValueError("indexes are nested too deeply")
    for item in index["manifests"]:
        notes = item.get("annotations") or {}
        if ref is not None and ref not in (notes.get(REF_NAME), notes.get(FULL_NAME)):
            continue
        if "vnd.docker.reference.type" in notes:
            continue  # an attestation about an image, not an image
        digest = checked_digest(item["digest"])
        if item.get("mediaType") in (INDEX, DOCKER_INDEX):
            yield from _choices(json.loads(document(digest, "manifest")), document, None, depth - 1)
        elif item.get("mediaType") in (MANIFEST, DOCKER_MANIFEST):
            if item.get("platform"):
                yield Platform.of(item["platform"]), digest
            else:
                config = checked_digest(json.loads(document(digest, "manifest"))["config"]["digest"])
                yield Platform.of(json.loads(document(config, "config"))), digest


def _layer(descriptor: Mapping[str, Any], diff_id: str, openers: Mapping[str, _layers.Opener]) -> Layer:
    digest = checked_digest(descriptor["digest"])
    if descriptor.get("urls"):
        raise ValueError(f"layer {digest} lives outside the registry (foreign layers are not supported)")
    media_type = _OCI_LAYER_TYPES.get(descriptor["mediaType"], descriptor["mediaType"])
    if media_type not in (_layers.TAR, _layers.TAR_GZIP, _layers.TAR_ZSTD):
        raise ValueError(f"layer {digest} has the media type {media_type}")
    name = (descriptor.get("annotations") or {}).get(LAYER_NAME, "base")
    if name not in ("base", "deps", "code", "model"):
        raise ValueError(f"layer {digest} is annotated {name!r}")
    size = descriptor["size"]
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"layer {digest} has the size {size!r}")
    return Layer(name, media_type, checked_digest(diff_id), digest, size, openers[digest])


def _descriptor(layer: Layer) -> dict[str, Any]:
    found: dict[str, Any] = {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size}
    if layer.name != "base":
        found["annotations"] = {LAYER_NAME: layer.name}
    return found


def _base_history(base: BaseImage) -> list[dict[str, Any]]:
    """The base's own history where it fits its layers, else one plain entry a layer: readers match the two by count."""
    history = list(base.config.get("history") or [])
    if sum(1 for entry in history if not entry.get("empty_layer")) == len(base.layers):
        return history
    return [{"created": CREATED, "created_by": "base"} for _ in base.layers]
