"""Images on disk: an OCI layout folder, and the same as one tar that docker and podman load (image-format §6).

The tar is an OCI layout with Docker's `manifest.json` added, so either reader finds what it knows. Blobs are written in
one pass, hashed on the way, and get their name only when they are whole; the index is written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from builder_image import image as _image
from builder_image import layers as _layers
from builder_image import tarball
from builder_image.hashing import Sha256
from builder_image.image import Image, Platform
from builder_image.layers import AnyLayer, Layer, StreamedLayer
from registry.digest import canonical_json
from registry.errors import InfrastructureError, UserError

_MARK = canonical_json({"imageLayoutVersion": "1.0.0"})
_LONGEST_DOCUMENT = 8 << 20
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
_OTHER_ARCHIVES = (".zip", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z")

Progress = Callable[[AnyLayer, int], None]
"""Told (layer, bytes written since the last call)."""


def write_layout(image: Image, folder: Path, ref: str | None = None, progress: Progress | None = None) -> Image:
    """Write the image into an OCI layout folder, next to what is there, and return it sealed.

    Blobs that are there already are kept. In the index the image replaces the one with the same `ref` and platform.
    Raises InfrastructureError `digest_mismatch` when a layer's bytes are not what it says, `disk_full`, `disk_error`.
    """
    with _disk(folder):
        blobs = folder / "blobs" / "sha256"
        blobs.mkdir(parents=True, exist_ok=True)
        known = [_write_layer(layer, blobs, progress) for layer in image.layers]
        image = image.sealed(known)
        for data in (image.config_bytes, image.manifest_bytes):
            name = hashlib.sha256(data).hexdigest()
            if not _is_there(blobs / name, len(data)):
                replace_file(blobs / name, data)
        if not (folder / "oci-layout").exists():
            replace_file(folder / "oci-layout", _MARK)
        replace_file(folder / "index.json", canonical_json(_index(image, ref, _manifests_in(folder))))
    return image


def write_archive(image: Image, file: Path, ref: str, progress: Progress | None = None) -> Image:
    """Write the image as one tar that `docker load`, `podman load` and `skopeo oci-archive:` read; return it sealed.

    `ref` is the name that the loaded image gets, e.g. `localhost/churn:3`. The file appears only when it is whole. A
    streamed layer is written in place and its member is named afterwards, so weights are copied once.
    """
    with _disk(file.parent), _draft(file) as out:
        written: dict[str, Layer] = {}
        out.write(tarball.header(tarball.folder("blobs")))
        out.write(tarball.header(tarball.folder("blobs/sha256")))
        known = []
        for layer in image.layers:
            if isinstance(layer, Layer) and layer.digest in written:
                known.append(layer)
                continue
            start = out.tell()
            blank = _member(f"blobs/sha256/{'0' * 64}", layer.size)
            out.write(blank)
            found = _copy(layer, out.write, progress)
            out.write(bytes(-layer.size % 512))
            end = out.tell()
            out.seek(start)
            out.write(_member(_blob_path(found.digest), layer.size))
            out.seek(end)
            written[found.digest] = found
            known.append(found)
        image = image.sealed(known)
        docker = [
            {
                "Config": _blob_path(image.config_digest),
                "RepoTags": [ref],
                "Layers": [_blob_path(layer.digest) for layer in known],
            }
        ]
        for path, data in {
            _blob_path(image.config_digest): image.config_bytes,
            _blob_path(image.digest): image.manifest_bytes,
            "index.json": canonical_json(_index(image, ref, [])),
            "manifest.json": canonical_json(docker),
            "oci-layout": _MARK,
        }.items():
            out.write(_member(path, len(data)) + data + bytes(-len(data) % 512))
        out.write(bytes(1024))
    return image


def check_output(place: Path) -> None:
    """See that an image may be written to a place before anything is made for it: an archive where the name ends in
    .tar, a layout folder otherwise. Only an earlier image is ever replaced.

    Raises UserError `bad_output`, `output_exists`, `output_not_writable`.
    """
    if place.suffix in _OTHER_ARCHIVES:
        raise UserError(
            "bad_output",
            f"{place.name} would be neither a .tar archive nor a layout folder",
            field="output",
            hint="name it like churn.tar; layers are compressed inside it",
        )
    if place.suffix == ".tar":
        ours = not place.exists() or (place.is_file() and _is_image_archive(place))
    else:
        ours = not place.exists() or (place.is_dir() and ((place / "oci-layout").is_file() or not any(place.iterdir())))
    if not ours:
        raise UserError(
            "output_exists",
            f"{place} is there already and is no image",
            field="output",
            hint="choose another name, or move it away",
        )
    folder = place if place.is_dir() else place.parent
    with _disk(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def _is_image_archive(file: Path) -> bool:
    try:
        with tarfile.open(file, "r:") as archive:
            return any(name in ("oci-layout", "manifest.json", "index.json") for name in archive.getnames())
    except (tarfile.TarError, EOFError, OSError):
        return file.stat().st_size == 0


def read_layout(folder: Path, platform: Platform | None = None, ref: str | None = None) -> Image:
    """The image of an OCI layout folder; with several, the one for `platform` and `ref`.

    Raises UserError `bad_image` (not a layout, or none or several fit) and `base_platform_missing`. Manifest and config
    are checked against their digests here; layers are checked by whoever copies them.
    """

    def opener(digest: str) -> _layers.Opener:
        return lambda: _layers.pieces_of(folder / _blob_path(digest))

    return _image.choose(_index_of(folder), _documents(folder), opener, platform, ref, str(folder))


def platforms_of(folder: Path) -> list[Platform]:
    """The platforms an OCI layout folder has images for. Raises UserError `bad_image`."""
    try:
        return _image.platforms(_index_of(folder), _documents(folder))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad(f"{folder} is not a usable OCI layout: {error}") from error


def read_archive(file: Path, platform: Platform | None = None) -> Image:
    """The image of a tar made by `write_archive`, `docker save`, `podman save` or `skopeo copy`, read in place.

    Nothing is extracted: members are opened by their exact name. Raises as `read_layout`.
    """
    try:
        with tarfile.open(file) as archive:
            members = {member.name.removeprefix("./"): member for member in archive if member.isfile()}
            links = {m.name.removeprefix("./"): m.linkname for m in archive if m.issym() or m.islnk()}
    except (tarfile.TarError, EOFError, OSError) as error:
        raise _bad(f"{file} is not a readable tar archive: {error}") from error

    def resolve(name: str) -> str:
        # docker before version 25 writes layers that are equal once, with links from their other names
        target = links.get(name)
        if name in members or target is None:
            return name
        return os.path.normpath(os.path.join(os.path.dirname(name), target)) if "/" in target else target

    def pieces(name: str) -> Iterator[bytes]:
        member = members.get(resolve(name))
        if member is None:
            raise _bad(f"{file} lacks {name}")
        with tarfile.open(file) as archive:
            content = archive.extractfile(member)
            assert content is not None  # it is a regular file
            with content:
                while piece := content.read(tarball.CHUNK):
                    yield piece

    def whole(name: str) -> bytes:
        member = members.get(resolve(name))
        if member is not None and member.size > _LONGEST_DOCUMENT:
            raise _bad(f"{name} in {file} is {member.size} bytes long")
        return b"".join(pieces(name))

    def opener(digest: str) -> _layers.Opener:
        return lambda: pieces(_blob_path(digest))

    if "index.json" in members and "oci-layout" in members:
        return _image.choose(
            _json(whole("index.json")),
            lambda digest, _: _verified(digest, whole(_blob_path(digest))),
            opener,
            platform,
            None,
            str(file),
        )
    if "manifest.json" in members:
        return _read_docker(_json(whole("manifest.json")), whole, pieces, platform, file)
    raise _bad(f"{file} holds neither an OCI layout nor a Docker archive")


def _index_of(folder: Path) -> Any:
    if not (folder / "oci-layout").is_file() or not (folder / "index.json").is_file():
        raise _bad(f"{folder} is not an OCI layout: it has no oci-layout or no index.json")
    try:
        return json.loads((folder / "index.json").read_bytes())
    except ValueError as error:
        raise _bad(f"{folder}/index.json is not JSON: {error}") from error


def _documents(folder: Path) -> _image.Document:
    def document(digest: str, _: str) -> bytes:
        blob = folder / _blob_path(digest)
        if not blob.is_file():
            raise _bad(f"{folder} lacks the blob {digest}")
        return _verified(digest, blob.read_bytes())

    return document


def _read_docker(
    listed: Any,
    whole: Callable[[str], bytes],
    pieces: Callable[[str], Iterator[bytes]],
    platform: Platform | None,
    file: Path,
) -> Image:
    """An archive as `docker save` wrote it before version 25: layers by path, without digests, here made into OCI."""
    try:
        if len(listed) != 1:
            raise _bad(f"{file} holds {len(listed)} images", hint="save one image alone")
        config = whole(listed[0]["Config"])
        configured = _json(config)
        found = Platform.of(configured)
        if platform is not None and found != platform:
            raise UserError(
                "base_platform_missing",
                f"{file} holds an image for {found}, not for {platform}",
                field="platform",
                hint=f"use --platform {found}, or save the image for {platform}",
            )
        layers = []
        for path, diff_id in zip(listed[0]["Layers"], configured["rootfs"]["diff_ids"], strict=True):
            layers.append(_layer_of_member(path, _image.checked_digest(diff_id), pieces))
        described = {
            "schemaVersion": 2,
            "mediaType": _image.MANIFEST,
            "config": {"mediaType": _image.CONFIG, "digest": _digest_of([config])[0], "size": len(config)},
            "layers": [{"mediaType": each.media_type, "digest": each.digest, "size": each.size} for each in layers],
        }
        return _image.read(canonical_json(described), config, {layer.digest: layer.open for layer in layers})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _bad(f"{file} is not a usable Docker archive: {error}") from error


def _layer_of_member(path: str, diff_id: str, pieces: Callable[[str], Iterator[bytes]]) -> Layer:
    digest, size = _digest_of(pieces(path))
    start = next(pieces(path), b"")
    media_type = _layers.TAR
    if start.startswith(b"\x1f\x8b"):
        media_type = _layers.TAR_GZIP
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        media_type = _layers.TAR_ZSTD
    return Layer("base", media_type, diff_id, digest, size, lambda: pieces(path))


def _digest_of(pieces: Iterable[bytes]) -> tuple[str, int]:
    total, size = hashlib.sha256(), 0
    for piece in pieces:
        total.update(piece)
        size += len(piece)
    return f"sha256:{total.hexdigest()}", size


def _write_layer(layer: AnyLayer, blobs: Path, progress: Progress | None) -> Layer:
    if isinstance(layer, Layer) and _is_there(blobs / layer.digest.removeprefix("sha256:"), layer.size):
        return layer
    with tempfile.NamedTemporaryFile(dir=blobs, prefix=".blob-", delete=False, buffering=0) as draft:
        try:
            found = _copy(layer, lambda piece: _write_all(draft, piece), progress)
            draft.close()
            os.chmod(draft.name, 0o644)
            os.replace(draft.name, blobs / found.digest.removeprefix("sha256:"))
        except BaseException:
            draft.close()
            os.unlink(draft.name)
            raise
    return found


def _copy(layer: AnyLayer, write: Callable[[bytes], object], progress: Progress | None) -> Layer:
    """One pass: read, hash, write; then hold digest and size against what the layer says."""
    total, size = Sha256(layer.size), 0
    try:
        for piece in layer.open():
            total.update(piece)
            size += len(piece)
            write(piece)
            if progress is not None:
                progress(layer, len(piece))
        digest = f"sha256:{total.hexdigest()}"
    finally:
        total.close()
    if size != layer.size or (isinstance(layer, Layer) and digest != layer.digest):
        raise InfrastructureError(
            "digest_mismatch",
            f"the {layer.name} layer should be {getattr(layer, 'digest', 'a stream')} of {layer.size} bytes, "
            f"but its bytes are {digest} of {size} bytes",
            hint="where the layer is stored is damaged: remove it there and build again",
        )
    return layer.sealed(digest) if isinstance(layer, StreamedLayer) else layer


def _index(image: Image, ref: str | None, others: list[dict[str, Any]]) -> dict[str, Any]:
    entry = image.descriptor()
    if ref is not None:
        # the OCI layout knows tags, containerd and podman the full name
        entry["annotations"] = {_image.FULL_NAME: ref, _image.REF_NAME: ref}
    kept = [other for other in others if _slot(other) != _slot(entry)]
    manifests = sorted([*kept, entry], key=lambda item: (json.dumps(_slot(item)), item["digest"]))
    return {"schemaVersion": 2, "mediaType": _image.INDEX, "manifests": manifests}


def _slot(entry: dict[str, Any]) -> list[str]:
    return [
        (entry.get("annotations") or {}).get(_image.REF_NAME, ""),
        json.dumps(entry.get("platform"), sort_keys=True),
    ]


def _manifests_in(folder: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((folder / "index.json").read_bytes())["manifests"])
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise _bad(f"{folder}/index.json is not an OCI index: {error}", hint="write to another folder") from error


def _member(path: str, size: int) -> bytes:
    return tarball.header(tarball.Entry(path, tarball.FILE_MODE, size, b"", None, "file"))


def _blob_path(digest: str) -> str:
    return "blobs/sha256/" + _image.checked_digest(digest).removeprefix("sha256:")


def _is_there(blob: Path, size: int) -> bool:
    try:
        return blob.stat().st_size == size
    except FileNotFoundError:
        return False


def _verified(digest: str, data: bytes) -> bytes:
    found = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if found != digest:
        raise InfrastructureError(
            "digest_mismatch", f"the blob {digest} has the digest {found}", hint="the image is damaged: fetch it again"
        )
    return data


def _json(data: bytes) -> Any:
    return json.loads(data)


def replace_file(file: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with _draft(file) as out:
        out.write(data)


@contextmanager
def _draft(file: Path) -> Iterator[IO[bytes]]:
    """A temporary sibling that takes the file's name when all went well, and vanishes when not."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name[:100]}-", delete=False) as out:
        try:
            yield out
            out.close()
            os.chmod(out.name, 0o644)
            os.replace(out.name, file)
        except BaseException:
            out.close()
            os.unlink(out.name)
            raise


def _write_all(out: IO[bytes], piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[out.write(rest) :]


@contextmanager
def _disk(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _NOT_ALLOWED:
            raise UserError(
                "output_not_writable",
                f"{error.filename or place} cannot be written: {error.strerror}",
                field="output",
                hint="choose a folder that the account which builds images may write into",
            ) from error
        code = "disk_full" if error.errno == 28 else "disk_error"
        raise InfrastructureError(
            code,
            f"{place} cannot be written: {error.strerror or error}",
            hint="free some space or choose another place",
        ) from error


def _bad(
    detail: str, hint: str = "give an OCI layout folder, or an archive made by docker save or podman save"
) -> UserError:
    return UserError("bad_image", detail, hint=hint)
