"""The Kubernetes platform: builds are Jobs, deployments are Deployments that Kubernetes rolls.

What is asked is answered from watches; what is wanted is applied where the cluster does not hold it yet, or no longer.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import httpx
import structlog

from build_service.kubernetes import applying, drift, manifests, names, reasons, routes
from build_service.kubernetes.cluster import (
    Cluster,
    ClusterError,
    Conflict,
    Forbidden,
    NameTaken,
    NotThere,
    Refused,
    Unreachable,
    Watched,
    is_ours,
    subject_of,
)
from build_service.kubernetes.logs import BuildLogs
from build_service.kubernetes.reasons import Finding
from build_service.kubernetes.room import Room
from build_service.kubernetes.steps import Steps
from build_service.kubernetes.tokens import TokenFile
from build_service.platform import BuildOrder, BuildStatus, Failure, Observed, RevisionOrder
from build_service.routes import RouteTable, Upstream
from build_service.settings import Settings
from registry.formats.project import KIND as PROJECT
from registry.kinds import Kinds
from registry.store import ObjectMissing, ObjectStore, Presigning

log = structlog.get_logger(__name__)

Object = dict[str, Any]

_SYNC_SECONDS = 5.0  # how long a call waits for the first lists
_URL_SECONDS = 24 * 3600  # validity of presigned URLs: a build may wait for a node
_ASK_SECONDS = 2.0  # to ask a pod for the outcome of its golden sample
_LARGEST_ANSWER = 1 << 20
_TAKEN_SECONDS = 2.0  # between two attempts at an object whose name is taken
# From a deployment's objects under their new names until those of an earlier release go: what an ingress controller
# needs at most to hear of a Service, as _LEAVE_SECONDS of the manifests.
_SUPERSEDED_SECONDS = 15.0
_ROLES_SECONDS = 30.0  # an API server that has just started may not know its Roles yet
_TAIL_LINES = 200
_LOG_SECONDS = 1.0  # between two looks at a log that is followed
_RESULT_SECONDS = 0.2  # between two looks for the result of a build that is at its last step


class Store(ObjectStore, Presigning, Protocol):
    """A store that pods reach by HTTP."""


class KubernetesPlatform:
    autoscales = True

    def __init__(
        self,
        settings: Settings,
        store: Store,
        kinds: Kinds,
        table: RouteTable,
        wake: Callable[[], None],
        tokens: Callable[[], frozenset[str]],
    ) -> None:
        self._settings, self._store, self._kinds, self._table, self._wake = settings, store, kinds, table, wake
        self._builds_in, self._models_in = settings.builds_namespace, settings.models_namespace
        self._route_kind = "Ingress" if settings.routing == "ingress" else "HTTPRoute"
        # In the order in which they are deleted: no new calls first. With HTTPRoutes, Ingresses are those of before.
        ways = dict.fromkeys((self._route_kind, "Ingress"))
        beside = ("HorizontalPodAutoscaler", "PodDisruptionBudget")
        self._made = (*ways, *beside, "Deployment", "Service", "NetworkPolicy")
        # Two of them for one deployment are refused by some controllers, or undo each other.
        self._single = frozenset((*ways, *beside))
        watched = [
            Watched(kind, self._models_in) for kind in (*self._made, "Pod", "Event", "ResourceQuota", "LimitRange")
        ]
        watched += [Watched(kind, self._builds_in) for kind in ("Job", "Pod", "Event")]
        self._lock = threading.RLock()
        self._wanted: dict[str, RevisionOrder] = {}
        self._changes: dict[str, int] = {}  # of a deployment's objects; counts up
        self._settled: dict[str, tuple[RevisionOrder, int, bool]] = {}  # found to be as wanted: at which change, routed
        self._refusals: dict[str, tuple[int, Finding]] = {}  # of a deployment's revision, by the API server
        self._taken: dict[str, float] = {}  # when a deployment met an object of another owner
        self._superseded: dict[str, float] = {}  # since when a deployment has all objects under their new names
        self._seen: dict[tuple[str, int, str], float] = {}  # since when a finding lasts
        self._checked: dict[tuple[str, int], dict[str, Any] | None] = {}
        self._asking: set[tuple[str, int]] = set()
        self._refused_builds: dict[tuple[str, int], Failure] = {}
        self._results: dict[tuple[str, int], dict[str, Any]] = {}
        self._looked: dict[tuple[str, int], float] = {}  # for the result of an attempt
        self._steps = Steps()
        self._lost_images: dict[str, int] = {}  # by digest, the making that a node did not find in the registry
        self._policy_applied = False
        self._askers = ThreadPoolExecutor(4, thread_name_prefix="golden-sample")
        # One for all: each new one would read the certificate authorities first, 30 ms of the processor. Pods that were
        # asked are not asked again.
        self._pods_http = httpx.Client(
            trust_env=False, timeout=_ASK_SECONDS, limits=httpx.Limits(max_keepalive_connections=0)
        )
        self._cluster = Cluster(settings.kubeconfig, watched, self._changed, resync_seconds=settings.resync_seconds)
        self._logs = BuildLogs(self._cluster, self._builds_in, store, self._pod_of_attempt, self._attempt_is_over, wake)
        self._tokens = TokenFile(self._cluster, settings, tokens)
        self._cluster.start()
        self._logs.start()
        self._tokens.start()

    # --- builds -------------------------------------------------------------------------------------------------------

    def submit(self, order: BuildOrder) -> None:
        self._need_lists()
        self._refused_builds.pop((order.id, order.attempt), None)
        job = self._job(order.id, order.attempt)
        if job is not None and not _forgotten(job):
            return
        if job is not None:
            self._cluster.delete("Job", job)
        prefix = f"builds/{order.id}/{order.attempt}"
        self._logs.restart(order.id, order.attempt)
        location = order.version.location
        urls = {
            path: self._store.presign_get(f"{location}/{path}", _URL_SECONDS)
            for path in manifests.version_files(order.version.manifest)
        }
        self._write(f"{prefix}/spec.json", json.dumps(manifests.build_spec(order, urls)).encode())
        made = manifests.build_job(
            order,
            self._settings,
            spec_url=self._store.presign_get(f"{prefix}/spec.json", _URL_SECONDS),
            result_url=self._store.presign_put(f"{prefix}/result.json", _URL_SECONDS),
            project=order.version.kind == PROJECT,
            steps=self._steps.of(order),
        )
        try:
            if not self._policy_applied:
                applying.put(self._cluster, manifests.sealed(manifests.builds_policy(self._settings)))
                self._policy_applied = True
            self._create_job(made)
        except Refused as error:
            failure = Failure(
                "build_not_started", f"The cluster refuses the build's Job: {error.detail}", hint=error.hint, user=False
            )
            patience = _ROLES_SECONDS if isinstance(error, Forbidden) else 0.0
            if not self._lasts((order.id, order.attempt, failure.code), Finding(failure, patience)):
                raise Unreachable("cluster_unreachable", failure.message, hint=error.hint) from error
            self._refused_builds[order.id, order.attempt] = failure

    def _create_job(self, job: Object) -> None:
        name = job["metadata"]["name"]
        try:
            self._cluster.create(job)
        except Conflict:  # another replica was faster, or the one before is still being deleted
            there = self._cluster.read("Job", self._builds_in, name)
            if there is not None and not is_ours(there):
                raise NameTaken(
                    "name_taken_in_cluster",
                    f"The namespace {self._builds_in!r} has a Job {name!r} that is not Ekiben's. It is left as it is.",
                    hint=f"Delete it (`kubectl -n {self._builds_in} delete job {name}`), then build again.",
                ) from None

    def build_status(self, order_id: str, attempt: int) -> BuildStatus:
        self._need_lists()
        if (refused := self._refused_builds.get((order_id, attempt))) is not None:
            return BuildStatus("failed", failure=refused)
        job = self._job(order_id, attempt)
        if job is None or _forgotten(job) or job["metadata"].get("deletionTimestamp"):
            return BuildStatus("missing")
        self._logs.collect(order_id, attempt)
        pod = self._pod_of(job)
        stages = self._logs.stages(order_id, attempt)
        stage = stages[-1]["stage"] if stages else None
        phase = pod["status"].get("phase") if pod is not None else None
        if phase == "Succeeded" or _finished(job) == "Complete":
            return self._ended_well(order_id, attempt, stages)
        replaced = pod is not None and reasons.disrupted(pod) and _finished(job) is None  # its Job makes another one
        if (phase == "Failed" and not replaced) or _finished(job) == "Failed":
            failure = reasons.of_build(job, pod, seconds=self._settings.build_seconds)
            self._steps.ended(order_id, attempt, well=False)
            return BuildStatus("failed", failure.stage or stage, stages, None, failure)
        if pod is not None and _assembles(pod) and self._has_result(order_id, attempt):
            return self._ended_well(order_id, attempt, stages)
        waiting = reasons.of_waiting_build(pod, self._failed_pulls(self._builds_in, pod) if pod else 0)
        if waiting is not None:
            if self._lasts((order_id, attempt, waiting.failure.code), waiting):
                return BuildStatus("failed", stage, stages, None, waiting.failure)
            stages = [*stages, {"stage": "waiting", "message": waiting.failure.message}]
            stage = "waiting"
        return BuildStatus("running", stage or ("queued" if phase in (None, "Pending") else "fetch"), stages)

    def cancel(self, order_id: str, attempt: int) -> None:
        key = (order_id, attempt)
        self._refused_builds.pop(key, None)
        self._looked.pop(key, None)
        self._forget_findings(*key)
        self._steps.forget(order_id, attempt)
        done = self._results.pop(key, None) is not None  # its pod may be about to end
        self._need_lists()
        job = self._job(order_id, attempt)
        if job is not None and not _forgotten(job):
            pod = self._pod_of(job)
            if done or _finished(job) or (pod is not None and pod["status"].get("phase") in ("Succeeded", "Failed")):
                with suppress(NotThere, Conflict):
                    self._cluster.label("Job", job, {names.FORGOTTEN: "true"})  # kubectl shows it until its time is up
            else:
                self._cluster.delete("Job", job)
        self._logs.forget(order_id, attempt)

    def holds(self, result: dict[str, Any]) -> bool:
        image = result.get("image")
        return image is not None and result.get("making", 0) > self._lost_images.get(image["digest"], -1)

    def build_log(self, order_id: str, *, follow: bool) -> Iterator[str]:
        return self._logs.read(order_id, follow=follow)

    def _has_result(self, order_id: str, attempt: int) -> bool:
        """Whether the last step has put its result beside: the kubelet tells of its end up to two seconds later."""
        key = (order_id, attempt)
        if key not in self._results and time.monotonic() - self._looked.get(key, 0.0) >= _RESULT_SECONDS:
            self._looked[key] = time.monotonic()
            result = self._read_result(order_id, attempt)
            if result is not None:
                self._results[key] = result
        return key in self._results

    def _read_result(self, order_id: str, attempt: int) -> dict[str, Any] | None:
        """What the step assemble has left, if that names an image."""
        try:
            with self._store.open(f"builds/{order_id}/{attempt}/result.json") as stream:
                result = json.loads(stream.read())
        except (ObjectMissing, ValueError):
            return None
        named = isinstance(result, dict) and isinstance((result.get("image") or {}).get("digest"), str)
        return result if named else None

    def _ended_well(self, order_id: str, attempt: int, stages: list[dict[str, Any]]) -> BuildStatus:
        """Only what the step assemble has put beside says that the registry has the image."""
        key = (order_id, attempt)
        result = self._results.get(key)
        if result is None:
            result = self._read_result(order_id, attempt)
            if result is None:
                failure = Failure(
                    "build_crashed",
                    "The build ended well, but left no usable result in the store.",
                    hint="The build's log has its last words.",
                    user=False,
                )
                return BuildStatus("failed", None, stages, None, failure)
            self._results[key] = result
        self._steps.ended(order_id, attempt, well=True)
        return BuildStatus("succeeded", None, result.get("stages", stages), result)

    def _job(self, order_id: str, attempt: int) -> Object | None:
        return self._cluster.get("Job", self._builds_in, names.job(order_id, attempt))

    def _pod_of(self, job: Object) -> Object | None:
        """The newest pod of this very Job; an earlier one of its name may still be ending."""
        uid = job["metadata"]["uid"]
        found = [
            pod
            for pod in self._cluster.of("Pod", self._builds_in, job["metadata"]["labels"][names.BUILD])
            if any(owner["uid"] == uid for owner in pod["metadata"].get("ownerReferences", ()))
        ]
        return max(found, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)

    def _pod_of_attempt(self, order_id: str, attempt: int) -> Object | None:
        job = self._job(order_id, attempt)
        return None if job is None else self._pod_of(job)

    def _attempt_is_over(self, order_id: str, attempt: int) -> bool:
        job = self._job(order_id, attempt)
        return job is None or _finished(job) is not None

    def _write(self, key: str, data: bytes) -> None:
        writer = self._store.writer(key)
        try:
            writer.write(data)
            writer.commit()
        finally:
            writer.abort()

    # --- serving ------------------------------------------------------------------------------------------------------

    def apply(self, order: RevisionOrder) -> None:
        self._need_lists()
        name = order.deployment
        with self._lock:
            self._wanted[name] = order
            if self._settled.get(name) == (order, self._changes.get(name, 0), self._answers(name)):
                return
            if time.monotonic() - self._taken.get(name, -_TAKEN_SECONDS) < _TAKEN_SECONDS:
                return
        try:
            self._bring(order)
        except NameTaken as error:  # no watch tells when it goes: the next rounds look
            self._taken[name] = time.monotonic()
            self._refusals[name] = (order.revision, reasons.name_taken(error.detail, error.hint))
            log.warning("the name of an object is taken in the cluster", deployment=name, error=error.detail)
            return
        except Conflict as error:  # somebody else writes; the next round looks again
            log.info("an object is being written by another", deployment=name, error=error.detail)
            self._wake()
            return
        except Refused as error:
            finding = reasons.refused(error.detail)
            self._refusals[name] = (order.revision, finding)
            log.warning("the cluster refuses a deployment", deployment=name, error=error.detail)
            return
        self._refusals.pop(name, None)
        self._taken.pop(name, None)
        with self._lock:
            # What our own writes changed is counted too, unless something else came in between: then we look again.
            if self._all_there(order):
                self._settled[name] = (order, self._changes.get(name, 0), self._answers(name))

    def ready(self, deployment: str) -> int:
        self._need_lists()
        live = self._of("Deployment", deployment)
        return 0 if live is None else self._serving(deployment, live, self._pods(deployment)).ready

    def observe(self, deployment: str) -> Observed:
        self._need_lists()
        live = self._of("Deployment", deployment)
        pods = self._pods(deployment)
        crashes = sum(reasons.ends(pod) for pod in pods)
        seen = Observed() if live is None else self._serving(deployment, live, pods)
        seen = replace(
            seen,
            crashes=crashes,
            crash=reasons.last_crash(pods) if crashes else None,
            applied=self._applied(deployment),
        )
        if live is None:
            return self._with_reason(seen, deployment, None, [])
        if _rolled(live):
            _, finding = self._refusals.get(deployment, (None, None))
            routes_of = self._cluster.of(self._route_kind, self._models_in, deployment)
            return replace(seen, waiting=finding.failure if finding else reasons.of_routes(routes_of))
        newest = _wanted_revision(live)
        new = [pod for pod in pods if _revision(pod) == newest and _making(pod) == _making(live["spec"]["template"])]
        return self._with_reason(seen, deployment, live, new)

    def _pods(self, deployment: str) -> list[Object]:
        found = self._cluster.of("Pod", self._models_in, deployment)
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def _serving(self, deployment: str, live: Object, pods: list[Object]) -> Observed:
        """The revision that has the traffic: its ready pods, and its golden sample's outcome."""
        newest = _wanted_revision(live)
        ready = Counter(_revision(pod) for pod in pods if _ready(pod))
        others = {revision: count for revision, count in ready.items() if revision != newest}
        if others and not _rolled(live):
            revision = max(others, key=lambda each: (others[each], each))
            return Observed(revision=revision, ready=others[revision])
        if not ready[newest]:
            return Observed()
        known, checked = self._outcome(deployment, newest, pods)
        return Observed(revision=newest, ready=ready[newest] if known else 0, checked=checked)

    def observe_all(self) -> dict[str, Observed]:
        self._need_lists()
        found = {name for kind in self._made for name in self._cluster.subjects(kind, self._models_in)}
        return {name: self.observe(name) for name in sorted(found)}

    def delete(self, deployment: str) -> None:
        self._need_lists()
        for kind in self._made:
            for obj in self._cluster.of(kind, self._models_in, deployment):
                if "deletionTimestamp" not in obj["metadata"]:
                    self._cluster.delete(kind, obj)
        self._table.remove(deployment)
        with self._lock:
            for memory in (self._wanted, self._settled, self._refusals, self._taken, self._superseded):
                memory.pop(deployment, None)
            self._forget_findings(deployment)
            for key in [key for key in self._checked if key[0] == deployment]:
                del self._checked[key]

    def check(self, deployment: str, resources: dict[str, str], replicas: int, strategy: str) -> None:
        """Whether the cluster can have room for this at all; UserError before anything is built."""
        if self._cluster.synced():
            quotas = self._cluster.all("ResourceQuota", self._models_in)
            limits = self._cluster.all("LimitRange", self._models_in)
            current = self._of("Deployment", deployment)
        else:  # what quotas and limits say is not known at the moment; they will say it themselves
            quotas, limits, current = [], [], None
        Room(self._settings, quotas, limits).check(current, resources, replicas, strategy)

    def serving_log(self, deployment: str, *, follow: bool, ended: Callable[[], bool]) -> Iterator[str]:
        self._need_lists()
        since: dict[str, str] = {}
        told, first, looked = "", True, 0.0
        while True:
            last = not follow or ended()  # asked before reading
            pods = sorted(
                self._cluster.of("Pod", self._models_in, deployment),
                key=lambda pod: pod["metadata"]["creationTimestamp"],
            )
            quiet = True
            if first or last or time.monotonic() - looked >= _LOG_SECONDS:
                looked = time.monotonic()
                for pod in pods:
                    name = pod["metadata"]["name"]
                    tail = _TAIL_LINES if first and name not in since else None
                    for stamp, text in self._serving_lines(name, since.get(name, ""), tail):
                        since[name] = stamp
                        if told != name and (told or len(pods) > 1):
                            yield f"==> revision {_revision(pod)}, pod {name} <=="
                        told, quiet = name, False
                        yield text
                first = first and not pods
            if last and quiet:
                return
            if not follow:
                return
            if quiet:
                yield ""

    def close(self) -> None:
        self._tokens.close()
        self._cluster.close()
        self._logs.close()
        self._askers.shutdown(wait=False, cancel_futures=True)
        self._pods_http.close()

    # --- applying -----------------------------------------------------------------------------------------------------

    def _objects(self, order: RevisionOrder) -> list[Object]:
        """All that a deployment consists of, in the order in which it is made: a policy before what it binds, a route
        only once somebody answers. Until then the service answers, and says how far things are."""
        name, settings = order.deployment, self._settings
        wanted = [
            manifests.model_policy(name, settings),
            manifests.service(name, settings),
            manifests.deployment(order, settings, self._kind_memory(order)),
        ]
        if order.replicas > 1:
            wanted.append(manifests.disruption_budget(name, settings))
        if order.autoscale is not None:
            wanted.append(manifests.autoscaler(order, settings))
        if self._answers(name):
            wanted.append(routes.route(name, settings))
            if order.default:
                wanted.append(routes.default_route(name, settings))
        return wanted

    def _bring(self, order: RevisionOrder) -> None:
        name = order.deployment
        for obj in self._objects(order):
            for kind, left in self._left_over(name):
                if kind == obj["kind"] and kind in self._single:
                    self._cluster.delete(kind, left)
            applying.put(self._cluster, manifests.sealed(obj, order.fence), order.fence)
        live = self._of("Deployment", name)
        scaler = self._of("HorizontalPodAutoscaler", name)
        if scaler is not None and order.autoscale is None:
            self._cluster.delete("HorizontalPodAutoscaler", scaler)
        if live is not None and (wanted := _replicas(live, order)) is not None:
            self._cluster.scale(live, wanted)
        budget = self._of("PodDisruptionBudget", name)
        if budget is not None and order.replicas < 2:
            self._cluster.delete("PodDisruptionBudget", budget)
        if self._route_kind != "Ingress" and self._answers(name):
            for left in self._cluster.of("Ingress", self._models_in, name):
                self._cluster.delete("Ingress", left)
        self._retire(name)

    def _of(self, kind: str, deployment: str) -> Object | None:
        return self._cluster.get(kind, self._models_in, names.of(kind, deployment))

    def _left_over(self, deployment: str) -> list[tuple[str, Object]]:
        """Objects of a deployment under the names that an earlier release gave them: first that of the deployment
        itself, which could be that of an object of the platform."""
        return [
            (kind, obj)
            for kind in self._made
            for obj in self._cluster.of(kind, self._models_in, deployment)
            if obj["metadata"]["name"] not in (names.of(kind, deployment), names.DEFAULT_ROUTE)
        ]

    def _retire(self, deployment: str) -> None:
        """Delete what is left over, without an interruption: a Service once no route leads to it any more and proxies
        have heard so. While a route is replaced, the service's own route answers."""
        left = self._left_over(deployment)
        routed = any(kind in ("Ingress", "HTTPRoute") for kind, _ in left)
        if not left or routed:
            self._superseded.pop(deployment, None)
            return
        since = self._superseded.setdefault(deployment, time.monotonic())
        for kind, obj in left:
            if kind in self._single or time.monotonic() - since >= _SUPERSEDED_SECONDS:
                self._cluster.delete(kind, obj)

    def _all_there(self, order: RevisionOrder) -> bool:
        if self._left_over(order.deployment):
            return False
        for obj in self._objects(order):
            live = self._cluster.get(obj["kind"], self._models_in, obj["metadata"]["name"])
            if live is None or not drift.holds(live, manifests.sealed(obj, order.fence)):
                return False
        live = self._of("Deployment", order.deployment)
        return live is not None and _replicas(live, order) is None

    def _answers(self, name: str) -> bool:
        if self._of(self._route_kind, name) is not None:
            return True
        return any(_ready(pod) for pod in self._cluster.of("Pod", self._models_in, name))

    def _kind_memory(self, order: RevisionOrder) -> str:
        kind = next((kind for kind in self._kinds.all if kind.name == order.version.kind), None)
        return self._settings.model_memory if kind is None else kind.memory

    # --- observing ----------------------------------------------------------------------------------------------------

    def _applied(self, deployment: str) -> str | None:
        """Terms of the order that the cluster was found to keep to, if nothing has changed since."""
        with self._lock:
            order, change, routed = self._settled.get(deployment, (None, 0, False))
            if order is None or change != self._changes.get(deployment, 0) or routed != self._answers(deployment):
                return None
        return order.terms if self.holds(order.build) else None

    def _with_reason(self, seen: Observed, deployment: str, live: Object | None, pods: list[Object]) -> Observed:
        """What keeps the newest revision from the traffic, and whether that is certain."""
        revision, finding = self._refusals.get(deployment, (None, None))
        if finding is not None and deployment in self._taken:  # for as long as its owner leaves it there
            return replace(seen, behind=True, waiting=finding.failure)
        if finding is None and live is not None:
            revision = _wanted_revision(live)
            pulls = {pod["metadata"]["uid"]: self._failed_pulls(self._models_in, pod) for pod in pods}
            finding = reasons.of_rollout(live, pods, pulls)
        if finding is None and live is not None and all(_ready(pod) for pod in pods):
            behind = reasons.behind()
            lasts = self._lasts((deployment, _wanted_revision(live), behind.failure.code), behind)
            return replace(seen, behind=True, waiting=behind.failure if lasts else None)
        if finding is None or revision is None:
            return seen
        if finding.failure.code == "image_not_found" and live is not None:
            digest = _digest(live)
            self._lost_images[digest] = max(_making(live["spec"]["template"]), self._lost_images.get(digest, 0))
        if self._lasts((deployment, revision, finding.failure.code), finding):
            return replace(seen, failed=revision, failure=finding.failure)
        return replace(seen, waiting=finding.failure)

    def _lasts(self, key: tuple[str, int, str], finding: Finding) -> bool:
        if finding.patience is None:
            return False
        since = self._seen.setdefault(key, time.monotonic())
        return time.monotonic() - since >= finding.patience

    def _forget_findings(self, *subject: str | int) -> None:
        for key in [key for key in self._seen if key[: len(subject)] == subject]:
            del self._seen[key]

    def _failed_pulls(self, namespace: str, pod: Object) -> int:
        return sum(
            max(event.get("count") or 1, (event.get("series") or {}).get("count", 0))
            for event in self._cluster.of("Event", namespace, pod["metadata"]["uid"])
            if event.get("reason") == "Failed" and str(event.get("message")).startswith("Failed to pull image")
        )

    def _outcome(self, deployment: str, revision: int, pods: list[Object]) -> tuple[bool, dict[str, Any] | None]:
        """The golden sample's outcome, asked for once from a pod of a revision on its way; (whether it is known, it).
        Best effort: a service outside the cluster's network does not learn it."""
        order, key = self._wanted.get(deployment), (deployment, revision)
        if order is None or order.revision != revision or order.proven:
            return True, None
        with self._lock:
            if key in self._checked:
                return True, self._checked[key]
            addresses = [str(pod["status"].get("podIP")) for pod in pods if _ready(pod) and _revision(pod) == revision]
            if key not in self._asking:
                self._asking.add(key)
                self._askers.submit(self._ask, key, addresses)
        return False, None

    def _ask(self, key: tuple[str, int], addresses: list[str]) -> None:
        found = None
        try:
            for address in addresses[:1]:
                found = _metadata(self._pods_http, address).get("checked")
        finally:
            with self._lock:
                self._checked[key] = found if isinstance(found, dict) else None
                self._asking.discard(key)
            self._wake()

    def _serving_lines(self, pod: str, since: str, tail: int | None) -> Iterator[tuple[str, str]]:
        try:
            yield from self._cluster.log_lines(self._models_in, pod, names.CONTAINER, since=since, tail=tail)
        except Unreachable:
            return
        except ClusterError as error:
            if error.answered not in (400, 404):  # it is being started, or is gone
                raise

    # --- what the watches tell ----------------------------------------------------------------------------------------

    def _changed(self, kind: str, new: Object | None, old: Object | None) -> None:
        obj = new or old
        assert obj is not None
        subject = subject_of(kind, obj)
        if subject is not None and kind in self._made and _substance(new) != _substance(old):
            with self._lock:
                self._changes[subject] = self._changes.get(subject, 0) + 1
        if kind in ("Pod", "Service") and subject is not None and names.DEPLOYMENT in obj["metadata"]["labels"]:
            self._publish(subject)
        self._wake()

    def _publish(self, deployment: str) -> None:
        """The deployment's Service for the service's own router: what no route from outside can list."""
        service = self._of("Service", deployment)
        if service is None:  # that of an earlier release
            service = next(iter(self._cluster.of("Service", self._models_in, deployment)), None)
        address = service["spec"].get("clusterIP") if service is not None else None
        ready = [
            _revision(pod)
            for pod in self._cluster.of("Pod", self._models_in, deployment)
            if _ready(pod) and "deletionTimestamp" not in pod["metadata"]
        ]
        if address in (None, "None"):
            return
        host = f"[{address}]" if ":" in str(address) else str(address)
        if ready or self._table.known(deployment):
            self._table.set(deployment, [Upstream(max(ready), f"{host}:{names.SERVICE_PORT}")] if ready else [])

    def _need_lists(self) -> None:
        if not self._cluster.synced(_SYNC_SECONDS):
            raise Unreachable(
                "cluster_unreachable",
                "The cluster has not told yet what it holds.",
                hint="Is the API server up, and may this service list and watch in its namespaces?",
            )


def _forgotten(job: Object) -> bool:
    return bool(job["metadata"]["labels"].get(names.FORGOTTEN))


def _assembles(pod: Object) -> bool:
    """The steps before the last one are over."""
    before = pod["status"].get("initContainerStatuses") or ()
    return bool(before) and all((status.get("state") or {}).get("terminated") for status in before)


def _finished(job: Object) -> str | None:
    """Complete or Failed, when the Job is."""
    for condition in job.get("status", {}).get("conditions") or ():
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


def _replicas(live: Object, order: RevisionOrder) -> int | None:
    """How many the Deployment is to be scaled to; None where it is as it shall be. Between its bounds an autoscaler
    has the say."""
    now, least = int(live["spec"].get("replicas", 1)), order.replicas
    most = least if order.autoscale is None else order.autoscale["max"]
    wanted = min(max(now, least), most)
    return None if wanted == now else wanted


def _rolled(deployment: Object) -> bool:
    """Every replica is of the newest template, and ready."""
    replicas, status = deployment["spec"].get("replicas", 1), deployment.get("status", {})
    if status.get("observedGeneration") != deployment["metadata"].get("generation") or replicas == 0:
        return False
    return all(
        status.get(count) == replicas for count in ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas")
    )


def _ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions") or ()
    return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _revision(pod: Object) -> int:
    return int(pod["metadata"]["labels"].get(names.REVISION, 0))


def _making(of: Object) -> int:
    """Of a pod, or of a Deployment's template."""
    return int((of["metadata"].get("annotations") or {}).get(names.MAKING, 0))


def _wanted_revision(deployment: Object) -> int:
    return int(deployment["spec"]["template"]["metadata"]["labels"].get(names.REVISION, 0))


def _substance(obj: Object | None) -> Any:
    """What was written to an object, without what the cluster itself notes on it."""
    if obj is None:
        return None
    meta = obj["metadata"]
    marks = {
        key: value for key, value in (meta.get("annotations") or {}).items() if key in (names.APPLIED, names.FENCE)
    }
    rest = {key: value for key, value in obj.items() if key not in ("metadata", "status")}
    return meta.get("uid"), meta.get("labels"), marks, "deletionTimestamp" in meta, rest


def _digest(deployment: Object) -> str:
    image: str = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    return image.rpartition("@")[2]


def _metadata(http: httpx.Client, address: str) -> dict[str, Any]:
    host = f"[{address}]" if ":" in address else address
    try:
        answer = http.get(f"http://{host}:{names.PORT}/metadata")
        value = json.loads(answer.content[:_LARGEST_ANSWER]) if answer.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
