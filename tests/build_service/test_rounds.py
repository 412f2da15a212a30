"""What a round of the control loop costs and does, with many deployments and with two services on one database.

The platform here is one in memory, on which everything is ready at once: the loop is what is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, update

from build_service import state
from build_service.reconciler import Reconciler
from build_service.settings import Settings
from registry import versions
from registry.database import Database
from tests.in_memory import InMemory


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'state.db'}")
    made.create()
    yield made
    made.close()


def deploy(database: Database, count: int) -> None:
    """Deployments whose builds are done."""
    with database.write() as connection:
        for number in range(count):
            name = f"model-{number}"
            row, _ = versions.create(
                connection, name=name, digest=f"sha256:{number}", kind="k", format="f", size=1,
                location=f"models/{number}", manifest={}, signature=None, labels={}, upload_seconds=0.1,
            )  # fmt: skip
            made = state.submit_build(connection, f"b-{number}", f"sha256:{number}", row.id, None)
            state.target(connection, name, row.id, made.id, replicas=1, resources={}, strategy="rolling")
        connection.execute(update(state.builds).values(state="succeeded", result={}))


def settle(loop: Reconciler) -> None:
    for _ in range(20):
        if not loop.round():
            return
    raise AssertionError("the loop does not come to rest")


def statements(database: Database, do: Callable[[], Any]) -> list[str]:
    found: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        found.append(statement.split()[0])

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        do()
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
    return found


def reasons(database: Database, name: str) -> list[str]:
    with database.read() as connection:
        return [row.reason for row in state.events_of(connection, f"deployment/{name}")]


def test_a_round_at_rest_reads_twice_and_writes_nothing_however_many_deployments_there_are(
    tmp_path: Path, database: Database
) -> None:
    platform = InMemory()
    loop = Reconciler(Settings(home=tmp_path), database, platform, "left")
    deploy(database, 500)
    settle(loop)
    assert len(platform.runs) == 500
    platform.asked.clear()
    with database.read() as connection:
        before = connection.execute(select(state.deployments)).all()
    assert sorted(statements(database, loop.round)) == ["BEGIN", "SELECT", "SELECT"]
    assert platform.asked == []
    with database.read() as connection:
        assert connection.execute(select(state.deployments)).all() == before


def test_what_is_not_as_it_should_be_is_mended_and_only_that(tmp_path: Path, database: Database) -> None:
    platform = InMemory()
    loop = Reconciler(Settings(home=tmp_path), database, platform, "left")
    deploy(database, 5)
    settle(loop)
    with database.write() as connection:
        connection.execute(update(state.deployments).where(state.deployments.c.name == "model-1").values(replicas=3))
        state.delete_deployment(connection, "model-2")
    del platform.runs["model-3"]
    platform.runs["stranger"] = replace(platform.runs["model-0"], deployment="stranger")
    platform.asked.clear()
    settle(loop)
    assert platform.runs["model-1"].replicas == 3
    assert set(platform.runs) == {"model-0", "model-1", "model-3", "model-4"}
    assert sorted(platform.asked) == ["apply", "apply", "delete", "delete"]
    assert sorted(statements(database, loop.round)) == ["BEGIN", "SELECT", "SELECT"]


def test_two_services_on_one_database_do_not_step_on_each_other(tmp_path: Path, database: Database) -> None:
    platform = InMemory()  # of both, as a cluster is
    loops = [Reconciler(Settings(home=tmp_path), database, platform, owner) for owner in ("left", "right")]
    deploy(database, 3)
    for _ in range(10):
        for loop in loops:
            loop.round()
    assert [reasons(database, f"model-{number}") for number in range(3)] == [["Live", "Rolling"]] * 3
    platform.crashed["model-1"] = 1
    for loop in loops:
        loop.round()
    with database.write() as connection:  # the lease runs out, so the other could take it
        connection.execute(update(state.deployments).values(lease_until=0.0))
    for loop in reversed(loops):
        loop.round()
    assert reasons(database, "model-1") == ["Crashed", "Live", "Rolling"]
    for loop in loops:
        assert sorted(statements(database, loop.round)) == ["BEGIN", "SELECT", "SELECT"]


def test_a_deployment_whose_owner_is_gone_is_taken_over(tmp_path: Path, database: Database) -> None:
    platform = InMemory()
    deploy(database, 1)
    with database.write() as connection:
        assert state.claim_deployment(connection, "model-0", "gone", 1000) is not None
    loop = Reconciler(Settings(home=tmp_path), database, platform, "here")
    loop.round()
    assert platform.runs == {}
    with database.write() as connection:
        connection.execute(update(state.deployments).values(lease_until=0.0))
    settle(loop)
    assert set(platform.runs) == {"model-0"}
