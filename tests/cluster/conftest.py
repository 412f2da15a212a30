"""The cluster for tests: brought up once a session and taken down after it, unless it was there before.

`EKIBEN_E2E_KUBECONFIG` names another cluster to use (`make e2e KUBECONFIG=…`), with `EKIBEN_E2E_INGRESS` (URL) and
`EKIBEN_E2E_REGISTRY` (HOST:PORT, plain http). `EKIBEN_CLUSTER_ROOT` puts ours elsewhere, beside one that runs, and
`EKIBEN_CLUSTER_KEEP=1` leaves it up. A test that asks for the fixture `cluster` bears the marker of that name;
`make test` leaves it out.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import cluster as clusters
from tests.cluster import images
from tests.cluster.cluster import Cluster, Registry
from tests.cluster.faults import Caller, available, calling, of_model
from tests.cluster.pages import Shell
from tests.cluster.training import trained
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, Trained, install


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What failed on a cluster is told at once: these tests take long, and the cluster is there to be looked at."""
    report = yield
    if report.failed and item.get_closest_marker("cluster"):
        lines = item.config.pluginmanager.get_plugin("terminalreporter")
        if lines is not None:
            lines.write_line(f"\n{report.nodeid} failed in {report.when} after {report.duration:.0f} s")
            lines.write_line(report.longreprtext)
    return report


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if named := os.environ.get("EKIBEN_E2E_KUBECONFIG"):
        registry = os.environ.get("EKIBEN_E2E_REGISTRY", "")
        ingress = os.environ.get("EKIBEN_E2E_INGRESS", "")
        program = shutil.which("kubectl")
        if program is None:
            pytest.skip("kubectl is not installed")
        nothing: dict[str, Any] = {"variables": {}, "files": {}, "ca_bundle": None, "ca_place": ""}
        yield Cluster(Path(named), ingress, Registry(registry, registry), nothing, Path(program))
        return
    with brought_up(clusters.ROOT) as made:
        yield made


@contextlib.contextmanager
def brought_up(root: Path) -> Iterator[Cluster]:
    """A cluster under `root`; the one that was there stays afterwards."""
    need_what_a_cluster_needs()
    there = clusters.find(root)
    yield clusters.up(root, print)
    if there is None and not os.environ.get("EKIBEN_CLUSTER_KEEP"):
        clusters.down(root)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


@pytest.fixture(scope="session")
def python_image(cluster: Cluster) -> str:
    """Debian with Python 3.11, in the cluster's registry; the reference that nodes pull."""
    return images.push(images.base_image(), f"{cluster.registry.push}/debian:python3.11")


@pytest.fixture(scope="session")
def installed(cluster: Cluster) -> Iterator[Installation]:
    """The overlay `test` on the cluster, with the images of this checkout, everything Ready, and a token of its own.

    `EKIBEN_E2E_INSTALLED=1` says that it is there already, as `python -m tests.k8s.installation` left it.
    """
    if not os.environ.get("EKIBEN_E2E_INSTALLED"):
        install(cluster)
    made = Installation.of(cluster)
    yield made
    made.http.close()


@pytest.fixture(scope="module")
def shell(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(installed, tmp_path_factory.mktemp("shell"))
    yield made
    made.close()


@pytest.fixture(scope="session")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Trained]:
    """Two LightGBM models of one schema that give different answers for the same rows."""
    folder = tmp_path_factory.mktemp("churn")
    made = [trained(folder / f"churn-v{seed}.txt", seed) for seed in (1, 2)]
    first, second = made
    assert first.outputs != second.outputs
    return made


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Trained]:
    """Makes a model that no build has seen: what is kept by content hides nothing."""

    def make() -> Trained:
        seed = int.from_bytes(os.urandom(3))
        return trained(tmp_path / f"{seed}.txt", seed)

    return make


@pytest.fixture(scope="session")
def steady(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    """A model that serves, as the deployment `steady`, while others meet with faults."""
    model = trained(tmp_path_factory.mktemp("steady") / "steady.txt", int.from_bytes(os.urandom(3)))
    installed.push(model.file, "steady", sample=model.sample)
    installed.live("steady")
    yield model
    installed.remove("steady")


@pytest.fixture
def calls(installed: Installation, steady: Trained) -> Iterator[Caller]:
    """The model `steady` is called during the whole test, and every call must be answered well."""
    with calling(installed, "steady", steady) as caller:
        yield caller


@pytest.fixture
def model(fresh: Callable[[], Trained]) -> Trained:
    return fresh()


@pytest.fixture
def name(installed: Installation) -> Iterator[str]:
    """Of a deployment of the test's own, which goes with all that belongs to it."""
    made = f"t{uuid.uuid4().hex[:8]}"
    yield made
    available(installed)
    installed.remove(made)
    eventually(lambda: not of_model(installed.cluster, "deployments,pods", "ekiben-models", made), seconds=180)


def need_what_a_cluster_needs() -> None:
    if os.geteuid() != 0:
        pytest.skip("a cluster needs root")
    for program in ("apt-get", "go", "unshare", "nsenter"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
