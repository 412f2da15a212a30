"""Two replicas of the service, one of which believes that it is an hour later: they share the work, and double none."""

from __future__ import annotations

import base64
import re
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.another_time import preloaded as another_time
from tests.cluster.faults import (
    SERVICE,
    SPACE,
    Caller,
    available,
    converged,
    kill_pods,
    push_through,
    service_pods,
)
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, Trained

pytestmark = pytest.mark.timeout(900)

AHEAD = 3600  # seconds
Fresh = Callable[[], Trained]


@pytest.fixture(scope="module")
def ahead(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A second replica of the service, whose clock is an hour ahead; the name of its Deployment."""
    library = another_time(tmp_path_factory.mktemp("clock"), AHEAD)
    if library is None:
        pytest.skip("cc is not installed (apt-get install gcc)")
    yield from replica(installed, library)


def replica(site: Installation, library: Path) -> Iterator[str]:
    name = "ekiben-ahead"
    clock = {"name": "clock", "namespace": SPACE}
    content = base64.b64encode(library.read_bytes()).decode()
    site.cluster.apply(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": clock, "binaryData": {library.name: content}}
    )
    spec = site.cluster.get("deployment", "ekiben", "-n", SPACE)["spec"]
    mine = {"example.com/clock": "ahead"}
    spec["selector"]["matchLabels"] |= mine
    spec["template"]["metadata"]["labels"] |= mine
    pod = spec["template"]["spec"]
    pod["volumes"].append({"name": "clock", "configMap": {"name": "clock", "defaultMode": 0o555}})
    for container in (*pod["initContainers"], *pod["containers"]):
        container["env"].append({"name": "LD_PRELOAD", "value": f"/clock/{library.name}"})
        container["volumeMounts"].append({"name": "clock", "mountPath": "/clock"})
    metadata = {"name": name, "namespace": SPACE}
    spec["replicas"] = 1
    try:
        site.cluster.apply({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})
        site.cluster.kubectl("-n", SPACE, "rollout", "status", f"deployment/{name}", "--timeout=170s")
        told = site.cluster.kubectl(
            "-n", SPACE, "exec", f"deployment/{name}", "--", "python", "-c", "import time; print(time.time())"
        )
        here = site.cluster.node.run("date", "+%s")
        assert float(told.split()[-1]) - float(here) == pytest.approx(AHEAD, abs=60)
        yield name
    finally:
        site.cluster.kubectl("-n", SPACE, "delete", "deployment", name)
        site.cluster.kubectl("-n", SPACE, "delete", "configmap", "clock")
        pods = ("pod", "-l", "example.com/clock=ahead", "--timeout=120s")
        site.cluster.kubectl("-n", SPACE, "wait", "--for=delete", *pods)
        available(site)


@pytest.fixture
def models(installed: Installation, fresh: Fresh) -> Iterator[dict[str, Trained]]:
    """By the names of their deployments."""
    made = {f"r{uuid.uuid4().hex[:8]}": fresh() for _ in range(3)}
    yield made
    available(installed)
    for name in made:
        installed.remove(name)


def test_clocks_that_differ_by_an_hour_double_nothing(
    installed: Installation, ahead: str, calls: Caller, fresh: Fresh, models: dict[str, Trained]
) -> None:
    alone, *rest = models
    installed.cluster.kubectl("-n", SPACE, "scale", "deployment/ekiben", "--replicas=0")
    try:  # whoever is wrong about the time can do the work alone
        eventually(lambda: len(service_pods(installed.cluster)) == 1)
        push_through(installed, models[alone], alone)
        installed.live(alone, 1)
    finally:
        installed.cluster.kubectl("-n", SPACE, "scale", "deployment/ekiben", "--replicas=1")
    available(installed)
    with ThreadPoolExecutor(len(rest)) as pool:
        list(pool.map(lambda name: push_through(installed, models[name], name), rest))
    lives = [converged(installed, name, model) for name, model in models.items()]
    assert [live.build["attempts"] for live in lives] == [1] * len(lives)
    assert sorted(started(installed)) == sorted(set(started(installed))), "no attempt was begun twice"


def test_replicas_are_killed_in_turns_while_models_are_pushed(
    installed: Installation, ahead: str, calls: Caller, models: dict[str, Trained]
) -> None:
    with ThreadPoolExecutor(len(models)) as pool:
        pushes = [pool.submit(push_through, installed, model, name) for name, model in models.items()]
        for replica in ("ekiben", ahead):
            others = {"ekiben": "!example.com/clock", ahead: "example.com/clock"}[replica]
            killed = installed.cluster.kubectl(
                "-n", SPACE, "get", "pods", "-l", f"{SERVICE},{others}", "-o", "name"
            ).split()
            kill_pods(installed.cluster, *killed)
            installed.cluster.kubectl("-n", SPACE, "rollout", "status", f"deployment/{replica}", "--timeout=170s")
        for push in pushes:
            assert push.result(300)["version"] == 1
    lives = [converged(installed, name, model) for name, model in models.items()]
    assert [live.build["attempts"] for live in lives] == [1] * len(lives)


def started(site: Installation) -> list[str]:
    """Attempts that the replicas say they began."""
    lines = [
        line
        for pod in service_pods(site.cluster)
        for line in site.cluster.kubectl("-n", SPACE, "logs", pod, "-c", "ekiben").splitlines()
        if "build starts" in line
    ]
    return [" ".join(re.findall(r"(?:build|attempt)\W+([\w-]+)", line)) for line in lines]
