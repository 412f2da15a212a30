"""k8s/components/training: what its jobs come to in an overlay, and that their image can run them."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder_image import lock
from scripts import images
from tests.k8s.conftest import Server

ROOT = Path(__file__).resolve().parents[2]
NAMESPACE = "ekiben-training"
SCHEDULES = {
    "ranker": "17 3 * * 1",
    "violation": "47 3 * * 2",
    "image-index": "7 * * * *",
    "forecast": "*/10 * * * *",
    "forecast-predict": "25 2 * * *",
    "forecast-register": "5 1 * * *",
}


@pytest.fixture(scope="module", params=["dev", "byo"])
def text(request: pytest.FixtureRequest, kubectl_program: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An overlay with the component."""
    folder = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(ROOT / "k8s", folder)
    file = folder / "overlays" / request.param / "kustomization.yaml"
    overlay = yaml.safe_load(file.read_text())
    overlay["components"].insert(-1, "../../components/training")  # images come last
    file.write_text(yaml.safe_dump(overlay))
    return subprocess.run(
        [kubectl_program, "kustomize", file.parent], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def objects(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


@pytest.fixture
def jobs(objects: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == "CronJob"}


def containers_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    return [*pod.get("initContainers", ()), *pod["containers"]]


def test_the_jobs_are_accepted_under_pod_security_restricted(text: str, api_server: Server) -> None:
    namespaces = [each for each in yaml.safe_load_all(text) if each["kind"] == "Namespace"]
    assert NAMESPACE in {each["metadata"]["name"] for each in namespaces}
    for each in namespaces:
        assert each["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    api_server.ok("apply", "-f", "-", text=yaml.safe_dump_all(namespaces))
    done = api_server.kubectl(
        "apply", "--dry-run=server", "--validate=strict", "--warnings-as-errors", "-f", "-", text=text
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_what_runs_when_and_never_twice_at_once(jobs: dict[str, dict[str, Any]]) -> None:
    assert {name: job["spec"]["schedule"] for name, job in jobs.items()} == SCHEDULES
    assert [name for name, job in jobs.items() if job["spec"].get("suspend")] == ["forecast-register"]
    for job in jobs.values():
        spec = job["spec"]
        assert job["metadata"]["namespace"] == NAMESPACE
        assert spec["concurrencyPolicy"] == "Forbid"
        assert (spec["successfulJobsHistoryLimit"], spec["failedJobsHistoryLimit"]) == (2, 2)
        assert spec["startingDeadlineSeconds"] > 0
        assert spec["jobTemplate"]["spec"]["activeDeadlineSeconds"] > 0
        assert spec["jobTemplate"]["spec"]["backoffLimit"] == 1


def test_pods_hold_no_token_of_the_cluster_and_secrets_come_from_secrets(jobs: dict[str, dict[str, Any]]) -> None:
    for job in jobs.values():
        pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        assert pod["automountServiceAccountToken"] is False
        assert "serviceAccountName" not in pod
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in containers_of(job):
            assert container["image"].startswith("localhost:5000/ekiben-training:")
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert {"requests", "limits"} <= container["resources"].keys()
            for variable in container["env"]:
                if re.search(r"TOKEN|DATABASE", variable["name"]):
                    assert variable["valueFrom"]["secretKeyRef"]
            assert not [word for word in container["args"] if "://" in word]


def test_models_are_released_behind_the_gate_only(jobs: dict[str, dict[str, Any]]) -> None:
    registering = {
        name for name, job in jobs.items() for each in containers_of(job) if "--register=$(EKIBEN_URL)" in each["args"]
    }
    assert registering == {"ranker", "violation", "image-index", "forecast"}
    for name in registering:
        (container,) = containers_of(jobs[name])
        assert "--gate" in container["args"]


def test_training_reaches_what_it_needs_and_is_let_in(objects: list[dict[str, Any]]) -> None:
    policies = {(each["metadata"]["namespace"], each["metadata"]["name"]): each["spec"] for each in objects
                if each["kind"] == "NetworkPolicy"}  # fmt: skip
    assert policies[NAMESPACE, "ekiben.default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    outside = [each for each in policies[NAMESPACE, "training"]["egress"] if "to" not in each]
    assert {port["port"] for each in outside for port in each["ports"]} == {53}
    (settings,) = (each["data"] for each in objects if each["metadata"]["name"].startswith("ekiben-settings"))
    (training,) = (each["data"] for each in objects if each["metadata"]["name"].startswith("training-settings"))
    assert training["EKIBEN_URL"] == f"http://{settings['EKIBEN_ALLOWED_HOSTS']}"  # else the service refuses the Host


def test_the_programs_know_their_options(jobs: dict[str, dict[str, Any]], text: str) -> None:
    if "postgres-first" not in text:
        pytest.skip("the jobs of the other overlay are the same")
    for job in jobs.values():
        for container in containers_of(job):
            module, *words = container["args"]
            verbs = [word for word in words[:1] if not word.startswith("-")]
            command = [sys.executable, "-m", module, *verbs, "--help"]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
            assert done.returncode == 0, done.stderr
            for word in words:
                if word.startswith("--"):
                    assert re.search(rf"{word.partition('=')[0]}\b", done.stdout), f"{module} has no {word}"


# --- the image -------------------------------------------------------------------------------------------------------

_PACKAGE_OF = {"PIL": "pillow", "sklearn": "scikit-learn", "mlflow": "mlflow-skinny", "tensorflow": "tensorflow-cpu"}
_KINDS = ("ranker", "forecast", "violation", "image_search", "training")
_NOT_TRAINED_HERE = {
    "statsmodels",  # real series, which --database leaves out
    "tokenizers", "transformers", "onnx",  # of the kind text
}  # fmt: skip


def _imported(folder: Path) -> Iterator[str]:
    """Packages that the modules of a folder import, whenever; the service is not trained."""
    for path in folder.rglob("*.py"):
        if path.name == "service.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from (name.name.partition(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.partition(".")[0]


def test_the_image_has_what_the_programs_import_and_nothing_that_serves() -> None:
    pins = {pin.name for pin in lock.parse((images.LOCKS / "training.txt").read_text()).pins}
    needed = {name for kind in _KINDS for name in _imported(ROOT / "bentos" / kind)}
    needed -= {*sys.stdlib_module_names, "bentos", *_NOT_TRAINED_HERE}
    assert {"lightgbm", "keras", "usearch", "sqlalchemy", "mlflow", "httpx"} <= needed
    assert "tensorflow-cpu" in pins  # Keras' backend
    assert {_PACKAGE_OF.get(name, name) for name in needed} <= pins
    assert "bentoml" not in pins
    assert not [name for name in pins if name.startswith(("nvidia-", "triton"))]
    recipe = images.RECIPES["training"]
    assert recipe.packages == ("bentos",)
    assert recipe.run.entrypoint[1:] == ("-m",)


def test_the_image_is_made_only_when_it_is_named() -> None:
    assert images.RECIPES["training"].optional
    assert [name for name, each in images.RECIPES.items() if each.optional] == ["training"]
