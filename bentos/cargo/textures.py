"""Procedural pictures of a hold: a material, how much of it, where the camera stands, and the light.

Everything is drawn from one generator of random numbers a picture, so a picture depends on its seed alone and not on
how many were made before it. Colours are floats from 0 to 1, shapes are [SIZE, SIZE, 3].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

SIZE = 96
MATERIALS = ("background", "brick", "concrete", "ground", "wood")
"""By label, 0 to 4. Background is an empty hold."""

Floats = NDArray[np.float64]
Rng = np.random.Generator

_ROWS, _COLUMNS = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) * 2 - 1


def draw(label: int, rng: Rng) -> NDArray[np.uint8]:
    """One picture of a material, [SIZE, SIZE, 3]."""
    hold = _hold(*_camera(rng), rng)
    if label:
        x, y = _camera(rng)
        filled = _heap(rng)
        material = _MATERIALS[label](x, y, rng)
        # the edge of a load lies in its own shade
        shade = 1 - 0.35 * (np.clip(filled, 0, 0.06) < 0.06) * (filled > 0)
        hold = np.where((filled > 0)[..., None], material * shade[..., None], hold)
    return _photograph(hold, rng)


def noise(rng: Rng, rows: int, columns: int) -> Floats:
    """Smooth noise from 0 to 1 with about this many bumps down and across, [SIZE, SIZE]."""
    grid = rng.random((rows + 2, columns + 2))
    return np.asarray(_stretch(rows + 2) @ grid @ _stretch(columns + 2).T)


def fractal(rng: Rng, first: int, octaves: int, gain: float = 0.55) -> Floats:
    """Sum of noise of ever finer grain, from 0 to 1."""
    weights = gain ** np.arange(octaves)
    layers = [w * noise(rng, first << i, first << i) for i, w in enumerate(weights)]
    return np.asarray(np.sum(layers, axis=0) / weights.sum())


@cache
def _stretch(points: int) -> Floats:
    """Matrix that reads a line of `points` values at SIZE places, smoothly between them."""
    at = np.linspace(0.5, points - 1.5, SIZE)
    left = np.floor(at).astype(int)
    part = at - left
    part = part * part * (3 - 2 * part)
    matrix = np.zeros((SIZE, points))
    matrix[np.arange(SIZE), left] = 1 - part
    matrix[np.arange(SIZE), left + 1] += part
    return matrix


def _camera(rng: Rng) -> tuple[Floats, Floats]:
    """Coordinates of the surface that each pixel sees: turned, near or far, shifted, tilted."""
    angle = np.radians(rng.normal(0, 9))
    scale = np.exp(rng.uniform(-0.45, 0.45))
    tilt, pan = rng.uniform(-0.3, 0.3, 2)
    depth = scale / (1 + tilt * _ROWS + pan * _COLUMNS)
    x = (np.cos(angle) * _COLUMNS - np.sin(angle) * _ROWS) * depth
    y = (np.sin(angle) * _COLUMNS + np.cos(angle) * _ROWS) * depth
    across, down = rng.uniform(0, 10, 2)
    return x + across, y + down


def _heap(rng: Rng) -> Floats:
    """How deep each pixel lies under the outline of the load; none or less: above it."""
    level = rng.uniform(-1.3, 0.45)  # of the surface: −1 is the upper edge of the picture
    slope = rng.normal(0, 0.2)
    bumps = rng.uniform(0, 0.5) * (noise(rng, 1, int(rng.integers(2, 7)))[:1] - 0.5)
    return np.asarray(_ROWS - (level + slope * _COLUMNS + bumps))


def _tint(rng: Rng, low: tuple[float, float, float], high: tuple[float, float, float], spread: float = 0.03) -> Floats:
    """A colour between two, a little off the line."""
    part = rng.random()
    return np.asarray(np.array(low) * (1 - part) + np.array(high) * part + rng.normal(0, spread, 3))


def _hold(x: Floats, y: Floats, rng: Rng) -> Floats:
    """Steel walls with ribs, painted and rusting, over a floor."""
    paint = _tint(rng, *_PAINTS[rng.integers(len(_PAINTS))])
    ribs = np.sin(x * rng.uniform(5, 16)) * rng.uniform(0.02, 0.14)
    if rng.random() < 0.5:
        ribs = np.sign(ribs) * np.sqrt(np.abs(ribs)) * 0.3  # folded sheets have flat faces
    rust = np.clip((fractal(rng, 3, 4) - rng.uniform(0.45, 0.75)) * 6, 0, 1) * rng.uniform(0.2, 0.9)
    wall = paint * (1 + ribs + 0.12 * (fractal(rng, 2, 3) - 0.5))[..., None]
    wall = wall * (1 - rust[..., None]) + np.array([0.36, 0.2, 0.12]) * rust[..., None]
    floor = rng.uniform(0.0, 1.4)
    on_floor = (floor < _ROWS)[..., None]
    return np.where(on_floor, wall * rng.uniform(0.5, 0.9), wall)


def _brick(x: Floats, y: Floats, rng: Rng) -> Floats:
    width, height = rng.uniform(0.3, 0.5), rng.uniform(0.13, 0.22)
    row = np.floor(y / height).astype(int)
    across = x / width + 0.5 * (row % 2) + rng.normal(0, 0.05, 64)[row % 64]
    column = np.floor(across).astype(int)
    which = (row * 31 + column * 17) % 97
    colour = _tint(rng, *_BRICKS[rng.integers(len(_BRICKS))])
    own = 1 + rng.normal(0, rng.uniform(0.04, 0.16), 97)[which]
    bricks = colour * (own + 0.3 * (fractal(rng, 8, 3) - 0.5))[..., None]
    joint = rng.uniform(0.04, 0.09)
    mortar = (across - column < joint) | (y / height - row < joint * width / height)
    pale = _tint(rng, (0.35, 0.33, 0.3), (0.75, 0.73, 0.68)) * (0.8 + 0.4 * noise(rng, 30, 30))[..., None]
    return np.where(mortar[..., None], pale, bricks)


def _concrete(x: Floats, y: Floats, rng: Rng) -> Floats:
    colour = _tint(rng, (0.4, 0.39, 0.37), (0.75, 0.74, 0.71), 0.015)
    stain = 1 + rng.uniform(0.1, 0.45) * (fractal(rng, 2, 4) - 0.5)
    pores = 1 - 0.5 * (noise(rng, 60, 60) > rng.uniform(0.86, 0.97))
    cast = 1 + 0.04 * np.sign(np.sin(y * rng.uniform(8, 25))) * (
        rng.random() < 0.35
    )  # marks of the boards it was cast in
    width, height = rng.uniform(0.6, 1.5), rng.uniform(0.5, 1.2)
    joints = (np.mod(x, width) < 0.03) | (np.mod(y, height) < 0.03)
    blocks = np.where(joints & (rng.random() < 0.7), 0.6, 1.0)
    return np.asarray(colour * (stain * pores * cast * blocks)[..., None])


def _ground(x: Floats, y: Floats, rng: Rng) -> Floats:
    colour = _tint(rng, *_SOILS[rng.integers(len(_SOILS))])
    relief = fractal(rng, int(rng.integers(4, 12)), 4, 0.75)
    # light from the upper left makes clods of it
    slope = np.diff(relief, axis=0, prepend=relief[:1]) + np.diff(relief, axis=1, prepend=relief[:, :1])
    clods = 1 + rng.uniform(1.5, 4) * slope + rng.uniform(0.3, 0.8) * (relief - 0.5)
    soil = colour * clods[..., None]
    stones = (noise(rng, 26, 26) > rng.uniform(0.8, 0.97))[..., None]
    return np.where(stones, _tint(rng, (0.4, 0.38, 0.35), (0.65, 0.62, 0.58)) * clods[..., None], soil)


def _wood(x: Floats, y: Floats, rng: Rng) -> Floats:
    if rng.random() < 0.35:
        x, y = y, x
    colour = _tint(rng, *_WOODS[rng.integers(len(_WOODS))])
    width = rng.uniform(0.16, 0.42)
    plank = np.floor(y / width).astype(int)
    part = y / width - plank
    own = 1 + rng.normal(0, 0.1, 64)[plank % 64]
    # rings run along the plank, and wave
    wave = np.interp(np.mod(x + 3.7 * plank, 8), np.linspace(0, 8, 33), rng.normal(0, 0.25, 33))
    rings = np.sin((part + wave) * rng.uniform(14, 40) + rng.uniform(0, 6, 64)[plank % 64])
    fibre = np.interp(np.mod(y * 7, 8), np.linspace(0, 8, 200), rng.normal(0, 1, 200))
    tone = own * (1 + rng.uniform(0.04, 0.13) * rings + 0.04 * fibre)
    if rng.random() < 0.4:
        tone = tone * (0.55 + 0.6 * np.sin(np.pi * part))  # logs are round
    gap = part < 0.05
    return np.asarray(colour * np.where(gap, 0.35, tone)[..., None])


def _photograph(scene: Floats, rng: Rng) -> NDArray[np.uint8]:
    """Light that comes from a side, a shadow, the lens, and the sensor's noise."""
    ahead = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.35) * (np.cos(ahead) * _COLUMNS + np.sin(ahead) * _ROWS)
    light = light * (1 - rng.uniform(0, 0.3) * (_ROWS**2 + _COLUMNS**2) / 2)
    if rng.random() < 0.3:
        edge = np.cos(ahead) * _ROWS - np.sin(ahead) * _COLUMNS
        light = light * np.where(edge > rng.uniform(-0.6, 0.6), rng.uniform(0.45, 0.8), 1.0)
    warmth = rng.normal(0, 0.06)
    scene = scene * light[..., None] * np.array([1 + warmth, 1.0, 1 - warmth]) * np.exp(rng.uniform(-0.45, 0.3))
    scene = np.clip(scene, 0, 1) ** rng.uniform(0.8, 1.25)
    for _ in range(int(rng.integers(0, 3))):
        scene = (2 * scene + np.roll(scene, 1, 0) + np.roll(scene, 1, 1)) / 4  # out of focus
    scene = scene + rng.normal(0, rng.uniform(0.01, 0.05), scene.shape)
    return np.asarray(np.clip(scene * 255, 0, 255).round().astype(np.uint8))


_PAINTS = (
    ((0.35, 0.37, 0.39), (0.62, 0.63, 0.63)),
    ((0.2, 0.33, 0.3), (0.35, 0.48, 0.42)),
    ((0.4, 0.2, 0.15), (0.55, 0.3, 0.22)),
    ((0.18, 0.27, 0.4), (0.3, 0.42, 0.58)),
    ((0.5, 0.44, 0.33), (0.68, 0.6, 0.45)),
)
_BRICKS = (
    ((0.48, 0.2, 0.14), (0.68, 0.34, 0.25)),
    ((0.36, 0.2, 0.16), (0.5, 0.3, 0.24)),
    ((0.6, 0.5, 0.36), (0.75, 0.65, 0.5)),
    ((0.42, 0.4, 0.38), (0.58, 0.55, 0.52)),
)
_SOILS = (
    ((0.28, 0.2, 0.13), (0.45, 0.33, 0.22)),
    ((0.45, 0.34, 0.2), (0.62, 0.5, 0.33)),
    ((0.3, 0.28, 0.25), (0.48, 0.45, 0.41)),
    ((0.42, 0.23, 0.15), (0.55, 0.34, 0.24)),
)
_WOODS = (
    ((0.55, 0.4, 0.24), (0.75, 0.6, 0.4)),
    ((0.35, 0.23, 0.14), (0.5, 0.35, 0.22)),
    ((0.42, 0.4, 0.37), (0.6, 0.57, 0.53)),
    ((0.48, 0.27, 0.17), (0.6, 0.38, 0.26)),
)
_MATERIALS: dict[int, Callable[[Floats, Floats, Rng], Floats]] = {1: _brick, 2: _concrete, 3: _ground, 4: _wood}
