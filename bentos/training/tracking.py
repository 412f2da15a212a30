"""A training run in MLflow: parameters, metrics, the digest of the data, and the model."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from bentos.training.outcome import ARTIFACT, Outcome

if TYPE_CHECKING:
    from bentos.serving.model import ModelFolder


def default_uri(home: Path) -> str:
    """The SQLite file in the state folder, the same that `ekiben up` uses."""
    return f"sqlite:///{home / 'mlflow.db'}"


def record(outcome: Outcome, folder: ModelFolder, uri: str) -> str:
    """Log a run and give its id. The experiment is `ekiben-KIND`; the model folder is the artifact `model`.

    MLflow is imported here, as that takes seconds and only this step needs it.
    """
    os.environ.setdefault(
        "MLFLOW_DISABLE_TELEMETRY", "true"
    )  # read when mlflow is imported; nothing leaves the machine
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, InputTag
    from mlflow.entities.dataset import Dataset

    client = MlflowClient(tracking_uri=uri)
    run = client.create_run(_experiment(client, f"ekiben-{outcome.kind}", uri), run_name=outcome.kind)
    run_id = str(run.info.run_id)
    for name, parameter in outcome.parameters.items():
        client.log_param(run_id, name, parameter)
    for name, metric in outcome.metrics.items():
        client.log_metric(run_id, name, metric)
    client.set_tag(run_id, "ekiben.digest", folder.digest)
    client.set_tag(run_id, "ekiben.dataset", outcome.dataset_digest)
    data = Dataset(
        outcome.dataset, outcome.dataset_digest[:36], source_type="code", source=f"bentos.{outcome.kind}.data"
    )
    client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
    client.log_artifacts(run_id, str(folder.root), ARTIFACT)
    for name, picture in outcome.plots.items():
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / name
            path.write_bytes(picture)
            client.log_artifact(run_id, str(path), "plots")
    client.set_terminated(run_id)
    return run_id


def _experiment(client: MlflowClient, name: str, uri: str) -> str:  # type: ignore[name-defined]  # noqa: F821
    known = client.get_experiment_by_name(name)
    if known is not None:
        return str(known.experiment_id)
    # Without a location of its own, a SQLite store would put artifacts under the current folder.
    location = None
    if uri.startswith("sqlite:///"):
        location = (Path(uri.removeprefix("sqlite:///")).absolute().parent / "mlflow-artifacts" / name).as_uri()
    return str(client.create_experiment(name, artifact_location=location))
