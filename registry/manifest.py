"""Manifests, names and paths: what a version is, written down canonically (docs/design.md §4)."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Set
from dataclasses import dataclass
from typing import Any, NoReturn

from registry import digest
from registry.errors import UserError

SCHEMA = "ekiben.manifest.v1"

LONGEST_NAME = 40
LONGEST_PATH = 800  # UTF-8 bytes; an S3 key has 1024, of which the prefix models/NAME/ULID/files/ takes some
LONGEST_COMPONENT = 255  # UTF-8 bytes, the limit of common file systems
DEEPEST_PATH = 32  # components
MOST_FILES = 100_000
_LARGEST_MANIFEST = 64 * 1024 * 1024
_LARGEST_FILE = 1 << 60

# Words that mean something in a URL of the service or of a bento: `/inference/predict` must never be ambiguous.
RESERVED = frozenset(
    {
        "api", "base", "bases", "builds", "default", "deployments", "docs", "docs-json", "ekiben", "events", "feedback",
        "files", "health", "healthz", "image", "images", "inference", "invocations", "kinds", "label", "labels", "live",
        "livez", "login", "logout", "logs", "metadata", "metrics", "models", "openapi", "openapi-json", "ping",
        "platform", "predict", "project", "ready", "readyz", "redoc", "revisions", "rollback", "schema", "schema-json",
        "static", "static-content", "status", "test", "tokens", "ui", "v1", "v2", "versions",
        # spelt with a dot they are no labels at all; listed so that the error says the true reason
        "docs.json", "openapi.json", "schema.json",
    }
)  # fmt: skip

_NAME = re.compile(r"[a-z](?:[a-z0-9-]*[a-z0-9])?")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PYTHON = re.compile(r"3\.[0-9]{1,2}(?:\.[0-9]{1,3})?")
_WORD = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?")
_REQUIREMENTS = ("requirements.txt", "pylock.toml", "uv.lock")
_KEYS = {"schema", "kind", "format", "files", "sample", "expected", "requirements", "python"}


def check_name(name: str, *, field: str = "name") -> str:
    """The name itself if it is a usable model or deployment name: a DNS label of at most 40 characters that starts with
    a letter (a Kubernetes Service asks for that) and is no reserved word. UserError `bad_name` or `reserved_name`."""
    if name in RESERVED:
        raise UserError(
            "reserved_name",
            f"The name {_shown(name)} is part of an endpoint's own URLs and cannot name a model.",
            field=field,
            hint=f"Take another name, for example name={name.partition('.')[0]}-model.",
        )
    if len(name) > LONGEST_NAME or _NAME.fullmatch(name) is None:
        raise UserError(
            "bad_name",
            f"{_shown(name)} is not a usable name: 1 to {LONGEST_NAME} of a-z, 0-9 and '-', a letter first, "
            "a letter or digit last.",
            field=field,
            hint=f"Try name={name_from_filename(name, has_suffix=False)}.",
        )
    return name


def is_name(text: str) -> bool:
    """Whether the text has the form of a name; reserved words have it too."""
    return len(text) <= LONGEST_NAME and _NAME.fullmatch(text) is not None


def name_from_filename(filename: str, *, has_suffix: bool = True) -> str:
    """A usable name from a file's name or stem: `Churn Model (v2).txt` gives `churn-model-v2`. Never fails."""
    stem = re.split(r"[/\\]", filename)[-1]
    if has_suffix:
        stem = re.sub(
            r"(?i)(?<=.)(\.(tar|json|txt|model|onnx|skops|ubj|zip|tgz|gz|bz2|xz|keras|safetensors|lgb|xgb))+$", "", stem
        )
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode().lower()
    name = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if not name:
        name = "model"
    elif not name[0].isalpha():
        name = f"m-{name}"
    name = name[:LONGEST_NAME].strip("-")
    return f"{name[: LONGEST_NAME - 6].strip('-')}-model" if name in RESERVED else name


def check_path(path: str, *, code: str = "bad_path", field: str | None = None) -> str:
    """The path itself if it is safe everywhere: relative, '/' between components, no '.', '..' or empty component, no
    backslash, control character or lone surrogate, within the length bounds. UserError with `code` otherwise."""
    why = _path_fault(path)
    if why is not None:
        raise UserError(
            code,
            f"The path {_shown(path)} {why}.",
            field=field,
            hint="Use relative paths with '/' between plain names, inside the upload.",
        )
    return path


def collision_key(path: str) -> str:
    """Two paths with the same key are one file on some file system (macOS, Windows): case and Unicode form ignored."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _path_fault(path: str) -> str | None:
    if not path:
        return "is empty"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    if len(encoded) > LONGEST_PATH:
        return f"is longer than {LONGEST_PATH} bytes"
    if "\\" in path:
        return "has a backslash"
    # Cc are control characters, Cf hides text or turns its direction, Zl and Zp break lines in logs
    if any(unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") for character in path):
        return "has a control or invisible character"
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        return "is absolute"
    components = path.split("/")
    if len(components) > DEEPEST_PATH:
        return f"has more than {DEEPEST_PATH} folders"
    for component in components:
        if component in ("", ".", ".."):
            return "has an empty, '.' or '..' component"
        if len(component.encode()) > LONGEST_COMPONENT:
            return f"has a name longer than {LONGEST_COMPONENT} bytes"
    return None


def _shown(text: str) -> str:
    """User text for an error: escaped and short."""
    return ascii(text if len(text) <= 120 else text[:117] + "...")


@dataclass(frozen=True, order=True)
class File:
    """A file of the user's. `path` is relative to the version's files/, `size` in bytes, `sha256` in hex."""

    path: str
    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "sha256": self.sha256}


@dataclass(frozen=True)
class Attachment:
    """A file beside the user's files. `path` is its name for requirements, and None for sample and expected."""

    size: int
    sha256: str
    path: str | None = None

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"size": self.size, "sha256": self.sha256}
        return body if self.path is None else {"path": self.path, **body}


@dataclass(frozen=True)
class Manifest:
    """What a version is. Its digest is the version's identity; the order in which files are given does not matter.

    `model` is the path of the file that was recognised, from which a loader finds everything else. It is written where
    a version has several files; of one file there is no choice. Projects have none, and neither have versions from
    before this field.
    """

    kind: str
    format: str
    files: tuple[File, ...]
    sample: Attachment | None = None
    expected: Attachment | None = None
    requirements: Attachment | None = None
    python: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        self._check()
        object.__setattr__(self, "files", tuple(sorted(self.files, key=lambda file: file.path)))

    @property
    def size(self) -> int:
        """Bytes of the user's files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """`sha256:<hex>` of the canonical bytes."""
        return digest.of_bytes(self.to_bytes())

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": self.kind,
            "format": self.format,
            "files": [file.to_json() for file in self.files],
            "sample": None if self.sample is None else self.sample.to_json(),
            "expected": None if self.expected is None else self.expected.to_json(),
            "requirements": None if self.requirements is None else self.requirements.to_json(),
            "python": self.python,
        }
        # absent and not null: the bytes, and so the digests, of versions without it stay as they were
        return body if self.model is None else {**body, "model": self.model}

    def to_bytes(self) -> bytes:
        """Canonical JSON: equal manifests give equal bytes on any machine."""
        return digest.canonical_json(self.to_json())

    @classmethod
    def parse(cls, data: bytes) -> Manifest:
        """The manifest written in `data`, which must be exactly its canonical form. UserError `bad_manifest`."""
        if len(data) > _LARGEST_MANIFEST:
            _bad(f"it is larger than {_LARGEST_MANIFEST} bytes")
        try:
            body = json.loads(data.decode())
        except (ValueError, RecursionError) as error:
            raise _error(f"it is not JSON ({type(error).__name__})") from error
        _keys(body, "it", _KEYS, optional={"model"})
        if "model" in body and body["model"] is None:
            _bad("model is null; leave it out")
        if body["schema"] != SCHEMA:
            _bad(f"its schema is {_shown(str(body['schema']))}, this program reads {SCHEMA}")
        if not isinstance(body["files"], list):
            _bad("files is not a list")
        files = []
        for index, entry in enumerate(body["files"]):
            _keys(entry, f"files[{index}]", {"path", "size", "sha256"})
            files.append(File(entry["path"], entry["size"], entry["sha256"]))
        attachments: dict[str, Attachment | None] = {}
        for name in ("sample", "expected", "requirements"):
            entry = body[name]
            if entry is None:
                attachments[name] = None
                continue
            _keys(entry, name, {"path", "size", "sha256"} if name == "requirements" else {"size", "sha256"})
            attachments[name] = Attachment(entry["size"], entry["sha256"], entry.get("path"))
        manifest = cls(
            body["kind"],
            body["format"],
            tuple(files),
            python=body["python"],
            model=body.get("model"),
            **attachments,
        )
        if manifest.to_bytes() != data:
            _bad("it is not in canonical form (keys and files sorted, no spaces)")
        return manifest

    def _check(self) -> None:
        for what, word in (("kind", self.kind), ("format", self.format)):
            if not isinstance(word, str) or _WORD.fullmatch(word) is None:
                _bad(f"{what} is no plain word")
        if not self.files:
            _bad("it has no files")
        if len(self.files) > MOST_FILES:
            _bad(f"it has more than {MOST_FILES} files")
        seen: set[str] = set()
        for index, file in enumerate(self.files):
            where = f"files[{index}]"
            if not isinstance(file.path, str):
                _bad(f"{where}.path is no text")
            if (why := _path_fault(file.path)) is not None:
                _bad(f"{where}.path {_shown(file.path)} {why}")
            if (key := collision_key(file.path)) in seen:
                _bad(f"{where}.path {_shown(file.path)} is there twice")
            seen.add(key)
            _check_content(where, file.size, file.sha256)
        folders = {collision_key(folder) for file in self.files for folder in _folders(file.path)}
        if not folders.isdisjoint(seen):
            _bad("a path is both a file and a folder")
        for name, attachment in (("sample", self.sample), ("expected", self.expected)):
            if attachment is not None:
                _check_content(name, attachment.size, attachment.sha256)
                if attachment.path is not None:
                    _bad(f"{name} has a path")
        if self.requirements is not None:
            _check_content("requirements", self.requirements.size, self.requirements.sha256)
            if self.requirements.path not in _REQUIREMENTS:
                _bad(f"requirements.path is none of {', '.join(_REQUIREMENTS)}")
        if self.model is not None:
            if not isinstance(self.model, str) or self.model not in {file.path for file in self.files}:
                _bad("model names no file of the version")
            if len(self.files) == 1:
                _bad("model is given although there is one file")
        if self.python is not None and (not isinstance(self.python, str) or _PYTHON.fullmatch(self.python) is None):
            _bad("python is no version like 3.11")


def _folders(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: end + 1]) for end in range(len(parts))]


def _check_content(where: str, size: object, sha256: object) -> None:
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _LARGEST_FILE:
        _bad(f"{where}.size is no size in bytes")
    if not isinstance(sha256, str) or _SHA256.fullmatch(sha256) is None:
        _bad(f"{where}.sha256 is no SHA-256 in lower-case hex")


def _keys(value: object, where: str, names: set[str], optional: Set[str] = frozenset()) -> None:
    if not isinstance(value, dict):
        _bad(f"{where} is no object")
    if set(value) - optional != names:
        odd = ", ".join(sorted(_shown(key) for key in names.symmetric_difference(set(value) - optional)))
        _bad(f"{where} has fields too many or too few: {odd[:200]}")


def _error(why: str) -> UserError:
    return UserError(
        "bad_manifest",
        f"manifest.json cannot be used: {why}.",
        hint="Upload the model again; the manifest is written by the service, not by hand.",
    )


def _bad(why: str) -> NoReturn:
    raise _error(why)
