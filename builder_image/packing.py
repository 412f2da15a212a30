"""The image of a build: base, deps, code and model layers, written to a file or pushed to a registry."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from builder_image import base as bases
from builder_image import bento as bentos
from builder_image import layers, layout, model, remote, staging
from builder_image.image import Image, Run, assemble
from builder_image.installer import Tools
from builder_image.layers import AnyLayer, Layer
from builder_image.progress import Progress
from builder_image.spec import BuildSpec, BuiltImage, BuiltLayer, ImageOrder, Push
from registry.errors import UserError

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
    """The parsed `config.json` of docker, podman or a mounted pull secret; empty where there is none."""
    folder = env.get("DOCKER_CONFIG") or os.path.join(env.get("HOME", "/"), ".docker")
    try:
        config = json.loads((Path(folder) / "config.json").read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            "bad_docker_config",
            f"the docker config.json cannot be used: {type(error).__name__}",
            hint="see DOCKER_CONFIG; `docker login` writes this file",
        ) from error
    return config if isinstance(config, dict) else {}


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
        kept = staging.Kept(spec.cache.layers, recalling(target))
        with progress.stage("deps", f"deps layer for {order.platform}"):
            deps, had_deps = staging.dependencies(
                recipe.lock, platform, kept=kept, work=spec.work, tools=tools, compression=order.compression,
                wheels=recipe.wheels,
            )  # fmt: skip
            progress.say("already there" if had_deps else "installed")
        had_code = staging.find_code(recipe, spec.serving, platform, kept=kept, compression=order.compression)
        packed = bento() if had_code is None else None
        with progress.stage("code", f"code layer of {recipe.tag}"):
            if had_code is not None:
                code, facts = had_code
                progress.say("already there")
            if packed is not None:
                code, facts = staging.code(
                    recipe, packed, spec.serving, _data(recipe, found), platform, kept=kept, work=spec.work,
                    tools=tools, compression=order.compression,
                )  # fmt: skip
                progress.say("made")
        manifest = found.manifest
        streamed = layers.model(found.dir, manifest.to_json(), manifest.to_bytes())
        known = kept.digest_of_model(manifest.digest, streamed.size)
        weights: AnyLayer = streamed if known is None else layers.known(streamed, known)
        run = Run(
            env={**dict(facts.envs), **environment_of_image(platform)},
            entrypoint=(f"/{staging.VENV}/bin/python", "-m", "bentos.serving"),
            labels={"io.ekiben.bento": recipe.tag, "io.ekiben.model": manifest.digest},
        )
        image = assemble(described.image(order.platform), [deps, code, weights], run)
        keys = {
            staging.dependencies_key(recipe.lock, platform, order.compression): deps,
            staging.code_key(recipe, spec.serving, platform, order.compression): code,
        }
        reused = {"base": True, "deps": had_deps, "code": had_code is not None, "model": False}
        name = order.push.ref if order.push is not None else f"localhost/ekiben:{manifest.digest[7:19]}"
        built = deliver(image, order.output, target, name, keys, reused, progress)
        if known is None:
            kept.keep_digest_of_model(manifest.digest, next(one for one in built.layers if one.name == "model"))
        return built, facts


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
            report = remote.push_image(registry, image, ref)
            image = report.image
            sent = {layer.digest: not layer.reused for layer in report.layers}
            for key, layer in keys.items():
                remote.remember_layer(registry, ref.repository, key, layer)
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
