"""Does an image keep every promise of docs/image-format.md? Each assembler test runs this on what it built.

Everything is read again from the stored bytes, with the standard library's tar reader, not with the code that wrote
them.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from builder_image import image as _image
from builder_image import layers as _layers
from builder_image import layout
from builder_image.image import Image
from builder_image.layers import Layer
from builder_image.tarball import CREATED, MTIME
from registry.digest import canonical_json
from registry.errors import InfrastructureError

_OWN = ("deps", "code", "model")
_ORDER = {"base": 0, "deps": 1, "code": 2, "model": 3}
_MODES = {tarfile.REGTYPE: (0o644, 0o755), tarfile.DIRTYPE: (0o755,), tarfile.SYMTYPE: (0o777,)}


class InvalidImage(InfrastructureError):
    """The image breaks a rule; `section` is the number in docs/image-format.md."""

    def __init__(self, section: str, detail: str) -> None:
        super().__init__(
            "invalid_image",
            f"{detail} (image-format §{section})",
            hint="this is a fault of the builder, or the stored image is damaged: build again and report it",
        )
        self.section = section


def validate(image_or_layout: Image | Path, *, base_layers: bool = True) -> None:
    """Read the whole image and raise InvalidImage at the first broken rule.

    A Path is an OCI layout folder, or an archive file. `base_layers=False` leaves the base's layers unread, for speed.
    """
    image = _opened(image_or_layout)
    _check_documents(image)
    seen: dict[str, str] = {}
    for layer in image.known_layers():
        if layer.name != "base":
            _check_layer(layer, seen)
        elif base_layers:
            _check_bytes(layer, None)


def _opened(image_or_layout: Image | Path) -> Image:
    if isinstance(image_or_layout, Image):
        return image_or_layout
    if image_or_layout.is_dir():
        return layout.read_layout(image_or_layout)
    return layout.read_archive(image_or_layout)


def _check_documents(image: Image) -> None:
    manifest, config = json.loads(image.manifest_bytes), json.loads(image.config_bytes)
    layers = image.known_layers()
    for section, name, value, raw in (
        ("5.2", "manifest", manifest, image.manifest_bytes),
        ("5.3", "config", config, image.config_bytes),
    ):
        if canonical_json(value) != raw:
            raise InvalidImage(section, f"the {name} is not canonical JSON")
    if manifest.get("schemaVersion") != 2 or manifest.get("mediaType") != _image.MANIFEST:
        raise InvalidImage("5.2", f"the manifest has the media type {manifest.get('mediaType')}")
    described = manifest["config"]
    if described.get("mediaType") != _image.CONFIG:
        raise InvalidImage("5.2", f"the config has the media type {described.get('mediaType')}")
    if (described["digest"], described["size"]) != (image.config_digest, len(image.config_bytes)):
        raise InvalidImage("5.2", "the manifest names another config")
    listed = [(item["digest"], item["size"], item["mediaType"]) for item in manifest["layers"]]
    if listed != [(layer.digest, layer.size, layer.media_type) for layer in layers]:
        raise InvalidImage("5.2", "the manifest names other layers")
    if config.get("rootfs") != {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]}:
        raise InvalidImage("5.3", "the config's diff_ids are not those of the layers")
    if config.get("created") != CREATED:
        raise InvalidImage("5.3", f"the image was created at {config.get('created')}, not at the fixed time")
    if sum(1 for entry in config.get("history", []) if not entry.get("empty_layer")) != len(layers):
        raise InvalidImage("5.3", "the history has not one entry for each layer")
    user = (config.get("config") or {}).get("User", "")
    if not re.fullmatch(r"[1-9][0-9]*(:[0-9]+)?", user):
        raise InvalidImage("5.4", f"the image runs as the user {user!r}")
    names: list[str] = [layer.name for layer in layers]
    if names != sorted(names, key=_ORDER.__getitem__) or any(names.count(name) > 1 for name in _OWN):
        raise InvalidImage("4.1", f"the layers are {', '.join(names)}")


def _check_bytes(layer: Layer, tar_reader: Any) -> None:
    """Digest, size and diff_id; `tar_reader` is called with the tar as a stream, where it is to be looked into."""
    stored, inner = _Hashed(layer.open()), hashlib.sha256()
    source = _Hashed(_layers.decompress(iter(stored), layer.media_type), inner)
    if tar_reader is not None:
        tar_reader(source)
    for _ in source:
        pass
    for _ in stored:
        pass
    found = stored.hexdigest()
    if (found, stored.size) != (layer.digest, layer.size):
        raise InvalidImage(
            "4.2",
            f"the {layer.name} layer {layer.digest} of {layer.size} bytes has the digest {found}, {stored.size} bytes",
        )
    if source.hexdigest() != layer.diff_id:
        raise InvalidImage(
            "4.2", f"the {layer.name} layer's tar is {source.hexdigest()}, not the diff_id {layer.diff_id}"
        )


def _check_layer(layer: Layer, seen: dict[str, str]) -> None:
    if layer.media_type not in (_layers.TAR, _layers.TAR_GZIP, _layers.TAR_ZSTD):
        raise InvalidImage("4.2", f"the {layer.name} layer has the media type {layer.media_type}")
    if layer.name == "model" and layer.media_type != _layers.TAR:
        raise InvalidImage("4.4", "the model layer is compressed")

    def look(source: _Hashed) -> None:
        earlier = b""
        folders = {""}
        try:
            with tarfile.open(fileobj=cast(IO[bytes], source), mode="r|", bufsize=1 << 20) as archive:
                for member in archive:
                    earlier = _check_member(layer, member, earlier, folders, seen)
        except tarfile.TarError as error:
            raise InvalidImage("3.1", f"the {layer.name} layer is not a tar: {error}") from error

    _check_bytes(layer, look)


def _check_member(
    layer: Layer, member: tarfile.TarInfo, earlier: bytes, folders: set[str], seen: dict[str, str]
) -> bytes:
    path = member.name
    what = f"{path} in the {layer.name} layer"
    if member.type not in _MODES:
        raise InvalidImage("3.1", f"{what} is neither a file, a folder nor a symlink")
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise InvalidImage("3.2", f"{what} is not a plain relative path")
    if path.encode() <= earlier:
        raise InvalidImage("3.2", f"{what} is out of order or there twice")
    if posixpath.dirname(path) not in folders:
        raise InvalidImage("3.2", f"{what} comes without its folder")
    if posixpath.basename(path).startswith(".wh."):
        raise InvalidImage("4.1", f"{what} is a whiteout")
    if member.mtime != MTIME:
        raise InvalidImage("3.3", f"{what} has the time {member.mtime}")
    if (member.uid, member.gid, member.uname, member.gname) != (0, 0, "", ""):
        raise InvalidImage("3.3", f"{what} has an owner: {member.uid}:{member.gid} {member.uname}:{member.gname}")
    if member.mode not in _MODES[member.type]:
        raise InvalidImage("3.4", f"{what} has the mode {member.mode:o}")
    needless = set(member.pax_headers) - {"path", "linkpath", "size"}
    if needless:
        raise InvalidImage("3.5", f"{what} has PAX records {', '.join(sorted(needless))}")
    if member.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
        if member.linkname.startswith("/") or target.split("/")[0] == "..":
            raise InvalidImage("3.6", f"{what} is a symlink to {member.linkname}")
    if member.isdir():
        folders.add(path)
        owner = seen.setdefault(path, "a folder")
        clash = owner != "a folder"
    else:
        owner = seen.setdefault(path, f"the {layer.name} layer")
        clash = owner != f"the {layer.name} layer"
    if clash:
        raise InvalidImage("4.1", f"{what} is also in another layer ({owner})")
    return path.encode()


class _Hashed:
    """Pieces that are hashed as they pass; iterable, and readable as `tarfile` wants it."""

    def __init__(self, pieces: Iterator[bytes], total: Any = None) -> None:
        self._pieces = pieces
        self._hash = total if total is not None else hashlib.sha256()
        self._rest = b""
        self.size = 0

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._pieces:
            self._hash.update(piece)
            self.size += len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        taken = []
        while size:
            if not self._rest:
                piece = next(iter(self), None)
                if piece is None:
                    break
                self._rest = piece
                continue
            taken.append(self._rest[:size])
            self._rest = self._rest[size:]
            size -= len(taken[-1])
        return b"".join(taken)

    def hexdigest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"
