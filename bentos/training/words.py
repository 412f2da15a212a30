"""Small real text networks, made in a second without a network: word vectors, their mean, and a layer on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def tokenizer(texts: Sequence[str]) -> Any:
    """A word-level tokenizer that knows the words of these texts. Numbers 0 and 1 are padding and unknown words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    known = {"[PAD]": 0, "[UNK]": 1}
    for word in sorted({word for text in texts for word in text.lower().split()}):
        known[word] = len(known)
    made = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def counts(words: Any, texts: Sequence[str]) -> Floats:
    """The share of each word in each text, [texts, words]."""
    found = np.zeros((len(texts), words.get_vocab_size()), np.float32)
    for row, text in enumerate(texts):
        ids = words.encode(text).ids
        np.add.at(found[row], ids, 1.0 / max(1, len(ids)))
    return found


def network(table: Floats, weight: Floats | None = None) -> bytes:
    """ONNX: the mean of the vectors of the words where the mask is 1; with `weight` times it, as `logits`."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node
    mean = "sentence_embedding" if weight is None else "mean"
    constants = {"table": table, "last": np.array([2]), "tokens": np.array([1])}
    nodes = [
        node("Gather", ["table", "input_ids"], ["vectors"]),
        node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["mask", "last"], ["column"]),
        node("Mul", ["vectors", "column"], ["present"]),
        node("ReduceSum", ["present", "tokens"], ["total"], keepdims=0),
        node("ReduceSum", ["column", "tokens"], ["count"], keepdims=0),
        node("Div", ["total", "count"], [mean]),
    ]
    width = table.shape[1]
    if weight is not None:
        constants["weight"], width = weight, weight.shape[1]
        nodes.append(node("MatMul", ["mean", "weight"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "words",
        [helper.make_tensor_value_info(n, TensorProto.INT64, ["n", "tokens"]) for n in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, ["n", width])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9  # what older runtimes read too
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def folder(words: Any, onnx: bytes, longest: int, config: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a Hugging Face folder by their paths."""
    body = {"model_type": "words", "max_position_embeddings": longest, "pad_token_id": 0, **config}
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, "pad_token": "[PAD]"}
    return {
        "config.json": json.dumps(body, indent=1).encode(),
        "tokenizer.json": words.to_str().encode(),
        "tokenizer_config.json": json.dumps(told, indent=1).encode(),
        "model.onnx": onnx,
    }
