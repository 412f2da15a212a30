"""One build: verified files → lock → environment → Bento → image, each taken from the cache when its content is known.

A weights-only build imports no service and installs nothing: all it does is verify the files and find the rest by name.
"""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder_image import bento as bentos
from builder_image import environment, installer, lock, model
from builder_image.installer import Tools
from builder_image.progress import Progress
from builder_image.spec import BuildResult, BuildSpec, BuiltBento, BuiltEnvironment
from registry import digest, requirements
from registry.errors import InfrastructureError

IDENTITY_FORMAT = 1
PROJECT = "bento-project"
PROJECT_KIND = "project"


def build(spec: BuildSpec, progress: Progress, tools: Tools) -> BuildResult:
    """Run a build and return its result. Raises UserError or InfrastructureError; what it leaves is complete or
    under a temporary name."""
    _empty(spec.work)
    try:
        with progress.stage("fetch", "verify the model's files"):
            # the pass that makes the model layer checks the files itself; a project's are read before that
            found = model.read(spec.model.dir, files=spec.image is None or spec.kind.name == PROJECT_KIND)
            if spec.image is not None and found.manifest.format == PROJECT:
                found.verify_files()
        with progress.stage("resolve", "resolve the requirements"):
            recipe = recipe_of(spec, found, tools)
        local = _Local(spec, recipe, progress, tools)
        if spec.image is None:
            made, image = local.both(), None
            predict, schema = made.predict, made.schema
        else:
            from builder_image import packing  # http, tar and compressors are for images only

            image, facts = packing.pack(spec, spec.image, found, recipe, local.bento, progress, tools)
            predict, schema = facts.predict, facts.schema
    finally:
        _empty(spec.work)
    packed, installed = local.packed, local.installed
    return BuildResult(
        identity=identity(found.manifest.digest, recipe, spec),
        bento=None if packed is None else BuiltBento(dir=packed.dir, digest=packed.digest, tag=packed.tag),
        environment=None
        if installed is None
        else BuiltEnvironment(dir=installed.dir, python=installed.python, lock_digest=installed.lock_digest),
        lock=recipe.lock.text,
        predict=predict,
        schema=dict(schema),
        image=image,
        stages=progress.stages,
    )


@dataclass
class _Local:
    """What the local platform serves from: made in full for it, and for an image only as far as that needs it."""

    spec: BuildSpec
    recipe: bentos.Recipe
    progress: Progress
    tools: Tools
    installed: environment.Environment | None = None
    packed: bentos.Bento | None = None

    def both(self) -> bentos.Bento:
        recipe, progress = self.recipe, self.progress
        with progress.stage("environment", f"environment of {len(recipe.lock.pins)} packages"):
            self.installed = environment.ensure(
                recipe.lock,
                python=recipe.python,
                cache=self.spec.cache.environments,
                tools=self.tools,
                wheels=recipe.wheels,
            )
            progress.say("already there" if self.installed.reused else "installed")
        with progress.stage("bento", f"Bento {recipe.tag}"):
            self.packed = bentos.ensure(
                recipe,
                environment=self.installed,
                cache=self.spec.cache.bentos,
                work=self.spec.work,
                tools=self.tools,
            )
            progress.say("already there" if self.packed.reused else "made")
        return self.packed

    def bento(self) -> bentos.Bento:
        """The Bento alone: only one that was never made needs an environment, in which its service is imported."""
        self.packed = bentos.find(self.spec.cache.bentos, self.recipe)
        return self.both() if self.packed is None else self.packed


def identity(version_digest: str, recipe: bentos.Recipe, spec: BuildSpec) -> str:
    """Equal identity is the same build: what is packed, with what, for which base and platform, by which format."""
    return digest.of_json(
        {
            "format": IDENTITY_FORMAT,
            "version": version_digest,
            "kind": recipe.content,
            "bento": recipe.tag,
            "lock": recipe.lock.digest,
            "python": recipe.python,
            "base": None if spec.image is None else digest.of_bytes(spec.image.base.read_bytes()),
            "platform": None if spec.image is None else spec.image.platform,
            "compression": None if spec.image is None else spec.image.compression,
            "uv": installer.version(),
            "bentoml": recipe.lock.version("bentoml"),
        }
    )


def recipe_of(spec: BuildSpec, found: model.Model, tools: Tools) -> bentos.Recipe:
    if found.manifest.format == PROJECT or spec.kind.name == PROJECT_KIND:
        from builder_image import project  # yaml and ast are for projects only

        return project.recipe(spec, found, tools)
    return _recipe_of_kind(spec, found, tools)


def _recipe_of_kind(spec: BuildSpec, found: model.Model, tools: Tools) -> bentos.Recipe:
    kind = _kind_toml(spec.kind.dir)
    python = environment.minor(found.manifest.python)
    shared = [name for name in kind.get("packages", []) if isinstance(name, str)]
    packages = bentos.packages(shared, spec.serving)
    files = bentos.sources(spec.kind.dir)
    resolved, trusted = _lock_of_kind(spec, found, python, tools)
    return bentos.Recipe(
        name=spec.kind.name,
        files=files,
        lock=resolved,
        trusted=trusted,
        python=python,
        content=bentos.content_digest({**files, **packages}),
        packages=packages,
        service=str(kind["service"]),
        predict=str(kind.get("predict", "/predict")),
    )


def _lock_of_kind(spec: BuildSpec, found: model.Model, python: str, tools: Tools) -> tuple[lock.Lock, bool]:
    """The lock, and whether the kind's author chose all of it.

    Requirements that the kind's own lock satisfies change nothing. Others are code of the user's: UserError
    `run_code_not_allowed` where neither code nor these packages are allowed.
    """
    committed = _committed(spec, "requirements.txt")
    if found.requirements is None:
        return lock.parse(committed if spec.lock is None else spec.lock), True
    extra: tuple[str, ...] = ()
    if spec.lock is None:
        extra = lock.user_requirements(found.requirements, work=spec.work, tools=tools)
        more = requirements.beyond(extra, committed)
    else:  # resolved when the version was first built: the kind may have moved on, the packages are of its choice still
        known = requirements.pins_of(committed)
        more = {name: name for name in requirements.pins_of(spec.lock) if name not in known}
    requirements.check_permitted(
        more, spec.kind.name, allow_code=spec.allow_code, allowed=frozenset(spec.allowed_packages)
    )
    if spec.lock is not None:
        kept = lock.parse(spec.lock)
        return kept, kept == lock.parse(committed)
    if not more:
        return lock.parse(committed), True
    own = requirements.lines_of("requirements.in", _committed(spec, "requirements.in").encode())
    resolved = lock.resolve([*own, *extra], python=python, work=spec.work, tools=tools, known=spec.cache.locks)
    return resolved, False


def _committed(spec: BuildSpec, name: str) -> str:
    try:
        return (spec.kind.dir / name).read_text()
    except FileNotFoundError as error:
        raise InfrastructureError(
            "bad_kind", f"the kind {spec.kind.name} has no {name}", hint="run `make lock`"
        ) from error


def _kind_toml(folder: Path) -> dict[str, Any]:
    try:
        kind = tomllib.loads((folder / "kind.toml").read_text())
    except (FileNotFoundError, tomllib.TOMLDecodeError) as error:
        raise InfrastructureError("bad_kind", f"the kind {folder.name} has no usable kind.toml: {error}") from error
    if not isinstance(kind.get("service"), str):
        raise InfrastructureError("bad_kind", f"kind.toml of {folder.name} names no service")
    return kind


def _empty(work: Path) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
