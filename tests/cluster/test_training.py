"""The scheduled forecast, once, as its CronJob would: sales in the database, a model trained on them, and released."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from sqlalchemy import make_url

from tests.cluster.cluster import Cluster
from tests.cluster.workloads import eventually, run_job
from tests.k8s.installation import ROOT, Installation, environment, new_token, site_of

NAMESPACE = "ekiben-training"
SUSPENDED = [{"op": "add", "path": "/spec/suspend", "value": True}]


@pytest.fixture(scope="module")
def training(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The installation with the component, its image and its Secrets. No CronJob starts by itself."""
    target, folder = installed.cluster, tmp_path_factory.mktemp("training")
    argv = ["training", "--push", target.registry.push, "--insecure", "--kustomization", str(folder)]
    subprocess.run(
        [sys.executable, "-m", "scripts.images", *argv, "--overlay", str(site_of(target))], cwd=ROOT, check=True
    )
    file = folder / "kustomization.yaml"
    overlay = json.loads(file.read_text())
    overlay["components"] = [os.path.relpath(ROOT / "k8s" / "components" / "training", folder)]
    overlay["images"].append({**overlay["images"][0], "name": "ekiben-training"})
    overlay["patches"] = [{"target": {"kind": "CronJob"}, "patch": json.dumps(SUSPENDED)}]
    file.write_text(json.dumps(overlay))
    up = [sys.executable, "-m", "scripts.kubernetes", "up", "--overlay", str(folder)]
    done = subprocess.run(up, cwd=ROOT, env=environment(target), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    secret(target, "ekiben-token", token=new_token(target, "training"))
    stored = target.get("secret", "ekiben-database", "-n", "ekiben")["data"]["url"]
    url = make_url(base64.b64decode(stored).decode()).set(host="postgres.ekiben.svc")
    secret(target, "ekiben-forecast", **{"database-url": url.render_as_string(hide_password=False)})
    yield target
    installed.remove("forecast")
    target.kubectl("delete", "namespace", NAMESPACE, "--wait=false")
    target.kubectl("delete", "networkpolicy", "from-training", "-n", "ekiben")


def secret(target: Cluster, name: str, **values: str) -> None:
    target.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": NAMESPACE}, "stringData": values}
    )


def job_of(target: Cluster, cron: str, name: str, args: Sequence[str] = ()) -> dict[str, Any]:
    """The Job that a CronJob would make now; with other arguments, where some are given."""
    spec = target.get("cronjob", cron, "-n", NAMESPACE)["spec"]["jobTemplate"]["spec"]
    if args:
        spec["template"]["spec"]["containers"][0]["args"] = list(args)
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def log_of(target: Cluster, name: str) -> str:
    return target.kubectl("logs", "-n", NAMESPACE, f"job/{name}", "--all-containers")


@pytest.mark.timeout(3600)  # an image with TensorFlow is made and pushed first
def test_the_forecast_is_trained_on_the_registered_sales_and_released(
    training: Cluster, installed: Installation
) -> None:
    args = ["bentos.forecast.batch", "register", "--simulate=420", "--stores=1"]
    run_job(training, NAMESPACE, job_of(training, "forecast-register", "register", args))
    assert "new or changed" in log_of(training, "register")

    job = job_of(training, "forecast", "train")
    training.apply({**job, "metadata": {**job["metadata"], "namespace": NAMESPACE}})

    def ended() -> str:
        found = training.get("job", "train", "-n", NAMESPACE)["status"].get("conditions") or []
        return next((each["type"] for each in found if each["type"] in ("Complete", "Failed")), "")

    assert eventually(ended, seconds=1500) == "Complete", log_of(training, "train")
    assert installed.live("forecast")["target"] == {"model": "forecast", "version": 1}
    labels = installed.version("forecast", 1)["labels"]
    assert labels["gate.decision"] == "released"
    assert labels["gate.live"] == "nothing was live"
    assert labels["mlflow.run_id"]  # it was logged in the MLflow of the installation

    run_job(training, NAMESPACE, job_of(training, "forecast", "again"))
    assert "no new sales" in log_of(training, "again")
    run_job(training, NAMESPACE, job_of(training, "forecast-predict", "predict"))
    assert "forecast/1: 8 series forecast" in log_of(training, "predict")
