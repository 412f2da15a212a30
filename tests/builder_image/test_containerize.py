from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder_image import containerize
from registry.errors import UserError


def store(home: Path, **info: Any) -> Path:
    folder = home / "bentos" / "hello" / "one"
    (folder / "env" / "python").mkdir(parents=True)
    (folder / "bento.yaml").write_text(yaml.safe_dump({"name": "hello", "version": "one", "spec": 2, **info}))
    (folder.parent / "latest").write_text("one")
    return folder


@pytest.mark.parametrize("tag", ["hello", "hello:latest", "hello:one"])
def test_a_bento_is_found_as_bentoml_finds_it(tmp_path: Path, tag: str) -> None:
    folder = store(tmp_path)
    assert containerize.find(tag, tmp_path).dir == folder


@pytest.mark.parametrize("tag", ["other", "hello:two", "../hello:one", "hello:../one", ":one"])
def test_a_bento_that_is_not_there_is_said_so(tmp_path: Path, tag: str) -> None:
    store(tmp_path)
    with pytest.raises(UserError) as caught:
        containerize.find(tag, tmp_path)
    assert caught.value.code == "bento_not_found"


@pytest.mark.parametrize(
    "info",
    [
        {"docker": {"system_packages": ["git"]}},
        {"conda": {"dependencies": ["numpy"]}},
        {"image": {"commands": ["apt-get install -y ffmpeg"]}},
        {"image": {"post_commands": ["python setup.py"]}},
        {"image": {"base_image": "nvidia/cuda:12"}},
    ],
)
def test_what_layers_cannot_do_is_refused(tmp_path: Path, info: dict[str, Any]) -> None:
    store(tmp_path, **info)
    with pytest.raises(UserError) as caught:
        containerize.refuse(containerize.find("hello", tmp_path).info)
    assert caught.value.code == "needs_dockerfile"


def test_an_index_written_into_a_bento_does_not_decide_where_packages_come_from(tmp_path: Path) -> None:
    folder = store(tmp_path)
    (folder / "env" / "python" / "requirements.txt").write_text("--index-url https://example.org/simple\nsix==1.17.0\n")
    lines, wheels = containerize.requirements(containerize.find("hello", tmp_path), tmp_path)
    assert (lines, wheels) == (("six==1.17.0",), None)


def test_models_of_a_bento_are_found_under_their_tag_and_as_the_latest(tmp_path: Path) -> None:
    """A missing `latest` made BentoML write into the image, which fails on a read-only root file system."""
    store(tmp_path, models=[{"tag": "tiny:abc"}])
    (tmp_path / "models" / "tiny" / "abc").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "abc" / "n.txt").write_text("21")
    layer = containerize._models(containerize.find("hello", tmp_path), tmp_path)
    assert layer is not None
    with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as archive:
        latest = archive.extractfile("home/bentoml/bento/models/tiny/latest")
        assert latest is not None
        assert latest.read() == b"abc"
        assert archive.getmember("home/bentoml/bento/models/tiny/abc/n.txt").size == 2


def test_a_model_that_the_store_lacks_is_named(tmp_path: Path) -> None:
    store(tmp_path, models=[{"tag": "tiny:abc"}])
    with pytest.raises(UserError, match="tiny:abc") as caught:
        containerize._models(containerize.find("hello", tmp_path), tmp_path)
    assert caught.value.code == "needs_model_store"
