"""What is searched in: CIFAR-10 for a full training, drawn shapes for a small one. Three parts that share no picture.

train       what the network learns from
catalogue   what is searched in; the network has never seen it, as it will not have seen tomorrow's pictures
held_out    what is searched with
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from bentos.training.cifar10 import CLASSES, Cifar10, Split

SIDE = 32
SHAPES = ("disc", "ring", "square", "cross", "stripes", "triangle")

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pictures:
    ids: tuple[str, ...]
    pixels: Bytes  # (n, SIDE, SIDE, 3)
    labels: Ints  # (n,), positions in the world's classes

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class World:
    name: str
    classes: tuple[str, ...]
    train: Pictures
    catalogue: Pictures
    held_out: Pictures

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all pixels and labels, in hex."""
        hasher = hashlib.sha256()
        for part in (self.train, self.catalogue, self.held_out):
            hasher.update(part.pixels.tobytes())
            hasher.update(part.labels.tobytes())
        return hasher.hexdigest()


def shapes(train: int, catalogue: int, held_out: int, seed: int) -> World:
    """Drawn pictures; the class is the shape. Colours, light, place, size and turn say nothing about it."""
    rng = np.random.default_rng(seed)
    pixels, labels = draw(rng, train + catalogue + held_out)
    parts, start = [], 0
    for count in (train, catalogue, held_out):
        part = slice(start, start + count)
        ids = tuple(f"{SHAPES[label]}-{number:05d}" for number, label in enumerate(labels[part], start=start))
        parts.append(Pictures(ids, pixels[part], labels[part]))
        start += count
    return World("drawn shapes", SHAPES, *parts)


def of_cifar10(data: Cifar10, train: int, catalogue: int, held_out: int) -> World:
    """Of CIFAR-10's training pictures the first to learn from and the last as catalogue; its test pictures held out."""
    known = len(data.train.labels)
    if train + catalogue > known or held_out > len(data.test.labels):
        raise ValueError(f"CIFAR-10 has not {train} + {catalogue} training pictures and {held_out} test pictures")
    return World(
        "CIFAR-10",
        CLASSES,
        _part(data.train, "train", slice(0, train)),
        _part(data.train, "train", slice(known - catalogue, known)),
        _part(data.test, "test", slice(0, held_out)),
    )


def _part(split: Split, name: str, part: slice) -> Pictures:
    ids = tuple(f"cifar10-{name}-{number:05d}" for number in range(part.start, part.stop))
    return Pictures(ids, split.pictures[part], split.labels[part].astype(np.int64))


def draw(rng: np.random.Generator, count: int) -> tuple[Bytes, Ints]:
    """`count` pictures, and the number of the shape in each."""
    labels = rng.integers(0, len(SHAPES), count)
    return np.stack([_drawn(rng, SHAPES[label]) for label in labels]), labels


def _drawn(rng: np.random.Generator, shape: str) -> Bytes:
    y, x = np.mgrid[0:SIDE, 0:SIDE] / (SIDE - 1) * 2 - 1
    turn, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.5, 0.8)
    dx, dy = rng.uniform(-0.25, 0.25, 2)
    u = ((x - dx) * np.cos(turn) + (y - dy) * np.sin(turn)) / size
    v = (-(x - dx) * np.sin(turn) + (y - dy) * np.cos(turn)) / size
    inside = _inside(shape, u, v)
    ground, figure = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    while np.abs(ground - figure).max() < 0.4:
        figure = rng.uniform(0, 1, 3)
    light = 1 + rng.uniform(-0.3, 0.3) * x + rng.uniform(-0.3, 0.3) * y
    picture = np.where(inside[:, :, None], figure, ground) * light[:, :, None]
    picture += rng.normal(0, 0.04, picture.shape)
    return np.asarray(np.clip(picture * 255, 0, 255).astype(np.uint8))


def _inside(shape: str, u: Floats, v: Floats) -> NDArray[np.bool_]:
    radius = np.hypot(u, v)
    widest = np.maximum(np.abs(u), np.abs(v))
    match shape:
        case "disc":
            return radius < 1
        case "ring":
            return (radius < 1) & (radius > 0.6)
        case "square":
            return widest < 0.8
        case "cross":
            return (np.minimum(np.abs(u), np.abs(v)) < 0.3) & (widest < 1)
        case "stripes":
            return (np.sin(9 * u) > 0) & (radius < 1)
        case _:
            return (v > -0.6) & (v < 0.9 - 1.7 * np.abs(u))
