"""A database that is a server goes away and comes back: who calls meanwhile is told so, whatever it was about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.servers import PostgreSQL

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def server() -> Iterator[PostgreSQL]:
    """Of this test's own, as it is stopped."""
    made = PostgreSQL()
    yield made
    made.close()


@pytest.mark.needs_postgres
@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({"token": TOKEN}, [("GET", "/kinds"), ("POST", "/models"), ("POST", "/inference/churn/predict")]),
        ({}, [("GET", "/models"), ("POST", "/inference/churn/predict"), ("POST", "/inference/predict")]),
    ],
)
def test_every_answer_says_that_the_database_is_away(
    home: Any, server: PostgreSQL, until: Callable[..., Any], settings: dict[str, str], asked: list[tuple[str, str]]
) -> None:
    home.start(database=server.create("away"), **settings)
    with home.http(**({"headers": {"Authorization": f"Bearer {TOKEN}"}} if settings else {})) as client:
        assert client.get("/models").status_code == 200
        server.stop()
        # Who may come in, and what is the default, is remembered for a moment.
        until(lambda: all(client.request(method, path).status_code == 503 for method, path in asked))
        for method, path in asked:
            assert client.request(method, path).json()["code"] == "database_unavailable"
        assert client.get("/livez").status_code == 200
        server.start()
        until(lambda: client.get("/models").status_code == 200)
