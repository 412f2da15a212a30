"""Every layer of Keras with arguments and inputs that it takes, for the list of TensorFlow's operators and its test."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any


def layers() -> Iterator[tuple[Any, list[Any]]]:
    """Yield every layer of Keras, made with small arguments, and the inputs that it is called with."""
    import keras
    import tensorflow as tf

    for name in sorted(dir(keras.layers)):
        kind = getattr(keras.layers, name)
        if not inspect.isclass(kind) or name in WITHOUT_A_GRAPH or kind.__name__ not in (name, "GroupedQueryAttention"):
            continue
        for arguments, inputs in _ARGUMENTS.get(name, [({}, None)]):
            made = {key: value() if callable(value) and not inspect.isclass(value) else value
                    for key, value in arguments.items()}  # fmt: skip
            yield kind(**made), [tf.TensorSpec(shape, dtype) for shape, dtype in inputs or _shape_of(name)]


WITHOUT_A_GRAPH = frozenset((
    "Layer", "Wrapper", "InputLayer", "InputSpec", "Lambda", "TFSMLayer", "TorchModuleWrapper", "JaxLayer", "FlaxLayer",
    "LSTMCell", "GRUCell", "SimpleRNNCell", "StackedRNNCells", "Pipeline", "AugMix", "CutMix", "MixUp",
    "MaxNumBoundingBoxes", "RandAugment",
))  # fmt: skip
"""Bases, code, cells (which RNN has), and augmentations that do nothing at inference."""

_F = "float32"


def _keras() -> Any:
    import keras

    return keras


_ARGUMENTS: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "Activation": [({"activation": each}, None) for each in (
        "relu", "softmax", "sigmoid", "tanh", "gelu", "silu", "elu", "selu", "softplus", "softsign", "hard_sigmoid",
        "mish", "log_softmax", "exponential", "leaky_relu", "relu6", "hard_silu", "celu", "squareplus",
    )],
    "Attention": [({}, [((None, 4, 3), _F)] * 2),
                  ({"use_scale": True, "score_mode": "concat"}, [((None, 4, 3), _F)] * 2)],
    "AdditiveAttention": [({}, [((None, 4, 3), _F)] * 2)],
    "AlphaDropout": [({"rate": 0.1}, None)],
    "AdaptiveAveragePooling1D": [({"output_size": 2}, [((None, 8, 3), _F)])],
    "AdaptiveAveragePooling2D": [({"output_size": 2}, [((None, 8, 8, 3), _F)])],
    "AdaptiveAveragePooling3D": [({"output_size": 2}, [((None, 8, 8, 8, 3), _F)])],
    "AdaptiveMaxPooling1D": [({"output_size": 2}, [((None, 8, 3), _F)])],
    "AdaptiveMaxPooling2D": [({"output_size": 2}, [((None, 8, 8, 3), _F)])],
    "AdaptiveMaxPooling3D": [({"output_size": 2}, [((None, 8, 8, 8, 3), _F)])],
    "Bidirectional": [({"layer": lambda: _keras().layers.LSTM(3)}, [((None, 4, 3), _F)]),
                      ({"layer": lambda: _keras().layers.GRU(3, return_sequences=True)}, [((None, 4, 3), _F)])],
    "CategoryEncoding": [({"num_tokens": 4, "output_mode": mode}, [((None, 3), "int32")])
                         for mode in ("multi_hot", "count", "one_hot")],
    "CenterCrop": [({"height": 4, "width": 4}, None)],
    "Conv1D": [({"filters": 2, "kernel_size": 3, "padding": "causal"}, None)],
    "Conv2D": [({"filters": 2, "kernel_size": 3}, None), ({"filters": 2, "kernel_size": 3, "dilation_rate": 2}, None)],
    "Cropping1D": [({}, None)],
    "DepthwiseConv1D": [({"kernel_size": 3}, None)],
    "DepthwiseConv2D": [({"kernel_size": 3}, None)],
    "SeparableConv1D": [({"filters": 2, "kernel_size": 3}, None)],
    "SeparableConv2D": [({"filters": 2, "kernel_size": 3}, None)],
    "Dense": [({"units": 2, "activation": "softmax"}, None)],
    "Discretization": [({"bin_boundaries": [0.0, 1.0], "output_mode": mode}, [((None, 3), _F)])
                       for mode in ("int", "multi_hot", "count")],
    "Dot": [({"axes": 1}, [((None, 3), _F)] * 2)],
    "Dropout": [({"rate": 0.1}, None)],
    "EinsumDense": [({"equation": "ab,bc->ac", "output_shape": 2}, [((None, 3), _F)])],
    "Embedding": [({"input_dim": 5, "output_dim": 2, "mask_zero": True}, [((None, 3), "int32")])],
    "GaussianDropout": [({"rate": 0.1}, None)],
    "GaussianNoise": [({"stddev": 0.1}, None)],
    "GroupQueryAttention": [({"head_dim": 2, "num_query_heads": 2, "num_key_value_heads": 1},
                             [((None, 4, 3), _F)] * 2)],
    "GroupNormalization": [({"groups": 1}, None)],
    "HashedCrossing": [({"num_bins": 5}, [((None, 1), "string")] * 2), ({"num_bins": 5}, [((None, 1), "int64")] * 2)],
    "Hashing": [({"num_bins": 5}, None), ({"num_bins": 5, "salt": 3}, None)],
    "IntegerLookup": [({"vocabulary": [1, 2], "output_mode": mode}, [((None, 1), "int64")])
                      for mode in ("int", "one_hot", "multi_hot", "count")],
    "MultiHeadAttention": [({"num_heads": 2, "key_dim": 2}, [((None, 4, 3), _F)] * 2)],
    "Normalization": [({"mean": 0.0, "variance": 1.0}, [((None, 3), _F)])],
    "Permute": [({"dims": (2, 1)}, [((None, 4, 3), _F)])],
    "Pipeline": [],
    "RNN": [({"cell": lambda: _keras().layers.LSTMCell(3)}, [((None, 4, 3), _F)]),
            ({"cell": lambda: [_keras().layers.GRUCell(3)], "return_sequences": True}, [((None, 4, 3), _F)])],
    "RandomCrop": [({"height": 4, "width": 4}, None)],
    "RandomRotation": [({"factor": 0.1}, None)],
    "RandomTranslation": [({"height_factor": 0.1, "width_factor": 0.1}, None)],
    "RandomZoom": [({"height_factor": 0.1}, None)],
    "RepeatVector": [({"n": 2}, [((None, 3), _F)])],
    "Reshape": [({"target_shape": (3, 1)}, [((None, 3), _F)])],
    "Resizing": [({"height": 4, "width": 4, "interpolation": each}, None)
                 for each in ("bilinear", "nearest", "bicubic")]
                + [({"height": 4, "width": 4, "crop_to_aspect_ratio": True}, None)],
    "Rescaling": [({"scale": 0.5}, None)],
    "SpatialDropout1D": [({"rate": 0.1}, None)],
    "SpatialDropout2D": [({"rate": 0.1}, None)],
    "SpatialDropout3D": [({"rate": 0.1}, None)],
    "SpectralNormalization": [({"layer": lambda: _keras().layers.Dense(2)}, None)],
    "StringLookup": [({"vocabulary": ["a", "b"], "output_mode": mode}, None) for mode in ("int", "one_hot", "count")]
                    + [({"vocabulary": ["a", "b"], "invert": True}, [((None, 1), "int64")])],
    "TextVectorization": [
        ({"vocabulary": ["a", "b"], "output_sequence_length": 4}, None),
        ({"vocabulary": ["a", "b"], "ngrams": 2, "output_mode": "multi_hot"}, None),
        ({"vocabulary": ["a", "b"], "split": "character", "standardize": "lower"}, None),
        ({"vocabulary": ["a", "b"], "output_mode": "tf_idf", "idf_weights": [1.0, 2.0]}, None),
    ],
    "TimeDistributed": [({"layer": lambda: _keras().layers.Dense(2)}, [((None, 4, 3), _F)])],
    "UnitNormalization": [({}, None)],
    "STFTSpectrogram": [({}, [((None, 2048, 1), _F)])],
    "MelSpectrogram": [({}, [((None, 2048), _F)])],
    **{f"{kind}{n}D{end}": [({"filters": 2, "kernel_size": 2}, None)]
       for kind in ("Conv",) for n in (1, 2, 3) for end in ("Transpose",)},
    "Conv3D": [({"filters": 2, "kernel_size": 2}, None)],
    **{f"ConvLSTM{n}D": [({"filters": 2, "kernel_size": 2}, [((None, 3, *(4,) * n, 2), _F)])] for n in (1, 2, 3)},
    **{name: [({"units": 3}, [((None, 4, 3), _F)]), ({"units": 3, "return_sequences": True, "go_backwards": True},
              [((None, 4, 3), _F)])] for name in ("LSTM", "GRU", "SimpleRNN")},
    **{name: [({}, [((None, 3), _F)] * 2)] for name in (
        "Add", "Average", "Concatenate", "Maximum", "Minimum", "Multiply", "Subtract")},
    **{f"AveragePooling{n}D": [({"pool_size": 2}, None)] for n in (1, 2, 3)},
    "ReversibleEmbedding": [({"input_dim": 5, "output_dim": 2}, [((None, 3), "int32")])],
    "RandomPosterization": [({"factor": 3}, None)],
    **{f"Random{what}": [({"factor": 0.1}, None)] for what in (
        "Brightness", "ColorDegeneration", "Contrast", "Hue", "Saturation", "Sharpness")},
}  # fmt: skip


def called(layer: Any, values: Sequence[Any]) -> Any:
    """Return what a layer gives for these inputs: attention takes them one by one, merging layers as a list."""
    if type(layer).__name__ in ("MultiHeadAttention", "GroupedQueryAttention"):
        return layer(*values)
    return layer(values[0] if len(values) == 1 else list(values))


def _shape_of(name: str) -> list[tuple[Any, str]]:
    """Of a layer that is known by its name: pictures for 2D and random augmentations, series for 1D, volumes for 3D."""
    if name in ("TextVectorization", "StringLookup", "Hashing"):
        return [((None, 1), "string")]
    if "3D" in name:
        return [((None, 8, 8, 8, 3), _F)]
    if "1D" in name:
        return [((None, 8, 3), _F)]
    pictures = ("2D", "Random", "Crop", "Resizing", "Rescaling", "Equalization", "Solarization", "AutoContrast")
    if any(word in name for word in pictures):
        return [((None, 8, 8, 3), _F)]
    return [((None, 3), _F)]
