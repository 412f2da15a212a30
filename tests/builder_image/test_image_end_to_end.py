"""An image as a user gets it: from a running server and from a Bento of their own, started under podman as nobody in
particular, with a read-only root, no capabilities and no network but this host's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.podman import Podman

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.needs_podman, pytest.mark.needs_registry, pytest.mark.slow, pytest.mark.timeout(900)]

OWN_SERVICE = """
import bentoml

@bentoml.service(image=bentoml.images.Image(python_version="3.11"))
class Own:
    factor = bentoml.models.BentoModel("own-factor:latest")

    def __init__(self) -> None:
        with open(self.factor.path_of("factor.txt")) as file:
            self.by = float(file.read())

    @bentoml.api(route="/predict")
    def predict(self, inputs: list[float]) -> dict[str, list[float]]:
        return {"outputs": [self.by * each for each in inputs]}
"""
OWN_MODEL = """
import bentoml
with bentoml.models.create("own-factor") as made, open(made.path_of("factor.txt"), "w") as file:
    file.write("3")
"""


class User:
    """Somebody with a home of their own and the commands `ekiben` and `bentoml`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("EKIBEN_", "BENTOML_"))}
        self.env = {
            **kept, "HOME": str(home), "EKIBEN_MLFLOW": "false", "BENTOML_DO_NOT_TRACK": "True",
            "UV_CACHE_DIR": kept.get("UV_CACHE_DIR") or str(Path.home() / ".cache" / "uv"),
        }  # fmt: skip

    def run(self, *words: str | Path, fails: bool = False, cwd: Path | None = None) -> str:
        """What a command says; on standard error where it should fail."""
        program = Path(sys.executable).with_name(str(words[0]))
        done = subprocess.run(
            [program, *words[1:]], env=self.env, cwd=cwd or self.home, capture_output=True, text=True, check=False
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stderr if fails else done.stdout


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    home = tmp_path / "home"
    home.mkdir()
    found = User(home)
    found.env["EKIBEN_URL"] = f"http://localhost:{_free_port()}"
    yield found
    state = home / ".ekiben" / "up.json"
    if state.exists():
        os.kill(json.loads(state.read_text())["pid"], signal.SIGTERM)


StartImage = Callable[..., str]


@pytest.fixture
def start_image(tmp_path: Path) -> Iterator[StartImage]:
    """start_image(reference, archive=None, env={}, mounts={}) → the URL of a container that is ready."""
    podman = Podman(tmp_path / "podman")

    def start(
        reference: str,
        archive: Path | None = None,
        env: Mapping[str, str] | None = None,
        mounts: Mapping[Path, str] | None = None,
    ) -> str:
        if archive is not None:
            podman("load", "-q", "-i", archive)
        else:
            podman("pull", "-q", "--tls-verify=false", reference)
        port = str(_free_port())
        options = ["--network=host", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", "--user", "23456:34567"]
        options += ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
        for name, value in {"EKIBEN_PORT": port, "BENTOML_PORT": port, **(env or {})}.items():
            options += ["--env", f"{name}={value}"]
        for place, inside in (mounts or {}).items():
            options += ["--volume", f"{place}:{inside}:ro"]
        name = podman("run", "--detach", *options, reference)
        for _ in range(600):
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200:
                    return f"http://127.0.0.1:{port}"
            except httpx.TransportError:
                running = podman("inspect", "--format", "{{.State.Running}}", name)
                assert running == "true", podman.logs(name)
            time.sleep(0.1)
        raise AssertionError(podman.logs(name))

    yield start
    podman.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _example(folder: Path) -> dict[str, Any]:
    """A small LightGBM model in a model folder; what it must answer to its sample."""
    subprocess.run([sys.executable, "-m", "bentos.lightgbm.example", folder], cwd=REPOSITORY, check=True)
    answer: dict[str, Any] = json.loads((folder / "expected.json").read_text())
    return answer


def _ask(url: str, body: bytes) -> Any:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{url}/predict", content=body, headers=headers, trust_env=False, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def _inspect(*words: str) -> dict[str, Any]:
    program = shutil.which("skopeo")
    if program is None:
        return {}
    done = subprocess.run([program, "inspect", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _name_in(archive: Path) -> str:
    listed = subprocess.run(["tar", "-xOf", archive, "manifest.json"], capture_output=True, check=True)
    return str(json.loads(listed.stdout)[0]["RepoTags"][0])


def test_a_pushed_model_becomes_an_image_that_runs_anywhere(
    user: User, tmp_path: Path, debian_base: Path, registry_server: Any, start_image: StartImage
) -> None:
    expected = _example(tmp_path / "model")
    sample = (tmp_path / "model" / "sample.json").read_bytes()
    user.run("ekiben", "up", "--port", user.env["EKIBEN_URL"].rpartition(":")[2])
    files = tmp_path / "model" / "files" / "churn.txt"
    user.run("ekiben", "push", files, "--sample", tmp_path / "model" / "sample.json")
    said = user.run("ekiben", "image", "churn", "--output", "churn.tar", fails=True)
    assert "base_missing" in said
    assert "ekiben base import" in said
    assert "Python 3.11" in user.run("ekiben", "base", "import", debian_base)
    assert "default" in user.run("ekiben", "base", "list")
    user.run("ekiben", "image", "churn", "--output", "churn.tar")
    archive = user.home / "churn.tar"
    url = start_image(_name_in(archive), archive)
    assert _ask(url, sample)["outputs"] == pytest.approx(expected["outputs"])
    reference = f"{registry_server.host}/ekiben:churn-1"
    assert reference in user.run("ekiben", "image", "churn", "--push", reference)
    pushed = _inspect("--tls-verify=false", f"docker://{reference}")
    assert pushed.get("Digest") == _inspect(f"oci-archive:{archive}").get("Digest")
    other = start_image(reference, env={"EKIBEN_MODEL_NAME": "churn", "EKIBEN_URL_PREFIX": "/inference/churn"})
    assert _ask(f"{other}/inference/churn", sample)["outputs"] == pytest.approx(expected["outputs"])

    (user.home / "notes.tar").write_text("mine")
    assert "output_exists" in user.run("ekiben", "image", "churn", "--output", "notes.tar", fails=True)
    assert (user.home / "notes.tar").read_text() == "mine"
    assert "bad_output" in user.run("ekiben", "image", "churn", "--output", "churn.tar.gz", fails=True)
    said = user.run("ekiben", "image", "churn", "--push", f"127.0.0.1:{_free_port()}/x:1", fails=True)
    assert "registry_unreachable" in said
    assert "hint" in said


def test_bentos_that_bentoml_built_run_from_their_images(
    user: User, tmp_path: Path, debian_base: Path, registry_server: Any, start_image: StartImage
) -> None:
    assert "there is no Bento" in user.run("ekiben", "containerize", "own:latest", "--output", "x.tar", fails=True)
    own = tmp_path / "own"
    own.mkdir()
    (own / "service.py").write_text(OWN_SERVICE)
    (own / "bentofile.yaml").write_text("service: 'service:Own'\n")
    (own / "save.py").write_text(OWN_MODEL)
    user.run("python", own / "save.py")
    user.run("bentoml", "build", cwd=own)
    said = user.run("ekiben", "containerize", "own:latest", "--output", "own.tar", fails=True)
    assert "there is no base image yet" in said
    user.run("ekiben", "base", "import", debian_base)
    assert "own.tar" in user.run("ekiben", "containerize", "own:latest", "--output", "own.tar")
    _inspect(f"oci-archive:{user.home / 'own.tar'}")
    url = start_image(_name_in(user.home / "own.tar"), user.home / "own.tar")
    assert _ask(url, b'{"inputs": [1, 2.5]}') == {"outputs": [3.0, 7.5]}

    expected = _example(tmp_path / "model")
    user.run("bentoml", "build", cwd=REPOSITORY / "bentos" / "lightgbm")
    reference = f"{registry_server.host}/bentos/lightgbm:1"
    answer = json.loads(user.run("ekiben", "containerize", "lightgbm:latest", "--push", reference, "--json"))
    assert _inspect("--tls-verify=false", f"docker://{reference}").get("Digest", answer["digest"]) == answer["digest"]
    url = start_image(reference, mounts={tmp_path / "model": "/home/bentoml/model"})
    assert _ask(url, (tmp_path / "model" / "sample.json").read_bytes())["outputs"] == pytest.approx(expected["outputs"])
