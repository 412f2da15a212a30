"""The image of a kind's Bento: it carries the shared code that the kind needs, and the kind's lock as it is."""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import attrs
from bentoml.images import Image

_LEFT_OUT = {"__pycache__", "model", "build", "batch"}
"""Folders that are not served: a kind's `batch` is scheduled work beside its service."""
_CARRIED = {".py", ".toml", ".json", ".html", ".md"}


@attrs.define
class StandaloneImage(Image):
    """`freeze` is called by `bentoml build` after `src/` was copied: it adds `src/bentos/…` and the lock."""

    kind_folder: str = ""

    def __attrs_post_init__(self) -> None:
        if not self.commands:  # bentoml copies the image with its commands; adding the base's again would double them
            super().__attrs_post_init__()

    def freeze(self, bento_fs: Path, envs: Any, platform_: str | None = None) -> Any:
        kind = Path(self.kind_folder)
        packages = tomllib.loads((kind / "kind.toml").read_text("utf-8")).get("packages", ["bentos.serving"])
        carry(packages, Path(bento_fs) / "src", kind)
        return super().freeze(bento_fs, envs, platform_)

    def _freeze_python_requirements(self, bento_fs: Path, platform_: str | None = None) -> str:
        # bentoml would parse the lock, drop its hashes and lock again: what was locked is what is installed
        return (Path(self.kind_folder) / "requirements.txt").read_text("utf-8")


def image(service_file: str) -> StandaloneImage:
    """The image for the kind whose service.py this is. Files are read when the Bento is built, not before."""
    return StandaloneImage(  # type: ignore[call-arg]
        kind_folder=str(Path(service_file).resolve().parent),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        lock_python_packages=False,
    )


def carry(packages: list[str], src: Path, kind: Path) -> None:
    """Copy packages such as `bentos.serving` to `src/bentos/serving`, without caches, models, batch jobs and links."""
    bentos = Path(__file__).resolve().parent.parent
    target = src / "bentos"
    target.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bentos / "__init__.py", target / "__init__.py")
    for package in packages:
        root, _, name = package.partition(".")
        if root != "bentos" or not name.isidentifier():
            raise ValueError(f"{kind / 'kind.toml'}: packages holds {package!r}; only bentos.NAME can be carried")
        source = bentos / name
        for path in sorted(source.rglob("*")):
            relative = path.relative_to(source)
            if path.is_symlink() or not path.is_file() or path.suffix not in _CARRIED:
                continue
            if _LEFT_OUT & set(relative.parts):
                continue
            (target / name / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / name / relative)
