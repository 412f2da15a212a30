"""Images on disk: folders and archives, whole or not at all, read by us and by others."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder_image import image, layers, layout, tarball
from builder_image.image import Platform
from builder_image.validate import validate
from registry.errors import InfrastructureError, UserError


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_layout_is_read_back_as_the_same_image(make_image: Any, tmp_path: Path) -> None:
    written = layout.write_layout(make_image(), tmp_path / "out", "churn:1")
    validate(written)
    again = layout.read_layout(tmp_path / "out")
    validate(again)
    assert (again.digest, again.manifest_bytes) == (written.digest, written.manifest_bytes)
    assert [layer.name for layer in again.layers] == ["base", "deps", "code", "model"]
    assert layout.read_layout(tmp_path / "out", ref="churn:1").digest == written.digest


def test_the_same_image_gives_the_same_layout_and_archive(make_image: Any, make_model: Any, tmp_path: Path) -> None:
    for turn in ("a", "b"):
        layout.write_layout(make_image(make_model(where=f"model-{turn}")), tmp_path / turn)
        layout.write_archive(make_image(make_model(where=f"other-{turn}")), tmp_path / f"{turn}.tar", "localhost/x:1")
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_a_second_image_joins_the_first_and_writes_only_what_is_new(
    make_image: Any, make_model: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    layout.write_layout(make_image(), out, "churn:1")
    written: list[str] = []
    second = make_image(make_model({"churn.txt": b"second"}, where="second"))
    layout.write_layout(second, out, "churn:2", progress=lambda layer, _: written.append(layer.name))
    assert set(written) == {"model"}
    assert layout.read_layout(out, ref="churn:1").digest != layout.read_layout(out, ref="churn:2").digest
    with pytest.raises(UserError, match="holds 2"):
        layout.read_layout(out)
    layout.write_layout(make_image(), out, "churn:2")
    assert layout.read_layout(out).digest == layout.read_layout(out, ref="churn:2").digest


def test_a_build_that_fails_leaves_no_index_and_no_half_blob(make_image: Any, make_model: Any, tmp_path: Path) -> None:
    model = make_model()
    broken = make_image(model)
    (model.folder / "files" / "churn.txt").write_bytes(b"tree\n" * 999 + b"evil\n")
    with pytest.raises(InfrastructureError):
        layout.write_layout(broken, tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").rglob(".*"))
    with pytest.raises(InfrastructureError):
        layout.write_archive(broken, tmp_path / "out.tar", "localhost/x:1")
    assert not list(tmp_path.glob("*out.tar*"))


def test_a_layer_whose_bytes_are_not_its_digest_is_never_stored(make_image: Any, tmp_path: Path) -> None:
    built = layout.write_layout(make_image(), tmp_path / "good")
    first = built.layers[0]
    assert isinstance(first, layers.Layer)
    lying = replace(first, open=lambda: iter([b"x" * first.size]))
    with pytest.raises(InfrastructureError) as noticed:
        layout.write_layout(built.sealed([lying, *built.known_layers()[1:]]), tmp_path / "bad")
    assert noticed.value.code == "digest_mismatch"
    assert not list((tmp_path / "bad" / "blobs" / "sha256").iterdir())


def test_a_damaged_document_is_noticed(make_image: Any, tmp_path: Path) -> None:
    built = layout.write_layout(make_image(), tmp_path / "out")
    blob = tmp_path / "out" / "blobs" / "sha256" / built.config_digest.removeprefix("sha256:")
    blob.write_bytes(blob.read_bytes().replace(b"65532", b"00000"))
    with pytest.raises(InfrastructureError) as noticed:
        layout.read_layout(tmp_path / "out")
    assert noticed.value.code == "digest_mismatch"


def test_an_archive_is_read_back_as_the_same_image(make_image: Any, tmp_path: Path) -> None:
    written = layout.write_archive(make_image(), tmp_path / "image.tar", "localhost/churn:1")
    validate(tmp_path / "image.tar")
    again = layout.read_archive(tmp_path / "image.tar", Platform.parse("linux/amd64"))
    assert again.digest == written.digest
    with tarfile.open(tmp_path / "image.tar") as archive:
        docker = json.load(archive.extractfile("manifest.json"))  # type: ignore[arg-type]
        assert {docker[0]["Config"], *docker[0]["Layers"]} <= set(archive.getnames())
    assert docker[0]["RepoTags"] == ["localhost/churn:1"]


def test_an_archive_as_docker_wrote_it_before_version_25_is_read(make_image: Any, tmp_path: Path) -> None:
    """Layers by path, uncompressed, one of them a symlink to its equal; no index, no digests."""
    built = layout.write_layout(make_image(), tmp_path / "out")
    file = tmp_path / "docker.tar"
    with tarfile.open(file, "w") as archive:

        def put(name: str, data: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))

        paths = []
        for number, layer in enumerate(built.known_layers()):
            put(f"{number}/layer.tar", b"".join(layers.decompress(layer.open(), layer.media_type)))
            paths.append(f"{number}/layer.tar")
        link = tarfile.TarInfo("9/layer.tar")
        link.type, link.linkname = tarfile.SYMTYPE, "../0/layer.tar"
        archive.addfile(link)
        paths[0] = "9/layer.tar"
        put("config.json", built.config_bytes)
        put("manifest.json", json.dumps([{"Config": "config.json", "Layers": paths, "RepoTags": None}]).encode())
    found = layout.read_archive(file)
    assert [layer.diff_id for layer in found.known_layers()] == [layer.diff_id for layer in built.known_layers()]
    assert layout.write_layout(found, tmp_path / "copy").digest == found.digest


def test_a_platform_that_is_not_there_is_named(make_image: Any, tmp_path: Path) -> None:
    layout.write_layout(make_image(), tmp_path / "out")
    layout.write_archive(make_image(), tmp_path / "image.tar", "localhost/x:1")
    for read in (
        lambda: layout.read_layout(tmp_path / "out", Platform.parse("linux/arm64")),
        lambda: layout.read_archive(tmp_path / "image.tar", Platform.parse("linux/arm64")),
    ):
        with pytest.raises(UserError, match="linux/amd64") as missing:
            read()
        assert missing.value.code == "base_platform_missing"


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\0" * 10240])
def test_what_is_no_archive_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "image.tar").write_bytes(content)
    with pytest.raises(UserError) as refused:
        layout.read_archive(tmp_path / "image.tar")
    assert refused.value.code == "bad_image"


def test_what_is_no_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        layout.read_layout(tmp_path)
    assert refused.value.code == "bad_image"
    (tmp_path / "oci-layout").write_bytes(b"{}")
    (tmp_path / "index.json").write_bytes(b'{"manifests": [{"digest": "sha256:../../x", "mediaType": "x"}]}')
    with pytest.raises(UserError):
        layout.read_layout(tmp_path)


def test_an_index_of_several_platforms_gives_the_right_one(make_image: Any, small_base: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    amd = layout.write_layout(make_image(), out)
    arm_base = replace(small_base, platform=Platform.parse("linux/arm64"))
    arm = layout.write_layout(image.assemble(arm_base, [], image.Run()), out)
    assert layout.read_layout(out, Platform.parse("linux/amd64")).digest == amd.digest
    assert layout.read_layout(out, Platform.parse("linux/arm64")).digest == arm.digest
    assert sorted(map(str, layout.platforms_of(out))) == ["linux/amd64", "linux/arm64"]


def test_skopeo_reads_both_halves_of_the_archive(make_image: Any, tmp_path: Path) -> None:
    program = shutil.which("skopeo")
    if program is None:
        pytest.skip("skopeo is not installed")
    written = layout.write_archive(make_image(), tmp_path / "image.tar", "localhost/churn:1")
    layout.write_layout(make_image(), tmp_path / "out", "1")
    for source in (
        f"docker-archive:{tmp_path}/image.tar",
        f"oci-archive:{tmp_path}/image.tar",
        f"oci:{tmp_path}/out:1",
    ):
        done = subprocess.run([program, "inspect", source], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        assert seen["Architecture"] == "amd64"
        if not source.startswith("docker-archive"):
            assert seen["Digest"] == written.digest
        # copying reads every layer and holds it against its digest
        copy = subprocess.run(
            [program, "copy", "--insecure-policy", source, f"dir:{tmp_path}/copy"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert copy.returncode == 0, copy.stderr


def test_large_blobs_are_named_after_they_were_written(tmp_path: Path, small_base: Any) -> None:
    """The member's name is its digest, known only at its end; what follows must not be overwritten."""
    data = b"w" * 3_000_001
    entries = [tarball.folder("home"), tarball.file("home/w", data)]
    stream = layers.StreamedLayer("model", layers.TAR, tarball.size_of(entries), lambda: tarball.stream(entries))
    layout.write_archive(image.assemble(small_base, [stream], image.Run()), tmp_path / "image.tar", "localhost/x:1")
    validate(tmp_path / "image.tar")


def test_an_image_replaces_an_earlier_image_and_nothing_else(tmp_path: Path, make_image: Any) -> None:
    archive, folder = tmp_path / "image.tar", tmp_path / "layout"
    layout.write_archive(make_image(), archive, "localhost/churn:1")
    layout.write_layout(make_image(), folder)
    (tmp_path / "empty").mkdir()
    for place in (archive, folder, tmp_path / "empty", tmp_path / "new" / "image.tar", tmp_path / "new.layout"):
        layout.check_output(place)
    assert not (tmp_path / "new.layout").exists(), "a look leaves nothing behind"
    with tarfile.open(tmp_path / "photos.tar", "w") as photos:
        photos.add(__file__, "photo.jpg")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("mine")
    (tmp_path / "a-folder.tar").mkdir()
    for place in (tmp_path / "photos.tar", tmp_path / "home", tmp_path / "a-folder.tar", tmp_path / "home" / "letter"):
        with pytest.raises(UserError) as refused:
            layout.check_output(place)
        assert refused.value.code == "output_exists"
    with pytest.raises(UserError) as refused:
        layout.check_output(tmp_path / "image.tar.gz")
    assert refused.value.code == "bad_output"
    with pytest.raises(UserError) as refused:
        layout.check_output(tmp_path / "home" / "letter" / "image.tar")
    assert refused.value.code == "output_not_writable"
    with pytest.raises(UserError) as refused:
        layout.check_output(Path("/proc/image.tar"))
    assert refused.value.code == "output_not_writable"
