"""Faults of the machine and of the service: nothing is lost, nothing doubled, the endpoint goes on answering.

`calls` calls a live deployment through the ingress all the while. Faults of the stores are in test_faults_stores.py,
those of several replicas in test_faults_replicas.py.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from build_service.kubernetes import names
from tests.cluster.faults import (
    BUILDS,
    MODELS,
    SERVICE,
    SPACE,
    Caller,
    available,
    converged,
    in_service,
    jobs,
    kill_pods,
    no_pods,
    of_model,
    push_through,
    replace_service,
    running,
    same,
    wait_for_process,
)
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, Trained

pytestmark = pytest.mark.timeout(900)

ANSWERS_AGAIN = 120.0  # seconds after a node is back; docs/kubernetes.md says so
Fresh = Callable[[], Trained]


@pytest.mark.parametrize("step", names.STEPS)
def test_a_build_is_killed_in_a_step(
    installed: Installation, calls: Caller, model: Trained, name: str, step: str
) -> None:
    if step == "inspect":
        replace_service(installed)  # else it knows that there is nothing to import
    pushed = installed.push(model.file, name, sample=model.sample)
    process = wait_for_process(installed.cluster, "builder_image", step)
    if step == "fetch":  # the whole pod, as whoever cleans up does
        (pod,) = of_model(installed.cluster, "pods", BUILDS, name)
        kill_pods(installed.cluster, f"pod/{pod['metadata']['name']}", namespace=BUILDS)
    else:
        os.kill(process, signal.SIGKILL)
    live = converged(installed, name, model)
    assert live.build["attempts"] == 2
    ends = {job["metadata"]["labels"][names.ATTEMPT]: job["status"] for job in jobs(installed.cluster, pushed["build"])}
    assert ends["1"].get("failed") == 1
    assert ends["2"].get("succeeded") == 1


def test_a_build_that_is_started_twice_gives_one_result(
    installed: Installation, calls: Caller, model: Trained, name: str
) -> None:
    with no_pods(installed.cluster, BUILDS):
        pushed = installed.push(model.file, name, sample=model.sample)
        (job,) = eventually(lambda: jobs(installed.cluster, pushed["build"]))
        twin = twin_of(job)
        installed.cluster.kubectl("create", "-f", "-", text=json.dumps(twin))
    try:
        live = converged(installed, name, model)
        finished = eventually(lambda: succeeded(installed, twin["metadata"]["name"]), seconds=180)
        assert finished
        key = f"builds/{pushed['build']}/1/result.json"
        assert stored_result(installed, key)["image"]["digest"] == live.digest
    finally:
        installed.cluster.kubectl("-n", BUILDS, "delete", "job", twin["metadata"]["name"])
    assert live.build["attempts"] == 1


def test_the_service_is_killed_while_one_model_is_built_and_another_rolled_out(
    installed: Installation, calls: Caller, fresh: Fresh, model: Trained, name: str
) -> None:
    other, rolled = f"{name}-r", fresh()
    try:
        installed.push(rolled.file, other, sample=rolled.sample)
        eventually(lambda: installed.version(other, 1)["state"] == "rolling", seconds=180)
        pushed = installed.push(model.file, name, sample=model.sample)
        eventually(lambda: running(installed.cluster, pushed["build"]))
        replace_service(installed)
        second = converged(installed, other, rolled)
        first = converged(installed, name, model)
        assert (first.build["attempts"], second.build["attempts"]) == (1, 1)
        assert len(jobs(installed.cluster, pushed["build"])) == 1, "what ran was joined"
        revisions = installed.call("GET", f"/deployments/{other}/revisions")["items"]
        assert [each["state"] for each in revisions] == ["live"]
    finally:
        available(installed)
        installed.remove(other)


def test_the_api_server_is_restarted(installed: Installation, calls: Caller, model: Trained, name: str) -> None:
    with installed.cluster.without("kube-apiserver"):
        pushed = push_through(installed, model, name)
        time.sleep(15)  # longer than one attempt to submit, or three
        assert installed.call("GET", f"/builds/{pushed['build']}")["state"] in ("queued", "running")
    live = converged(installed, name, model)
    assert live.build["attempts"] == 1


def test_an_api_server_that_does_not_know_its_roles_yet_costs_no_attempt(
    installed: Installation, calls: Caller, model: Trained, name: str
) -> None:
    """One that has just started says 403 for a moment, whatever the Roles are."""
    role = installed.cluster.get("rolebinding", "ekiben", "-n", BUILDS)
    installed.cluster.kubectl("-n", BUILDS, "delete", "rolebinding", "ekiben")
    try:
        pushed = installed.push(model.file, name, sample=model.sample)
        build = eventually(lambda: waiting(installed, pushed["build"]))
        assert 'cannot create resource "jobs"' in build["stages"][0]["message"]
    finally:
        installed.cluster.apply({key: role[key] for key in ("apiVersion", "kind", "roleRef", "subjects")} | named(role))
    live = converged(installed, name, model)
    assert live.build["attempts"] == 1


def test_the_kubelet_is_restarted(installed: Installation, calls: Caller, model: Trained, name: str) -> None:
    """A kubelet that starts calls each pod unready until it has asked it: an ingress may find nobody for a second."""
    calls.excused = "503 no available server"
    before = {pod["metadata"]["uid"] for pod in of_model(installed.cluster, "pods", MODELS, "steady")}
    with installed.cluster.without("kubelet"):
        push_through(installed, model, name)
        time.sleep(5)
    converged(installed, name, model)
    calls.excused = ""
    after = of_model(installed.cluster, "pods", MODELS, "steady")
    assert {pod["metadata"]["uid"] for pod in after} == before
    assert [pod["status"]["containerStatuses"][0]["restartCount"] for pod in after] == [0]


def test_a_node_is_drained_and_comes_back(installed: Installation, steady: Trained, model: Trained, name: str) -> None:
    """With one node nothing can answer meanwhile. What was under way goes on, without an attempt lost."""
    node = installed.cluster.get("nodes")["items"][0]["metadata"]["name"]
    pushed = installed.push(model.file, name, sample=model.sample)
    eventually(lambda: running(installed.cluster, pushed["build"]))
    try:
        drain = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--grace-period=5", "--timeout=170s")
        installed.cluster.kubectl("drain", node, *drain)
        assert pods_on_node(installed, MODELS) == []
    finally:
        installed.cluster.kubectl("uncordon", node)
    back = time.monotonic()
    eventually(lambda: answers(installed, "steady", steady), seconds=ANSWERS_AGAIN)
    print(f"answered {time.monotonic() - back:.1f} s after the node was back")
    live = converged(installed, name, model)
    assert live.build["attempts"] == 1
    assert installed.deployment("steady")["state"] == "live"


def test_postgresql_is_restarted(installed: Installation, calls: Caller, model: Trained, name: str) -> None:
    installed.cluster.kubectl("-n", SPACE, "delete", "pod", "postgres-0", "--wait=false")
    push_through(installed, model, name)
    live = converged(installed, name, model)
    assert live.build["attempts"] == 1
    pods = installed.cluster.get("pods", "-n", SPACE, "-l", SERVICE)["items"]
    assert [pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods] == [0]


def waiting(site: Installation, build: str) -> dict[str, Any]:
    found = dict(site.call("GET", f"/builds/{build}"))
    return found if found["stage"] == "waiting" else {}


def named(obj: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {key: obj["metadata"][key] for key in ("name", "namespace")}}


def twin_of(job: dict[str, Any]) -> dict[str, Any]:
    """The same Job once more, under another name."""
    meta, spec = job["metadata"], copy.deepcopy(job["spec"])
    del spec["selector"]
    own = ("controller-uid", "job-name")
    labels = spec["template"]["metadata"]["labels"]
    spec["template"]["metadata"]["labels"] = {key: value for key, value in labels.items() if not key.endswith(own)}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{meta['name']}-twin", "namespace": BUILDS, "labels": {"twin-of": meta["name"]}},
        "spec": spec,
    }


def succeeded(site: Installation, job: str) -> bool:
    return bool(site.cluster.get("job", job, "-n", BUILDS)["status"].get("succeeded"))


def stored_result(site: Installation, key: str) -> dict[str, Any]:
    code = f"""
from build_service import storage
from build_service.settings import Settings
with storage.bucket(Settings()).open({key!r}) as stream:
    print(stream.read().decode())
"""
    return dict(json.loads(in_service(site.cluster, code).splitlines()[-1]))


def pods_on_node(site: Installation, namespace: str) -> list[str]:
    pods = site.cluster.get("pods", "-n", namespace)["items"]
    return [pod["metadata"]["name"] for pod in pods if pod["spec"].get("nodeName")]


def answers(site: Installation, name: str, model: Trained) -> bool:
    try:
        answer = site.predict(name, model.rows)
    except httpx.HTTPError:
        return False
    return answer.status_code == 200 and same(answer.json(), model)
