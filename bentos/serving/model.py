"""A model folder: the files of one version with their manifest (docs/design.md §4)."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bentos.serving.problems import StartError

SCHEMA = "ekiben.manifest.v1"
_CHUNK = 1 << 20


@dataclass(frozen=True)
class StoredFile:
    path: str
    """Relative to the model folder, such as `files/churn.txt`."""
    size: int
    sha256: str


@dataclass(frozen=True)
class ModelFolder:
    root: Path
    digest: str
    kind: str
    format: str | None
    files: tuple[str, ...]
    """The model's own files, relative to `files/`, sorted."""
    stored: tuple[StoredFile, ...]
    """All that the manifest vouches for: files, sample, expected values, requirements."""
    model: str | None = None
    """The file that was recognised at upload; None where there is one file, and in versions from before this field."""

    @classmethod
    def read(cls, root: Path) -> ModelFolder:
        """Read the manifest. Raises StartError `model_load_failed` where there is none or it makes no sense."""
        try:
            data = (root / "manifest.json").read_bytes()
        except OSError as error:
            raise StartError(
                "model_load_failed",
                f"there is no model in {root}: {error.strerror} (manifest.json)",
                "point EKIBEN_MODEL_DIR at a model folder, or write an example into ./model with "
                "`python -m bentos.KIND.example model`",
            ) from error
        try:
            manifest = json.loads(data)
            if manifest["schema"] != SCHEMA:
                raise ValueError(f"schema {manifest['schema']!r}, not {SCHEMA!r}")
            stored = [_stored("files/" + _plain(f["path"]), f) for f in manifest["files"]]
            for name in ("sample", "expected"):
                if manifest.get(name):
                    stored.append(_stored(f"{name}.json", manifest[name]))
            if manifest.get("requirements"):
                stored.append(
                    _stored("requirements/" + _plain(manifest["requirements"]["path"]), manifest["requirements"])
                )
            files = tuple(str(f["path"]) for f in manifest["files"])
            model = manifest.get("model")
            if model is not None and model not in files:
                raise ValueError(f"model {model!r} is none of its files")
            return cls(
                root=root,
                digest="sha256:" + hashlib.sha256(data).hexdigest(),
                kind=str(manifest["kind"]),
                format=manifest.get("format"),
                files=files,
                stored=tuple(stored),
                model=model,
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            message = f"{root / 'manifest.json'} cannot be read: {error!r}"
            raise StartError("model_load_failed", message, "upload the model again") from error

    def verify(self, digest: str | None = None) -> None:
        """Hash every file. Raises StartError `digest_mismatch` naming the first that differs from the manifest."""
        hint = "the files changed after they were uploaded; fetch them again"
        if digest and digest != self.digest:
            raise StartError("digest_mismatch", f"the manifest is {self.digest}, not {digest}", hint)
        for file in self.stored:
            try:
                with (self.root / file.path).open("rb") as stream:
                    hasher = hashlib.sha256()
                    size = 0
                    while chunk := stream.read(_CHUNK):
                        hasher.update(chunk)
                        size += len(chunk)
            except OSError as error:
                raise StartError("digest_mismatch", f"{file.path}: {error.strerror}", hint) from error
            if size != file.size or hasher.hexdigest() != file.sha256:
                raise StartError(
                    "digest_mismatch",
                    f"{file.path} has {size} bytes and sha256 {hasher.hexdigest()}; "
                    f"the manifest says {file.size} and {file.sha256}",
                    hint,
                )

    def path(self, name: str | None = None) -> Path:
        """Return the place of the file `name`, by default of `model_file()`. Raises StartError `model_load_failed`."""
        return self.root / "files" / (self.model_file() if name is None else name)

    def model_file(self, candidate: Callable[[str], bool] = lambda path: False) -> str:
        """Return the path of the file to load: what was checked at upload and nothing else.

        The manifest names it where there are several files. In versions from before that, the only file that is a
        `candidate` by its path is taken. Raises StartError `model_load_failed` where there are none or several.
        """
        if self.model is not None:
            return self.model
        found = self.files if len(self.files) == 1 else [path for path in self.files if candidate(path)]
        if len(found) != 1:
            message = (
                f"The version has {len(self.files)} files and {len(found)} of them could be its {self.kind} model: "
                f"{', '.join(found or self.files)}"
            )
            hint = "Upload the version again, so that its manifest names the file that was recognised."
            raise StartError("model_load_failed", f"{message[:500]}.", hint)
        return found[0]

    def sample(self) -> Any | None:
        """The golden sample: a request body, or None."""
        return self._json("sample.json")

    def expected(self) -> Any | None:
        """The response body expected for the sample, or None."""
        return self._json("expected.json")

    def _json(self, name: str) -> Any | None:
        if not any(f.path == name for f in self.stored):
            return None
        try:
            return json.loads((self.root / name).read_bytes())
        except (OSError, ValueError) as error:
            hint = f"upload a {name} that is JSON"
            raise StartError("golden_sample_failed", f"{name} cannot be read: {error}", hint) from error


def write_model(
    root: Path,
    *,
    kind: str,
    format: str | None,
    files: Mapping[str, Path | bytes],
    sample: Any | None = None,
    expected: Any | None = None,
    python: str | None = None,
    model: str | None = None,
) -> ModelFolder:
    """Write a model folder; the manifest comes last. An old folder at `root` is replaced only if it was a model's.

    `model` is the file to load; it is written only where there are several, as the service does.
    """
    if root.exists() and any(root.iterdir()):
        if not (root / "manifest.json").exists():
            raise FileExistsError(f"{root} holds something else than a model; name another folder")
        shutil.rmtree(root)
    entries = []
    for name, source in sorted(files.items()):
        target = root / "files" / _plain(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        entries.append({"path": name, **_fingerprint(target)})
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": kind,
        "format": format,
        "files": entries,
        "sample": None,
        "expected": None,
        "requirements": None,
        "python": python,
    }
    if model is not None and len(entries) > 1:
        manifest["model"] = model
    for name, value in (("sample", sample), ("expected", expected)):
        if value is not None:
            (root / f"{name}.json").write_bytes(canonical_json(value))
            manifest[name] = _fingerprint(root / f"{name}.json")
    (root / "manifest.json").write_bytes(canonical_json(manifest))
    return ModelFolder.read(root)


def canonical_json(value: Any) -> bytes:
    """UTF-8, keys sorted, no spaces, no NaN; the same as the registry's."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _fingerprint(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _stored(path: str, entry: Mapping[str, Any]) -> StoredFile:
    return StoredFile(path, int(entry["size"]), str(entry["sha256"]))


def _plain(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise ValueError(f"path {path!r} leaves the folder")
    return path
