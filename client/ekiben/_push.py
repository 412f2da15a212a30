"""`ekiben.push`: from a trained model in a notebook to an endpoint."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ekiben import _export, _sample
from ekiben._client import Client
from ekiben._deployment import Deployment
from ekiben._errors import UsageError


def push(
    model: Any,
    *,
    name: str | None = None,
    kind: str | None = None,
    sample: Any = None,
    expected: Any = None,
    requirements: str | os.PathLike[str] | Sequence[str] | None = None,
    labels: Mapping[str, str] | None = None,
    wait: float = 120,
    url: str | None = None,
    force: bool = False,
    client: Client | None = None,
) -> Deployment:
    """Serve a model and return its endpoint once it is live.

    `model` is a trained model (LightGBM, XGBoost, scikit-learn, Keras, torch, ONNX, a pipeline of transformers), the
    path of a model file or project folder, or the URI of a model in the server's MLflow: `runs:/RUN_ID/model`,
    `models:/churn/3`, or `model_info.model_uri`.
    `sample` is some rows it can predict (a pandas DataFrame, a NumPy array, a list): a model object predicts them here,
    and the version goes live only if the served model gives the same. `expected` overrides these outputs; for a file it
    is what the sample should give. `requirements` is a requirements file, a pylock.toml, a uv.lock, or a list of
    requirements. `wait` is in seconds. `force` accepts a version whose inputs are not compatible with the running one.

        deployment = ekiben.push(model, name="churn", sample=X_test[:100])
        deployment.predict(X_test)

    Raises an `ekiben.EkibenError`: VersionFailed when the build or the check of the sample fails, StillWorking when the
    time to wait is over.
    """
    connected = client or Client(url)
    with tempfile.TemporaryDirectory(prefix="ekiben-") as folder:
        uri = model if isinstance(model, str) and model.startswith(("runs:/", "models:/")) else None
        if isinstance(model, (str, os.PathLike)):
            paths: tuple[Path, ...] = () if uri else (Path(model).expanduser(),)
            body = None if sample is None else _document(sample)
            outputs = None if expected is None else _answers(expected)
        else:
            if name is None and _export.is_model(model):
                raise UsageError(
                    "a model object has no name", code="no_name", field="name", hint='ekiben.push(model, name="churn")'
                )
            exported = _export.export(model, Path(folder), sample)
            paths, body = exported.files, exported.sample
            outputs = exported.expected if expected is None else _answers(expected)
        version = connected.upload(
            paths,
            model_uri=uri,
            name=name,
            kind=kind,
            sample=body,
            expected=outputs,
            requirements=_requirements(requirements, Path(folder)),
            labels=labels,
            force=force,
        )
    version = connected.wait(version, wait)
    return Deployment(connected, connected.deployment_state(str(version["model"])), version)


def _document(sample: Any) -> Any:
    """A sample for a file: a path of JSON is sent as it is, a table as rows."""
    if isinstance(sample, (str, os.PathLike)):
        return _read(Path(sample), "sample")
    return _sample.body(sample)


def _answers(expected: Any) -> Any:
    if isinstance(expected, (str, os.PathLike)):
        return _read(Path(expected), "expected")
    return expected if isinstance(expected, dict) else {"outputs": _sample.outputs(expected)}


def _read(path: Path, field: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", code="unreadable", field=field) from None


def _requirements(given: str | os.PathLike[str] | Sequence[str] | None, folder: Path) -> Path | None:
    if given is None:
        return None
    if isinstance(given, (str, os.PathLike)):
        return Path(given).expanduser()
    file = folder / "requirements.txt"
    file.write_text("".join(f"{line}\n" for line in given), "utf-8")
    return file
