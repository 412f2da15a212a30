"""Other ways in than an Ingress of a controller that merges: routes of a Gateway, and Ingresses as F5's controller
wants them.

For the Gateway the installation itself is set up anew for a while, and a deployment that it has comes along.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import yaml

from build_service.kubernetes import names, routes
from build_service.settings import Settings
from tests.cluster.cluster import Cluster
from tests.cluster.workloads import eventually
from tests.k8s.installation import ROOT, Installation, Trained

HOST, NAME = "gateway.test", "gated"
STRAIGHT = "asked:1"
"""An id of a request that models take, and the service, when calls go through it, replaces."""
COMPONENTS = ROOT / "k8s" / "components"


def gateway(namespaces: Mapping[str, Any]) -> dict[str, Any]:
    """Of the class that the test cluster has; it admits routes of these namespaces."""
    listener: dict[str, Any] = {"name": "web", "port": 80, "protocol": "HTTP", "hostname": HOST}
    listener |= {"allowedRoutes": {"namespaces": namespaces}}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1", "kind": "Gateway",
        "metadata": {"name": "ekiben", "namespace": "ekiben"},
        "spec": {"gatewayClassName": "traefik", "listeners": [listener]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def gated(installed: Installation, churn: Sequence[Trained]) -> Iterator[Installation]:
    """The installation with EKIBEN_ROUTING=gateway, and a deployment that it had before; the Gateway admits the API."""
    cluster = installed.cluster
    installed.remove(NAME)
    installed.push(churn[0].file, NAME, sample=churn[0].sample)
    installed.live(NAME)
    (route,) = yaml.safe_load_all((COMPONENTS / "gateway" / "route.yaml").read_text())
    route["spec"]["hostnames"] = [HOST]
    cluster.apply(gateway({"from": "Same"}), route)
    settings = {
        "EKIBEN_ROUTING": "gateway", "EKIBEN_GATEWAY": "ekiben/ekiben", "EKIBEN_INGRESS_HOST": HOST,
        "EKIBEN_PUBLIC_URL": f"http://{HOST}",
    }  # fmt: skip
    set_up(cluster, *(f"{name}={value}" for name, value in settings.items()))
    yield installed
    installed.remove(NAME)
    eventually(lambda: not objects(cluster, "httproutes"))
    set_up(cluster, *(f"{name}-" for name in settings))
    cluster.kubectl("-n", "ekiben", "delete", "httproute/ekiben", "gateway/ekiben")


def set_up(cluster: Cluster, *variables: str) -> None:
    """The service with these variables over its settings."""
    cluster.kubectl("-n", "ekiben", "set", "env", "deploy/ekiben", "--containers=ekiben", *variables)
    cluster.kubectl("-n", "ekiben", "rollout", "status", "deploy/ekiben", "--timeout=240s", timeout=250)


def objects(cluster: Cluster, kind: str) -> list[dict[str, Any]]:
    return list(cluster.get(kind, "-n", "ekiben-models", "-l", f"{names.DEPLOYMENT}={NAME}")["items"])


def test_the_api_and_models_answer_through_routes_of_a_gateway_and_a_refused_route_is_told(
    gated: Installation, churn: Sequence[Trained]
) -> None:
    cluster, named = gated.cluster, {"Host": HOST}

    def deployment() -> dict[str, Any]:
        answer = gated.http.get(f"/deployments/{NAME}", headers=named)
        return dict(answer.json()) if answer.status_code == 200 else {}

    def predicted(path: str) -> str | None:
        """The id under which a call was answered."""
        answer = gated.http.post(path, json={"inputs": churn[0].rows}, headers={**named, "X-Request-Id": STRAIGHT})
        if answer.status_code != 200:
            return None
        if path == "/inference/predict" and answer.headers["ekiben-model"] != NAME:
            return None  # whoever was the default before answers until the route has moved
        assert answer.json()["outputs"] == pytest.approx(churn[0].outputs)
        return str(answer.headers["x-request-id"])

    # the Gateway takes no route of the models' namespace: that is told, and the API's route hands calls on
    refused = eventually(lambda: deployment() if deployment().get("code") == "route_refused" else None)
    assert refused["state"] == "live"
    assert "ekiben/ekiben" in refused["reason"]
    assert "NotAllowedByListeners" in refused["reason"]
    assert refused["url"].startswith(f"http://{HOST}/inference/")
    through = eventually(lambda: predicted(f"/inference/{NAME}/predict"))
    assert through != STRAIGHT

    both = {"key": "kubernetes.io/metadata.name", "operator": "In", "values": ["ekiben", "ekiben-models"]}
    cluster.apply(gateway({"from": "Selector", "selector": {"matchExpressions": [both]}}))
    assert eventually(lambda: predicted(f"/inference/{NAME}/predict") == STRAIGHT)
    assert eventually(lambda: deployment().get("reason", "") is None)
    # no Ingress of before is left beside the route
    assert eventually(lambda: not objects(cluster, "ingresses"))

    version = refused["target"]["version"]
    assert gated.http.put(f"/deployments/{NAME}", json={"version": version, "default": True}, headers=named).is_success
    assert eventually(lambda: predicted("/inference/predict") == STRAIGHT)
    assert [each["spec"]["hostnames"] for each in objects(cluster, "httproutes")] == [[HOST], [HOST]]


# --- F5's controller --------------------------------------------------------------------------------------------------

# What its documentation of mergeable Ingresses forbids; it would refuse the object, and with it the host or the path.
NOT_ON_MASTERS = ("rewrites", "ssl-services", "grpc-services", "websocket-services", "health-checks", "use-cluster-ip")
NOT_ON_MINIONS = (
    "proxy-hide-headers", "proxy-pass-headers", "redirect-to-https", "ssl-redirect", "hsts", "server-tokens",
    "listen-ports", "server-snippets", "ssl-ciphers", "app-root",
)  # fmt: skip


def test_ingresses_for_f5s_controller_are_accepted_and_keep_its_rules(cluster: Cluster, namespace: str) -> None:
    settings = Settings(
        platform="kubernetes", s3_endpoint="http://unused.invalid", builder_image="unused", registry_push="unused",
        models_namespace=namespace, ingress_style="nginx-inc", ingress_host="models.example", ingress_class="f5",
        inference_body=100 << 20, inference_seconds=90,
    )  # fmt: skip
    ours = [routes.route("churn", settings), routes.route("other", settings), routes.default_route("churn", settings)]
    master, api = yaml.safe_load_all((COMPONENTS / "ingress-f5" / "ingress.yaml").read_text())
    for each in (master, api):
        each["metadata"]["namespace"] = namespace
        each["spec"]["rules"][0]["host"] = "models.example"
        each["spec"]["ingressClassName"] = "f5"
    for each in (master, api, *ours):
        options = ("--dry-run=server", "--validate=strict", "--warnings-as-errors")
        cluster.kubectl("apply", *options, "-f", "-", text=json.dumps(each))

    assert master["metadata"]["annotations"] == {"nginx.org/mergeable-ingress-type": "master"}
    assert master["spec"]["rules"] == [{"host": "models.example"}]
    assert not set(prefixed(master)) & set(NOT_ON_MASTERS)
    paths: list[str] = []
    for minion in (api, *ours):
        (rule,) = minion["spec"]["rules"]
        assert rule["host"] == "models.example"
        assert "tls" not in minion["spec"]
        assert "defaultBackend" not in minion["spec"]
        assert prefixed(minion)["mergeable-ingress-type"] == "minion"
        assert not set(prefixed(minion)) & set(NOT_ON_MINIONS)
        paths += [path["path"] for path in rule["http"]["paths"]]
    assert len(paths) == len(set(paths))  # of two minions with one path the older has it
    assert {"/models", "/inference", "/inference/churn", "/inference/other", "/inference/predict"} <= set(paths)
    # typed, constant, and the same for every model: no word of a user's
    assert [prefixed(each) for each in ours] == 3 * [
        {"mergeable-ingress-type": "minion", "client-max-body-size": "100m", "proxy-read-timeout": "95s"}
    ]
    assert prefixed(api)["client-max-body-size"] == "0"  # an upload is as large as it is


def prefixed(ingress: Mapping[str, Any]) -> dict[str, str]:
    """Annotations of that controller, by what comes after its prefix."""
    found = ingress["metadata"]["annotations"]
    assert all(name.startswith("nginx.org/") for name in found)
    return {name.removeprefix("nginx.org/"): value for name, value in found.items()}
