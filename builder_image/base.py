"""Base images: imported once into an OCI layout, described in `bases/NAME.toml`, never run (image-format §2).

What a build must know of a base — interpreter, version, SOABI, C library — is learnt by reading its layers. The ABI
identity is made of just these, so that a patched base keeps the deps layers that were made for it.
"""

from __future__ import annotations

import posixpath
import re
import tarfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from builder_image import image as _image
from builder_image import layers as _layers
from builder_image import layout, remote
from builder_image.image import BaseImage, Image, Platform
from builder_image.layers import Layer
from registry import digest as _digest
from registry.errors import InfrastructureError, UserError

SCHEMA = "ekiben.base.v1"
PLATFORMS = ("linux/amd64", "linux/arm64")

_DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_LARGEST_LOOKED_INTO = 64 << 20
_MOST_MEMBERS = 1_000_000
_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}

_INTERPRETER = re.compile(r"python3\.(\d+)")
_INTERESTING = re.compile(
    r"(?:^|/)(?:python3\.\d+|libpython3\.\d+\.so(?:\.1\.0)?|libc\.so\.6|libc-2\.\d+\.so|ld-musl-[a-z0-9_]+\.so\.1"
    r"|libc\.musl-[a-z0-9_]+\.so\.1|_sysconfigdata_[A-Za-z0-9_-]*\.py)$"
)
_EXTENSION = re.compile(r"/python3\.(\d+)/lib-dynload/[^/]+\.(cpython-3(\d+)-[a-z0-9_]+(?:-[a-z0-9_]+)*)\.so$")
_SOABI = re.compile(rb"['\"]SOABI['\"]:\s*['\"](cpython-[a-z0-9_-]+)['\"]")
_GLIBC = re.compile(rb"GNU C Library[^\n\0]{0,200}release version (\d+)\.(\d+)")
_MUSL = re.compile(rb"\0(1\.[12])\.\d+\0")


@dataclass(frozen=True)
class BasePlatform:
    """A base on one platform. `python` is the interpreter's path in the image, `version` e.g. `3.11.2`."""

    platform: str
    digest: str
    python: str
    version: str
    soabi: str
    libc: str
    env: Mapping[str, str]
    layers: tuple[Layer, ...]

    @property
    def minor(self) -> str:
        """`3.11`."""
        return ".".join(self.version.split(".")[:2])

    @property
    def arch(self) -> str:
        """The machine as wheels name it: x86_64, aarch64."""
        name = Platform.parse(self.platform).architecture
        return _ARCHITECTURES.get(name, name)

    @property
    def platform_tag(self) -> str:
        """The newest platform tag of wheels that run here, e.g. `manylinux_2_36_x86_64`."""
        return f"{self.libc}_{self.arch}"

    @property
    def abi(self) -> str:
        """Identity of everything that an installed environment depends on (image-format §2.3)."""
        return _digest.of_json(
            {
                "arch": self.arch,
                "interpreter": self.python,
                "libc": self.libc,
                "python": self.minor,
                "soabi": self.soabi,
            }
        )


@dataclass(frozen=True)
class BaseDescriptor:
    """A `bases/NAME.toml` with the OCI layout beside it."""

    name: str
    source: str
    layout: Path
    platforms: Mapping[str, BasePlatform]

    def on(self, platform: str) -> BasePlatform:
        """Raises UserError `base_platform_missing`."""
        found = self.platforms.get(str(Platform.parse(platform)))
        if found is None:
            raise UserError(
                "base_platform_missing",
                f"the base {self.name} was imported for {', '.join(self.platforms)}, not for {platform}",
                field="platform",
                hint=f"ekiben base import {self.source} --platform {platform} --name {self.name}",
            )
        return found

    def image(self, platform: str) -> BaseImage:
        """The base as images are assembled on it."""
        found = self.on(platform)
        stored = layout.read_layout(self.layout, Platform.parse(platform))
        if stored.digest != found.digest:
            raise InfrastructureError(
                "digest_mismatch",
                f"the base {self.name} is described as {found.digest}, but its layout holds {stored.digest}",
                hint=f"import it again: ekiben base import {self.source} --name {self.name}",
            )
        lower = tuple(_layers.renamed(layer, "base") for layer in stored.known_layers())
        return BaseImage(stored.digest, stored.platform, lower, stored.config)


def import_base(
    source: str,
    platform: str | None,
    store: Path,
    *,
    name: str | None = None,
    registry: remote.Registry | None = None,
    progress: layout.Progress | None = None,
    called: str | None = None,
) -> BaseDescriptor:
    """Copy a base image into `store/NAME/` (an OCI layout) and describe it in `store/NAME.toml`.

    `source` is an OCI layout folder, an archive file, or a registry reference (pulled through `registry`, or
    anonymously). Without `platform` all of linux/amd64 and linux/arm64 that the source has are imported; importing
    again under the same name adds a platform or replaces it. `called` is what the description says of the source in
    place of its path. Nothing of the image is run. Raises UserError
    `base_without_python`, `base_platform_missing`, `bad_image`, `bad_reference`, `bad_base_name`, and what the
    registry raises.
    """
    name = name or _name_of(source)
    if not re.fullmatch(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?", name):
        raise UserError(
            "bad_base_name", f"{name!r} is not a base's name", field="name", hint="a-z, 0-9, dots and hyphens"
        )
    images = _images(source, Platform.parse(platform) if platform else None, registry)
    folder = store / name
    found = {}
    for image in images:
        with_bytes = layout.write_layout(image, folder, progress=progress)
        kept = layout.read_layout(folder, with_bytes.platform)
        found[str(kept.platform)] = describe(kept)
    file = store / f"{name}.toml"
    earlier = dict(load(file).platforms) if file.exists() else {}
    descriptor = BaseDescriptor(name, called or source, folder, dict(sorted({**earlier, **found}.items())))
    layout.replace_file(file, tomli_w.dumps(_as_toml(descriptor)).encode())
    return descriptor


def load(path: Path) -> BaseDescriptor:
    """Read a `bases/NAME.toml`. Raises UserError `bad_base`."""
    try:
        described = tomllib.loads(path.read_text())
        if described["schema"] != SCHEMA:
            raise ValueError(f"schema {described['schema']!r}, expected {SCHEMA!r}")
        folder = path.parent / described["layout"]
        platforms = {
            key: BasePlatform(
                key,
                _image.checked_digest(value["digest"]),
                value["python"],
                value["version"],
                value["soabi"],
                value["libc"],
                value["env"],
                tuple(_layer_of(item, folder) for item in value["layers"]),
            )
            for key, value in described["platforms"].items()
        }
        return BaseDescriptor(described["name"], described["source"], folder, platforms)
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            "bad_base",
            f"{path.name} is not a usable description of a base image: {error}",
            field="base",
            hint="make one: ekiben base import REFERENCE-OR-LAYOUT",
        ) from error


def describe(image: Image) -> BasePlatform:
    """What a build must know of a base image, learnt by reading its layers. Raises UserError `base_without_python`."""
    tree = Tree()
    for layer in image.known_layers():
        tree.lay(_members(layer))
    env = _image.environment(image.config)
    python, minor = _interpreter(tree, env)
    soabi = _soabi(tree, minor)
    return BasePlatform(
        str(image.platform),
        image.digest,
        python,
        _version(tree, python, minor, env),
        soabi,
        _libc(tree),
        env,
        tuple(_layers.renamed(layer, "base") for layer in image.known_layers()),
    )


class Tree:
    """The files of stacked layers: which paths there are, symlinks, and the content of the few files that matter."""

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[str, str | bytes | None]] = {}

    def lay(self, members: Iterable[tuple[str, str, str | bytes | None]]) -> None:
        """Put a layer on top: (path, kind, link target or content). Whiteouts hide what lies below, not beside."""
        upper: dict[str, tuple[str, str | bytes | None]] = {}
        for path, kind, value in members:
            folder, name = posixpath.split(path)
            if name == ".wh..wh..opq":
                self._hide(folder, itself=False)
            elif name.startswith(".wh."):
                self._hide(posixpath.join(folder, name[4:]), itself=True)
            else:
                if kind != "dir" and self._nodes.get(path, ("", None))[0] == "dir":
                    self._hide(path, itself=True)
                upper[path] = (kind, value)
        for path, (kind, value) in upper.items():
            above = posixpath.dirname(path)
            while above and above not in self._nodes and above not in upper:
                self._nodes[above] = ("dir", None)  # a tar need not name the folders of its files
                above = posixpath.dirname(above)
            if kind == "hard":
                target = upper.get(str(value)) or self._nodes.get(str(value))
                self._nodes[path] = target or ("file", None)
            else:
                self._nodes[path] = (kind, value)

    def paths(self) -> Iterator[str]:
        return iter(self._nodes)

    def resolve(self, path: str) -> str | None:
        """The real path, without a leading slash, of a path that may go over symlinks; None where there is nothing."""
        pending, real, turns = [part for part in path.split("/") if part], "", 0
        while pending:
            part = pending.pop(0)
            if part in (".", ""):
                continue
            if part == "..":
                real = posixpath.dirname(real)
                continue
            here = f"{real}/{part}" if real else part
            kind, value = self._nodes.get(here, ("", None))
            if kind == "link":
                turns += 1
                if turns > 40:
                    return None
                target = str(value)
                if target.startswith("/"):
                    real = ""
                pending = [step for step in target.split("/") if step] + pending
            else:
                real = here
        return real if real in self._nodes else None

    def content(self, path: str) -> bytes | None:
        real = self.resolve(path)
        value = self._nodes[real][1] if real is not None else None
        return value if isinstance(value, bytes) else None

    def _hide(self, path: str, *, itself: bool) -> None:
        for known in [known for known in self._nodes if known.startswith(path + "/") or (itself and known == path)]:
            del self._nodes[known]


def _members(layer: Layer) -> Iterator[tuple[str, str, str | bytes | None]]:
    source = _layers.readable(_layers.decompress(layer.open(), layer.media_type))
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=1 << 20) as archive:
            for count, member in enumerate(archive):
                if count > _MOST_MEMBERS:
                    raise UserError("bad_image", f"the layer {layer.digest} has more than {_MOST_MEMBERS} files")
                path = posixpath.normpath(member.name.lstrip("/")) if member.name.strip("/") else "."
                if path == "." or path.startswith("../"):
                    continue
                if member.isdir():
                    yield path, "dir", None
                elif member.issym():
                    yield path, "link", member.linkname
                elif member.islnk():
                    yield path, "hard", posixpath.normpath(member.linkname.lstrip("/"))
                elif member.isfile():
                    yield path, "file", _look(archive, member, path)
                elif posixpath.basename(path).startswith(".wh."):
                    yield path, "file", None
    except (tarfile.TarError, EOFError) as error:
        raise UserError("bad_image", f"the layer {layer.digest} is not a readable tar: {error}") from error


def _look(archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> bytes | None:
    if member.size > _LARGEST_LOOKED_INTO or not _INTERESTING.search(path):
        return None
    content = archive.extractfile(member)
    return content.read() if content is not None else None


def _interpreter(tree: Tree, env: Mapping[str, str]) -> tuple[str, int]:
    """(path, minor version) of the Python 3 that a shell in the image would find."""
    path = [folder for folder in env.get("PATH", _DEFAULT_PATH).split(":") if folder.startswith("/")]
    for folder in [*path, *(extra for extra in _DEFAULT_PATH.split(":") if extra not in path)]:
        for name in ("python3", "python"):
            real = tree.resolve(f"{folder}/{name}")
            match = _INTERPRETER.fullmatch(posixpath.basename(real)) if real else None
            if real and match:
                beside = f"{folder}/{match[0]}"
                return (beside if tree.resolve(beside) == real else f"/{real}"), int(match[1])
        versions = [int(match[1]) for each in _names(tree, folder) if (match := _INTERPRETER.fullmatch(each))]
        if versions:
            return f"{folder}/python3.{max(versions)}", max(versions)
    raise UserError(
        "base_without_python",
        "the image has no Python 3 interpreter on its PATH",
        field="base",
        hint="take an image that holds CPython, e.g. one named python:3.11-slim",
    )


def _names(tree: Tree, folder: str) -> list[str]:
    real = tree.resolve(folder)
    return [posixpath.basename(path) for path in tree.paths() if posixpath.dirname(path) == real] if real else []


def _soabi(tree: Tree, minor: int) -> str:
    for path in tree.paths():
        match = _EXTENSION.search("/" + path)
        if match and int(match[1]) == minor and int(match[3]) == minor:
            return match[2]
    for path in tree.paths():
        if f"python3.{minor}/_sysconfigdata_" in path:
            found = _SOABI.search(tree.content(path) or b"")
            if found:
                return found[1].decode()
    raise UserError(
        "base_without_python",
        f"the image's Python 3.{minor} has no standard library that tells its ABI (lib-dynload, _sysconfigdata)",
        field="base",
        hint="take an image with a complete CPython",
    )


def _version(tree: Tree, python: str, minor: int, env: Mapping[str, str]) -> str:
    """The full version, from the string that the interpreter itself would print."""
    wanted = re.compile(rb"\0(3\.%d\.\d+(?:(?:a|b|rc)\d+)?)\+?\0" % minor)
    libraries = [path for path in tree.paths() if re.search(rf"(?:^|/)libpython3\.{minor}\.so(?:\.1\.0)?$", path)]
    for path in [python, *libraries]:
        found = wanted.search(tree.content(path) or b"")
        if found:
            return found[1].decode()
    declared = env.get("PYTHON_VERSION", "")
    return declared if declared.startswith(f"3.{minor}.") else f"3.{minor}.0"


def _libc(tree: Tree) -> str:
    """`manylinux_2_N` or `musllinux_1_N`: the platform tag (PEP 600, PEP 656) without the machine."""
    for path in tree.paths():
        name = posixpath.basename(path)
        if name == "libc.so.6" or re.fullmatch(r"libc-2\.\d+\.so", name):
            found = _GLIBC.search(tree.content(path) or b"")
            if found:
                return f"manylinux_{int(found[1])}_{int(found[2])}"
    for path in tree.paths():
        if re.match(r"(?:ld-musl-|libc\.musl-)", posixpath.basename(path)):
            found = _MUSL.search(tree.content(path) or b"")
            if found:
                return f"musllinux_{found[1].decode().replace('.', '_')}"
    raise UserError(
        "base_without_python",
        "the image has no C library whose version can be read (glibc's libc.so.6, musl's ld-musl)",
        field="base",
        hint="take an image on Debian, Ubuntu, Red Hat or Alpine",
    )


def _images(source: str, platform: Platform | None, registry: remote.Registry | None) -> Sequence[Image]:
    place = Path(source)
    if place.is_dir():
        return [layout.read_layout(place, each) for each in _wanted(platform, layout.platforms_of(place), source)]
    if place.is_file():
        return [layout.read_archive(place, platform)]
    ref = remote.Reference.parse(source)
    client = registry if registry is not None else remote.Registry(ref.host)
    return [
        remote.pull_image(client, ref, each) for each in _wanted(platform, remote.platforms_of(client, ref), source)
    ]


def _wanted(platform: Platform | None, there: Sequence[Platform], source: str) -> list[Platform]:
    if platform is not None:
        return [platform]
    wanted = [each for each in there if str(each) in PLATFORMS]
    if not wanted:
        raise UserError(
            "base_platform_missing",
            f"{source} is for {', '.join(map(str, there)) or 'no platform'}; bases are for {' and '.join(PLATFORMS)}",
            field="platform",
        )
    return wanted


def _name_of(source: str) -> str:
    """`registry/python:3.11-slim` → `python-3.11-slim`, `/some/debian-3.11.tar` → `debian-3.11`."""
    last = source.rstrip("/").rsplit("/", 1)[-1].partition("@")[0].removesuffix(".tar")
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-._") or "base"


def _as_toml(descriptor: BaseDescriptor) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "name": descriptor.name,
        "source": descriptor.source,
        "layout": descriptor.layout.name,
        "platforms": {
            key: {
                "digest": each.digest,
                "python": each.python,
                "version": each.version,
                "soabi": each.soabi,
                "libc": each.libc,
                "abi": each.abi,
                "env": dict(each.env),
                "layers": [
                    {"digest": one.digest, "diff_id": one.diff_id, "size": one.size, "media_type": one.media_type}
                    for one in each.layers
                ],
            }
            for key, each in descriptor.platforms.items()
        },
    }


def _layer_of(item: Mapping[str, Any], folder: Path) -> Layer:
    digest = _image.checked_digest(item["digest"])
    blob = folder / "blobs" / "sha256" / digest.removeprefix("sha256:")
    return _layers.of_file(
        "base", blob, item["media_type"], _image.checked_digest(item["diff_id"]), digest, item["size"]
    )
