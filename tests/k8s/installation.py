"""The overlay `test` on a cluster of tests/cluster: images made and pushed, applied, everything Ready; and its use.

python -m tests.k8s.installation [--root FOLDER]
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import certifi
import httpx

from tests.cluster import cluster, programs
from tests.cluster.workloads import eventually

ROOT = Path(__file__).resolve().parents[2]
HOST = "localhost"
"""EKIBEN_INGRESS_HOST of the overlay `test`: calls to the ingress' address bear it in their header Host."""


@dataclass(frozen=True)
class Trained:
    """A model that was trained here: its file, rows, and what it gives for them."""

    file: Path
    rows: Sequence[Any]
    outputs: Sequence[Any]

    @property
    def sample(self) -> dict[str, Any]:
        """The field `sample` of an upload: serving must give the same."""
        return {"inputs": self.rows, "outputs": self.outputs}


@dataclass
class Installation:
    """An installation on a cluster, and a token of its own. `url` is the ingress'; `http` adds host and token."""

    cluster: cluster.Cluster
    token: str
    host: str = HOST
    http: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        headers = {"Host": self.host, "Authorization": f"Bearer {self.token}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=120)

    @classmethod
    def of(cls, target: cluster.Cluster, user: str = "tests", host: str = HOST) -> Installation:
        """What `install` made, with a new token."""
        made = cls(target, new_token(target, user), host)
        eventually(lambda: made.http.get("/readyz").status_code == 200, seconds=120)
        return made

    @property
    def url(self) -> str:
        return self.cluster.ingress_url

    def call(self, method: str, path: str, **options: Any) -> Any:
        """The answer's JSON; AssertionError with the body where it is an error."""
        answer = self.http.request(method, path, **options)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def push(self, file: Path, name: str, *, wait: float = 0, **fields: Any) -> dict[str, Any]:
        """POST /models: the version. Fields that are no text are sent as JSON."""
        form = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
        with file.open("rb") as stream:
            sent = {"file": (file.name, stream)}
            path = f"/models?wait={wait:g}" if wait else "/models"
            found = self.call("POST", path, files=sent, data={"name": name, **form}, timeout=120 + wait)
        return dict(found)

    def version(self, name: str, number: int) -> dict[str, Any]:
        return dict(self.call("GET", f"/models/{name}/versions/{number}"))

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.call("GET", f"/deployments/{name}"))

    def events(self, name: str) -> list[dict[str, Any]]:
        """Newest first."""
        return list(self.call("GET", f"/deployments/{name}/events")["items"])

    def live(self, name: str, version: int | None = None, seconds: float = 300) -> dict[str, Any]:
        """The deployment, once that version (any) is live and a replica is ready; a failure is told with its events.
        The API may be away meanwhile."""

        def look() -> dict[str, Any] | None:
            answer = self.http.get(f"/deployments/{name}")
            if answer.status_code != 200:
                return None
            row = dict(answer.json())
            wanted = version is None or row["target"]["version"] == version
            if row["state"] == "live" and row["ready"] and wanted:
                return row
            number = version if version is not None else row["wanted"]["version"]
            answer = self.http.get(f"/models/{row['target']['model']}/versions/{number}")
            if answer.status_code != 200:
                return None
            state = dict(answer.json())
            assert state["state"] not in ("failed", "rolled_back"), self.story(name, state)
            return None

        try:
            return dict(eventually(look, seconds=seconds))
        except TimeoutError as error:
            raise AssertionError(f"{name} is not live: {error}; {self.story(name)}") from None

    def story(self, name: str, version: Mapping[str, Any] | None = None) -> str:
        """What a deployment has to say for itself."""
        told = {"version": version, "deployment": self.http.get(f"/deployments/{name}").json()}
        told["events"] = self.http.get(f"/deployments/{name}/events").json()
        pods = self.cluster.kubectl("get", "pods", "-A", "-o", "wide")
        return json.dumps(told, indent=1) + "\n" + pods

    def predict(self, name: str, rows: Sequence[Any]) -> httpx.Response:
        return self.http.post(f"/inference/{name}/predict", json={"inputs": list(rows)})

    def remove(self, name: str) -> None:
        """Delete the deployment and the model, where they are there."""
        for path in (f"/deployments/{name}", f"/models/{name}"):
            answer = self.http.delete(path)
            assert answer.is_success or answer.status_code == 404, f"{path}: {answer.status_code} {answer.text}"


def new_token(target: cluster.Cluster, user: str) -> str:
    """As the README makes one."""
    command = ["ekiben-server", "token", "create", user]
    return target.kubectl("-n", "ekiben", "exec", "deploy/ekiben", "--", *command).split()[-1]


def install(target: cluster.Cluster, settings: Mapping[str, str] | None = None) -> None:
    """Bring the installation to this checkout; `settings` are laid over those of the overlay."""
    site = site_of(target)
    push_images(target, site)
    (site / "authorities.yaml").write_text(json.dumps(authorities(target)))
    complete(site, {**surroundings(target), **(settings or {})})
    bring_up(target, site)


def bring_up(target: cluster.Cluster, overlay: Path) -> None:
    """`make up PLATFORM=kubernetes OVERLAY=…`"""
    command = [sys.executable, "-m", "scripts.kubernetes", "up", "--overlay", str(overlay)]
    done = subprocess.run(command, cwd=ROOT, env=environment(target), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def site_of(target: cluster.Cluster) -> Path:
    """The folder of the overlay that is applied: `test`, pinned images, this machine's way out."""
    return (target.root or Path(tempfile.gettempdir())) / "ekiben-site"


def environment(target: cluster.Cluster) -> dict[str, str]:
    """A shell in which `kubectl` and `make up PLATFORM=kubernetes` mean this cluster and its overlay."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("EKIBEN_", "MAKE"))}
    path = f"{Path(sys.executable).parent}:{target.kubectl_program.parent}:{os.environ['PATH']}"
    return found | {"PATH": path, "KUBECONFIG": str(target.kubeconfig), "OVERLAY": str(site_of(target))}


def push_images(target: cluster.Cluster, site: Path) -> None:
    """`make images`, pushed to where the nodes pull, and an overlay in `site` that pins them by digest in `test`."""
    make_images(["--push", target.registry.push, "--insecure"], site)


def make_images(
    argv: Sequence[str], site: Path, overlay: Path | None = None, env: Mapping[str, str] | None = None
) -> None:
    """`make images` of this checkout, and an overlay in `site` that pins them by digest in `overlay`."""
    command = [sys.executable, "-m", "scripts.images", *argv, "--kustomization", str(site)]
    command += ["--overlay", str(overlay)] if overlay is not None else []
    with (programs.cache() / ".images.lock").open("w") as lock:  # several clusters may be tested at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **(env or {})})


def surroundings(target: cluster.Cluster) -> dict[str, str]:
    """What pods need of this machine to reach a package index: proxies, and the index where it is not the usual one."""
    found = target.environment["variables"]
    names = {
        "EKIBEN_HTTP_PROXY": "HTTP_PROXY",
        "EKIBEN_HTTPS_PROXY": "HTTPS_PROXY",
        "EKIBEN_NO_PROXY": "NO_PROXY",
        "EKIBEN_INDEX_URL": "UV_DEFAULT_INDEX",
    }
    return {setting: found[name] for setting, name in names.items() if name in found}


def complete(site: Path, settings: Mapping[str, str]) -> None:
    file = site / "kustomization.yaml"
    overlay = json.loads(file.read_text())
    overlay["resources"].append("authorities.yaml")
    overlay["configMapGenerator"] = [
        {
            "name": "ekiben-settings",
            "namespace": "ekiben",
            "behavior": "merge",
            "literals": [f"{name}={value}" for name, value in sorted(settings.items())],
        }
    ]
    file.write_text(json.dumps(overlay))


def authorities(target: cluster.Cluster, more: str = "") -> dict[str, object]:
    """The ConfigMaps `ekiben-ca`: the authorities that this machine trusts, a company's proxy among them, and more."""
    text = Path(target.environment["ca_bundle"] or certifi.where()).read_text() + more
    made = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "ekiben-ca", "namespace": namespace},
            "data": {"ca.crt": text},
        }
        for namespace in ("ekiben", "ekiben-builds")
    ]
    return {"apiVersion": "v1", "kind": "List", "items": made}


def ready(target: cluster.Cluster, seconds: int = 240) -> None:
    """Every part is rolled out."""
    for what in target.kubectl("-n", "ekiben", "get", "deployments,statefulsets", "-o", "name").split():
        target.kubectl("-n", "ekiben", "rollout", "status", what, f"--timeout={seconds}s", timeout=seconds + 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=cluster.ROOT)
    asked = parser.parse_args()
    found = cluster.find(asked.root)
    if found is None:
        raise SystemExit("no cluster runs: python -m tests.cluster up")
    install(found)


if __name__ == "__main__":
    main()
