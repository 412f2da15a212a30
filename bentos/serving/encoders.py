"""Encoders of the BERT family as ONNX graphs, made from a Hugging Face folder's config.json and safetensors.

So a folder that holds weights only is served by ONNX Runtime, without torch and what comes with it. The arithmetic is
that of transformers' modelling files: Devlin et al. (2019) for bert, Liu et al. (2019) for roberta and its kin, Sanh et
al. (2019) for distilbert; layer norm after each block, absolute positions, full attention.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bentos.serving.problems import StartError

FAMILIES = ("bert", "camembert", "distilbert", "roberta", "xlm-roberta")
"""`model_type` of config.json."""

LARGEST = 1_900_000_000
"""Bytes of weights: a graph with its weights is one protobuf message, and those end at 2 GiB."""

EXPORT_HINT = "export it to ONNX where torch is: ekiben.push(pipeline, …), or `optimum-cli export onnx`"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1"}
_MASKED = -3.0e38
Floats = NDArray[np.float32]


def tensors(files: Sequence[Path]) -> dict[str, Floats]:
    """The tensors of safetensors files, as float32. Raises StartError for a dtype that is not known here."""
    found: dict[str, Floats] = {}
    for path in files:
        data = np.memmap(path, dtype=np.uint8, mode="r")
        length = int.from_bytes(data[:8].tobytes(), "little")
        header = json.loads(data[8 : 8 + length].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            raw = data[start:stop].tobytes()
            if entry["dtype"] == "BF16":  # the upper half of a float32
                values = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] in _DTYPES:
                values = np.frombuffer(raw, _DTYPES[entry["dtype"]]).astype(np.float32)
            else:
                raise _refused(f"{path.name} holds {name} as {entry['dtype']}")
            found[name] = values.reshape(entry["shape"])
    return found


def graph(config: Mapping[str, Any], weights: Mapping[str, Floats], classify: bool) -> bytes:
    """The ONNX model: input_ids, attention_mask and token_type_ids (each [n, tokens]) → `logits` or
    `last_hidden_state`. Raises StartError where the configuration or the weights are not of such an encoder."""
    family = str(config.get("model_type"))
    if family not in FAMILIES:
        raise _refused(f"a {family} model in safetensors needs torch, which is not installed here")
    if config.get("position_embedding_type", "absolute") != "absolute" or config.get("is_decoder"):
        raise _refused("its positions are relative, or it is a decoder")
    if sum(array.nbytes for array in weights.values()) > LARGEST:
        raise _refused(f"its weights are more than {LARGEST / 1e9:.1f} GB")
    try:
        return _Writer(_sizes(family, config), weights).write(classify)
    except (KeyError, ValueError, TypeError) as error:
        raise _refused(f"its weights are not those of a {family} encoder: {error}") from error


@dataclass(frozen=True)
class _Sizes:
    family: str
    layers: int
    heads: int
    width: int
    activation: str
    epsilon: float
    padding: int
    """Number of the padding token, from which roberta counts positions."""


def _sizes(family: str, config: Mapping[str, Any]) -> _Sizes:
    distil = family == "distilbert"
    return _Sizes(
        family=family,
        layers=int(config["n_layers" if distil else "num_hidden_layers"]),
        heads=int(config["n_heads" if distil else "num_attention_heads"]),
        width=int(config["dim" if distil else "hidden_size"]),
        activation=str(config.get("activation" if distil else "hidden_act", "gelu")),
        epsilon=1e-12 if distil else float(config.get("layer_norm_eps", 1e-12)),
        padding=int(config.get("pad_token_id") or (0 if family in ("bert", "distilbert") else 1)),
    )


class _Writer:
    """Collects nodes and constants; each method gives the name of its result."""

    def __init__(self, sizes: _Sizes, weights: Mapping[str, Floats]) -> None:
        from onnx import helper, numpy_helper

        self._helper, self._numpy_helper = helper, numpy_helper
        self._sizes = sizes
        body = "roberta" if sizes.family in ("roberta", "xlm-roberta", "camembert") else sizes.family
        self._weights = {name.removeprefix(f"{body}."): array for name, array in weights.items()}
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._count = 0

    def write(self, classify: bool) -> bytes:
        from onnx import TensorProto

        hidden = self._embedded()
        mask = self._mask()
        for number in range(self._sizes.layers):
            hidden = self._layer(number, hidden, mask)
        output = "logits" if classify else "last_hidden_state"
        self._nodes.append(
            self._helper.make_node("Identity", [self._classified(hidden) if classify else hidden], [output])
        )
        names = ["input_ids", "attention_mask"] + ["token_type_ids"] * (self._sizes.family == "bert")
        shape = ["n", "classes"] if classify else ["n", "tokens", self._sizes.width]
        made = self._helper.make_graph(
            self._nodes,
            self._sizes.family,
            [self._helper.make_tensor_value_info(name, TensorProto.INT64, ["n", "tokens"]) for name in names],
            [self._helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)],
            self._constants,
        )
        model = self._helper.make_model(made, opset_imports=[self._helper.make_opsetid("", 17)])
        model.ir_version = 9  # what older runtimes read too
        return bytes(model.SerializeToString())

    # --- the encoder ---------------------------------------------------------------------------------------------

    def _embedded(self) -> str:
        words = self._op("Gather", self._weight("embeddings.word_embeddings.weight"), "input_ids")
        table = self._weight("embeddings.position_embeddings.weight")
        if self._sizes.family in ("bert", "distilbert"):
            length = self._op("Gather", self._op("Shape", "input_ids"), self._constant(np.array(1)))
            places = self._op("Range", self._constant(np.array(0)), length, self._constant(np.array(1)))
            places = self._op("Unsqueeze", places, self._constant(np.array([0])))
        else:  # only words are counted, from the padding's number on
            present = self._op("Equal", "input_ids", self._constant(np.array(self._sizes.padding)))
            present = self._op("Cast", self._op("Not", present), to=7)
            counted = self._op("Mul", self._op("CumSum", present, self._constant(np.array(1))), present)
            places = self._op("Add", counted, self._constant(np.array(self._sizes.padding)))
        total = self._op("Add", words, self._op("Gather", table, places))
        if self._sizes.family == "bert":
            kinds = self._op("Gather", self._weight("embeddings.token_type_embeddings.weight"), "token_type_ids")
            total = self._op("Add", total, kinds)
        elif self._sizes.family != "distilbert":
            first = self._weights["embeddings.token_type_embeddings.weight"][0]
            total = self._op("Add", total, self._constant(first))
        return self._norm(total, "embeddings.LayerNorm")

    def _mask(self) -> str:
        """[n, 1, 1, tokens]: 0 where a token is, a large negative number where padding is."""
        mask = self._op("Cast", "attention_mask", to=1)
        mask = self._op("Unsqueeze", mask, self._constant(np.array([1, 2])))
        absent = self._op("Sub", self._constant(np.float32(1)), mask)
        return self._op("Mul", absent, self._constant(np.float32(_MASKED)))

    def _layer(self, number: int, hidden: str, mask: str) -> str:
        names = _DISTIL if self._sizes.family == "distilbert" else _BERT
        prefix = names["layer"].format(number)
        attended = self._attention(hidden, mask, *(prefix + names[part] for part in ("query", "key", "value")))
        attended = self._linear(attended, prefix + names["joined"])
        hidden = self._norm(self._op("Add", attended, hidden), prefix + names["first_norm"])
        inner = self._activated(self._linear(hidden, prefix + names["wide"]), self._sizes.activation)
        outer = self._linear(inner, prefix + names["narrow"])
        return self._norm(self._op("Add", outer, hidden), prefix + names["second_norm"])

    def _attention(self, hidden: str, mask: str, query: str, key: str, value: str) -> str:
        size = self._sizes.width // self._sizes.heads
        split = self._constant(np.array([0, 0, self._sizes.heads, size]))

        def heads(name: str, order: list[int], scale: float = 1.0) -> str:
            return self._op("Transpose", self._op("Reshape", self._linear(hidden, name, scale), split), perm=order)

        # the scale is multiplied into the query's weights
        scores = self._op("MatMul", heads(query, [0, 2, 1, 3], size**-0.5), heads(key, [0, 2, 3, 1]))
        odds = self._op("Softmax", self._op("Add", scores, mask), axis=-1)
        mixed = self._op("Transpose", self._op("MatMul", odds, heads(value, [0, 2, 1, 3])), perm=[0, 2, 1, 3])
        return self._op("Reshape", mixed, self._constant(np.array([0, 0, self._sizes.width])))

    def _classified(self, hidden: str) -> str:
        """The head that transformers puts on the first token."""
        first = self._op("Gather", hidden, self._constant(np.array(0)), axis=1)
        if self._sizes.family == "bert":
            return self._linear(self._op("Tanh", self._linear(first, "pooler.dense")), "classifier")
        if self._sizes.family == "distilbert":
            return self._linear(self._op("Relu", self._linear(first, "pre_classifier")), "classifier")
        return self._linear(self._op("Tanh", self._linear(first, "classifier.dense")), "classifier.out_proj")

    # --- the parts -----------------------------------------------------------------------------------------------

    def _linear(self, value: str, name: str, scale: float = 1.0) -> str:
        weight = np.ascontiguousarray(self._weights[f"{name}.weight"].T) * np.float32(scale)
        bias = self._weights[f"{name}.bias"] * np.float32(scale)
        return self._op("Add", self._op("MatMul", value, self._constant(weight)), self._constant(bias))

    def _norm(self, value: str, name: str) -> str:
        scale, shift = self._weight(f"{name}.weight"), self._weight(f"{name}.bias")
        return self._op("LayerNormalization", value, scale, shift, axis=-1, epsilon=self._sizes.epsilon)

    def _activated(self, value: str, function: str) -> str:
        if function == "relu":
            return self._op("Relu", value)
        half = self._op("Mul", value, self._constant(np.float32(0.5)))
        if function == "gelu":
            risen = self._op("Erf", self._op("Mul", value, self._constant(np.float32(2**-0.5))))
        elif function in ("gelu_new", "gelu_pytorch_tanh"):
            cube = self._op("Mul", self._op("Mul", value, value), value)
            inner = self._op("Add", value, self._op("Mul", cube, self._constant(np.float32(0.044715))))
            risen = self._op("Tanh", self._op("Mul", inner, self._constant(np.float32((2 / np.pi) ** 0.5))))
        else:
            raise _refused(f"its activation {function!r} is not known here")
        return self._op("Mul", half, self._op("Add", risen, self._constant(np.float32(1))))

    def _weight(self, name: str) -> str:
        return self._constant(self._weights[name])

    def _constant(self, value: Any) -> str:
        self._count += 1
        name = f"c{self._count}"
        array = np.asarray(value)
        self._constants.append(self._numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def _op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        self._count += 1
        name = f"v{self._count}"
        self._nodes.append(self._helper.make_node(kind, list(inputs), [name], **attributes))
        return name


_BERT = {
    "layer": "encoder.layer.{}.",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "joined": "attention.output.dense",
    "first_norm": "attention.output.LayerNorm",
    "wide": "intermediate.dense",
    "narrow": "output.dense",
    "second_norm": "output.LayerNorm",
}
_DISTIL = {
    "layer": "transformer.layer.{}.",
    "query": "attention.q_lin",
    "key": "attention.k_lin",
    "value": "attention.v_lin",
    "joined": "attention.out_lin",
    "first_norm": "sa_layer_norm",
    "wide": "ffn.lin1",
    "narrow": "ffn.lin2",
    "second_norm": "output_layer_norm",
}


def _refused(what: str) -> StartError:
    return StartError("model_load_failed", f"these weights cannot be served: {what}", EXPORT_HINT)
