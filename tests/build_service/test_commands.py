"""`ekiben-server migrate` and `ekiben-server token`, as an administrator runs them beside the service."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.servers import free_port


@pytest.fixture
def environment(fresh_database: Callable[[], str], tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "EKIBEN_HOME": str(tmp_path / "home"),
        "EKIBEN_DATABASE": fresh_database(),
        "EKIBEN_MLFLOW": "false",
    }


def server(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "build_service", *arguments], env=environment, capture_output=True, text=True
    )


def test_a_first_token_opens_a_service_that_others_can_reach(environment: dict[str, str]) -> None:
    early = server(environment, "token", "create", "ada")
    assert early.returncode == 1
    assert "database_not_migrated" in early.stderr
    assert "ekiben-server migrate" in early.stderr
    first = server(environment, "migrate")
    assert (first.returncode, first.stderr) == (0, "")
    assert "was empty" in first.stdout
    assert "nothing to do" in server(environment, "migrate").stdout
    made = server(environment, "token", "create", "ada")
    token = made.stdout.strip()
    assert token.startswith("ekb_")

    port = free_port()
    service = subprocess.Popen(
        [sys.executable, "-m", "build_service"],
        env={**environment, "EKIBEN_PORT": str(port), "EKIBEN_TOKEN": "another-one-of-some-length"},
        stderr=subprocess.DEVNULL,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while True:
                try:
                    refused = client.get("/models")
                    break
                except httpx.TransportError:
                    assert service.poll() is None
                    time.sleep(0.1)
            assert refused.status_code == 401
            assert client.get("/models", headers={"Authorization": f"Bearer {token}"}).status_code == 200
            listed = server(environment, "token", "list").stdout
            assert "valid" in listed
            assert token not in listed
            assert server(environment, "token", "revoke", listed.split()[0]).returncode == 0
            assert "revoked" in server(environment, "token", "list").stdout
    finally:
        service.terminate()
        service.wait()


def test_what_is_wrong_is_told_without_a_traceback(environment: dict[str, str]) -> None:
    server(environment, "migrate")
    for arguments, code in (
        (("token", "create", "a/b"), "bad_token_name"),
        (("token", "revoke", "x"), "token_not_found"),
    ):
        done = server(environment, *arguments)
        assert done.returncode == 1
        assert code in done.stderr
        assert "Traceback" not in done.stderr
    nowhere = {**environment, "EKIBEN_DATABASE": f"postgresql+psycopg://ekiben:secret@127.0.0.1:{free_port()}/ekiben"}
    for arguments in (("migrate",), ()):
        done = server(nowhere, *arguments)
        assert done.returncode == 1
        assert "database_unavailable" in done.stderr
        assert "Traceback" not in done.stderr
        assert "secret" not in done.stderr
