"""What makes two builds the same build."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed
from typing import Any

from build_service.settings import Settings
from build_service.shapes import ImageRequest
from registry import digest
from registry.errors import UserError
from registry.versions import Version

FORMAT = 1  # of what a build leaves behind; raised when equal inputs would give other results


def of_build(version: Version, kind_digest: str | None, image: dict[str, Any] | None, settings: Settings) -> str:
    """Digest of everything that a build's result depends on.

    The build that every version gets makes its lock, and keeps to it when it runs again: that makes no other build. For
    an image that somebody asks for, the lock is given.
    """
    asked = image is not None and image != image_of(settings, version)
    return digest.of_json(
        {
            "format": FORMAT,
            "version": version.digest,
            "kind": kind_digest,
            "lock": digest.of_bytes(version.lock.encode()) if version.lock and asked else None,
            "image": image,
            **_builder(settings),
        }
    )


def _builder(settings: Settings) -> dict[str, Any]:
    """What builds: an image, or the programs of this environment; the service's own image has none of them."""
    if settings.platform == "kubernetes":
        return {"builder": settings.builder_image}
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {"python": python, "uv": installed("uv"), "bentoml": installed("bentoml")}


def build_id(identity: str) -> str:
    return "b-" + identity.removeprefix("sha256:")[:20]


def image_of(settings: Settings, version: Version) -> dict[str, Any] | None:
    """The `image` of every build where versions are served from images: Kubernetes."""
    if settings.platform == "local":
        return None
    repository = f"{settings.registry_push}/{settings.registry_repository}"
    return {
        "base": settings.image_base,
        "platform": settings.image_platform,
        "push": {
            "ref": f"{repository}:{version.name}-{version.number}",
            "insecure": settings.registry_insecure,
            "ca": None,
        },
        "output": None,
        "compression": "zstd",
    }


def image_order(settings: Settings, wanted: ImageRequest) -> dict[str, Any]:
    """The `image` of a build spec."""
    if wanted.push is None and wanted.output is None:
        raise UserError(
            "image_goes_nowhere",
            "An image needs a registry to be pushed to or a file to be written.",
            field="image",
            hint="ekiben image NAME --push HOST/REPOSITORY:TAG, or --output image.tar",
        )
    if wanted.output is not None and (settings.platform == "kubernetes" or not settings.loopback):
        raise UserError(
            "output_not_allowed",
            "Files on the server's machine are written only for callers on that machine.",
            field="image.output",
            hint="Push the image to a registry instead.",
            status=403,
        )
    # In a cluster the bases are in the builder's image, and the builder says if one is missing.
    in_cluster = settings.platform == "kubernetes"
    base = settings.root / "bases" / f"{wanted.base or 'default'}.toml"
    if not in_cluster and not base.exists():
        raise UserError(
            "base_missing",
            f"There is no base image {wanted.base or 'default'!r} here yet.",
            field="image.base",
            hint="ekiben base import IMAGE_OR_LAYOUT copies one in, once.",
        )
    return {
        "base": wanted.base or settings.image_base if in_cluster else str(base),
        "platform": wanted.platform,
        "push": {"ref": wanted.push.ref, "insecure": wanted.push.insecure, "ca": None} if wanted.push else None,
        "output": wanted.output,
        "compression": wanted.compression,
    }
