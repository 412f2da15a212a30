"""The way of a model on a real Kubernetes: the lines of the README's section, and what comes after them."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bentos.ranker import example
from bentos.serving import ModelFolder
from tests.cluster.pages import ROOT, Shell, lines_of
from tests.cluster.workloads import eventually
from tests.k8s.installation import Installation, environment

SECTION = "## On Kubernetes"


@pytest.fixture(scope="module")
def ranker(installed: Installation, shell: Shell) -> Iterator[ModelFolder]:
    """The README's lines, run; the model that they pushed."""
    for line in lines_of(ROOT / "README.md", SECTION):
        if "/inference/" in line:
            # In the README it is the installation's first model; here others may have been before.
            wanted = {"version": 1, "default": True}
            installed.call("PUT", "/deployments/ranker", json=wanted)
            eventually(lambda: installed.http.get("/inference/metadata").headers.get("ekiben-model") == "ranker")
        printed = shell.run(line)
        if "get jobs" in line:
            assert "b-" in printed
        if "rollout status" in line:
            assert "successfully rolled out" in printed
        if "/inference/" in line:
            folder = ModelFolder.read(ROOT / "bentos" / "ranker" / "model")
            assert json.loads(printed.strip()) == json.loads((folder.root / "expected.json").read_text())
    yield ModelFolder.read(ROOT / "bentos" / "ranker" / "model")
    installed.remove("ranker")


def predict(site: Installation, folder: ModelFolder) -> httpx.Response:
    sample = json.loads((folder.root / "sample.json").read_text())
    return site.http.post("/inference/ranker/predict", json=sample)


def expected(folder: ModelFolder) -> Any:
    return json.loads((folder.root / "expected.json").read_text())


def test_the_readme_is_literally_true(installed: Installation, ranker: ModelFolder) -> None:
    version = installed.version("ranker", 1)
    assert version["state"] == "live"
    jobs = installed.cluster.get("jobs", "-n", "ekiben-builds", "-l", "ekiben.dev/model=ranker")["items"]
    assert [job["status"]["succeeded"] for job in jobs] == [1]
    deployment = installed.cluster.get("deployment", "ranker", "-n", "ekiben-models")
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert re.fullmatch(r"localhost:30500/ekiben@sha256:[0-9a-f]{64}", image)
    answer = predict(installed, ranker)
    assert (answer.status_code, answer.headers["ekiben-version"]) == (200, "1")
    stranger = httpx.post(
        f"{installed.url}/inference/ranker/predict", json={}, headers={"Host": "localhost"}, trust_env=False
    )
    assert stranger.status_code == 401


def test_a_second_version_with_its_log_and_back(installed: Installation, ranker: ModelFolder, tmp_path: Path) -> None:
    second = example.write(tmp_path / "second", seed=8)
    sample = json.loads((second.root / "sample.json").read_text())
    pushed = installed.push(second.root / "files" / "ranker.txt", "ranker", kind="ranker", sample=sample)
    assert pushed["version"] == 2
    followed = Followed(installed, pushed["build"])
    followed.start()
    installed.live("ranker", 2)
    followed.join(120)
    assert not followed.is_alive()
    assert followed.state_at_first_line == "running"
    steps = [line for line in followed.lines if line.startswith("==> ")]
    assert (steps[0], steps[-1]) == ("==> fetch <==", "==> assemble <==")

    first_sample = json.loads((ranker.root / "sample.json").read_text())
    rolled = installed.http.post("/inference/ranker/predict", json=first_sample)
    assert rolled.headers["ekiben-version"] == "2"
    assert rolled.json() != expected(ranker)

    builds = installed.call("GET", "/builds")["items"]
    installed.call("POST", "/deployments/ranker/rollback")
    installed.live("ranker", 1)
    back = eventually(
        lambda: answer if (answer := predict(installed, ranker)).headers["ekiben-version"] == "1" else None
    )
    assert back.json() == expected(ranker)
    assert installed.call("GET", "/builds")["items"] == builds, "nothing is rebuilt"


def test_mlflow_lists_the_versions(installed: Installation, ranker: ModelFolder) -> None:
    (line,) = [line for line in lines_of(ROOT / "docs" / "kubernetes.md", "## MLflow") if "port-forward" in line]
    command = line.partition("#")[0].replace(" 5000:5000", " :5000").split()
    forward = subprocess.Popen(command, env=environment(installed.cluster), text=True, stdout=subprocess.PIPE)
    try:
        assert forward.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=f"http://localhost:{found[1]}", trust_env=False, timeout=60) as mlflow:
            where = {"filter": "name='ranker'"}

            def listed() -> list[dict[str, Any]]:
                answer = mlflow.get("/api/2.0/mlflow/model-versions/search", params=where)
                answer.raise_for_status()
                return list(answer.json().get("model_versions", ()))

            versions = eventually(listed, seconds=120)
            tags = [{tag["key"]: tag["value"] for tag in each["tags"]} for each in versions]
            assert installed.version("ranker", 1)["digest"] in [value for each in tags for value in each.values()]
    finally:
        forward.terminate()
        forward.wait(30)


class Followed(threading.Thread):
    """A build's log, followed through the API to its end."""

    def __init__(self, site: Installation, build: str) -> None:
        super().__init__(daemon=True)
        self._site, self._build = site, build
        self.lines: list[str] = []
        self.state_at_first_line = ""

    def run(self) -> None:
        path = f"/builds/{self._build}/logs?follow=true"
        headers = dict(self._site.http.headers)
        with httpx.Client(base_url=self._site.url, headers=headers, trust_env=False, timeout=None) as client:
            with client.stream("GET", path) as answer:
                for line in answer.iter_lines():
                    if line and not self.lines:
                        self.state_at_first_line = self._site.call("GET", f"/builds/{self._build}")["state"]
                    if line:
                        self.lines.append(line)
