"""Statuses of pods, Jobs and Deployments → reasons that a user understands. Pure: objects in, words out.

A finding says how sure it is: `patience` is the time that it must last before it counts as an end (0: at once; None: it
may pass by itself, so only the rollout's own deadline ends the wait; until then it is the reason for waiting).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from build_service.kubernetes import names
from build_service.platform import Failure

Object = Mapping[str, Any]

_SETTLES = 10.0  # seconds; what another hand may put right in a moment
_LONGEST = 600  # characters of Kubernetes' own words
_INSUFFICIENT = re.compile(r"Insufficient ([A-Za-z0-9./-]+?)(?=[.,;\s]*(?:$|[\s,]))")
_QUOTA = re.compile(
    r"exceeded quota: (?P<name>[^,]+), requested: (?P<asked>.+), used: (?P<used>.+), limited: (?P<limit>.+)"
)
_NO_QUOTA_VALUE = re.compile(r"failed quota: (?P<name>[^:]+): must specify (?P<what>.+)")
# The kubelet's words for a pod that exceeds a limit of its own (pkg/kubelet/eviction/helpers.go):
# Usage of EmptyDir volume "tmp" exceeds the limit "1Gi".
# Container model exceeded its local ephemeral storage limit "1280Mi".
# Pod ephemeral local storage usage exceeds the total limit of containers 1280Mi.
_OWN_DISK = re.compile(r"EmptyDir volume .* exceeds the limit|ephemeral (?:local )?storage (?:usage|limit)")
_NOT_THERE = ("not found", "manifest unknown", "name unknown", "does not exist", "404")
# A step speaks as `ekiben containerize` does, of options; whoever reads it here has settings and Secrets.
_HINTS = {
    "registry_unauthorized": "Is the user of the Secret that EKIBEN_REGISTRY_PUSH_SECRET names the right one, and its "
    "password still valid?",
    "registry_denied": "The user of the Secret that EKIBEN_REGISTRY_PUSH_SECRET names needs the right to push to "
    "EKIBEN_REGISTRY_REPOSITORY.",
    "registry_certificate": "Put the registry's authority into the ConfigMap that EKIBEN_CA_CONFIGMAP names.",
    "registry_speaks_http": "Give the registry a certificate, or allow plain http: EKIBEN_REGISTRY_INSECURE=true.",
}
_NOT_ALLOWED = ("unauthorized", "authorization failed", "denied", "forbidden", "401", "403", "no basic auth")


@dataclass(frozen=True)
class Finding:
    failure: Failure
    patience: float | None = 0.0


# --- serving ----------------------------------------------------------------------------------------------------------


def of_rollout(deployment: Object, pods: Iterable[Object], pull_failures: Mapping[str, int]) -> Finding | None:
    """Why the newest revision of a Deployment is not ready, from the Deployment and that revision's pods; None while
    there is nothing wrong. `pull_failures` counts failed pulls by UID of the pod."""
    pods = list(pods)
    evicted = [pod for pod in pods if _is_evicted(pod)]
    if any(_is_ready(pod) for pod in pods):  # what was evicted stays in the list, and has been replaced
        pods = [pod for pod in pods if not _is_evicted(pod)]
    found = [finding for pod in pods if (finding := of_pod(pod, pull_failures.get(_uid(pod), 0))) is not None]
    if len(evicted) > 1:  # one may have been an accident
        found = [replace(each, patience=0.0) if each.failure.code == "out_of_disk" else each for each in found]
    refused = of_refused_pods(deployment)
    if refused is not None:
        found.append(refused)
    # What is certain comes first, then what lasts.
    return min(found, key=lambda finding: 1e9 if finding.patience is None else finding.patience, default=None)


def of_pod(pod: Object, pull_failures: int) -> Finding | None:
    """Why a serving pod is not ready; None where nothing is wrong (yet)."""
    status = pod.get("status", {})
    if _is_evicted(pod):
        return Finding(_of_eviction(pod), None)
    for container in status.get("containerStatuses", ()):
        finding = _of_container(container, pod, pull_failures)
        if finding is not None:
            return finding
    return of_scheduling(pod)


def of_scheduling(pod: Object) -> Finding | None:
    """Why no node takes the pod. A node may be added, or become free: nothing is certain."""
    condition = _condition(pod, "PodScheduled")
    if condition is None or condition.get("status") != "False" or condition.get("reason") != "Unschedulable":
        return None
    words = _short(condition.get("message"))
    asked = _requests(pod)
    missing = list(dict.fromkeys(_INSUFFICIENT.findall(condition.get("message", ""))))
    if not missing:
        return Finding(
            Failure(
                "unschedulable",
                f"No node of the cluster takes the model's pod: {words}",
                hint="Look at node selectors, taints and tolerations (EKIBEN_MODEL_NODE_SELECTOR, "
                "EKIBEN_MODEL_TOLERATIONS).",
                user=False,
            ),
            None,
        )
    gpus = [name for name in missing if _is_gpu(name)]
    first = gpus[0] if gpus else next((name for name in ("memory", "cpu") if name in missing), missing[0])
    code = "insufficient_gpu" if gpus else f"insufficient_{first}" if first in ("memory", "cpu") else "unschedulable"
    amount = asked.get(first, "?")
    what = f"0 free of {amount} ({first})" if gpus else f"no node has {amount} of {first} free"
    return Finding(
        Failure(
            code,
            f"{what[0].upper()}{what[1:]}. The scheduler says: {words}",
            hint="Ask for less in the deployment's resources, delete a deployment that nobody needs, or add a node.",
            user=False,
        ),
        None,
    )


def of_refused_pods(deployment: Object) -> Finding | None:
    """Why the Deployment's pods cannot even be created: its condition ReplicaFailure."""
    condition = _condition(deployment, "ReplicaFailure")
    if condition is None or condition.get("status") != "True":
        return None
    return refused(str(condition.get("message", "")))


def refused(message: str) -> Finding:
    """What an admission of the API server says, in other words: a quota, a limit, Pod Security, or a company's own."""
    if (quota := _QUOTA.search(message)) is not None:
        return Finding(
            Failure(
                "quota_exceeded",
                f"The quota {quota['name']!r} of the namespace is used up: {quota['asked']} asked for, "
                f"{quota['used']} in use, {quota['limit']} allowed.",
                hint="Ask for less in the deployment's resources, delete a deployment that nobody needs, or have the "
                "quota raised. A rolling update needs room for one more pod; strategy=replace does not.",
                user=False,
            ),
            _SETTLES,
        )
    if (quota := _NO_QUOTA_VALUE.search(message)) is not None:
        return Finding(
            Failure(
                "quota_exceeded",
                f"The quota {quota['name']!r} of the namespace needs pods that say {quota['what'][:200]}.",
                hint="Give the namespace a LimitRange with defaults for them.",
                user=False,
            ),
            _SETTLES,
        )
    if "violates PodSecurity" in message:
        return Finding(
            Failure(
                "pod_security",
                f"The namespace's Pod Security level refuses the pod: {_short(message.partition('violates ')[2])}",
                hint="Model pods keep to the level restricted; the namespace asks for something else.",
                user=False,
            )
        )
    if "usage per" in message:  # a LimitRange's "maximum memory usage per Container is 1Gi, but limit is 2Gi"
        return Finding(
            Failure(
                "limit_exceeded",
                f"The namespace's LimitRange refuses the pod: {_short(message.rpartition('forbidden: ')[2])}",
                hint="Ask for less in the deployment's resources, or have the limit raised.",
                user=False,
            )
        )
    return Finding(
        Failure(
            "pod_refused",
            f"The cluster refuses the pod: {_short(message)}",
            hint="An admission rule of the cluster says no; its owner knows why.",
            user=False,
        ),
        _SETTLES,
    )


def name_taken(message: str, hint: str | None) -> Finding:
    """An object of another owner has the name of one of the deployment's. It may go: nothing is certain."""
    return Finding(Failure("name_taken_in_cluster", message, hint=hint, user=False), None)


def of_routes(routes: Iterable[Object]) -> Failure | None:
    """Why a Gateway does not take a route of a deployment. Of an Ingress nobody says anything."""
    for route in routes:
        generation = route["metadata"].get("generation", 0)
        for parent in route.get("status", {}).get("parents") or ():
            gateway = f"{parent['parentRef'].get('namespace')}/{parent['parentRef'].get('name')}"
            for condition in parent.get("conditions") or ():
                if condition["status"] != "False" or condition.get("observedGeneration", generation) < generation:
                    continue
                if condition["type"] in ("Accepted", "ResolvedRefs"):
                    return Failure(
                        "route_refused",
                        f"The Gateway {gateway} does not take the route {route['metadata']['name']}: "
                        f"{condition.get('reason')}: {_short(condition.get('message'))}",
                        hint="One of its listeners must admit the host of EKIBEN_INGRESS_HOST and HTTPRoutes of the "
                        "models' namespace. Until then calls go through the service.",
                        user=False,
                    )
    return None


def last_crash(pods: Iterable[Object]) -> Failure | None:
    """Of all containers that ended and were started again, and of all evicted pods, the one that ended last."""
    pods = list(pods)
    ended_containers = [
        (str(ended.get("finishedAt")), ended, container, pod)
        for pod in pods
        for container in pod.get("status", {}).get("containerStatuses") or ()
        if container.get("restartCount") and (ended := (container.get("lastState") or {}).get("terminated"))
    ]
    found = [(at, _of_end(ended, container, pod)) for at, ended, container, pod in ended_containers]
    found += [(_evicted_at(pod), _of_eviction(pod)) for pod in pods if _is_evicted(pod)]
    return max(found, key=lambda end: end[0])[1] if found else None


def ends(pod: Object) -> int:
    """How often the pod's process ended although nobody asked for it. An evicted pod is not started again."""
    statuses = pod.get("status", {}).get("containerStatuses") or ()
    restarts: int = sum(status.get("restartCount", 0) for status in statuses)
    return restarts + int(_is_evicted(pod))


def _of_eviction(pod: Object) -> Failure:
    """The node has ended the pod: for what it wrote itself, or because the node was short of something."""
    words = str(pod["status"].get("message"))
    if _OWN_DISK.search(words):
        return Failure(
            "out_of_disk",
            f"The model wrote more to disk than it may: {_short(words)}",
            hint="Write less to /tmp and to the log, or raise EKIBEN_MODEL_DISK.",
        )
    return Failure(
        "evicted",
        f"The model's pod was evicted: {_short(words)}",
        hint="The node is short of what the message names; another pod is started.",
        user=False,
    )


def _evicted_at(pod: Object) -> str:
    """When the pod's last container ended, or (none had started) when the pod came to the node."""
    statuses = pod["status"].get("containerStatuses") or ()
    times = [str(((status.get("state") or {}).get("terminated") or {}).get("finishedAt") or "") for status in statuses]
    return max([*times, str(pod["status"].get("startTime") or "")])


def _of_container(container: Object, pod: Object, pull_failures: int) -> Finding | None:
    waiting = container.get("state", {}).get("waiting") or {}
    reason, words = waiting.get("reason", ""), str(waiting.get("message", ""))
    if reason in ("ErrImagePull", "ImagePullBackOff"):
        return _of_pull(words, container, pull_failures)
    if reason in ("InvalidImageName", "ErrImageNeverPull"):
        return Finding(Failure("image_not_found", f"The image cannot be pulled: {_short(words)}", user=False))
    if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        return Finding(
            Failure(
                "container_not_started",
                f"The node could not start the container: {_short(words)}",
                hint="Something that the pod refers to is missing, or the node is in trouble.",
                user=False,
            ),
            _SETTLES,
        )
    ended = _ended(container)
    if ended is None or container.get("ready"):
        return None
    failure = _of_end(ended, container, pod)
    known = ended.get("exitCode") in names.REFUSED_TO_START or failure.code == "out_of_memory"
    # Another end may have been an accident; a second one is none.
    again = reason == "CrashLoopBackOff" or container.get("restartCount", 0) > 1
    return Finding(failure, 0.0 if known or again else None)


def _of_pull(words: str, container: Object, pull_failures: int) -> Finding:
    image = str(container.get("image", ""))
    low = words.lower().replace(image.lower(), "")  # a digest may hold 404
    if any(sign in low for sign in _NOT_ALLOWED):
        code, why = "image_unauthorized", "the registry does not let the node read it"
        hint = "Look at EKIBEN_PULL_SECRETS and the Secrets that it names."
    elif any(sign in low for sign in _NOT_THERE):
        code, why = "image_not_found", "the registry does not have it"
        hint = "It was deleted there; deploying the version again builds it again."
    else:
        # Short outages of a registry are everyday; the deadline of the rollout bounds them.
        code, why = "registry_unreachable", "the node does not reach the registry"
        hint = "Is the registry up, and does EKIBEN_REGISTRY_PULL name it as nodes know it?"
    failure = Failure(code, f"The image {image} cannot be pulled, as {why}: {_short(words)}", hint=hint, user=False)
    return Finding(failure, 0.0 if code != "registry_unreachable" and pull_failures >= 2 else None)


def _of_end(ended: Object, container: Object, pod: Object) -> Failure:
    code = ended.get("exitCode", 0)
    said = _termination_words(ended)
    if ended.get("reason") == "OOMKilled":
        limit = _limit(pod, str(container.get("name")), "memory")
        return Failure(
            "out_of_memory",
            f"The model needed more memory than its limit of {limit}.",
            hint="Raise resources.memory of the deployment.",
        )
    if said is not None:
        return Failure(str(said.get("code") or "serving_failed"), str(said["message"]), said.get("hint"))
    if code in names.REFUSED_TO_START:
        return Failure(names.REFUSED_TO_START[code], f"The model refused to start (exit code {code}) without a word.")
    how = f"was ended by signal {code - 128}" if code > 128 else f"ended with exit code {code}"
    words = _short(ended.get("message")) if ended.get("message") else "(none)"
    return Failure("serving_crashed", f"The model's process {how}. Its last words: {words}")


# --- builds -----------------------------------------------------------------------------------------------------------


def of_build(job: Object, pod: Object | None, *, seconds: float) -> Failure:
    """Why a Job failed, from its pod if that is still known. `seconds`: the bound of an attempt."""
    if pod is not None:
        status = pod.get("status", {})
        for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            ended = (container.get("state") or {}).get("terminated")
            if ended and ended.get("exitCode") != 0 and status.get("reason") not in ("DeadlineExceeded", "Evicted"):
                return _of_step(ended, container, pod)
        if status.get("reason") == "DeadlineExceeded":
            return Failure(
                "build_timeout",
                f"The build took longer than {seconds:.0f} s.",
                hint="Raise EKIBEN_BUILD_SECONDS, or look at the build's log for what takes so long.",
            )
        if status.get("reason") == "Evicted":
            if _OWN_DISK.search(str(status.get("message"))):
                return Failure(
                    "build_out_of_disk",
                    f"The build needed more disk than it may use: {_short(status.get('message'))}",
                    hint="Ask for fewer or smaller packages, or raise EKIBEN_BUILD_DISK.",
                )
            return Failure(
                "build_evicted",
                f"The build's pod was evicted: {_short(status.get('message'))}",
                hint="The node was short of memory or disk.",
                user=False,
            )
    condition = _condition(job, "Failed") or {}
    return Failure(
        "build_crashed",
        f"The build's pod is lost ({_short(condition.get('message')) or 'the Job does not say why'}).",
        hint="The build's log has its last words.",
        user=False,
    )


def behind() -> Finding:
    """Every pod of a revision that there is is ready, or there is none, and no condition of it says why."""
    return Finding(
        Failure(
            "controllers_behind",
            "The cluster has not gone on with the rollout yet: it is the turn of its own controllers.",
            hint="Many changes at once keep them busy, or kube-controller-manager is away. This is not counted against "
            "the time that a revision has to become ready.",
            user=False,
        ),
        _SETTLES,
    )


def disrupted(pod: Object) -> bool:
    """The cluster itself ended the pod: its node was drained, or went away."""
    condition = _condition(pod, "DisruptionTarget")
    return condition is not None and condition.get("status") == "True"


def _of_step(ended: Object, container: Object, pod: Object) -> Failure:
    step, code = str(container.get("name")), ended.get("exitCode")
    if ended.get("reason") == "OOMKilled":
        return Failure(
            "build_out_of_memory",
            f"The step {step} of the build needed more memory than its limit of {_limit(pod, step, 'memory')}.",
            hint="Raise EKIBEN_BUILD_MEMORY.",
            stage=step,
        )
    said = _termination_words(ended)
    if said is not None:
        user, what = code in (names.EXIT_USER, names.EXIT_LIMIT), str(said.get("code") or "build_failed")
        hint = _HINTS.get(what, said.get("hint"))
        return Failure(what, str(said["message"]), hint, str(said.get("stage") or step), user=user)
    return Failure(
        "build_crashed",
        f"The step {step} of the build ended without a word (exit code {code}).",
        hint="The build's log has its last words.",
        stage=step,
        user=False,
    )


def of_waiting_build(pod: Object | None, pull_failures: int) -> Finding | None:
    """Why a build's pod does not run yet."""
    if pod is None:
        return None
    status = pod.get("status", {})
    for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason, words = waiting.get("reason", ""), str(waiting.get("message", ""))
        if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName"):
            pull = _of_pull(words, container, pull_failures)
            hint = "Look at EKIBEN_BUILDER_IMAGE and EKIBEN_PULL_SECRETS."
            failure = Failure("builder_image_missing", pull.failure.message, hint=hint, user=False)
            return Finding(failure, 0.0 if reason == "InvalidImageName" else pull.patience)
        if reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
            failure = Failure(
                "build_not_started",
                f"The node could not start the build: {_short(words)}",
                hint="Look at EKIBEN_REGISTRY_PUSH_SECRET, EKIBEN_INDEX_SECRET and EKIBEN_CA_CONFIGMAP, and whether "
                "the builds' namespace has what they name.",
                user=False,
            )
            return Finding(failure, _SETTLES)
    return of_scheduling(pod)


# --- small readers ----------------------------------------------------------------------------------------------------


def _termination_words(ended: Object) -> dict[str, Any] | None:
    try:
        said = json.loads(ended.get("message") or "")
    except ValueError:
        return None
    return said if isinstance(said, dict) and isinstance(said.get("message"), str) else None


def _ended(container: Object) -> Object | None:
    """How the container ended last, unless it ended well."""
    for state in ("state", "lastState"):
        ended: Object | None = (container.get(state) or {}).get("terminated")
        if ended is not None and (ended.get("exitCode") != 0 or state == "state"):
            return ended
    return None


def _condition(obj: Object, kind: str) -> Object | None:
    for condition in obj.get("status", {}).get("conditions") or ():
        if condition.get("type") == kind:
            found: Object = condition
            return found
    return None


def _containers(pod: Object) -> Iterable[Object]:
    spec = pod.get("spec", {})
    return (*spec.get("initContainers", ()), *spec.get("containers", ()))


def _limit(pod: Object, container: str, resource: str) -> str:
    for found in _containers(pod):
        if found.get("name") == container:
            return str(found.get("resources", {}).get("limits", {}).get(resource, "(none)"))
    return "(none)"


def _requests(pod: Object) -> dict[str, str]:
    asked: dict[str, str] = {}
    for container in _containers(pod):
        asked |= container.get("resources", {}).get("requests", {})
    return asked


def _is_evicted(pod: Object) -> bool:
    return bool(pod.get("status", {}).get("reason") == "Evicted")


def _is_ready(pod: Object) -> bool:
    condition = _condition(pod, "Ready")
    return condition is not None and condition.get("status") == "True"


def _is_gpu(resource: str) -> bool:
    return "gpu" in resource.lower()


def _uid(pod: Object) -> str:
    return str(pod["metadata"].get("uid"))


def _short(words: Any) -> str:
    text = " ".join(str(words or "").split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
