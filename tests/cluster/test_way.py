"""The way of a model on a real Kubernetes: the lines of the README's section, and what comes after them."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Pushed:
    folder: ModelFolder
    version: int

    def read(self, name: str) -> Any:
        return json.loads((self.folder.root / name).read_text())


@pytest.fixture(scope="module")
def ranker(installed: Installation, shell: Shell) -> Iterator[Pushed]:
    """The README's lines, run; the model that they pushed."""
    for line in lines_of(ROOT / "README.md", SECTION):
        if "/inference/" in line and not (row := installed.deployment("ranker"))["default"]:
            # In the README it is the installation's first model; here another may have been before.
            wanted = {"version": row["wanted"]["version"], "default": True}
            installed.call("PUT", "/deployments/ranker", json=wanted)
            eventually(lambda: installed.http.get("/inference/metadata").headers.get("ekiben-model") == "ranker")
        printed = shell.run(line)
        if "get jobs" in line and "b-" not in printed:  # on a busy machine the reader is faster than the service
            eventually(lambda line=line: "b-" in shell.run(line))
        if "rollout status" in line:
            assert "successfully rolled out" in printed
        if "/inference/" in line:
            answered = json.loads(printed.strip())
    pushed = Pushed(
        ModelFolder.read(ROOT / "bentos" / "ranker" / "model"), installed.live("ranker")["target"]["version"]
    )
    assert answered == pushed.read("expected.json")
    yield pushed
    installed.remove("ranker")


def predict(site: Installation, pushed: Pushed, version: int) -> httpx.Response:
    """The answer of that version: proxies hear of new pods a moment after they are live."""

    def asked() -> httpx.Response | None:
        answer = site.http.post("/inference/ranker/predict", json=pushed.read("sample.json"))
        answer.raise_for_status()
        return answer if answer.headers["ekiben-version"] == str(version) else None

    return eventually(asked)


def test_the_readme_is_literally_true(installed: Installation, ranker: Pushed) -> None:
    assert installed.version("ranker", ranker.version)["state"] == "live"
    chosen = f"ekiben.dev/model=ranker,ekiben.dev/version={ranker.version}"
    jobs = installed.cluster.get("jobs", "-n", "ekiben-builds", "-l", chosen)["items"]
    assert [job["status"]["succeeded"] for job in jobs] == [1]
    deployment = installed.cluster.get("deployment", "ranker", "-n", "ekiben-models")
    image = deployment["spec"]["template"]["spec"]["containers"][0]["image"]
    assert re.fullmatch(r"localhost:30500/ekiben@sha256:[0-9a-f]{64}", image)
    assert predict(installed, ranker, ranker.version).json() == ranker.read("expected.json")
    stranger = httpx.post(
        f"{installed.url}/inference/ranker/predict", json={}, headers={"Host": "localhost"}, trust_env=False
    )
    assert stranger.status_code == 401


def test_a_second_version_with_its_log_and_back(installed: Installation, ranker: Pushed, tmp_path: Path) -> None:
    second = example.write(tmp_path / "second", seed=8)
    sample = json.loads((second.root / "sample.json").read_text())
    pushed = installed.push(second.root / "files" / "ranker.txt", "ranker", kind="ranker", sample=sample)
    assert pushed["version"] == ranker.version + 1
    followed = Followed(installed, pushed["build"])
    followed.start()
    installed.live("ranker", pushed["version"])
    followed.join(120)
    assert not followed.is_alive()
    assert followed.state_at_first_line == "running"
    steps = [line for line in followed.lines if line.startswith("==> ")]
    assert (steps[0], steps[-1]) == ("==> fetch <==", "==> assemble <==")
    assert predict(installed, ranker, pushed["version"]).json() != ranker.read("expected.json")

    builds = installed.call("GET", "/builds")["items"]
    installed.call("POST", "/deployments/ranker/rollback")
    installed.live("ranker", ranker.version)
    assert predict(installed, ranker, ranker.version).json() == ranker.read("expected.json")
    assert installed.call("GET", "/builds")["items"] == builds, "nothing is rebuilt"


def test_mlflow_lists_the_versions(installed: Installation, ranker: Pushed) -> None:
    (line,) = [line for line in lines_of(ROOT / "docs" / "kubernetes.md", "## MLflow") if "port-forward" in line]
    command = line.partition("#")[0].replace(" 5000:5000", " :5000").split()
    forward = subprocess.Popen(command, env=environment(installed.cluster), text=True, stdout=subprocess.PIPE)
    digest = installed.version("ranker", ranker.version)["digest"]
    try:
        assert forward.stdout is not None
        found = re.search(r"127\.0\.0\.1:(\d+)", forward.stdout.readline())
        assert found is not None
        with httpx.Client(base_url=f"http://localhost:{found[1]}", trust_env=False, timeout=60) as mlflow:

            def told() -> bool:
                answer = mlflow.get("/api/2.0/mlflow/model-versions/search", params={"filter": "name='ranker'"})
                answer.raise_for_status()
                listed = answer.json().get("model_versions", ())
                return digest in {tag["value"] for each in listed for tag in each.get("tags", ())}

            assert eventually(told, seconds=120)
    finally:
        forward.terminate()
        forward.wait(30)


def test_down_leaves_the_state_to_the_next_up(installed: Installation, ranker: Pushed, shell: Shell) -> None:
    shell.run("make down PLATFORM=kubernetes")
    for namespace, kinds in (
        ("ekiben", "deploy,statefulset"),
        ("ekiben-models", "deploy,ingress"),
        ("ekiben-builds", "job"),
    ):
        assert installed.cluster.get(kinds, "-n", namespace)["items"] == []
    shell.run("make up PLATFORM=kubernetes")
    eventually(lambda: installed.http.get("/readyz").status_code == 200)
    installed.live("ranker", ranker.version)
    assert predict(installed, ranker, ranker.version).json() == ranker.read("expected.json")


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
