"""The upload of a trained model, by the same door as any user's."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bentos.serving.model import ModelFolder
from bentos.training.outcome import Outcome


class RegistrationError(Exception):
    """The service refused the model, or could not be reached. The text says what to do next."""


def register(outcome: Outcome, folder: ModelFolder, url: str, token: str | None, wait: int = 300) -> dict[str, Any]:
    """POST the model with its sample, expected values and metrics; wait up to `wait` seconds until it is live.

    Returns the Version (docs/design.md §10). Raises RegistrationError.
    """
    import httpx

    files = [
        ("sample", ("sample.json", (folder.root / "sample.json").read_bytes(), "application/json")),
        ("expected", ("expected.json", (folder.root / "expected.json").read_bytes(), "application/json")),
        *(("file", (name, folder.path(name).read_bytes(), "application/octet-stream")) for name in folder.files),
    ]
    form = {"name": outcome.kind, "kind": outcome.kind, "labels": json.dumps(outcome.labels, sort_keys=True)}
    headers = {"authorization": f"Bearer {token}"} if token else {}
    target = f"{url.rstrip('/')}/models"
    # A proxy that the machine is told to use for the world cannot reach a service on this machine.
    local = httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
    try:
        with httpx.Client(timeout=httpx.Timeout(30, read=wait + 30), trust_env=not local) as client:
            answer = client.post(target, params={"wait": str(wait)}, data=form, files=files, headers=headers)
    except httpx.HTTPError as error:
        raise RegistrationError(f"{target} cannot be reached: {error}; is the service up (ekiben up)?") from error
    try:
        body = answer.json()
    except ValueError:
        body = {}
    if answer.status_code >= 400:
        said = body.get("detail") or answer.text[:300]
        hint = body.get("hint")
        raise RegistrationError(f"{target} answered {answer.status_code}: {said}" + (f"\n{hint}" if hint else ""))
    if body.get("state") in ("failed", "rolled_back"):
        raise RegistrationError(f"version {body.get('version')} is {body['state']}: {body.get('reason')}")
    return dict(body)


def how_to_upload(folder: Path, files: Collection[str], kind: str) -> str:
    """The two commands that upload a model folder by hand."""
    sample, expected = folder / "sample.json", folder / "expected.json"
    model = folder / "files"
    parts = " ".join(f"-F 'file=@{model / name};filename={name}'" for name in files)
    if len(files) == 1:
        model /= next(iter(files))
        parts = f"-F file=@{model}"
    return (
        f"ekiben push {model} --name {kind} --kind {kind} --sample {sample} --expected {expected}\n"
        f"curl -F name={kind} -F kind={kind} -F sample=@{sample} -F expected=@{expected} "
        f"{parts} 'http://localhost:8000/models?wait=120'"
    )
