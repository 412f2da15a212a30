"""The upload of a trained model, by the same door as any user's, and its release if it is not worse than what is live.

The service's API is all that is used (docs/design.md §10), so that the service may be anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from bentos.serving.model import ModelFolder, write_model
from bentos.training import own_token
from bentos.training.gate import Decision, Gate
from bentos.training.outcome import Outcome

if TYPE_CHECKING:
    import httpx

_FINAL = frozenset(("live", "failed", "rolled_back", "superseded"))
_POLL = 0.5  # seconds between two looks at a rollout


class RegistrationError(Exception):
    """The service refused the model, or could not be reached. The text says what to do next."""


@dataclass(frozen=True)
class Service:
    """A running Ekiben as training programs use it. `wait`: seconds that a build or a rollout may take.

    Without a token, that of the service on this machine is used if the URL leads there.
    """

    url: str
    token: str | None
    wait: int = 300

    def live(self, name: str) -> dict[str, Any] | None:
        """The version that the deployment of this name serves, or None where it serves none."""
        deployed = self._call("GET", f"/deployments/{name}", missing=True)
        if deployed is None:
            return None
        target = deployed["target"]
        version = self._call("GET", f"/models/{target['model']}/versions/{target['version']}")
        return version if version is not None and version["state"] == "live" else None

    def newest(self, name: str) -> dict[str, Any] | None:
        """The newest version of a model, live or not."""
        known = self._call("GET", f"/models/{name}", missing=True)
        return None if known is None else dict(known["items"][0])

    def download(self, version: Mapping[str, Any], into: Path) -> ModelFolder:
        """The model folder of a version, each file checked against its SHA-256; without its sample."""
        files = {}
        for number, file in enumerate(version["files"]):
            target = into / "downloads" / str(number)
            target.parent.mkdir(parents=True, exist_ok=True)
            path = quote(file["path"])
            self._download(f"/models/{version['model']}/versions/{version['version']}/files/{path}", target)
            if hashlib.sha256(target.read_bytes()).hexdigest() != file["sha256"]:
                raise RegistrationError(f"{file['path']} of version {version['version']} came damaged; try again")
            files[file["path"]] = target
        return write_model(into / "model", kind=version["kind"], format=version["format"], files=files)

    def upload(self, outcome: Outcome, folder: ModelFolder, deploy: bool) -> dict[str, Any]:
        """POST the model with its sample, expected values and metrics; wait until it is built, or live.

        Gives the Version (docs/design.md §10). Raises RegistrationError, also where the build or the rollout failed.
        """
        form = {
            "name": outcome.name,
            "kind": outcome.kind,
            "labels": json.dumps(outcome.labels, sort_keys=True),
            "deploy": "true" if deploy else "false",
        }
        with contextlib.ExitStack() as open_files:
            files = [
                *((name, (f"{name}.json", folder.root / f"{name}.json")) for name in ("sample", "expected")),
                *(("file", (name, folder.path(name))) for name in folder.files),
            ]
            streams = [
                (field, (name, open_files.enter_context(path.open("rb")), "application/octet-stream"))
                for field, (name, path) in files
                if path.exists()
            ]
            version = self._call("POST", f"/models?wait={self.wait}", data=form, files=streams)
        return _whole(version)

    def label(self, version: Mapping[str, Any], labels: Mapping[str, str | None]) -> dict[str, Any]:
        """Set labels of a version; None takes one away."""
        path = f"/models/{version['model']}/versions/{version['version']}"
        return _present(self._call("PATCH", path, json={"labels": dict(labels)}))

    def release(self, version: Mapping[str, Any]) -> dict[str, Any]:
        """Have the deployment of the model's name serve this version, with the settings it has; wait until it does."""
        name = str(version["model"])
        wanted: dict[str, Any] = {"version": version["version"]}
        deployed = self._call("GET", f"/deployments/{name}", missing=True)
        if deployed is not None:
            wanted |= {each: deployed[each] for each in ("replicas", "strategy", "autoscale")}
            resources = dict(deployed["resources"])
            wanted["resources"] = resources | ({"gpu": int(resources["gpu"])} if "gpu" in resources else {})
        self._call("PUT", f"/deployments/{name}", json=wanted)
        until = time.monotonic() + self.wait
        while True:
            current = _present(self._call("GET", f"/models/{name}/versions/{version['version']}"))
            if current["state"] in _FINAL or time.monotonic() > until:
                return _whole(current)
            time.sleep(_POLL)

    # --- the wire ---------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _client(self) -> Iterator[httpx.Client]:
        import httpx

        # A proxy that the machine is told to use for the world cannot reach a service on this machine.
        local = httpx.URL(self.url).host in ("localhost", "127.0.0.1", "::1")
        home = Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser()
        own = own_token.of_service(self.url, home) if not self.token else None
        address, token = own or (self.url.rstrip("/"), self.token)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        try:
            with httpx.Client(
                base_url=address,
                headers=headers,
                timeout=httpx.Timeout(30, read=self.wait + 30),
                trust_env=not local,
            ) as client:
                yield client
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RegistrationError(f"{self.url} cannot be reached: {error}; is the service up (ekiben up)?") from error

    def _call(self, method: str, path: str, *, missing: bool = False, **options: Any) -> dict[str, Any] | None:
        with self._client() as client:
            answer = client.request(method, path, **options)
            if missing and answer.status_code == 404:
                return None
            _check(answer)
            return dict(answer.json())

    def _download(self, path: str, target: Path) -> None:
        with self._client() as client, client.stream("GET", path) as answer:
            if answer.status_code >= 400:
                answer.read()
            _check(answer)
            with target.open("wb") as out:
                for chunk in answer.iter_bytes():
                    out.write(chunk)


def register(outcome: Outcome, folder: ModelFolder, url: str, token: str | None, wait: int = 300) -> dict[str, Any]:
    """Upload a model and have it served under its kind's name. Raises RegistrationError."""
    return Service(url, token, wait).upload(outcome, folder, deploy=True)


def register_behind(
    gate: Gate, outcome: Outcome, folder: ModelFolder, service: Service, say: Callable[[str], None]
) -> tuple[dict[str, Any], Decision | None]:
    """Upload a model, compare it with what is live, record what the gate says, and release it if the gate holds.

    Gives the Version and the decision; None where the very same model is live already. What is recorded before the
    release is what the release follows: a program that ends in between finds both again when it is repeated.
    """
    live = service.live(outcome.name)
    version = service.upload(outcome, folder, deploy=False)
    if live is not None and live["model"] == version["model"] and live["version"] == version["version"]:
        return version, None
    value = gate.figure(folder)
    beside = None
    if live is not None:
        if live["kind"] != outcome.kind:
            raise RegistrationError(
                f"the deployment {outcome.name} serves a model of kind {live['kind']}, which cannot be compared; "
                f"release the version yourself: ekiben deploy {outcome.name} --version {version['version']}"
            )
        with tempfile.TemporaryDirectory(prefix="ekiben-live-") as scratch:
            say(f"evaluating live version {live['version']} on the same held-out data")
            beside = gate.figure(service.download(live, Path(scratch)))
    decision = gate.decide(value, beside, None if live is None else int(live["version"]))
    version = service.label(version, decision.labels)
    if decision.holds:
        version = service.release(version)
    return version, decision


def _check(answer: httpx.Response) -> None:
    if answer.status_code < 400:
        return
    try:
        body = answer.json()
    except ValueError:
        body = {}
    said = body.get("detail") or answer.text[:300]
    hint = body.get("hint")
    where = str(answer.request.url.copy_with(query=None))
    raise RegistrationError(f"{where} answered {answer.status_code}: {said}" + (f"\n{hint}" if hint else ""))


def _present(version: dict[str, Any] | None) -> dict[str, Any]:
    assert version is not None
    return version


def _whole(version: dict[str, Any] | None) -> dict[str, Any]:
    found = _present(version)
    if found.get("state") in ("failed", "rolled_back"):
        raise RegistrationError(f"version {found.get('version')} is {found['state']}: {found.get('reason')}")
    return found


def how_to_upload(folder: Path, files: Collection[str], name: str, kind: str) -> str:
    """The two commands that upload a model folder by hand."""
    sample, expected = folder / "sample.json", folder / "expected.json"
    model = folder / "files"
    parts = " ".join(f"-F 'file=@{model / name};filename={name}'" for name in files)
    if len(files) == 1:
        model /= next(iter(files))
        parts = f"-F file=@{model}"
    return (
        f"ekiben push {model} --name {name} --kind {kind} --sample {sample} --expected {expected}\n"
        f"curl -F name={name} -F kind={kind} -F sample=@{sample} -F expected=@{expected} "
        f"{parts} 'http://localhost:8000/models?wait=120'"
    )
