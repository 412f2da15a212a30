"""Orders and settings → objects of Kubernetes. Pure: the same inputs give the same objects, and nothing is read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from build_service.kubernetes import names
from build_service.kubernetes.settings import toleration
from build_service.platform import BuildOrder, RevisionOrder
from build_service.quantities import memory_limit, parse_memory
from build_service.settings import GIB, MIB, Settings
from registry import digest

Object = dict[str, Any]

_USER = 65532
_LEAVE_SECONDS = 10  # from the end of readiness until every proxy has surely heard of it
_SPARE_SECONDS = 5
_PUBLIC_BUT = (  # IPv4 and IPv6 ranges that are no part of the public internet
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.168.0.0/16", "198.18.0.0/15", "224.0.0.0/4", "240.0.0.0/4",
)  # fmt: skip
_ROOM_FOR_CODE = 512 * MIB
_ROOM_FOR_LOGS = 256 * MIB  # kubelets keep five files of 10 MiB of each container, and count them as its disk
_DISK = "ephemeral-storage"


def labels(deployment: str) -> dict[str, str]:
    """The immutable selector of a deployment's pods."""
    return {**names.OURS, names.DEPLOYMENT: deployment, names.VARIANT: names.MAIN}


def sealed(obj: Object, fence: int = 0) -> Object:
    """The object with the digest of what it says, so that a later look can tell whether it is still wanted so."""
    annotations = obj["metadata"].get("annotations", {})
    marks = {names.APPLIED: digest.of_json(obj)[len("sha256:") :][:32], names.FENCE: str(fence)}
    return {**obj, "metadata": {**obj["metadata"], "annotations": {**annotations, **marks}}}


# --- serving ----------------------------------------------------------------------------------------------------------


def image(order: RevisionOrder, settings: Settings) -> str:
    return f"{settings.pull_address}/{settings.registry_repository}@{order.build['image']['digest']}"


def resources(order: RevisionOrder, settings: Settings, kind_memory: str) -> Object:
    """Memory is bounded and reserved as asked; CPU is reserved, and what is idle may be used."""
    asked = order.resources
    limit = asked.get("memory") or memory_limit(kind_memory, order.version.size)
    reserved = asked.get("memory") or f"{max(parse_memory(limit) // 2 // MIB, 64)}Mi"
    requests = {
        "cpu": asked.get("cpu") or settings.model_cpu,
        "memory": reserved,
        _DISK: settings.model_disk_request,
    }
    limits = {"memory": limit, _DISK: _mebibytes(parse_memory(settings.model_disk) + _ROOM_FOR_LOGS)}
    if gpus := int(asked.get("gpu") or 0):
        requests[settings.gpu_resource] = limits[settings.gpu_resource] = str(gpus)
    return {"requests": requests, "limits": limits}


def deployment(order: RevisionOrder, settings: Settings, kind_memory: str) -> Object:
    """Without replicas: those belong to the scale subresource, or to an autoscaler."""
    rolling = {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    selector = labels(order.deployment)
    about = {
        names.MODEL: order.version.name,
        names.VERSION: str(order.version.number),
        names.REVISION: str(order.revision),
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(
            names.of("Deployment", order.deployment), settings.models_namespace, {**selector, **about}
        ),
        "spec": {
            "selector": {"matchLabels": selector},
            "strategy": {"type": "Recreate"} if order.strategy == "replace" else rolling,
            "revisionHistoryLimit": 2,
            # Kubernetes' own deadline undoes nothing and says nothing that the control loop does not say better.
            "progressDeadlineSeconds": 86400,
            "template": {
                "metadata": {"labels": {**selector, **about}, **_making(order)},
                "spec": _serving_pod(order, settings, kind_memory),
            },
        },
    }


def _making(order: RevisionOrder) -> Object:
    """An image that was lost and made again has the digest it had: new pods pull it at once, where those that did not
    find it would wait ever longer."""
    making = order.build.get("making")
    return {} if making is None else {"annotations": {names.MAKING: str(making)}}


def _serving_pod(order: RevisionOrder, settings: Settings, kind_memory: str) -> Object:
    volumes: list[Object] = [{"name": "tmp", "emptyDir": {"sizeLimit": settings.model_disk}}]
    mounts: list[Object] = [{"name": "tmp", "mountPath": "/tmp"}]
    if not settings.inference_open:
        source = {"name": names.TOKENS_CONFIGMAP, "optional": True}
        volumes.append({"name": "tokens", "configMap": source})
        mounts.append({"name": "tokens", "mountPath": names.TOKENS_FOLDER, "readOnly": True})
    if claim := settings.kind_folders.get(order.version.kind):
        volumes.append({"name": "folder", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": "folder", "mountPath": names.KIND_FOLDER, "readOnly": True})
    container = {
        "name": names.CONTAINER,
        "image": image(order, settings),
        "imagePullPolicy": "IfNotPresent",
        "env": _variables(_serving_environment(order, settings)),
        "ports": [{"name": names.PORT_NAME, "containerPort": names.PORT, "protocol": "TCP"}],
        "resources": resources(order, settings, kind_memory),
        "volumeMounts": mounts,
        "startupProbe": _probe("/readyz", period=1, failures=math.ceil(settings.ready_seconds), timeout=2),
        "readinessProbe": _probe("/readyz", period=1, failures=3, timeout=2),
        "livenessProbe": _probe("/livez", period=10, failures=6, timeout=5),
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": _CONTAINER_SECURITY,
    }
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels(order.deployment)},
    }
    return {
        **_pod(settings, settings.model_priority_class, settings.model_node_selector, settings.model_tolerations),
        "containers": [container],
        "volumes": volumes,
        "topologySpreadConstraints": [spread],
        "terminationGracePeriodSeconds": math.ceil(settings.drain_seconds) + _LEAVE_SECONDS + _SPARE_SECONDS,
    }


def _serving_environment(order: RevisionOrder, settings: Settings) -> dict[str, str]:
    version = order.version
    return {
        "EKIBEN_MODEL_NAME": version.name,
        "EKIBEN_MODEL_VERSION": str(version.number),
        "EKIBEN_MODEL_DIGEST": version.digest,
        "EKIBEN_MODEL_METADATA": json.dumps({"labels": version.labels}, sort_keys=True),
        # The second is for the default deployment. All have it: to become the default must not restart a model.
        "EKIBEN_URL_PREFIX": f"/inference/{order.deployment},/inference",
        "EKIBEN_MAX_BODY_BYTES": str(settings.inference_body),
        "EKIBEN_REQUEST_SECONDS": f"{settings.inference_seconds:g}",
        # Not preStop: to some proxies a pod that ends is as good as any while its readiness probe succeeds.
        "EKIBEN_LEAVE_SECONDS": str(_LEAVE_SECONDS),
        **({} if settings.inference_open else {"EKIBEN_INFERENCE_TOKENS_FILE": names.TOKENS_FILE}),
        **({"EKIBEN_PASS_HEADERS": ",".join(settings.pass_headers)} if settings.pass_headers else {}),
        **({"EKIBEN_FOLDER": names.KIND_FOLDER} if version.kind in settings.kind_folders else {}),
    }


def service(name: str, settings: Settings) -> Object:
    port = {"name": names.PORT_NAME, "port": names.SERVICE_PORT, "targetPort": names.PORT_NAME, "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(names.of("Service", name), settings.models_namespace, labels(name)),
        "spec": {"type": "ClusterIP", "selector": labels(name), "ports": [port]},
    }


def disruption_budget(name: str, settings: Settings) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(names.of("PodDisruptionBudget", name), settings.models_namespace, labels(name)),
        # Pods that are not ready anyway must not hold up the drain of a node.
        "spec": {
            "maxUnavailable": 1,
            "selector": {"matchLabels": labels(name)},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def autoscaler(order: RevisionOrder, settings: Settings) -> Object:
    assert order.autoscale is not None
    target = {"type": "Utilization", "averageUtilization": order.autoscale["cpu"]}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(
            names.of("HorizontalPodAutoscaler", order.deployment), settings.models_namespace, labels(order.deployment)
        ),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": order.deployment},
            "minReplicas": order.replicas,
            "maxReplicas": order.autoscale["max"],
            "metrics": [{"type": "Resource", "resource": {"name": "cpu", "target": target}}],
        },
    }


def model_policy(name: str, settings: Settings) -> Object:
    """Who may call a model, and that it calls nobody. Kubelets' probes are always let in."""
    namespaces = sorted({settings.namespace, *settings.model_callers})
    sources: list[Object] = [{"namespaceSelector": _namespace(namespace)} for namespace in namespaces]
    sources += [{"ipBlock": {"cidr": block}} for block in settings.model_caller_blocks]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(names.of("NetworkPolicy", name), settings.models_namespace, labels(name)),
        "spec": {
            "podSelector": {"matchLabels": labels(name)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": sources, "ports": [{"protocol": "TCP", "port": names.PORT}]}],
            "egress": [{}] if settings.model_egress == "open" else [],
        },
    }


def token_digests(digests: Iterable[str], settings: Settings) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(names.TOKENS_CONFIGMAP, settings.models_namespace, names.OURS),
        "data": {"sha256": "".join(f"{digest}\n" for digest in sorted(digests))},
    }


# --- builds -----------------------------------------------------------------------------------------------------------


def build_spec(order: BuildOrder, presigned: Mapping[str, str]) -> Object:
    """What the step fetch reads (docs/design.md §7). `presigned`: a URL for each of the version's files, by path."""
    assert order.image is not None
    return {
        "schema": "ekiben.build.v1",
        "model": {
            "digest": order.version.digest,
            "files": [{"path": path, "url": url} for path, url in sorted(presigned.items())],
        },
        "kind": {"name": order.version.kind},
        "allow_code": order.allow_code,
        "allowed_packages": list(order.allowed_packages),
        "lock": order.version.lock,
        "image": {key: value for key, value in order.image.items() if key != "output"},
    }


def version_files(manifest: Mapping[str, Any]) -> list[str]:
    """Paths of all stored files of a version, below its location (docs/design.md §4)."""
    paths = ["manifest.json", *(f"files/{file['path']}" for file in manifest["files"])]
    paths += [f"{part}.json" for part in ("sample", "expected") if manifest.get(part)]
    if requirements := manifest.get("requirements"):
        paths.append(f"requirements/{requirements['path']}")
    return paths


def build_job(
    order: BuildOrder,
    settings: Settings,
    *,
    spec_url: str,
    result_url: str,
    project: bool,
    steps: Sequence[str] = names.STEPS,
) -> Object:
    """`steps`: without `inspect` where it is known that there is nothing to import."""
    about = {
        **names.OURS,
        names.BUILD: order.id,
        names.ATTEMPT: str(order.attempt),
        names.MODEL: order.version.name,
        names.VERSION: str(order.version.number),
    }
    pod = {
        **_pod(settings, settings.build_priority_class, settings.build_node_selector, settings.build_tolerations),
        **_build_pod(order, settings, spec_url, result_url, project, steps),
        "restartPolicy": "Never",
        # The pod's, not the Job's: that would count the time in the queue.
        "activeDeadlineSeconds": math.ceil(settings.build_seconds),
        "terminationGracePeriodSeconds": 5,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(names.job(order.id, order.attempt), settings.builds_namespace, about),
        "spec": {
            "backoffLimit": 0,
            "ttlSecondsAfterFinished": settings.build_ttl_seconds,
            "podFailurePolicy": {
                "rules": [
                    {
                        "action": "FailJob",
                        "onExitCodes": {"operator": "In", "values": [names.EXIT_USER, names.EXIT_LIMIT]},
                    },
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                ]
            },
            "template": {"metadata": {"labels": about}, "spec": pod},
        },
    }


def _build_pod(
    order: BuildOrder, settings: Settings, spec_url: str, result_url: str, project: bool, steps: Sequence[str]
) -> Object:
    size = order.version.size
    room = {
        "fetch": size + parse_memory(settings.build_disk),
        "inspect": GIB + size if project else 64 * MIB,
        "assemble": _ROOM_FOR_CODE + (size if project else 0),
    }
    volumes: list[Object] = [{"name": step, "emptyDir": {"sizeLimit": _mebibytes(room[step])}} for step in names.STEPS]
    # A pod may use what its largest container may: all volumes are there until it ends.
    disk = _mebibytes(sum(room.values()) + _ROOM_FOR_LOGS)
    trusted: list[Object] = []
    network = {**_proxies(settings)}
    if settings.ca_configmap:
        volumes.append({"name": "ca", "configMap": {"name": settings.ca_configmap}})
        trusted = [{"name": "ca", "mountPath": names.CA_FOLDER, "readOnly": True}]
        network |= {"SSL_CERT_FILE": names.CA_FILE, "REQUESTS_CA_BUNDLE": names.CA_FILE}
    reads, pushes = (
        _credential(volumes, *given)
        for given in (("pull", settings.registry_read_secret), ("push", settings.registry_push_secret))
    )

    def step(name: str, environment: dict[str, str], mounts: list[Object]) -> Object:
        before = names.STEPS[: names.STEPS.index(name)]
        folders = [{"name": other, "mountPath": f"{names.WORK}/{other}", "readOnly": True} for other in before]
        scratch = [{"name": name, "mountPath": f"{names.WORK}/{name}"}]
        return {
            "name": name,
            "image": settings.builder_image,
            "imagePullPolicy": "IfNotPresent",
            "command": ["python", "-m", "builder_image"],
            "args": [name],
            "env": _variables({"EKIBEN_WORK": names.WORK, **environment}),
            "volumeMounts": [*folders, *scratch, *mounts],
            "resources": {
                "requests": {
                    "cpu": settings.build_cpu,
                    "memory": settings.build_memory_request,
                    _DISK: _mebibytes(min(2 * size + _ROOM_FOR_CODE, sum(room.values()))),
                },
                "limits": {"memory": f"{settings.build_memory // MIB}Mi", _DISK: disk},
            },
            "terminationMessagePath": "/dev/termination-log",
            "terminationMessagePolicy": "FallbackToLogsOnError",
            "securityContext": _CONTAINER_SECURITY,
        }

    auth = {"EKIBEN_REGISTRY_AUTH": f"{names.PULL_AUTH}/config.json"} if reads else {}
    if settings.registry_read:
        auth["EKIBEN_REGISTRY_READ"] = settings.registry_read
    fetch = step("fetch", {"EKIBEN_SPEC_URL": spec_url, **auth, **network, **_indexes(settings)}, [*trusted, *reads])
    if settings.index_secret:
        fetch["envFrom"] = [{"secretRef": {"name": settings.index_secret}}]
    # No secret, no proxy, no URL: this one runs what the user wrote.
    inspect = step("inspect", {}, [])
    auth = {"EKIBEN_REGISTRY_AUTH": f"{names.PUSH_AUTH}/config.json"} if pushes else {}
    assemble = step("assemble", {"EKIBEN_RESULT_URL": result_url, **auth, **network}, [*trusted, *pushes])
    before = [each for each in (fetch, inspect) if each["name"] in steps]
    return {"initContainers": before, "containers": [assemble], "volumes": volumes}


def _credential(volumes: list[Object], name: str, secret: str | None) -> list[Object]:
    """Mounts of a docker config, whose volume is added; none where there is no Secret."""
    if not secret:
        return []
    item = {"key": ".dockerconfigjson", "path": "config.json"}
    volumes.append({"name": name, "secret": {"secretName": secret, "items": [item], "defaultMode": 0o440}})
    return [{"name": name, "mountPath": f"{names.AUTH}/{name}", "readOnly": True}]


def _proxies(settings: Settings) -> dict[str, str]:
    given = {
        "HTTP_PROXY": settings.http_proxy,
        "HTTPS_PROXY": settings.https_proxy,
        "NO_PROXY": ",".join(settings.no_proxy),
    }
    return {key: value for key, value in given.items() if value}


def _indexes(settings: Settings) -> dict[str, str]:
    given = {"UV_DEFAULT_INDEX": settings.index_url, "UV_INDEX": " ".join(settings.extra_index_urls)}
    return {key: value for key, value in given.items() if value}


def builds_policy(settings: Settings) -> Object:
    """Builds reach names, the public internet, pods that say so, and what the settings add; nothing reaches them."""
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    public = [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": list(_PUBLIC_BUT)}},
        {"ipBlock": {"cidr": "2000::/3"}},
    ]
    inside: list[Object] = [{"namespaceSelector": {}, "podSelector": {"matchLabels": {names.REACHABLE: "true"}}}]
    inside += [{"ipBlock": {"cidr": block}} for block in settings.build_egress]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(names.BUILDS_POLICY, settings.builds_namespace, names.OURS),
        "spec": {
            "podSelector": {"matchLabels": names.OURS},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [],
            "egress": [
                {"to": [{"namespaceSelector": _namespace("kube-system")}], "ports": dns},
                {"to": [*public, *inside]},
            ],
        },
    }


# --- what both share --------------------------------------------------------------------------------------------------

_CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


def _pod(settings: Settings, priority: str, nodes: Mapping[str, str], taints: tuple[str, ...]) -> Object:
    pod: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,  # hundreds of variables, one for every other model
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "runAsGroup": _USER,
            "fsGroup": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    if settings.pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.pull_secrets]
    if priority:
        pod["priorityClassName"] = priority
    if nodes:
        pod["nodeSelector"] = dict(sorted(nodes.items()))
    if taints:
        pod["tolerations"] = [toleration(text) for text in taints]
    return pod


def _metadata(name: str, namespace: str, marks: Mapping[str, str]) -> Object:
    return {"name": name, "namespace": namespace, "labels": dict(marks)}


def _namespace(name: str) -> Object:
    return {"matchLabels": {"kubernetes.io/metadata.name": name}}


def _mebibytes(amount: int) -> str:
    return f"{math.ceil(amount / MIB)}Mi"


def _variables(environment: Mapping[str, str]) -> list[Object]:
    # $(NAME) would be replaced by the kubelet; a label of a user's may hold it.
    return [{"name": name, "value": value.replace("$", "$$")} for name, value in environment.items()]


def _probe(path: str, *, period: int, failures: int, timeout: int) -> Object:
    return {
        "httpGet": {"path": path, "port": names.PORT_NAME, "scheme": "HTTP"},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": timeout,
    }
