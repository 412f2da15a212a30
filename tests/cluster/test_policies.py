"""The enforcer of NetworkPolicies: the rules it makes, and what pods see of them."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.policies import Pod, matches, ruleset
from tests.cluster.workloads import eventually, run, serve

WEB = Pod("shop", "10.9.0.2", {"app": "web"}, {"http": ("tcp", 8080)})
JOB = Pod("shop", "10.9.0.3", {"app": "job"}, {})
AWAY = Pod("away", "10.9.0.4", {"app": "job"}, {})
NAMESPACES = {"shop": {"name": "shop"}, "away": {"name": "away"}}


def policy(**spec: object) -> dict[str, object]:
    return {"metadata": {"name": "p", "namespace": "shop"}, "spec": {"podSelector": {}, **spec}}


def rules_of(chain: str, *policies: dict[str, object]) -> list[str]:
    text = ruleset([WEB, JOB, AWAY], NAMESPACES, policies)
    return [line.strip() for line in text.partition(f"chain {chain} {{\n")[2].partition("  }")[0].splitlines()]


ITSELF = "ip saddr 10.9.0.2 ip daddr 10.9.0.2 return"


def test_a_pod_that_no_policy_selects_is_free() -> None:
    elsewhere = policy(podSelector={"matchLabels": {"app": "job"}}, policyTypes=["Ingress"])
    assert rules_of("ingress_10_9_0_2", elsewhere) == []
    assert rules_of("ingress", elsewhere) == ["ip daddr vmap { 10.9.0.3 : jump ingress_10_9_0_3 }"]


def test_a_pod_that_is_selected_is_denied_what_no_rule_allows() -> None:
    assert rules_of("egress_10_9_0_2", policy(policyTypes=["Egress"])) == [ITSELF, "drop"]
    assert rules_of("ingress_10_9_0_2", policy(policyTypes=["Egress"])) == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, ["return"]),
        ({"from": [{"podSelector": {"matchLabels": {"app": "job"}}}]}, ["ip saddr { 10.9.0.3 } return"]),
        (
            {"from": [{"namespaceSelector": {"matchLabels": {"name": "away"}}, "podSelector": {}}]},
            ["ip saddr { 10.9.0.4 } return"],
        ),
        ({"from": [{"podSelector": {"matchLabels": {"app": "nobody"}}}]}, []),
        (
            {"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.9.0.0/16"]}}], "ports": [{"port": 80}]},
            ["ip saddr 10.0.0.0/8 ip saddr != 10.9.0.0/16 tcp dport 80 return"],
        ),
        ({"from": [{"ipBlock": {"cidr": "::/0"}}]}, []),
        ({"ports": [{"port": 80, "endPort": 90}]}, ["tcp dport 80-90 return"]),
        ({"ports": [{"protocol": "UDP"}]}, ["meta l4proto udp return"]),
        ({"ports": [{"port": "http"}]}, ["tcp dport 8080 return"]),
        ({"ports": [{"port": "http", "protocol": "UDP"}]}, []),
    ],
)
def test_rules_inwards(rule: dict[str, object], expected: list[str]) -> None:
    found = rules_of("ingress_10_9_0_2", policy(policyTypes=["Ingress"], ingress=[rule]))
    assert found == [ITSELF, *expected, "drop"]


def test_a_port_by_name_outwards_is_that_of_each_pod_which_is_called() -> None:
    found = rules_of("egress_10_9_0_3", policy(policyTypes=["Egress"], egress=[{"ports": [{"port": "http"}]}]))
    assert "ip daddr 10.9.0.2 tcp dport 8080 return" in found


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ({"key": "app", "operator": "In", "values": ["web", "api"]}, True),
        ({"key": "app", "operator": "NotIn", "values": ["web"]}, False),
        ({"key": "absent", "operator": "NotIn", "values": ["web"]}, True),
        ({"key": "app", "operator": "Exists"}, True),
        ({"key": "app", "operator": "DoesNotExist"}, False),
    ],
)
def test_selectors(expression: dict[str, object], expected: bool) -> None:
    assert matches({"matchExpressions": [expression]}, {"app": "web"}) is expected


def test_a_pod_is_denied_and_allowed_as_the_clusters_policies_say(
    cluster: Cluster, namespace: str, python_image: str
) -> None:
    serve(cluster, namespace, "server", python_image)
    serve(cluster, namespace, "client", python_image)
    target = f"server.{namespace}"
    assert call(cluster, namespace, target) == "open"

    kind = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    only_server = {"podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"]}
    metadata = {"name": "server", "namespace": namespace}
    cluster.apply({**kind, "metadata": metadata, "spec": only_server})
    eventually(lambda: "closed" if call(cluster, namespace, target) == "closed" else "")

    from_client = {"from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": "http"}]}
    cluster.apply({**kind, "metadata": metadata, "spec": {**only_server, "ingress": [from_client]}})
    eventually(lambda: "open" if call(cluster, namespace, target) == "open" else "")


def test_a_pod_that_may_call_nobody_cannot_do_so_in_its_first_moment(
    cluster: Cluster, namespace: str, python_image: str
) -> None:
    serve(cluster, namespace, "server", python_image)
    address = cluster.get("service", "server", "-n", namespace)["spec"]["clusterIP"]
    api = cluster.get("service", "kubernetes", "-n", "default")["spec"]["clusterIP"]
    selected = {"podSelector": {"matchLabels": {"app": "caged"}}, "policyTypes": ["Egress"]}
    metadata = {"name": "caged", "namespace": namespace}
    cluster.apply(
        {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": selected}
    )
    code = "import sys, time\n" + CALL + f"print(call('{address}', 80), call('{api}', 443))"
    run(cluster, namespace, "free", python_image, code)
    run(cluster, namespace, "caged", python_image, code)
    assert cluster.kubectl("logs", "-n", namespace, "job/free") == "open open\n"
    assert cluster.kubectl("logs", "-n", namespace, "job/caged") == "closed closed\n"


CALL = """
import socket
def call(host, port):
    try:
        socket.create_connection((host, port), timeout=2).close()
        return "open"
    except TimeoutError:
        return "closed"
"""


def call(cluster: Cluster, namespace: str, host: str) -> str:
    code = CALL + f"print(call({host!r}, 80))"
    return cluster.kubectl("exec", "-n", namespace, "deployment/client", "--", "python3", "-c", code).strip()
