"""Brings the database's tables to this release's schema, once, whoever else starts at the same time.

Embedded, the service does it at its start; in a cluster an init container does (`ekiben-server migrate`), under
PostgreSQL's advisory lock, so that of several pods one migrates and the others wait for it.

While a new release rolls out, pods of the one before still work with the tables, and one of them may start again. So a
step only adds, and each release writes down the oldest schema whose code still works with its own.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Connection, String, Table, delete, insert, inspect, select, table
from sqlalchemy.sql import column

from registry.database import Database, metadata
from registry.errors import EkibenError

KNOWN = ("0001", "0002", "0003", "0004")  # the steps of build_service/migrations, in their order
HEAD = KNOWN[-1]
OLDEST = "0001"  # the oldest schema whose code works with HEAD: at least the one of the release before

compatible = Table("schema_compatible", metadata, Column("oldest", String(32), primary_key=True))

_VERSION_TABLE = "schema_version"


def migrate(database: Database) -> str | None:
    """Apply the steps that are missing; the schema that it found, None in an empty database.

    Raises EkibenError `database_too_new` when a newer release has been here whose tables this one would damage.
    """
    with database.write() as connection:  # one writer at a time, on SQLite and on PostgreSQL
        before = _current(connection)
        if before == HEAD or _works(connection, before):  # the usual start: Alembic is not even imported
            return before
        if before is not None and before not in KNOWN:
            raise EkibenError(
                "database_too_new",
                f"The database has schema {before}; this Ekiben knows schemas up to {HEAD}.",
                hint="Use the newer Ekiben that wrote it, or restore the backup that was made before the upgrade.",
            )
        _upgrade(connection, adopted=before is None and inspect(connection).has_table("versions"))
        connection.execute(delete(compatible))
        connection.execute(insert(compatible).values(oldest=OLDEST))
    return before


def current(database: Database) -> str | None:
    """The schema that the database has; None before the first migration."""
    with database.read() as connection:
        return _current(connection)


def require(database: Database) -> None:
    """Raises EkibenError `database_not_migrated` unless `migrate` has been here: for a service that does not do it."""
    with database.read() as connection:
        found = _current(connection)
        works = found == HEAD or _works(connection, found)
    if not works:
        raise EkibenError(
            "database_not_migrated",
            f"The database has schema {found or 'none'}; this Ekiben needs {HEAD}.",
            hint="Run `ekiben-server migrate` once, with the same settings.",
        )


def _current(connection: Connection) -> str | None:
    if not inspect(connection).has_table(_VERSION_TABLE):
        return None
    found = connection.execute(select(column("version_num")).select_from(table(_VERSION_TABLE))).scalar_one_or_none()
    return None if found is None else str(found)


def _works(connection: Connection, found: str | None) -> bool:
    """Whether a newer release's tables still serve this one."""
    if found is None or found in KNOWN:
        return False
    return connection.execute(select(compatible.c.oldest)).scalar_one_or_none() in KNOWN


def _upgrade(connection: Connection, *, adopted: bool) -> None:
    from alembic import command

    config = configuration(connection)
    if adopted:  # tables of the first release, which kept no history
        command.stamp(config, KNOWN[0])
    command.upgrade(config, "head")


def configuration(connection: Connection) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", "build_service:migrations")
    config.attributes["connection"] = connection
    return config
