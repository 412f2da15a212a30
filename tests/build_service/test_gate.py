"""A retrained model is released only if it is not worse than the live one; what was decided is on the version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import
ROOT = Path(__file__).resolve().parents[2]


def retrain(home: Home, folder: Path, rounds: int) -> str:
    """Train a ranker of so many trees, always on the same searches; what the command printed."""
    few = ["--queries", "400", "--rounds", str(rounds), "--no-mlflow", "--quiet", "--out", str(folder / "model")]
    done = subprocess.run(
        [sys.executable, "-m", "bentos.ranker.train", *few, "--register", home.url, "--gate"],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "EKIBEN_HOME": str(home.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + home.log()
    return done.stdout


def of(home: Home, number: int) -> tuple[str, dict[str, str]]:
    """State of a version, and what the gate said of it."""
    version = home.get(f"/models/ranker/versions/{number}")
    return version["state"], {key: value for key, value in version["labels"].items() if key.startswith("gate.")}


@pytest.mark.timeout(900)  # four trainings and four rollouts, on however busy a machine
def test_a_worse_model_is_held_back_and_an_equal_one_is_released(server: Home, tmp_path: Path) -> None:
    retrain(server, tmp_path, 30)
    state, first = of(server, 1)
    assert state == "live"
    assert first["gate.decision"] == "released"
    assert first["gate.live"] == "nothing was live"
    server.call("PUT", "/deployments/ranker", json={"version": 1, "replicas": 2})
    server.settled("ranker")

    said = retrain(server, tmp_path, 1)
    state, worse = of(server, 2)
    assert state == "built"
    assert worse["gate.decision"] == "held back"
    assert worse["gate.metric"] == "ndcg_10 (higher is better)"
    assert worse["gate.live_version"] == "1"
    assert worse["gate.live"] == first["gate.value"]  # both were evaluated on the same data by the same program
    assert float(worse["gate.value"]) < float(worse["gate.live"]) - float(worse["gate.tolerance"])
    assert "held back" in said
    assert server.get("/deployments/ranker")["target"] == {"model": "ranker", "version": 1}

    retrain(server, tmp_path, 31)  # another model, as good within the tolerance
    state, equal = of(server, 3)
    assert state == "live"
    assert equal["gate.decision"] == "released"
    assert abs(float(equal["gate.value"]) - float(equal["gate.live"])) <= float(equal["gate.tolerance"])
    deployed = server.settled("ranker")
    assert (deployed["target"]["version"], deployed["replicas"]) == (3, 2)  # the deployment's settings stay

    def kept() -> list[Any]:
        return [(each["version"], each["digest"], each["labels"]) for each in server.get("/models/ranker")["items"]]

    before = kept()
    retrain(server, tmp_path, 31)  # nothing is new, so nothing changes
    assert kept() == before
    assert server.get("/deployments/ranker")["revision"] == deployed["revision"]

    shown = subprocess.run(
        [sys.executable, "-m", "ekiben", "models", "ranker:2", "--json", "--url", server.url],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads(shown)["labels"]["gate.decision"] == "held back"


@pytest.mark.timeout(900)
def test_forecasts_as_they_are_made_day_by_day(server: Home, tmp_path: Path) -> None:
    """Sales come in, a model is trained on them and released, makes forecasts, and these meet what came."""
    where = ["--database", f"sqlite:///{tmp_path / 'sales.db'}", "--quiet"]

    def job(*arguments: str, module: str = "bentos.forecast.batch") -> str:
        command = [sys.executable, "-m", module, *arguments, *where]
        own = {**os.environ, "EKIBEN_HOME": str(server.path)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=own)
        assert done.returncode == 0, done.stdout + done.stderr + server.log()
        return done.stdout

    def retrained() -> str:
        few = ["--days", "500", "--horizon", "14", "--rounds", "40", "--no-mlflow", "--out", str(tmp_path / "model")]
        return job(*few, "--register", server.url, "--gate", "--only-new", module="bentos.forecast.train")

    job("register", "--simulate", "420", "--stores", "1")
    assert "forecast version 1 is live" in retrained()
    assert "no new sales" in retrained()
    assert len(server.get("/models/forecast")["items"]) == 1
    by_file = job("predict", "--live", server.url)
    assert "forecast/1: 8 series forecast, 0 were there" in by_file
    by_endpoint = job("predict", "--url", f"{server.url}/inference/forecast")  # the same model: nothing is left to do
    assert "forecast/1: 0 series forecast, 8 were there" in by_endpoint

    job("register", "--simulate", "7", "--stores", "1")
    assert job("evaluate").splitlines()[1].split()[:3] == ["forecast/1,", "2023-02-26", "56/56"]
    assert "version 2" in retrained()  # there are new sales
    assert "forecast/" in job("predict", "--url", f"{server.url}/inference/forecast")
    assert "8 were there" in job("predict", "--live", server.url)


def test_a_gate_needs_a_service_to_ask(tmp_path: Path) -> None:
    few = ["--queries", "300", "--rounds", "2", "--no-mlflow", "--quiet", "--out", str(tmp_path / "model"), "--gate"]
    done = subprocess.run(
        [sys.executable, "-m", "bentos.ranker.train", *few], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 2
    assert "--gate needs --register" in done.stderr
    assert not (tmp_path / "model").exists()


def test_labels_are_set_and_taken_away_after_the_upload(server: Home, model: Any) -> None:
    made = server.upload(model(9), "labelled.txt", labels={"team": "growth", "stage": "test"}, deploy="false")
    path = f"/models/labelled/versions/{made['version']}"
    changed = server.call("PATCH", path, json={"labels": {"stage": None, "auc": "0.93", "absent": None}})
    assert changed["labels"] == {"team": "growth", "auc": "0.93"}
    assert server.get(path) == changed
    assert {**changed, "labels": made["labels"]} == made  # nothing else of a version ever changes


@pytest.fixture(scope="module")
def kept(server: Home, model: Any) -> Home:
    server.upload(model(10), "kept.txt", labels={"team": "growth"}, deploy="false")
    return server


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"labels": {f"key {n}": "x" for n in range(65)}}, 422, "bad_labels"),
        ({"labels": {"k" * 64: "x"}}, 422, "bad_labels"),
        ({"labels": {"": "x"}}, 422, "bad_labels"),
        ({"labels": {"key": "x" * 256}}, 422, "bad_labels"),
        ({"labels": {"key": 3}}, 422, "invalid_request"),
        ({"labels": {}, "digest": "sha256:00"}, 422, "unknown_field"),
        ({}, 422, "invalid_request"),
    ],
)
def test_labels_that_no_version_may_have_are_refused(kept: Home, body: dict[str, Any], status: int, code: str) -> None:
    problem = kept.call("PATCH", "/models/kept/versions/1", status, json=body)
    assert problem["code"] == code, problem
    assert kept.get("/models/kept/versions/1")["labels"] == {"team": "growth"}


def test_labels_of_a_version_that_is_not_there(server: Home) -> None:
    assert server.call("PATCH", "/models/nobody/versions/1", 404, json={"labels": {}})["code"] == "model_not_found"
