"""The database's schema: made, brought up to date by whoever comes first, and refused when it is newer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
from sqlalchemy import inspect, text

from build_service import migrate, state
from registry import versions
from registry.database import Database, metadata
from registry.errors import EkibenError


def test_an_empty_database_gets_the_tables_that_the_code_works_with(fresh_database: Callable[[], str]) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    database = Database(fresh_database())
    assert migrate.migrate(database) is None
    assert migrate.current(database) == migrate.HEAD
    migrate.require(database)
    with database.read() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": "schema_version", "compare_type": True, "target_metadata": metadata}
        )
        assert compare_metadata(context, metadata) == []
    assert migrate.migrate(database) == migrate.HEAD  # once more changes nothing
    database.close()


def test_the_steps_end_at_the_head_that_the_service_knows(fresh_database: Callable[[], str]) -> None:
    from alembic.script import ScriptDirectory

    database = Database(fresh_database())
    with database.read() as connection:
        steps = ScriptDirectory.from_config(migrate.configuration(connection))
    assert steps.get_current_head() == migrate.HEAD
    assert tuple(step.revision for step in reversed(list(steps.walk_revisions()))) == migrate.KNOWN
    database.close()


def test_tables_of_before_the_history_are_kept_with_what_is_in_them(fresh_database: Callable[[], str]) -> None:
    from alembic import command

    database = Database(fresh_database())
    with database.write() as connection:
        command.upgrade(migrate.configuration(connection), "0001")
        connection.execute(text("DROP TABLE schema_version"))
        state.submit_build(connection, "b-1", "sha256:1", "01", None)
    assert migrate.migrate(database) is None
    with database.read() as connection:
        assert state.build(connection, "b-1").state == "queued"
    assert migrate.current(database) == migrate.HEAD
    database.close()


def test_many_that_start_at_once_migrate_once(fresh_database: Callable[[], str]) -> None:
    url = fresh_database()
    found: list[str | None] = []

    def start() -> None:
        database = Database(url)
        found.append(migrate.migrate(database))
        database.close()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=str) == [migrate.HEAD] * 5 + [None]


def test_a_database_of_a_newer_release_is_left_alone(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    migrate.migrate(database)
    with database.write() as connection:
        connection.execute(text("UPDATE schema_version SET version_num = '9999'"))
        connection.execute(text("UPDATE schema_compatible SET oldest = '9998'"))
    with pytest.raises(EkibenError, match=r"9999") as refused:
        migrate.migrate(database)
    assert refused.value.code == "database_too_new"
    with pytest.raises(EkibenError, match=r"needs"):
        migrate.require(database)
    database.close()


def test_the_release_before_starts_again_while_the_next_one_rolls_out(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    migrate.migrate(database)
    with database.write() as connection:
        connection.execute(text("UPDATE schema_version SET version_num = '9999'"))
        connection.execute(text(f"UPDATE schema_compatible SET oldest = '{migrate.HEAD}'"))
    assert migrate.migrate(database) == "9999"
    migrate.require(database)
    database.close()


def test_a_step_that_fails_leaves_nothing_half_done(
    fresh_database: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alembic import op

    database = Database(fresh_database())

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(op, "create_index", fails)
        with pytest.raises(RuntimeError, match="disk is full"):
            migrate.migrate(database)
    with database.read() as connection:
        assert not inspect(connection).has_table(versions.versions.name)
    assert migrate.migrate(database) is None
    database.close()
