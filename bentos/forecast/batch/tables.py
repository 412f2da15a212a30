"""The tables of the batch jobs, and how they come to be.

Alembic's steps are in `migrations`; their history is in a table of its own, so that the jobs may share a database with
anything else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Date,
    DateTime,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    func,
    inspect,
    make_url,
    or_,
    select,
    table,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.sql import column

HEAD = "0001"
"""The newest step of `migrations`."""
VERSION_TABLE = "forecast_schema_version"
_LOCK = 0x666F7265  # "fore": PostgreSQL's advisory lock of migrations
_PLAIN = re.compile(r"^postgres(ql)?://")
_BUSY_MS = 20_000  # for another writer of an SQLite file

metadata = MetaData()

sales = Table(
    "forecast_sales",
    metadata,
    Column("store", String(200), primary_key=True),
    Column("item", String(200), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("sales", Float),  # NULL: not known, or not yet
    Column("price", Float),
    Column("discount", Float),
    Column("holiday", Float),
    Column("temperature", Float),
    Column("changed", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("ix_forecast_sales_day", "day"),
)
"""One row a day and series: what was sold, or, before that, what is planned."""

forecasts = Table(
    "forecast_forecasts",
    metadata,
    Column("model", String(100), primary_key=True),  # NAME/VERSION, or the digest of a model folder
    Column("origin", Date, primary_key=True),  # the last day whose sales were known
    Column("store", String(200), primary_key=True),
    Column("item", String(200), primary_key=True),
    Column("day", Date, primary_key=True),
    Column("sales", Float, nullable=False),
    Column("seasonal_naive", Float),  # what the same weekday says, to compare with
    Column("made", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("ix_forecast_forecasts_origin", "origin"),
    Index("ix_forecast_forecasts_store_item_day", "store", "item", "day"),
)

evaluations = Table(
    "forecast_evaluations",
    metadata,
    Column("model", String(100), primary_key=True),
    Column("origin", Date, primary_key=True),
    Column("forecasts", Integer, nullable=False),
    Column("compared", Integer, nullable=False),  # those of days whose sales are known by now
    Column("rmse", Float),
    Column("wape", Float),
    Column("rmse_seasonal_naive", Float),
    Column("wape_seasonal_naive", Float),
    Column("evaluated", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Index("ix_forecast_evaluations_origin", "origin"),
)


class Database:
    """One engine. `write()` is a transaction; the tables are there once `migrate()` has been called."""

    def __init__(self, url: str) -> None:
        known = make_url(_PLAIN.sub("postgresql+psycopg://", url))  # the driver that is installed
        if known.get_backend_name() not in ("sqlite", "postgresql"):
            raise ArgumentError(f"{known.get_backend_name()} is neither sqlite nor postgresql")
        self.engine: Engine = create_engine(known, pool_pre_ping=known.get_backend_name() != "sqlite")
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _prepare)
            event.listen(self.engine, "begin", _begin)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with self.engine.connect().execution_options(batch_write=True) as connection, connection.begin():
            yield connection

    def migrate(self) -> None:
        """Bring the tables up to date, once, whichever jobs start at the same time."""
        with self.read() as connection:
            if _schema(connection) == HEAD:  # the usual start: Alembic is not even imported
                return
        with self.write() as connection:
            if self.engine.dialect.name == "postgresql":
                connection.execute(select(func.pg_advisory_xact_lock(_LOCK)))
            from alembic import command
            from alembic.config import Config

            config = Config()
            config.set_main_option("script_location", "bentos.forecast.batch:migrations")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def close(self) -> None:
        self.engine.dispose()


def upsert(
    connection: Connection, into: Table, rows: Sequence[Mapping[str, Any]], stamp: str, *, keep_known: bool = False
) -> int:
    """Write rows by their primary key; how many are new or differ from what was there, whose `stamp` is set anew.

    With `keep_known` a NULL takes nothing away. All rows have the same columns, and no two the same key.
    """
    if not rows:
        return 0
    # Both speak the same ON CONFLICT.
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    statement: Any = insert(into).values([dict(row) for row in rows])
    keys = [each.name for each in into.primary_key]
    wanted: dict[str, Any] = {
        name: func.coalesce(statement.excluded[name], into.c[name]) if keep_known else statement.excluded[name]
        for name in rows[0]
        if name not in keys
    }
    differs = or_(*(into.c[name].is_distinct_from(value) for name, value in wanted.items()))
    statement = statement.on_conflict_do_update(index_elements=keys, set_={**wanted, stamp: func.now()}, where=differs)
    # PostgreSQL's driver does not count the rows of an INSERT; those left as they were are not returned.
    return len(connection.execute(statement.returning(into.c[keys[0]])).all())


def trouble(error: SQLAlchemyError) -> str:
    """What the database says is wrong, on one line."""
    return f"the database does not work: {str(error).splitlines()[0]}"


def _schema(connection: Connection) -> str | None:
    if not inspect(connection).has_table(VERSION_TABLE):
        return None
    found = connection.execute(select(column("version_num")).select_from(table(VERSION_TABLE))).scalar_one_or_none()
    return None if found is None else str(found)


def _prepare(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin, not by the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_MS}")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("batch_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
