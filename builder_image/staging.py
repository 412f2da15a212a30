"""The deps and code layers, staged as folders laid out like the image and packed from there (image-format §4).

Both are kept by the key of what they are made from, on this machine and as a note in the registry, so that a fresh
machine finds them with one request and installs nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder_image import bento as bentos
from builder_image import environment, installer, layers, tarball
from builder_image.base import BasePlatform
from builder_image.installer import Tools
from builder_image.layers import Compression, Layer
from builder_image.lock import Lock
from builder_image.spec import BuiltLayer
from registry import digest, shelf
from registry.errors import InfrastructureError, UserError

FORMAT = 1
VENV = "app/.venv"
BENTO = "home/bentoml/bento"
SERVING = "app/serving"
LOCK = "layers"
"""Under which a layer is found and marked, and under which those that nobody wants are removed."""
_DATA_BYTES = 64 * 1024
_GLIBC_MINORS = (17, 28, *range(31, 41))  # what uv knows by name
# uv's bookkeeping, which carries times and places
_NOISE_FILES = {"uv_cache.json", "uv_build.json", "direct_url.json"}


Recall = Callable[[str], Layer | None]


@dataclass(frozen=True)
class Kept:
    """Where layers are kept on this machine, and how to ask the registry for one by key. `before` is another such
    folder that is only read."""

    folder: Path
    recall: Recall
    before: Path | None = None

    def find(self, name: layers.Name, key: str) -> Layer | None:
        """The layer made for a key before, here or wherever the image goes. One that is here is marked as wanted."""
        if (kept := self._here(name, key)) is not None:
            return kept
        if self.before is not None and (kept := _kept(self.before, name, key)) is not None:
            return kept
        found = self.recall(key)
        return None if found is None else layers.renamed(found, name)

    def _here(self, name: layers.Name, key: str) -> Layer | None:
        if _kept(self.folder, name, key) is None:
            return None
        with shelf.locked(self.folder, LOCK):
            shelf.mark(_record_of(self.folder, key))
            return _kept(self.folder, name, key)

    def keep(self, layer: Layer, key: str) -> None:
        self._record(key, {name: getattr(layer, name) for name in ("digest", "diff_id", "size", "media_type", "facts")})

    def digest_of_model(self, version: str, size: int) -> str | None:
        """The digest of the model layer of a version (its digest), if it was made on this machine before."""
        try:
            record = _record_of(self.folder, _model_key(version))
            known = json.loads(record.read_bytes())
            shelf.mark(record)
            return str(known["digest"]) if known["size"] == size else None
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def keep_digest_of_model(self, version: str, layer: BuiltLayer) -> None:
        self._record(_model_key(version), {"digest": layer.digest, "size": layer.size})

    def _record(self, key: str, fields: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        record = _record_of(self.folder, key)
        draft = record.with_suffix(f".{os.getpid()}.tmp")
        draft.write_bytes(digest.canonical_json(fields))
        os.replace(draft, record)

    @property
    def blobs(self) -> Path:
        return self.folder / "blobs"


def _record_of(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def _kept(folder: Path, name: layers.Name, key: str) -> Layer | None:
    try:
        known = json.loads(_record_of(folder, key).read_bytes())
        blob = folder / "blobs" / known["digest"].removeprefix("sha256:")
        if blob.stat().st_size != known["size"]:
            return None
        layer = layers.of_file(name, blob, known["media_type"], known["diff_id"], known["digest"], known["size"])
        return layers.noted(layer, known.get("facts"))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def dependencies_key(lock: Lock, base: BasePlatform, compression: Compression) -> str:
    """What the deps layer is made from. The base counts by its ABI: its patches reinstall nothing."""
    return _key(
        "deps",
        lock.digest,
        base.abi,
        base.platform,
        layers.compressor(compression),
        compiler(base),
        installer.version(),
    )


def code_key(recipe: bentos.Recipe, serving: Path, base: BasePlatform, compression: Compression) -> str:
    wrapper = bentos.content_digest(bentos.packages((), serving))
    return _key("code", recipe.tag, recipe.lock.digest, wrapper, layers.compressor(compression), compiler(base))


def _model_key(version: str) -> str:
    return _key("model", version)


def _key(*parts: str) -> str:
    return f"{parts[0]}-{digest.of_json([FORMAT, layers.FORMAT, *parts])[7:]}"


def compiler(base: BasePlatform) -> str:
    """Bytecode is made by the same minor version only; between patches the compiler may differ, so both are named."""
    if environment.minor(None) != base.minor:
        return "none"
    return f"{sys.implementation.cache_tag} {'.'.join(map(str, sys.version_info[:3]))}"


def dependencies(
    lock: Lock,
    base: BasePlatform,
    *,
    kept: Kept,
    work: Path,
    tools: Tools,
    compression: Compression,
    wheels: Path | None = None,
) -> tuple[Layer, bool]:
    """(the deps layer, whether it was there already): the lock as a virtual environment at /app/.venv.

    Raises UserError `no_wheel` where a package has no wheel for the base's Python, C library or machine.
    """
    key = dependencies_key(lock, base, compression)
    if (found := kept.find("deps", key)) is not None:
        return found, True
    with environment.made_once(kept.folder, key):
        if (found := kept.find("deps", key)) is not None:
            return found, True
        stage = work / "deps"
        shutil.rmtree(stage, ignore_errors=True)
        entries = _stage_environment(stage, lock, base, work, tools, wheels)
        layer = layers.make("deps", entries, kept.blobs, compression)
        kept.keep(layer, key)
    shutil.rmtree(stage, ignore_errors=True)
    return layer, False


def _stage_environment(
    stage: Path, lock: Lock, base: BasePlatform, work: Path, tools: Tools, wheels: Path | None
) -> list[tarball.Entry]:
    venv = stage / VENV
    venv.parent.mkdir(parents=True)
    own = environment.interpreter(environment.minor(None))
    made = tools.processes.run(
        tools.uv.argv("venv", "--relocatable", "--quiet", "--python", own, venv), env=tools.env, cwd=work
    )
    if made.code != 0:
        raise InfrastructureError("install_failed", f"no virtual environment could be made: {made.output[-400:]}")
    requirements = work / "deps.txt"
    requirements.write_text(lock.text)
    options = ("--python-version", base.minor, "--python-platform", _uv_platform(base), "--link-mode", "copy")
    environment.install(requirements, venv / "bin" / "python", options, base.minor, tools, wheels)
    _rehome(venv, base)
    compile_for(base, stage, venv / "lib", tools)
    links = [
        tarball.symlink(f"{VENV}/bin/{name}", base.python) for name in ("python", "python3", f"python{base.minor}")
    ]
    return tarball.ordered([*tarball.entries_of_folder(stage, ""), *links])


def _rehome(venv: Path, base: BasePlatform) -> None:
    """Make the environment the base's: its interpreter, its version, no path of this machine, nothing that varies."""
    own_minor = environment.minor(None)
    if base.minor != own_minor:
        os.rename(venv / "lib" / f"python{own_minor}", venv / "lib" / f"python{base.minor}")
    home = os.path.dirname(base.python)
    (venv / "pyvenv.cfg").write_text(
        f"home = {home}\nimplementation = CPython\nversion_info = {base.minor}\n"
        "include-system-site-packages = false\nrelocatable = true\n"
    )
    for script in (venv / "bin").iterdir():
        other_shell = script.name.startswith("activate") and script.name != "activate"
        if script.name.startswith("python") or other_shell or script.suffix == ".bat":
            script.unlink()
        else:
            _point(script)
    for name in (".lock", ".gitignore", "CACHEDIR.TAG", "lib64"):
        (venv / name).unlink(missing_ok=True)
    for found in list((venv / "lib").rglob("*")):
        if found.name in _NOISE_FILES and found.parent.name.endswith(".dist-info"):
            found.unlink()
            _forget(found)


def _forget(file: Path) -> None:
    """Take a removed file out of its distribution's RECORD."""
    record = file.parent / "RECORD"
    if record.is_file():
        lines = record.read_text().splitlines(keepends=True)
        gone = f"{file.parent.name}/{file.name},"
        record.write_text("".join(line for line in lines if not line.startswith(gone)))


def _point(script: Path) -> None:
    """uv's relocatable scripts start through a shell, which a small base may lack: name the interpreter instead."""
    data = script.read_bytes()
    start = b"#!/bin/sh\n'''exec' \"$(dirname"
    if data.startswith(start):
        lines = data.split(b"\n", 3)
        script.write_bytes(f"#!/{VENV}/bin/python\n".encode() + lines[3])


def compile_for(base: BasePlatform, stage: Path, folder: Path, tools: Tools) -> None:
    """Bytecode that stays valid under fixed times and names no path of this machine; none for another minor version.

    A file that does not compile (a template, Python 2) is left as it is: the interpreter would say so on import.
    """
    if compiler(base) == "none":
        return
    interpreter = environment.interpreter(base.minor)
    workers = str(max(1, min(4, os.cpu_count() or 1)))
    argv: list[str | Path] = [
        interpreter, "-P", "-s", "-m", "compileall", "-qq", "-j", workers, "-s", stage, "-p", "/",
        "--invalidation-mode", "unchecked-hash", "-x", r"/tests?/", folder,
    ]  # fmt: skip
    env = {key: value for key, value in tools.env.items() if key != "PYTHONDONTWRITEBYTECODE"}
    tools.processes.run(argv, env={**env, "PYTHONHASHSEED": "0"}, cwd=stage)


def _uv_platform(base: BasePlatform) -> str:
    if base.libc.startswith("musllinux"):
        return f"{base.arch}-unknown-linux-musl"
    minor = int(base.libc.rsplit("_", 1)[1])
    known = [each for each in _GLIBC_MINORS if each <= minor]
    if not known:
        raise UserError(
            "bad_base", f"the base's C library is too old ({base.libc})", field="base", hint="take glibc 2.17 or newer"
        )
    return f"{base.arch}-manylinux_2_{known[-1]}"


@dataclass(frozen=True)
class Facts:
    """What a build must know of a Bento when its code layer is all it has: kept with that layer."""

    predict: str
    schema: Mapping[str, Any]
    envs: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, packed: bentos.Bento) -> Facts:
        return cls(packed.predict, packed.schema, packed.envs)

    @classmethod
    def parse(cls, value: object) -> Facts | None:
        """What a note holds, or None where it is anything else."""
        if not isinstance(value, dict):
            return None
        predict, schema, envs = (value.get(name) for name in ("predict", "schema", "envs"))
        if not isinstance(predict, str) or not predict.startswith("/") or not isinstance(schema, dict):
            return None
        if not isinstance(envs, list) or not all(
            isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair) for pair in envs
        ):
            return None
        return cls(predict, schema, tuple((name, text) for name, text in envs))

    def plain(self) -> dict[str, Any]:
        return {"predict": self.predict, "schema": dict(self.schema), "envs": [list(pair) for pair in self.envs]}


def code(
    recipe: bentos.Recipe,
    packed: bentos.Bento,
    serving: Path,
    data: Mapping[str, str],
    base: BasePlatform,
    *,
    kept: Kept,
    work: Path,
    tools: Tools,
    compression: Compression,
) -> tuple[Layer, Facts]:
    """The code layer, and what is to be known of it: the Bento, and the wrapper that serves it.

    `data` maps a path in the Bento's src/ to a path in the model layer that has the same content: large files stay in
    the model layer alone, and the Bento links to them.
    """
    key = code_key(recipe, serving, base, compression)
    stage = work / "code"
    shutil.rmtree(stage, ignore_errors=True)
    links = {}
    for path, place in bentos.tree(packed.dir).items():
        inner = path.removeprefix("src/")
        if path.startswith("src/") and inner in data and _is_data(place):
            links[f"{BENTO}/{path}"] = data[inner]
            continue
        copy(place, stage / BENTO / path)
    for path, place in bentos.packages((), serving).items():
        copy(place, stage / SERVING / path)
    compile_for(base, stage, stage, tools)
    entries = tarball.entries_of_folder(stage, "")
    for path, target in links.items():
        entries += [*tarball.folders_above(path), tarball.symlink(path, f"/{target}")]
    facts = Facts.of(packed)
    layer = layers.noted(layers.make("code", tarball.ordered(entries), kept.blobs, compression), facts.plain())
    kept.keep(layer, key)
    shutil.rmtree(stage, ignore_errors=True)
    return layer, facts


def find_code(
    recipe: bentos.Recipe, serving: Path, base: BasePlatform, *, kept: Kept, compression: Compression
) -> tuple[Layer, Facts] | None:
    """The code layer that was made for these, with its facts; None where either is missing."""
    found = kept.find("code", code_key(recipe, serving, base, compression))
    facts = None if found is None else Facts.parse(found.facts)
    return None if found is None or facts is None else (found, facts)


def _is_data(place: Path) -> bool:
    """Large, and no source: Python resolves a linked module's folder to where the link points."""
    return place.suffix not in (".py", ".yaml", ".toml", ".txt") and place.stat().st_size >= _DATA_BYTES


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)
