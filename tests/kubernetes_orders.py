"""Orders and settings for tests of the Kubernetes platform's objects."""

from __future__ import annotations

import dataclasses
from typing import Any

from build_service.kubernetes import manifests, routes
from build_service.platform import BuildOrder, RevisionOrder
from build_service.settings import Settings
from registry.versions import Version

MANIFEST = {
    "files": [{"path": "churn.txt", "size": 10, "sha256": "0" * 64}],
    "sample": {"size": 1, "sha256": "0" * 64},
    "expected": None,
    "requirements": {"path": "requirements.txt", "size": 1, "sha256": "0" * 64},
}
BUILD = {"image": {"digest": "sha256:" + "ab" * 32}}


def settings(**changes: Any) -> Settings:
    return Settings(
        **{
            "platform": "kubernetes", "s3_endpoint": "http://store:9000", "builder_image": "registry:5000/builder:1",
            "registry_push": "registry:5000", "registry_pull": "localhost:5000", **changes,
        }
    )  # fmt: skip


def version(**changes: Any) -> Version:
    found = Version(
        "01J", "churn", 3, "sha256:" + "cd" * 32, "lightgbm", "lightgbm-text", 1 << 20, "models/01J", MANIFEST, None,
        {"team": "$(HOME) ü"}, None, None, None, 0.0, None,
    )  # fmt: skip
    return dataclasses.replace(found, **changes)


def order(**changes: Any) -> RevisionOrder:
    return dataclasses.replace(RevisionOrder("churn", 7, version(), BUILD, 1, {}, "rolling"), **changes)


def container(obj: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = obj["spec"]["template"]["spec"]["containers"][0]
    return found


def everything(wanted: RevisionOrder, using: Settings) -> list[dict[str, Any]]:
    name = wanted.deployment
    return [
        manifests.deployment(wanted, using, "512Mi"),
        manifests.service(name, using),
        manifests.model_policy(name, using),
        manifests.disruption_budget(name, using),
        manifests.autoscaler(dataclasses.replace(wanted, autoscale={"max": 3, "cpu": 70}), using),
        routes.route(name, using),
        routes.default_route(name, using),
    ]


def build_order(**changes: Any) -> BuildOrder:
    image = {"base": "default", "platform": "linux/amd64", "push": {"ref": "r:5000/e:churn-3"}, "output": None}
    return dataclasses.replace(BuildOrder("b-0123", 2, version(), image, False), **changes)
