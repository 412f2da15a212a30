"""The network that tells materials, and a training loop that repeats bit for bit.

Pictures go in as they are, uint8 [n, SIZE, SIZE, 3]; probabilities come out, float32 [n, 5].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.cargo.data import Bytes, Pictures
from bentos.cargo.textures import MATERIALS, SIZE
from bentos.serving.networks import tensorflow

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Weights = list[NDArray[Any]]
Draw = Callable[[np.random.Generator], tuple[Bytes, Ints]]
"""Makes a batch: pictures and their labels."""

BATCH = 32


def build(seed: int, width: int) -> Any:
    """A network with fresh weights: four convolutions that halve the sides, and the mean over what they see.

    `width`: channels of the first. About 80,000 weights at 16.
    """
    tensorflow()
    import keras

    seeds = itertools.count(seed * 1000)

    def glorot() -> Any:
        return keras.initializers.GlorotUniform(seed=next(seeds))

    layers: list[Any] = [
        keras.Input((SIZE, SIZE, 3), dtype="uint8", name="picture"),
        keras.layers.Rescaling(1 / 127.5, offset=-1),
    ]
    for channels, kernel in ((width, 5), (2 * width, 3), (4 * width, 3), (6 * width, 3)):
        layers += [
            keras.layers.Conv2D(
                channels, kernel, strides=2, padding="same", use_bias=False, kernel_initializer=glorot()
            ),
            keras.layers.BatchNormalization(momentum=0.95),
            keras.layers.ReLU(),
        ]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(len(MATERIALS), kernel_initializer=glorot()),
        keras.layers.Softmax(name="probabilities"),
    ]
    return keras.Sequential(layers, name="cargo")


class Trainer:
    """Trains one network again and again from given weights; its step is compiled once."""

    def __init__(self, network: Any) -> None:
        self._tf = tf = tensorflow()
        import keras

        self.network = network
        self._optimizer = keras.optimizers.Adam(1e-3)
        self._optimizer.build(network.trainable_variables)
        self._fresh = [variable.numpy() for variable in self._optimizer.variables]

        def step(pictures: Any, labels: Any, rate: Any) -> Any:
            self._optimizer.learning_rate.assign(rate)
            with tf.GradientTape() as tape:
                answers = network(pictures, training=True)
                loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, answers))
            variables = network.trainable_variables
            self._optimizer.apply(tape.gradient(loss, variables), variables)
            return loss

        kinds = (tf.TensorSpec((BATCH, SIZE, SIZE, 3), tf.uint8), tf.TensorSpec((BATCH,), tf.int64))
        self._step = tf.function(step, input_signature=[*kinds, tf.TensorSpec((), tf.float32)], autograph=False)
        self._call = tf.function(
            lambda pictures: network(pictures, training=False),
            input_signature=[tf.TensorSpec((None, SIZE, SIZE, 3), tf.uint8)],
            autograph=False,
        )

    @property
    def weights(self) -> Weights:
        return [variable.numpy() for variable in self.network.variables]

    @weights.setter
    def weights(self, values: Weights) -> None:
        for variable, value in zip(self.network.variables, values, strict=True):
            variable.assign(value)

    def run(self, draw: Draw, steps: int, rate: float, seed: int, done: Callable[[int], None] | None = None) -> None:
        """Take `steps` steps by Adam, whose rate falls from `rate` to zero as a cosine does. `done` hears of each."""
        for variable, value in zip(self._optimizer.variables, self._fresh, strict=True):
            variable.assign(value)
        rng = np.random.default_rng(seed)
        for step in range(steps):
            pictures, labels = draw(rng)
            self._step(pictures, labels, np.float32(rate * 0.5 * (1 + np.cos(np.pi * step / steps))))
            if done is not None:
                done(1)

    def answers(self, pictures: Bytes) -> Floats:
        """Probabilities [n, 5]."""
        return np.concatenate([np.asarray(self._call(pictures[i : i + 250])) for i in range(0, len(pictures), 250)])


def from_one(pictures: Pictures) -> Draw:
    """Batches of one set."""
    return lambda rng: _mirrored(*_some(pictures, BATCH, rng), rng)


def from_both(known: Pictures, new: Pictures) -> Draw:
    """Batches whose one half is of the known set, and the other of the new one, however few pictures it has."""

    def draw(rng: np.random.Generator) -> tuple[Bytes, Ints]:
        old_images, old_labels = _some(known, BATCH // 2, rng)
        new_images, new_labels = _some(new, BATCH - BATCH // 2, rng)
        images = np.concatenate([old_images, new_images])
        return _mirrored(images, np.concatenate([old_labels, new_labels]), rng)

    return draw


def _some(pictures: Pictures, count: int, rng: np.random.Generator) -> tuple[Bytes, Ints]:
    chosen = rng.integers(0, len(pictures), count)
    return pictures.images[chosen], pictures.labels[chosen]


def _mirrored(images: Bytes, labels: Ints, rng: np.random.Generator) -> tuple[Bytes, Ints]:
    """Half of them mirrored: left and right are the same to a load."""
    flipped = rng.random(len(images)) < 0.5
    return np.where(flipped[:, None, None, None], images[:, :, ::-1], images), labels
