"""The network that looks for animals, and how it learns. The same data and recipe give the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from bentos.violation.data import SIDE, Labelled

_SHIFT = 3
"""Pixels by which a picture is moved at most."""
_HISTOGRAM = 6
"""Steps of each colour in the baseline's histograms."""


@dataclass(frozen=True)
class Recipe:
    """Of one training. `widths`: channels of the five convolutions."""

    widths: tuple[int, int, int, int, int]
    epochs: int
    batch: int
    rate: float
    """Highest learning rate; it rises over the first tenth of the way and falls to zero as a cosine."""
    decay: float = 1e-4


def network(recipe: Recipe) -> Any:
    """uint8 pictures [n, SIDE, SIDE, 3] → logits [n, 1]. Preprocessing is part of it."""
    from keras import Input, Model, layers

    pictures = Input((SIDE, SIDE, 3), dtype="uint8", name="picture")
    x = layers.Rescaling(1 / 64, offset=-2.0)(pictures)
    for channels, kernel, stride in zip(recipe.widths, (5, 3, 3, 3, 3), (2, 1, 2, 1, 2), strict=True):
        x = layers.Conv2D(channels, kernel, strides=stride, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    return Model(pictures, layers.Dense(1, name="logit")(x), name="violation")


def learn(model: Any, data: Labelled, recipe: Recipe, seed: int, advance: Callable[[int], None]) -> None:
    """Fits the network of `network` in place; `advance` is told of each step."""
    import keras

    rng = np.random.default_rng(seed)
    steps = steps_of(data, recipe)
    warm = max(1, steps // 10)
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps - warm, warmup_target=recipe.rate, warmup_steps=warm)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=recipe.decay)
    model.compile(optimizer, keras.losses.BinaryCrossentropy(from_logits=True))
    for _ in range(recipe.epochs):
        order = rng.permutation(len(data.violations))
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            chosen = order[start : start + recipe.batch]
            seen = varied(data.pictures[chosen], rng)
            model.train_on_batch(seen, data.violations[chosen].astype(np.float32)[:, None])
            advance(1)


def steps_of(data: Labelled, recipe: Recipe) -> int:
    return recipe.epochs * (len(data.violations) // recipe.batch)


def varied(pictures: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Each picture moved a little, every other one seen in a mirror."""
    count = len(pictures)
    around = ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0))
    windows = sliding_window_view(np.pad(pictures, around, mode="reflect"), (SIDE, SIDE), axis=(1, 2))
    down, across = rng.integers(0, 2 * _SHIFT + 1, (2, count))
    moved = windows[np.arange(count), down, across].transpose(0, 2, 3, 1)
    mirrored = rng.random(count) < 0.5
    return np.where(mirrored[:, None, None, None], moved[:, :, ::-1], moved)


def logits(model: Any, pictures: NDArray[np.uint8], batch: int = 500) -> NDArray[np.float64]:
    """[n, SIDE, SIDE, 3] → [n]."""
    parts = [model.predict_on_batch(pictures[i : i + batch])[:, 0] for i in range(0, len(pictures), batch)]
    return np.concatenate(parts).astype(np.float64)


def calibrated(model: Any, temperature: float) -> Any:
    """The network that gives probabilities, its last layer's weights divided by the temperature."""
    from keras import Model, layers

    last = model.get_layer("logit")
    last.set_weights([weights / np.float32(temperature) for weights in last.get_weights()])
    return Model(model.inputs, layers.Activation("sigmoid", name="probability")(last.output), name="violation")


def histograms(pictures: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Root of the share of each of 216 colours: what a picture is coloured like, wherever and in whatever shape."""
    steps = pictures.astype(np.int64) * _HISTOGRAM // 256
    colour = (steps[..., 0] * _HISTOGRAM + steps[..., 1]) * _HISTOGRAM + steps[..., 2]
    size = _HISTOGRAM**3
    place = np.arange(len(pictures))[:, None] * size + colour.reshape(len(pictures), -1)
    counts = np.bincount(place.ravel(), minlength=len(pictures) * size).reshape(-1, size)
    return np.sqrt(counts / counts.sum(axis=1, keepdims=True))


def baseline(train: Labelled, test: Labelled) -> NDArray[np.float64]:
    """Probabilities of a logistic regression on the colours of the pictures."""
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression(C=10.0, max_iter=300).fit(histograms(train.pictures), train.violations)
    return np.asarray(fitted.predict_proba(histograms(test.pictures))[:, 1])
