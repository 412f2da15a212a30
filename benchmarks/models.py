"""Models of any size that are what they say: a small ONNX graph whose one big tensor lies in a file beside it."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from registry.digest import canonical_json

GRAPH, WEIGHTS = "model.onnx", "weights.bin"
_BLOCK = 16 << 20


def write_weights(file: Path, size: int, first: bytes = b"") -> str:
    """`size` bytes, a random block again and again, none of them a hole; `first` makes the content another. The
    SHA-256, in hex."""
    block = os.urandom(min(size, _BLOCK))
    total = hashlib.sha256()
    with file.open("wb", buffering=0) as out:
        left = size
        piece = (first + block)[: len(block)]
        while left:
            piece = piece[:left]
            out.write(piece)
            total.update(piece)
            left -= len(piece)
            piece = block
    return total.hexdigest()


def graph(size: int) -> bytes:
    """An ONNX model with a tensor of `size` bytes (a multiple of 4) in WEIGHTS; it gives back its input."""
    from onnx import TensorProto, helper

    tensor = TensorProto(name="weights", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.dims.append(size // 4)
    for key, value in {"location": WEIGHTS, "offset": "0", "length": str(size)}.items():
        tensor.external_data.add(key=key, value=value)
    made = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])],
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [tensor],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def big_onnx(folder: Path, size: int) -> Path:
    """A model folder (docs/design.md §4) of about `size` bytes."""
    files = folder / "files"
    files.mkdir(parents=True)
    data = graph(size)
    (files / GRAPH).write_bytes(data)
    listed = [
        {"path": GRAPH, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()},
        {"path": WEIGHTS, "size": size, "sha256": write_weights(files / WEIGHTS, size)},
    ]
    manifest = {
        "schema": "ekiben.manifest.v1",
        "kind": "onnx",
        "format": "onnx",
        "files": listed,
        "sample": None,
        "expected": None,
        "requirements": None,
        "python": None,
    }
    (folder / "manifest.json").write_bytes(canonical_json(manifest))
    return folder


def manifest_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
    return found
