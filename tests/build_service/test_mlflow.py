"""A model that was logged in MLflow goes live by naming its run; everything else about it is as for an upload."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import lightgbm
import mlflow
import numpy as np
import pandas as pd
import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Until = Callable[..., Any]

pytestmark = pytest.mark.slow  # MLflow takes its time to be imported


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(3)
    return pd.DataFrame(rng.normal(size=(200, 3)), columns=["age", "income", "visits"])


@pytest.fixture(scope="module")
def booster(table: pd.DataFrame) -> lightgbm.Booster:
    target = (table.sum(axis=1) > 0).astype(float)
    return lightgbm.train({"objective": "binary", "verbose": -1}, lightgbm.Dataset(table, target), 5)


@pytest.fixture(scope="module")
def service(server: Home) -> Home:
    """The module's service, with the MLflow that is in its state folder, as `ekiben up` has it."""
    server.stop()
    server.settings["EKIBEN_MLFLOW"] = "true"
    return server.start()


@pytest.fixture(scope="module")
def tracking(service: Home, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    uri = f"sqlite:///{service.path / 'mlflow.db'}"
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    artifacts = tmp_path_factory.mktemp("training")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("churn", artifact_location=artifacts.as_uri()))
    yield uri
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture(scope="module")
def run(tracking: str, booster: lightgbm.Booster, table: pd.DataFrame) -> str:
    """A training run as most are: its model, logged with a flavour and an input example."""
    with mlflow.start_run() as run:
        mlflow.lightgbm.log_model(booster, name="model", input_example=table[:4])
        mlflow.log_metric("auc", 0.93)
    return str(run.info.run_id)


def refused(home: Home, status: int, code: str, **fields: str) -> Any:
    """The problem; nothing of the attempt is left."""
    before = home.objects()
    problem = home.post("/models", status, data=fields)
    assert problem["code"] == code, problem
    assert problem["hint"]
    assert home.objects() == before
    assert list((home.path / "imports").glob("*")) == []
    return problem


def test_a_logged_model_goes_live_by_its_run_and_predicts_as_in_training(
    service: Home, run: str, booster: lightgbm.Booster, table: pd.DataFrame, until: Until
) -> None:
    version = service.post("/models?wait=240", 201, data={"run_id": run, "artifact_path": "model", "name": "churn"})
    assert (version["model"], version["state"], version["kind"]) == ("churn", "live", "lightgbm")
    assert [file["path"] for file in version["files"]] == ["model.lgb"]
    assert version["checked"] == {"verified": "sample", "rows": 4, "matched": 4}  # MLflow's input example
    assert version["labels"]["mlflow.run_id"] == run
    assert version["labels"]["mlflow.artifact_path"] == "model"
    answer = service.predict("churn", table[:5].to_dict("records")).json()
    assert answer["outputs"] == pytest.approx(list(booster.predict(table[:5])), rel=1e-9)
    assert list((service.path / "imports").glob("*")) == []

    # the same content again, whichever way it is named, is the same version
    before = service.objects()
    for fields in ({"run_id": run}, {"model_uri": f"runs:/{run}/model"}):
        again = service.post("/models", 200, files={"name": (None, "churn")}, data=fields)  # multipart
        assert (again["version"], again["digest"]) == (1, version["digest"])
    assert service.objects() == before
    assert service.get("/models/churn")["items"][0]["labels"]["mlflow.run_id"] == run

    # and MLflow's own client knows which run the version came from; the run is as its owner left it
    client = mlflow.MlflowClient()
    projected = until(lambda: client.search_model_versions("name = 'churn'"))[0]
    assert projected.run_id == run
    assert client.get_run(run).data.metrics == {"auc": 0.93}
    until(lambda: client.get_registered_model("churn").aliases.get("live"))
    with httpx.Client(base_url=service.url, trust_env=False, timeout=240) as http:
        named = http.post("/models", params={"model_uri": "models:/churn@live", "name": "copy", "deploy": "false"})
    assert named.status_code == 201, named.text
    assert named.json()["labels"] == {"mlflow.model_uri": "models:/churn/1", "mlflow.run_id": run}


def test_what_the_user_gives_along_wins(
    service: Home, run: str, booster: lightgbm.Booster, table: pd.DataFrame
) -> None:
    rows = table[10:12].to_dict("records")
    sample = {"inputs": rows, "outputs": [float(value) for value in booster.predict(table[10:12])]}
    fields = {"run_id": run, "name": "given", "sample": json.dumps(sample), "labels": "team=growth"}
    version = service.post("/models?wait=240", 201, data=fields)
    assert version["checked"] == {"verified": "expected", "rows": 2, "matched": 2}
    assert version["labels"]["team"] == "growth"


def test_a_scikit_learn_model_goes_live_as_mlflow_writes_it_today(
    service: Home, tracking: str, table: pd.DataFrame
) -> None:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression().fit(table, table.sum(axis=1) > 0)
    info = None
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(model, name="leavers", input_example=table[:2], serialization_format="skops")
    version = service.post("/models?wait=240", 201, data={"model_uri": info.model_uri})  # models:/m-…
    assert (version["model"], version["state"], version["kind"]) == ("leavers", "live", "sklearn"), version["reason"]
    assert version["labels"]["mlflow.run_id"] == info.run_id


def test_a_pickle_is_refused_by_name_and_by_content_and_never_loaded(
    service: Home, tracking: str, table: pd.DataFrame, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'loaded'}",)

    folder = tmp_path / "bomb"
    folder.mkdir()
    (folder / "model.skops").write_bytes(pickle.dumps(Bomb()))  # whatever MLmodel says
    body = {"flavors": {"sklearn": {"pickled_model": "model.skops", "serialization_format": "skops"}}}
    (folder / "MLmodel").write_text(json.dumps(body))
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(folder), "model")
    problem = refused(service, 422, "pickle_refused", run_id=run.info.run_id, name="bomb")
    assert problem["field"] == "run_id"
    assert problem["hint"].startswith("Log it as data: mlflow.sklearn.log_model")
    assert not (tmp_path / "loaded").exists()

    wrapper = lightgbm.LGBMClassifier(n_estimators=3, verbose=-1).fit(table, table.sum(axis=1) > 0)
    with mlflow.start_run() as run:
        mlflow.lightgbm.log_model(wrapper, name="model")
    answer = service.post("/models", 422, data={"run_id": run.info.run_id, "name": "wrapper"})
    assert answer["hint"].startswith("Log its booster: mlflow.lightgbm.log_model(model.booster_"), answer


def test_an_artifact_that_is_no_logged_model_is_taken_as_an_upload_is(
    service: Home, tracking: str, booster: lightgbm.Booster, tmp_path: Path
) -> None:
    booster.save_model(tmp_path / "leavers.txt")
    with mlflow.start_run() as run:
        mlflow.log_artifact(str(tmp_path / "leavers.txt"))
        mlflow.log_artifact(str(tmp_path / "leavers.txt"), "out/deep")
    run_id = run.info.run_id
    problem = refused(service, 422, "no_run_model", run_id=run_id, name="plain")
    assert "leavers.txt" in problem["hint"]
    version = service.post("/models?wait=240", 201, data={"run_id": run_id, "artifact_path": "leavers.txt"})
    assert (version["model"], version["state"]) == ("leavers", "live")
    fields = {"run_id": run_id, "artifact_path": "out/deep/leavers.txt"}
    assert service.post("/models", 200, data=fields)["digest"] == version["digest"]
    folder = service.post("/models", 200, data={"run_id": run_id, "artifact_path": "out/deep", "name": "leavers"})
    assert folder["digest"] == version["digest"]


def test_a_run_with_several_models_asks_which(service: Home, tracking: str, booster: lightgbm.Booster) -> None:
    with mlflow.start_run() as run:
        for name in ("first", "second"):
            mlflow.lightgbm.log_model(booster, name=name)
    problem = refused(service, 422, "several_run_models", run_id=run.info.run_id)
    assert "first" in problem["detail"]
    assert "second" in problem["detail"]
    fields = {"run_id": run.info.run_id, "artifact_path": "second", "deploy": "false"}
    assert service.post("/models", 201, data=fields)["model"] == "second"


@pytest.mark.parametrize(
    ("code", "field", "fields"),
    [
        ("run_not_found", "run_id", {"run_id": "0" * 32}),
        ("bad_run_id", "run_id", {"run_id": "../../etc"}),
        ("bad_artifact_path", "artifact_path", {"run_id": "RUN", "artifact_path": "model/../../other"}),
        ("artifact_not_found", "artifact_path", {"run_id": "RUN", "artifact_path": "modell"}),
        ("artifact_not_found", "artifact_path", {"run_id": "RUN", "artifact_path": "model/model.txt"}),
        ("path_without_run", "artifact_path", {"artifact_path": "model"}),
        ("run_and_model_uri", "model_uri", {"run_id": "RUN", "model_uri": "models:/churn/1"}),
        ("bad_model_uri", "model_uri", {"model_uri": "file:///etc/passwd"}),
        ("bad_model_uri", "model_uri", {"model_uri": "models:/churn/../../etc"}),
        ("mlflow_model_not_found", "model_uri", {"model_uri": "models:/nobody/1"}),
        ("mlflow_model_not_found", "model_uri", {"model_uri": "models:/nobody@live"}),
        ("mlflow_model_not_found", "model_uri", {"model_uri": "models:/m-00000000000000000000000000000000"}),
        ("missing_name", "name", {"run_id": "RUN"}),
        ("bad_name", "name", {"run_id": "RUN", "name": "Not A Name"}),
        ("sample_does_not_fit", "sample.inputs[0].town", {"run_id": "RUN", "name": "odd", "sample": '[{"town": 1}]'}),
    ],
)
def test_bad_input_has_a_code_of_its_own_and_leaves_nothing(
    service: Home, run: str, code: str, field: str, fields: dict[str, str]
) -> None:
    fields = {key: run if value == "RUN" else value for key, value in fields.items()}
    assert refused(service, 422, code, **fields)["field"] == field


def test_a_file_and_a_run_are_one_too_many(service: Home, run: str) -> None:
    before = service.objects()
    both = service.post("/models", 422, files={"file": ("churn.txt", b"tree")}, data={"run_id": run})
    assert both["code"] == "file_and_run"
    body = service.post("/models", 422, params={"run_id": run}, content=b"tree")
    assert body["code"] == "file_and_run"
    assert service.objects() == before


def test_artifacts_that_lead_out_of_the_run_are_refused(service: Home, tracking: str, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("tree\n")
    with mlflow.start_run() as run:
        mlflow.log_text("notes", "model/notes.txt")
    inside = Path(run.info.artifact_uri.removeprefix("file://")) / "model"
    (inside / "churn.txt").symlink_to(tmp_path / "secret.txt")
    refused(service, 422, "bad_artifact_path", run_id=run.info.run_id, artifact_path="model", name="linked")


def test_bounds_of_an_upload_hold(
    home: Home, booster: lightgbm.Booster, run: str, tracking: str, tmp_path: Path
) -> None:
    home.start(mlflow="true", mlflow_uri=tracking, max_upload="2000", max_field="1000", max_files="3")
    refused(home, 413, "artifact_too_large", run_id=run, name="large")
    with mlflow.start_run() as many:
        for number in range(30):
            mlflow.log_text("x", f"many/{number}.txt")
    refused(home, 413, "too_many_files", run_id=many.info.run_id, artifact_path="many", name="many")


def test_without_mlflow_or_with_one_that_does_not_answer(home: Home) -> None:
    home.start(mlflow="false")
    refused(home, 503, "mlflow_off", run_id="0" * 32, name="churn")
    home.stop()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens
        home.start(mlflow="true", mlflow_uri=f"http://me:hidden@127.0.0.1:{closed.getsockname()[1]}")
        problem = refused(home, 503, "mlflow_unreachable", run_id="0" * 32, name="churn")
    assert "hidden" not in json.dumps(problem)
    assert "hidden" not in home.log()


@pytest.fixture
def tracking_server(tmp_path: Path, until: Until) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    argv += ["--backend-store-uri", f"sqlite:///{tmp_path / 'tracking.db'}"]
    argv += ["--artifacts-destination", str(tmp_path / "artifacts")]
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (tmp_path / "tracking.log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"{url}/health", trust_env=False).status_code == 200
        return False

    try:
        until(answers)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait(60)


def test_a_tracking_server_hands_the_model_out_and_is_told_of_the_version(
    home: Home, tracking_server: str, booster: lightgbm.Booster, table: pd.DataFrame, until: Until, tmp_path: Path
) -> None:
    kept = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    mlflow.set_tracking_uri(tracking_server)
    mlflow.set_registry_uri(tracking_server)
    mlflow.set_experiment("churn")
    try:
        with mlflow.start_run() as run:
            mlflow.lightgbm.log_model(
                booster, name="model", input_example=table[:3], registered_model_name="Churn Model"
            )
        client = mlflow.MlflowClient()
        client.set_registered_model_alias("Churn Model", "champion", "1")
        elsewhere = client.create_experiment("elsewhere", artifact_location=(tmp_path / "private").as_uri())
        local = client.create_run(elsewhere).info.run_id
        (tmp_path / "private" / local / "artifacts" / "model").mkdir(parents=True)
        (tmp_path / "private" / local / "artifacts" / "model" / "MLmodel").write_text("flavors: {}")

        home.start(mlflow="true", mlflow_uri=tracking_server)
        version = home.post("/models?wait=240", 201, data={"model_uri": "models:/Churn Model@champion"})
        assert (version["model"], version["state"], version["verified"]) == ("churn-model", "live", "sample")
        assert version["labels"]["mlflow.run_id"] == run.info.run_id
        assert version["labels"]["mlflow.model_uri"] == "models:/Churn Model/1"
        projected = until(lambda: client.search_model_versions("name = 'churn-model'"), home.log)[0]
        assert projected.run_id == run.info.run_id
        fields = {"run_id": run.info.run_id, "name": "by-run", "deploy": "false"}
        home.post("/models", 201, data=fields)
        of_run = until(lambda: client.search_model_versions("name = 'by-run'"), home.log)[0]
        assert (of_run.run_id, of_run.source) == (run.info.run_id, f"runs:/{run.info.run_id}/model")

        # a run whose artifacts are said to be on this machine's own disk: not for a client of a server
        refused(home, 422, "mlflow_artifacts_local", run_id=local, artifact_path="model", name="local")
    finally:
        mlflow.set_tracking_uri(kept[0])
        mlflow.set_registry_uri(kept[1])
