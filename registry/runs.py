"""Models of MLflow's runs and of its registry: where each is, and what is remembered of it.

Used by `registry.catalogue`, which talks to MLflow for the service, and as a command that brings a model folder here:

    python -m registry.runs 0f3c… FOLDER                        a training run's model
    python -m registry.runs models:/ranker/3 FOLDER             a version, as MLflow numbers it
    python -m registry.runs models:/ranker@live FOLDER          whatever has the alias

Nothing is ever unpickled or imported: `registry.artifacts` brings files, and each is checked against the manifest.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from registry import artifacts
from registry.checkout import checkout
from registry.errors import EkibenError, UserError
from registry.manifest import check_path
from registry.origin import LOGGED_URI, PATH_LABEL, RUN_LABEL, RUN_URI, VERSION_URI, Source

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_LONGEST_LABEL = 255
_MOST_SHOWN = 10


def fetch(client: MlflowClient, order: dict[str, Any]) -> dict[str, Any]:
    """Download a model's files to `into`/files, and its sample to `into`/sample.json (`example.json` where it is only
    MLflow's input example). The answer is what else is known of it: name, kind, flavour and labels."""
    source = Source(order["run_id"], order["artifact_path"], order["model_uri"])
    place = _of_uri(client, source.model_uri) if source.model_uri else _of_run(client, source)
    _refuse_local(client, place)
    brought = artifacts.bring(place, Path(order["into"]), int(order["max_bytes"]), int(order["max_files"]))
    labels = {key: value for key, value in place.labels.items() if len(value) <= _LONGEST_LABEL}
    return {"name": place.name, **asdict(brought), "labels": labels}


def load(client: MlflowClient, named: str, into: Path) -> Path:
    """Bring a model folder (docs/design.md §4) to `into`, which must not be there yet, every file as it was saved.

    `named` is the ID of a run of a training program, `runs:/ID/PATH`, `models:/NAME/VERSION` or `models:/NAME@ALIAS`.
    Raises UserError for what is not there or is no model folder, InfrastructureError for a file that was changed.
    """
    if into.exists():
        raise UserError("folder_exists", f"{into} is there already.", field="into", hint="Name a new folder.")
    source = Source.of(None, None, named) if ":" in named else Source.of(named, None, None)
    place = _of_uri(client, source.model_uri) if source.model_uri else _of_run(client, source)
    _refuse_local(client, place)
    place = _whole(client, place)
    into.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ekiben-load-", dir=into.parent) as scratch:
        return checkout(artifacts.opener(place, Path(scratch)), "", into)


def _whole(client: MlflowClient, place: artifacts.Place) -> artifacts.Place:
    """The model folder itself: versions of the service name its `files`, beside which is the rest."""
    if artifacts.exists(place.repository, f"{place.path}/manifest.json".strip("/")):
        return place
    location = str(place.repository.artifact_uri).rstrip("/")
    if not place.path and location.endswith("/files"):
        above = artifacts.Place(_repository(client, location.removesuffix("/files")), "", place.name, place.labels)
        if artifacts.exists(above.repository, "manifest.json"):
            return above
    raise UserError(
        "no_model_folder", "What MLflow has there is no model folder: it has no manifest.json.", field="model",
        hint="Have it served by its run: POST /models with run_id=…; or train it with python -m bentos.KIND.train.",
    )  # fmt: skip


# --- where it is -----------------------------------------------------------------------------------------------------


def _of_run(client: MlflowClient, source: Source) -> artifacts.Place:
    assert source.run_id is not None
    run = _run(client, source.run_id)
    logged = _logged_models(client, run)
    repository = _repository(client, str(run.info.artifact_uri))
    path = source.artifact_path
    if path is None:
        path = _only_model(source.run_id, logged, run, repository)
    labels = {RUN_LABEL: source.run_id, PATH_LABEL: path}
    first, _, rest = path.partition("/")
    if first in logged:
        model = logged[first]
        place = artifacts.Place(
            _repository(client, str(model.artifact_location)),
            rest,
            _telling(path),
            {**labels, "mlflow.model_id": str(model.model_id)},
        )
        if not rest or artifacts.exists(place.repository, rest):
            return place
    elif artifacts.exists(repository, path):
        return artifacts.Place(repository, path, _telling(path), labels)
    there = _shown([*logged, *artifacts.tops(repository)])
    raise UserError(
        "artifact_not_found", f"Run {source.run_id} has no artifact {path!r}.", field="artifact_path",
        hint=f"It has: {there}." if there else "It has no artifacts at all: log the model first.",
    )  # fmt: skip


def _run(client: MlflowClient, run_id: str) -> Run:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage != "deleted":
            return run
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    raise UserError(
        "run_not_found", f"MLflow has no run {run_id!r}.", field="run_id",
        hint="Is the run in the MLflow that this service uses? The operator sets it by EKIBEN_MLFLOW_URI.",
    )  # fmt: skip


def _logged_models(client: MlflowClient, run: Run) -> dict[str, LoggedModel]:
    """By name, the newest of each name; MLflow 3 keeps them beside the run's own artifacts."""
    outputs = run.outputs.model_outputs if run.outputs is not None else []
    models = [client.get_logged_model(each.model_id) for each in outputs[: 10 * _MOST_SHOWN]]
    return {str(model.name): model for model in sorted(models, key=lambda model: int(model.creation_timestamp))}


def _only_model(run_id: str, logged: dict[str, LoggedModel], run: Run, repository: ArtifactRepository) -> str:
    """The path of the run's one model, wherever the MLflow that logged it has put it."""
    paths = list(logged)
    if not paths:
        with suppress(ValueError, TypeError, KeyError):  # MLflow 1 and 2
            history = json.loads(run.data.tags.get("mlflow.log-model.history", "[]"))
            paths = list(dict.fromkeys(str(entry["artifact_path"]) for entry in history))
    tops = artifacts.tops(repository)
    if not paths:
        paths = [top for top in tops[:100] if artifacts.holds_model(repository, top)]
    if len(paths) == 1:
        return check_path(paths[0], code="bad_artifact_path", field="artifact_path")
    if paths:
        raise UserError(
            "several_run_models", f"Run {run_id} has several models: {_shown(paths)}.", field="artifact_path",
            hint=f"Name one of them: artifact_path={paths[0][:100]}.",
        )  # fmt: skip
    raise UserError(
        "no_run_model", f"Run {run_id} has no model.", field="run_id",
        hint=f"Its artifacts are {_shown(tops)}: name one by artifact_path=…." if tops
        else "Log one first, for instance: mlflow.lightgbm.log_model(booster, name='model').",
    )  # fmt: skip


def _of_uri(client: MlflowClient, uri: str) -> artifacts.Place:
    from mlflow.exceptions import MlflowException

    try:
        if logged := LOGGED_URI.fullmatch(uri):
            model = client.get_logged_model(logged["id"])
            labels = {"mlflow.model_uri": uri, "mlflow.model_id": str(model.model_id)}
            return _placed(client, str(model.artifact_location), _telling(str(model.name)), labels, model.source_run_id)
        found = VERSION_URI.fullmatch(uri)
        assert found is not None
        name, alias, number = found["name"], found["alias"], found["version"]
        if alias is not None:
            version = client.get_model_version_by_alias(name, alias)
        elif number == "latest":
            every = client.search_model_versions(f"name = '{name.replace(chr(39), '')}'")
            if not every:
                raise _no_version(uri)
            version = max(every, key=lambda each: int(each.version))
        else:
            version = client.get_model_version(name, number)
        location = str(client.get_model_version_download_uri(name, str(version.version)))
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise _no_version(uri) from error
        raise
    labels = {"mlflow.model_uri": f"models:/{name}/{version.version}"}
    if inner := LOGGED_URI.fullmatch(location):
        model = client.get_logged_model(inner["id"])
        location, labels["mlflow.model_id"] = str(model.artifact_location), str(model.model_id)
    elif of_run := RUN_URI.fullmatch(location):
        place = _of_run(client, Source.of(of_run["run"], of_run["path"], None))
        return artifacts.Place(place.repository, place.path, name, {**place.labels, **labels})
    return _placed(client, location, name, labels, version.run_id)


def _placed(
    client: MlflowClient, location: str, name: str | None, labels: dict[str, str], run_id: str | None
) -> artifacts.Place:
    if run_id:
        labels = {RUN_LABEL: str(run_id), **labels}
    return artifacts.Place(_repository(client, location), "", name, labels)


def _no_version(uri: str) -> UserError:
    return UserError(
        "mlflow_model_not_found", f"MLflow's registry has no {uri!r}.", field="model_uri",
        hint="mlflow's Models page lists names, versions and aliases.",
    )  # fmt: skip


def _repository(client: MlflowClient, location: str) -> ArtifactRepository:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    return get_artifact_repository(location, tracking_uri=client.tracking_uri)


def _refuse_local(client: MlflowClient, place: artifacts.Place) -> None:
    """A tracking server that others write to must not name files of this machine."""
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    if isinstance(place.repository, LocalArtifactRepository) and re.match(r"https?:", str(client.tracking_uri)):
        raise UserError(
            "mlflow_artifacts_local",
            "The run's artifacts are on a disk of the machine that wrote them; the tracking server does not hand "
            "them out.",
            field="run_id",
            hint="Start it with mlflow server --serve-artifacts (its default) and log again, or push the file itself.",
        )


def _telling(path: str) -> str | None:
    """A name for the model, where the path tells one: `model` is what everybody's is called."""
    last = path.rpartition("/")[2]
    return None if last.partition(".")[0] in ("model", "") else last


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(name[:100] for name in names[:_MOST_SHOWN]) + more


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m registry.runs", description="Bring a model folder out of MLflow: a run's, or a version's."
    )
    parser.add_argument("model", help="RUN_ID, runs:/RUN_ID/PATH, models:/NAME/VERSION or models:/NAME@ALIAS")
    parser.add_argument("into", type=Path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--uri", help="MLflow (default: the SQLite file mlflow.db in EKIBEN_HOME, ~/.ekiben)")
    options = parser.parse_args(arguments)
    home = Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser().absolute()
    try:
        print(load(client_of(options.uri or f"sqlite:///{home / 'mlflow.db'}"), options.model, options.into))
    except EkibenError as error:
        print(f"{error.detail} [{error.code}]" + (f"\n{error.hint}" if error.hint else ""), file=sys.stderr)
        return 1
    return 0


def client_of(uri: str) -> MlflowClient:
    """A client of MLflow's tracking and registry; takes seconds."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
    import mlflow
    from mlflow import MlflowClient

    mlflow.set_tracking_uri(uri)  # some of MLflow's own parts ask for what is set, not for the client's
    mlflow.set_registry_uri(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


if __name__ == "__main__":
    sys.exit(main())
