"""Every kind in the cluster: its image is built by Jobs and rolled out, and answers through the ingress.

One kind after the other, each with one replica that goes before the next comes: the machine has room for one framework.
The kinds that share a lock share the layer of their packages, so only the first of them installs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.bentos import kinds
from tests.bentos.conformance import Conformance, Running
from tests.cluster.faults import of_model
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation

PATIENCE = 800.0
"""Seconds; the first model of a framework has it installed in the build, and pulled by the node."""

pytestmark = pytest.mark.timeout(1800)


FEW = (*kinds.EVERYWHERE, "violation")
"""Rows and pictures, with and without TensorFlow: those that CI asks."""


@pytest.fixture(scope="module", params=kinds.pairs(["cluster"], names=FEW))
def running(request: pytest.FixtureRequest, installed: Installation, run_folder: Path) -> Iterator[Running]:
    kind, entry, place = kinds.split(request.param)
    folder = kinds.example(kind.name, run_folder)
    name = kinds.deployment(kind)
    installed.remove(name)
    sent, fields = kinds.files(folder), kinds.form(kind, folder)
    made = installed.call("POST", "/models", files=sent, data=fields, timeout=300)
    number = int(made["version"])
    installed.live(name, number, seconds=PATIENCE)
    version = installed.version(name, number)
    assert (version["kind"], version["verified"]) == (kind.name, "expected"), version
    url = f"{installed.url}/inference/{name}"
    with httpx.Client(base_url=url, headers=installed.http.headers, trust_env=False, timeout=120) as client:
        eventually(lambda: client.get("/health").status_code == 200, seconds=60)  # the route follows the pod
        yield Running(kind, entry, place, folder, client, (name, str(number)), limit=None, metrics=404)
    installed.remove(name)
    eventually(lambda: not of_model(installed.cluster, "deployments,pods", "ekiben-models", name), seconds=180)


class TestKinds(Conformance):
    """Bodies that are too large do not come so far: the ingress, none of ours, has a bound and words of its own."""
