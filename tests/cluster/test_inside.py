"""What pods reach, asked from inside: of builds, each step, and of models. All that they do not need is refused.

On a test cluster a listener stands at 169.254.169.254, where a cloud's machines have their metadata: without policies a
pod reaches it, so that a refusal is the policies' doing.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from build_service.kubernetes import names
from tests.cluster import nodes
from tests.cluster.cluster import Cluster
from tests.cluster.projects import packed
from tests.cluster.workloads import run, run_job, serve
from tests.k8s.installation import Installation, Trained

METADATA, METADATA_PORT = "169.254.169.254", 8169
REFUSED = ("TimeoutError", "ConnectionRefusedError")

REACH = """
import concurrent.futures, json, os, socket

def one(target):
    try:
        socket.create_connection(tuple(target), timeout=3).close()
        return "reached"
    except OSError as error:
        return type(error).__name__

def reach(targets):
    with concurrent.futures.ThreadPoolExecutor(len(targets)) as pool:
        return dict(zip(targets, pool.map(one, targets.values())))

def secrets():
    places = ("/var/run/secrets/kubernetes.io", "/etc/ekiben/push/config.json", "/etc/ekiben/pull/config.json")
    told = [name for name in os.environ if name.startswith("EKIBEN_") and name.endswith(("_URL", "_AUTH"))]
    return [place for place in places if os.path.exists(place)] + told
"""

SERVICE = """
import json, os

import bentoml
from reach import reach, secrets

with open(os.path.join(os.path.dirname(__file__), "targets.json")) as file:
    TARGETS = json.load(file)
HERE = {"reached": reach(TARGETS), "secrets": secrets()}

# Imported twice: where the build learns the service's schema, and where it is served. The first is kept in the image.
@bentoml.service(envs=[{"name": "WHILE_INSPECTED", "value": json.dumps(HERE)}])
class Inside:
    @bentoml.api
    def predict(self, inputs: list[float]) -> dict:
        return {"inspected": json.loads(os.environ["WHILE_INSPECTED"]), "served": HERE, "asked": reach(TARGETS)}
"""

Targets = dict[str, tuple[str, int]]


@dataclass
class Surroundings:
    installed: Installation
    targets: Targets


@pytest.fixture(scope="module")
def surroundings(installed: Installation, churn: Sequence[Trained], python_image: str) -> Iterator[Surroundings]:
    """What there is to reach: another model, a stranger's server, the installation's parts, the cluster's own."""
    cluster = installed.cluster
    installed.remove("other")
    installed.push(churn[0].file, "other", sample=churn[0].sample)
    cluster.kubectl("create", "namespace", "strangers")
    try:
        serve(cluster, "strangers", "stranger", python_image)
        installed.live("other")
        with metadata(cluster, python_image):
            yield Surroundings(installed, targets(cluster))
    finally:
        cluster.kubectl("delete", "namespace", "strangers", "--wait=false")
        installed.remove("other")


def targets(cluster: Cluster) -> Targets:
    def service(namespace: str, name: str, port: int) -> tuple[str, int]:
        spec = cluster.get("service", name, "-n", namespace)["spec"]
        return (
            spec["clusterIP"] if spec["clusterIP"] != "None" else pod(namespace, name.removesuffix(names.SUFFIX)),
            port,
        )

    def pod(namespace: str, name: str) -> str:
        selector = f"app.kubernetes.io/name={name}" if namespace == "ekiben" else f"{names.DEPLOYMENT}={name}"
        found = cluster.get("pods", "-n", namespace, "-l", selector)["items"]
        return str(next(each["status"]["podIP"] for each in found if "deletionTimestamp" not in each["metadata"]))

    behind = cluster.get("endpointslices", "kubernetes", "-n", "default")
    (node, *_) = cluster.get("nodes")["items"]
    address = next(each["address"] for each in node["status"]["addresses"] if each["type"] == "InternalIP")
    return {
        "API": service("default", "kubernetes", 443),
        "API server": (behind["endpoints"][0]["addresses"][0], behind["ports"][0]["port"]),
        "kubelet": (address, 10250),
        "metadata": (METADATA, METADATA_PORT),
        "model": service("ekiben-models", names.of("Service", "other"), 80),
        "model's pod": (pod("ekiben-models", "other"), names.PORT),
        "store": service("ekiben", "minio", 9000),
        "registry": service("ekiben", "registry", 5000),
        "database": service("ekiben", "postgres", 5432),
        "MLflow": service("ekiben", "mlflow", 5000),
        "service": service("ekiben", "ekiben", 80),
        "stranger": service("strangers", "stranger", 80),
    }


@contextlib.contextmanager
def metadata(cluster: Cluster, python_image: str) -> Iterator[None]:
    """A listener on the node's link-local address; only where the node is ours."""
    node = nodes.find(cluster.root) if cluster.root is not None else None
    if node is None:
        yield
        return
    address = [f"{METADATA}/32", "dev", "lo"]
    node.run("ip", "address", "add", *address)
    try:
        code = f"import http.server as h; h.test(h.SimpleHTTPRequestHandler, port={METADATA_PORT}, bind={METADATA!r})"
        container = {"name": "main", "image": python_image, "command": ["python3", "-c", code]}
        cluster.apply(
            {
                "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "metadata", "namespace": "strangers"},
                "spec": {"hostNetwork": True, "containers": [container], "terminationGracePeriodSeconds": 0},
            }
        )  # fmt: skip
        cluster.kubectl("-n", "strangers", "wait", "--for=condition=Ready", "pod/metadata", "--timeout=120s")
        yield
        cluster.kubectl("-n", "strangers", "delete", "pod", "metadata")
    finally:
        node.run("ip", "address", "del", *address)


def reached(found: dict[str, str]) -> set[str]:
    assert set(found.values()) <= {"reached", *REFUSED}, found
    return {name for name, how in found.items() if how == "reached"}


def test_a_pod_that_no_policy_binds_reaches_what_binds_itself_to_nobody(
    surroundings: Surroundings, python_image: str
) -> None:
    """The others' refusals below are therefore the policies'."""
    cluster, code = surroundings.installed.cluster, f"{REACH}\nprint(json.dumps(reach({surroundings.targets!r})))"
    run(cluster, "strangers", "free", python_image, code)
    found = reached(json.loads(cluster.kubectl("-n", "strangers", "logs", "job/free")))
    assert found >= {"API", "API server", "kubelet", "stranger"}
    assert "metadata" in found or cluster.root is None
    # models are called by the ingress controller and the service alone, the store and the database by their users
    assert not found & {"model", "model's pod", "store", "database", "registry", "MLflow"}


@pytest.fixture(scope="module")
def inside(surroundings: Surroundings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a project found that tries everything when it is imported, served and called."""
    installed = surroundings.installed
    installed.remove("inside")
    files = {"reach.py": REACH, "service.py": SERVICE, "targets.json": json.dumps(surroundings.targets)}
    file = packed(tmp_path_factory.mktemp("inside"), files, "service:Inside")
    installed.push(file, "inside", sample={"inputs": [1.0]})
    installed.live("inside")
    answer = installed.predict("inside", [1.0])  # the ingress reaches the model
    assert answer.status_code == 200, answer.text
    yield dict(answer.json())
    installed.remove("inside")


def test_code_that_a_build_imports_has_no_network_and_no_secret(inside: dict[str, Any]) -> None:
    assert set(inside["inspected"]["reached"].values()) == {"PermissionError"}
    assert inside["inspected"]["secrets"] == []


def test_a_model_reaches_nobody_and_has_no_secret(inside: dict[str, Any]) -> None:
    assert reached(inside["served"]["reached"]) == set()
    assert reached(inside["asked"]) == set()
    assert inside["served"]["secrets"] == []


def test_steps_of_a_build_reach_the_store_and_the_registry_and_hold_no_more_than_they_need(
    surroundings: Surroundings, inside: dict[str, Any]
) -> None:
    """The pod of a real build once more, with a probe in place of each step."""
    cluster = surroundings.installed.cluster
    (*_, job) = cluster.get("jobs", "-n", "ekiben-builds", "-l", f"{names.MODEL}=inside")["items"]
    code = f"{REACH}\n{CREDENTIALS}\nprint(json.dumps([reach({surroundings.targets!r}), secrets(), may()]))"
    run_job(cluster, "ekiben-builds", probe(job, code))
    try:
        said = {step: cluster.kubectl("-n", "ekiben-builds", "logs", "job/probe", "-c", step) for step in names.STEPS}
    finally:
        cluster.kubectl("-n", "ekiben-builds", "delete", "job", "probe")
    found = {step: json.loads(text) for step, text in said.items()}
    for network, _, _ in found.values():
        assert reached(network) == {"store", "registry"}
    held = {step: set(secrets) for step, (_, secrets, _) in found.items()}
    pull, push = "/etc/ekiben/pull/config.json", "/etc/ekiben/push/config.json"
    assert held["fetch"] == {pull, "EKIBEN_SPEC_URL", "EKIBEN_REGISTRY_AUTH"}
    assert held["inspect"] == set()
    assert held["assemble"] == {push, "EKIBEN_RESULT_URL", "EKIBEN_REGISTRY_AUTH"}
    may = {step: allowed for step, (_, _, allowed) in found.items()}
    assert may["fetch"] == {"read": True, "push": False}
    assert may["inspect"] == {"read": False, "push": False}
    assert may["assemble"] == {"read": True, "push": True}


CREDENTIALS = """
import urllib.error, urllib.request

HOSTS = ("registry.ekiben.svc:5000", "registry.ekiben.svc:5001")

def may():
    auths = []
    if file := os.environ.get("EKIBEN_REGISTRY_AUTH"):
        with open(file) as config:
            auths = [{"Authorization": "Basic " + entry["auth"]} for entry in json.load(config)["auths"].values()]
    tried = [(host, headers) for host in HOSTS for headers in auths or [{}]]
    def ask(method, path):
        return any(status(method, f"http://{host}/v2/{path}", headers) < 300 for host, headers in tried)
    return {"read": ask("GET", ""), "push": ask("POST", "ekiben/blobs/uploads/")}

def status(method, url, headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
"""


def probe(job: dict[str, Any], code: str) -> dict[str, Any]:
    pod = job["spec"]["template"]["spec"]
    for container in (*pod["initContainers"], *pod["containers"]):
        container |= {"command": ["python", "-c", code], "args": []}
    labels = {**names.OURS, "app": "probe"}
    template = {"metadata": {"labels": labels}, "spec": pod}
    spec = {"backoffLimit": 0, "template": template}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "labels": labels}, "spec": spec}
