"""Every kind on the local platform: its example's files come in by POST /models, and answer under /inference/NAME."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bentos import kinds
from tests.bentos.conformance import Conformance, Running

Home = Any  # tests/build_service/conftest.py, which tests cannot import

PATIENCE = 600
"""Seconds; the first model of a framework has it installed."""

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=kinds.pairs(["local"]))
def running(request: pytest.FixtureRequest, server: Home, run_folder: Path) -> Iterator[Running]:
    kind, entry, place = kinds.split(request.param)
    folder = kinds.example(kind.name, run_folder)
    name = kinds.deployment(kind)
    form = kinds.form(kind, folder)
    with server.http(timeout=PATIENCE + 60) as client:
        answer = client.post(f"/models?wait={PATIENCE}", files=kinds.files(folder), data=form)
    assert answer.status_code == 201, f"{answer.text}\n{server.log()}"
    made = answer.json()
    assert (made["state"], made["kind"], made["verified"]) == ("live", kind.name, "expected"), made
    with server.http(base_url=f"{server.url}/inference/{name}") as client:
        yield Running(kind, entry, place, folder, client, (name, "1"), limit=64 << 20, metrics=404)
    server.call("DELETE", f"/deployments/{name}", 204)  # one framework's memory at a time


class TestKinds(Conformance):
    pass
