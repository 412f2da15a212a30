"""Uploads: from the first byte of a request to a version with its manifest, in constant memory.

A body is parsed and hashed as it arrives, in a worker thread, a mebibyte at a time; files go straight to the object
store under a fresh prefix. What they are is found in a bounded child (`recognition`). The manifest is written last.
Whatever fails before leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

import python_multipart
from python_multipart.exceptions import FormParserError
from ulid import ULID

from build_service import metrics
from build_service.imports import Imported
from build_service.recognition import Examine
from build_service.threads import Threads
from registry import archive, digest, formats, requirements, signature
from registry.errors import EkibenError, InfrastructureError, UserError
from registry.kinds import Kinds
from registry.manifest import Attachment, File, Manifest, check_name, check_path, collision_key, name_from_filename
from registry.origin import Source
from registry.store import ObjectStore, Writer

_BATCH = 1024 * 1024  # bytes handed to the worker thread at a time
_CHUNK = 1024 * 1024
_PIECE = 128 * 1024  # bytes below which parts of a form are not written one by one
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off", "")
_LONGEST_PART_HEADERS = 16 * 1024
_LONGEST_HEADERS = 1024 * 1024  # of all parts together: they are read byte by byte
_MOST_LABELS = 64
_LONGEST_FIELDS = 4 * 1024 * 1024  # of a form that is no multipart: the sample is its largest
_PYTHONS = ("3.11", "3.12", "3.13", "3.14")
FILE_FIELDS = ("file",)
PROJECT = formats.project.KIND
# Small texts that may come as a field or as a file.
TEXT_FIELDS = (
    "name", "kind", "sample", "expected", "requirements", "python", "labels", "deploy", "force",
    "run_id", "artifact_path", "model_uri", "upload_id",
)  # fmt: skip
_ORIGIN_FIELDS = ("run_id", "artifact_path", "model_uri")
_INSTEAD_OF_FILES = (*_ORIGIN_FIELDS, "upload_id")


@dataclass(frozen=True)
class Limits:
    """Bytes and counts that one upload may have; bytes that must stay free on the disk of `folder`."""

    upload: int
    files: int
    field: int
    min_free_disk: int
    folder: Path
    parts: int = 1000  # of a form

    def check_disk(self, coming: int) -> None:
        """InfrastructureError unless the disk has room for so many bytes."""
        free = shutil.disk_usage(self.folder).free
        if free - coming < self.min_free_disk:
            raise InfrastructureError(
                "disk_full",
                f"The disk of the state folder has {free // 2**20} MiB left.",
                hint="Free some space, or point EKIBEN_HOME at a larger disk; then send the upload again.",
                status=507,
            )


@dataclass(frozen=True)
class Received:
    """The file of an upload in parts, whole in the store: LOCATION/files/PATH. `sha256` in hex, if it was announced."""

    location: str
    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Upload:
    """A complete upload: its objects and manifest are stored under `location`."""

    location: str
    name: str
    manifest: Manifest
    signature: signature.Signature | None
    labels: dict[str, str]
    deploy: bool
    force: bool
    seconds: float


@dataclass
class _Text:
    value: bytearray = field(default_factory=bytearray)
    filename: str | None = None


class Intake:
    """Takes one upload. Used from one worker thread at a time."""

    def __init__(self, store: ObjectStore, kinds: Kinds, limits: Limits, examine: Examine) -> None:
        self._store, self._kinds, self._limits = store, kinds, limits
        self._examination = examine()
        self.location = _new_location()
        self._files: list[File] = []
        self._paths: dict[str, str] = {}
        self._texts: dict[str, _Text] = {}
        self._writer: Writer | None = None
        self._hash = hashlib.sha256()
        self._path = ""
        self._size = 0
        self._total = 0
        self._started = time.monotonic()
        self._filename: str | None = None
        self._imported: Imported | None = None
        self._adopted: Received | None = None
        self._packed: str | None = None  # where an archive is that is being unpacked
        self._unpacked = False
        self._settled = False

    # --- what arrives -----------------------------------------------------------------------------------------------

    def begin_file(self, filename: str) -> None:
        path = file_path(filename)
        self._open(path)
        self._filename = self._filename or path

    def begin_member(self, path: str) -> None:
        """As `begin_file`, for a path that was checked."""
        self._open(path)

    def _open(self, path: str) -> None:
        key = collision_key(path)
        if key in self._paths:
            raise UserError(
                "duplicate_file",
                f"The upload has the file {path!r} twice (upper and lower case count as equal).",
                field="file",
                hint="Give each file a name of its own.",
            )
        if len(self._files) >= self._limits.files:
            raise UserError(
                "too_many_files",
                f"The upload has more than {self._limits.files} files.",
                field="file",
                hint="Raise EKIBEN_MAX_FILES, or pack small files together.",
                status=413,
            )
        self._paths[key] = path
        self._path, self._size, self._hash = path, 0, hashlib.sha256()
        self._writer = self._store.writer(f"{self.location}/files/{path}")

    def write(self, data: bytes | memoryview) -> None:
        assert self._writer is not None
        self._total += len(data)
        if self._total > self._limits.upload:
            raise too_large(self._limits.upload)
        self._limits.check_disk(len(data))
        self._hash.update(data)
        self._writer.write(data)
        self._size += len(data)

    def end_file(self) -> None:
        assert self._writer is not None
        self._writer.commit()
        self._writer = None
        self._files.append(File(self._path, self._size, self._hash.hexdigest()))
        metrics.UPLOADED_BYTES.inc(self._size)

    def begin_text(self, name: str, filename: str | None) -> None:
        if name not in TEXT_FIELDS:
            raise UserError(
                "unknown_field",
                f"{name[:60]!r} is not a field of an upload.",
                field=name[:60],
                hint=f"Fields: file, {', '.join(TEXT_FIELDS)}.",
            )
        if name in self._texts:
            raise UserError("repeated_field", f"The field {name!r} is given twice.", field=name)
        self._texts[name] = _Text(filename=filename)

    def write_text(self, name: str, data: bytes | memoryview) -> None:
        text = self._texts[name]
        if len(text.value) + len(data) > self._limits.field:
            raise UserError(
                "field_too_large",
                f"The field {name!r} is larger than {self._limits.field} bytes.",
                field=name,
                hint="A sample of some 100 rows is enough; files of any size go into the field 'file'.",
                status=413,
            )
        text.value.extend(data)

    def source(self) -> Source | None:
        """Where in MLflow the model is, for an upload that names that in place of files."""
        run_id, path, uri = (self._text(name) for name in _ORIGIN_FIELDS)
        if run_id is None and path is None and uri is None:
            return None
        if self._files:
            raise UserError(
                "file_and_run",
                "There are both a file and a run or model of MLflow.",
                field="file",
                hint="Send the file, or name where it is in MLflow.",
            )
        found = Source.of(run_id, path, uri)
        if (name := self._text("name")) is not None:
            check_name(name)
        return found

    def upload_id(self) -> str | None:
        """The upload in parts that is named in place of files."""
        upload = self._text("upload_id")
        if upload is not None and (self._files or any(name in self._texts for name in _ORIGIN_FIELDS)):
            raise UserError(
                "file_and_upload",
                "There are both an upload in parts and a file, or a run or model of MLflow.",
                field="upload_id",
                hint="Name the upload alone; files that belong together go into one archive.",
            )
        return upload

    @property
    def deploys(self) -> bool:
        return self._flag("deploy", True)

    @property
    def given_name(self) -> str | None:
        return self._text("name")

    def adopt(self, received: Received) -> None:
        """A file that is in the store already becomes the version's, where it is; an archive is unpacked elsewhere, so
        that it is whole until the version is registered."""
        if received.size > self._limits.upload:
            raise too_large(self._limits.upload)
        found = ""  # it is hashed once it is known to be no archive, of which only the members count
        if received.sha256 is not None:
            with self._store.open(f"{received.location}/files/{received.path}") as stream:
                found = _sha256(stream)
            if received.sha256 != found:
                raise UserError(
                    "upload_digest_mismatch",
                    f"The file has SHA-256 {found}, and {received.sha256} was announced for it.",
                    field="upload_id",
                    hint="It changed while it was sent: DELETE the upload, and begin a new one.",
                )
        self._adopted, self.location, self._filename = received, received.location, received.path
        self._clear_adopted()
        self._paths[collision_key(received.path)] = received.path
        self._files.append(File(received.path, received.size, found))

    def _clear_adopted(self) -> None:
        """Only the file stays: what another attempt to register it left goes."""
        assert self._adopted is not None
        file = f"{self._adopted.location}/files/{self._adopted.path}"
        for info in list(self._store.list(f"{self._adopted.location}/")):
            if info.key != file:
                self._store.delete(info.key)

    def take(self, imported: Imported) -> None:
        """The files of a model that was fetched, as if they had been uploaded; what the user gave along wins."""
        self._imported = imported
        if self._text("name") is None and imported.name is None:
            raise UserError(
                "missing_name",
                "What this model is called in MLflow is no name for an endpoint.",
                field="name",
                hint="Add name=…, for instance name=churn.",
            )
        self._filename = imported.name
        top = imported.folder / "files"
        for path in sorted(path for path in top.rglob("*") if path.is_file()):
            name = path.relative_to(top).as_posix()
            self._open(check_path(name, code="bad_filename", field="artifact_path"))
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    self.write(chunk)
            self.end_file()
            path.unlink()  # a large model is not on the disk twice for longer than it must be
        own_sample = "sample" in self._texts
        for field_name in ("sample", "expected"):
            kept = imported.folder / f"{field_name}.json"
            if not own_sample and kept.exists():
                self._attach_text(field_name, kept.read_bytes())
        if imported.kind is not None:
            self._attach_text("kind", imported.kind.encode())

    def _attach_text(self, name: str, value: bytes) -> None:
        if name not in self._texts and len(value) <= self._limits.field:
            self.begin_text(name, None)
            self.write_text(name, value)

    # --- what it is -------------------------------------------------------------------------------------------------

    def finish(
        self,
        compatible_with: Callable[[str], signature.Signature | None],
        allow_code: bool,
        allowed_packages: tuple[str, ...] = (),
    ) -> Upload:
        """Recognise, check, and store the manifest. `compatible_with(name)` is the signature of what is live."""
        if not self._files:
            raise UserError(
                "missing_file",
                "The upload has no file.",
                field="file",
                hint="curl -F file=@model.txt URL/models",
            )
        name = self._name()
        with self._examination:
            self._expand_archive()
            recognised = self._recognise()
        if recognised.needs:
            formats.check_needs(recognised, self._text("requirements"))
        kind = formats.choose_kind(recognised, self._kinds, self._text("kind"))
        if kind == PROJECT and not allow_code:
            raise UserError(
                "run_code_not_allowed",
                "This upload is a project with code of its own, which this service does not run.",
                field="file",
                hint="Upload the model alone, or let the operator set EKIBEN_RUN_CODE=true.",
                status=403,
            )
        if kind != PROJECT and not allow_code:
            self._check_requirements(kind, allowed_packages)
        generic = kind != PROJECT and self._kinds.named(kind).generic
        sample, expected = self._samples(generic)
        if generic and recognised.signature is not None and sample is not None:
            signature.check_sample(recognised.signature, sample)
        if generic and sample is None:
            sample = self._example(recognised)
        force = self._flag("force", False)
        if not force and recognised.signature is not None:
            live = compatible_with(name)
            if live is not None:
                signature.check_compatible(live, recognised.signature)
        labels = {**self._labels(), **(self._imported.labels if self._imported else {})}
        manifest = Manifest(
            kind=kind,
            format=recognised.format,
            files=tuple(self._files),
            sample=self._attach("sample.json", sample),
            expected=self._attach("expected.json", expected),
            requirements=self._requirements(),
            python=self._python(),
            model=recognised.path if kind != PROJECT and len(self._files) > 1 else None,
        )
        writer = self._store.writer(f"{self.location}/manifest.json")
        try:
            writer.write(manifest.to_bytes())
            writer.commit(if_absent=True)
        finally:
            writer.abort()
        seconds = time.monotonic() - self._started
        return Upload(self.location, name, manifest, recognised.signature, labels, self.deploys, force, seconds)

    def cancel(self) -> None:
        """Give the upload up from another thread: what examines it ends at once, and `finish` with Cancelled."""
        self._examination.cancel()

    def keep(self, new: bool) -> None:
        """The version's row is written: from now on nothing may take its objects away. Where there was such a version
        already, these are not needed."""
        self._settled = True
        if not new and not self._in_place:
            self._store.delete(self.location)

    def discard(self) -> None:
        """Leave nothing behind, unless it is a version already; of an upload in parts the file stays, to try again."""
        if self._settled:
            return
        self._settled = True
        if self._writer is not None:
            self._writer.abort()
        if self._in_place:
            self._clear_adopted()
        else:
            self._store.delete(self.location)
        if self._packed is not None:
            self._store.delete(self._packed)

    @property
    def _in_place(self) -> bool:
        return self._adopted is not None and self._adopted.location == self.location

    def _open_stored(self, path: str) -> BinaryIO:
        return self._store.open(f"{self.location}/files/{path}")

    def _recognise(self) -> formats.Recognised:
        try:
            return self._examination.recognise([(file.path, file.size) for file in self._files], self._open_stored)
        except UserError as error:
            if self._imported is None or error.code not in ("pickle_refused", "skops_untrusted_type"):
                raise
            way = formats.mlflow.LOGGED_AS_DATA.get(self._imported.flavour or "", "")
            raise UserError(
                error.code, error.detail, field="run_id", hint=f"{way} {error.hint or ''}".strip(), status=error.status
            ) from error

    def _example(self, recognised: formats.Recognised) -> Any:
        """MLflow's input example, if it is what this model takes; nobody asked for it, so it is no error if not."""
        known, example = recognised.signature, recognised.example
        if known is None:
            return None
        try:
            path = self._imported.folder / "example.json" if self._imported is not None else None
            if path is not None and path.exists() and path.stat().st_size <= self._limits.field:
                example = json.loads(path.read_bytes(), parse_constant=_refuse_constant, parse_float=_finite)
            digest.canonical_json(example)
            signature.check_sample(known, example)
            return example
        except (ValueError, RecursionError, UserError):
            return None

    def _name(self) -> str:
        given = self._text("name")
        if given is not None:
            return check_name(given)
        return name_from_filename((self._filename or "model").rpartition("/")[2])

    def _expand_archive(self) -> None:
        """One archive instead of files: its members take its place."""
        if len(self._files) != 1:
            return
        only = self._files[0]
        limits = archive.Limits(files=self._limits.files, total=self._limits.upload)
        members = _Members(self)
        if self._examination.unpack(only.path, only.size, self._open_stored, limits, members):
            if self._packed is not None:
                self._store.delete(self._packed)
                self._packed = None
        elif not only.sha256:
            with self._open_stored(only.path) as stream:
                self._files = [replace(only, sha256=_sha256(stream))]

    def begin_members(self) -> None:
        """From now on the members of the archive are the upload's files; those given before are not."""
        if self._unpacked:
            self._store.delete(self.location)
        elif self._adopted is None:
            self._packed = self.location
        self._unpacked = True
        self.location = _new_location()
        self._files, self._paths, self._total = [], {}, 0

    def _samples(self, generic: bool) -> tuple[Any, Any]:
        """Sample and expected as request and response bodies; a sample file may carry its outputs along."""
        sample, expected = self._json("sample"), self._json("expected")
        if isinstance(sample, list):
            sample = {"inputs": sample}
        if isinstance(sample, dict) and generic:
            for key in ("outputs", "expected"):
                if key in sample and expected is None:
                    expected = sample[key]
            sample = {key: value for key, value in sample.items() if key not in ("outputs", "expected")}
        if isinstance(expected, list):
            expected = {"outputs": expected}
        if sample is not None and not isinstance(sample, dict):
            raise UserError(
                "sample_does_not_fit",
                "The sample is neither a list of rows nor a request body.",
                field="sample",
                hint='For instance [{"age": 31}] or {"inputs": [{"age": 31}]}.',
            )
        if expected is not None and sample is None:
            raise UserError(
                "expected_without_sample",
                "There are expected values but no sample that they belong to.",
                field="expected",
                hint="Send the sample's rows in the field 'sample'.",
            )
        if sample is not None and generic:
            rows = sample.get("inputs")
            outputs = expected.get("outputs") if isinstance(expected, dict) else None
            if isinstance(rows, list) and isinstance(outputs, list) and len(rows) != len(outputs):
                raise UserError(
                    "expected_does_not_fit",
                    f"The sample has {len(rows)} rows and the expected values are {len(outputs)}.",
                    field="expected",
                )
        return sample, expected

    def _attach(self, filename: str, value: Any) -> Attachment | None:
        if value is None:
            return None
        # The order of a row's fields stays as the user gave it: code of their own may depend on it.
        data = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        self._put(filename, data)
        return Attachment(len(data), hashlib.sha256(data).hexdigest())

    def _requirements(self) -> Attachment | None:
        text = self._texts.get("requirements")
        if text is None or not text.value.strip():
            return None
        filename, data = _requirements_name(text.filename), bytes(text.value)
        self._put(f"requirements/{filename}", data)
        return Attachment(len(data), hashlib.sha256(data).hexdigest(), filename)

    def _check_requirements(self, kind: str, allowed: tuple[str, ...]) -> None:
        """UserError `run_code_not_allowed` where they ask for more than the kind brings; the builder looks again."""
        text = self._texts.get("requirements")
        if text is None or not text.value.strip():
            return
        lines = requirements.declared(_requirements_name(text.filename), bytes(text.value))
        lock = (self._kinds.named(kind).dir / "requirements.txt").read_text()
        requirements.check_permitted(requirements.beyond(lines, lock), kind, allow_code=False, allowed=allowed)

    def _put(self, path: str, data: bytes) -> None:
        writer = self._store.writer(f"{self.location}/{path}")
        try:
            writer.write(data)
            writer.commit()
        finally:
            writer.abort()

    def _python(self) -> str | None:
        text = self._text("python")
        if text is not None and text not in _PYTHONS:
            raise UserError(
                "bad_python", f"{text!r} is no Python that models run on.", field="python",
                hint=f"One of {', '.join(_PYTHONS)}.",
            )  # fmt: skip
        return text

    def _labels(self) -> dict[str, str]:
        """`labels` is a JSON object, or key=value pairs separated by commas."""
        text = self._text("labels")
        if text is None:
            return {}
        if text.lstrip().startswith("{"):
            value = self._json("labels")
        else:
            pairs = [pair.partition("=") for pair in text.split(",") if pair.strip()]
            value = {key.strip(): content.strip() for key, equals, content in pairs if equals}
            if len(value) != len(pairs):
                value = None
        if not isinstance(value, dict):
            raise UserError(
                "bad_labels", "The labels are no JSON object, nor key=value pairs.",
                field="labels", hint='For instance labels={"team": "growth"} or labels=team=growth,stage=test.',
            )  # fmt: skip
        return check_labels(
            {str(key): content if isinstance(content, str) else json.dumps(content) for key, content in value.items()}
        )

    def _text(self, name: str) -> str | None:
        text = self._texts.get(name)
        if text is None:
            return None
        try:
            value = text.value.decode().strip()
        except UnicodeDecodeError:
            raise UserError("not_text", f"The field {name!r} is not UTF-8 text.", field=name) from None
        return value or None

    def _json(self, name: str) -> Any:
        text = self._text(name)
        if text is None:
            return None
        try:
            value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
            digest.canonical_json(value)  # no lone surrogates, and not too deep to be written again
            return value
        except (ValueError, RecursionError) as error:
            why = "it has half of a character" if isinstance(error, UnicodeEncodeError) else str(error)
            raise UserError(
                "not_json", f"The field {name!r} is not valid JSON: {why}.", field=name,
                hint="NaN and infinity are no JSON: write null for a missing value.",
            ) from None  # fmt: skip

    def _flag(self, name: str, default: bool) -> bool:
        text = self._text(name)
        if text is None:
            return default
        if text.lower() in _TRUE:
            return True
        if text.lower() in _FALSE:
            return False
        raise UserError("bad_flag", f"The field {name!r} is neither true nor false.", field=name)


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """The labels themselves, if a version may have them. UserError `bad_labels`."""
    if len(labels) > _MOST_LABELS:
        raise UserError(
            "bad_labels", f"There are {len(labels)} labels; a version has at most {_MOST_LABELS}.", field="labels",
            hint="Take some away, or put several into one.",
        )  # fmt: skip
    if any(not key or len(key) > 63 or len(content) > 255 for key, content in labels.items()):
        raise UserError(
            "bad_labels", "A label is longer than 63 (key) or 255 (value) characters, or has no key.", field="labels"
        )
    return labels


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:40]} is larger than any number")
    return value


def _requirements_name(filename: str | None) -> str:
    name = (filename or "requirements.txt").rpartition("/")[2]
    if name in ("requirements.txt", "pylock.toml", "uv.lock"):
        return name
    return "pylock.toml" if name.endswith(".toml") else "requirements.txt"


def _new_location() -> str:
    return f"models/{ULID()}"


def _sha256(stream: BinaryIO) -> str:
    found = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        found.update(chunk)
    return found.hexdigest()


def file_path(filename: str) -> str:
    """The path of an uploaded file in its version, from the name that its sender gave it."""
    path = filename.replace("\\", "/") if ":" in filename[:3] else filename
    return check_path(path, code="bad_filename", field="file")


def too_large(limit: int) -> UserError:
    return UserError(
        "upload_too_large",
        f"The upload is larger than {limit} bytes.",
        field="file",
        hint="Raise EKIBEN_MAX_UPLOAD, if a model may be that large.",
        status=413,
    )


class _Members:
    """Takes the members of an archive into an Intake, in place of the archive."""

    def __init__(self, intake: Intake) -> None:
        self._intake, self._begun = intake, False

    def begin_again(self) -> None:
        self._begun = False

    def begin_file(self, path: str) -> None:
        if not self._begun:
            self._intake.begin_members()
            self._begun = True
        self._intake.begin_member(path)

    def write(self, data: bytes | memoryview) -> None:
        self._intake.write(data)

    def end_file(self) -> None:
        self._intake.end_file()


class _Form:
    """Callbacks of the multipart parser, which feed an Intake."""

    def __init__(self, intake: Intake, boundary: bytes, most_parts: int) -> None:
        self._intake, self._most_parts = intake, most_parts
        self._mark = b"\r\n--" + boundary
        self._parts = self._all_headers = 0
        self._header: bytes = b""
        self._value: bytes = b""
        self._disposition: bytes = b""
        self._text: str | None = None
        self._ended = False
        self._headers_length = 0
        self._pieces = bytearray()
        self._parser = python_multipart.MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        # Counted before they are parsed: each part costs a file that is synced, however small it is.
        self._parts += data.count(self._mark)
        if self._parts > self._most_parts:
            raise UserError(
                "too_many_form_parts",
                f"The form has more than {self._most_parts} parts.",
                field="file",
                hint="Pack the files into one archive: tar -cf model.tar FOLDER; or raise EKIBEN_MAX_FORM_PARTS.",
                status=413,
            )
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise UserError(
                "bad_form",
                f"The form's body is damaged: {error}.",
                hint="Let the HTTP client write the multipart body: curl -F file=@model.txt URL/models",
                status=400,
            ) from error

    def finish(self) -> None:
        if not self._ended:
            raise UserError("upload_cut", "The upload ended before its last byte.", hint="Send it again.", status=400)

    def _part_begin(self) -> None:
        self._disposition = b""
        self._headers_length = 0

    def _bound_headers(self, more: int) -> None:
        self._headers_length += more
        self._all_headers += more
        if self._headers_length > _LONGEST_PART_HEADERS or self._all_headers > _LONGEST_HEADERS:
            raise UserError("bad_form", "The headers of a part of the form are too long.", field="file", status=400)

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._bound_headers(end - start)
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._bound_headers(end - start)
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        _, options = python_multipart.multipart.parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        filename = options[b"filename"].decode(errors="replace") if b"filename" in options else None
        if name in FILE_FIELDS:
            self._text = None
            self._intake.begin_file(filename or "model")
        else:
            self._text = name
            self._intake.begin_text(name, filename)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        view = memoryview(data)[start:end]
        if self._text is not None:
            self._intake.write_text(self._text, view)
        elif len(view) >= _PIECE and not self._pieces:
            self._intake.write(view)
        else:  # the parser cuts at whatever could be a boundary: small pieces are joined before they are written
            self._pieces += view
            if len(self._pieces) >= _PIECE:
                self._flush()

    def _flush(self) -> None:
        if self._pieces:
            self._intake.write(bytes(self._pieces))
            self._pieces.clear()

    def _part_end(self) -> None:
        if self._text is None:
            self._flush()
            self._intake.end_file()

    def _end(self) -> None:
        self._ended = True


class _Fields:
    """A form without files: curl -d run_id=… -d name=churn."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._body = bytearray()

    def write(self, data: bytes) -> None:
        self._body += data
        if len(self._body) > _LONGEST_FIELDS:
            raise _no_file()

    def finish(self) -> None:
        try:
            pairs = parse_qsl(self._body.decode(), keep_blank_values=True, errors="strict", max_num_fields=100)
        except ValueError:  # half of a character too
            raise _no_file() from None
        if not any(name in _INSTEAD_OF_FILES for name, _ in pairs):
            raise _no_file()
        for name, value in pairs:
            self._intake.begin_text(name, None)
            self._intake.write_text(name, value.encode())


def _no_file() -> UserError:
    return UserError(
        "not_an_upload",
        "A form without files was sent.",
        hint="Use multipart: curl -F file=@model.txt URL/models, or --data-binary with a Content-Type of its own.",
        status=415,
    )


class _Nothing:
    """No body is wanted: the query says where the model is, in MLflow or in an upload in parts."""

    def write(self, data: bytes) -> None:
        raise UserError(
            "file_and_run", "There are both a body and a run, model or upload that is named instead.", field="file",
            hint="Send the file, or name where it is.",
        )  # fmt: skip

    def finish(self) -> None:
        pass


class _Raw:
    """A body that is the file itself, with everything else in the query."""

    def __init__(self, intake: Intake, filename: str) -> None:
        self._intake = intake
        intake.begin_file(filename)

    def write(self, data: bytes) -> None:
        self._intake.write(data)

    def finish(self) -> None:
        self._intake.end_file()


@dataclass(frozen=True)
class Pace:
    """How slow a sender may be: `idle_seconds` between two chunks, and over so many seconds of waiting for it `rate`
    bytes a second. Without the second, a byte a minute would hold a place for ever."""

    idle_seconds: float
    rate: float = 0
    clock: Callable[[], float] = time.monotonic


async def bounded(stream: AsyncIterator[bytes], pace: Pace) -> AsyncIterator[bytes]:
    """The same chunks, as long as they come at that pace. What the service itself takes does not count."""
    idle_seconds, waited, came = pace.idle_seconds, 0.0, 0
    while True:
        began = pace.clock()
        try:
            async with asyncio.timeout(idle_seconds):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise UserError(
                "upload_stalled",
                f"The upload stood still for {idle_seconds:g} s.",
                hint="Send it again; on a slow line raise EKIBEN_UPLOAD_IDLE_SECONDS.",
                status=408,
            ) from None
        waited, came = waited + pace.clock() - began, came + len(chunk)
        if waited >= idle_seconds:
            if came < waited * pace.rate:
                raise UserError(
                    "upload_too_slow",
                    f"The upload carried {came} bytes in {waited:.0f} s; at least {pace.rate:g} a second are needed.",
                    hint="Send it again on a faster line, or lower EKIBEN_MIN_UPLOAD_RATE.",
                    status=408,
                )
            waited, came = 0.0, 0
        yield chunk


async def receive(
    intake: Intake,
    stream: AsyncIterator[bytes],
    content_type: str,
    query: dict[str, str],
    length: int | None,
    limits: Limits,
    pace: Pace,
    threads: Threads,
) -> None:
    """Read a request's body into the intake. Raises UserError for what cannot be an upload."""
    limit = limits.upload
    most = limit + 16 * _BATCH  # with room for the fields and what the form puts around the files
    if length is not None and length > most:
        raise too_large(limit)
    media, options = python_multipart.multipart.parse_options_header(content_type)
    sink: _Form | _Fields | _Nothing | _Raw
    if media == b"multipart/form-data":
        boundary = options.get(b"boundary", b"")
        if not 1 <= len(boundary) <= 256:
            raise UserError("bad_form", "The Content-Type names no usable boundary.", field="content-type", status=400)
        sink = _Form(intake, boundary, limits.parts)
    elif media == b"application/x-www-form-urlencoded":
        sink = _Fields(intake)
    else:
        for name in TEXT_FIELDS:
            if name in query:
                intake.begin_text(name, None)
                intake.write_text(name, query[name].encode())
        filename = query.get("filename") or query.get("name")
        elsewhere = any(name in query for name in _INSTEAD_OF_FILES)
        if not filename and not elsewhere:
            raise UserError(
                "missing_filename",
                "A raw body needs a name.",
                field="filename",
                hint="POST /models?name=churn&filename=churn.txt",
            )
        sink = _Nothing() if elsewhere else await threads.run(_Raw, intake, filename or "")
    batch = bytearray()
    seen = 0
    # The network is read while the bytes before are hashed and written: at most two batches are held.
    writing: asyncio.Task[None] | None = None
    try:
        async for chunk in bounded(stream, pace):
            seen += len(chunk)
            if seen > most:  # whatever follows the last boundary counts too
                raise too_large(limit)
            batch += chunk
            if len(batch) >= _BATCH:
                if writing is not None:
                    await writing
                writing, batch = asyncio.create_task(threads.run(sink.write, bytes(batch))), bytearray()
        if writing is not None:
            await writing
    finally:
        if writing is not None and not writing.done():
            await asyncio.wait({writing})  # nothing is discarded under a thread that writes
        if writing is not None and not writing.cancelled():
            writing.exception()  # seen: what went wrong first is what is told
    if batch:
        await threads.run(sink.write, bytes(batch))
    await threads.run(sink.finish)


__all__ = [
    "EkibenError",
    "Intake",
    "Limits",
    "Pace",
    "Received",
    "Upload",
    "bounded",
    "file_path",
    "receive",
    "too_large",
]
