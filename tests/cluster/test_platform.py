"""The Kubernetes platform on a real cluster: what the API server, the scheduler and the kubelet really say."""

from __future__ import annotations

import dataclasses
import json
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import yaml

from build_service.kubernetes import names
from build_service.kubernetes.platform import KubernetesPlatform, Store
from build_service.platform import Failure, Observed, RevisionOrder
from build_service.routes import RouteTable
from build_service.settings import Settings
from builder_image import image, layers, tarball
from registry.errors import UserError
from registry.kinds import Kinds
from registry.store import DirectoryStore
from registry.versions import Version
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.workloads import eventually

pytestmark = pytest.mark.timeout(600)

DEADLINE = 240.0
HOST = "anybody.test"
SUBJECT = Path(__file__).with_name("subject.py")
K8S = Path(__file__).resolve().parents[2] / "k8s"


@dataclass
class Place:
    """A platform with namespaces of its own, and what it needs to make orders."""

    cluster: Cluster
    settings: Settings
    image: str
    home: Path
    platform: KubernetesPlatform = field(init=False)
    table: RouteTable = field(default_factory=RouteTable)
    woken: int = 0

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        store = cast(Store, DirectoryStore(self.home / "objects"))
        self.platform = KubernetesPlatform(
            self.settings, store, Kinds.load(self.settings.kinds), self.table, self.wake, lambda: frozenset()
        )

    def wake(self) -> None:
        self.woken += 1

    def order(self, name: str, revision: int, **changes: Any) -> RevisionOrder:
        behave = changes.pop("behave", "well")
        found = RevisionOrder(
            name, revision, version(name, revision, {"behave": behave}), {"image": {"digest": self.image}},
            1, {"memory": "64Mi", "cpu": "10m"}, "rolling", fence=revision,
        )  # fmt: skip
        return dataclasses.replace(found, **changes)

    def until(self, name: str, sees: Callable[[Observed], Any], *orders: RevisionOrder) -> Observed:
        """Applied and observed as the control loop does it."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            for order in orders:
                self.platform.apply(order)
            observed = self.platform.observe(name)
            if sees(observed):
                return observed
            time.sleep(0.1)
        raise AssertionError(f"{name} is {observed}; pods: {self.pods(name)}")

    def roll(self, order: RevisionOrder) -> Observed:
        return self.until(
            order.deployment, lambda seen: seen.revision == order.revision and seen.ready == order.replicas, order
        )

    def failure(self, order: RevisionOrder) -> Failure:
        observed = self.until(order.deployment, lambda seen: seen.failed == order.revision, order)
        assert observed.failure is not None
        return observed.failure

    def pods(self, name: str) -> list[dict[str, Any]]:
        found = self.cluster.get("pods", "-n", self.settings.models_namespace, "-l", f"{names.DEPLOYMENT}={name}")
        return list(found["items"])

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return dict(self.cluster.get(kind, name, "-n", self.settings.models_namespace))

    def kubectl(self, *args: str, text: str | None = None) -> str:
        return self.cluster.kubectl("-n", self.settings.models_namespace, *args, text=text)


def version(name: str, number: int, labels: dict[str, str]) -> Version:
    return Version(
        f"01{number}", name, number, f"sha256:{'0' * 64}", "lightgbm", "lightgbm-text", 1000, "models/01",
        {"files": []}, None, labels, None, None, None, 0.0, None,
    )  # fmt: skip


@pytest.fixture(scope="session")
def subject(cluster: Cluster) -> str:
    """Digest of the image whose program is subject.py, in the cluster's registry."""
    base = images.base_image()
    with tempfile.TemporaryDirectory() as folder:
        entries = [*tarball.folders_above("subject/main.py"), tarball.file("subject/main.py", SUBJECT)]
        layer = layers.make("code", entries, Path(folder), "none")
        config = {**base.config, "config": {"Entrypoint": ["/usr/bin/python3", "-u", "/subject/main.py"]}}
        made = image.Image((*base.layers, layer), config)
        reference = images.push(made, f"{cluster.registry.push}/subject:latest")
    return reference.rpartition("@")[2]


@pytest.fixture(scope="module")
def place(cluster: Cluster, subject: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    ours = uuid.uuid4().hex[:6]
    settings = Settings(
        platform="kubernetes",
        s3_endpoint="http://unused.invalid",
        kubeconfig=cluster.kubeconfig,
        namespace=f"t{ours}",
        builds_namespace=f"t{ours}-builds",
        models_namespace=f"t{ours}-models",
        builder_image="unused",
        registry_push=cluster.registry.push,
        registry_pull=cluster.registry.pull,
        registry_repository="subject",
        model_priority_class="",
        model_callers=("ingress",),
        model_caller_blocks=(f"{own_address(cluster)}/32",),  # this process stands where the service's pod stands
        ingress_host="",
        inference_open=True,
        ready_seconds=120,
        model_disk="64Mi",
        model_disk_request="16Mi",
        drain_seconds=1,
    )
    spaces = (settings.builds_namespace, settings.models_namespace)
    for space in spaces:
        cluster.kubectl("create", "namespace", space)
        cluster.kubectl("label", "namespace", space, "pod-security.kubernetes.io/enforce=restricted")
    made = Place(cluster, settings, subject, tmp_path_factory.mktemp("home"))
    yield made
    made.platform.close()
    cluster.kubectl("delete", "namespace", *spaces, "--wait=false")


@pytest.fixture
def name(place: Place) -> Iterator[str]:
    """A deployment of the test's own."""
    made = f"d{uuid.uuid4().hex[:8]}"
    yield made
    place.platform.delete(made)


def test_a_revision_is_rolled_answers_and_goes(place: Place, name: str) -> None:
    observed = place.roll(place.order(name, 1))
    assert observed.checked == {"verified": "expected", "rows": 3, "matched": 3}
    assert observed.crashes == 0
    assert place.platform.observe(name).applied is not None

    answer = eventually(lambda: call(place, f"/inference/{name}/predict"))
    assert answer["version"] == "1"
    assert place.table.known(name)  # the service itself can hand calls on
    lines = list(place.platform.serving_log(name, follow=False, ended=lambda: True))
    assert "subject of version 1" in lines

    place.platform.delete(name)
    assert place.platform.observe(name) == Observed()
    kinds = "deployments,services,ingresses,networkpolicies,poddisruptionbudgets"
    found = place.cluster.get(kinds, "-n", place.settings.models_namespace, "-l", f"{names.DEPLOYMENT}={name}")
    assert found["items"] == []


def test_the_pod_keeps_to_the_level_restricted_and_holds_no_token(place: Place, name: str) -> None:
    place.roll(place.order(name, 1))
    (pod,) = place.pods(name)
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert all("serviceAccount" not in json.dumps(volume) for volume in pod["spec"]["volumes"])
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_old_revision_has_the_traffic_until_the_new_one_is_ready(place: Place, name: str) -> None:
    first = place.order(name, 1, replicas=2, proven=True)
    place.roll(first)
    second = place.order(name, 2, replicas=2)
    seen: set[tuple[int | None, int]] = set()
    place.until(name, lambda now: (seen.add((now.revision, now.ready)) or now.revision == 2) and now.ready == 2, second)
    before = {ready for revision, ready in seen if revision == 1}
    assert before, seen
    assert (None, 0) not in seen


def test_a_golden_sample_that_fails_is_told_in_its_own_words_and_the_old_revision_stays(
    place: Place, name: str
) -> None:
    place.roll(place.order(name, 1))
    failure = place.failure(place.order(name, 2, behave="golden"))
    assert (failure.code, failure.message) == ("golden_sample_failed", "row 0: 0.7 was expected, 0.2 came")
    back = place.order(name, 1, proven=True, fence=3)
    before = [pod["metadata"]["uid"] for pod in place.pods(name) if pod["metadata"]["labels"][names.REVISION] == "1"]
    place.roll(back)
    after = [pod["metadata"]["uid"] for pod in place.pods(name) if pod["metadata"]["labels"][names.REVISION] == "1"]
    assert after == before  # it never stopped


def test_a_model_that_eats_its_memory_is_told_its_limit(place: Place, name: str) -> None:
    failure = place.failure(place.order(name, 1, behave="memory"))
    assert failure.code == "out_of_memory"
    assert "64Mi" in failure.message


def test_a_model_that_fills_its_disk_is_told_its_limit(place: Place, name: str) -> None:
    failure = place.failure(place.order(name, 1, behave="disk"))
    assert failure.code == "out_of_disk", failure
    assert "64Mi" in failure.message
    assert "EKIBEN_MODEL_DISK" in str(failure.hint)


def test_a_process_that_ends_again_and_again_is_a_failure(place: Place, name: str) -> None:
    failure = place.failure(place.order(name, 1, behave="crash"))
    assert failure.code == "serving_crashed"
    assert "exit code 3" in failure.message
    assert "about to fall" in failure.message  # its last words


def test_an_image_that_is_gone_is_told_so(place: Place, name: str) -> None:
    lost = {"image": {"digest": "sha256:" + "1" * 64}}
    failure = place.failure(place.order(name, 1, build=lost))
    assert failure.code == "image_not_found"
    assert place.platform.holds(lost) is False


def test_what_no_node_can_give_is_the_reason_for_waiting(place: Place, name: str) -> None:
    order = place.order(name, 1, resources={"memory": "900Gi"})
    waiting = place.until(name, lambda seen: seen.waiting, order).waiting
    assert waiting is not None
    assert waiting.code == "insufficient_memory"
    assert "900Gi" in waiting.message
    gpus = place.order(name, 2, resources={"memory": "64Mi", "gpu": "1"})
    waiting = place.until(name, lambda seen: seen.waiting and seen.waiting.code == "insufficient_gpu", gpus).waiting
    assert waiting is not None
    assert waiting.message.startswith("0 free of 1")


def test_a_controller_that_is_away_is_the_reason_for_waiting_and_no_fault_of_the_revision(
    place: Place, name: str
) -> None:
    place.roll(place.order(name, 1))
    with place.cluster.without("kube-controller-manager"):
        waiting = place.until(name, lambda seen: seen.waiting is not None, place.order(name, 2))
        assert waiting.waiting is not None
        assert (waiting.waiting.code, waiting.behind, waiting.revision) == ("controllers_behind", True, 1)
    place.roll(place.order(name, 2))
    assert not place.platform.observe(name).behind


def test_a_used_up_quota_is_told_and_asked_before_a_build(place: Place, name: str) -> None:
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"},
        "spec": {"hard": {"requests.memory": "1Gi"}},
    }  # fmt: skip
    place.kubectl("apply", "-f", "-", text=json.dumps(quota))
    try:

        def asked() -> str | None:
            try:
                place.platform.check(name, {"memory": "3Gi"}, 1, "rolling")
            except UserError as error:
                return error.code
            return None

        assert eventually(asked) == "insufficient_memory"
        place.platform.check(name, {"memory": "64Mi"}, 1, "rolling")
        failure = place.failure(place.order(name, 1, resources={"memory": "3Gi"}))
    finally:
        place.kubectl("delete", "quota", "small")
    assert failure.code == "quota_exceeded"
    assert "requests.memory=3Gi" in failure.message
    assert "requests.memory=1Gi" in failure.message


def test_what_the_namespace_forbids_is_told(place: Place, name: str) -> None:
    limits = {
        "apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "narrow"},
        "spec": {"limits": [{"type": "Container", "max": {"memory": "1Gi"}}]},
    }  # fmt: skip
    place.kubectl("apply", "-f", "-", text=json.dumps(limits))
    try:
        failure = place.failure(place.order(name, 1, resources={"memory": "3Gi"}))
    finally:
        place.kubectl("delete", "limitrange", "narrow")
    assert failure.code == "limit_exceeded"
    assert "1Gi" in failure.message


def test_drift_is_repaired(place: Place, name: str) -> None:
    order = place.order(name, 1, proven=True)
    place.roll(order)
    place.until(name, lambda seen: seen.applied == order.terms, order)

    place.kubectl("delete", "service", names.of("Service", name))
    place.until(name, lambda seen: seen.applied != order.terms)
    place.until(name, lambda seen: seen.applied == order.terms, order)
    assert place.get("service", names.of("Service", name))["spec"]["ports"][0]["port"] == names.SERVICE_PORT

    policy = names.of("NetworkPolicy", name)
    place.kubectl("patch", "networkpolicy", policy, "--type=merge", "-p", '{"spec": {"egress": [{}]}}')
    place.until(name, lambda seen: seen.applied != order.terms)
    place.until(name, lambda seen: seen.applied == order.terms, order)
    assert place.get("networkpolicy", policy)["spec"].get("egress", []) == []

    place.kubectl("scale", "deployment", name, "--replicas=3")
    place.until(name, lambda seen: seen.applied != order.terms)
    place.until(name, lambda seen: seen.applied == order.terms and seen.ready == 1, order)
    assert place.get("deployment", name)["spec"]["replicas"] == 1


@pytest.mark.parametrize("title", ["nothing", "ekiben-default-deny", "ekiben"])
def test_a_deployment_leaves_the_platforms_policy_as_it_is(place: Place, title: str) -> None:
    policies = [
        each
        for each in yaml.safe_load_all((K8S / "base" / "network.yaml").read_text())
        if each["metadata"]["namespace"] == "ekiben-models"
    ]
    assert policies
    for each in policies:
        each["metadata"]["namespace"] = place.settings.models_namespace
    place.cluster.apply(*policies)

    def specs() -> dict[str, Any]:
        return {
            each["metadata"]["name"]: place.get("networkpolicy", each["metadata"]["name"])["metadata"]
            for each in policies
        }

    before = specs()
    place.roll(place.order(title, 1))
    assert specs() == before
    place.platform.delete(title)
    assert specs() == before


def test_an_object_of_another_owner_is_the_reason_for_waiting_and_stays(place: Place, name: str) -> None:
    there = {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": names.of("NetworkPolicy", name), "namespace": place.settings.models_namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Egress"]},
    }  # fmt: skip
    place.cluster.apply(there)
    before = place.get("networkpolicy", there["metadata"]["name"])
    order = place.order(name, 1)
    seen = place.until(name, lambda now: now.waiting is not None, order)
    assert seen.waiting is not None
    assert (seen.waiting.code, seen.failed, seen.behind) == ("name_taken_in_cluster", None, True)
    assert there["metadata"]["name"] in seen.waiting.message
    place.platform.delete(name)
    assert place.get("networkpolicy", there["metadata"]["name"]) == before
    place.kubectl("delete", "networkpolicy", there["metadata"]["name"])
    place.roll(order)


def test_objects_of_an_earlier_release_go_once_those_that_replace_them_are_there(place: Place, name: str) -> None:
    order = place.order(name, 1, proven=True, replicas=2, autoscale={"max": 3, "cpu": 70}, default=True)
    place.roll(order)
    place.until(name, lambda seen: seen.applied == order.terms, order)
    pods = [pod["metadata"]["uid"] for pod in place.pods(name)]
    space, marks = place.settings.models_namespace, f"{names.DEPLOYMENT}={name}"
    kinds = "services,networkpolicies,ingresses,poddisruptionbudgets,horizontalpodautoscalers"
    made = place.cluster.get(kinds, "-n", space, "-l", marks)["items"]
    before = [earlier(each, name) for each in made]
    assert {each["kind"] for each in before} == {
        "Service", "NetworkPolicy", "Ingress", "PodDisruptionBudget", "HorizontalPodAutoscaler",
    }  # fmt: skip
    place.platform.close()
    place.kubectl("delete", kinds, "-l", marks)
    place.cluster.apply(*before)
    place.start()
    place.until(name, lambda seen: seen.applied == order.terms and seen.ready == 2, order)
    found = {
        (each["kind"], each["metadata"]["name"]) for each in place.cluster.get(kinds, "-n", space, "-l", marks)["items"]
    }
    assert found == {(each["kind"], each["metadata"]["name"]) for each in made}
    assert [pod["metadata"]["uid"] for pod in place.pods(name)] == pods
    assert eventually(lambda: call(place, f"/inference/{name}/predict"))


def earlier(obj: dict[str, Any], deployment: str) -> dict[str, Any]:
    """The object as an earlier release named it: like the deployment."""
    name = "ekiben-default" if obj["metadata"]["name"] == names.DEFAULT_ROUTE else deployment
    meta = {"name": name, "namespace": obj["metadata"]["namespace"], "labels": obj["metadata"]["labels"]}
    text = json.dumps({"apiVersion": obj["apiVersion"], "kind": obj["kind"], "metadata": meta, "spec": obj["spec"]})
    spec = json.loads(text.replace(json.dumps(names.of("Service", deployment)), json.dumps(deployment)))
    for assigned in ("clusterIP", "clusterIPs"):
        spec["spec"].pop(assigned, None)
    return dict(spec)


def test_an_overtaken_lease_writes_nothing(place: Place, name: str) -> None:
    place.roll(place.order(name, 2, fence=20))
    place.platform.apply(place.order(name, 1, fence=10))
    labels = place.get("deployment", name)["spec"]["template"]["metadata"]["labels"]
    assert labels[names.REVISION] == "2"


def test_replicas_get_a_budget_and_lose_it(place: Place, name: str) -> None:
    place.roll(place.order(name, 1, replicas=2))
    assert place.get("poddisruptionbudget", names.of("PodDisruptionBudget", name))["spec"]["maxUnavailable"] == 1
    place.roll(place.order(name, 1))
    assert place.kubectl("get", "poddisruptionbudget", "-o", "name", "-l", f"{names.DEPLOYMENT}={name}") == ""


def test_an_autoscaler_has_the_say_between_its_bounds_and_goes(place: Place, name: str) -> None:
    order = place.order(name, 1, proven=True, autoscale={"max": 3, "cpu": 70})
    place.until(name, lambda seen: seen.applied == order.terms and seen.ready == 1, order)
    spec = place.get("horizontalpodautoscaler", names.of("HorizontalPodAutoscaler", name))["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"]) == (1, 3)
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": name}
    place.kubectl("scale", "deployment", name, "--replicas=2")  # as the autoscaler does it
    place.until(name, lambda seen: seen.applied == order.terms and seen.ready == 2, order)
    place.kubectl("scale", "deployment", name, "--replicas=5")
    place.until(name, lambda seen: place.get("deployment", name)["spec"]["replicas"] == 3, order)
    alone = place.order(name, 1, proven=True)
    place.until(name, lambda seen: seen.applied == alone.terms and seen.ready == 1, alone)
    assert place.kubectl("get", "horizontalpodautoscaler", "-o", "name", "-l", f"{names.DEPLOYMENT}={name}") == ""


def test_crashes_of_what_is_live_are_counted_with_their_reason(place: Place, name: str) -> None:
    order = place.order(name, 1, proven=True)
    place.roll(order)
    with pytest.raises(AssertionError):  # the connection ends with the process
        place.kubectl("get", "--raw", proxied(place, name, "crash"))
    observed = place.until(name, lambda seen: seen.crashes == 1 and seen.ready == 1, order)
    assert observed.crash is not None
    assert "exit code 7" in observed.crash.message


def test_the_default_deployment_has_the_short_routes(place: Place, name: str) -> None:
    place.roll(place.order(name, 1, default=True, proven=True))
    answer = eventually(lambda: call(place, "/inference/predict"))
    assert answer["version"] == "1"
    other = f"{name}x"
    try:
        place.roll(place.order(other, 5, default=True, proven=True, fence=1))
        assert eventually(lambda: call(place, "/inference/predict", version="5"))
        place.platform.delete(name)
        assert call(place, "/inference/predict", version="5")
    finally:
        place.platform.delete(other)


def test_a_new_service_finds_everything_as_it_is_and_changes_nothing(place: Place, name: str) -> None:
    order = place.order(name, 1, proven=True)
    place.roll(order)
    place.until(name, lambda seen: seen.applied == order.terms, order)
    before = place.get("deployment", name)["metadata"]["generation"], [p["metadata"]["uid"] for p in place.pods(name)]
    place.platform.close()
    place.start()
    place.until(
        name, lambda seen: seen.applied == order.terms and seen.ready == 1, dataclasses.replace(order, fence=99)
    )
    after = place.get("deployment", name)["metadata"]["generation"], [p["metadata"]["uid"] for p in place.pods(name)]
    assert after == before


def own_address(cluster: Cluster) -> str:
    """This machine as the cluster sees it."""
    host, _, port = cluster.registry.push.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        return str(connection.getsockname()[0])


def call(place: Place, path: str, version: str | None = None) -> dict[str, Any] | None:
    """An answer through the ingress, for a host that nobody has a rule of its own for."""
    try:
        answer = httpx.get(place.cluster.ingress_url + path, headers={"Host": HOST}, timeout=10, trust_env=False)
    except httpx.HTTPError:
        return None
    found = answer.json() if answer.status_code == 200 else None
    return found if found is not None and version in (None, found["version"]) else None


def proxied(place: Place, name: str, path: str) -> str:
    pod = place.pods(name)[0]["metadata"]["name"]
    return f"/api/v1/namespaces/{place.settings.models_namespace}/pods/{pod}:3000/proxy/{path}"
