"""The way back from a version that cannot run: what is live stays as it was asked for, whatever the new one asked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from build_service import state
from build_service.platform import Failure, Observed, RevisionOrder
from build_service.reconciler import Reconciler
from build_service.settings import Settings
from registry import versions
from registry.database import Database
from tests.in_memory import InMemory

LARGE = {"memory": "900Gi"}


@dataclass
class Small(InMemory):
    """Has no room for who asks for memory."""

    orders: list[RevisionOrder] = field(default_factory=list)

    def apply(self, order: RevisionOrder) -> None:
        self.orders.append(order)
        super().apply(order)

    def observe_all(self) -> dict[str, Observed]:
        no_room = Failure("insufficient_memory", "No node has 900Gi of memory free.")
        return {
            name: replace(seen, ready=0, failed=seen.revision, failure=no_room)
            if self.runs[name].resources == LARGE
            else seen
            for name, seen in super().observe_all().items()
        }


@pytest.mark.parametrize("built", [True, False])
def test_a_version_that_finds_no_room_leaves_the_live_one_with_what_it_had(tmp_path: Path, built: bool) -> None:
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    database.create()
    platform = Small()
    loop = Reconciler(Settings(home=tmp_path), database, platform, "here")
    ask(database, 1, built=True, replicas=2, resources={"cpu": "1"}, strategy="rolling")
    settle(loop)
    ask(database, 2, built=built, replicas=1, resources=LARGE, strategy="replace")
    settle(loop)
    if not built:  # while it is built, too
        platform.end("b-2", 1)
        settle(loop)
    first = [order for order in platform.orders if order.revision == 1]
    assert {(order.replicas, *order.resources.items(), order.strategy) for order in first} == {
        (2, ("cpu", "1"), "rolling")
    }
    assert platform.runs["model"].revision == 1
    with database.read() as connection:
        row = state.need_deployment(connection, "model")
    assert (row.state, row.live, row.desired) == ("rolled_back", 1, 1)
    assert (row.replicas, row.resources, row.strategy) == (2, {"cpu": "1"}, "rolling")
    database.close()


def test_what_is_changed_of_the_live_version_is_what_the_way_back_leads_to(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    database.create()
    platform = Small()
    loop = Reconciler(Settings(home=tmp_path), database, platform, "here")
    ask(database, 1, built=True, replicas=1, resources={}, strategy="rolling")
    settle(loop)
    ask(database, 1, built=True, replicas=3, resources={}, strategy="rolling")
    settle(loop)
    ask(database, 2, built=True, replicas=3, resources=LARGE, strategy="rolling")
    settle(loop)
    assert (platform.runs["model"].revision, platform.runs["model"].replicas) == (1, 3)
    database.close()


def ask(database: Database, number: int, *, built: bool, **values: Any) -> None:
    with database.write() as connection:
        row, _ = versions.create(
            connection, name="model", digest=f"sha256:{number}", kind="k", format="f", size=1,
            location=f"models/{number}", manifest={}, signature=None, labels={}, upload_seconds=0.1,
        )  # fmt: skip
        made = state.submit_build(connection, f"b-{number}", f"sha256:{number}", row.id, None)
        state.target(connection, "model", row.id, made.id, **values)
        if built:
            connection.execute(state.builds.update().values(state="succeeded", result={}))


def settle(loop: Reconciler) -> None:
    for _ in range(20):
        loop.round()
