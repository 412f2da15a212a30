"""Artifacts as MLflow keeps them: what a model's folder holds, which of it is the model, and how it comes here.

`MLmodel` is read only to tell the model's file from what MLflow keeps beside it; what the file is, its content says
later, as that of an upload does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from registry.errors import InfrastructureError, UserError
from registry.formats.mlflow import BOOKKEEPING, example_rows
from registry.manifest import DEEPEST_PATH, SCHEMA, check_path
from registry.origin import too_large

if TYPE_CHECKING:
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_SMALL = 1024 * 1024  # bytes of an MLmodel file or an input example that is looked into
_EXAMPLE_ROWS = 100

# The entry of MLmodel that names a flavour's model; where there is `True`, files beside it belong to it.
_FLAVOURS: dict[str, tuple[str, bool]] = {
    "lightgbm": ("data", False),
    "xgboost": ("data", False),
    "sklearn": ("pickled_model", False),
    "onnx": ("data", True),
    "catboost": ("data", False),
    "tensorflow": ("saved_model_dir", False),
    "keras": ("data", False),
}


@dataclass(frozen=True)
class Place:
    """A file or folder of one artifact repository, with what the version shall remember of it."""

    repository: ArtifactRepository
    path: str  # "" is the whole
    name: str | None
    labels: dict[str, str]


@dataclass(frozen=True)
class Found:
    """A file below a place: its path there, its path in the repository, and its size where the store tells."""

    path: str
    remote: str
    size: int | None


@dataclass(frozen=True)
class Brought:
    """What is known of a model besides its files. `kind` only where an Ekiben training program wrote it down."""

    kind: str | None
    flavour: str | None


def bring(place: Place, into: Path, most_bytes: int, most_files: int) -> Brought:
    """Download the model of a place: its files to `into`/files, its sample to `into`/sample.json and expected.json,
    MLflow's input example to `into`/example.json."""
    found = {each.path: each for each in _files(place, most_files)}
    download = _Download(place, into, most_bytes)
    kind = flavour = None
    chosen = found
    if "MLmodel" in found:
        flavour, chosen = _choose(_flavours(download.small(found["MLmodel"])), found)
        _example(download, found, into / "example.json")
    elif "manifest.json" in found and (within := _below(found, "files")):
        kind = _kind(download.small(found["manifest.json"]))
        if kind is not None:
            chosen = within
            for name in ("sample.json", "expected.json"):
                if name in found and (data := download.small(found[name])) is not None:
                    (into / name).write_bytes(data)
    download.check(chosen.values())
    for path, each in sorted(chosen.items()):
        download.file(each, into / "files" / path)
    return Brought(kind, flavour)


def opener(place: Place, scratch: Path) -> Callable[[str], BinaryIO]:
    """Opens files of a place by their path there; each is brought to `scratch` first, in place of the one before."""
    download = _Download(place, scratch, 0)

    def open_file(path: str) -> BinaryIO:
        remote = f"{place.path}/{path}".strip("/")
        return download.here(Found(path, remote, None)).open("rb")

    return open_file


# --- what is there ---------------------------------------------------------------------------------------------------


def exists(repository: ArtifactRepository, path: str) -> bool:
    if repository.list_artifacts(path):
        return True
    parent = path.rpartition("/")[0]
    return any(each.path == path for each in repository.list_artifacts(parent or None))


def tops(repository: ArtifactRepository) -> list[str]:
    return sorted(str(each.path) for each in repository.list_artifacts(None))


def holds_model(repository: ArtifactRepository, path: str) -> bool:
    names = {each.path.rpartition("/")[2] for each in repository.list_artifacts(path)}
    return "MLmodel" in names or {"manifest.json", "files"} <= names


def _files(place: Place, most: int) -> Iterator[Found]:
    """Every file at or below the place."""
    repository, top = place.repository, place.path
    count = 0
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        listed = repository.list_artifacts(folder or None)
        if not listed and folder == top and top:  # the place is a file
            parent = top.rpartition("/")[0]
            for each in repository.list_artifacts(parent or None):
                if each.path == top:
                    yield Found(top.rpartition("/")[2], top, each.file_size)
            return
        for each in listed:
            remote = check_path(str(each.path), field="artifact_path")
            if each.is_dir:
                if remote.count("/") < DEEPEST_PATH and remote != folder:
                    waiting.append(remote)
                continue
            yield Found(remote.removeprefix(f"{top}/") if top else remote, remote, each.file_size)
        count += len(listed)
        if count > most + len(BOOKKEEPING):
            raise UserError(
                "too_many_files", f"The artifact has more than {most} files.", field="artifact_path",
                hint="Name the model's own folder or file; or raise EKIBEN_MAX_FILES.", status=413,
            )  # fmt: skip


def _flavours(data: bytes | None) -> dict[str, Any]:
    import yaml  # type: ignore[import-untyped,unused-ignore]

    with suppress(yaml.YAMLError, RecursionError, ValueError):
        body = yaml.safe_load(data or b"")
        if isinstance(body, dict) and isinstance(body.get("flavors"), dict):
            return dict(body["flavors"])
    return {}


def _choose(flavours: dict[str, Any], found: dict[str, Found]) -> tuple[str | None, dict[str, Found]]:
    """The flavour and the files of a model that MLflow has logged, without what MLflow keeps beside them."""
    others = {path: each for path, each in found.items() if path not in BOOKKEEPING}
    for flavour, (key, beside) in _FLAVOURS.items():
        body = flavours.get(flavour)
        if not isinstance(body, dict):
            continue
        named = body.get(key)
        entry = named.strip("/") if isinstance(named, str) else ""
        if entry in found:
            return flavour, others if beside else {entry.rpartition("/")[2]: found[entry]}
        if within := _below(found, entry):
            return flavour, within
        return flavour, others
    return next((str(name) for name in flavours if name != "python_function"), None), others


def _below(found: dict[str, Found], folder: str) -> dict[str, Found]:
    return {
        path.removeprefix(f"{folder}/"): each
        for path, each in found.items()
        if folder and path.startswith(f"{folder}/")
    }


def _kind(data: bytes | None) -> str | None:
    with suppress(ValueError, RecursionError):
        body = json.loads(data or b"")
        if isinstance(body, dict) and body.get("schema") == SCHEMA and isinstance(body.get("kind"), str):
            return str(body["kind"])
    return None


def _example(download: _Download, found: dict[str, Found], into: Path) -> None:
    """The rows of MLflow's input example as a request's body, where it is a table or an array."""
    listed = found.get("input_example.json")
    data = download.small(listed) if listed is not None else None
    with suppress(ValueError, RecursionError):
        rows = example_rows(json.loads(data or b"", parse_constant=lambda _: None))
        if rows:
            body = json.dumps({"inputs": rows[:_EXAMPLE_ROWS]}, allow_nan=False)
            into.write_text(body)


# --- how it comes here -----------------------------------------------------------------------------------------------


class _Download:
    """Brings files of a place here, within the bounds of an upload."""

    def __init__(self, place: Place, into: Path, most: int) -> None:
        self._place, self._scratch, self._most = place, into / "scratch", most
        self._total = 0

    def check(self, files: Iterable[Found]) -> None:
        if sum(each.size or 0 for each in files) > self._most:
            raise too_large(self._most)

    def small(self, file: Found) -> bytes | None:
        """The bytes of a small file; None where it is not small."""
        if (file.size or 0) > _SMALL:
            return None
        path = self.here(file)
        try:
            return path.read_bytes() if path.stat().st_size <= _SMALL else None
        finally:
            path.unlink()

    def file(self, file: Found, target: Path) -> None:
        path = self.here(file)
        self._total += path.stat().st_size
        if self._total > self._most:  # the listing said otherwise
            raise too_large(self._most)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)

    def here(self, file: Found) -> Path:
        self._refuse_way_out(file)
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._scratch.mkdir(parents=True)
        path = Path(self._place.repository.download_artifacts(file.remote, str(self._scratch)))  # type: ignore[no-untyped-call]
        if path.is_symlink() or not path.is_file() or not path.resolve().is_relative_to(self._scratch.resolve()):
            raise InfrastructureError("mlflow_unreachable", f"MLflow gave no file for {file.remote!r}.")
        return path

    def _refuse_way_out(self, file: Found) -> None:
        """A link among local artifacts must not lead to another file of this machine."""
        from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

        if isinstance(self._place.repository, LocalArtifactRepository):
            top = Path(self._place.repository.artifact_dir).resolve()
            if not (top / file.remote).resolve().is_relative_to(top):
                raise UserError(
                    "bad_artifact_path", f"The artifact {file.remote!r} is a link to outside of the run.",
                    field="artifact_path", hint="Log the file itself.",
                )  # fmt: skip
