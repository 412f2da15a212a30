"""SIGKILL at every boundary of upload, build, rollout, rollback, deletion and projection; then a normal start.

The same inputs converge to one version, one build, one live deployment that answers, and nothing is left over.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]
Until = Callable[..., Any]

KILLED_AT = Path(__file__).with_name("killed_at.py")
FIRST = (
    "before-a-file", "in-a-file", "file-not-committed", "file-committed", "manifest-not-stored", "manifest-stored",
    "row-in-its-transaction", "row-written", "build-claimed", "build-submitted", "build-in-fetch", "build-in-resolve",
    "build-in-environment", "build-in-bento", "build-done", "build-in-its-transaction", "build-recorded",
    "rolling-recorded", "process-launched", "traffic-moved", "live-recorded",
)  # fmt: skip
SECOND = ("second-rolling", "second-has-traffic", "second-not-recorded", "second-recorded", "first-drains")
ROLLBACK = ("rollback-in-its-transaction", "rollback-rolls", "rollback-not-recorded")
DELETION = ("deletion-in-its-transaction", "objects-not-deleted", "manifest-deleted")


def dies(home: Home, boundary: str, do: Callable[[], Any], **settings: str) -> None:
    """Run the service until it kills itself at the boundary; its children end with it."""
    home.start(program=[sys.executable, str(KILLED_AT), boundary], **settings)
    process = home.process
    with contextlib.suppress(httpx.HTTPError, AssertionError):
        do()
    assert process.wait(240) == -9, home.log()
    home.process = None


def converged(home: Home, until: Until, *, versions: int, live: int, rows: Rows) -> None:
    deployment = home.settled("churn")
    assert deployment["target"] == {"model": "churn", "version": live}, deployment
    until(lambda: home.predict("churn", rows).headers.get("ekiben-version") == str(live))
    assert len(home.rows("SELECT id FROM versions WHERE deleted IS NULL")) == versions
    assert len(home.rows("SELECT id FROM builds")) == versions
    assert home.rows("SELECT DISTINCT state FROM builds") == [("succeeded",)]
    assert home.rows("SELECT count(*) FROM revisions WHERE state = 'live'") == [(1,)]
    until(lambda: len(home.processes()) == 2, lambda: str(home.processes()))  # a model and its supervisor
    known = {location.partition("/")[2] for (location,) in home.rows("SELECT location FROM versions")}
    assert home.objects() == known
    assert home.works() == []
    assert [path for path in (home.path / "objects").rglob("*") if path.suffix == ".tmp"] == []
    assert not list((home.path / "bentos").glob(".*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("boundary", FIRST)
def test_a_first_version(home: Home, model: Model, rows: Rows, until: Until, boundary: str) -> None:
    dies(home, boundary, lambda: home.upload(model(1), sample=rows))
    until(lambda: not home.processes(), lambda: f"orphans: {home.processes()}")
    home.start()
    with home.http() as client:
        form = {"files": {"file": ("churn.txt", model(1)), "sample": (None, json.dumps(rows))}}
        answer = client.post("/models?wait=240", **form)
    assert answer.status_code in (200, 201)
    assert (answer.json()["version"], answer.json()["state"]) == (1, "live"), answer.json()
    converged(home, until, versions=1, live=1, rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", SECOND)
def test_a_second_version(home: Home, model: Model, rows: Rows, until: Until, boundary: str) -> None:
    def upload_two() -> None:
        home.upload(model(1), sample=rows)
        home.upload(model(2), sample=rows)

    dies(home, boundary, upload_two)
    home.start()  # nothing is sent again: what was asked for is still wanted
    until(lambda: home.get("/deployments/churn")["target"]["version"] == 2)
    converged(home, until, versions=2, live=2, rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", ROLLBACK)
def test_a_rollback(home: Home, model: Model, rows: Rows, until: Until, boundary: str) -> None:
    def roll_back() -> None:
        home.upload(model(1), sample=rows)
        home.upload(model(2), sample=rows)
        home.post("/deployments/churn/rollback")

    dies(home, boundary, roll_back)
    home.start()
    if boundary == "rollback-in-its-transaction":  # it was not answered, and not done
        assert home.get("/deployments/churn")["wanted"]["version"] == 2
        home.post("/deployments/churn/rollback")
    until(lambda: home.get("/deployments/churn")["target"]["version"] == 1)
    converged(home, until, versions=2, live=1, rows=rows)


@pytest.mark.slow
@pytest.mark.parametrize("boundary", DELETION)
def test_a_deletion(home: Home, model: Model, rows: Rows, until: Until, boundary: str) -> None:
    def delete() -> None:
        home.upload(model(1), deploy="false")
        home.call("DELETE", "/models/churn/versions/1", 204)

    dies(home, boundary, delete)
    home.start()
    with home.http() as client:
        assert client.delete("/models/churn/versions/1").status_code in (204, 404)
    assert home.objects() == set()
    assert home.get("/models")["items"] == []
    assert home.upload(model(1), sample=rows)["version"] == 2


@pytest.mark.slow
def test_a_deployments_deletion(home: Home, model: Model, rows: Rows, until: Until) -> None:
    def delete() -> None:
        home.upload(model(1), sample=rows)
        home.call("DELETE", "/deployments/churn", 204)
        until(lambda: home.process.poll() is not None)

    dies(home, "deployment-deleted", delete)
    home.start()
    assert home.get("/deployments")["items"] == []
    until(lambda: not home.processes())
    assert home.predict("churn", rows).status_code == 404


@pytest.mark.slow
@pytest.mark.parametrize("boundary", ["before-mlflow", "mlflow-has-it"])
def test_the_projection(home: Home, model: Model, until: Until, boundary: str) -> None:
    def upload() -> None:
        home.upload(model(1), labels={"auc": "0.91"})
        until(lambda: home.process.poll() is not None)

    dies(home, boundary, upload, mlflow="true")
    home.start(mlflow="true")
    until(lambda: home.rows("SELECT count(*) FROM outbox") == [(0,)])
    import mlflow

    uri = f"sqlite:///{home.path / 'mlflow.db'}"
    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    assert [version.version for version in client.search_model_versions("name = 'churn'")] in (["1"], [1])
    assert client.get_model_version_by_alias("churn", "live").tags["ekiben.version"] == "1"
    until(lambda: len(home.processes()) == 2, lambda: str(home.processes()))  # a model and its supervisor


def test_every_boundary_is_killed_at() -> None:
    spec = importlib.util.spec_from_file_location("killed_at", KILLED_AT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tried = {*FIRST, *SECOND, *ROLLBACK, *DELETION, "deployment-deleted", "before-mlflow", "mlflow-has-it"}
    assert {*module.BOUNDARIES, *(f"build-in-{stage}" for stage in module.STAGES)} == tried
