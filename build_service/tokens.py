"""Tokens of the API and of inference: shown once when they are made, kept as digests."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

from sqlalchemy import Connection, Row, insert, select, update
from ulid import ULID

from build_service.state import tokens
from registry.database import now


def new_token() -> str:
    """A token of 256 random bits."""
    return f"ekb_{secrets.token_urlsafe(32)}"


def make(connection: Connection, name: str) -> tuple[Row[Any], str]:
    """A new token; its row, and the token itself, which nobody can find out again."""
    token = new_token()
    values = {"id": str(ULID()), "name": name, "sha256": digest(token)}
    return connection.execute(insert(tokens).values(**values).returning(tokens)).one(), token


def all_of(connection: Connection) -> list[Row[Any]]:
    return list(connection.execute(select(tokens).order_by(tokens.c.created)))


def revoke(connection: Connection, identity: str) -> bool:
    """False where there is no such token."""
    return connection.execute(update(tokens).where(tokens.c.id == identity).values(revoked=now())).rowcount > 0


def valid_digests(connection: Connection) -> frozenset[str]:
    """SHA-256, in hexadecimal, of every token that was not revoked."""
    return frozenset(connection.execute(select(tokens.c.sha256).where(tokens.c.revoked.is_(None))).scalars())


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
