"""Real parts for the builder's tests: a docker-registry process, small model folders, a small base."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from builder_image import image, layers, layout, tarball
from registry.digest import canonical_json


@dataclass
class RegistryServer:
    host: str
    folder: Path
    log: Path

    def requests(self, method: str) -> list[str]:
        """Paths of the requests with a method, from the registry's own access log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line.split(f'"{method} ')[1].split(" ")[0] for line in lines if f'"{method} ' in line]


StartRegistry = Callable[..., RegistryServer]


@pytest.fixture
def start_registry(tmp_path: Path) -> Iterator[StartRegistry]:
    """Start Debian's docker-registry on a free loopback port; keyword arguments are added to its configuration (YAML)."""
    program = shutil.which("docker-registry")
    if program is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")
    running: list[subprocess.Popen[bytes]] = []

    def start(auth: str = "", http: str = "", scheme: str = "http", verify: Any = True) -> RegistryServer:
        folder = tmp_path / f"registry-{len(running)}"
        folder.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        config = folder / "config.yml"
        config.write_text(
            "version: 0.1\nlog: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'data'}}}, delete: {{enabled: true}}}}\n"
            f"http:\n  addr: 127.0.0.1:{port}\n  secret: fixed\n{http}{auth}"
        )
        log = folder / "log"
        with log.open("wb") as out:
            process = subprocess.Popen([program, "serve", str(config)], stdout=out, stderr=out)
        running.append(process)
        for _ in range(200):
            try:
                httpx.get(f"{scheme}://127.0.0.1:{port}/v2/", verify=verify, trust_env=False)
                break
            except httpx.TransportError:
                if process.poll() is not None:
                    raise RuntimeError(f"docker-registry ended: {log.read_text()}") from None
                time.sleep(0.05)
        return RegistryServer(f"127.0.0.1:{port}", folder, log)

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


@pytest.fixture
def registry_server(start_registry: StartRegistry) -> RegistryServer:
    return start_registry()


@dataclass(frozen=True)
class ModelFolder:
    folder: Path
    manifest: dict[str, Any]

    def layer(self) -> layers.StreamedLayer:
        return layers.model(self.folder, self.manifest, canonical_json(self.manifest))


MakeModel = Callable[..., ModelFolder]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A model folder laid out as docs/design.md §4 with the given files."""

    def make(files: dict[str, bytes] | None = None, where: str = "model") -> ModelFolder:
        folder = tmp_path / where
        files = {"churn.txt": b"tree\n" * 1000} if files is None else files
        for path, data in files.items():
            (folder / "files" / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / "files" / path).write_bytes(data)
        sample = b'{"inputs":[[1.0]]}'
        (folder / "sample.json").write_bytes(sample)
        listed = [
            {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in sorted(files.items())
        ]
        manifest = {
            "schema": "ekiben.manifest.v1",
            "kind": "lightgbm",
            "format": "lightgbm-text",
            "files": listed,
            "sample": {"size": len(sample), "sha256": hashlib.sha256(sample).hexdigest()},
            "expected": None,
            "requirements": None,
            "python": None,
        }
        (folder / "manifest.json").write_bytes(canonical_json(manifest))
        return ModelFolder(folder, manifest)

    return make


@pytest.fixture
def small_base(tmp_path: Path) -> image.BaseImage:
    """A base without an interpreter: enough to assemble on, not to run."""
    entries = [tarball.folder("etc"), tarball.file("etc/os-release", b"ID=small\n")]
    layer = layers.make("base", entries, tmp_path / "base-blobs", "gzip")
    config = {
        "os": "linux",
        "architecture": "amd64",
        "created": tarball.CREATED,
        "config": {"Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        "history": [{"created": tarball.CREATED, "created_by": "small"}],
    }
    written = layout.write_layout(image.Image((layer,), config), tmp_path / "base-layout")
    return image.BaseImage(written.digest, written.platform, written.known_layers(), written.config)


@dataclass(frozen=True)
class MakeImage:
    base: image.BaseImage
    blobs: Path
    make_model: MakeModel

    def __call__(
        self, model: ModelFolder | None = None, code: bytes = b"print('hello')\n", deps: bytes = b"x = 1\n", **run: Any
    ) -> image.Image:
        """Base, deps, code and model, with the compression of real builds."""
        own: list[layers.AnyLayer] = [
            layers.make("deps", _placed("app/.venv/lib/dep.py", deps), self.blobs, "zstd"),
            layers.make("code", _placed("home/bentoml/bento/src/service.py", code), self.blobs, "gzip"),
            (model or self.make_model()).layer(),
        ]
        return image.assemble(self.base, own, image.Run(entrypoint=["/app/.venv/bin/python"], **run))


@pytest.fixture
def make_image(small_base: image.BaseImage, tmp_path: Path, make_model: MakeModel) -> MakeImage:
    return MakeImage(small_base, tmp_path / "blobs", make_model)


def _placed(path: str, data: bytes) -> list[tarball.Entry]:
    return [*tarball.folders_above(path), tarball.file(path, data)]
