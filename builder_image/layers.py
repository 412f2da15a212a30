"""Layers as values: what they are, and how to read their bytes again (image-format §4).

Layer            digest, diff_id and size are known
StreamedLayer    only its exact size is known; the first reading tells the digest, and `sealed` gives the Layer
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal, cast

import zstandard

from builder_image import tarball
from registry.digest import of_bytes
from registry.errors import InfrastructureError

FORMAT = "1"
"""Version of docs/image-format.md. Part of every layer's key: a change of the bytes changes it."""

TAR = "application/vnd.oci.image.layer.v1.tar"
TAR_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
TAR_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"

MODEL_FOLDER = "home/bentoml/model"

Name = Literal["base", "deps", "code", "model"]
Compression = Literal["none", "gzip", "zstd"]
Opener = Callable[[], Iterator[bytes]]

_MEDIA_TYPES: dict[str, str] = {"none": TAR, "gzip": TAR_GZIP, "zstd": TAR_ZSTD}
_GZIP_LEVEL = 6
_ZSTD_LEVEL = 3


@dataclass(frozen=True)
class Layer:
    """A layer whose digest is known. `open` gives its bytes as they are stored, from the start, as often as asked."""

    name: Name
    media_type: str
    diff_id: str
    digest: str
    size: int
    open: Opener = field(compare=False, repr=False)
    facts: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)
    """What a builder that finds the layer by its key must know of it without reading it; kept in its note."""


@dataclass(frozen=True)
class StreamedLayer:
    """An uncompressed layer that is made while it is read: one pass over its files, no temporary copy.

    Digest and diff_id are the same for an uncompressed layer; whoever reads the bytes hashes them and calls `sealed`.
    """

    name: Name
    media_type: str
    size: int
    open: Opener = field(compare=False, repr=False)

    def sealed(self, digest: str) -> Layer:
        """The layer, now that its bytes were read and had this digest."""
        return Layer(self.name, self.media_type, digest, digest, self.size, self.open)


AnyLayer = Layer | StreamedLayer


def compressor(compression: Compression) -> str:
    """What a compressed layer's bytes depend on beside its content (image-format §4.3): part of the layer's key."""
    if compression == "gzip":
        return f"gzip zlib-{zlib.ZLIB_RUNTIME_VERSION} level-{_GZIP_LEVEL}"
    if compression == "zstd":
        return f"zstd libzstd-{'.'.join(map(str, zstandard.ZSTD_VERSION))} level-{_ZSTD_LEVEL}"
    return "none"


def compress(pieces: Iterable[bytes], compression: Compression) -> Iterator[bytes]:
    """The pieces, compressed on one thread with fixed settings; how they are cut does not change the result."""
    if compression == "none":
        yield from pieces
        return
    engine: Any
    if compression == "gzip":
        engine = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, 31)  # 31: a gzip frame, whose time zlib sets to 0
    else:
        engine = zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True, threads=0).compressobj()
    for piece in pieces:
        if packed := engine.compress(piece):
            yield packed
    yield engine.flush()


def decompress(pieces: Iterable[bytes], media_type: str) -> Iterator[bytes]:
    """The tar inside a stored layer, in pieces of bounded size whatever the ratio."""
    if media_type.endswith("gzip"):
        yield from _gunzip(pieces)
    elif media_type.endswith("zstd"):
        yield from zstandard.ZstdDecompressor().read_to_iter(readable(pieces), write_size=tarball.CHUNK)
    else:
        yield from pieces


def readable(pieces: Iterable[bytes]) -> IO[bytes]:
    """The pieces as something with `read`, for tarfile's stream mode and zstandard; a short read is not the end."""
    return cast(IO[bytes], _Reader(pieces))


def make(name: Name, entries: Sequence[tarball.Entry], blobs: Path, compression: Compression = "zstd") -> Layer:
    """Write a layer of `entries` into the folder `blobs`, named by its digest, and return it.

    The file appears under its name only when it is whole. A layer that is already there is not written twice.
    """
    entries = tarball.ordered(entries)
    blobs.mkdir(parents=True, exist_ok=True)
    inner, outer, size = hashlib.sha256(), hashlib.sha256(), 0
    with tempfile.NamedTemporaryFile(dir=blobs, prefix=".layer-", delete=False) as draft:
        try:
            for piece in compress(_hashing(tarball.stream(entries), inner), compression):
                outer.update(piece)
                size += len(piece)
                draft.write(piece)
            draft.close()
            os.chmod(draft.name, 0o644)
            os.replace(draft.name, blobs / outer.hexdigest())
        except BaseException:
            draft.close()
            os.unlink(draft.name)
            raise
    digest = f"sha256:{outer.hexdigest()}"
    return of_file(
        name, blobs / outer.hexdigest(), _MEDIA_TYPES[compression], f"sha256:{inner.hexdigest()}", digest, size
    )


def of_file(name: Name, blob: Path, media_type: str, diff_id: str, digest: str, size: int) -> Layer:
    """A layer whose bytes are stored in a file. They are checked by whoever copies them, not here."""
    return Layer(name, media_type, diff_id, digest, size, lambda: pieces_of(blob))


def recorded(name: Name, media_type: str, diff_id: str, digest: str, size: int) -> Layer:
    """A layer that is known from a record and expected in the registry already; reading it raises `layer_absent`."""

    def absent() -> Iterator[bytes]:
        raise InfrastructureError(
            "layer_absent",
            f"the {name} layer {digest} is neither on this machine nor in the registry it was recorded for",
            hint="build again without the recorded layer",
        )

    return Layer(name, media_type, diff_id, digest, size, absent)


def model(folder: Path, manifest: Mapping[str, Any], manifest_bytes: bytes) -> StreamedLayer:
    """The model layer (image-format §4.4) of a model folder as docs/design.md §4 lays it out.

    Every file is checked against the manifest while it is read. `manifest` is the parsed `manifest_bytes`.
    """
    entries = tarball.ordered(_model_entries(folder, manifest, manifest_bytes))
    return StreamedLayer("model", TAR, tarball.size_of(entries), lambda: tarball.stream(entries))


def held(layer: StreamedLayer) -> Layer:
    """The layer read into memory, for a small one whose digest is wanted before it is sent."""
    data = b"".join(layer.open())
    return replace(layer.sealed(of_bytes(data)), open=lambda: iter([data]))


def known(layer: StreamedLayer, digest: str) -> Layer:
    """The same layer when its digest was computed before, e.g. during the upload; it is checked when it is copied."""
    return layer.sealed(digest)


def renamed(layer: Layer, name: Name) -> Layer:
    return replace(layer, name=name)


def noted(layer: Layer, facts: Mapping[str, Any] | None) -> Layer:
    return replace(layer, facts=facts)


def pieces_of(blob: Path) -> Iterator[bytes]:
    """A file's content in pieces of 1 MiB."""
    with blob.open("rb", buffering=0) as content:
        while piece := content.read(tarball.CHUNK):
            yield piece


def _model_entries(folder: Path, manifest: Mapping[str, Any], manifest_bytes: bytes) -> Iterator[tarball.Entry]:
    yield from tarball.folders_above(f"{MODEL_FOLDER}/manifest.json")
    yield tarball.file(f"{MODEL_FOLDER}/manifest.json", manifest_bytes)
    listed = [(f"files/{item['path']}", item) for item in manifest["files"]]
    for name in ("sample", "expected"):
        if manifest.get(name):
            listed.append((f"{name}.json", manifest[name]))
    if requirements := manifest.get("requirements"):
        listed.append((f"requirements/{requirements['path']}", requirements))
    for path, item in listed:
        place = f"{MODEL_FOLDER}/{path}"
        yield from tarball.folders_above(place)
        yield tarball.Entry(place, tarball.FILE_MODE, item["size"], folder / path, None, "file", item["sha256"])


def _hashing(pieces: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece


def _gunzip(pieces: Iterable[bytes]) -> Iterator[bytes]:
    engine = zlib.decompressobj(31)
    for piece in pieces:
        while piece:
            if engine.eof:  # several frames in a row are one stream
                engine = zlib.decompressobj(31)
            yield engine.decompress(piece, tarball.CHUNK)
            piece = engine.unconsumed_tail or engine.unused_data
    yield engine.flush()


class _Reader:
    """The `read` that zstandard wants, over pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""

    def read(self, size: int) -> bytes:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                break
            self._rest = piece
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken
