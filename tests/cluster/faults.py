"""What tests of faults share: a caller who never stops, and what must be true of a model once a fault has passed."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from build_service.kubernetes import names
from tests.cluster.cluster import Cluster
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, Trained, ready

SPACE, BUILDS, MODELS = "ekiben", "ekiben-builds", "ekiben-models"
SERVICE = "app.kubernetes.io/name=ekiben"
CONVERGES = 420.0  # seconds that a model may take after a fault, on a busy machine
_PAUSE = 0.1  # seconds between two calls of the steady caller
_AWAY = (404, 502, 503, 504)  # what an ingress says of a service that has no ready pod, and the service of its parts


@dataclass
class Caller:
    """Calls an endpoint over one connection, again and again; `failed` tells of calls that were not answered well."""

    site: Installation
    name: str
    model: Trained
    answered: int = 0
    failed: list[str] = field(default_factory=list)
    excused: str = ""
    """How an answer begins that says what cannot be otherwise, for the moment that the fault takes"""
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with httpx.Client(base_url=self.site.url, headers=self.site.http.headers, trust_env=False, timeout=30) as http:
            while not self._stop.wait(_PAUSE):
                began = time.monotonic()
                trouble = self._call(http)
                self.answered += 1
                if trouble and not (self.excused and trouble.startswith(self.excused)):
                    self.failed.append(f"{trouble} after {time.monotonic() - began:.1f} s")

    def _call(self, http: httpx.Client) -> str:
        try:
            answer = http.post(f"/inference/{self.name}/predict", json={"inputs": self.model.rows})
        except httpx.HTTPError as error:
            return f"{type(error).__name__}: {error}"
        if answer.status_code != 200:
            return f"{answer.status_code} {answer.text[:300]}"
        return "" if same(answer.json(), self.model) else f"another answer: {answer.text[:300]}"


@contextlib.contextmanager
def calling(site: Installation, name: str, model: Trained) -> Iterator[Caller]:
    """While the block runs the endpoint is called all the time; no call may fail."""
    caller = Caller(site, name, model)
    thread = threading.Thread(target=caller.run, daemon=True)
    thread.start()
    try:
        yield caller
        before = caller.answered
        eventually(lambda: caller.answered > before + 3)  # what the block has done shows in a call, if it does
    finally:
        caller._stop.set()
        thread.join(60)
    assert caller.failed == [], f"{len(caller.failed)} of {caller.answered} calls of {name} failed: {caller.failed[:5]}"


def same(answer: Any, model: Trained) -> bool:
    found = answer.get("outputs") if isinstance(answer, dict) else None
    return found is not None and found == pytest.approx(model.outputs, rel=1e-5)


@dataclass(frozen=True)
class Live:
    """What one model has become."""

    version: dict[str, Any]
    build: dict[str, Any]
    deployment: dict[str, Any]

    @property
    def digest(self) -> str:
        return str(self.build["image"]["digest"])


def converged(site: Installation, name: str, model: Trained, number: int = 1) -> Live:
    """The model is live and everything of it is there once: one version, one result, one Deployment; nothing of it
    still runs in the builds' namespace, and no attempt ran twice."""
    available(site)
    row = site.live(name, number, seconds=CONVERGES)
    eventually(lambda: site.deployment(name)["ready"] == row["replicas"], seconds=CONVERGES)
    eventually(lambda: only_version(site.cluster, name, number), seconds=120)
    # The ingress hears a moment later that pods have changed.
    eventually(lambda: (answer := site.predict(name, model.rows)).is_success and same(answer.json(), model))

    numbers = [version["version"] for version in site.call("GET", f"/models/{name}")["items"]]
    assert numbers == list(range(number, 0, -1))
    version = site.version(name, number)
    build = site.call("GET", f"/builds/{version['build']}")
    assert build["state"] == "succeeded"

    (deployed,) = of_model(site.cluster, "deployments", MODELS, name)
    assert deployed["metadata"]["name"] == name
    image = deployed["spec"]["template"]["spec"]["containers"][0]["image"]
    assert image.endswith("@" + build["image"]["digest"])
    attempts = [job["metadata"]["labels"][names.ATTEMPT] for job in jobs(site.cluster, build["id"])]
    assert len(attempts) == len(set(attempts)), f"an attempt ran twice: {attempts}"
    assert len(attempts) <= build["attempts"]
    eventually(lambda: not running(site.cluster, build["id"]), seconds=60)
    return Live(version, dict(build), deployed)


def available(site: Installation) -> None:
    """The installation is as it was made: all parts Ready, the API answers through the ingress."""
    ready(site.cluster, 300)
    eventually(lambda: _status(site, "/readyz") == 200, seconds=120)


def push_through(site: Installation, model: Trained, name: str) -> dict[str, Any]:
    """Push as a client does who tries again while the service is away; every refusal is one of those that say so."""
    end = time.monotonic() + CONVERGES
    while True:
        try:
            answer: httpx.Response | None = push_once(site, model, name, 180)
        except httpx.HTTPError:  # the service ended while it read, or before it answered
            answer = None
        if answer is not None and answer.status_code in (200, 201):
            return dict(answer.json())
        if answer is not None:
            assert answer.status_code in _AWAY, f"{answer.status_code} {answer.text}"
        assert time.monotonic() < end, "nobody takes the model"
        time.sleep(0.5)


def push_once(site: Installation, model: Trained, name: str, seconds: float) -> httpx.Response:
    """The answer to an upload, whatever it is. Raises httpx.HTTPError."""
    with model.file.open("rb") as stream:
        sent = {"file": (model.file.name, stream)}
        form = {"name": name, "sample": json.dumps(model.sample)}
        return site.http.post("/models", files=sent, data=form, timeout=seconds)


def jobs(cluster: Cluster, build: str) -> list[dict[str, Any]]:
    """Of a build: its attempts that are still known."""
    return list(cluster.get("jobs", "-n", BUILDS, "-l", f"{names.BUILD}={build}")["items"])


def running(cluster: Cluster, build: str) -> list[str]:
    found = [job["metadata"]["name"] for job in jobs(cluster, build) if job["status"].get("active")]
    pods = cluster.get("pods", "-n", BUILDS, "-l", f"{names.BUILD}={build}")["items"]
    return found + [pod["metadata"]["name"] for pod in pods if pod["status"].get("phase") in ("Pending", "Running")]


def of_model(cluster: Cluster, kind: str, namespace: str, name: str) -> list[dict[str, Any]]:
    return list(cluster.get(kind, "-n", namespace, "-l", f"{names.MODEL}={name}")["items"])


def only_version(cluster: Cluster, name: str, number: int) -> bool:
    """The pods of earlier versions have drained."""
    pods = of_model(cluster, "pods", MODELS, name)
    return {pod["metadata"]["labels"][names.VERSION] for pod in pods} == {str(number)}


def service_pods(cluster: Cluster) -> list[str]:
    return cluster.kubectl("-n", SPACE, "get", "pods", "-l", SERVICE, "-o", "name").split()


def replace_service(site: Installation) -> None:
    """The service is killed; its cluster starts another, which remembers nothing."""
    before = set(service_pods(site.cluster))
    kill_pods(site.cluster, *before)
    eventually(lambda: service_pods(site.cluster) and not before & set(service_pods(site.cluster)), seconds=120)
    available(site)


def kill_pods(cluster: Cluster, *pods: str, namespace: str = SPACE) -> None:
    """At once, without a goodbye."""
    cluster.kubectl("-n", namespace, "delete", *pods, "--force", "--grace-period=0", "--wait=false")


@contextlib.contextmanager
def away(site: Installation, what: str) -> Iterator[None]:
    """A part of the installation (`statefulset/minio`) has no pod while the block runs; then all is Ready again."""
    label = f"app.kubernetes.io/name={what.rpartition('/')[2]}"
    try:
        site.cluster.kubectl("-n", SPACE, "scale", what, "--replicas=0")
        site.cluster.kubectl("-n", SPACE, "wait", "--for=delete", "pod", "-l", label, "--timeout=120s")
        yield
    finally:
        site.cluster.kubectl("-n", SPACE, "scale", what, "--replicas=1")
        available(site)


def in_service(cluster: Cluster, code: str) -> str:
    """Run Python code where the service runs, with its settings."""
    return cluster.kubectl("-n", SPACE, "exec", "deploy/ekiben", "-c", "ekiben", "--", "python", "-c", code)


def volume(cluster: Cluster, claim: str) -> Path:
    """The folder of this machine that a volume of our own cluster is."""
    name = cluster.get("pvc", claim, "-n", SPACE)["spec"]["volumeName"]
    return Path(cluster.get("pv", name)["spec"]["hostPath"]["path"])


@contextlib.contextmanager
def no_pods(cluster: Cluster, namespace: str) -> Iterator[None]:
    """While the block runs no pod is made there: what was begun waits."""
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "no-pods", "namespace": namespace},
        "spec": {"hard": {"pods": "0"}},
    }
    cluster.apply(quota)
    try:
        eventually(lambda: "hard" in cluster.get("quota", "no-pods", "-n", namespace).get("status", {}))
        yield
    finally:
        cluster.kubectl("-n", namespace, "delete", "quota", "no-pods", "--ignore-not-found")


def wait_for_process(cluster: Cluster, *words: str, seconds: float = 180) -> int:
    """The first process of a pod with these words in its command line, as soon as it is there."""
    end = time.monotonic() + seconds
    while not (found := cluster.node.processes(*words)):
        assert time.monotonic() < end, f"no process {' '.join(words)}"
    return found[0]


def _status(site: Installation, path: str) -> int:
    try:
        return site.http.get(path, timeout=10).status_code
    except httpx.HTTPError:
        return 0
