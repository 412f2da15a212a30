"""The builder's commands for people: `containerize` and `base import`. `ekiben` calls them with the same arguments."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from builder_image import base, containerize, remote
from builder_image.installer import Tools
from builder_image.packing import docker_config
from builder_image.process import Processes, redact
from builder_image.progress import Progress
from builder_image.spec import Push, plain
from registry.errors import EkibenError, UserError

_CONTAINERIZE = """Make an OCI image of a Bento, without docker, root or a Dockerfile.

  containerize churn:latest --output churn.tar --base python-3.11
      then: docker load -i churn.tar, or podman load -i churn.tar
  containerize churn:latest --push registry.example:5000/churn:1 --platform linux/arm64

A base image is imported once: base import docker.io/library/python:3.11-slim --name python-3.11
Packages come from where uv takes them: UV_DEFAULT_INDEX, UV_INDEX, HTTPS_PROXY and SSL_CERT_FILE count.
Credentials for --push are those of `docker login` (DOCKER_CONFIG).
"""
_DEFAULT = "default"
_BASE = """Import a base image: an image with CPython, from a registry, an OCI layout or a saved archive.

  base import docker.io/library/python:3.11-slim --name python-3.11
  base import ./python-slim.tar --platform linux/amd64

It is read, never run. Images that are made on it copy its layers.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; the exit code, as for a build."""
    options = _parser().parse_args(arguments)
    try:
        answer = options.run(options, os.environ)
    except EkibenError as error:
        print(f"error: {error.code}: {redact(error.detail)}", file=sys.stderr)
        if error.hint:
            print(f"  hint: {error.hint}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3
    print(json.dumps(answer.value) if options.json else answer.text)
    return 0


@dataclass(frozen=True)
class Answer:
    """What a command says: a JSON value for programs, lines for people."""

    value: object
    text: str


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m builder_image")
    verbs = parser.add_subparsers(required=True)
    form = argparse.RawDescriptionHelpFormatter
    make = verbs.add_parser("containerize", description=_CONTAINERIZE, formatter_class=form)
    make.add_argument("bento", help="NAME, NAME:VERSION or a Bento's folder")
    make.add_argument("--push", metavar="REF", help="HOST:PORT/REPOSITORY:TAG")
    make.add_argument("--output", type=Path, metavar="FILE.tar", help="an archive, or a folder for an OCI layout")
    make.add_argument("--platform", default="linux/amd64", help="linux/amd64 (default) or linux/arm64")
    make.add_argument("--base", metavar="NAME", help="an imported base, or its .toml; may be left out if there is one")
    make.add_argument("--compression", choices=("zstd", "gzip", "none"), default="zstd")
    make.add_argument("--insecure", action="store_true", help="push over plain http to another machine")
    make.add_argument("--ca", type=Path, help="PEM file of the registry's own certificate authority")
    make.add_argument("--json", action="store_true", help="print JSON, for programs")
    make.set_defaults(run=_containerize)
    nouns = verbs.add_parser("base", description=_BASE, formatter_class=form).add_subparsers(required=True)
    take = nouns.add_parser("import", description=_BASE, formatter_class=form)
    take.add_argument("source", help="a registry reference, an OCI layout folder, or a saved archive")
    take.add_argument("--name", help="how to call it (default: `default` for the first one, else from the source)")
    take.add_argument("--platform", help="one platform only (default: linux/amd64 and linux/arm64 as far as there)")
    take.add_argument("--insecure", action="store_true", help="plain http to another machine")
    take.add_argument("--ca", type=Path, help="PEM file of the registry's own certificate authority")
    take.add_argument("--json", action="store_true", help="print JSON, for programs")
    take.set_defaults(run=_import)
    return parser


def _containerize(options: argparse.Namespace, env: Mapping[str, str]) -> Answer:
    if options.push is None and options.output is None:
        raise UserError(
            "no_destination", "neither --push nor --output says where the image goes", hint="--output FILE.tar"
        )
    home = Path(env.get("BENTOML_HOME") or Path(env.get("HOME", "/")) / "bentoml")
    stored = containerize.find(options.bento, home)
    push = None if options.push is None else Push(ref=options.push, insecure=options.insecure, ca=options.ca)
    image = containerize.containerize(
        stored,
        _base(options.base, _home(env) / "bases"),
        options.platform,
        home=home,
        cache=_home(env) / "environments" / "layers",
        output=options.output,
        push=push,
        compression=options.compression,
        progress=Progress(sys.stderr, plain=not options.json),
        tools=Tools.of(env, Processes()),
    )
    where = [str(place) for place in (image.ref, options.output) if place]
    return Answer(plain(image), f"✓ {' and '.join(where)}   {image.size / 1e6:.0f} MB\n{image.digest}")


def _import(options: argparse.Namespace, env: Mapping[str, str]) -> Answer:
    store = _home(env) / "bases"
    store.mkdir(parents=True, exist_ok=True)
    name = options.name
    if name is None and not (store / f"{_DEFAULT}.toml").exists():
        name = _DEFAULT  # the first one is taken where none is named
    if Path(options.source).exists():
        described = base.import_base(options.source, options.platform, store, name=name)
    elif options.source.startswith((".", "/", "~")) or options.source.endswith(".tar"):
        raise UserError(
            "source_not_found",
            f"there is neither a folder nor a file {options.source}",
            field="source",
            hint="give an OCI layout folder, an archive of docker save or podman save, or HOST/REPOSITORY:TAG",
        )
    else:
        ref = remote.Reference.parse(options.source)
        credentials = remote.Credentials.of_docker_config(docker_config(env), ref.host)
        with remote.Registry(ref.host, credentials, options.ca, options.insecure) as registry:
            described = base.import_base(options.source, options.platform, store, name=name, registry=registry)
    platforms = {name: {"digest": one.digest, "python": one.version} for name, one in described.platforms.items()}
    value = {"name": described.name, "file": str(store / f"{described.name}.toml"), "platforms": platforms}
    lines = [f"✓ base {described.name}   {name}, Python {one.version}" for name, one in described.platforms.items()]
    return Answer(value, "\n".join(lines))


def _base(name: str | None, store: Path) -> base.BaseDescriptor:
    if name is not None and name.endswith(".toml"):
        return base.load(Path(name))
    there = sorted(path.stem for path in store.glob("*.toml"))
    if name is None and (len(there) == 1 or _DEFAULT in there):
        name = there[0] if len(there) == 1 else _DEFAULT
    if name not in there:
        raise UserError(
            "base_not_found",
            f"there is no base image {name!r}"
            if name
            else (f"{len(there)} base images are here, and none was named" if there else "there is no base image yet"),
            field="base",
            hint=f"--base {' | '.join(there)}"
            if there
            else "import one first: ekiben base import docker.io/library/python:3.11-slim",
        )
    return base.load(store / f"{name}.toml")


def _home(env: Mapping[str, str]) -> Path:
    return Path(env.get("EKIBEN_HOME") or Path(env.get("HOME", "/")) / ".ekiben")
