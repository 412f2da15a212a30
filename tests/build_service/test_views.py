"""What the lists ask the database for: as many questions for a hundred entries as for one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Connection, event

from build_service import state, views
from registry import versions
from registry.database import Database

LINKS = views.Links("http://localhost")
List = Callable[[Connection], list[object]]

LISTS: dict[str, List] = {
    "models": lambda connection: [*views.models(connection, LINKS)],
    "builds": lambda connection: [*views.builds(connection, state.builds_page(connection, None, 500), LINKS)],
    "deployments": lambda connection: [
        *views.deployments(connection, state.all_deployments(connection), lambda _: 0, LINKS)
    ],
}


def fill(database: Database, names: list[str]) -> None:
    """A model with two versions, their builds, and a deployment of each of these names."""
    with database.write() as connection:
        for name in names:
            for number in (1, 2):
                row, _ = versions.create(
                    connection, name=name, digest=f"sha256:{name}{number}", kind="k", format="f", size=1,
                    location=f"models/{name}/{number}", manifest={}, signature=None, labels={}, upload_seconds=0.1,
                )  # fmt: skip
                made = state.submit_build(connection, f"b-{name}-{number}", row.digest, row.id, None)
                state.target(connection, name, row.id, made.id, replicas=1, resources={}, strategy="rolling")


def questions(database: Database, ask: List) -> tuple[int, int]:
    """How many entries there are, and how many statements they took."""
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(database.engine, "before_cursor_execute", note)
    try:
        with database.read() as connection:
            found = len(ask(connection))
    finally:
        event.remove(database.engine, "before_cursor_execute", note)
    return found, len(seen)


@pytest.mark.parametrize("name", LISTS)
def test_a_list_asks_the_database_as_often_for_many_as_for_few(name: str, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'state.db'}")
    database.create()
    fill(database, ["one"])
    few, asked = questions(database, LISTS[name])
    fill(database, [f"m{number}" for number in range(40)])
    many, asked_again = questions(database, LISTS[name])
    database.close()
    assert many >= 40 * few > 0
    assert asked_again == asked
