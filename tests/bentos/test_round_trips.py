"""What was saved is what is loaded: by run, by version and by alias, in a fresh process, with equal metrics."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bentos.serving import ModelFolder
from registry import runs
from registry.errors import EkibenError

if TYPE_CHECKING:
    from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[2]
KINDS = sorted(
    path.parent.name
    for path in (ROOT / "bentos").glob("*/train.py")
    if "\ndef evaluate(folder: ModelFolder," in path.read_text()
)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # MLflow and TensorFlow take their time to be imported


@dataclass(frozen=True)
class Saved:
    kind: str
    folder: ModelFolder
    metrics: dict[str, float]
    uri: str
    run: str
    """Of the training, in MLflow."""

    def catalogue(self, *actions: dict[str, Any]) -> list[dict[str, Any]]:
        body = "".join(json.dumps({"id": number, **action}) + "\n" for number, action in enumerate(actions))
        command = [sys.executable, "-m", "registry.catalogue", "--uri", self.uri]
        done = subprocess.run(command, input=body, capture_output=True, text=True, check=True, cwd=ROOT)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    def evaluated(self, *models: str) -> dict[str, Any]:
        """What a fresh process says of the models: their digests, and the metrics of the last."""
        command = [sys.executable, "-m", "tests.evaluated", self.kind, self.uri, *models]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-4000:]
        return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A small model as its training program saves and logs it."""
    kind, place = request.param, tmp_path_factory.mktemp(request.param)
    uri = f"sqlite:///{place / 'mlflow.db'}"
    command = [sys.executable, "-m", f"bentos.{kind}.train", "--small", "--quiet"]
    where = ["--out", str(place / "model"), "--tracking-uri", uri, "--metrics", str(place / "metrics.json")]
    done = subprocess.run([*command, *where], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads((place / "metrics.json").read_text())
    return Saved(kind, ModelFolder.read(place / "model"), said["metrics"], uri, said["run"])


def test_there_are_kinds_to_test() -> None:
    assert {"ranker", "forecast"} <= set(KINDS)


def test_a_model_is_the_same_by_run_by_version_and_by_alias_and_its_metrics_are_equal(saved: Saved) -> None:
    version = {
        "action": "version", "name": saved.kind.replace("_", "-"), "number": 1, "version_id": "id-1",
        "source": (saved.folder.root / "files").as_uri(), "digest": saved.folder.digest, "kind": saved.kind,
        "format": saved.folder.format or "", "labels": {},
    }  # fmt: skip
    name = version["name"]
    alias = {"action": "alias", "name": name, "version_id": "id-1", "alias": "live"}
    origin = {"mlflow.run_id": saved.run, "mlflow.artifact_path": "model"}
    from_run = {**version, "name": f"{name}-from-run", "version_id": "id-2", "labels": origin}
    assert saved.catalogue(version, alias, from_run) == [{"id": 0}, {"id": 1}, {"id": 2}]
    models = [
        saved.run,
        f"runs:/{saved.run}/model",
        f"models:/{name}/1",
        f"models:/{name}@live",
        f"models:/{name}-from-run/1",
    ]
    found = saved.evaluated(*models)
    assert found["digests"] == dict.fromkeys(models, saved.folder.digest)
    assert found["runs"][models[-1]] == saved.run  # the version leads back to its training
    training = importlib.import_module(f"bentos.{saved.kind}.train")
    metric, better = training.GATE
    assert metric in found["metrics"]
    assert better in ("higher", "lower")
    assert training.TOLERANCE >= 0
    for each, value in found["metrics"].items():
        assert math.isclose(value, saved.metrics[each], rel_tol=0, abs_tol=1e-6), each


@pytest.fixture
def client(saved: Saved) -> Iterator[MlflowClient]:
    yield runs.client_of(saved.uri)
    import mlflow

    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.mark.parametrize("saved", KINDS[:1], indirect=True)
def test_what_is_not_there_or_was_changed_is_told(saved: Saved, client: MlflowClient, tmp_path: Path) -> None:
    for named, code in (
        ("0" * 32, "run_not_found"),
        ("models:/nobody/1", "mlflow_model_not_found"),
        ("models:/nobody@live", "mlflow_model_not_found"),
        ("models:/../../x", "bad_model_uri"),
    ):
        with pytest.raises(EkibenError) as refused:
            runs.load(client, named, tmp_path / "new")
        assert refused.value.code == code
        assert refused.value.hint
        assert not (tmp_path / "new").exists()
    with pytest.raises(EkibenError) as taken:
        runs.load(client, saved.run, tmp_path)
    assert taken.value.code == "folder_exists"
    file = next((saved.folder.root.parent / "mlflow-artifacts").rglob(f"files/{saved.folder.files[0]}"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"?")
    try:
        with pytest.raises(EkibenError) as changed:
            runs.load(client, saved.run, tmp_path / "new")
        assert changed.value.code == "object_damaged"
        assert os.listdir(tmp_path) == []
    finally:
        file.write_bytes(whole)
