"""Attempts of builds: what is joined, what is tried again, what waits, and what is given up at once.

The platform here is one in memory: the loop is what is looked at. tests/cluster has the same faults for real.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import select, update

from build_service import state
from build_service.platform import BuildStatus, Failure, Observed
from build_service.reconciler import Reconciler
from build_service.settings import Settings
from registry import versions
from registry.database import Database, now
from tests.in_memory import RESULT, InMemory

AWAY = Failure("registry_unreachable", "The registry does not answer.", user=False)
BUILD = "b-1"


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'state.db'}")
    made.create()
    with made.write() as connection:
        row, _ = versions.create(
            connection, name="churn", digest="sha256:1", kind="k", format="f", size=1, location="models/1", manifest={},
            signature=None, labels={}, upload_seconds=0.1,
        )  # fmt: skip
        build = state.submit_build(connection, BUILD, "sha256:1", row.id, None)
        state.target(connection, "churn", row.id, build.id, replicas=1, resources={}, strategy="rolling")
    yield made
    made.close()


def service(tmp_path: Path, database: Database, platform: InMemory, owner: str = "left") -> Reconciler:
    return Reconciler(Settings(home=tmp_path), database, platform, owner)


def build_of(database: Database) -> state.Build:
    with database.read() as connection:
        return state.build(connection, BUILD)


def change(database: Database, **values: object) -> None:
    with database.write() as connection:
        connection.execute(update(state.builds).values(**values))


def events(database: Database, subject: str) -> list[str]:
    with database.read() as connection:
        return [row.reason for row in state.events_of(connection, subject)]


def test_who_takes_over_joins_what_runs_and_the_old_owner_leaves_it_alone(tmp_path: Path, database: Database) -> None:
    platform = InMemory()
    left, right = (service(tmp_path, database, platform, owner) for owner in ("left", "right"))
    left.round()
    change(database, lease_until=0.0)  # left stands still for longer than its lease
    right.round()
    left.round()
    assert platform.asked == ["submit b-1 1"]
    assert platform.builds[BUILD, 1].state == "running"
    platform.end(BUILD, 1)
    left.round()
    right.round()
    assert (build_of(database).state, build_of(database).attempts) == ("succeeded", 1)
    assert [line for line in platform.asked if line.startswith("submit")] == ["submit b-1 1"]


def test_an_owner_whose_own_lease_ran_out_goes_on(tmp_path: Path, database: Database) -> None:
    platform = InMemory()
    only = service(tmp_path, database, platform)
    only.round()
    change(database, lease_until=0.0)
    only.round()
    assert platform.asked == ["submit b-1 1"]
    assert build_of(database).attempts == 1


def test_a_cluster_that_is_away_costs_no_attempt(tmp_path: Path, database: Database) -> None:
    platform = InMemory(away=True)
    only = service(tmp_path, database, platform)
    for _ in range(5):
        only.round()
    waiting = build_of(database)
    assert (waiting.state, waiting.stage, waiting.attempts) == ("running", "waiting", 1)
    assert waiting.stages[-1]["message"] == "The cluster's API did not answer."
    platform.away = False
    only.round()
    assert platform.builds[BUILD, 1].state == "running"


def test_attempts_outlast_a_minute_without_a_registry(tmp_path: Path, database: Database) -> None:
    platform = InMemory()
    only = service(tmp_path, database, platform)
    pauses = []
    for attempt in (1, 2):
        only.round()
        platform.end(BUILD, attempt, AWAY)
        only.round()
        with database.read() as connection:
            pauses.append(connection.execute(select(state.builds.c.not_before - now())).scalar_one())
        change(database, not_before=0.0)
    assert 0 < pauses[0] <= 2
    assert 50 < pauses[1] <= 60
    only.round()
    platform.end(BUILD, 3, AWAY)
    only.round()
    failed = build_of(database)
    assert (failed.state, failed.code, failed.attempts) == ("failed", "registry_unreachable", 3)
    assert events(database, f"build/{BUILD}") == ["BuildFailed", "BuildRetried", "BuildRetried"]


@pytest.mark.parametrize(
    ("code", "stage", "state_after"),
    [
        ("digest_mismatch", "fetch", "failed"),
        ("object_damaged", None, "failed"),
        ("digest_mismatch", "push", "queued"),  # of a registry, which another attempt may find mended
    ],
)
def test_what_is_damaged_in_the_store_is_tried_once(
    tmp_path: Path, database: Database, code: str, stage: str | None, state_after: str
) -> None:
    platform = InMemory()
    only = service(tmp_path, database, platform)
    only.round()
    platform.end(BUILD, 1, Failure(code, "It has another SHA-256.", stage=stage, user=False))
    only.round()
    assert build_of(database).state == state_after


def test_an_end_is_told_once_though_the_cluster_is_away_when_it_is_cleaned_up(
    tmp_path: Path, database: Database
) -> None:
    platform = InMemory()
    only = service(tmp_path, database, platform)
    only.round()
    platform.end(BUILD, 1, AWAY)
    platform.away = True
    for _ in range(3):
        only.round()
        change(database, not_before=now() + 1000)
    assert events(database, f"build/{BUILD}") == ["BuildRetried"]
    platform.away = False
    only.round()
    assert platform.builds == {}


def live(tmp_path: Path, database: Database, platform: InMemory) -> Reconciler:
    """A service whose deployment is live."""
    only = service(tmp_path, database, platform)
    only.round()
    platform.end(BUILD, 1)
    for _ in range(4):
        only.round()
    with database.read() as connection:
        deployment = state.need_deployment(connection, "churn")
    assert deployment.state == "live"
    return only


def test_a_live_revision_whose_image_is_gone_is_built_again_once(tmp_path: Path, database: Database) -> None:
    platform = Short()
    only = live(tmp_path, database, platform)
    with database.write() as connection:
        connection.execute(update(state.deployments).values(replicas=2))
    platform.lost, platform.ready = build_of(database).result["making"], 1  # type: ignore[index]
    for _ in range(4):
        only.round()
    assert events(database, "deployment/churn")[:1] == ["Rebuilding"]
    platform.end(BUILD, 1)
    for _ in range(4):
        only.round()
    assert build_of(database).state == "succeeded"
    assert events(database, "deployment/churn").count("Rebuilding") == 1


class Short(InMemory):
    """Has fewer replicas than are wanted, where `ready` says so."""

    ready: int | None = None

    def observe_all(self) -> dict[str, Observed]:
        found = super().observe_all()
        if self.ready is None:
            return found
        why = Failure("image_not_found", "The image cannot be pulled, as the registry does not have it.", user=False)
        return {name: replace(seen, ready=self.ready, applied=None, waiting=why) for name, seen in found.items()}


class Behind(InMemory):
    """Starts nothing of what is asked of it, and says in `late` whether that is its own fault."""

    late = True

    def observe_all(self) -> dict[str, Observed]:
        return {name: Observed(applied=order.terms, behind=self.late) for name, order in self.runs.items()}


def test_time_in_which_the_platform_is_behind_is_not_counted_against_a_revision(
    tmp_path: Path, database: Database
) -> None:
    platform = Behind()
    only = service(tmp_path, database, platform)
    only.round()
    platform.end(BUILD, 1)

    def later() -> tuple[str, float]:
        """State and deadline after the time of the revision has passed once more."""
        with database.write() as connection:
            connection.execute(update(state.revisions).values(deadline=now() - 1))
        only.round()
        with database.read() as connection:
            left = state.seconds_left(connection, "churn", 1)
            return state.need_deployment(connection, "churn").state, left

    for _ in range(4):
        only.round()
    assert [later()[0] for _ in range(3)] == ["rolling"] * 3
    assert later()[1] > Settings().ready_seconds * 0.7  # most of it is there when the platform has caught up
    platform.late = False
    assert later()[0] == "failed"


class Refusing(InMemory):
    """Finds no image that is lost."""

    def observe_all(self) -> dict[str, Observed]:
        why = Failure("image_not_found", "The image cannot be pulled, as the registry does not have it.", user=False)
        return {
            name: Observed(failed=self.runs[name].revision, failure=why)
            if self.runs[name].build["making"] <= self.lost
            else seen
            for name, seen in super().observe_all().items()
        }


def test_a_revision_to_go_back_to_is_built_again_where_its_image_is_gone(tmp_path: Path, database: Database) -> None:
    platform = Refusing()
    only = live(tmp_path, database, platform)
    platform.lost = build_of(database).result["making"]  # type: ignore[index]
    change(database, finished=now() - 60)
    with database.write() as connection:
        old = state.revision(connection, "churn", 1)
        state.target(connection, "churn", old.version_id, old.build_id, rollback_of=1)
    for _ in range(6):
        only.round()
    assert platform.builds[BUILD, 1].state == "running"
    platform.end(BUILD, 1)
    for _ in range(4):
        only.round()
    with database.read() as connection:
        deployment = state.need_deployment(connection, "churn")
    assert (deployment.state, deployment.live) == ("live", 2)


def test_an_image_that_was_made_for_a_revision_and_is_not_found_ends_it(tmp_path: Path, database: Database) -> None:
    """It is not lost: the registry that nodes pull from is another than builds push to."""
    platform = Refusing(lost=1000)
    only = service(tmp_path, database, platform)
    only.round()
    platform.end(BUILD, 1)
    platform.holds = lambda result: True  # type: ignore[method-assign]
    only.round()
    only.round()
    platform.holds = lambda result: False  # type: ignore[method-assign]
    for _ in range(4):
        only.round()
    with database.read() as connection:
        deployment = state.need_deployment(connection, "churn")
    assert (deployment.state, deployment.code) == ("failed", "image_not_found")
    assert [line for line in platform.asked if line.startswith("submit")] == ["submit b-1 1"]


def test_what_was_locked_is_kept_once_and_is_no_part_of_what_a_deployment_carries(
    tmp_path: Path, database: Database
) -> None:
    # It is 160 kB for most kinds, and would be in memory with every order of hundreds of deployments.
    platform = InMemory()
    only = service(tmp_path, database, platform)
    only.round()
    platform.builds[BUILD, 1] = BuildStatus("succeeded", result={**RESULT, "lock": "numpy==2.0 --hash=…"})
    for _ in range(3):
        only.round()
    order = platform.runs["churn"]
    assert "lock" not in (build_of(database).result or {})
    assert "lock" not in order.build
    assert order.version.lock is None
    with database.read() as connection:
        assert versions.find(connection, "churn", 1).lock == "numpy==2.0 --hash=…"
