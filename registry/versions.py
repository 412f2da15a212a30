"""Versions of models: the rows that make an upload a version.

Numbers count up per name and are never used again, not even after a deletion; equal content under one name is one
version. A row is written only after the objects and their manifest are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    Float,
    Index,
    Integer,
    Row,
    String,
    Table,
    Text,
    insert,
    select,
    text,
    update,
)
from ulid import ULID

from registry.database import metadata, now
from registry.errors import UserError

versions = Table(
    "versions",
    metadata,
    Column("id", String(26), primary_key=True),
    Column("name", String(40), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(71), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("format", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("location", String(255), nullable=False),  # prefix of the object keys
    Column("manifest", JSON, nullable=False),
    Column("signature", JSON),
    Column("labels", JSON, nullable=False),
    Column("lock", Text),  # requirements as they were resolved by the first build
    Column("checked", JSON),  # outcome of the golden sample: {"verified", "rows", "matched"}
    Column("upload_seconds", Float),
    Column("created", Float, nullable=False, default=now()),
    Column("deleted", Float),
    Index("uq_versions_name_number", "name", "number", unique=True),
    Index(
        "uq_versions_name_digest",
        "name",
        "digest",
        unique=True,
        sqlite_where=text("deleted IS NULL"),
        postgresql_where=text("deleted IS NULL"),
    ),
    Index("ix_versions_digest", "digest"),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("last", Integer, nullable=False),
)


@dataclass(frozen=True)
class Version:
    """One immutable version of a model."""

    id: str
    name: str
    number: int
    digest: str
    kind: str
    format: str
    size: int
    location: str
    manifest: dict[str, Any]
    signature: dict[str, Any] | None
    labels: dict[str, str]
    lock: str | None
    checked: dict[str, Any] | None
    upload_seconds: float | None
    created: float
    deleted: float | None

    @property
    def title(self) -> str:
        return f"{self.name}/{self.number}"


def create(connection: Connection, **values: Any) -> tuple[Version, bool]:
    """The version of this content under this name, and whether it is new.

    `values` are the columns name, digest, kind, format, size, location, manifest, signature, labels, upload_seconds.
    """
    existing = by_digest(connection, values["name"], values["digest"])
    if existing is not None:
        return existing, False
    number = _next_number(connection, values["name"])
    row = connection.execute(insert(versions).values(id=str(ULID()), number=number, **values).returning(versions)).one()
    return _version(row), True


def by_digest(connection: Connection, name: str, digest: str) -> Version | None:
    row = connection.execute(
        select(versions).where(versions.c.name == name, versions.c.digest == digest, versions.c.deleted.is_(None))
    ).one_or_none()
    return None if row is None else _version(row)


def by_id(connection: Connection, identity: str) -> Version:
    return _version(connection.execute(select(versions).where(versions.c.id == identity)).one())


def find(connection: Connection, name: str, number: int) -> Version:
    """The version, or UserError `version_not_found` with what there is."""
    row = connection.execute(
        select(versions).where(versions.c.name == name, versions.c.number == number, versions.c.deleted.is_(None))
    ).one_or_none()
    if row is not None:
        return _version(row)
    last = latest(connection, name)
    if last is None:
        raise UserError(
            "model_not_found", f"There is no model {name!r}.", field="name", hint="GET /models lists them.", status=404
        )
    raise UserError(
        "version_not_found",
        f"Model {name!r} has no version {number}; its latest is {last.number}.",
        field="version",
        hint=f"GET /models/{name} lists its versions.",
        status=404,
    )


def latest(connection: Connection, name: str) -> Version | None:
    row = connection.execute(
        select(versions)
        .where(versions.c.name == name, versions.c.deleted.is_(None))
        .order_by(versions.c.number.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else _version(row)


def of_model(connection: Connection, name: str) -> list[Version]:
    """All versions of a model, newest first."""
    rows = connection.execute(
        select(versions).where(versions.c.name == name, versions.c.deleted.is_(None)).order_by(versions.c.number.desc())
    )
    return [_version(row) for row in rows]


def locations(connection: Connection) -> set[str]:
    """Where the objects of every version that is not deleted live."""
    return set(connection.execute(select(versions.c.location).where(versions.c.deleted.is_(None))).scalars())


def at(connection: Connection, location: str) -> Version | None:
    """The version whose objects are there."""
    row = connection.execute(
        select(versions).where(versions.c.location == location, versions.c.deleted.is_(None))
    ).one_or_none()
    return None if row is None else _version(row)


def change(connection: Connection, identity: str, **values: Any) -> None:
    """Set `lock`, `checked` or `labels`: what is learnt about a version after its upload."""
    connection.execute(update(versions).where(versions.c.id == identity).values(**values))


def mark_deleted(connection: Connection, identity: str) -> None:
    connection.execute(update(versions).where(versions.c.id == identity).values(deleted=now()))


def _next_number(connection: Connection, name: str) -> int:
    found = connection.execute(
        update(counters).where(counters.c.name == name).values(last=counters.c.last + 1).returning(counters.c.last)
    ).scalar_one_or_none()
    if found is not None:
        return int(found)
    connection.execute(insert(counters).values(name=name, last=1))
    return 1


def _version(row: Row[Any]) -> Version:
    return Version(**row._mapping)
