"""Layers: what they are made of, and that nothing but that changes their digest."""

from __future__ import annotations

import hashlib
import io
import itertools
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from builder_image import layers, tarball
from registry.digest import of_bytes
from registry.errors import InfrastructureError, UserError

_COMPRESSIONS: list[layers.Compression] = ["none", "gzip", "zstd"]


def _entries(data: bytes = b"x" * 5000) -> list[tarball.Entry]:
    return [*tarball.folders_above("app/lib/a.py"), tarball.file("app/lib/a.py", data)]


@pytest.mark.parametrize("compression", _COMPRESSIONS)
def test_a_layer_says_what_its_bytes_are(tmp_path: Path, compression: layers.Compression) -> None:
    layer = layers.make("deps", _entries(), tmp_path, compression)
    stored = b"".join(layer.open())
    inner = b"".join(layers.decompress(layer.open(), layer.media_type))
    assert (layer.digest, layer.size) == (of_bytes(stored), len(stored))
    assert layer.diff_id == of_bytes(inner)
    assert inner == b"".join(tarball.stream(tarball.ordered(_entries())))
    assert b"".join(layer.open()) == stored, "the bytes can be opened again"
    assert [item.name for item in tmp_path.iterdir()] == [layer.digest.removeprefix("sha256:")]


@pytest.mark.parametrize("compression", _COMPRESSIONS)
@given(data=st.binary(max_size=20_000), cuts=st.lists(st.integers(0, 20_000), max_size=8))
def test_how_the_tar_is_cut_does_not_change_the_compressed_bytes(
    compression: layers.Compression, data: bytes, cuts: list[int]
) -> None:
    data = data * 20
    edges = sorted({0, len(data), *(cut * 20 for cut in cuts if cut * 20 < len(data))})
    pieces = [data[start:end] for start, end in itertools.pairwise(edges)]
    whole = b"".join(layers.compress([data], compression))
    assert b"".join(layers.compress(pieces, compression)) == whole
    media_type = {"none": layers.TAR, "gzip": layers.TAR_GZIP, "zstd": layers.TAR_ZSTD}[compression]
    again = [whole[start : start + 7] for start in range(0, len(whole), 7)]
    assert b"".join(layers.decompress(again, media_type)) == data


def test_gzip_frames_hold_no_time_and_no_name() -> None:
    head = b"".join(layers.compress([b"x"], "gzip"))[:10]
    assert head[3:8] == bytes(5)


def test_a_bomb_is_decompressed_in_bounded_pieces() -> None:
    for compression, media_type in (("gzip", layers.TAR_GZIP), ("zstd", layers.TAR_ZSTD)):
        packed = b"".join(layers.compress([bytes(64 << 20)], compression))  # type: ignore[arg-type]
        assert max(map(len, layers.decompress([packed], media_type))) <= tarball.CHUNK


def test_a_key_changes_with_the_compressor() -> None:
    assert zlib.ZLIB_RUNTIME_VERSION in layers.compressor("gzip")
    assert ".".join(map(str, zstandard.ZSTD_VERSION)) in layers.compressor("zstd")
    assert len({layers.compressor(each) for each in _COMPRESSIONS}) == 3


def test_a_layer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"12345")
    entry = tarball.file("a", source)
    source.write_bytes(b"1")
    with pytest.raises(InfrastructureError):
        layers.make("code", [entry], tmp_path / "blobs")
    assert list((tmp_path / "blobs").iterdir()) == []


def test_the_model_layer_is_the_model_folder_at_its_place(make_model: Any) -> None:
    model = make_model({"churn.txt": b"tree", "sub/other.bin": b"\0" * 1000})
    layer = model.layer()
    data = b"".join(layer.open())
    assert len(data) == layer.size
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        files = {member.name: member.size for member in archive if member.isfile()}
    where = "home/bentoml/model"
    assert files == {
        f"{where}/files/churn.txt": 4,
        f"{where}/files/sub/other.bin": 1000,
        f"{where}/manifest.json": (model.folder / "manifest.json").stat().st_size,
        f"{where}/sample.json": 18,
    }
    sealed = layer.sealed(of_bytes(data))
    assert sealed.diff_id == sealed.digest == "sha256:" + hashlib.sha256(data).hexdigest()


def test_weights_that_differ_from_the_manifest_never_become_a_layer(make_model: Any) -> None:
    model = make_model({"churn.txt": b"tree"})
    (model.folder / "files" / "churn.txt").write_bytes(b"evil")
    with pytest.raises(InfrastructureError) as noticed:
        list(model.layer().open())
    assert noticed.value.code == "digest_mismatch"


def test_a_manifest_cannot_name_files_outside_the_model_folder(make_model: Any) -> None:
    model = make_model()
    model.manifest["files"][0]["path"] = "../../../etc/passwd"
    with pytest.raises(UserError, match="plain relative path"):
        model.layer()


def test_a_recorded_layer_that_is_gone_says_so() -> None:
    layer = layers.recorded("deps", layers.TAR_ZSTD, "sha256:" + "1" * 64, "sha256:" + "2" * 64, 10)
    with pytest.raises(InfrastructureError) as gone:
        layer.open()
    assert gone.value.code == "layer_absent"
