"""MLflow's own client sees what the projection wrote, and repeating it changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # MLflow takes its time to be imported


def project(uri: str, *actions: dict[str, Any]) -> list[dict[str, Any]]:
    body = "".join(json.dumps({"id": number, **action}) + "\n" for number, action in enumerate(actions))
    done = subprocess.run(
        [sys.executable, "-m", "registry.catalogue", "--uri", uri],
        input=body,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def version(number: int, folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "action": "version", "name": "ranker", "number": number, "version_id": f"id-{number}",
        "source": folder.as_uri(), "digest": "sha256:00", "kind": "ranker", "format": "lightgbm-text",
        "labels": {"auc": "0.91", "team": "growth"}, **more,
    }  # fmt: skip


def test_models_versions_tags_metrics_aliases_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "ranker.txt").write_text("tree")
    first, second = version(1, folder), version(2, folder, labels={})
    alias = {"action": "alias", "name": "ranker", "version_id": "id-1", "alias": "live"}
    assert project(uri, first, alias, first, second, alias) == [{"id": number} for number in range(5)]
    assert project(uri, first, second) == [{"id": 0}, {"id": 1}]  # a second time: nothing changes

    client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
    versions = client.search_model_versions("name = 'ranker'")
    assert sorted(int(each.version) for each in versions) == [1, 2]
    live = client.get_model_version_by_alias("ranker", "live")
    assert (int(live.version), live.tags["team"], live.tags["ekiben.kind"]) == (1, "growth", "ranker")
    assert client.get_run(live.run_id).data.metrics == {"auc": 0.91}
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    got = Path(mlflow.artifacts.download_artifacts("models:/ranker/1", dst_path=str(tmp_path / "got")))
    assert [path.read_text() for path in got.rglob("ranker.txt")] == ["tree"]

    labels = {"action": "labels", "name": "ranker", "version_id": "id-1", "gone": ["team"], "labels": {"stage": "test"}}
    assert project(uri, labels, labels) == [{"id": 0}, {"id": 1}]
    tags = client.get_model_version("ranker", "1").tags
    assert (tags["stage"], tags["ekiben.kind"], "team" in tags) == ("test", "ranker", False)

    gone = {"action": "delete", "name": "ranker", "version_id": "id-1"}
    unknown = {"action": "paint", "name": "ranker", "version_id": "id-2"}
    answers = project(uri, gone, gone, alias, unknown)
    assert [("error" in each) for each in answers] == [False, False, False, True]
    assert [int(each.version) for each in client.search_model_versions("name = 'ranker'")] == [2]
