"""Any Bento of the local Bento store as an OCI image: what `bentoml containerize` does, without a daemon, root or a
Dockerfile, for another machine's platform as well.

The Bento's files are read; its code is not run. Nothing but the requirements is installed, from wheels, with hashes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from builder_image import base as bases
from builder_image import bento as bentos
from builder_image import layers, layout, lock, packing, staging, tarball
from builder_image.image import Run, assemble
from builder_image.installer import Tools
from builder_image.layers import AnyLayer, Compression, StreamedLayer
from builder_image.progress import Progress
from builder_image.spec import BuiltImage, Push
from registry.errors import UserError
from registry.requirements import logical_lines, requirement_lines

_INDEX_OPTIONS = ("--index-url", "-i", "--extra-index-url", "--find-links", "-f", "--trusted-host", "--no-index")
_STANDARD_COMMAND = "apt-get update && apt-get install -q -y --no-install-recommends --allow-remove-essential"


@dataclass(frozen=True)
class StoredBento:
    """A Bento in the store. `info` is its bento.yaml."""

    dir: Path
    info: Mapping[str, Any]

    @property
    def tag(self) -> str:
        return f"{self.info.get('name')}:{self.info.get('version')}"


def find(tag: str, home: Path) -> StoredBento:
    """`NAME`, `NAME:latest` or `NAME:VERSION` in the store below `home` (BENTOML_HOME), or a Bento's own folder."""
    if (Path(tag) / "bento.yaml").is_file():
        return _load(Path(tag).resolve())
    name, _, wanted = tag.partition(":")
    folder = home / "bentos" / name
    plain = all(part not in ("", ".", "..") and "/" not in part for part in (name, wanted or "latest"))
    version = wanted
    if plain and wanted in ("", "latest"):
        latest = folder / "latest"
        version = latest.read_text().strip() if latest.is_file() else ""
    if not plain or not version or not (folder / version / "bento.yaml").is_file():
        raise UserError(
            "bento_not_found",
            f"there is no Bento {tag!r} in the Bento store",
            hint="`bentoml list` shows what is there; `bentoml build` makes one; BENTOML_HOME moves the store",
        )
    return _load(folder / version)


def _load(folder: Path) -> StoredBento:
    try:
        info = yaml.safe_load((folder / "bento.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("bad_bento", f"bento.yaml is not readable: {error}") from error
    if not isinstance(info, dict) or not info.get("name") or not info.get("version"):
        raise UserError("bad_bento", "bento.yaml names no Bento", hint="build it again with `bentoml build`")
    return StoredBento(folder, info)


def containerize(
    stored: StoredBento,
    described: bases.BaseDescriptor,
    platform: str,
    *,
    home: Path,
    cache: Path,
    output: Path | None,
    push: Push | None,
    compression: Compression,
    progress: Progress,
    tools: Tools,
) -> BuiltImage:
    """Make the image and deliver it. `home` is BENTOML_HOME (for models), `cache` keeps layers between runs.

    Raises UserError `needs_dockerfile`, `bad_python`, `needs_model_store`, and those of the resolution.
    """
    if output is not None:
        layout.check_output(output)
    base = described.on(platform)
    refuse(stored.info)
    _check_python(stored.info, base)
    with (
        tempfile.TemporaryDirectory(prefix="ekiben-") as temporary,
        packing.destination(push, tools.outer) as target,
    ):
        work = Path(temporary)
        kept = staging.Kept(cache, packing.recalling(target))
        kept.blobs.mkdir(parents=True, exist_ok=True)
        with progress.stage("resolve", f"requirements of {stored.tag}"):
            lines, wheels = requirements(stored, work)
            resolved = lock.resolve(
                lines, python=base.minor, work=work, tools=tools, wheels=wheels, known=cache / "locks"
            )
        with progress.stage("deps", f"deps layer for {platform}"):
            deps, had_deps = staging.dependencies(
                resolved, base, kept=kept, work=work, tools=tools, compression=compression, wheels=wheels
            )
            progress.say("already there" if had_deps else "installed")
        with progress.stage("code", f"code layer of {stored.tag}"):
            code = _code(stored, base, kept, work, tools, compression)
        models = _models(stored, home)
        stack: list[AnyLayer] = [deps, code, *([models] if models is not None else [])]
        image = assemble(described.image(platform), stack, _run(stored, base))
        keys = {staging.dependencies_key(resolved, base, compression): deps}
        name = push.ref if push is not None else stored.tag
        return packing.deliver(image, output, target, name, keys, {"base": True, "deps": had_deps}, progress)


def refuse(info: Mapping[str, Any]) -> None:
    """Raise `needs_dockerfile` for what an image made of layers of files cannot do."""
    docker, image = info.get("docker") or {}, info.get("image") or {}
    for name in ("system_packages", "setup_script", "dockerfile_template", "cuda_version"):
        if docker.get(name):
            raise _needs_dockerfile(f"docker.{name}")
    if any(value for value in (info.get("conda") or {}).values()):
        raise _needs_dockerfile("conda")
    for command in (*(image.get("commands") or []), *(image.get("post_commands") or [])):
        if not str(command).startswith(_STANDARD_COMMAND):
            raise _needs_dockerfile(f"the command {str(command)[:120]!r}")
    wanted = str(image.get("base_image") or docker.get("base_image") or "")
    if wanted and not wanted.startswith("python:"):
        raise _needs_dockerfile(f"the base image {wanted}")


def _needs_dockerfile(what: str) -> UserError:
    return UserError(
        "needs_dockerfile",
        f"the Bento asks for {what}, which an image made of layers cannot do",
        hint="use `bentoml containerize`, or import a base image that has it (`base import`) and drop the option",
    )


def _check_python(info: Mapping[str, Any], base: bases.BasePlatform) -> None:
    wanted = (info.get("image") or {}).get("python_version") or (info.get("docker") or {}).get("python_version")
    if wanted and ".".join(str(wanted).split(".")[:2]) != base.minor:
        raise UserError(
            "bad_python",
            f"the Bento was made for Python {wanted}, the base has {base.minor}",
            field="base",
            hint=f"take a base with Python {wanted}",
        )


def requirements(stored: StoredBento, work: Path) -> tuple[tuple[str, ...], Path | None]:
    """(requirement lines, folder of own wheels). Index options that `bentoml build` wrote are left out: the settings
    of whoever builds the image decide where packages come from."""
    python = stored.dir / "env" / "python"
    file = next(
        (python / name for name in ("requirements.lock.txt", "requirements.txt") if (python / name).is_file()), None
    )
    if file is None:
        raise UserError("bad_bento", "the Bento has no env/python/requirements.txt", hint="build it again")
    found = [folder for folder in (stored.dir / "src" / "wheels", python / "wheels") if folder.is_dir()]
    wheels = work / "wheels"
    for folder in found:
        wheels.mkdir(exist_ok=True)
        for wheel in folder.glob("*.whl"):
            shutil.copyfile(wheel, wheels / wheel.name)
    lines = []
    for line in logical_lines(file.read_text(encoding="utf-8-sig")):
        if line.split()[0].split("=")[0] in _INDEX_OPTIONS:
            continue
        name = PurePosixPath(line.split()[0])
        if name.suffix == ".whl" and (wheels / name.name).is_file():
            (own,) = [(key, value) for key, value in lock.own_wheels(wheels).items() if _names(name.name, key)]
            line = f"{own[0]}=={own[1].version}"
        lines.append(line)
    return requirement_lines(lines, file.name), wheels if wheels.is_dir() else None


def _names(wheel: str, package: str) -> bool:
    return wheel.split("-")[0].lower().replace("_", "-").replace(".", "-") == package


def _code(
    stored: StoredBento,
    base: bases.BasePlatform,
    kept: staging.Kept,
    work: Path,
    tools: Tools,
    compression: Compression,
) -> layers.Layer:
    stage = work / "code"
    for path, place in bentos.tree(stored.dir).items():
        if path.split("/")[0] not in ("models", "hf-models"):
            staging.copy(place, stage / staging.BENTO / path)
    staging.compile_for(base, stage, stage, tools)
    return layers.make("code", tarball.entries_of_folder(stage, ""), kept.blobs, compression)


def _models(stored: StoredBento, home: Path) -> StreamedLayer | None:
    """The Bento's models where BentoML's own images have them: models/ in the Bento, uncompressed, in one layer."""
    entries: list[tarball.Entry] = []
    latest: dict[str, str] = {}
    for name, version in sorted(set(_model_tags(stored.info))):
        places = [root / "models" / name / version for root in (stored.dir, home)]
        place = next((each for each in places if each.is_dir()), None)
        if place is None:
            raise UserError(
                "needs_model_store",
                f"the model {name}:{version} of the Bento is not in the model store",
                hint=f"`bentoml models pull {name}:{version}`, or import it again",
            )
        entries += tarball.entries_of_folder(place, f"{staging.BENTO}/models/{name}/{version}")
        latest[name] = version
    for name, version in latest.items():
        # the store looks `NAME:latest` up in this file, and would write it where it is missing
        entries.append(tarball.file(f"{staging.BENTO}/models/{name}/latest", version.encode()))
    if not entries:
        return None
    entries = tarball.ordered(entries)
    return StreamedLayer("model", layers.TAR, tarball.size_of(entries), lambda: tarball.stream(entries))


def _model_tags(info: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    services = info.get("services") or []
    for model in [*(info.get("models") or []), *(each for service in services for each in service.get("models") or [])]:
        if model.get("registry", "bentoml") != "bentoml":
            raise UserError(
                "needs_model_store",
                f"the Bento downloads {model.get('tag')} from {model.get('registry')} when it is built",
                hint="save the model into the Bento store first, and refer to it there",
            )
        name, _, version = str(model.get("tag")).partition(":")
        if not name or not version or {"", ".", ".."} & {name, version} or "/" in name + version:
            raise UserError("bad_bento", f"bento.yaml names the model {str(model.get('tag'))[:80]!r}")
        yield name, version


def _run(stored: StoredBento, base: bases.BasePlatform) -> Run:
    """The variables of BentoML's own images. Its entrypoint.sh needs bash; the program is started without it."""
    own = {
        str(env["name"]): str(env.get("value") or "")
        for env in stored.info.get("envs") or []
        if env.get("stage", "all") != "build"
    }
    path = f"/{staging.BENTO}"
    env = {**own, **packing.environment_of_image(base), "BENTOML_HF_CACHE_DIR": f"{path}/hf-models"}
    if (stored.dir / "src" / "model").is_dir():
        del env["EKIBEN_MODEL_DIR"]  # it carries its model; else one is mounted at that place
    labels = {"io.ekiben.bento": stored.tag}
    if (stored.dir / "src" / "bentos" / "serving").is_dir():
        env["PYTHONPATH"] = f"{path}/src"
        return Run(env=env, entrypoint=(f"/{staging.VENV}/bin/python", "-m", "bentos.serving"), labels=labels)
    del env["EKIBEN_BENTO"], env["PYTHONPATH"]
    env.pop("EKIBEN_MODEL_DIR", None)
    program = (f"/{staging.VENV}/bin/python", "-m", "bentoml")
    return Run(env=env, entrypoint=program, cmd=("serve", path), labels=labels)
