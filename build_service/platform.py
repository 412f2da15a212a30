"""Where builds and deployments run: the second seam of Ekiben.

Every method is idempotent and named by content: submitting a build that runs joins it, applying a revision that is
applied changes nothing, deleting what is gone is fine. None of them waits for work to finish; the control loop asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from registry.versions import Version


@dataclass(frozen=True)
class Failure:
    """Why something failed, in words a user understands. `user`: it is the model's fault, so a retry is pointless."""

    code: str
    message: str
    hint: str | None = None
    stage: str | None = None
    user: bool = True


@dataclass(frozen=True)
class BuildOrder:
    """One attempt of a build."""

    id: str
    attempt: int
    version: Version
    image: dict[str, Any] | None
    allow_code: bool
    allowed_packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class BuildStatus:
    """`state` is running, succeeded, failed, or missing (this platform does not know the attempt)."""

    state: str
    stage: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class RevisionOrder:
    """What a deployment shall run."""

    deployment: str
    revision: int
    version: Version
    build: dict[str, Any]  # result of the build
    replicas: int
    resources: dict[str, str]
    strategy: str
    proven: bool = False  # it has been live: when its process ends it is started again, and never given up
    default: bool = False  # it answers calls that name no deployment
    autoscale: dict[str, int] | None = None  # {"max": replicas, "cpu": percent}: then `replicas` are the least
    fence: int = field(default=0, compare=False)  # of the lease it is ordered under: an older one is overtaken

    @property
    def terms(self) -> str:
        return terms(
            self.revision, self.replicas, self.resources, self.strategy, self.autoscale, proven=self.proven,
            default=self.default,
        )  # fmt: skip


def terms(
    revision: int,
    replicas: int,
    resources: dict[str, str],
    strategy: str,
    autoscale: dict[str, int] | None,
    *,
    proven: bool,
    default: bool,
) -> str:
    """All of an order that can change after it was applied, as one text to compare and to keep beside what runs."""
    wanted = [revision, replicas, resources, strategy, autoscale, proven, default]
    return json.dumps(wanted, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Observed:
    """What a deployment runs now.

    `revision` has the traffic and `ready` processes; `checked` is its golden sample's outcome. `failure` says why the
    revision `failed` cannot take the traffic. `crashes` counts the ends of processes that nobody asked for, of which
    `crash` is the last. `applied` are the terms of the order that the platform keeps to; None: it cannot tell, and is
    told again in every round. `waiting` says what keeps the wanted revision, when that may pass by itself. `behind`:
    the platform is late in starting or ending processes, which is not counted against the time that the revision has.
    """

    revision: int | None = None
    ready: int = 0
    checked: dict[str, Any] | None = None
    failed: int | None = None
    failure: Failure | None = None
    crashes: int = 0
    crash: Failure | None = None
    applied: str | None = None
    waiting: Failure | None = None
    behind: bool = False


@dataclass(frozen=True)
class InUse:
    """What processes on this machine work with at the moment, whatever SQL says is wanted."""

    builds: frozenset[str] = frozenset()
    folders: frozenset[str] = frozenset()  # names of environments and Bentos
    locations: frozenset[str] = frozenset()  # of versions


class Platform(Protocol):
    autoscales: bool
    """whether it can change the number of a deployment's replicas by itself"""

    def submit(self, order: BuildOrder) -> None: ...

    def build_status(self, order_id: str, attempt: int) -> BuildStatus: ...

    def cancel(self, order_id: str, attempt: int) -> None:
        """End an attempt and forget it, if it has ended by itself too."""
        ...

    def holds(self, result: dict[str, Any]) -> bool:
        """Whether what a build left behind is still there."""
        ...

    def check(self, deployment: str, resources: dict[str, str], replicas: int, strategy: str) -> None:
        """UserError, such as `insufficient_gpu`, if this platform surely cannot give so much; asked before a build."""
        ...

    def apply(self, order: RevisionOrder) -> None:
        """Roll the deployment to this revision. Traffic moves once all its processes passed their golden sample.

        Asked only where the terms of the order differ from those that are observed, or a rollout is on its way."""
        ...

    def ready(self, deployment: str) -> int:
        """Processes that answer, of the revision that has the traffic. Asked for every deployment of a list."""
        ...

    def observe(self, deployment: str) -> Observed: ...

    def observe_all(self) -> dict[str, Observed]:
        """Every deployment that this platform runs or keeps anything of, by name. Asked in every round, so it must be
        cheap: it answers from memory or from a cache that watches."""
        ...

    def delete(self, deployment: str) -> None: ...

    def build_log(self, order_id: str, *, follow: bool) -> Iterator[str]:
        """Lines of the newest attempt; with `follow`, until it ends. An empty string is a heartbeat."""
        ...

    def serving_log(self, deployment: str, *, follow: bool, ended: Callable[[], bool]) -> Iterator[str]:
        """Lines of the deployment's processes as they are now. With `follow`, their last lines and then those of every
        process that follows (rollouts, restarts), until `ended()`. An empty string is a heartbeat."""
        ...

    def close(self) -> None: ...
