"""`make images`: the same bytes in two caches, and what is in them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from builder_image import layers, layout, validate
from builder_image.image import Image
from scripts import images


def make(base: Path, folder: Path, *names: str) -> dict[str, Image]:
    argv = [*names, "--base", str(base), "--cache", str(folder / "cache"), "--output", str(folder / "out")]
    assert images.main(argv) == 0
    return {name: layout.read_layout(folder / "out" / name) for name in names}


def names_in(image: Image) -> set[str]:
    found: set[str] = set()
    for layer in image.known_layers():
        source = layers.readable(layers.decompress(layer.open(), layer.media_type))
        with tarfile.open(fileobj=source, mode="r|") as archive:
            found |= {member.name.rstrip("/") for member in archive}
    return found


@pytest.mark.slow
def test_service_and_builder_are_the_same_bytes_in_another_cache(debian_base: Path, tmp_path: Path) -> None:
    one = make(debian_base, tmp_path / "one", "service", "builder")
    two = make(debian_base, tmp_path / "two", "service", "builder")
    assert {name: image.digest for name, image in one.items()} == {name: image.digest for name, image in two.items()}
    for image in one.values():
        validate.validate(image, base_layers=False)
        assert image.config["config"]["User"] == "65532:65532"

    service, builder = names_in(one["service"]), names_in(one["builder"])
    site = "app/.venv/lib/python3.11/site-packages"
    assert "app/src/build_service/__pycache__/app.cpython-311.pyc" in service
    assert f"{site}/sqlalchemy/__pycache__/__init__.cpython-311.pyc" in service
    assert {f"{site}/bentoml", "app/.venv/bin/uv"} & service == set()
    assert {"app/.venv/bin/uv", "app/bases/default.toml", "app/src/bentos/onnx"} <= builder
    assert f"{site}/bentoml" not in builder  # a service is imported in an environment of its own
    assert not [name for name in service | builder if "/model/" in name and name.startswith("app/src/bentos/")]
    # the base goes along whole: an empty registry gets it from the builder
    stored = json.loads(layout.read_layout(debian_base).manifest_bytes)
    blobs = {f"app/bases/default/blobs/sha256/{each['digest'][7:]}" for each in stored["layers"]}
    assert blobs <= builder


def test_the_overlay_that_is_written_pins_what_was_pushed(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    refs = {"service": f"10.0.0.1:5000/ekiben-service@{digest}"}
    images._kustomize(tmp_path, images.ROOT / "k8s" / "overlays" / "test", refs)
    written = json.loads((tmp_path / "kustomization.yaml").read_text())
    assert written["images"] == [
        {"name": "localhost:5000/ekiben-service", "newName": "10.0.0.1:5000/ekiben-service", "digest": digest}
    ]  # fmt: skip
