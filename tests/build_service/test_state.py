"""Invariants of the state in SQL, under random sequences of what two owners and a user do."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from sqlalchemy import select, update

from build_service import state
from registry import versions
from registry.database import Database, now
from registry.errors import UserError
from tests.servers import PostgreSQL

OWNERS = ("left", "right")
NAMES = ("churn", "fraud")


class States(RuleBasedStateMachine):
    """Owners claim, change and lose builds and deployments; a user uploads, targets, cancels and deletes."""

    def url(self) -> str:
        return f"sqlite:///{Path(self.folder.name) / 'state.db'}"

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.database = Database(self.url())
        self.database.create()
        self.builds: dict[tuple[str, str], state.Build] = {}  # by owner and id: as each owner believes
        self.held: dict[tuple[str, str], state.Deployment] = {}
        self.numbers: dict[str, int] = {}
        self.ever_live: set[tuple[str, int]] = set()
        self.uploads = 0

    def teardown(self) -> None:
        if hasattr(self, "database"):
            self.database.close()
            self.folder.cleanup()

    # --- a user -----------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), content=st.integers(0, 3))
    def upload(self, name: str, content: int) -> None:
        self.uploads += 1
        with self.database.write() as connection:
            row, new = versions.create(
                connection, name=name, digest=f"sha256:{content}", kind="k", format="f", size=1,
                location=f"models/{self.uploads}", manifest={}, signature=None, labels={}, upload_seconds=0.1,
            )  # fmt: skip
            made = state.submit_build(connection, f"b-{content}", f"sha256:{content}", row.id, None)
            wanted = state.target(connection, name, row.id, made.id, replicas=1, resources={}, strategy="rolling")
        if new:
            assert row.number == self.numbers.get(name, 0) + 1  # no gap, and never one of before
            self.numbers[name] = row.number
        assert made.state in ("queued", "running", "succeeded")
        assert wanted.version_id == row.id

    @rule(name=st.sampled_from(NAMES))
    def delete_deployment(self, name: str) -> None:
        with self.database.write() as connection:
            if state.deployment(connection, name) is not None:
                state.delete_deployment(connection, name)

    @rule(name=st.sampled_from(NAMES))
    def delete_unused(self, name: str) -> None:
        with self.database.write() as connection:
            used = {
                state.revision(connection, row.name, number).version_id
                for row in state.all_deployments(connection)
                for number in (row.live, row.desired)
                if number is not None
            }
            for row in versions.of_model(connection, name):
                if row.id not in used:
                    versions.mark_deleted(connection, row.id)
                    state.leave_builds(connection, row.id)

    @rule(content=st.integers(0, 3))
    def cancel(self, content: int) -> None:
        with self.database.write() as connection:
            try:
                state.cancel_build(connection, f"b-{content}")
            except UserError as error:
                assert error.code in ("build_not_found", "build_finished")  # noqa: PT017 - both outcomes are fine

    # --- the owners -------------------------------------------------------------------------------------------------

    @rule(owner=st.sampled_from(OWNERS))
    def claim_build(self, owner: str) -> None:
        with self.database.write() as connection:
            before = {row.id: row for row in connection.execute(select(state.builds))}
            build = state.claim_build(connection, owner, 1000)
            if build is None:
                return
            was = before[build.id]
            expired = connection.execute(select(was.lease_until < now())).scalar_one()
        assert was.state == "queued" or (was.state == "running" and expired), "a claim is exclusive"
        assert build.fence == was.fence + 1
        self.builds[owner, build.id] = build

    @rule(owner=st.sampled_from(OWNERS), content=st.integers(0, 3), outcome=st.sampled_from(("succeeded", "failed")))
    def finish_build(self, owner: str, content: int, outcome: str) -> None:
        mine = self.builds.pop((owner, f"b-{content}"), None)
        if mine is None:
            return
        with self.database.write() as connection:
            current = state.build(connection, mine.id)
            changed = state.change_build(connection, mine, state=outcome, finished=now(), result={})
        assert changed == (current.fence == mine.fence and current.state == "running"), "the fence decides"

    @rule(content=st.integers(0, 3))
    def leases_of_builds_run_out(self, content: int) -> None:
        with self.database.write() as connection:
            connection.execute(update(state.builds).where(state.builds.c.id == f"b-{content}").values(lease_until=0.0))

    @rule(owner=st.sampled_from(OWNERS), name=st.sampled_from(NAMES))
    def claim_deployment(self, owner: str, name: str) -> None:
        with self.database.write() as connection:
            was = connection.execute(select(state.deployments).where(state.deployments.c.name == name)).one_or_none()
            free = was is not None and connection.execute(select(was.lease_until < now())).scalar_one()
            held = state.claim_deployment(connection, name, owner, 1000)
        if was is None:
            assert held is None
            return
        assert (held is not None) == (free or was.lease_owner == owner), "a claim is exclusive"
        if held is not None:
            self.held[owner, name] = held

    @rule(name=st.sampled_from(NAMES))
    def leases_of_deployments_run_out(self, name: str) -> None:
        with self.database.write() as connection:
            connection.execute(
                update(state.deployments).where(state.deployments.c.name == name).values(lease_until=0.0)
            )

    @rule(owner=st.sampled_from(OWNERS), name=st.sampled_from(NAMES))
    def goes_live(self, owner: str, name: str) -> None:
        """As the control loop writes it, from what this owner believes."""
        held = self.held.get((owner, name))
        if held is None or held.deleted is not None:
            return
        with self.database.write() as connection:
            current = connection.execute(select(state.deployments).where(state.deployments.c.name == name)).one()
            taken = state.change_deployment(connection, held, state="live", live=held.desired, reason=None)
            if taken:
                if held.live is not None and held.live != held.desired:
                    state.change_revision(connection, name, held.live, state="superseded")
                state.change_revision(connection, name, held.desired, state="live", live_since=now())
        assert taken == (current.fence == held.fence and current.desired == held.desired), "the fence decides"
        if taken:
            self.ever_live.add((name, held.desired))
            del self.held[owner, name]

    @rule(name=st.sampled_from(NAMES))
    def roll_back(self, name: str) -> None:
        with self.database.write() as connection:
            row = state.deployment(connection, name)
            if row is None or row.live is None:
                return
            current = state.revision(connection, name, row.live)
            before = state.previous_good(connection, name, current.number, current.version_id)
            if before is None:
                return
            assert (name, before.number) in self.ever_live
            assert versions.by_id(connection, before.version_id).deleted is None
            made = state.target(connection, name, before.version_id, before.build_id, rollback_of=row.live)
        assert made.number > current.number

    # --- always -----------------------------------------------------------------------------------------------------

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "database"):
            return
        with self.database.read() as connection:
            rows = connection.execute(select(state.deployments)).all()
            for row in rows:
                revisions = state.revisions_of(connection, row.name)
                live = [revision for revision in revisions if revision.state == "live"]
                assert len(live) <= 1, "at most one revision is live"
                assert [revision.number for revision in revisions] == list(range(len(revisions), 0, -1))
                if row.live is not None:
                    assert (row.name, row.live) in self.ever_live, "what is live was once taken live"
                if row.deleted is None:
                    assert row.desired in {revision.number for revision in revisions}
                    assert [revision.number for revision in live] == ([] if row.live is None else [row.live])
            assert sum(bool(row.is_default) for row in rows if row.deleted is None) <= 1
            for name in NAMES:
                stored: list[Any] = versions.of_model(connection, name)
                assert len({row.digest for row in stored}) == len(stored), "equal content is one version"
                assert all(row.number <= self.numbers.get(name, 0) for row in stored)


TestStates = States.TestCase
TestStates.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)


@pytest.mark.needs_postgres
def test_the_same_holds_on_postgresql(postgresql: PostgreSQL) -> None:
    numbers = itertools.count()

    class OnPostgreSQL(States):
        def url(self) -> str:
            return postgresql.create(f"states_{next(numbers)}")

    run_state_machine_as_test(
        OnPostgreSQL, settings=settings(max_examples=10, stateful_step_count=40, deadline=None, database=None)
    )


def test_an_expired_lease_is_taken_over_and_the_old_owner_cannot_write(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    database.create()
    with database.write() as connection:
        state.submit_build(connection, "b-1", "sha256:1", "01", None)
        first = state.claim_build(connection, "left", -1)
        second = state.claim_build(connection, "right", 1000)
        assert first is not None
        assert second is not None
        assert not state.change_build(connection, first, state="failed")
        assert state.change_build(connection, second, state="succeeded")
        assert state.claim_build(connection, "left", 1000) is None
    database.close()


def test_a_lost_service_does_not_cost_an_attempt(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    database.create()
    with database.write() as connection:
        state.submit_build(connection, "b-1", "sha256:1", "01", None)
        for owner in "abcde":
            state.release_builds(connection, owner)
            claimed = state.claim_build(connection, owner, 1000)
            assert claimed is not None
            assert claimed.attempts == 1
    database.close()
