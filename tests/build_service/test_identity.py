"""What makes two builds the same."""

from __future__ import annotations

import dataclasses
from typing import Any

from build_service import identity
from build_service.settings import Settings
from registry.versions import Version

VERSION = Version(
    "01J", "churn", 3, "sha256:" + "cd" * 32, "lightgbm", "lightgbm-text", 1 << 20, "models/01J", {"files": []}, None,
    {}, None, None, None, 0.0, None,
)  # fmt: skip


def cluster(**changes: Any) -> Settings:
    given = {"platform": "kubernetes", "s3_endpoint": "http://s3", "builder_image": "b", "registry_push": "r:5000"}
    return Settings(**{**given, **changes})


def whole(settings: Settings, version: Version) -> str:
    return identity.of_build(version, "sha256:kind", identity.image_of(settings, version), settings)


def test_what_a_build_resolved_makes_no_other_build_of_the_version_that_it_was_of() -> None:
    """A deployment that gets more replicas asks for the same build again, once the first has left its lock."""
    built = dataclasses.replace(VERSION, lock="bentoml==1.4.40 --hash=sha256:00\n")
    for settings in (cluster(), Settings()):
        assert whole(settings, VERSION) == whole(settings, built)


def test_another_registry_or_builder_is_another_build() -> None:
    found = {
        whole(settings, VERSION) for settings in (cluster(), cluster(registry_push="s"), cluster(builder_image="c"))
    }
    assert len(found) == 3
