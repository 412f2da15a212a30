"""Backup and restore, by the commands of docs/kubernetes.md: nothing of state is left in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.cluster.pages import ROOT, Shell, lines_of
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, Trained

STATE = {"statefulset/postgres": "data-postgres-0", "statefulset/minio": "data-minio-0"}
WRITERS = ("deployment/ekiben", "deployment/mlflow")


@pytest.fixture
def version(installed: Installation, churn: Sequence[Trained]) -> Iterator[int]:
    """That of the first model, served as the deployment `kept`."""
    pushed = installed.push(churn[0].file, "kept", sample=churn[0].sample)
    installed.live("kept", pushed["version"])
    yield int(pushed["version"])
    installed.remove("kept")


def lose_everything(site: Installation) -> None:
    """The volumes of the database and of the object store go; the service starts with nothing."""

    def scale(replicas: int, *what: str) -> None:
        site.cluster.kubectl("-n", "ekiben", "scale", *what, f"--replicas={replicas}")
        if replicas:
            for each in what:
                site.cluster.kubectl("-n", "ekiben", "rollout", "status", each, "--timeout=170s")

    scale(0, *WRITERS, *STATE)
    for what in (*WRITERS, *STATE):
        chosen = f"app.kubernetes.io/name={what.partition('/')[2]}"
        site.cluster.kubectl("-n", "ekiben", "wait", "--for=delete", "pod", "-l", chosen, "--timeout=170s")
    site.cluster.kubectl("-n", "ekiben", "delete", "pvc", *STATE.values())
    scale(1, *STATE)
    scale(1, "deployment/ekiben")


def test_what_was_saved_is_restored_after_everything_is_lost(
    installed: Installation, churn: Sequence[Trained], version: int, shell: Shell, tmp_path: Path
) -> None:
    kept = churn[0]
    build = installed.version("kept", version)["build"]
    log = installed.http.get(f"/builds/{build}/logs").text
    assert "==> assemble <==" in log
    commands = lines_of(ROOT / "docs" / "kubernetes.md", "## Backup and restore")
    (save,) = [line for line in commands if line.startswith("python -m scripts.backup save ")]
    (restore,) = [line for line in commands if line.startswith("python -m scripts.backup restore ")]
    shell.run(f"export FOLDER={tmp_path / 'backup'}")

    shell.run(save)
    lose_everything(installed)
    assert (
        eventually(lambda: answer.status_code if (answer := installed.http.get("/models")).status_code < 500 else 0)
        == 401
    )
    eventually(lambda: "kept" not in installed.cluster.kubectl("-n", "ekiben-models", "get", "deploy", "-o", "name"))

    shell.run(restore)
    installed.live("kept", version)
    answer = eventually(lambda: found if (found := installed.predict("kept", kept.rows)).is_success else None)
    assert answer.json()["outputs"] == pytest.approx(kept.outputs)
    assert installed.http.get(f"/builds/{build}/logs").text == log
    stored = installed.http.get(f"/models/kept/versions/{version}/files/{kept.file.name}")
    assert stored.content == kept.file.read_bytes()
