"""Which steps a build's pod has: importing is left out only where it was done before."""

from __future__ import annotations

import dataclasses
from typing import Any

from build_service.kubernetes import manifests, names
from build_service.kubernetes.steps import Steps
from build_service.platform import BuildOrder
from build_service.settings import Settings
from registry.versions import Version

IMAGE = {"base": "default", "platform": "linux/amd64", "push": {"ref": "registry:5000/ekiben:churn-1"}}


def order(number: int, **changes: Any) -> BuildOrder:
    manifest = {"files": [], "requirements": None, "python": None, **changes.pop("manifest", {})}
    version = Version(
        f"01J{number}", "churn", number, f"sha256:{number}", "lightgbm", "lightgbm-text", 1, f"models/{number}",
        manifest, None, {}, None, None, None, 0.0, None,
    )  # fmt: skip
    image = {**IMAGE, "push": {"ref": f"registry:5000/ekiben:churn-{number}"}}
    return BuildOrder(f"b-{number}", 1, dataclasses.replace(version, **changes), image, True)


def test_a_kind_is_imported_once() -> None:
    steps = Steps()
    assert steps.of(order(1)) == names.STEPS
    steps.ended("b-1", 1, well=True)
    assert steps.of(order(2)) == ("fetch", "assemble")
    assert steps.of(order(3, manifest={"python": "3.12"})) == names.STEPS
    assert steps.of(order(4, manifest={"requirements": {"sha256": "0"}})) == names.STEPS
    assert steps.of(order(5, kind="sklearn")) == names.STEPS


def test_a_build_that_failed_has_all_steps_when_it_comes_again() -> None:
    steps = Steps()
    steps.of(order(1))
    steps.ended("b-1", 1, well=True)
    assert "inspect" not in steps.of(order(2))
    steps.ended("b-2", 1, well=False)
    assert steps.of(dataclasses.replace(order(2), attempt=2)) == names.STEPS


def test_a_projects_code_is_imported_in_every_build() -> None:
    steps = Steps()
    for number in (1, 2):
        assert steps.of(order(number, kind="project")) == names.STEPS
        steps.ended(f"b-{number}", 1, well=True)


def test_a_pod_without_a_step_keeps_what_each_other_step_may_read_and_write() -> None:
    settings = Settings(
        platform="kubernetes", s3_endpoint="http://store:9000", builder_image="builder", registry_push="registry"
    )
    jobs = [
        manifests.build_job(order(1), settings, spec_url="s", result_url="r", project=False, steps=steps)
        for steps in (names.STEPS, ("fetch", "assemble"))
    ]
    whole, short = (job["spec"]["template"]["spec"] for job in jobs)
    assert [each["name"] for each in whole["initContainers"]] == ["fetch", "inspect"]
    assert short["initContainers"] == whole["initContainers"][:1]
    assert short["containers"] == whole["containers"]
