"""A platform in memory, on which everything is ready at once: for tests that look at the control loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from build_service.platform import BuildOrder, BuildStatus, Failure, Observed, RevisionOrder
from registry.errors import InfrastructureError

RESULT = {"image": {"digest": "sha256:1"}, "lock": None}


@dataclass
class InMemory:
    """Runs nothing, and keeps to the contract of the seam: several replicas of the service may share it."""

    autoscales = False
    runs: dict[str, RevisionOrder] = field(default_factory=dict)
    crashed: dict[str, int] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    builds: dict[tuple[str, int], BuildStatus] = field(default_factory=dict)
    away: bool = False  # writes are not answered
    lost: int = -1  # the newest making of an image that is gone

    def submit(self, order: BuildOrder) -> None:
        self.asked.append(f"submit {order.id} {order.attempt}")
        self._answer()
        self.builds[order.id, order.attempt] = BuildStatus("running", "fetch")

    def build_status(self, order_id: str, attempt: int) -> BuildStatus:
        return self.builds.get((order_id, attempt), BuildStatus("missing"))

    def cancel(self, order_id: str, attempt: int) -> None:
        self._answer()
        self.builds.pop((order_id, attempt), None)

    def end(self, build: str, attempt: int, failure: Failure | None = None) -> None:
        """An attempt that runs ends."""
        assert self.builds[build, attempt].state == "running"
        ended = BuildStatus("failed", failure=failure) if failure else BuildStatus("succeeded", result=dict(RESULT))
        self.builds[build, attempt] = ended

    def _answer(self) -> None:
        if self.away:
            raise InfrastructureError("cluster_unreachable", "The cluster's API did not answer.")

    def holds(self, result: dict[str, Any]) -> bool:
        self.asked.append("holds")
        return bool(result.get("making", 0) > self.lost)

    def apply(self, order: RevisionOrder) -> None:
        self.asked.append("apply")
        self.runs[order.deployment] = order

    def ready(self, deployment: str) -> int:
        return self.observe(deployment).ready

    def observe(self, deployment: str) -> Observed:
        return self.observe_all().get(deployment, Observed())

    def observe_all(self) -> dict[str, Observed]:
        return {
            name: Observed(
                order.revision, order.replicas, applied=order.terms, crashes=self.crashed.get(name, 0),
                crash=Failure("serving_crashed", "It ended.") if name in self.crashed else None,
            )
            for name, order in self.runs.items()
        }  # fmt: skip

    def delete(self, deployment: str) -> None:
        self.asked.append("delete")
        self.runs.pop(deployment, None)

    def build_log(self, order_id: str, *, follow: bool) -> Iterator[str]:
        return iter(())

    def serving_log(self, deployment: str, *, follow: bool, ended: Callable[[], bool]) -> Iterator[str]:
        return iter(())

    def close(self) -> None: ...
