"""Kinds: the folders of bentos/, known by their kind.toml; nothing imports a kind (docs/design.md §5)."""

from __future__ import annotations

import hashlib
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from registry import digest
from registry.errors import InfrastructureError, UserError

_NAME = re.compile(r"[a-z](?:[a-z0-9_-]{0,38}[a-z0-9])?")
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_SERVICE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_PACKAGE = re.compile(r"bentos(?:\.[a-z_][a-z0-9_]*)+")
_MEMORY = re.compile(r"[1-9][0-9]*(?:Mi|Gi)")
_PATH = re.compile(r"/[a-z0-9_/-]*[a-z0-9_]")
_FIELDS = frozenset(
    {
        "name",
        "title",
        "description",
        "generic",
        "formats",
        "service",
        "packages",
        "python",
        "device",
        "predict",
        "memory",
    }
)
_OPTIONAL = frozenset({"image"})
# what does not change how a kind serves: caches, training output, scheduled work, prose
_IGNORED_FOLDERS = frozenset(
    {"__pycache__", "model", "batch", ".pytest_cache", ".mypy_cache", ".ruff_cache", ".git", ".venv"}
)
_IGNORED_FILES = re.compile(r"(?i)readme(\..*)?|.*\.py[co]|\..*|.*~|.*\.sw[po]")


@dataclass(frozen=True)
class Kind:
    """How to serve one sort of model. `dir` is its folder, `memory` a Kubernetes quantity, `predict` a route.

    `image` is a budget: how much the locked packages may take, unpacked, on the platform of the images.
    """

    name: str
    title: str
    description: str
    generic: bool
    formats: tuple[str, ...]
    service: str
    packages: tuple[str, ...]
    python: str
    device: str
    predict: str
    memory: str
    dir: Path
    image: str | None = None

    def package_dirs(self) -> dict[str, Path]:
        """Folder of each package it names: `bentos.serving` is the sibling folder `serving`."""
        root = self.dir.parent
        return {name: root.joinpath(*name.split(".")[1:]) for name in self.packages}

    def digest(self) -> str:
        """`sha256:<hex>` of the kind's files and of those of the packages it names; the same in any folder, in any
        checkout. Caches, model/ folders and README files do not count."""
        tree = {self.name: _files(self.dir)}
        for name, folder in self.package_dirs().items():
            if not folder.is_dir():
                raise _error(self.dir, f"packages names {name}, which is not there")
            tree[name] = _files(folder)
        return digest.of_json({"schema": "ekiben.kind.v1", "files": tree})

    def to_json(self) -> dict[str, Any]:
        """What GET /kinds shows."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "generic": self.generic,
            "formats": list(self.formats),
            "device": self.device,
            "memory": self.memory,
            "python": self.python,
        }


@dataclass(frozen=True)
class Kinds:
    """All kinds of a folder, by name."""

    all: tuple[Kind, ...]

    @classmethod
    def load(cls, folder: Path) -> Kinds:
        """The kinds of bentos/: each sub-folder with a kind.toml. InfrastructureError `bad_kind` if one is malformed,
        or two generic kinds claim a format."""
        if not folder.is_dir():
            raise InfrastructureError(
                "bad_kind", f"The folder of kinds {folder.name!r} is not there.", hint="Reinstall the service."
            )
        found = tuple(_read(path.parent) for path in sorted(folder.glob("*/kind.toml")))
        claimed: dict[str, str] = {}
        for kind in found:
            for name in kind.formats if kind.generic else ():
                if name in claimed:
                    raise _error(kind.dir, f"it claims the format {name} that {claimed[name]} claims too")
                claimed[name] = kind.name
        return cls(found)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(kind.name for kind in self.all)

    def for_format(self, name: str) -> Kind | None:
        """The generic kind that serves a format."""
        return next((kind for kind in self.all if kind.generic and name in kind.formats), None)

    def named(self, name: str) -> Kind:
        """The kind of that name. UserError `unknown_kind`."""
        for kind in self.all:
            if kind.name == name:
                return kind
        raise UserError(
            "unknown_kind",
            f"There is no kind {name[:60]!a}.",
            field="kind",
            hint=f"Known are: {', '.join(self.names) or 'none'}. Without kind= it is found from the file.",
        )


def _read(folder: Path) -> Kind:
    try:
        body = tomllib.loads((folder / "kind.toml").read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _error(folder, f"it is not TOML ({error})") from error
    odd = (set(body) - _OPTIONAL).symmetric_difference(_FIELDS)
    if odd:
        _bad(folder, f"its fields are not those of docs/design.md §5: {', '.join(sorted(odd))}")
    for key in ("name", "title", "description", "service", "python", "device", "predict", "memory"):
        if not isinstance(body[key], str) or not body[key]:
            _bad(folder, f"{key} is no text")
    for key in ("formats", "packages"):
        value = body[key]
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            _bad(folder, f"{key} is no list of texts")
    if not isinstance(body["generic"], bool):
        _bad(folder, "generic is neither true nor false")
    patterns = {"name": _NAME, "service": _SERVICE, "memory": _MEMORY, "predict": _PATH, "image": _MEMORY}
    for key, pattern in patterns.items():
        if key in body and (not isinstance(body[key], str) or pattern.fullmatch(body[key]) is None):
            _bad(folder, f"{key} = {body[key]!r} is not as it should be")
    if body["name"] != folder.name:
        _bad(folder, f"its name is {body['name']!r}, its folder is {folder.name!r}")
    if body["device"] not in ("cpu", "gpu"):
        _bad(folder, f"device = {body['device']!r} is neither cpu nor gpu")
    if not body["formats"] or not all(_WORD.fullmatch(item) for item in body["formats"]):
        _bad(folder, "formats names no format")
    if not all(_PACKAGE.fullmatch(item) for item in body["packages"]):
        _bad(folder, "packages may name packages of bentos only")
    return Kind(
        **{key: body[key] for key in _FIELDS - {"formats", "packages"}},
        formats=tuple(body["formats"]),
        packages=tuple(sorted(set(body["packages"]))),
        dir=folder,
        image=body.get("image"),
    )


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that counts, by its path in the folder."""
    found: dict[str, str] = {}
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _IGNORED_FOLDERS)
        for name in sorted(names):
            if _IGNORED_FILES.fullmatch(name):
                continue
            path = Path(place, name)
            if path.is_symlink() or not path.is_file():
                raise _error(folder, f"{name} is no regular file")
            with path.open("rb") as stream:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _error(folder: Path, why: str) -> InfrastructureError:
    return InfrastructureError(
        "bad_kind",
        f"The kind in bentos/{folder.name} cannot be used: {why}.",
        hint="Mend its kind.toml, or remove the folder.",
    )


def _bad(folder: Path, why: str) -> NoReturn:
    raise _error(folder, why)
