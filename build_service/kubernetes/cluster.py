"""The cluster's API: what it holds, read from lists and watches that are kept up, and the few writes that we need.

The only module that imports the `kubernetes` client, and of that only what loads a configuration and keeps connections:
objects stay the plain JSON that they are, as its classes of models take several times the memory and time.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import structlog
import urllib3
from kubernetes import client
from kubernetes import config as loaders
from kubernetes.client.exceptions import ApiException

from build_service.kubernetes import names
from registry.errors import InfrastructureError

log = structlog.get_logger(__name__)

Object = dict[str, Any]
# What changed: the object as it is now and as it was; None where there is none.
Changed = Callable[[str, Object | None, Object | None], None]

_PAGE = 500  # objects of one answer to a list
_WATCH_SECONDS = 300  # until a watch is asked for again
_SILENCE_SECONDS = 100  # a watch is told something every minute; after this the connection is taken for dead
_RETRY_FIRST, _RETRY_LONGEST = 0.2, 10.0  # seconds before a list that failed is tried again
_REQUEST_SECONDS = (5.0, 30.0)  # to connect, to read
_LONGEST_MESSAGE = 1500
_REMEMBERED_DELETIONS = 2000
_DELETIONS = 3  # attempts to delete an object at the version that was read


class ClusterError(InfrastructureError):
    """The API server said no, or nothing. `status` is its HTTP status, 0 where it said nothing."""

    def __init__(self, code: str, detail: str, *, hint: str | None = None, answered: int = 0) -> None:
        super().__init__(code, detail[:_LONGEST_MESSAGE], hint=hint)
        self.answered = answered


class Unreachable(ClusterError):
    """Nothing came back, or that the server cannot at the moment: worth another try."""


class Refused(ClusterError):
    """The API server understood, and will not."""


class Forbidden(Refused):
    """401, 403: the account may not, or an admission rule says no. An API server that has just started says so for a
    moment too, until it has read the Roles."""


class NotThere(Refused):
    """404: there is no such object."""


class Conflict(Refused):
    """409: it exists already, or it changed since it was read."""


class NameTaken(Refused):
    """An object that is not ours has the name of one that is wanted."""


class _Gone(Exception):
    """410: the watch asks for a time that the server no longer knows."""


@dataclass(frozen=True)
class _Resource:
    group: str  # path of the API group
    plural: str

    def path(self, namespace: str, *rest: str) -> str:
        return "/".join((self.group, "namespaces", namespace, self.plural, *rest))


_RESOURCES = {
    "Pod": _Resource("/api/v1", "pods"),
    "Service": _Resource("/api/v1", "services"),
    "Event": _Resource("/api/v1", "events"),
    "ConfigMap": _Resource("/api/v1", "configmaps"),
    "ResourceQuota": _Resource("/api/v1", "resourcequotas"),
    "LimitRange": _Resource("/api/v1", "limitranges"),
    "Job": _Resource("/apis/batch/v1", "jobs"),
    "Deployment": _Resource("/apis/apps/v1", "deployments"),
    "PodDisruptionBudget": _Resource("/apis/policy/v1", "poddisruptionbudgets"),
    "HorizontalPodAutoscaler": _Resource("/apis/autoscaling/v2", "horizontalpodautoscalers"),
    "NetworkPolicy": _Resource("/apis/networking.k8s.io/v1", "networkpolicies"),
    "Ingress": _Resource("/apis/networking.k8s.io/v1", "ingresses"),
    "HTTPRoute": _Resource("/apis/gateway.networking.k8s.io/v1", "httproutes"),
}
_NOT_OURS = frozenset({"Event", "ResourceQuota", "LimitRange"})  # made by others, so without our label


@dataclass(frozen=True)
class Watched:
    """One list that is kept up."""

    kind: str
    namespace: str


class Cluster:
    def __init__(
        self, kubeconfig: Path | None, watched: Sequence[Watched], changed: Changed, *, resync_seconds: float
    ) -> None:
        self._api = client.ApiClient(_configuration(kubeconfig))
        self._changed = changed
        self._stop = threading.Event()
        self._caches = {(each.kind, each.namespace): _Cache(each.kind) for each in watched}
        self._threads = [
            threading.Thread(
                target=self._keep_up, args=(each, resync_seconds), name=f"watch-{each.kind.lower()}", daemon=True
            )
            for each in watched
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._stop.set()
        self._api.close()

    def synced(self, seconds: float = 0.0) -> bool:
        """Whether everything was listed at least once; waits so long for it."""
        until = time.monotonic() + seconds
        return all(cache.listed.wait(max(0.0, until - time.monotonic())) for cache in self._caches.values())

    # --- reading the cache --------------------------------------------------------------------------------------------

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._caches[kind, namespace].get(name)

    def known(self, kind: str, namespace: str, name: str) -> Object | None:
        """From the cache where there is one of the kind, else from the server."""
        cache = self._caches.get((kind, namespace))
        return self.read(kind, namespace, name) if cache is None else cache.get(name)

    def of(self, kind: str, namespace: str, subject: str) -> list[Object]:
        """Objects of one deployment, build, or (events) of the object with this UID."""
        return self._caches[kind, namespace].of(subject)

    def all(self, kind: str, namespace: str) -> list[Object]:
        return self._caches[kind, namespace].all()

    def subjects(self, kind: str, namespace: str) -> list[str]:
        """Deployments or builds that have an object of this kind."""
        return self._caches[kind, namespace].subjects()

    # --- writing ------------------------------------------------------------------------------------------------------

    def apply(self, obj: Object, *, over: Object) -> Object:
        """Server-side apply over the object that was read, which the caller has found to be ours. Conflict if it has
        changed meanwhile.

        `force`, as what others have edited in an object of ours is taken back."""
        assert is_ours(over), f"{over['metadata']['name']} is not ours to write over"
        over = self._owned_by_apply(obj["kind"], over)
        obj = {**obj, "metadata": {**obj["metadata"], "resourceVersion": over["metadata"]["resourceVersion"]}}
        query = {"fieldManager": names.MANAGER, "force": "true", "fieldValidation": "Strict"}
        made = self._call("PATCH", self._path(obj), query, obj, "application/apply-patch+yaml")
        return self._note(obj["kind"], obj["metadata"]["namespace"], made)

    def _owned_by_apply(self, kind: str, live: Object) -> Object:
        """Turn fields that a `create` of ours set into fields of server-side apply, which then takes away what is no
        longer wanted: to the server, the same manager owns fields twice, once for each of the two operations
        (https://kubernetes.io/docs/reference/using-api/server-side-apply/#upgrading-from-client-side-apply-to-server-side-apply).
        """
        meta = live["metadata"]
        entries = meta.get("managedFields", ())
        at = next((at for at, each in enumerate(entries) if _is_created(each)), None)
        if at is None:
            return live
        # A replaced resourceVersion makes an object that has changed meanwhile a Conflict.
        body = [
            {"op": "replace", "path": f"/metadata/managedFields/{at}/operation", "value": "Apply"},
            {"op": "replace", "path": "/metadata/resourceVersion", "value": meta["resourceVersion"]},
        ]
        path = _RESOURCES[kind].path(meta["namespace"], meta["name"])
        try:
            made = self._call("PATCH", path, {"fieldManager": names.MANAGER}, body, "application/json-patch+json")
        except (Conflict, NotThere, Forbidden):
            raise
        except Refused as error:  # fields that are no longer wanted stay, which is less than no update at all
            log.warning(
                "the owner of an object's fields was not changed", kind=kind, name=meta["name"], error=str(error)
            )
            return live
        return self._note(kind, meta["namespace"], made)

    def create(self, obj: Object) -> Object:
        """Conflict if there is one of the name."""
        namespace = obj["metadata"]["namespace"]
        query = {"fieldManager": names.MANAGER, "fieldValidation": "Strict"}
        made = self._call("POST", _RESOURCES[obj["kind"]].path(namespace), query, obj)
        return self._note(obj["kind"], namespace, made)

    def read(self, kind: str, namespace: str, name: str) -> Object | None:
        """From the server itself, past the cache."""
        try:
            return self._note(kind, namespace, self._call("GET", _RESOURCES[kind].path(namespace, name)))
        except NotThere:
            return None

    def label(self, kind: str, obj: Object, labels: Mapping[str, str]) -> None:
        meta = obj["metadata"]
        body = {"metadata": {"uid": meta["uid"], "labels": dict(labels)}}
        path = _RESOURCES[kind].path(meta["namespace"], meta["name"])
        made = self._call("PATCH", path, {"fieldManager": names.MANAGER}, body, "application/merge-patch+json")
        self._note(kind, meta["namespace"], made)

    def scale(self, obj: Object, replicas: int) -> None:
        """Through the subresource, of this very object."""
        meta = obj["metadata"]
        path = _RESOURCES["Deployment"].path(meta["namespace"], meta["name"], "scale")
        body = {"metadata": {"uid": meta["uid"]}, "spec": {"replicas": replicas}}
        self._call("PATCH", path, {"fieldManager": names.MANAGER}, body, "application/merge-patch+json")
        self.read("Deployment", meta["namespace"], meta["name"])

    def delete(self, kind: str, obj: Object) -> None:
        """Delete this very object and what belongs to it, as long as it bears our label. Fine if it is gone, if another
        has its name by now, or if somebody has taken the label away."""
        meta = obj["metadata"]
        live: Object | None = obj
        for attempt in range(_DELETIONS):
            if live is None or live["metadata"]["uid"] != meta["uid"] or not is_ours(live):
                break
            expected = {"uid": meta["uid"], "resourceVersion": live["metadata"]["resourceVersion"]}
            if attempt == _DELETIONS - 1:  # its status changes all the time
                del expected["resourceVersion"]
            body = {"preconditions": expected, "propagationPolicy": "Background"}
            try:
                self._call("DELETE", _RESOURCES[kind].path(meta["namespace"], meta["name"]), body=body)
                break
            except NotThere:
                break
            except Conflict:
                live = self.read(kind, meta["namespace"], meta["name"])
        self._caches[kind, meta["namespace"]].drop(meta["uid"])

    def log_lines(
        self, namespace: str, pod: str, container: str, *, since: str = "", tail: int | None = None
    ) -> Iterator[tuple[str, str]]:
        """(time, text) of what a container's log holds after the time `since`. Whoever follows asks again: a connection
        that is held open says nothing when its other end is lost."""
        query = {"container": container, "timestamps": "true"}
        if since:
            query["sinceTime"] = since[:19] + "Z"
        if tail is not None:
            query["tailLines"] = str(tail)
        path = _RESOURCES["Pod"].path(namespace, pod, "log")
        try:
            with closing(self._open("GET", path, query)) as response:
                for line in _lines(response):
                    stamp, _, text = line.partition(" ")
                    if stamp > since:
                        yield stamp, text
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise _unreachable("GET", path, error) from error

    def _path(self, obj: Object) -> str:
        meta = obj["metadata"]
        return _RESOURCES[obj["kind"]].path(meta["namespace"], meta["name"])

    def _note(self, kind: str, namespace: str, obj: Object) -> Object:
        """What the server answered to a write is known at once, before the watch tells it."""
        obj = _trimmed(kind, obj)
        cache = self._caches.get((kind, namespace))
        if cache is not None and (kind in _NOT_OURS or is_ours(obj)):  # as the lists and watches select
            cache.put(obj)
        return obj

    # --- the watches --------------------------------------------------------------------------------------------------

    def _keep_up(self, watched: Watched, resync_seconds: float) -> None:
        wait = _RETRY_FIRST
        while not self._stop.is_set():
            try:
                version = self._list(watched)
                wait = _RETRY_FIRST
                resync = time.monotonic() + resync_seconds
                while not self._stop.is_set() and time.monotonic() < resync:
                    started = time.monotonic()
                    version = self._watch(watched, version, min(_WATCH_SECONDS, resync_seconds))
                    if time.monotonic() - started < _RETRY_FIRST:  # it is cut at once, again and again
                        self._stop.wait(_RETRY_FIRST)
            except _Gone:
                continue
            except Exception as error:
                if self._stop.is_set():
                    return
                log.warning("a watch stumbled", kind=watched.kind, namespace=watched.namespace, error=str(error)[:300])
                self._stop.wait(wait)
                wait = min(wait * 2, _RETRY_LONGEST)

    def _list(self, watched: Watched) -> str:
        path = _RESOURCES[watched.kind].path(watched.namespace)
        query = {**_selector(watched.kind), "limit": str(_PAGE)}
        found: list[Object] = []
        while True:
            page = self._call("GET", path, query)
            found += [_trimmed(watched.kind, item) for item in page.get("items") or ()]
            onward = page["metadata"].get("continue")
            if not onward:
                break
            query = {**query, "continue": onward}
        version = str(page["metadata"]["resourceVersion"])
        cache = self._caches[watched.kind, watched.namespace]
        for new, old in cache.replace(found, version):
            self._changed(watched.kind, new, old)
        cache.listed.set()
        return version

    def _watch(self, watched: Watched, version: str, seconds: float) -> str:
        """Follow from a version until the server ends it; the version that was reached."""
        query = {
            **_selector(watched.kind),
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, int(seconds))),
        }
        path = _RESOURCES[watched.kind].path(watched.namespace)
        cache = self._caches[watched.kind, watched.namespace]
        try:
            with closing(self._open("GET", path, query, timeout=(5.0, _SILENCE_SECONDS))) as response:
                for line in _lines(response):
                    event = json.loads(line)
                    obj = event["object"]
                    if event["type"] == "ERROR":
                        if obj.get("code") == 410:
                            raise _Gone
                        raise Unreachable("cluster_error", str(obj.get("message")), answered=obj.get("code", 0))
                    version = str(obj["metadata"]["resourceVersion"])
                    if event["type"] == "BOOKMARK":
                        continue
                    obj = _trimmed(watched.kind, obj)
                    if event["type"] == "DELETED":
                        self._changed(watched.kind, None, cache.drop(obj["metadata"]["uid"]) or obj)
                    else:
                        known, old = cache.put(obj)
                        # What a write of ours has told already is told again: its writer did not wake anybody.
                        self._changed(watched.kind, known, old)
        except ClusterError as error:
            if error.answered == 410:
                raise _Gone from None
            raise
        except (urllib3.exceptions.HTTPError, OSError):  # cut, or silent for too long: go on from where we were
            if self._stop.is_set():
                return version
            log.debug("a watch was cut", kind=watched.kind, namespace=watched.namespace)
        return version

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> Object:
        response = self._open(method, path, query, body, content_type)
        try:
            answer = json.loads(response.data)
        except ValueError:
            raise Unreachable("cluster_error", f"{method} {path} was answered by something else than JSON.") from None
        except urllib3.exceptions.HTTPError as error:
            raise _unreachable(method, path, error) from error
        assert isinstance(answer, dict)
        return answer

    def _open(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
        *,
        timeout: tuple[float, float | None] = _REQUEST_SECONDS,
    ) -> urllib3.HTTPResponse:
        headers = {"Accept": "application/json, */*", "User-Agent": "ekiben"}
        if body is not None:
            headers["Content-Type"] = content_type
        if content_type.endswith("yaml"):
            body = json.dumps(body)  # which is YAML too
        try:
            self._api.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            url = f"{self._api.configuration.host}{path}" + (f"?{urlencode(query)}" if query else "")
            answer = self._api.rest_client.request(method, url, headers=headers, body=body, _request_timeout=timeout)
        except (urllib3.exceptions.HTTPError, OSError, ApiException) as error:
            raise _unreachable(method, path, error) from error
        response: urllib3.HTTPResponse = answer.response
        if response.status >= 400:
            with closing(response):
                raise _error(method, path, response.status, response.data)
        return response


class _Cache:
    """Objects of one kind in one namespace, by name and by what they belong to. Versions never go back."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._lock = threading.Lock()
        self._objects: dict[str, Object] = {}
        self._subjects: dict[str, dict[str, Object]] = {}
        self._names: dict[str, str] = {}  # UID → name
        self._deleted: deque[str] = deque(maxlen=_REMEMBERED_DELETIONS)
        self.listed = threading.Event()

    def get(self, name: str) -> Object | None:
        return self._objects.get(name)

    def of(self, subject: str) -> list[Object]:
        with self._lock:
            return list(self._subjects.get(subject, {}).values())

    def all(self) -> list[Object]:
        with self._lock:
            return list(self._objects.values())

    def subjects(self) -> list[str]:
        with self._lock:
            return list(self._subjects)

    def put(self, obj: Object) -> tuple[Object, Object | None]:
        """What is known now, and what was before."""
        with self._lock:
            old = self._objects.get(obj["metadata"]["name"])
            if obj["metadata"]["uid"] in self._deleted:
                return obj, old
            if old is not None and _version(old) > _version(obj):
                return old, old
            self._remember(obj)
            return obj, old

    def drop(self, uid: str) -> Object | None:
        with self._lock:
            self._deleted.append(uid)
            old = self._objects.get(self._names.get(uid, ""))
            if old is not None:
                self._forget(old)
            return old

    def replace(self, found: Sequence[Object], version: str) -> list[tuple[Object | None, Object | None]]:
        """A complete list: (now, before) of everything that it changes."""
        changes: list[tuple[Object | None, Object | None]] = []
        with self._lock:
            listed = {obj["metadata"]["uid"] for obj in found}
            for old in list(self._objects.values()):
                if old["metadata"]["uid"] not in listed and _version(old) <= int(version):
                    self._forget(old)
                    changes.append((None, old))
            for obj in found:
                before = self._objects.get(obj["metadata"]["name"])
                if before is None or _version(before) < _version(obj):
                    self._remember(obj)
                    changes.append((obj, before))
        return changes

    def _remember(self, obj: Object) -> None:
        meta = obj["metadata"]
        if (before := self._objects.get(meta["name"])) is not None:
            self._forget(before)  # it may have belonged to something else
        self._objects[meta["name"]] = obj
        self._names[meta["uid"]] = meta["name"]
        if (subject := subject_of(self._kind, obj)) is not None:
            self._subjects.setdefault(subject, {})[meta["name"]] = obj

    def _forget(self, obj: Object) -> None:
        meta = obj["metadata"]
        self._objects.pop(meta["name"], None)
        self._names.pop(meta["uid"], None)
        subject = subject_of(self._kind, obj)
        if subject is not None and (found := self._subjects.get(subject)) is not None:
            found.pop(meta["name"], None)
            if not found:
                del self._subjects[subject]


def is_ours(obj: Mapping[str, Any]) -> bool:
    """Whether the object bears the label of what this service has made."""
    return (obj["metadata"].get("labels") or {}).get(names.MANAGED_BY) == names.MANAGER


def subject_of(kind: str, obj: Mapping[str, Any]) -> str | None:
    """The deployment or build that an object belongs to; of an event, the UID of what it is about."""
    if kind == "Event":
        about: str | None = obj["involvedObject"].get("uid")
        return about
    marks = obj["metadata"].get("labels") or {}
    found: str | None = marks.get(names.DEPLOYMENT) or marks.get(names.BUILD)
    return found


def _selector(kind: str) -> dict[str, str]:
    if kind == "Event":
        return {"fieldSelector": "involvedObject.kind=Pod,type=Warning"}
    return {} if kind in _NOT_OURS else {"labelSelector": names.SELECTOR}


def _trimmed(kind: str, obj: Object) -> Object:
    """Without what nobody here reads: hundreds of objects stay in memory."""
    meta = {key: value for key, value in obj["metadata"].items() if key != "managedFields"}
    managers = obj["metadata"].get("managedFields") or ()
    if kind not in ("Pod", "Event") and _created_by_us(managers):  # in their order, without the fields
        said = ("manager", "operation", "subresource")
        meta["managedFields"] = [{key: each[key] for key in said if key in each} for each in managers]
    if kind == "Pod":
        spec = obj.get("spec", {})
        slim = {
            part: [
                {"name": each["name"], "image": each.get("image"), "resources": each.get("resources", {})}
                for each in spec.get(part, ())
            ]
            for part in ("initContainers", "containers")
        }
        return {"metadata": meta, "spec": {"nodeName": spec.get("nodeName"), **slim}, "status": obj.get("status", {})}
    if kind == "Event":
        kept = ("involvedObject", "reason", "message", "count", "series")
        return {"metadata": {key: meta.get(key) for key in ("name", "uid", "resourceVersion")}} | {
            key: obj.get(key) for key in kept
        }
    return {**obj, "metadata": meta}


def _created_by_us(entries: Sequence[Mapping[str, Any]]) -> bool:
    """Whether our fields are all those of a `create`; else server-side apply has them already."""
    applied = any((each.get("manager"), each.get("operation")) == (names.MANAGER, "Apply") for each in entries)
    return not applied and any(_is_created(each) for each in entries)


def _is_created(entry: Mapping[str, Any]) -> bool:
    """An entry of `managedFields` for what we set by another operation than server-side apply."""
    return (entry.get("manager"), entry.get("operation"), entry.get("subresource", "")) == (names.MANAGER, "Update", "")


def _version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])


def _lines(response: urllib3.HTTPResponse) -> Iterator[str]:
    rest = b""
    for chunk in response.stream(None, decode_content=True):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _configuration(kubeconfig: Path | None) -> client.Configuration:
    configuration = client.Configuration()
    try:
        if kubeconfig is None and Path("/var/run/secrets/kubernetes.io/serviceaccount/token").exists():
            loaders.load_incluster_config(client_configuration=configuration)
            configuration.proxy = None  # no proxy knows the cluster's own addresses
        else:
            loaders.load_kube_config(
                config_file=str(kubeconfig) if kubeconfig else None, client_configuration=configuration
            )
    except (loaders.ConfigException, OSError) as error:
        raise ClusterError(
            "no_cluster",
            f"There is no usable configuration of a cluster: {error}",
            hint="In a pod, give it a service account; elsewhere set EKIBEN_KUBECONFIG to a kubeconfig file.",
        ) from error
    configuration.connection_pool_maxsize = 64
    return configuration


def _unreachable(method: str, path: str, error: Exception) -> Unreachable:
    return Unreachable(
        "cluster_unreachable",
        f"The cluster's API did not answer {method} {path}: {error}",
        hint="Is the API server up, and may this service reach it?",
    )


def _error(method: str, path: str, status: int, body: bytes) -> ClusterError:
    try:
        answer = json.loads(body)
        words = str(answer.get("message") or answer)
    except (ValueError, AttributeError):
        words = body[:500].decode(errors="replace")
    if status == 404:
        return NotThere("cluster_not_found", words, answered=status)
    if status == 409:
        return Conflict("cluster_conflict", words, answered=status)
    if status == 410:
        return Unreachable("cluster_gone", words, answered=status)
    if status in (401, 403):
        hint = "Do the Roles of this service's account in the namespace allow it?"
        detail = f"The cluster refuses {method} {path}: {words}"
        return Forbidden("cluster_forbidden", detail, hint=hint, answered=status)
    if status == 429 or status >= 500:
        return Unreachable("cluster_unreachable", f"{method} {path}: {status}: {words}", answered=status)
    return Refused("cluster_refused", words, answered=status)
