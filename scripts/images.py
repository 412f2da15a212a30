"""`make images`: the service, the builder, and what they stand on in a cluster, as OCI images by our own assembler.

    python -m scripts.images                                      layouts below .images/, one a folder
    python -m scripts.images --push localhost:5000 --insecure     into a registry, as localhost:5000/ekiben-service:…
    python -m scripts.images service builder --output FOLDER      some of them

No daemon, no root beyond what the base needs. The same checkout, locks and packages give the same digests. The base is
an image with Python 3.11: by default a minimal Debian made by debootstrap (needs root), else `--base` names an OCI
layout, an archive, or a reference such as docker.io/library/python:3.11-slim-bookworm.

    service   our packages and their locked dependencies              entry point ekiben-server
    builder   the same for builds, with the bases that images stand on (/app/bases)
    mlflow    MLflow's server from its lock
    training  the kinds' training programs, for scheduled work; large, so only made when it is named
    minio     the server, built from its Go module                    registry, postgres   Debian's packages
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import yaml

from builder_image import base as bases
from builder_image import bento, layers, lock, packing, remote, staging, tarball
from builder_image.image import Image, Platform, Run, assemble
from builder_image.installer import Tools
from builder_image.layers import Layer
from builder_image.process import Processes
from registry.errors import EkibenError

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "containerfiles"
BASE = "default"
MADE = "localhost:5000"
"""Where k8s/images/made looks for the images that this program pushes."""
NAMES = ROOT / "k8s" / "images" / "kustomization.yaml"
"""The names of images that overlays use where they name no other: public ones, where there are any."""
PYTHON = f"/{staging.VENV}/bin/python"
SOURCES = "app/src"
_PATH = f"/app/bin:/{staging.VENV}/bin:/usr/local/bin:/usr/bin:/bin"
_ENV = {
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "PATH": _PATH,
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPATH": f"/{SOURCES}",
    "PYTHONSAFEPATH": "1",
    "PYTHONUNBUFFERED": "1",
}
_USR = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
_LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/info", "etc/init.d")
_POSTGRES_USER = "999"
"""That of the public image, so that a volume fits either."""


@dataclass(frozen=True)
class Recipe:
    """What one image holds beside the base. `stage` fills a folder that is laid out like the image."""

    name: str
    run: Run
    stage: Callable[[Path, Maker], None] = lambda folder, maker: None
    locked: bool = False
    debian: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    """Packages of this checkout."""
    bases: bool = False
    """Whether it carries the bases of images."""
    optional: bool = False
    """Whether it is made only when it is named."""


@dataclass(frozen=True)
class Maker:
    """Where things are kept, and the base."""

    cache: Path
    work: Path
    base: bases.BaseDescriptor
    platform: str
    tools: Tools
    say: Callable[[str], None] = field(repr=False)

    def make(self, recipe: Recipe) -> Image:
        """The image of a recipe; its layers' bytes are in the cache."""
        stack = []
        if recipe.locked:
            stack.append(self._dependencies(recipe.name))
        elif recipe.debian:
            stack.append(self._debian(recipe))
        stage = self.work / recipe.name
        for package in recipe.packages:
            _copy_package(ROOT / package, stage / SOURCES / package)
        recipe.stage(stage, self)
        if stage.exists():
            staging.compile_for(self.base.on(self.platform), stage, stage, self.tools)
            stack.append(layers.make("code", tarball.entries_of_folder(stage, ""), self.blobs))
        if recipe.bases:
            stack.append(self._bases())
        return assemble(self.base.image(self.platform), stack, recipe.run)

    @property
    def blobs(self) -> Path:
        return self.cache / "layers" / "blobs"

    def _dependencies(self, name: str) -> Layer:
        pinned = lock.parse((LOCKS / f"{name}.txt").read_text())
        kept = staging.Kept(self.cache / "layers", lambda key: None)
        work = self.work / f"{name}-deps"
        work.mkdir()
        layer, there = staging.dependencies(
            pinned, self.base.on(self.platform), kept=kept, work=work, tools=self.tools, compression="zstd"
        )
        self.say(f"  {len(pinned.pins)} packages {'already there' if there else 'installed'}")
        return layer

    def _debian(self, recipe: Recipe) -> Layer:
        """Files of Debian's packages; their scripts are not run."""
        folder, stage = self.work / f"{recipe.name}-deb", self.work / f"{recipe.name}-debian"
        folder.mkdir()
        _run(["apt-get", "download", "-qq", *recipe.debian], folder)
        for package in sorted(folder.glob("*.deb")):
            _unpack(package, stage)
        return layers.make("deps", tarball.entries_of_folder(stage, ""), self.blobs)

    def _bases(self) -> Layer:
        """The bases with all their bytes, not compressed again: a registry that is empty gets them from here."""
        folder = self.work / "bases"
        source = self.base.source if not Path(self.base.source).exists() else Path(self.base.source).name
        bases.import_base(str(self.base.layout), self.platform, folder / "app" / "bases", name=BASE, called=source)
        return layers.make("model", tarball.entries_of_folder(folder, ""), self.blobs, "none")


def _program(module: str) -> Callable[[Path, Maker], None]:
    def stage(folder: Path, _: Maker) -> None:
        start = f"#!{PYTHON}\nimport sys\n\nfrom {module} import main\n\nsys.exit(main())\n"
        _write(folder / "app" / "bin" / "ekiben-server", start.encode(), 0o755)

    return stage


def _registry(folder: Path, _: Maker) -> None:
    (folder / "app" / "bin").mkdir(parents=True)
    (folder / "app" / "bin" / "registry").symlink_to("../../usr/bin/docker-registry")


def _postgres(folder: Path, maker: Maker) -> None:
    _write(folder / "app" / "postgres.py", (LOCKS / "postgres.py").read_bytes())
    # initdb asks for the name of the user that runs it
    users = _file_of(maker.base.image(maker.platform).layers, "etc/passwd").decode()
    users += f"postgres:x:{_POSTGRES_USER}:{_POSTGRES_USER}::/tmp:/usr/sbin/nologin\n"
    _write(folder / "etc" / "passwd", users.encode())


def _minio(folder: Path, _: Maker) -> None:
    from tests.cluster import programs  # how it is built from its module, and where that is kept

    place = programs.find("minio")
    if not place.exists():
        programs.build(next(module for module in programs.MODULES if "minio" in module.programs), print)
    _write(folder / "app" / "bin" / "minio", place.read_bytes(), 0o755)


def _ours(name: str, entrypoint: Sequence[str], ports: Sequence[int] = (), **env: str) -> Run:
    return Run(
        env={**_ENV, **env},
        entrypoint=tuple(entrypoint),
        workdir="/tmp",
        ports=tuple(ports),
        labels={"org.opencontainers.image.title": f"ekiben-{name}", "org.opencontainers.image.licenses": "Apache-2.0"},
    )


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "service",
            _ours("service", ["/app/bin/ekiben-server"], [8000], EKIBEN_HOST="0.0.0.0"),
            _program("build_service.__main__"),
            locked=True,
            packages=("bentos", "build_service", "registry"),
        ),
        Recipe(
            "builder",
            _ours(
                "builder",
                [PYTHON, "-m", "builder_image"],
                BENTOML_DO_NOT_TRACK="True",
                BENTOML_HOME="/tmp/bentoml",
                EKIBEN_BASES="/app/bases",
            ),
            locked=True,
            packages=("bentos", "builder_image", "registry"),
            bases=True,
        ),
        Recipe(
            "training",
            _ours("training", [PYTHON, "-m"], EKIBEN_HOME="/var/lib/ekiben", MPLCONFIGDIR="/tmp/matplotlib"),
            locked=True,
            packages=("bentos",),
            optional=True,
        ),
        Recipe("mlflow", _ours("mlflow", [f"/{staging.VENV}/bin/mlflow"], [5000]), locked=True),
        Recipe("minio", _ours("minio", ["/app/bin/minio"], [9000]), _minio),
        Recipe("registry", _ours("registry", ["/app/bin/registry"], [5000]), _registry, debian=("docker-registry",)),
        Recipe(
            "postgres",
            Run(
                env={"LANG": "C.UTF-8", "PATH": f"/usr/lib/postgresql/15/bin:{_PATH}"},
                entrypoint=("/usr/bin/python3", "/app/postgres.py"),
                workdir="/tmp",
                ports=(5432,),
                user=f"{_POSTGRES_USER}:{_POSTGRES_USER}",
                stop_signal="SIGINT",
            ),
            _postgres,
            debian=(
                "libicu72", "libldap-2.5-0", "libpq5", "libsasl2-2", "libxml2", "libxslt1.1", "postgresql-15",
                "postgresql-client-15",
            ),
        ),
    )
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    cache = options.cache or Path(os.environ.get("EKIBEN_IMAGES_CACHE") or Path.home() / ".cache" / "ekiben-images")
    output = options.output or (None if options.push else ROOT / ".images")
    try:
        with _folder(cache) as work:
            tools = Tools.of(os.environ, Processes())
            base = _base(options.base, cache, options.platform, options.insecure)
            maker = Maker(cache, work, base, options.platform, tools, lambda line: print(line, file=sys.stderr))
            refs = {}
            for name in options.images or [each.name for each in RECIPES.values() if not each.optional]:
                maker.say(f"{name} …")
                refs[name] = _deliver(maker.make(RECIPES[name]), name, output, options)
                print(f"{refs[name]}", flush=True)
    except EkibenError as error:
        print(f"{error.detail} [{error.code}]\nhint: {error.hint}", file=sys.stderr)
        return 1
    if options.kustomization is not None:
        _kustomize(options.kustomization, options.overlay, refs)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", nargs="*", choices=[*RECIPES, []], help="which (default: all but training)")
    parser.add_argument("--push", metavar="HOST:PORT[/FOLDER]", help="registry to push to; `docker login` is honoured")
    parser.add_argument("--insecure", action="store_true", help="push over plain http to another machine")
    parser.add_argument("--ca", type=Path, help="PEM file of the registry's own certificate authority")
    parser.add_argument("--tag", default="latest")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="write OCI layouts below it")
    parser.add_argument("--archive", action="store_true", help="with --output: files NAME.tar for docker or kind load")
    parser.add_argument("--platform", default=_this_platform(), help="linux/amd64 or linux/arm64")
    parser.add_argument("--base", help="an OCI layout, an archive or a reference (default: Debian by debootstrap)")
    parser.add_argument("--cache", type=Path, help="keeps layers and the base (EKIBEN_IMAGES_CACHE)")
    parser.add_argument("--kustomization", type=Path, metavar="FOLDER", help="write an overlay that pins these")
    parser.add_argument("--overlay", type=Path, default=ROOT / "k8s" / "overlays" / "test", help="what it pins it in")
    return parser


def _deliver(image: Image, name: str, output: Path | None, options: argparse.Namespace) -> str:
    """Write and push an image; NAME@DIGEST."""
    place = f"{options.push or 'localhost'}/ekiben-{name}"
    if output is not None:
        file = output / (f"{name}.tar" if options.archive else name)
        output.mkdir(parents=True, exist_ok=True)
        image = packing.write(image, file, f"{place}:{options.tag}")
    if options.push:
        ref = remote.Reference.parse(f"{place}:{options.tag}")
        credentials = remote.Credentials.of_docker_config(packing.docker_config(os.environ), ref.host)
        with remote.Registry(ref.host, credentials, options.ca, options.insecure) as registry:
            image = remote.push_image(registry, image, ref).image
    return f"{place}@{image.digest}"


def _kustomize(folder: Path, overlay: Path, refs: Mapping[str, str]) -> None:
    """An overlay of `overlay` in which the images are the ones just pushed, by digest. JSON is YAML."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {each["name"]: each["newName"] for each in yaml.safe_load(NAMES.read_text())["images"]}
    pinned = [
        {"name": place, "newName": ref.partition("@")[0], "digest": ref.partition("@")[2]}
        for name, ref in refs.items()
        for place in dict.fromkeys((f"{MADE}/ekiben-{name}", usual.get(name, f"{MADE}/ekiben-{name}")))
    ]
    fields = "fields.yaml"
    shutil.copyfile(ROOT / "k8s" / "images" / fields, folder / fields)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(overlay.resolve(), folder.resolve())],
        "images": pinned,
        "configurations": [fields],
    }
    (folder / "kustomization.yaml").write_text(json.dumps(kustomization, indent=2) + "\n")


def _base(source: str | None, cache: Path, platform: str, insecure: bool) -> bases.BaseDescriptor:
    store = cache / "bases"
    store.mkdir(parents=True, exist_ok=True)
    if source is None:
        from benchmarks.make_base import make_base

        source = str(make_base(cache / "debian", cache / "packages"))
    if Path(source).exists():
        return bases.import_base(source, platform, store, name=BASE)
    ref = remote.Reference.parse(source)
    credentials = remote.Credentials.of_docker_config(packing.docker_config(os.environ), ref.host)
    with remote.Registry(ref.host, credentials, None, insecure) as registry:
        return bases.import_base(source, platform, store, name=BASE, registry=registry)


def _this_platform() -> str:
    return str(Platform.parse(f"linux/{os.uname().machine}"))


def _copy_package(source: Path, target: Path) -> None:
    """Sources and data that belong to a package: no caches, no models that were trained in it."""
    for path, place in bento.tree(source).items():
        parts = PurePosixPath(path).parts
        if "model" not in parts[1:2]:
            staging.copy(place, target / path)


def _unpack(package: Path, stage: Path) -> None:
    """The files of a Debian package, where a merged /usr has them."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                path = PurePosixPath(member.name).as_posix().lstrip("./")
                if path.split("/")[0] in _USR:
                    path = f"usr/{path}"
                place = stage / path
                if path.startswith(_LEFT_OUT) or "/bitcode/" in path or path.endswith("llvmjit.so"):
                    continue
                if member.issym():
                    target = member.linkname
                    if target.startswith("/"):
                        target = os.path.relpath(target, "/" + os.path.dirname(path))
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.symlink_to(target)
                elif member.isfile() and (content := archive.extractfile(member)) is not None:
                    _write(place, content.read(), 0o755 if member.mode & 0o100 else 0o644)
                elif member.islnk():
                    _write(place, (stage / member.linkname.lstrip("./")).read_bytes(), member.mode & 0o755)
    if process.returncode != 0:
        raise SystemExit(f"{package.name} could not be read")


def _file_of(stack: Sequence[Layer], path: str) -> bytes:
    """A file of the topmost layer that has it."""
    for layer in reversed(stack):
        source = layers.readable(layers.decompress(layer.open(), layer.media_type))
        with tarfile.open(fileobj=source, mode="r|") as archive:
            for member in archive:
                if member.name.lstrip("./") == path and (content := archive.extractfile(member)) is not None:
                    return content.read()
    raise SystemExit(f"the base has no {path}")


def _write(place: Path, data: bytes, mode: int = 0o644) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)
    place.chmod(mode)


def _run(argv: Sequence[str], folder: Path) -> None:
    done = subprocess.run(argv, cwd=folder, check=False, stdout=sys.stderr)
    if done.returncode != 0:
        raise SystemExit(f"{argv[0]} ended with exit code {done.returncode}; its messages are above")


@contextlib.contextmanager
def _folder(cache: Path) -> Iterator[Path]:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="work-", dir=cache) as work:
        yield Path(work)


if __name__ == "__main__":
    sys.exit(main())
