"""The way of a model on a real Kubernetes: its first answer, its version changes under load, what a node pulls for it.

The cluster is that of tests/cluster (one node, on this machine), the installation its overlay `test`.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import load, parts, site
from benchmarks.figures import Figure, Measured, Sample
from benchmarks.load import Answers, Load, Version

if TYPE_CHECKING:
    from tests.k8s.installation import Installation

_PATIENCE = 600.0  # seconds until a version must be live
_PAUSE = 0.05  # of the client that waits for a new version; shorter ones take time from what is measured
_TELL = 60.0  # seconds until the API server must have told what has happened
_CHANGES, _CALLS = 10, 20_000
_CLIENTS = 8  # half on connections kept alive, half on new ones
_SHARE = 0.7  # of the capacity
_CALM = 8.0  # seconds until the pod before has gone

# Builds read the same registry, and say that they are something else.
_PULLED = re.compile(r'"GET /v2/\S+/(manifests|blobs)/(\S+) HTTP/[0-9.]+" 200 (\d+) "[^"]*" "containerd')


def installation(bench: parts.Bench) -> Installation:
    """Made once for all figures of a run."""
    found: Installation = bench.part("installation", lambda: bench.enter(site.installed()))
    return found


def _versions(bench: parts.Bench, count: int) -> list[Version]:
    return [Version(number + 1, folder) for number, folder in enumerate(bench.new_models(count))]


# --- the first answer -------------------------------------------------------------------------------------------------


def first_answer(bench: parts.Bench) -> Measured:
    """A client asks through the ingress all the time; the clock runs from the last byte sent to the first answer."""
    at = installation(bench)
    versions = _versions(bench, bench.rounds(7) + 2)
    answers, name = Answers(versions), site.new_name("churn")
    samples: list[Sample] = []
    for version in versions[:2]:  # the first installs the packages; the second finds the node as it stays
        site.upload(at, name, version, wait=_PATIENCE)
    loads = []
    try:
        for number, version in enumerate(versions[2:]):
            time.sleep(_CALM)
            loads.append(site.wait_until_quiet())
            steps = _one(at, name, version, answers)
            parts.say(f"round {number + 1}: " + ", ".join(f"{step} {value:.2f} s" for step, value in steps.items()))
            samples += [Sample(number, "ours", step, value, "s") for step, value in steps.items()]
    finally:
        site.forget(at, name)
    medians = {
        step: median(one.value for one in samples if one.what == step)
        for step in dict.fromkeys(sample.what for sample in samples)
    }
    total = medians.pop("total")
    detail = {
        "median_s": {step: round(value, 3) for step, value in medians.items()},
        "rounds": len(versions) - 2,
        "load_average_before": loads,
    }
    return Measured(total, detail, samples)


def _one(at: Installation, name: str, version: Version, answers: Answers) -> dict[str, float]:
    endpoint = site.endpoint(at, name)
    watched = (site.JOBS, f"{site.BUILDS}/pods", site.DEPLOYMENTS, f"{site.MODELS}/pods")
    with (
        site.Watch(at.cluster, watched[0]) as jobs,
        site.Watch(at.cluster, watched[1]) as builders,
        site.Watch(at.cluster, watched[2]) as deployments,
        site.Watch(at.cluster, watched[3]) as models,
    ):
        time.sleep(1)
        seen = load.first_answer(endpoint, version, answers, _PATIENCE, _PAUSE)
        steps = _breakdown(at, version, seen, jobs, builders, deployments, models)
    at.live(name, version.number)
    return {"total": seen.seen - seen.sent, **steps}


def _breakdown(
    at: Installation,
    version: Version,
    seen: load.Arrival,
    jobs: site.Watch,
    builders: site.Watch,
    deployments: site.Watch,
    models: site.Watch,
) -> dict[str, float]:
    """The way in pieces that add up to the whole; those with a colon are parts of the piece before them."""
    build = str(seen.made["build"])
    job = jobs.first(lambda one: one.label("build") == build, _TELL, "the build's Job")
    pod = builders.first(lambda one: one.label("build") == build, _TELL, "the build's pod")
    said = {step: site.lines(at.cluster, "ekiben-builds", pod.name, step) for step in site.containers(pod.obj)}
    built = at.call("GET", f"/builds/{build}")

    def of_model(one: site.Told) -> bool:
        return (one.label("model"), one.label("version")) == (str(seen.made["model"]), str(version.number))

    def condition(name: str) -> float:
        def has(one: site.Told) -> bool:
            found = one.obj["status"].get("conditions") or ()
            return of_model(one) and any(each["type"] == name and each["status"] == "True" for each in found)

        return models.first(has, _TELL, f"the condition {name} of the model's pod").at

    applied = deployments.first(of_model, _TELL, "the Deployment")
    made = models.first(of_model, _TELL, "the model's pod")
    scheduled, ready = condition("PodScheduled"), condition("Ready")
    log = site.lines(at.cluster, "ekiben-models", made.name, "model")
    marks = [(when, text) for when, text in log if text.startswith("{")]
    golden = next((when for when, text in marks if "golden sample" in text), ready)
    listens = next((when for when, text in marks if " is ready on " in text), ready)
    pieces = {
        "upload answered": seen.answered,
        "queue: Job made": job.at,
        "pod made, container made": site.container_made(at.cluster, pod, "fetch"),
        "fetch: started": said["fetch"][0][0],
        "fetch": said["fetch"][-1][0],
        **({"inspect: nothing to import": said["inspect"][-1][0]} if "inspect" in said else {}),
        "assemble: container made": site.container_made(at.cluster, pod, "assemble"),
        "assemble: started": said["assemble"][0][0],
        "assemble, push": said["assemble"][-1][0],
        "build's end known": parts.seconds(built["finished"]),
        "Deployment applied": applied.at,
        "rollout: pod made": made.at,
        "rollout: scheduled": scheduled,
        "rollout: pulled, container made": site.container_made(at.cluster, made, "model"),
        "rollout: process started, model loaded, golden sample": golden,
        "rollout: listens": listens,
        "rollout: ready": ready,
        "route": seen.seen,
    }
    steps, before = {}, seen.sent
    for name, when in pieces.items():
        steps[name], before = when - before, when
    stages = {f"builder says: {stage['stage']}": stage["seconds"] for stage in built["stages"]}
    return {**steps, **stages, **_pull(at, made.name)}


def _pull(at: Installation, pod: str) -> dict[str, float]:
    """How long the node says it pulled the image."""
    chosen = ("events", "-n", "ekiben-models", "--field-selector", f"involvedObject.name={pod},reason=Pulled")
    for event in at.cluster.get(*chosen)["items"]:
        found = re.search(r"in (?:([\d.]+)m)?([\d.]+)(ms|s)\b", event["message"])
        if found:
            return {"node says: pull": float(found[2]) / (1000 if found[3] == "ms" else 1)}
    return {}


# --- version changes under load ---------------------------------------------------------------------------------------


def failed_calls(bench: parts.Bench) -> Measured:
    """The capacity is measured first, with the same clients; then versions roll while they call at a share of it."""
    at = installation(bench)
    changes, calls = (2, 0) if bench.quick else (_CHANGES, _CALLS)
    versions = _versions(bench, changes + 1)
    name = site.new_name("busy")
    answers, endpoint = Answers(versions), site.endpoint(at, name)
    site.upload(at, name, versions[0], wait=_PATIENCE)
    wanted = {"model": name, "version": 1, "replicas": 2}
    try:
        at.call("PUT", f"/deployments/{name}", json=wanted)
        site.wait_for(lambda: at.deployment(name)["ready"] == 2, _PATIENCE, "two replicas are not ready", 1)
        capacity = _capacity(endpoint, answers, 5 if bench.quick else 20)
        rate = _SHARE * capacity
        parts.say(f"capacity {capacity:.0f} calls/s; {rate:.0f} calls/s from now on")
        steady = Load(endpoint, answers, _CLIENTS, period=_CLIENTS / rate)
        began = time.monotonic()
        with steady.running():
            time.sleep(2)
            for version in versions[1:]:
                site.upload(at, name, version, wait=_PATIENCE)
                parts.say(f"version {version.number} live; {steady.calls} calls, {_failed(steady)} failed")
            site.wait_for(lambda: steady.calls >= calls, 3600, f"{calls} calls were not made", 1)
            time.sleep(2)
        took = time.monotonic() - began
    finally:
        site.forget(at, name)
    unseen = [one.number for one in versions if not steady.versions[one.number]]
    if unseen:
        raise parts.Failed(f"versions {unseen} never answered")
    ordered = sorted(steady.seconds)
    samples = [
        Sample(0, "ours", "capacity", capacity, "calls/s"),
        Sample(0, "ours", "calls", steady.calls, "calls"),
        Sample(0, "ours", "failed", _failed(steady), "calls"),
        *(Sample(0, "ours", f"version {key}", steady.versions[key], "calls") for key in sorted(steady.versions)),
    ]
    detail: dict[str, Any] = {
        "calls": steady.calls,
        "changes": changes,
        "replicas": 2,
        "clients": _CLIENTS,
        "capacity_per_s": round(capacity, 1),
        "asked_per_s": round(rate, 1),
        "answered_per_s": round(steady.calls / took, 1),
        "p50_ms": round(1000 * at_rank(ordered, 0.5), 1),
        "p99_ms": round(1000 * at_rank(ordered, 0.99), 1),
        "longest_ms": round(1000 * ordered[-1], 1),
    }
    if steady.failures:
        detail["failures"] = dict(steady.failures)
    return Measured(_failed(steady), detail, samples)


def _capacity(endpoint: load.Endpoint, answers: Answers, seconds: float) -> float:
    """Calls a second of the same clients without a pause, once they have warmed up."""
    flat_out = Load(endpoint, answers, _CLIENTS)
    with flat_out.running():
        time.sleep(2)
        before, began = flat_out.calls, time.monotonic()
        time.sleep(seconds)
        found = (flat_out.calls - before) / (time.monotonic() - began)
    if flat_out.failures:
        raise parts.Failed(f"calls failed before anything was changed: {dict(flat_out.failures)}")
    return found


def _failed(calls: Load) -> int:
    return sum(calls.failures.values())


def at_rank(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return ordered[min(len(ordered) - 1, max(0, round(share * len(ordered) + 0.5) - 1))]


# --- what a node pulls ------------------------------------------------------------------------------------------------


def second_pull(bench: parts.Bench) -> Measured:
    """Bytes that the registry for nodes sent, by its own access log, from the upload of a version to its answer."""
    at = installation(bench)
    versions = _versions(bench, bench.rounds(3) + 1)
    model = site.new_name("pulled")
    site.upload(at, model, versions[0], wait=_PATIENCE)
    samples: list[Sample] = []
    others: list[float] = []
    sizes: Counter[str] = Counter()
    try:
        for number, version in enumerate(versions[1:]):
            before = len(_sent(at))
            made = site.upload(at, model, version, wait=_PATIENCE)
            image = at.call("GET", f"/builds/{made['build']}")["image"]
            names = {layer["digest"]: layer["name"] for layer in image["layers"]}
            sizes = Counter()
            for kind, digest, size in _sent(at)[before:]:
                sizes[names.get(digest, "config") if kind == "blobs" else "manifest"] += size
            expected = next(layer["size"] for layer in image["layers"] if layer["name"] == "model")
            if sizes["model"] != expected:
                raise parts.Failed(f"the node pulled {sizes['model']} bytes of a model layer that has {expected}")
            others.append(sum(size for name, size in sizes.items() if name not in ("model", "config", "manifest")))
            samples += [Sample(number, "node", name, size, "bytes") for name, size in sorted(sizes.items())]
            samples.append(Sample(number, "node", "other layers", others[-1], "bytes"))
    finally:
        site.forget(at, model)
    detail = {
        "pulled": dict(sorted(sizes.items())),
        "image": {layer["name"]: layer["size"] for layer in image["layers"]},
        "said_by": "the access log of the registry that nodes pull from",
    }
    return Measured(max(others), detail, samples)


def _sent(at: Installation) -> list[tuple[str, str, int]]:
    """(manifests or blobs, digest, bytes) of all that nodes were sent."""
    log = at.cluster.kubectl("logs", "-n", "ekiben", "statefulset/registry", "-c", "pull", timeout=60)
    return [(found[1], found[2], int(found[3])) for found in map(_PULLED.search, log.splitlines()) if found]


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "cluster.first_answer", "Kubernetes: last uploaded byte to the first right answer through the ingress",
        "s", 10, "lower", issue=2,
    ): first_answer,
    Figure(
        "cluster.failed_calls", "Kubernetes: calls that failed during 10 version changes at 70 % of the capacity",
        "calls", 0, "lower", issue=2,
    ): failed_calls,
    Figure(
        "cluster.second_pull_bytes",
        "Kubernetes: bytes of other layers than the model's that a node pulls for new weights",
        "bytes", 0, "lower", issue=2,
    ): second_pull,
}  # fmt: skip
