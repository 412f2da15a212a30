"""The embedding network and how it learns: classes pulled apart by the angle between vectors.

The loss is the normalised softmax (Zhai and Wu, "Classification is a strong baseline for deep metric learning", BMVC
2019): each class has a vector of length 1 that learns too, and the score of a picture for a class is the cosine of the
angle between their vectors over a temperature. What is learnt is thus the very distance that is searched by. The class
vectors are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bentos.image_search.data import SIDE, Bytes, Pictures

_SMOOTHING = 0.1
_SHIFT = 3
"""Pixels by which a picture is moved at most."""


@dataclass(frozen=True)
class Recipe:
    """Of one training. `widths`: channels of the four stages."""

    widths: tuple[int, int, int, int]
    dimension: int
    epochs: int
    batch: int
    rate: float
    """Highest learning rate; it rises for a fifth of the way and falls to zero."""
    temperature: float = 0.1
    decay: float = 5e-4
    mirror: bool = True
    """Whether a picture seen in a mirror is the same."""


def network(recipe: Recipe) -> Any:
    """uint8 pictures [n, SIDE, SIDE, 3] → vectors of length 1 [n, dimension]. Preprocessing is part of it."""
    from keras import Input, Model, layers

    def convolution(x: Any, channels: int) -> Any:
        x = layers.Conv2D(channels, 3, padding="same", use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        return layers.ReLU()(x)

    first, second, third, fourth = recipe.widths
    pictures = Input((SIDE, SIDE, 3), dtype="uint8", name="picture")
    x = layers.Rescaling(1 / 64, offset=-2.0)(pictures)
    x = layers.MaxPooling2D()(convolution(x, first))
    x = layers.MaxPooling2D()(convolution(x, second))
    x = layers.Add()([x, convolution(convolution(x, second), second)])
    x = layers.MaxPooling2D()(convolution(x, third))
    x = layers.Add()([x, convolution(convolution(x, third), third)])
    x = layers.GlobalMaxPooling2D()(convolution(x, fourth))
    x = layers.Dense(recipe.dimension, use_bias=False)(x)
    return Model(pictures, layers.UnitNormalization(name="vector")(x), name="embedding")


def learn(pictures: Pictures, classes: int, recipe: Recipe, seed: int, advance: Callable[[int], None]) -> Any:
    """A trained network. `advance` is told of each step. The same pictures, recipe and seed give the same weights."""
    from bentos.training import keras_files

    tf = keras_files.start(seed)
    import keras

    model = network(recipe)
    proxies = tf.Variable(tf.random.stateless_normal((recipe.dimension, classes), (seed, 1)))
    optimizer = keras.optimizers.SGD(momentum=0.9, nesterov=True)
    variables = [*model.trainable_variables, proxies]
    kernels = [v for v in model.trainable_variables if v.path.endswith("kernel")]

    @tf.function(
        input_signature=[
            tf.TensorSpec((recipe.batch, SIDE, SIDE, 3), tf.uint8),
            tf.TensorSpec((recipe.batch,), tf.int64),
            tf.TensorSpec((), tf.float32),
        ],
        autograph=False,
    )
    def step(batch: Any, labels: Any, rate: Any) -> Any:
        optimizer.learning_rate.assign(rate)
        with tf.GradientTape() as tape:
            cosines = model(batch, training=True) @ tf.math.l2_normalize(proxies, axis=0)
            wanted = tf.one_hot(labels, classes) * (1 - _SMOOTHING) + _SMOOTHING / classes
            loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(wanted, cosines / recipe.temperature))
            loss += recipe.decay * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    rng = np.random.default_rng(seed)
    steps = recipe.epochs * (len(pictures) // recipe.batch)
    optimizer.build(variables)
    done = 0
    for _ in range(recipe.epochs):
        order = rng.permutation(len(pictures))
        for start in range(0, len(order) - recipe.batch + 1, recipe.batch):
            chosen = order[start : start + recipe.batch]
            way = done / steps
            rate = recipe.rate * min(way / 0.2 + 0.05, (1 - way) / 0.8)
            step(varied(rng, pictures.pixels[chosen], recipe.mirror), pictures.labels[chosen], np.float32(rate))
            done += 1
            advance(1)
    return model


def varied(rng: np.random.Generator, pixels: Bytes, mirror: bool) -> Bytes:
    """The pictures, each moved by a few pixels, and half of them mirrored where that is allowed."""
    padded = np.pad(pixels, ((0, 0), (_SHIFT, _SHIFT), (_SHIFT, _SHIFT), (0, 0)), mode="reflect")
    down, right = rng.integers(0, 2 * _SHIFT + 1, (2, len(pixels)))
    turned = rng.random(len(pixels)) < (0.5 if mirror else 0.0)
    result = np.empty_like(pixels)
    for i in range(len(pixels)):
        moved = padded[i, down[i] : down[i] + SIDE, right[i] : right[i] + SIDE]
        result[i] = moved[:, ::-1] if turned[i] else moved
    return result
