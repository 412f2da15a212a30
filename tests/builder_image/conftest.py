"""Real parts for the builder's tests: a docker-registry process, small model folders, a small base."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from builder_image import image, installer, layers, layout, tarball
from builder_image.process import Processes, tool_environment
from registry.digest import canonical_json
from registry.manifest import Attachment, File, Manifest
from tests.servers import DockerRegistry

StartRegistry = Callable[..., DockerRegistry]


@pytest.fixture
def start_registry(tmp_path: Path) -> Iterator[StartRegistry]:
    """Start Debian's docker-registry on a free loopback port; arguments are those of DockerRegistry."""
    if shutil.which("docker-registry") is None:
        pytest.skip("docker-registry is not installed (apt-get install docker-registry)")
    running: list[DockerRegistry] = []

    def start(**how: Any) -> DockerRegistry:
        running.append(DockerRegistry(tmp_path / f"registry-{len(running)}", **how))
        return running[-1]

    yield start
    for server in running:
        server.close()


@pytest.fixture
def registry_server(start_registry: StartRegistry) -> DockerRegistry:
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


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder of wheels that stands for a package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def make_wheel() -> Callable[..., Path]:
    """make_wheel(folder, name, version, requires=(), tag="py3-none-any", files={}, scripts={}) → the wheel's path."""

    def make(
        folder: Path,
        name: str,
        version: str,
        requires: Sequence[str] = (),
        tag: str = "py3-none-any",
        files: Mapping[str, str] | None = None,
        scripts: Mapping[str, str] | None = None,
    ) -> Path:
        info = f"{name}-{version}.dist-info"
        needed = [f"Requires-Dist: {one}" for one in requires]
        content = dict(files or {f"{name}/__init__.py": f"VERSION = {version!r}\n"})
        content[f"{info}/METADATA"] = "\n".join(
            ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *needed]
        )
        content[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n"
        if scripts:
            lines = "".join(f"{command} = {target}\n" for command, target in scripts.items())
            content[f"{info}/entry_points.txt"] = f"[console_scripts]\n{lines}"
        record = ""
        for path, text in content.items():
            value = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            record += f"{path},sha256={value},{len(text.encode())}\n"
        content[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
        folder.mkdir(parents=True, exist_ok=True)
        wheel = folder / f"{name}-{version}-{tag}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in content.items():
                archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
        return wheel

    return make


@pytest.fixture
def tools(index: Path, tmp_path: Path) -> installer.Tools:
    """uv with nothing but the wheels in `index`."""
    outer = {**os.environ, "UV_NO_INDEX": "1", "UV_FIND_LINKS": str(index), "UV_CACHE_DIR": str(tmp_path / "uv-cache")}
    return installer.Tools(installer.find(outer), Processes(), tool_environment(outer))


@pytest.fixture
def make_version() -> Callable[..., Path]:
    """make_version(folder, files, kind=, format=, requirements=(name, text), python=) → the model folder."""

    def make(
        folder: Path,
        files: Mapping[str, str | bytes],
        kind: str = "project",
        format: str = "bento-project",
        requirements: tuple[str, str] | None = None,
        python: str | None = None,
    ) -> Path:
        listed = []
        for path, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            place = folder / "files" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            listed.append(File(path, len(data), hashlib.sha256(data).hexdigest()))
        attachment = None
        if requirements is not None:
            name, text = requirements
            (folder / "requirements").mkdir()
            (folder / "requirements" / name).write_text(text)
            attachment = Attachment(len(text.encode()), hashlib.sha256(text.encode()).hexdigest(), name)
        manifest = Manifest(kind, format, tuple(listed), requirements=attachment, python=python)
        (folder / "manifest.json").write_bytes(manifest.to_bytes())
        return folder

    return make


@pytest.fixture
def python_base(tmp_path: Path) -> Path:
    """The description of an imported base that looks like Debian with Python 3.11, to be read, not to be run."""
    from builder_image import base

    contents = {
        "usr/lib/x86_64-linux-gnu/libc.so.6": b"\0GNU C Library (Debian GLIBC 2.36-9) stable release version 2.36.\n\0",
        "usr/local/bin/python3.11": b"\x7fELF\0" + b"3.11.9\0",
        "usr/local/lib/python3.11/lib-dynload/_ssl.cpython-311-x86_64-linux-gnu.so": b"",
    }
    entries = [tarball.symlink("usr/local/bin/python3", "/usr/local/bin/python3.11")]
    for path, data in contents.items():
        entries += _placed(path, data)
    layer = layers.make("base", entries, tmp_path / "python-base-blobs", "gzip")
    config = {"os": "linux", "architecture": "amd64", "config": {"Env": ["PATH=/usr/local/bin:/usr/bin"]}}
    layout.write_layout(image.Image((layer,), config), tmp_path / "python-base-layout")
    base.import_base(str(tmp_path / "python-base-layout"), None, tmp_path / "bases", name="python")
    return tmp_path / "bases" / "python.toml"
