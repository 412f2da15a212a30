"""The validator finds every broken rule: each case breaks one, in an image that is whole otherwise."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder_image import image, layers, layout, tarball
from builder_image.image import Image
from builder_image.validate import InvalidImage, validate
from registry.digest import canonical_json


@pytest.fixture
def built(make_image: Any, tmp_path: Path) -> Image:
    return layout.write_layout(make_image(), tmp_path / "good")


def test_what_we_build_is_valid(built: Image) -> None:
    validate(built)


def _layer(name: layers.Name, *members: tarfile.TarInfo) -> layers.Layer:
    """A layer written by somebody else."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(b"x" * member.size))
    data = out.getvalue()
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    return layers.Layer(name, layers.TAR, digest, digest, len(data), lambda: iter([data]))


def _member(path: str, **fields: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(path)
    member.mtime, member.mode = tarball.MTIME, 0o644
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def _folder(path: str) -> tarfile.TarInfo:
    return _member(path, type=tarfile.DIRTYPE, mode=0o755)


@pytest.mark.parametrize(
    ("section", "members"),
    [
        ("3.1", [_member("dev", type=tarfile.CHRTYPE)]),
        ("3.1", [_member("hard", type=tarfile.LNKTYPE, linkname="a")]),
        ("3.2", [_member("/etc/passwd")]),
        ("3.2", [_member("a/../b")]),
        ("3.2", [_member("b"), _member("a")]),
        ("3.2", [_member("a"), _member("a")]),
        ("3.2", [_member("folder/a")]),
        ("3.3", [_member("a", mtime=0)]),
        ("3.3", [_member("a", uid=1000)]),
        ("3.3", [_member("a", uname="root")]),
        ("3.4", [_member("a", mode=0o4755)]),
        ("3.4", [_member("a", mode=0o600)]),
        ("3.4", [_member("a", type=tarfile.DIRTYPE, mode=0o1777)]),
        ("3.6", [_member("a", type=tarfile.SYMTYPE, mode=0o777, linkname="/etc/passwd")]),
        ("3.6", [_folder("a"), _member("a/b", type=tarfile.SYMTYPE, mode=0o777, linkname="../../x")]),
        ("4.1", [_member(".wh.etc")]),
        ("4.1", [_folder("app"), _folder("app/.venv"), _folder("app/.venv/lib"), _member("app/.venv/lib/dep.py")]),
        ("4.1", [_member("app")]),
    ],
)
def test_a_bad_member_is_found(built: Image, section: str, members: list[tarfile.TarInfo]) -> None:
    base, deps, _, model = built.known_layers()
    with pytest.raises(InvalidImage) as found:
        validate(replace(built, stored=None).sealed([base, deps, _layer("code", *members), model]))
    assert found.value.section == section


def test_bytes_that_are_not_the_digest_are_found(built: Image) -> None:
    for position in range(4):
        known = list(built.known_layers())
        data = b"".join(known[position].open())
        known[position] = replace(known[position], open=lambda data=data: iter([data, b"\0"]))
        with pytest.raises(InvalidImage) as found:
            validate(built.sealed(known))
        assert found.value.section == "4.2"


def test_a_wrong_diff_id_is_found(built: Image) -> None:
    known = list(built.known_layers())
    known[1] = replace(known[1], diff_id="sha256:" + "0" * 64)
    with pytest.raises(InvalidImage) as found:
        validate(built.sealed(known))
    assert found.value.section == "4.2"


@pytest.mark.parametrize(
    ("section", "change"),
    [
        ("5.4", lambda m, c: c["config"].update(User="root")),
        ("5.4", lambda m, c: c["config"].update(User="0:0")),
        ("5.4", lambda m, c: c["config"].pop("User")),
        ("5.3", lambda m, c: c.update(created="2026-01-01T00:00:00Z")),
        ("5.3", lambda m, c: c["history"].pop()),
        ("5.2", lambda m, c: m.pop("mediaType")),
        ("5.2", lambda m, c: m["config"].update(mediaType="application/json")),
        ("5.2", lambda m, c: m["config"].update(size=1)),
        ("4.1", lambda m, c: m["layers"][1].pop("annotations")),
    ],
)
def test_a_bad_document_is_found(built: Image, section: str, change: Any) -> None:
    manifest, config = json.loads(built.manifest_bytes), json.loads(built.config_bytes)
    if section == "4.1":
        manifest["layers"].reverse()
        config["rootfs"]["diff_ids"].reverse()
    change(manifest, config)
    data = canonical_json(config)
    digest = "sha256:" + hashlib.sha256(data).hexdigest()
    size = manifest["config"]["size"]
    manifest["config"].update(digest=digest, size=size if size == 1 else len(data))
    openers = {layer.digest: layer.open for layer in built.known_layers()}
    with pytest.raises(InvalidImage) as found:
        validate(image.read(canonical_json(manifest), data, openers))
    assert found.value.section == section


def test_a_compressed_model_layer_is_found(built: Image, tmp_path: Path) -> None:
    known = list(built.known_layers())
    known[3] = layers.make("model", [tarball.file("w", b"1")], tmp_path / "blobs", "gzip")
    with pytest.raises(InvalidImage) as found:
        validate(replace(built, stored=None).sealed(known))
    assert found.value.section == "4.4"
