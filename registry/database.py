"""The SQL database: engine, transactions, and a clock that every replica shares.

The database's own clock decides about leases and deadlines, so a machine whose clock is an hour off does no harm.
Works alike on SQLite (embedded, WAL) and PostgreSQL.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, Float, MetaData, create_engine, event, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# A writer waits this long for another writer of the embedded database before it gives up, in milliseconds.
_SQLITE_BUSY_MS = 20_000
_POOL = 48  # connections
_POOL_KEPT = 8  # of them, to a database that is a server

_POSTGRESQL_LOCK = 0x656B6962656E  # "ekiben": the advisory lock of writers
_POSTGRESQL_WAIT_MS = 20_000  # for another writer, before a writer gives up
_POSTGRESQL_IDLE_MS = 10_000  # a writer that stands still this long is ended: its machine may be gone


class now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock, as a float."""

    type = Float()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **kw: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **kw: Any) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


class Database:
    """One engine; `read()` and `write()` are the only ways in; `claimed()` is for work beside it.

    `write()` takes the one write lock at once (SQLite: BEGIN IMMEDIATE; PostgreSQL: an advisory lock for the length of
    the transaction), so what a writer reads cannot change before it writes, on both alike (docs/decisions/0201).
    """

    def __init__(self, url: str) -> None:
        self.embedded = embedded = url.startswith("sqlite")  # no other service can work with it
        # One for every thread that may ask at once; none of them shall wait for another's answer to be written.
        # A server counts its connections, so most of those are given back at once.
        self.engine: Engine = create_engine(
            url, pool_pre_ping=not embedded, pool_size=_POOL if embedded else _POOL_KEPT, max_overflow=_POOL
        )
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
        else:
            event.listen(self.engine, "begin", _begin_postgresql)
        self._claims: set[str] = set()
        self._claiming = threading.Lock()

    def create(self) -> None:
        """Make the tables that are not there yet, without a history: a service migrates instead."""
        metadata.create_all(self.engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        with self.engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        with self.engine.connect().execution_options(ekiben_write=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Whether the name is the caller's alone, among all services of this database, until the block ends. It is free
        again when its holder dies. On a server it holds a connection."""
        if self.embedded:
            with self._claiming:
                free = name not in self._claims
                self._claims.add(name)
            try:
                yield free
            finally:
                if free:
                    with self._claiming:
                        self._claims.discard(name)
            return
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        # Without a transaction: one that stands still for minutes would keep the server from tidying up.
        with self.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            free = bool(connection.execute(select(func.pg_try_advisory_lock(key))).scalar_one())
            try:
                yield free
            finally:
                if free:
                    with suppress(DBAPIError):  # a connection that broke has given it back already
                        connection.execute(select(func.pg_advisory_unlock(key)))

    def close(self) -> None:
        self.engine.dispose()


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _begin_sqlite, not by the driver
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={_SQLITE_BUSY_MS}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("ekiben_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("ekiben_write", False):
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_POSTGRESQL_WAIT_MS}")
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {_POSTGRESQL_IDLE_MS}")
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_POSTGRESQL_LOCK})")
