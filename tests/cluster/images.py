"""The images of the cluster itself, assembled from single static programs, and the Debian base that models stand on."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
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
    recipe = Path(inspect.getfile(make_base))
    folder = programs.cache() / "bases" / hashlib.sha256(recipe.read_bytes()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    made, log = folder / "layout", folder / "log"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "index.json").exists():
            command = [sys.executable, "-m", "benchmarks.make_base", str(made)]
            command += ["--cache", str(programs.cache() / "packages")]
            with log.open("wb") as out:
                done = subprocess.run(command, stdout=out, stderr=out, cwd=programs.PROJECT, check=False)
            if done.returncode != 0:
                raise SystemExit(f"the base of models was not made; the end of {log}:\n{log.read_text()[-2000:]}")
    return made


def base(home: Path) -> Path:
    """The base as builds want it, imported by `builder_image base import` into `home`; the file that describes it."""
    described = home / "bases" / "debian.toml"
    if not described.exists():
        command = [sys.executable, "-m", "builder_image", "base", "import", str(base_layout()), "--name", "debian"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "EKIBEN_HOME": str(home)})
    return described


def base_image() -> image.Image:
    return layout.read_layout(base_layout())
