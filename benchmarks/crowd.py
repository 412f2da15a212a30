"""Many at once on a real Kubernetes: fifty uploads, and five hundred deployments whose pods are simulated."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks import parts, simulated, site
from benchmarks.cluster import at_rank, installation
from benchmarks.figures import Absent, Figure, Measured, Sample
from benchmarks.load import Version

if TYPE_CHECKING:
    from tests.k8s.installation import Installation

_PATIENCE = 3600.0  # seconds until all is done
_ASKED = ("/deployments", "/models")
_ASK_PAUSE = 0.1  # seconds between two questions to the API
_BUILT = ("succeeded", "failed", "cancelled")


# --- fifty uploads ----------------------------------------------------------------------------------------------------


def busy(bench: parts.Bench) -> Measured:
    """Uploads arrive together, five for each of ten deployments; meanwhile a user looks at the lists."""
    at = installation(bench)
    names, each = (3, 2) if bench.quick else (10, 5)
    folders = bench.new_models(names * each + 1)
    crowd, first = site.new_name("crowd"), site.new_name("first")
    uploads = [(f"{crowd}-{n % names}", Version(0, folder)) for n, folder in enumerate(folders[1:])]
    site.upload(at, first, Version(1, folders[0]), wait=_PATIENCE, deploy="false")
    before = site.wait_until_quiet()
    try:
        with site.Watch(at.cluster, site.JOBS) as jobs, Asking(at) as asking:
            time.sleep(1)
            began = time.time()
            with ThreadPoolExecutor(len(uploads)) as pool:
                made = list(pool.map(lambda one: _timed(at, *one), uploads))
            parts.say(f"{len(made)} uploads answered within {time.time() - began:.1f} s")
            builds = _all_built(at, [str(version["build"]) for version, _ in made])
            built = time.time() - began
            parts.say(f"all built after {built:.0f} s")
            for name in sorted({name for name, _ in uploads}):
                latest = max(int(version["version"]) for version, _ in made if version["model"] == name)
                at.live(name, latest, seconds=_PATIENCE)
            live = time.time() - began
            told = jobs.told()
        if asking.failed:
            raise parts.Failed(f"{len(asking.failed)} questions failed: {asking.failed[0]}")
        failed = [build for build in builds if build["state"] != "succeeded"]
        if failed:
            raise parts.Failed(f"{len(failed)} of {len(builds)} were not built: {failed[0]['reason']}")
    finally:
        for name in sorted({name for name, _ in uploads}):
            site.forget(at, name)
        at.remove(first)
    order = _order(builds, told)
    latencies = asking.seconds
    every = sorted(value for values in latencies.values() for value in values)
    detail: dict[str, Any] = {
        "uploads": len(uploads),
        "deployments": names,
        "built": len(builds),
        "all_built_s": round(built),
        "all_live_s": round(live),
        "builds_at_once": 2,
        "longest_upload_s": round(max(took for _, took in made), 2),
        "builds_that_overtook_an_earlier_one": order.overtakes,
        "longest_wait_for_a_start_s": round(order.longest),
        "latest_first_start_of_a_deployment_s": round(order.latest_first),
        "questions": len(every),
        "p50_ms": round(1000 * at_rank(every, 0.5), 1),
        "longest_ms": round(1000 * every[-1], 1),
        **{f"p99_ms {path}": round(1000 * at_rank(sorted(latencies[path]), 0.99), 1) for path in _ASKED},
        "load_average_before": before,
    }
    samples = [Sample(n, path, "answer", value, "s") for path in _ASKED for n, value in enumerate(latencies[path])]
    samples += [Sample(n, "build", "wait for its start", value, "s") for n, value in enumerate(order.waits)]
    return Measured(1000 * at_rank(every, 0.99), detail, samples)


@dataclass
class Asking(contextlib.AbstractContextManager["Asking"]):
    """A user who looks at the lists again and again."""

    site: Installation
    seconds: dict[str, list[float]] = field(default_factory=lambda: {path: [] for path in _ASKED})
    failed: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Asking:
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            for path in _ASKED:
                began = time.monotonic()
                answer = self.site.http.get(path)
                self.seconds[path].append(time.monotonic() - began)
                if answer.status_code != 200:
                    self.failed.append(f"GET {path}: {answer.status_code} {answer.text[:300]}")
            self._stop.wait(_ASK_PAUSE)


def _timed(at: Installation, name: str, version: Version) -> tuple[dict[str, Any], float]:
    began = time.monotonic()
    return site.upload(at, name, version), time.monotonic() - began


def _all_built(at: Installation, ids: Sequence[str]) -> list[dict[str, Any]]:
    def ended() -> list[dict[str, Any]]:
        found = [build for build in at.call("GET", "/builds?limit=500")["items"] if build["id"] in ids]
        return found if len(found) == len(ids) and all(build["state"] in _BUILT for build in found) else []

    return site.wait_for(ended, _PATIENCE, "not all were built", 2)


@dataclass(frozen=True)
class Order:
    overtakes: int
    waits: Sequence[float]
    latest_first: float  # until the deployment that waited longest had its first build started

    @property
    def longest(self) -> float:
        return max(self.waits)


def _order(builds: Sequence[Mapping[str, Any]], told: Sequence[site.Told]) -> Order:
    """Whether builds started in the order in which they arrived."""
    started: dict[str, float] = {}
    for one in told:
        started.setdefault(one.label("build"), one.at)
    arrived = sorted(builds, key=lambda build: parts.seconds(build["created"]))
    starts = [started[build["id"]] for build in arrived]
    overtakes = sum(any(earlier > start for earlier in starts[:n]) for n, start in enumerate(starts))
    waits = [max(0.0, start - parts.seconds(build["created"])) for build, start in zip(arrived, starts, strict=True)]
    firsts: dict[str, float] = {}
    for build, wait in zip(arrived, waits, strict=True):
        firsts.setdefault(build["model"], wait)
    return Order(overtakes, waits, max(firsts.values()))


# --- five hundred deployments -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Many:
    """What was found with many deployments: seconds of each change, memory of the service in bytes."""

    changes: Sequence[float]
    drifts: Sequence[float]
    peak: int
    detail: Mapping[str, Any]


def reconcile(bench: parts.Bench) -> Measured:
    """From a change that is asked for, or a drift, to the cluster's object as it should be."""
    found = _many(bench)
    every = sorted([*found.changes, *found.drifts])
    samples = [Sample(n, "ours", "change", value, "s") for n, value in enumerate(found.changes)]
    samples += [Sample(n, "ours", "drift", value, "s") for n, value in enumerate(found.drifts)]
    return Measured(at_rank(every, 0.99), found.detail, samples)


def memory(bench: parts.Bench) -> Measured:
    """The most that the service's process had resident at any time of the same run."""
    found = _many(bench)
    megabytes = found.peak / 1_000_000
    return Measured(
        megabytes, {"deployments": found.detail["deployments"]}, [Sample(0, "ours", "resident", megabytes, "MB")]
    )


def _many(bench: parts.Bench) -> Many:
    found: Many = bench.part("many", lambda: _measure_many(bench))
    return found


def _measure_many(bench: parts.Bench) -> Many:
    made = installation(bench)
    if made.cluster.root is None:
        raise Absent("simulated nodes are for the cluster of tests/cluster")
    count, changes = (30, 10) if bench.quick else (500, 200)
    model = site.new_name("many")
    names = [f"{model}-{n:03d}" for n in range(count)]
    for number, folder in enumerate(bench.new_models(2)):
        site.upload(made, model, Version(number + 1, folder), wait=_PATIENCE, deploy="false")
    try:
        with _quiet_ingress(made) as at, simulated.nodes(at.cluster, count):
            try:
                return _with_many(at, names, changes)
            finally:
                _delete(at, names)
    finally:
        made.remove(model)


def _with_many(at: Installation, names: Sequence[str], changes: int) -> Many:
    pid = _Process(at)
    began = time.monotonic()
    _put(at, names, 1)
    asked = time.monotonic() - began
    parts.say(f"{len(names)} deployments asked for within {asked:.0f} s")
    _all_live(at, names, 1)
    live = time.monotonic() - began
    parts.say(f"all live after {live:.0f} s")
    rest = pid.share_of_a_core(20)
    watched = (site.DEPLOYMENTS, site.SERVICES)
    with site.Watch(at.cluster, watched[0]) as deployments, site.Watch(at.cluster, watched[1]) as services:
        time.sleep(3)
        rolled, drifted = names[: changes // 2], names[-(changes // 2) :]
        sent: dict[str, float] = {}
        for one, other in zip(rolled, drifted, strict=True):
            sent[one] = time.time()
            _target(at, one, 2)
            time.sleep(0.5)
            at.cluster.kubectl("delete", "service", other, "-n", "ekiben-models", "--wait=false")
            time.sleep(0.5)
        busy = pid.share_of_a_core(1)
        took = [_rolled(deployments, name, 2) - sent[name] for name in rolled]
        mended = [_mended(services, name) for name in drifted]
        _all_live(at, rolled, 2)
        rest_of_them = names[changes // 2 :]
        began = time.time()
        _put(at, rest_of_them, 2)
        storm = [_rolled(deployments, name, 2) - began for name in rest_of_them]
    given_up = _all_settled(at, rest_of_them, 2)
    detail = {
        "deployments": len(names),
        "made_by": "PUT /deployments/NAME of one version whose image was built before; nodes and pods by kwok, the "
        "ingress controller paused",
        "changes": len(took),
        "change_p50_s": round(at_rank(sorted(took), 0.5), 2),
        "change_longest_s": round(max(took), 2),
        "drifts": len(mended),
        "drift_p50_s": round(at_rank(sorted(mended), 0.5), 2),
        "drift_longest_s": round(max(mended), 2),
        "all_asked_for_s": round(asked),
        "all_live_s": round(live),
        f"{len(storm)}_changes_at_once_last_s": round(max(storm), 1),
        f"{len(storm)}_changes_at_once_given_up": given_up,
        "cores_at_rest": round(rest, 2),
        "cores_while_changing": round(busy, 2),
        "resident_at_the_end_mb": round(pid.resident("VmRSS") / 1_000_000),
    }
    return Many(took, mended, pid.resident("VmHWM"), detail)


@contextlib.contextmanager
def _quiet_ingress(made: Installation) -> Iterator[Installation]:
    """The API by its Service: on this machine's cores the ingress controller's hundreds of routes count as nobody's."""
    from tests.k8s.installation import Installation

    address = made.cluster.get("service", "ekiben", "-n", "ekiben")["spec"]["clusterIP"]
    made.cluster.kubectl("scale", "-n", "ingress", "deployment/traefik", "--replicas=0")
    at = Installation(replace(made.cluster, ingress_url=f"http://{address}"), made.token)
    try:
        yield at
    finally:
        at.http.close()
        made.cluster.kubectl("scale", "-n", "ingress", "deployment/traefik", "--replicas=1")
        made.cluster.kubectl("rollout", "status", "-n", "ingress", "deployment/traefik", "--timeout=120s")
        site.wait_for(lambda: made.http.get("/readyz").status_code == 200, 120, "the ingress does not answer again")


def _target(at: Installation, name: str, version: int) -> None:
    at.call("PUT", f"/deployments/{name}", json={"model": name.rpartition("-")[0], "version": version})


def _put(at: Installation, names: Sequence[str], version: int) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: _target(at, name, version), names))


def _all_live(at: Installation, names: Sequence[str], version: int) -> None:
    def live() -> bool:
        return all(_is_live(row, version) and row["ready"] for row in _rows(at, names))

    site.wait_for(live, _PATIENCE, f"version {version} is not live everywhere", 2)


def _all_settled(at: Installation, names: Sequence[str], version: int) -> int:
    """How many went back to what they served: the pods were not ready in time, as so many were asked for at once."""

    def settled() -> bool:
        return all(row["state"] == "rolled_back" or _is_live(row, version) for row in _rows(at, names))

    site.wait_for(settled, _PATIENCE, f"version {version} is neither live nor given up everywhere", 2)
    return sum(row["state"] == "rolled_back" for row in _rows(at, names))


def _rows(at: Installation, names: Sequence[str]) -> list[dict[str, Any]]:
    rows = {row["name"]: row for row in at.call("GET", "/deployments")["items"]}
    return [rows[name] for name in names]


def _is_live(row: Mapping[str, Any], version: int) -> bool:
    return bool(row["state"] == "live" and row["target"]["version"] == version)


def _delete(at: Installation, names: Sequence[str]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda name: at.http.delete(f"/deployments/{name}"), names))
    stem = f"pod/{names[0].rpartition('-')[0]}-"
    chosen = ("pods", "-n", "ekiben-models", "-o", "name")
    site.wait_for(lambda: stem not in at.cluster.kubectl("get", *chosen), _PATIENCE, "simulated pods do not go", 2)


def _rolled(deployments: site.Watch, name: str, version: int) -> float:
    def so(one: site.Told) -> bool:
        return one.name == name and one.label("version") == str(version)

    return deployments.first(so, _PATIENCE, f"version {version} of {name}").at


def _mended(services: site.Watch, name: str) -> float:
    """From the deletion to the new one, by the time of the same watch."""
    gone = services.first(lambda one: one.name == name and one.event == "DELETED", 60, f"the end of {name}'s Service")

    def made(one: site.Told) -> bool:
        return one.name == name and one.event == "ADDED" and one.at >= gone.at

    return services.first(made, _PATIENCE, f"{name}'s new Service").at - gone.at


class _Process:
    """The service's own process, as its pod sees it."""

    def __init__(self, at: Installation) -> None:
        self._at = at

    def resident(self, key: str) -> int:
        """Bytes: VmRSS now, VmHWM at most."""
        found = [line.split() for line in self._read("status").splitlines() if line.startswith(f"{key}:")]
        return int(found[0][1]) * 1024

    def share_of_a_core(self, seconds: float) -> float:
        before, began = self._ticks(), time.monotonic()
        time.sleep(seconds)
        return (self._ticks() - before) / 100 / (time.monotonic() - began)

    def _ticks(self) -> int:
        fields = self._read("stat").rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    def _read(self, file: str) -> str:
        read = f"print(open('/proc/1/{file}').read())"
        return self._at.cluster.kubectl("exec", "-n", "ekiben", "deploy/ekiben", "--", "python", "-c", read)


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "cluster.api_p99_busy", "Kubernetes: p99 of the API's lists while 50 uploads at once are built", "ms", 300,
        "lower", issue=2,
    ): busy,
    Figure(
        "cluster.reconcile_p99", "Kubernetes: 500 deployments, p99 from a change or drift to the cluster's object", "s",
        5, "lower", issue=2,
    ): reconcile,
    Figure(
        "cluster.service_memory", "Kubernetes: 500 deployments, resident memory of the service", "MB", 500, "lower",
        issue=2,
    ): memory,
}  # fmt: skip
