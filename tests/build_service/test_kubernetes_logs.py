"""Logs of builds, of pods as the cluster tells of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from build_service.kubernetes import names
from build_service.kubernetes.cluster import Cluster
from build_service.kubernetes.logs import BuildLogs
from registry.store import DirectoryStore

PREEMPTED = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}


class Pods:
    """The part of a cluster that a build's log comes from."""

    def __init__(self) -> None:
        self.pod: dict[str, Any] | None = None
        self.over = False
        self.lines: dict[tuple[str, str], list[tuple[str, str]]] = {}

    def start(self, name: str, created: str) -> None:
        steps = [{"name": step} for step in names.STEPS]
        meta = {"name": name, "uid": name, "creationTimestamp": created}
        self.pod = {
            "metadata": meta, "spec": {"initContainers": steps[:2], "containers": steps[2:]},
            "status": {"phase": "Running"},
        }  # fmt: skip

    def says(self, step: str, stamp: str, text: str, **state: Any) -> None:
        assert self.pod is not None
        self.lines.setdefault((self.pod["metadata"]["name"], step), []).append((stamp, text))
        statuses = self.pod["status"].setdefault("containerStatuses", [])
        statuses[:] = [each for each in statuses if each["name"] != step]
        statuses.append({"name": step, "state": state or {"running": {}}})

    def log_lines(
        self, namespace: str, pod: str, container: str, *, since: str = "", tail: int | None = None
    ) -> Iterator[tuple[str, str]]:
        yield from (line for line in self.lines.get((pod, container), []) if line[0] > since)


def test_the_log_goes_on_with_the_pod_that_takes_the_place_of_one_that_was_pushed_away(tmp_path: Path) -> None:
    pods = Pods()
    logs = BuildLogs(
        cast(Cluster, pods), "builds", DirectoryStore(tmp_path), lambda *_: pods.pod, lambda *_: pods.over, lambda: None
    )
    logs.start()
    try:
        logs.collect("b-1", 1)
        pods.start("first", "2026-01-01T10:00:00Z")
        pods.says("fetch", "2026-01-01T10:00:01.5Z", "one")
        until(lambda: "one" in read(logs))
        assert pods.pod is not None
        pods.pod["status"] |= {"phase": "Failed", "conditions": [PREEMPTED]}
        pods.says("fetch", "2026-01-01T10:00:02.5Z", "two", terminated={"exitCode": 143})
        until(lambda: "two" in read(logs))
        pods.start("second", "2026-01-01T10:00:09Z")
        for second, step in enumerate(names.STEPS, 10):
            pods.says(step, f"2026-01-01T10:00:{second}.5Z", f"{step} of the second", terminated={"exitCode": 0})
        until(lambda: "assemble of the second" in read(logs))
        pods.over = True
        whole = list(logs.read("b-1", follow=True))
    finally:
        logs.close()
    assert [line for line in whole if line and not line.startswith("==>")] == [
        "one", "two", "fetch of the second", "inspect of the second", "assemble of the second",
    ]  # fmt: skip


def read(logs: BuildLogs) -> list[str]:
    return list(logs.read("b-1", follow=False))


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
