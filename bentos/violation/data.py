"""Pictures with an animal and without: CIFAR-10, or small drawn ones that need no network.

CIFAR-10: bird, cat, deer, dog, frog and horse are animals; airplane, automobile, ship and truck are violations. The
validation split is taken from the 50,000 pictures to train on; the 10,000 test pictures are held out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from bentos.training import cifar10

SIDE = 32
_DRAWN = 64


@dataclass(frozen=True)
class Labelled:
    pictures: NDArray[np.uint8]
    """[n, SIDE, SIDE, 3]"""
    violations: NDArray[np.bool_]
    """[n], true where there is no animal."""


@dataclass(frozen=True)
class Data:
    name: str
    train: Labelled
    validation: Labelled
    test: Labelled
    digest: str
    """SHA-256 of all three, in hex."""


def of_cifar10(source: str, validation: int, seed: int, say: Callable[[str], None]) -> Data:
    """Raises cifar10.DataError."""
    found = cifar10.load(source, say=say)
    order = np.random.default_rng(seed).permutation(len(found.train.labels))
    known = _labelled(found.train)
    return _data(
        "CIFAR-10, animals against vehicles",
        Labelled(known.pictures[order[validation:]], known.violations[order[validation:]]),
        Labelled(known.pictures[order[:validation]], known.violations[order[:validation]]),
        _labelled(found.test),
    )


def drawn(count: int, seed: int) -> Data:
    """`count` drawn pictures to train on, a third as many each to validate and to test."""
    splits = [_drawn(size, [seed, i]) for i, size in enumerate((count, count // 3, count // 3))]
    return _data("drawn animals and vehicles", *splits)


def _data(name: str, train: Labelled, validation: Labelled, test: Labelled) -> Data:
    digest = hashlib.sha256()
    for split in (train, validation, test):
        digest.update(np.ascontiguousarray(split.pictures).tobytes())
        digest.update(split.violations.tobytes())
    return Data(name, train, validation, test, digest.hexdigest())


def _labelled(split: cifar10.Split) -> Labelled:
    return Labelled(split.pictures, ~np.isin(split.labels, cifar10.ANIMALS))


def _drawn(count: int, seed: list[int]) -> Labelled:
    rng = np.random.default_rng(seed)
    violations = rng.random(count) < 0.4
    pictures = np.stack([_draw(rng, bool(violation)) for violation in violations])
    return Labelled(pictures, violations)


def _draw(rng: np.random.Generator, violation: bool) -> NDArray[np.uint8]:
    """A round thing with legs and ears, or a square one with wheels, of any colour before a light sky and ground."""
    image = Image.new("RGB", (_DRAWN, _DRAWN), _colour(rng, 150, 256))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, int(rng.integers(24, 56)), _DRAWN, _DRAWN), fill=_colour(rng, 100, 256))
    width, height = int(rng.integers(20, 36)), int(rng.integers(12, 20))
    left, top = int(rng.integers(2, _DRAWN - width - 8)), int(rng.integers(12, _DRAWN - height - 10))
    right, bottom = left + width, top + height
    body, other = _colour(rng, 0, 180), _colour(rng, 0, 180)
    if violation:
        draw.rectangle((left, top, right, bottom), fill=body)
        draw.rectangle((left + width // 4, top - height // 2, right - width // 4, top), fill=body)
        for x in (left + width // 5, right - width // 5):
            draw.ellipse((x - 4, bottom - 3, x + 4, bottom + 5), fill=other)
    else:
        for x in np.linspace(left + 4, right - 4, 4):
            draw.line((x, bottom - 4, x + rng.integers(-2, 3), bottom + 8), fill=body, width=2)
        draw.ellipse((left, top, right, bottom), fill=body)
        head = right - 2 if rng.random() < 0.5 else left + 2
        draw.ellipse((head - 6, top - 8, head + 6, top + 4), fill=body)
        for x in (head - 4, head + 4):
            draw.polygon(((x - 2, top - 6), (x + 2, top - 6), (x, top - 12)), fill=other)
    small = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)
    return np.clip(small + rng.normal(0, 15, small.shape), 0, 255).astype(np.uint8)


def _colour(rng: np.random.Generator, low: int, high: int) -> tuple[int, int, int]:
    red, green, blue = rng.integers(low, high, 3).tolist()
    return red, green, blue
