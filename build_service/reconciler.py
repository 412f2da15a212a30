"""The control loop: drives builds and deployments towards what SQL says is wanted.

Every step is idempotent. A step reads, acts on the platform, then writes under its fencing token; if this process dies
in between, the next one repeats the step and finds the platform already there.

    build:       queued → running → succeeded | failed | cancelled
    deployment:  pending → rolling → live | rolled_back | failed
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import structlog
from sqlalchemy import Connection

from build_service import metrics, state
from build_service.platform import BuildOrder, BuildStatus, Failure, Observed, Platform, RevisionOrder, terms
from build_service.settings import Settings
from registry import versions
from registry.database import Database, now
from registry.errors import EkibenError, UserError

log = structlog.get_logger(__name__)

_TICK_BUSY, _TICK_IDLE = 0.1, 1.0  # seconds between two rounds
_LEASE_SECONDS = 30.0
# Seconds before the second attempt of a build, and before each further one: a registry that is away for a minute must
# not use them all up.
_RETRY_FIRST, _RETRY_NEXT = 2.0, 60.0
# What a build waits for, as nothing is wrong with it: the attempt is not lost.
_BEHIND = 0.75  # of its time a revision has at least, when its platform has caught up: not written in every round
_AWAY = frozenset({"cluster_unreachable", "cluster_error", "store_unavailable"})


class Reconciler:
    def __init__(self, settings: Settings, database: Database, platform: Platform, owner: str) -> None:
        self._settings, self._database, self._platform, self._owner = settings, database, platform, owner
        self._held: dict[str, state.Build] = {}  # builds under our lease
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        """Something changed: look now rather than at the next tick."""
        self._wake.set()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                busy = self.round()
            except Exception:
                log.exception("a round of the control loop stumbled")
                busy = False
            self._wake.wait(_TICK_BUSY if busy else _TICK_IDLE)
            self._wake.clear()

    def round(self) -> bool:
        """One look at everything; True while something is on its way. At rest it reads, and writes nothing."""
        # Observed before it is read: what runs and has no row then was deleted, and is not only about to be made.
        observed = self._platform.observe_all()
        with self._database.read() as connection:
            waits = state.build_waits(connection)
            standings = state.standings(connection)
        busy = self._builds(waits)
        for standing in standings:
            seen = observed.pop(standing.name, None)
            try:
                if _needs_a_step(standing, seen):
                    busy = self._deployment(standing.name) or busy
                elif standing.revision_state in ("pending", "live"):
                    busy = busy or seen is None or seen.ready < standing.replicas or standing.state == "pending"
            except Exception:  # one deployment's trouble must not hold up the others
                log.exception("a deployment's step stumbled", deployment=standing.name)
        for name in observed:
            self._platform.delete(name)
        return busy

    # --- builds -----------------------------------------------------------------------------------------------------

    def _builds(self, waits: bool) -> bool:
        while waits and len(self._held) < self._settings.builds_at_once:
            with self._database.write() as connection:
                build = state.claim_build(connection, self._owner, _LEASE_SECONDS)
            if build is None:
                break
            before = self._held.get(build.id)
            ours = before is not None and (before.fence + 1, before.attempts) == (build.fence, build.attempts)
            self._held[build.id] = build
            if before is not None and not ours:  # not only our lease ran out: it was cancelled and asked for again
                self._clean_up(before)  # before we looked, or what it had left could not be cleaned up yet
        for build in list(self._held.values()):
            try:
                self._watch_build(build)
            except Exception:  # one build's trouble must not hold up the others
                log.exception("a build's step stumbled", build=build.id)
        return bool(self._held)

    def _submit(self, build: state.Build) -> None:
        with self._database.read() as connection:
            version = versions.by_id(connection, build.version_id)
        log.info("build starts", build=build.id, attempt=build.attempts, model=version.name, version=version.number)
        settings = self._settings
        self._platform.submit(
            BuildOrder(build.id, build.attempts, version, build.image, settings.allow_code, settings.allowed_packages)
        )

    def _status(self, build: state.Build) -> BuildStatus | None:
        """How the attempt stands; None where it was submitted only now."""
        try:
            status = self._platform.build_status(build.id, build.attempts)
            if status.state != "missing":
                return status
            self._submit(build)  # new, or lost with the process that ran it: the same attempt once more
            return None
        except OSError as error:
            failure = Failure(
                "build_not_started", f"The build could not be started: {error}.",
                hint="Look at the room on the disk of the state folder.", user=False,
            )  # fmt: skip
        except EkibenError as error:
            if error.code in _AWAY:
                return BuildStatus("running", "waiting", [{"stage": "waiting", "message": error.detail}])
            failure = Failure(error.code, error.detail, error.hint, user=isinstance(error, UserError))
        return BuildStatus("failed", failure=failure)

    def _watch_build(self, build: state.Build) -> None:
        status = self._status(build)
        if status is None:
            return
        if status.state == "running":
            values = {"lease_until": now() + _LEASE_SECONDS, "stage": status.stage, "stages": status.stages}
            with self._database.write() as connection:
                held = state.change_build(connection, build, **values)
            if not held:
                self._give_up(build)
            return
        with self._database.write() as connection:
            if status.state == "succeeded":
                assert status.result is not None
                self._build_succeeded(connection, build, status)
            else:
                assert status.failure is not None
                self._build_failed(connection, build, status.failure)
        # Only now: an attempt of the same number may come again, and must not find this one's end.
        self._give_up(build)
        self.wake()

    def _build_succeeded(self, connection: Connection, build: state.Build, status: BuildStatus) -> None:
        assert status.result is not None
        # The same inputs give the same digest each time they are built; `making` tells one time from another.
        result = {**status.result, "making": build.fence}
        lock = result.pop("lock", None)  # large, and of the version: orders of deployments carry the result
        done = state.change_build(
            connection, build, state="succeeded", stage=None, stages=status.stages, result=result, finished=now(),
            reason=None, code=None, hint=None,
        )  # fmt: skip
        if not done:  # it was told before, or another goes on with it
            return
        if lock:
            versions.change(connection, build.version_id, lock=lock)
        metrics.BUILDS.labels("succeeded").inc()
        log.info("build succeeded", build=build.id)

    def _build_failed(self, connection: Connection, build: state.Build, failure: Failure) -> None:
        version = versions.by_id(connection, build.version_id)
        if failure.code == "build_crashed" and version.deleted is not None:
            failure = Failure("version_deleted", f"{version.title} was deleted while it was built.")
        lasts = failure.user or (failure.code in state.DAMAGED and failure.stage in (None, "fetch"))
        again = not lasts and build.attempts < self._settings.build_attempts
        values = {"stage": failure.stage, "reason": failure.message, "code": failure.code, "hint": failure.hint}
        if again:
            wait = _RETRY_FIRST if build.attempts == 1 else _RETRY_NEXT
            done = state.change_build(connection, build, state="queued", not_before=now() + wait, **values)
        else:
            done = state.change_build(connection, build, state="failed", finished=now(), **values)
        if not done:  # it was told before, or another goes on with it
            return
        if not again:
            metrics.BUILDS.labels("failed").inc()
        state.record(
            connection,
            f"build/{build.id}",
            "BuildRetried" if again else "BuildFailed",
            f"Attempt {build.attempts} of the build of {version.title} failed: {failure.message}",
            type="Warning",
        )
        log.warning("build failed", build=build.id, code=failure.code, reason=failure.message, retried=again)

    def _give_up(self, build: state.Build) -> None:
        """The build has ended, was cancelled, or its lease went to another, who goes on with what runs of it."""
        with self._database.read() as connection:
            current = state.build(connection, build.id)
        others = current.state == "running" and current.lease_owner != self._owner
        if not others or current.attempts != build.attempts:
            self._platform.cancel(build.id, build.attempts)
        self._held.pop(build.id, None)

    def _clean_up(self, build: state.Build) -> None:
        try:
            self._platform.cancel(build.id, build.attempts)
        except EkibenError as error:  # its time runs out by itself
            log.warning("an attempt is not cleaned up", build=build.id, attempt=build.attempts, error=error.detail)

    # --- deployments ------------------------------------------------------------------------------------------------

    def _deployment(self, name: str) -> bool:
        with self._database.write() as connection:
            held = state.claim_deployment(connection, name, self._owner, _LEASE_SECONDS)
            if held is None or held.deleted is not None:
                return False
            wanted = state.revision(connection, name, held.desired)
            build = state.build(connection, wanted.build_id)
        step: Callable[[state.Deployment, state.Revision, state.Build], bool] = {
            "pending": self._pending,
            "rolling": self._rolling,
            "live": self._live,
        }.get(wanted.state, self._ended)
        return step(held, wanted, build)

    def _pending(self, held: state.Deployment, wanted: state.Revision, build: state.Build) -> bool:
        self._keep_live(held)
        if build.state in state.BUILD_OPEN:
            return True
        if build.state != "succeeded" or build.result is None:
            failure = Failure(build.code or "build_failed", build.reason or f"The build {build.state}.", build.hint)
            self._not_taken(held, wanted, failure, "BuildFailed")
            return True
        if not self._platform.holds(build.result):
            self._rebuild(held, build, None)
            return True
        with self._database.write() as connection:
            if state.change_deployment(connection, held, state="rolling", reason=None, code=None, hint=None):
                state.change_revision(
                    connection,
                    held.name,
                    wanted.number,
                    state="rolling",
                    rolling_since=now(),
                    deadline=now() + self._settings.ready_seconds,
                )
                state.record(
                    connection,
                    f"deployment/{held.name}",
                    "Rolling",
                    f"Revision {wanted.number} starts beside what is live; traffic waits for its golden sample.",
                )
        self.wake()
        return True

    def _rolling(self, held: state.Deployment, wanted: state.Revision, build: state.Build) -> bool:
        observed = self._platform.observe(held.name)
        if self._live_comes_first(held, wanted, observed):
            return True
        self._platform.apply(self._order(held, wanted, build))
        observed = self._platform.observe(held.name)
        if observed.failed == wanted.number and observed.failure is not None:
            if self._built_before(wanted, build):
                self._start_anew(held, wanted, build, observed.failure)
                return True
            self._not_taken(held, wanted, observed.failure, "RolledBack")
        elif observed.revision == wanted.number and observed.ready >= held.replicas:
            self._went_live(held, wanted, observed)
        else:
            with self._database.read() as connection:
                left = state.seconds_left(connection, held.name, wanted.number)
            if observed.behind and left < self._settings.ready_seconds * _BEHIND:
                with self._database.write() as connection:
                    deadline = now() + self._settings.ready_seconds
                    state.change_revision(connection, held.name, wanted.number, deadline=deadline)
            if left > 0 or observed.behind:
                self._tell_waiting(held, observed)
            else:
                failure = observed.waiting or Failure(
                    "ready_timeout",
                    f"Revision {wanted.number} was not ready within {self._settings.ready_seconds:.0f} s.",
                    hint=f"Look at `ekiben logs {held.name}`; a large model may need a longer EKIBEN_READY_SECONDS.",
                )
                self._not_taken(held, wanted, failure, "RolledBack")
        return True

    def _went_live(self, held: state.Deployment, wanted: state.Revision, observed: Observed) -> None:
        with self._database.write() as connection:
            taken = state.change_deployment(
                connection, held, state="live", live=wanted.number, reason=None, code=None, hint=None
            )
            if not taken:
                return
            if held.live is not None and held.live != wanted.number:
                state.change_revision(connection, held.name, held.live, state="superseded")
            state.change_revision(connection, held.name, wanted.number, state="live", live_since=now(), reason=None)
            version = versions.by_id(connection, wanted.version_id)
            if observed.checked is not None:
                versions.change(connection, version.id, checked=observed.checked)
            state.record(
                connection,
                f"deployment/{held.name}",
                "Live",
                f"Revision {wanted.number} ({version.title}) passed its golden sample and has the traffic.",
            )
            if version.name == held.name:
                state.enqueue(connection, "alias", {"name": version.name, "version_id": version.id, "alias": "live"})
        metrics.ROLLOUTS.labels("live").inc()
        log.info("revision is live", deployment=held.name, revision=wanted.number, version=version.title)

    def _not_taken(self, held: state.Deployment, wanted: state.Revision, failure: Failure, reason: str) -> None:
        """The revision cannot take the traffic: once, back to what was live."""
        back = held.live is not None and held.live != wanted.number
        with self._database.write() as connection:
            version = versions.by_id(connection, wanted.version_id)
            values: dict[str, Any] = {"reason": failure.message, "code": failure.code, "hint": failure.hint}
            if held.live is not None and back:
                live = state.revision(connection, held.name, held.live)
                values |= {"desired": live.number, **(live.settings or {})}
            changed = state.change_deployment(connection, held, state="rolled_back" if back else "failed", **values)
            if not changed:
                return
            failed_build = reason == "BuildFailed"
            state.change_revision(
                connection,
                held.name,
                wanted.number,
                state="failed" if failed_build or not back else "rolled_back",
                reason=failure.message,
            )
            outcome = f"; revision {held.live} keeps the traffic." if back else "; nothing is live."
            state.record(
                connection,
                f"deployment/{held.name}",
                reason,
                f"Revision {wanted.number} ({version.title}) was not taken: {failure.message}{outcome}",
                type="Warning",
            )
        metrics.ROLLOUTS.labels("rolled_back" if back else "failed").inc()
        log.warning("revision was not taken", deployment=held.name, revision=wanted.number, code=failure.code)
        self.wake()

    def _live_comes_first(self, held: state.Deployment, wanted: state.Revision, observed: Observed) -> bool:
        """After a restart in the middle of a rollout: what is live answers again before the rollout goes on."""
        waits = (
            held.live not in (None, wanted.number)
            and held.strategy == "rolling"
            and observed.revision is None
            and observed.crashes == 0
        )
        if waits:
            self._keep_live(held)
            with self._database.write() as connection:
                deadline = now() + self._settings.ready_seconds
                state.change_revision(connection, held.name, wanted.number, deadline=deadline)
        return waits

    def _live(self, held: state.Deployment, wanted: state.Revision, build: state.Build) -> bool:
        self._platform.apply(self._order(held, wanted, build, proven=True))
        observed = self._platform.observe(held.name)
        self._tell_crashes(held, wanted, observed)
        self._tell_waiting(held, observed)
        if observed.ready < held.replicas and build.result is not None and not self._platform.holds(build.result):
            self._rebuild(held, build, observed.failure or observed.waiting)
        return observed.ready < held.replicas

    def _tell_crashes(self, held: state.Deployment, wanted: state.Revision, observed: Observed) -> None:
        """A process that ends again and again is no secret, and no reason to stop trying."""
        with self._database.write() as connection:
            if not state.change_deployment(connection, held):
                return
            told = state.tell_crashes(connection, held.name, observed.crashes)
            if observed.crash is not None and observed.crashes > told:
                failure = observed.crash
                state.record(
                    connection,
                    f"deployment/{held.name}",
                    "Crashed",
                    f"A process of revision {wanted.number} ended and is started again: {failure.message}",
                    type="Warning",
                )
                if held.state == "live":
                    state.change_deployment(
                        connection, held, reason=failure.message, code=failure.code, hint=failure.hint
                    )
            elif held.state == "live" and held.reason is not None and _is_well(observed, held.replicas):
                state.change_deployment(connection, held, reason=None, code=None, hint=None)

    def _tell_waiting(self, held: state.Deployment, observed: Observed) -> None:
        """Why it takes long: it may pass by itself, and until then it is the deployment's reason."""
        waiting = observed.waiting
        if waiting is not None and waiting.message != held.reason and held.state in ("rolling", "live"):
            with self._database.write() as connection:
                state.change_deployment(
                    connection, held, reason=waiting.message, code=waiting.code, hint=waiting.hint
                )  # fmt: skip

    def _built_before(self, wanted: state.Revision, build: state.Build) -> bool:
        """What the revision needs is gone, and was made before it was asked for. What was made for it and cannot be
        found is no loss but a fault of the way there, which another time would not mend."""
        assert build.result is not None
        made = build.finished or 0.0
        return not self._platform.holds(build.result) and made < wanted.created

    def _start_anew(self, held: state.Deployment, wanted: state.Revision, build: state.Build, why: Failure) -> None:
        with self._database.write() as connection:
            if not state.change_deployment(connection, held, state="pending"):
                return
            state.change_revision(connection, held.name, wanted.number, state="pending")
        if held.live is None:  # else it is what runs next, in place of this
            self._platform.delete(held.name)
        self._rebuild(held, build, why)

    def _rebuild(self, held: state.Deployment, build: state.Build, why: Failure | None) -> None:
        words = "What its build had left is gone" if why is None else why.message.rstrip(".")
        with self._database.write() as connection:
            if not state.rebuild(connection, build.id):
                return
            state.record(
                connection, f"deployment/{held.name}", "Rebuilding", f"{words}. It is built again.", type="Warning"
            )
        log.warning("what a build had left is gone; it runs again", build=build.id)
        self.wake()

    def _ended(self, held: state.Deployment, wanted: state.Revision, build: state.Build) -> bool:
        """Nothing is live and the last revision failed: keep no process of it."""
        if held.live is None:
            self._platform.delete(held.name)
        return False

    def _keep_live(self, held: state.Deployment) -> None:
        if held.live is not None:
            with self._database.read() as connection:
                live = state.revision(connection, held.name, held.live)
                build = state.build(connection, live.build_id)
            self._platform.apply(self._order(held, live, build, proven=True))

    def _order(
        self, held: state.Deployment, wanted: state.Revision, build: state.Build, *, proven: bool = False
    ) -> RevisionOrder:
        assert build.result is not None
        with self._database.read() as connection:
            version = replace(versions.by_id(connection, wanted.version_id), lock=None)  # no deployment needs it
            default = state.default_deployment(connection)
        order = RevisionOrder(
            held.name, wanted.number, version, build.result, held.replicas, held.resources, held.strategy, proven,
            default is not None and default.name == held.name, held.autoscale, held.fence,
        )  # fmt: skip
        # What is live keeps to what it was asked for with, until what is wanted in its place has shown that it can run.
        return order if wanted.number == held.desired else replace(order, **(wanted.settings or {}))


def _is_well(observed: Observed, replicas: int) -> bool:
    return observed.ready >= replicas and observed.waiting is None


def _needs_a_step(standing: state.Standing, seen: Observed | None) -> bool:
    """Whether something is to be done that needs the deployment's lease. A pure question, asked of all every round."""
    observed = seen or Observed()

    def applied(revision: int) -> bool:
        wanted = terms(
            revision, standing.replicas, standing.resources, standing.strategy, standing.autoscale, proven=True,
            default=standing.default,
        )  # fmt: skip
        return observed.applied == wanted

    if standing.revision_state == "live":
        mended = standing.state == "live" and standing.reason is not None and _is_well(observed, standing.replicas)
        waits = observed.waiting is not None and observed.waiting.message != standing.reason
        return mended or waits or not applied(standing.desired) or observed.crashes != standing.told_crashes
    if standing.revision_state == "pending":
        built = standing.build_state not in state.BUILD_OPEN
        return built or (standing.live is not None and not applied(standing.live))
    return standing.revision_state == "rolling" or (standing.live is None and seen is not None)
