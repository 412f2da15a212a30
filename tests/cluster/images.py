"""The images of the cluster itself, assembled from single static programs, and the Debian base that models stand on."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.make_base import make_base
from builder_image import image, layers, layout, remote, tarball
from tests.cluster import programs

_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}
_NOBODY = "65532:65532"


def scratch(blobs: Path, program: Path, more: Mapping[str, Path] | None = None) -> image.Image:
    """An image of one static program and the files `more` (path in the image → file), with nothing beneath."""
    files = {program.name: program, **(more or {})}
    entries = [folder for path in files for folder in tarball.folders_above(path)]
    entries += [tarball.file(path, source, program=source is program) for path, source in files.items()]
    config = {
        "architecture": _MACHINES[os.uname().machine],
        "os": "linux",
        "created": tarball.CREATED,
        "config": {"Entrypoint": [f"/{program.name}"], "User": _NOBODY},
    }
    return image.Image((layers.make("base", list(dict.fromkeys(entries)), blobs, "none"),), config)


def push(built: image.Image, ref: str) -> str:
    """Push to the cluster's registry; the reference by digest."""
    reference = remote.Reference.parse(ref)
    with remote.Registry(reference.host, insecure=True) as registry:
        remote.push_image(registry, built, reference)
    return f"{reference.host}/{reference.repository}@{built.digest}"


def base_layout() -> Path:
    """The Debian base with Python 3.11 as an OCI layout, made once by debootstrap and cached by its recipe."""
    return make_base(_base_folder() / "layout", programs.cache() / "packages")


def base(folder: Path) -> Path:
    """The base imported for builds: a folder of bases with `debian.toml`, as `builder_image base import` writes it."""
    if not (folder / "debian.toml").exists():
        subprocess.run(
            [sys.executable, "-m", "builder_image", "base", "import", str(base_layout()), "--into", str(folder)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return folder


def base_image() -> image.Image:
    return layout.read_layout(base_layout())


def _base_folder() -> Path:
    import benchmarks.make_base as recipe

    digest = hashlib.sha256(Path(recipe.__file__).read_bytes()).hexdigest()[:16]
    return programs.cache() / "bases" / digest
