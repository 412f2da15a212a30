"""MLflow: models, versions, tags, metrics and aliases as its own client and UI show them, and models of its runs.

For the versions the truth is in SQL; MLflow only repeats it. Importing MLflow takes seconds and much memory, so the
service runs this module as a command, with one JSON object a line: actions on standard input, `{"id": …}` on standard
output for each one done. Every action can be repeated. `fetch` (registry.runs) answers with what it brought, or with a
`problem` for the user.

    {"id": 7, "action": "version", "name": "churn", "number": 3, "version_id": "01J…", "source": "file:///…",
     "digest": "sha256:…", "kind": "lightgbm", "format": "lightgbm-text", "labels": {…}, "created": 1763…}
    {"id": 8, "action": "alias", "name": "churn", "version_id": "01J…", "alias": "live"}
    {"id": 9, "action": "labels", "name": "churn", "version_id": "01J…", "labels": {…}, "gone": ["stage"]}
    {"id": 10, "action": "delete", "name": "churn", "version_id": "01J…"}
    {"id": 1, "action": "fetch", "run_id": "…" | null, "artifact_path": "…" | null, "model_uri": "…" | null,
     "into": "/…", "max_bytes": 1000, "max_files": 10}
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from registry import runs
from registry.errors import EkibenError, InfrastructureError
from registry.origin import PATH_LABEL, RUN_LABEL

if TYPE_CHECKING:
    from mlflow import MlflowClient

_TAG = "ekiben.version_id"
_LONGEST_TAG = 5000


def apply(client: MlflowClient, action: dict[str, Any]) -> None:
    """Carry out one action; repeating it changes nothing."""
    known = _find(client, action["name"], action["version_id"])
    if action["action"] == "version":
        if known is None:
            _create(client, action)
    elif known is None:
        return  # deleted in the meantime, or not ours
    elif action["action"] == "labels":
        for key, value in action["labels"].items():
            client.set_model_version_tag(action["name"], known, key, value[:_LONGEST_TAG])
        for key in action.get("gone") or []:
            client.delete_model_version_tag(action["name"], known, key)
    elif action["action"] == "alias":
        client.set_registered_model_alias(action["name"], action["alias"], known)
    elif action["action"] == "delete":
        client.delete_model_version(action["name"], known)
    else:
        raise ValueError(f"unknown action {action['action']!r}")


def _find(client: MlflowClient, name: str, version_id: str) -> str | None:
    """MLflow's number of a version of ours."""
    found = client.search_model_versions(f"name = '{name}' and tags.`{_TAG}` = '{version_id}'", max_results=1)
    return str(found[0].version) if found else None


def _create(client: MlflowClient, action: dict[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(action["name"], tags={"ekiben": "true"})
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {
        _TAG: action["version_id"],
        "ekiben.version": str(action["number"]),
        "ekiben.digest": action["digest"],
        "ekiben.kind": action["kind"],
        "ekiben.format": action["format"],
        **{key: value[:_LONGEST_TAG] for key, value in action["labels"].items()},
    }
    run_id = _origin(client, action) or _run(client, action, tags)
    source = _source(client, action, run_id)
    made = client.create_model_version(action["name"], source=source, run_id=run_id, tags=tags)
    if str(made.version) != str(action["number"]):
        # Somebody else wrote versions under this name: the tag tells which of ours it is.
        logging.getLogger(__name__).warning(
            "%s/%s is version %s in MLflow", action["name"], action["number"], made.version
        )


def _source(client: MlflowClient, action: dict[str, Any], run_id: str | None) -> str:
    """Where the files are: this machine's own folder; a tracking server takes no such paths of its clients, so there it
    is the artifact that the version came from, or else a name of ours."""
    if not re.match(r"https?:", str(client.tracking_uri)):
        return str(action["source"])
    path = action["labels"].get(PATH_LABEL)
    if run_id is not None and run_id == action["labels"].get(RUN_LABEL) and path is not None:
        return f"runs:/{run_id}/{path}"
    return f"ekiben:/{action['name']}/{action['number']}"


def _origin(client: MlflowClient, action: dict[str, Any]) -> str | None:
    """The run that the version came from, where MLflow knows it."""
    from mlflow.exceptions import MlflowException

    run_id = action["labels"].get(RUN_LABEL)
    if run_id is None:
        return None
    try:
        return str(client.get_run(run_id).info.run_id)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    return None  # deleted for good, or a label of the user's own making


def _run(client: MlflowClient, action: dict[str, Any], tags: dict[str, str]) -> str | None:
    """A run that holds the labels that are numbers as metrics, where there are any."""
    metrics = {}
    for key, value in action["labels"].items():
        if key.startswith("mlflow."):
            continue  # an identity, even where it consists of digits
        try:
            metrics[key] = float(value)
        except ValueError:
            continue
    if not metrics:
        return None
    experiment = client.get_experiment_by_name("ekiben")
    identity = experiment.experiment_id if experiment is not None else client.create_experiment("ekiben")
    existing = client.search_runs([identity], f"tags.`{_TAG}` = '{action['version_id']}'", max_results=1)
    run = (
        existing[0]
        if existing
        else client.create_run(identity, tags=tags, run_name=f"{action['name']}-{action['number']}")
    )
    for key, number in metrics.items():
        client.log_metric(run.info.run_id, key, number)
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def fetch(client: MlflowClient, action: dict[str, Any]) -> dict[str, Any]:
    """The answer to `fetch`. What is the user's fault is told as such; everything else is MLflow's."""
    try:
        return {"fetched": runs.fetch(client, action)}
    except EkibenError as error:
        return {"problem": error.problem()}
    except Exception as error:
        logging.getLogger(__name__).exception("a model could not be fetched")
        why = re.sub(r"//[^/@\s]*@", "//", " ".join(str(error).split()))[:300]  # without a password
        problem = InfrastructureError(
            "mlflow_unreachable",
            f"MLflow does not give the model: {type(error).__name__}: {why}",
            hint="Is the tracking server up, and may this service read its artifacts? mlflow.log tells more.",
        )
        return {"problem": problem.problem()}


def main() -> int:
    parser = argparse.ArgumentParser(description="Project versions into MLflow: actions as JSON lines on stdin.")
    # The service sets the variable: a URI may have a password, and every user of a machine sees arguments.
    given = os.environ.get("EKIBEN_MLFLOW_URI")
    parser.add_argument(
        "--uri", default=given, required=given is None, help="MLflow's tracking and registry URI (EKIBEN_MLFLOW_URI)"
    )
    arguments = parser.parse_args()
    client = runs.client_of(arguments.uri)
    for line in sys.stdin:
        action = json.loads(line)
        if action["action"] == "fetch":
            print(json.dumps({"id": action["id"], **fetch(client, action)}), flush=True)
            continue
        try:
            apply(client, action)
        except Exception as error:  # one that fails is tried again later; the others go on
            print(json.dumps({"id": action["id"], "error": f"{type(error).__name__}: {error}"[:500]}), flush=True)
        else:
            print(json.dumps({"id": action["id"]}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
