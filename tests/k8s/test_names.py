"""Names in a cluster: no deployment has one of the platform's, and what others have made is not written over.

The second half runs against an API server of its own: what it says of an object is what a cluster says.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from build_service.kubernetes import applying, drift, manifests, names, routes
from build_service.kubernetes.cluster import Cluster, NameTaken, Watched
from build_service.settings import Settings
from registry.manifest import LONGEST_NAME, is_name
from tests.cluster.workloads import eventually
from tests.k8s.conftest import Server
from tests.k8s.test_overlays import K8S, OVERLAYS, objects_of
from tests.kubernetes_orders import build_order, everything, order, settings

NAMES = st.from_regex(r"\A[a-z]([a-z0-9-]{0,38}[a-z0-9])?\Z").filter(is_name)
ROUTINGS: list[dict[str, str]] = [{}, {"routing": "gateway", "gateway": "edge/public"}]


def title(obj: dict[str, Any]) -> tuple[str, str]:
    return obj["kind"], obj["metadata"]["name"]


def of_deployment(name: str, using: Settings) -> set[tuple[str, str]]:
    return {title(each) for each in everything(order(deployment=name), using)} - {shared(using)}


def shared(using: Settings) -> tuple[str, str]:
    return "Ingress" if using.routing == "ingress" else "HTTPRoute", names.DEFAULT_ROUTE


def written_down() -> list[dict[str, Any]]:
    """Every object in the files of k8s/, of any component."""
    found = []
    for file in sorted(K8S.rglob("*.yaml")):
        for each in yaml.safe_load_all(file.read_text()):
            if isinstance(each, dict) and "name" in (each.get("metadata") or {}):
                found.append(each)
            elif isinstance(each, dict):
                for kind in ("configMapGenerator", "secretGenerator"):
                    made = kind.removesuffix("Generator")
                    found += [
                        {"kind": made[0].upper() + made[1:], "metadata": {"name": one["name"]}}
                        for one in each.get(kind, ())
                    ]
    return found


def need_no_collision(platform: list[dict[str, Any]]) -> None:
    titles = {title(each) for each in platform if each["metadata"].get("namespace") == "ekiben-models"}
    titles |= {title(manifests.token_digests([], settings())), title(manifests.builds_policy(settings()))}
    for using in (settings(**routing) for routing in ROUTINGS):
        for name in {name for _, name in titles} | {names.DEFAULT_ROUTE, "nothing", "ekiben-default", "kubernetes"}:
            # a dot is refused when a deployment is named; what is left of it is not
            for tried in {name, name.replace(".", "-"), name.removesuffix(names.SUFFIX)}:
                if is_name(tried):
                    assert not of_deployment(tried, using) & (titles | {shared(using)}), tried
    job = manifests.build_job(build_order(), settings(), spec_url="s", result_url="r", project=False)
    assert title(job) not in titles


def test_no_object_of_a_deployment_has_the_name_of_one_in_the_files() -> None:
    found = written_down()
    assert {"NetworkPolicy", "LimitRange", "Role", "Ingress", "HTTPRoute", "ConfigMap"} <= {
        kind for kind, _ in map(title, found)
    }
    need_no_collision(found)
    kinds = {kind for routing in ROUTINGS for kind, _ in of_deployment("churn", settings(**routing))}
    for each in found:
        if each["metadata"].get("namespace") == "ekiben-models" and each["kind"] in kinds:
            assert not is_name(each["metadata"]["name"]), title(each)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_object_of_a_deployment_has_the_name_of_one_of_an_overlay(overlay: str, kubectl_program: str) -> None:
    need_no_collision(objects_of(kubectl_program, overlay))


@given(NAMES, NAMES)
def test_no_two_deployments_share_an_object(one: str, other: str) -> None:
    for using in (settings(**routing) for routing in ROUTINGS):
        assert shared(using) not in of_deployment(one, using)
        assert one == other or not of_deployment(one, using) & of_deployment(other, using)


def test_the_deployment_has_the_users_name_and_all_names_are_short_enough_for_a_label() -> None:
    longest = "a" * LONGEST_NAME
    assert names.of("Deployment", longest) == longest
    assert all(len(name) <= 63 for _, name in of_deployment(longest, settings()))
    backends = [
        path["backend"]["service"]["name"]
        for each in everything(order(), settings())
        if each["kind"] == "Ingress"
        for rule in each["spec"]["rules"]
        for path in rule["http"]["paths"]
    ]
    assert set(backends) == {names.of("Service", "churn")}


# --- on an API server -------------------------------------------------------------------------------------------------


@pytest.fixture
def space(api_server: Server) -> Iterator[str]:
    name = f"t{uuid.uuid4().hex[:8]}"
    api_server.ok("create", "namespace", name)
    yield name
    api_server.ok("delete", "namespace", name, "--wait=false")


@pytest.fixture
def using(space: str) -> Settings:
    return settings(models_namespace=space)


@pytest.fixture
def cluster(api_server: Server, space: str, tmp_path: Path) -> Iterator[Cluster]:
    kinds = ("Deployment", "Service", "NetworkPolicy", "Ingress")
    made = Cluster(
        api_server.kubeconfig(tmp_path / "kubeconfig"),
        [Watched(kind, space) for kind in kinds],
        lambda *_: None,
        resync_seconds=600,
    )
    made.start()
    assert made.synced(30)
    yield made
    made.close()


def put(cluster: Cluster, obj: dict[str, Any], fence: int = 0) -> None:
    applying.put(cluster, manifests.sealed(obj, fence), fence)


def get(server: Server, space: str, kind: str, name: str) -> dict[str, Any]:
    return dict(json.loads(server.ok("get", kind, name, "-n", space, "-o", "json", "--show-managed-fields")))


def foreign(server: Server, obj: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """An object of the same kind and name that somebody made with kubectl, as the server has it."""
    meta = {key: value for key, value in obj["metadata"].items() if key in ("name", "namespace")}
    theirs = {**obj, "metadata": meta, "spec": {**obj["spec"], **spec}}
    server.ok("create", "-f", "-", text=json.dumps(theirs))
    return get(server, meta["namespace"], obj["kind"], meta["name"])


def test_a_deny_all_policy_in_the_way_is_left_as_it_is(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    wanted = manifests.model_policy("churn", using)
    deny = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    there = foreign(api_server, {**wanted, "spec": deny})
    with pytest.raises(NameTaken) as caught:
        put(cluster, wanted)
    assert caught.value.code == "name_taken_in_cluster"
    assert f"NetworkPolicy '{wanted['metadata']['name']}'" in caught.value.detail
    assert "kubectl" in str(caught.value.hint)
    assert get(api_server, space, "networkpolicy", wanted["metadata"]["name"]) == there
    assert cluster.of("NetworkPolicy", space, "churn") == []  # a deletion of the deployment does not find it

    api_server.ok("delete", "networkpolicy", wanted["metadata"]["name"], "-n", space)
    put(cluster, wanted)  # it continues once that is gone
    made = get(api_server, space, "networkpolicy", wanted["metadata"]["name"])
    assert drift.holds(made, manifests.sealed(wanted))


def test_a_deployment_made_with_kubectl_is_not_written_over(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    wanted = manifests.deployment(order(), using, "512Mi")
    there = foreign(api_server, wanted, replicas=3)
    with pytest.raises(NameTaken, match="that is not Ekiben's"):
        put(cluster, wanted)
    assert get(api_server, space, "deployment", "churn") == there


def test_an_object_of_another_deployment_is_not_written_over(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    wanted = manifests.service("churn", using)
    other = f"churn{names.SUFFIX}"  # an earlier release's Service had the deployment's own name
    before = manifests.service(other, using)
    before["metadata"]["name"] = other
    put(cluster, before)
    with pytest.raises(NameTaken, match=f"of the deployment '{other}'"):
        put(cluster, wanted)
    spec = get(api_server, space, "service", other)["spec"]
    assert spec["selector"][names.DEPLOYMENT] == other


def test_the_default_route_moves_from_one_deployment_to_another(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    put(cluster, routes.default_route("churn", using), 5)
    put(cluster, routes.default_route("ranker", using), 1)  # leases of two deployments count apart
    labels = get(api_server, space, "ingress", names.DEFAULT_ROUTE)["metadata"]["labels"]
    assert labels[names.DEPLOYMENT] == "ranker"


def test_what_is_not_wanted_any_more_goes_although_it_came_with_the_creation(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    first = manifests.deployment(order(resources={"gpu": "1", "memory": "1Gi"}), using, "512Mi")
    put(cluster, first)
    second = manifests.deployment(order(revision=8, resources={"memory": "1Gi"}), using, "512Mi")
    put(cluster, second)
    live = get(api_server, space, "deployment", "churn")
    (container,) = live["spec"]["template"]["spec"]["containers"]
    assert using.gpu_resource not in container["resources"]["limits"]
    assert drift.holds(live, manifests.sealed(second))
    ours = [each for each in live["metadata"]["managedFields"] if each["manager"] == names.MANAGER]
    assert [each["operation"] for each in ours] == ["Apply"]


def test_a_scaled_deployment_keeps_its_replicas_when_it_is_applied_again(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    put(cluster, manifests.deployment(order(), using, "512Mi"))
    live = cluster.get("Deployment", space, "churn")
    assert live is not None
    cluster.scale(live, 4)
    put(cluster, manifests.deployment(order(revision=8), using, "512Mi"))
    assert get(api_server, space, "deployment", "churn")["spec"]["replicas"] == 4


def test_what_others_edit_in_an_object_of_ours_is_taken_back(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    wanted = manifests.model_policy("churn", using)
    name = wanted["metadata"]["name"]
    put(cluster, wanted)
    api_server.ok("patch", "networkpolicy", name, "-n", space, "--type=merge", "-p", '{"spec": {"egress": [{}]}}')
    eventually(lambda: not drift.holds(cluster.get("NetworkPolicy", space, name) or {}, manifests.sealed(wanted)))
    put(cluster, wanted)
    assert get(api_server, space, "networkpolicy", name)["spec"].get("egress", []) == []


def test_a_deletion_needs_the_label_and_the_very_object(
    cluster: Cluster, api_server: Server, using: Settings, space: str
) -> None:
    wanted = manifests.service("churn", using)
    name = wanted["metadata"]["name"]
    put(cluster, wanted)
    known = cluster.get("Service", space, name)
    assert known is not None
    api_server.ok("label", "service", name, "-n", space, f"{names.MANAGED_BY}-")
    cluster.delete("Service", known)
    assert get(api_server, space, "service", name)["metadata"]["uid"] == known["metadata"]["uid"]

    api_server.ok("label", "service", name, "-n", space, f"{names.MANAGED_BY}={names.MANAGER}")
    cluster.delete("Service", known)  # it has changed since, and is ours
    assert api_server.kubectl("get", "service", name, "-n", space).returncode != 0
    there = foreign(api_server, wanted)
    cluster.delete("Service", known)
    assert get(api_server, space, "service", name) == there
