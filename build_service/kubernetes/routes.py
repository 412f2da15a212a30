"""How a deployment is reached from outside: an Ingress or an HTTPRoute, from the same few words. Pure.

No path is rewritten, as no two controllers agree on that: a model knows its prefix. Only constant annotations, of whose
values none is a user's.
"""

from __future__ import annotations

import math
from typing import Any

from build_service.kubernetes import names
from build_service.kubernetes.manifests import Object, labels
from build_service.settings import Settings
from registry.manifest import RESERVED

_PREFIX = "/inference"
# Routes of a model that are reached without its name, for the default deployment. A deployment cannot have such a name.
# Own routes of a project go to the service's catch-all, which hands them on.
DEFAULT_PATHS = ("predict", "health", "metadata", "label", "docs", "docs.json", "feedback", "v2")
assert set(DEFAULT_PATHS) <= RESERVED


def route(name: str, settings: Settings) -> Object:
    """`/inference/NAME` to the deployment's Service."""
    kind = "Ingress" if settings.routing == "ingress" else "HTTPRoute"
    return _made(names.of(kind, name), name, [f"{_PREFIX}/{name}"], settings)


def default_route(name: str, settings: Settings) -> Object:
    """`/inference/predict` and its like to the default deployment's Service."""
    return _made(names.DEFAULT_ROUTE, name, [f"{_PREFIX}/{path}" for path in DEFAULT_PATHS], settings)


def _made(title: str, deployment: str, paths: list[str], settings: Settings) -> Object:
    make = _ingress if settings.routing == "ingress" else _http_route
    return make(title, deployment, paths, settings)


def _ingress(title: str, deployment: str, paths: list[str], settings: Settings) -> Object:
    backend = {"service": {"name": names.of("Service", deployment), "port": {"name": names.PORT_NAME}}}
    rule: Object = {"http": {"paths": [{"path": path, "pathType": "Prefix", "backend": backend} for path in paths]}}
    if settings.ingress_host:
        rule["host"] = settings.ingress_host
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {
            "name": title,
            "namespace": settings.models_namespace,
            "labels": labels(deployment),
            "annotations": _annotations(settings),
        },
        "spec": {"ingressClassName": settings.ingress_class, "rules": [rule]},
    }


def _annotations(settings: Settings) -> dict[str, str]:
    """Both families of nginx cap bodies at 1 MiB and answers at 60 s unless they are told otherwise."""
    body = f"{math.ceil(settings.inference_body / 2**20)}m"
    seconds = math.ceil(settings.inference_seconds) + 5
    if settings.ingress_style == "nginx-inc":
        return {
            "nginx.org/mergeable-ingress-type": "minion",
            "nginx.org/client-max-body-size": body,
            "nginx.org/proxy-read-timeout": f"{seconds}s",
        }
    return {
        "nginx.ingress.kubernetes.io/proxy-body-size": body,
        "nginx.ingress.kubernetes.io/proxy-read-timeout": str(seconds),
    }


def _http_route(title: str, deployment: str, paths: list[str], settings: Settings) -> Object:
    assert settings.gateway is not None, "checked by Settings"
    namespace, gateway = settings.gateway.split("/")
    backend = {"kind": "Service", "name": names.of("Service", deployment), "port": names.SERVICE_PORT}
    spec: dict[str, Any] = {
        "parentRefs": [{"kind": "Gateway", "name": gateway, "namespace": namespace}],
        # At most eight matches a rule, by the specification of the Gateway API.
        "rules": [
            {
                "matches": [{"path": {"type": "PathPrefix", "value": path}} for path in paths[at : at + 8]],
                "backendRefs": [backend],
            }
            for at in range(0, len(paths), 8)
        ],
    }
    if settings.ingress_host:
        spec["hostnames"] = [settings.ingress_host]
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": title, "namespace": settings.models_namespace, "labels": labels(deployment)},
        "spec": spec,
    }
