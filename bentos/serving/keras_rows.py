"""Keras' own layers that answer each row by itself, for what their graph does not show: loops, and texts.

A model of others, or of operations between layers (keras.ops), proves nothing here.
"""

from __future__ import annotations

from typing import Any

from bentos.serving.row_flow import names

_PLAIN = names(
    "ActivityRegularization Add AlphaDropout Average AveragePooling1D AveragePooling2D AveragePooling3D "
    "CategoryEncoding CenterCrop Conv1D Conv1DTranspose Conv2D Conv2DTranspose Conv3D Conv3DTranspose Cropping1D "
    "Cropping2D Cropping3D Dense DepthwiseConv1D DepthwiseConv2D Discretization Dropout ELU Embedding Flatten "
    "GaussianDropout GaussianNoise GlobalAveragePooling1D GlobalAveragePooling2D GlobalAveragePooling3D "
    "GlobalMaxPooling1D GlobalMaxPooling2D GlobalMaxPooling3D GroupNormalization Hashing HashedCrossing InputLayer "
    "IntegerLookup LeakyReLU Masking MaxPooling1D MaxPooling2D MaxPooling3D Maximum Minimum MultiHeadAttention "
    "Multiply Normalization PReLU Permute ReLU RepeatVector Rescaling Reshape Resizing SeparableConv1D SeparableConv2D "
    "SpatialDropout1D SpatialDropout2D SpatialDropout3D StringLookup Subtract TextVectorization UpSampling1D "
    "UpSampling2D UpSampling3D ZeroPadding1D ZeroPadding2D ZeroPadding3D"
)
_BY_AXIS = names("BatchNormalization Concatenate LayerNormalization Softmax UnitNormalization")
_RECURRENT = names("ConvLSTM1D ConvLSTM2D GRU LSTM SimpleRNN")
_WRAPPERS = names("Bidirectional TimeDistributed")
_MODELS = frozenset({"Functional", "Sequential"})
_ACTIVATIONS = names(
    "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear log_sigmoid log_softmax "
    "mish relu relu6 selu sigmoid silu soft_shrink softmax softplus softsign sparse_plus squareplus tanh tanh_shrink "
    "threshold"
)


def independent(model: Any) -> bool:
    """Whether all that the model consists of answers each row by itself."""
    name = type(model).__name__
    if name not in _MODELS or not type(model).__module__.startswith("keras."):
        return False
    # of a functional model its layers, and the operations between them
    parts = list(model.operations if name == "Functional" else model.layers)
    return bool(parts) and all(map(_fits, parts))


def _fits(layer: Any) -> bool:
    import keras

    name = type(layer).__name__
    if name in _MODELS:
        return independent(layer)
    if type(layer) is not getattr(keras.layers, name, None):
        return False
    activations = [getattr(layer, key, None) for key in ("activation", "recurrent_activation")]
    if not all(each is None or _is_known(each) for each in activations):
        return False
    if name in _PLAIN or name == "Activation":
        return not getattr(layer, "sparse", False)
    if name in _BY_AXIS:
        axis = layer.axis
        axes = list(axis) if isinstance(axis, list | tuple) else [axis]
        ranks = {len(each.shape) for each in _inputs(layer)}
        return bool(ranks) and all(each % rank != 0 for each in axes for rank in ranks)
    if name in _RECURRENT:
        return not layer.stateful
    if name in _WRAPPERS:
        inner = [layer.forward_layer, layer.backward_layer] if name == "Bidirectional" else [layer.layer]
        return all(_fits(each) for each in inner)
    return False


def _is_known(activation: Any) -> bool:
    import keras

    name = getattr(activation, "__name__", "")
    return name in _ACTIVATIONS and activation is getattr(keras.activations, name, None)


def _inputs(layer: Any) -> list[Any]:
    try:
        given = layer.input
    except (AttributeError, ValueError):  # a layer within a wrapper
        return []
    return list(given) if isinstance(given, list | tuple) else [given]
