"""User ids of models' processes: one each, on the whole machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from build_service import isolation
from build_service.isolation import Users


def test_two_services_never_give_one_user_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "USERS", range(70_000, 70_006))
    first, second = Users(tmp_path / "users"), Users(tmp_path / "users")
    taken = [service.take() for service in (first, second, first, second, first, second)]
    assert sorted(user for user in taken if user is not None) == list(range(70_000, 70_006))
    assert first.take() is None
    assert taken[1] is not None
    second.give_back(taken[1])
    assert first.take() == taken[1]
