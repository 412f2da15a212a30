"""The image of a build: base, deps, code and model layers, written to a file or pushed to a registry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder_image import base as bases
from builder_image import bento as bentos
from builder_image import layers, layout, model, remote, staging
from builder_image.image import Image, Run, assemble
from builder_image.installer import Tools
from builder_image.layers import AnyLayer, Layer
from builder_image.progress import Progress
from builder_image.spec import BuildSpec, BuiltImage, BuiltLayer, ImageOrder, Push
from registry.errors import InfrastructureError, UserError

_MODEL = "home/bentoml/model"


@contextmanager
def destination(push: Push | None, env: Mapping[str, str]) -> Iterator[tuple[remote.Registry, remote.Reference] | None]:
    """The registry that an image goes to, with the credentials that `docker login` keeps for it."""
    if push is None:
        yield None
        return
    ref = remote.Reference.parse(push.ref)
    credentials = remote.Credentials.of_docker_config(docker_config(env), ref.host)
    with remote.Registry(ref.host, credentials, push.ca, push.insecure) as registry:
        yield registry, ref


def docker_config(env: Mapping[str, str]) -> Mapping[str, object]:
    """The parsed `config.json` of docker or podman, over which lies that of EKIBEN_REGISTRY_AUTH, a mounted secret;
    empty where there is none."""
    folder = env.get("DOCKER_CONFIG") or os.path.join(env.get("HOME", "/"), ".docker")
    own, mounted = _config(Path(folder) / "config.json"), env.get("EKIBEN_REGISTRY_AUTH")
    if not mounted:
        return own
    over = _config(Path(mounted))
    return {**own, **over, "auths": {**(own.get("auths") or {}), **(over.get("auths") or {})}}


def _config(file: Path) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            "bad_docker_config",
            f"the docker config.json cannot be used: {type(error).__name__}",
            hint="see DOCKER_CONFIG and EKIBEN_REGISTRY_AUTH; `docker login` writes this file",
        ) from error
    return config if isinstance(config, dict) else {}


@dataclass(frozen=True)
class Bench:
    """What the layers of one build are made with, and where they go."""

    spec: BuildSpec
    order: ImageOrder
    recipe: bentos.Recipe
    described: bases.BaseDescriptor
    platform: bases.BasePlatform
    kept: staging.Kept
    target: tuple[remote.Registry, remote.Reference] | None
    progress: Progress
    tools: Tools

    def with_recall(self, recall: staging.Recall) -> Bench:
        return replace(self, kept=replace(self.kept, recall=recall))

    def dependencies(self) -> tuple[Layer, bool]:
        """(the deps layer, whether it was there), installed where it is not."""
        with self.progress.stage("deps", f"deps layer for {self.order.platform}"):
            deps, had = staging.dependencies(
                self.recipe.lock, self.platform, kept=self.kept, work=self.spec.work, tools=self.tools,
                compression=self.order.compression, wheels=self.recipe.wheels,
            )  # fmt: skip
            self.progress.say("already there" if had else "installed")
        return deps, had

    def found_dependencies(self) -> Layer:
        """The deps layer that was made before."""
        key = staging.dependencies_key(self.recipe.lock, self.platform, self.order.compression)
        found = self.kept.find("deps", key)
        if found is None:
            raise InfrastructureError(
                "layer_missing", "the deps layer that the registry had is not there any more", hint="build again"
            )
        return found

    def found_code(self) -> tuple[Layer, staging.Facts] | None:
        """The code layer that was made before, with what is known of its Bento."""
        return staging.find_code(
            self.recipe, self.spec.serving, self.platform, kept=self.kept, compression=self.order.compression
        )

    def code(self, found: model.Model, bento: Callable[[], bentos.Bento]) -> tuple[Layer, staging.Facts, bool]:
        """(the code layer, what is known of its Bento, whether it was there); `bento` is called where it was not."""
        had = self.found_code()
        packed = bento() if had is None else None
        with self.progress.stage("code", f"code layer of {self.recipe.tag}"):
            if had is not None:
                self.progress.say("already there")
                return *had, True
            assert packed is not None
            code, facts = staging.code(
                self.recipe, packed, self.spec.serving, _data(self.recipe, found), self.platform, kept=self.kept,
                work=self.spec.work, tools=self.tools, compression=self.order.compression,
            )  # fmt: skip
            self.progress.say("made")
            return code, facts, False

    def finish(
        self, found: model.Model, deps: Layer, code: Layer, facts: staging.Facts, reused: Mapping[str, bool]
    ) -> BuiltImage:
        """Put the image together with its model layer, and deliver it."""
        recipe, order, manifest = self.recipe, self.order, found.manifest
        streamed = layers.model(found.dir, manifest.to_json(), manifest.to_bytes())
        known = self.kept.digest_of_model(manifest.digest, streamed.size)
        weights: AnyLayer = streamed if known is None else layers.known(streamed, known)
        run = Run(
            env={**dict(facts.envs), **environment_of_image(self.platform)},
            entrypoint=(f"/{staging.VENV}/bin/python", "-m", "bentos.serving"),
            labels={"io.ekiben.bento": recipe.tag, "io.ekiben.model": manifest.digest},
        )
        image = assemble(self.described.image(order.platform), [deps, code, weights], run)
        keys = {
            staging.dependencies_key(recipe.lock, self.platform, order.compression): deps,
            staging.code_key(recipe, self.spec.serving, self.platform, order.compression): code,
        }
        name = order.push.ref if order.push is not None else f"localhost/ekiben:{manifest.digest[7:19]}"
        reused = {"base": True, "model": False, **reused}
        built = deliver(image, order.output, self.target, name, keys, reused, self.progress)
        if known is None:
            self.kept.keep_digest_of_model(manifest.digest, next(one for one in built.layers if one.name == "model"))
        return built


@contextmanager
def bench(
    spec: BuildSpec,
    order: ImageOrder,
    recipe: bentos.Recipe,
    progress: Progress,
    tools: Tools,
    before: Path | None = None,
) -> Iterator[Bench]:
    """The place to make an image. `before` is a folder of layers that is only read.

    Raises UserError `bad_python` where the base has another Python than the recipe, `bad_base`, `bad_output`.
    """
    if order.output is not None:
        layout.check_output(order.output)
    described = bases.load(order.base)
    platform = described.on(order.platform)
    if platform.minor != recipe.python:
        raise UserError(
            "bad_python",
            f"the base {described.name} has Python {platform.minor}, the model asks for {recipe.python}",
            field="python",
            hint=f"import a base with Python {recipe.python}, or upload with python={platform.minor}",
        )
    with destination(order.push, tools.outer) as target:
        kept = staging.Kept(spec.cache.layers, recalling(target), before)
        yield Bench(spec, order, recipe, described, platform, kept, target, progress, tools)


def pack(
    spec: BuildSpec,
    order: ImageOrder,
    found: model.Model,
    recipe: bentos.Recipe,
    bento: Callable[[], bentos.Bento],
    progress: Progress,
    tools: Tools,
) -> tuple[BuiltImage, staging.Facts]:
    """Assemble the image of a build and deliver it; gives what is known of its Bento too.

    Of a weights-only build this reads the weights once: the other layers are found by their key, here or in the
    registry, and `bento` is not called. A version whose model layer the registry has is not read at all.
    """
    with bench(spec, order, recipe, progress, tools) as at:
        deps, had_deps = at.dependencies()
        code, facts, had_code = at.code(found, bento)
        return at.finish(found, deps, code, facts, {"deps": had_deps, "code": had_code}), facts


def environment_of_image(base: bases.BasePlatform) -> dict[str, str]:
    """What the wrapper and BentoML read at the start. A model's name and number come with the container instead."""
    return {
        "BENTOML_CONTAINERIZED": "true",
        "BENTOML_DO_NOT_TRACK": "True",
        "BENTOML_HOME": "/tmp/bentoml",
        "BENTO_PATH": f"/{staging.BENTO}",
        "EKIBEN_BENTO": f"/{staging.BENTO}",
        "EKIBEN_MODEL_DIR": f"/{_MODEL}",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
        "LC_ALL": "C.UTF-8",
        "PATH": f"/{staging.VENV}/bin:{base.env.get('PATH', '/usr/local/bin:/usr/bin:/bin')}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONPATH": f"/{staging.SERVING}",
        "PYTHONUNBUFFERED": "1",
        "VIRTUAL_ENV": f"/{staging.VENV}",
    }


def recalling(target: tuple[remote.Registry, remote.Reference] | None) -> staging.Recall:
    """How to ask the registry for a layer by the key it was made from."""
    if target is None:
        return lambda key: None
    registry, ref = target
    return lambda key: remote.find_layer(registry, ref.repository, key)


def deliver(
    image: Image,
    output: Path | None,
    target: tuple[remote.Registry, remote.Reference] | None,
    name: str,
    keys: Mapping[str, Layer],
    reused: Mapping[str, bool],
    progress: Progress,
) -> BuiltImage:
    """Write and push an image, and note in the registry what its layers were made from."""
    sent: dict[str, bool] = {}
    if output is not None:
        with progress.stage("write", f"write {output.name}"):
            image = write(image, output, name)
    if target is not None:
        registry, ref = target
        with progress.stage("push", f"push {ref}"):
            report = remote.push_image(registry, image, ref, notes=keys)
            image = report.image
            sent = {layer.digest: not layer.reused for layer in report.layers}
    listed: Sequence[AnyLayer] = image.known_layers()
    return BuiltImage(
        ref=None if target is None else str(target[1]),
        digest=image.digest,
        size=image.size,
        layers=tuple(
            BuiltLayer(
                name=layer.name,
                digest=layer.digest,
                size=layer.size,
                reused=not sent[layer.digest] if layer.digest in sent else reused.get(layer.name, False),
            )
            for layer in listed
            if isinstance(layer, Layer)
        ),
    )


def write(image: Image, output: Path, name: str) -> Image:
    """An archive for docker and podman where the name ends in .tar, an OCI layout folder otherwise."""
    if output.suffix == ".tar":
        return layout.write_archive(image, output, name)
    return layout.write_layout(image, output, name)


def _data(recipe: bentos.Recipe, found: model.Model) -> dict[str, str]:
    """Which files of a project's Bento the model layer holds too."""
    places = {place: f"{_MODEL}/files/{path}" for path, place in found.files.items()}
    return {path: places[place] for path, place in recipe.files.items() if place in places}
