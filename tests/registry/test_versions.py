"""Version numbers count up per name and are never used again."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import versions
from registry.database import Database
from registry.errors import UserError


def values(name: str, content: int) -> dict[str, Any]:
    return {
        "name": name, "digest": f"sha256:{content}", "kind": "k", "format": "f", "size": 1, "location": "models/1",
        "manifest": {}, "signature": None, "labels": {}, "upload_seconds": None,
    }  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("create", "delete", "fail")), st.sampled_from("ab"), st.integers(0, 4))))
def test_numbers_are_never_used_again(steps: list[tuple[str, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Database(f"sqlite:///{Path(folder) / 'v.db'}")
        database.create()
        given_out: dict[str, list[int]] = {"a": [], "b": []}
        alive: dict[tuple[str, int], int] = {}
        for action, name, content in steps:
            if action == "fail":
                with pytest.raises(RuntimeError), database.write() as connection:  # noqa: PT012 - the way it is undone
                    versions.create(connection, **values(name, content))
                    raise RuntimeError("the transaction is undone, its number too")
                continue
            with database.write() as connection:
                if action == "delete":
                    row = versions.by_digest(connection, name, f"sha256:{content}")
                    assert (row is not None) == ((name, content) in alive)
                    if row is not None:
                        versions.mark_deleted(connection, row.id)
                        del alive[name, content]
                    continue
                row, new = versions.create(connection, **values(name, content))
                assert new == ((name, content) not in alive)
                if new:
                    given_out[name].append(row.number)
                    alive[name, content] = row.number
                assert row.number == alive[name, content]
        for numbers in given_out.values():
            assert numbers == list(range(1, len(numbers) + 1))
        database.close()


def test_many_writers_at_once_give_every_number_once(fresh_database: Callable[[], str]) -> None:
    database = Database(fresh_database())
    database.create()
    numbers: list[int] = []

    def write(start: int) -> None:
        for content in range(start, start + 10):
            with database.write() as connection:
                numbers.append(versions.create(connection, **values("a", content))[0].number)

    threads = [threading.Thread(target=write, args=(10 * number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 81))
    database.close()


def test_what_there_is_is_told_when_something_is_missing(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'v.db'}")
    database.create()
    with database.write() as connection:
        versions.create(connection, **values("a", 1))
        with pytest.raises(UserError) as no_model:
            versions.find(connection, "b", 1)
        with pytest.raises(UserError) as no_version:
            versions.find(connection, "a", 2)
    assert no_model.value.code == "model_not_found"
    assert no_version.value.code == "version_not_found"
    assert "its latest is 1" in no_version.value.detail
    database.close()
