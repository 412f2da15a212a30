"""The OpenAPI document of the running service is true: schemathesis finds no 5xx, and a client made from it works."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]


CHECKS = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.mark.slow
def test_schemathesis_finds_no_server_error_and_no_answer_that_is_not_described(
    home: Home, model: Model, rows: Rows
) -> None:
    home.start()
    home.upload(model(1), "churn.txt", sample=rows)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("schemathesis")), "run", f"{home.url}/openapi.json",
            "--checks", ",".join(CHECKS),
            "--phases", "examples,coverage,fuzzing", "--max-examples", "12", "--seed", "1",
            "--header", f"Authorization: Bearer {(home.path / 'token').read_text().strip()}",
            "--request-timeout", "60",  # among others it asks for 64 replicas
            # a log that is followed never ends, which test_rollouts looks at
            "--exclude-path-regex", "/logs$",
            "--suppress-health-check", "all", "--no-color",
        ],
        cwd=home.path, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    # it deleted, cancelled and deployed what it found, and the service works
    assert home.upload(model(2), "after.txt", sample=rows)["state"] == "live"
    assert home.predict("after", rows).status_code == 200
    assert "Traceback" not in home.log()


@pytest.mark.slow
def test_a_typed_client_made_from_the_document_works(
    home: Home, model: Model, rows: Rows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.start()
    home.upload(model(1), "churn.txt", sample=rows)
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(home.get("/openapi.json")))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("openapi-python-client")), "generate", "--path", str(document),
            "--output-path", str(tmp_path / "made"), "--meta", "none", "--fail-on-warning",
        ],
        cwd=tmp_path, env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    made = importlib.import_module("made")
    token = (home.path / "token").read_text().strip()

    def call(group: str, operation: str, *arguments: Any, **options: Any) -> Any:
        module = importlib.import_module(f"made.api.{group}.{operation}")
        with made.AuthenticatedClient(base_url=home.url, token=token, httpx_args={"trust_env": False}) as client:
            return module.sync(*arguments, client=client, **options)

    listed = call("models", "list_models")
    assert [(each.name, each.latest, each.live) for each in listed.items] == [("churn", 1, 1)]
    version = call("models", "get_version", "churn", 1)
    assert (version.digest.startswith("sha256:"), version.state) == (True, "live")
    wanted = importlib.import_module("made.models").DeploymentRequest(version=1, model="churn", replicas=1)
    deployment = call("deployments", "put_deployment", "other", body=wanted)
    assert (deployment.name, deployment.wanted.model) == ("other", "churn")
    assert home.settled("other")["target"] == {"model": "churn", "version": 1}
    missing = call("models", "get_version", "churn", 7)
    assert (missing.code, missing.status) == ("version_not_found", 404)
