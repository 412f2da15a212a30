"""Where a model is in MLflow: a run with a path, or a URI of its registry, checked for its form. Knows no MLflow."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from registry.errors import UserError
from registry.manifest import check_path

RUN_LABEL = "mlflow.run_id"
PATH_LABEL = "mlflow.artifact_path"

RUN_ID = re.compile(r"[A-Za-z0-9][\w-]{0,63}")
VERSION_URI = re.compile(r"models:/(?P<name>[^/:@]{1,255})(?:/(?P<version>\d{1,9}|latest)|@(?P<alias>[\w-]{1,255}))")
LOGGED_URI = re.compile(r"models:/(?P<id>m-[\w-]{1,64})")
RUN_URI = re.compile(r"runs:/(?P<run>[^/]+)/(?P<path>.+)")


@dataclass(frozen=True)
class Source:
    """Where a model is in MLflow: a run and perhaps a path in it, or a URI of its registry."""

    run_id: str | None = None
    artifact_path: str | None = None
    model_uri: str | None = None

    @classmethod
    def of(cls, run_id: str | None, artifact_path: str | None, model_uri: str | None) -> Source:
        """What a user asks for, checked for its form."""
        if model_uri is not None:
            if run_id is not None or artifact_path is not None:
                raise UserError(
                    "run_and_model_uri", "The model is named twice: by model_uri, and by run_id or artifact_path.",
                    field="model_uri", hint="Give one of them: model_uri=models:/churn/3, or run_id and artifact_path.",
                )  # fmt: skip
            if found := RUN_URI.fullmatch(model_uri):
                return cls.of(found["run"], found["path"], None)
            if not VERSION_URI.fullmatch(model_uri) and not LOGGED_URI.fullmatch(model_uri):
                raise UserError(
                    "bad_model_uri", f"{model_uri[:200]!r} is no URI of a model in MLflow.", field="model_uri",
                    hint="Use models:/NAME/VERSION, models:/NAME@ALIAS, models:/m-ID or runs:/RUN_ID/PATH.",
                )  # fmt: skip
            return cls(model_uri=model_uri)
        if run_id is None:
            raise UserError(
                "path_without_run", "There is an artifact path, but no run that it is of.", field="artifact_path",
                hint="Add run_id=… (MLflow shows it as the run's ID).",
            )  # fmt: skip
        if RUN_ID.fullmatch(run_id) is None:
            raise UserError(
                "bad_run_id", f"{run_id[:80]!r} is no ID of a run in MLflow.", field="run_id",
                hint="Take it from mlflow.active_run().info.run_id, or from the run's page in MLflow.",
            )  # fmt: skip
        if artifact_path is not None:
            artifact_path = check_path(artifact_path.rstrip("/"), code="bad_artifact_path", field="artifact_path")
        return cls(run_id, artifact_path)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def too_large(limit: int) -> UserError:
    return UserError(
        "artifact_too_large", f"The model in MLflow is larger than {limit} bytes.", field="artifact_path",
        hint="Raise EKIBEN_MAX_UPLOAD, if a model may be that large; or name the model's own file.", status=413,
    )  # fmt: skip
