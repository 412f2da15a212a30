"""The cluster that figures are measured on: that of tests/cluster with the overlay `test`, and what is seen of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from benchmarks import parts
from benchmarks.figures import Absent
from benchmarks.load import Endpoint, Version

if TYPE_CHECKING:  # the tests' own libraries: only the figures of a cluster need them
    from tests.cluster.cluster import Cluster
    from tests.k8s.installation import Installation

BUILDS, MODELS = "/api/v1/namespaces/ekiben-builds", "/api/v1/namespaces/ekiben-models"
JOBS = "/apis/batch/v1/namespaces/ekiben-builds/jobs"
DEPLOYMENTS = "/apis/apps/v1/namespaces/ekiben-models/deployments"
SERVICES = f"{MODELS}/services"
T = TypeVar("T")
_PROGRAMS = ("apt-get", "go", "unshare", "nsenter")


@contextlib.contextmanager
def installed() -> Iterator[Installation]:
    """This checkout on the cluster that runs, or on one that is brought up and goes again."""
    if os.geteuid() != 0:
        raise Absent("a cluster needs root")
    parts.needs(*_PROGRAMS)
    from tests.cluster import cluster as clusters
    from tests.k8s.installation import Installation, install

    there = clusters.find(clusters.ROOT)
    try:
        parts.say("the cluster of tests/cluster comes up" if there is None else "the cluster that runs is used")
        try:
            cluster = there or clusters.up(clusters.ROOT, lambda line: None)
        except SystemExit as error:
            raise Absent(f"no cluster came up: {error}") from error
        parts.say("images are made and pushed, the overlay test is applied")
        install(cluster)
        made = Installation.of(cluster, "benchmarks")
        try:
            yield made
        finally:
            made.http.close()
    finally:
        if there is None:
            clusters.down(clusters.ROOT)


def endpoint(site: Installation, name: str) -> Endpoint:
    """A deployment, and the API beside it, through the ingress."""
    where = urlsplit(site.url)
    headers = {"Host": str(site.http.headers["Host"]), "Authorization": str(site.http.headers["Authorization"])}
    return Endpoint(str(where.hostname), where.port or 80, name, headers)


def upload(site: Installation, name: str, version: Version, *, wait: float = 0, **fields: str) -> dict[str, Any]:
    body, kind = version.form(name, **fields)
    path = f"/models?wait={wait:g}" if wait else "/models"
    made = site.call("POST", path, content=body, headers={"Content-Type": kind}, timeout=wait + 300)
    if wait and made["state"] not in ("live", "built"):
        raise parts.Failed(f"version {made['version']} of {name} is {made['state']}: {made.get('reason')}")
    return dict(made)


def new_name(stem: str) -> str:
    """A model's numbers are never used again, so each run has names of its own: its versions count from 1."""
    return f"{stem}-{uuid.uuid4().hex[:6]}"


def forget(site: Installation, name: str) -> None:
    """The model and its deployment go, and with them the pods."""
    site.remove(name)
    chosen = ("pods", "-n", "ekiben-models", "-l", f"ekiben.dev/deployment={name}")
    wait_for(lambda: not site.cluster.get(*chosen)["items"], 120, f"the pods of {name} do not go", 1)


def wait_for(ask: Callable[[], T], seconds: float, trouble: str, pause: float = 0.2) -> T:
    """The first answer that is one."""
    end = time.monotonic() + seconds
    while not (found := ask()):
        if time.monotonic() > end:
            raise parts.Failed(f"{trouble} (after {seconds:g} s)")
        time.sleep(pause)
    return found


@dataclass(frozen=True)
class Told:
    """One state of an object, and when the API server told it (wall clock)."""

    at: float
    event: str
    obj: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.obj["metadata"]["name"])

    def label(self, key: str) -> str:
        return str((self.obj["metadata"].get("labels") or {}).get(f"ekiben.dev/{key}", ""))


class Watch(contextlib.AbstractContextManager["Watch"]):
    """All that happens to the objects of a kind: their own times have only seconds, and some of it leaves no trace."""

    def __init__(self, cluster: Cluster, path: str) -> None:
        program, config = str(cluster.kubectl_program), f"--kubeconfig={cluster.kubeconfig}"
        self._argv = [program, config, "get", "--raw", f"{path}?watch=true&resourceVersion=0&timeoutSeconds=7200"]
        self._told: list[Told] = []
        self._new = threading.Condition()

    def __enter__(self) -> Watch:
        self._process = subprocess.Popen(self._argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        parts.end(self._process)
        self._thread.join()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            at, said = time.time(), json.loads(line)
            if said["type"] == "ERROR":
                parts.say(f"a watch ended: {said['object'].get('message')}")
                return
            with self._new:
                self._told.append(Told(at, said["type"], said["object"]))
                self._new.notify_all()

    def told(self) -> Sequence[Told]:
        with self._new:
            return list(self._told)

    def first(self, wanted: Callable[[Told], bool], seconds: float, what: str) -> Told:
        """The first state that is wanted, of all that were told since the watch began."""
        looked, end = 0, time.monotonic() + seconds
        with self._new:
            while True:
                for one in self._told[looked:]:
                    if wanted(one):
                        return one
                looked = len(self._told)
                left = end - time.monotonic()
                if left <= 0 or not self._new.wait(left):
                    raise parts.Failed(f"{what} was not seen within {seconds:g} s")


def containers(pod: Mapping[str, Any]) -> list[str]:
    """In the order in which they start."""
    return [each["name"] for part in ("initContainers", "containers") for each in pod["spec"].get(part, ())]


def container_made(cluster: Cluster, pod: Told, container: str) -> float:
    """When the node made a container, by the folder of its log: what the pod itself says has whole seconds."""
    assert cluster.root is not None
    meta = pod.obj["metadata"]
    folder = cluster.root / "var-log" / "pods" / f"{meta['namespace']}_{meta['name']}_{meta['uid']}" / container
    return folder.stat().st_mtime


def lines(cluster: Cluster, namespace: str, pod: str, container: str) -> list[tuple[float, str]]:
    """(wall-clock time, text) of a container's log, as the node wrote it down."""
    text = cluster.kubectl("logs", "-n", namespace, pod, "-c", container, "--timestamps")
    return [(parts.seconds(stamp), said) for stamp, _, said in (line.partition(" ") for line in text.splitlines())]


def wait_until_quiet(limit: float = 30) -> float:
    """Wait a little for the machine's other work to end; the load that there is then, for `detail`."""
    end = time.monotonic() + limit
    while os.getloadavg()[0] > 1.5 and time.monotonic() < end:
        time.sleep(2)
    return round(os.getloadavg()[0], 2)
