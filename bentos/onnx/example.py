"""`python -m bentos.onnx.example DIR`: a small network with its sample and expected values, in seconds."""

from __future__ import annotations

import sys
from pathlib import Path

from bentos.serving import ModelFolder, write_model


def write(root: Path, seed: int = 0) -> ModelFolder:
    """Fit which quarter of the plane a point is in, with one hidden layer and plain gradient steps in NumPy."""
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(seed)
    points = rng.uniform(-1, 1, (2000, 2)).astype(np.float32)
    quarter = (points[:, 0] > 0).astype(int) + 2 * (points[:, 1] > 0).astype(int)
    target = np.eye(4, dtype=np.float32)[quarter]
    w1, b1 = rng.normal(0, 1, (2, 16)).astype(np.float32), np.zeros(16, np.float32)
    w2, b2 = rng.normal(0, 0.3, (16, 4)).astype(np.float32), np.zeros(4, np.float32)
    for _ in range(400):
        hidden = np.tanh(points @ w1 + b1)
        scores = hidden @ w2 + b2
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        slope = (odds / odds.sum(axis=1, keepdims=True) - target) / len(points)
        back = (slope @ w2.T) * (1 - hidden**2)
        w2 -= 5 * hidden.T @ slope
        b2 -= 5 * slope.sum(axis=0)
        w1 -= 5 * points.T @ back
        b1 -= 5 * back.sum(axis=0)
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["point", "w1", "b1"], ["h"]),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("Gemm", ["t", "w2", "b2"], ["s"]),
            helper.make_node("Softmax", ["s"], ["quarter"]),
        ],
        "quarters",
        [helper.make_tensor_value_info("point", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("quarter", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(a, n) for a, n in ((w1, "w1"), (b1, "b1"), (w2, "w2"), (b2, "b2"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9  # what older runtimes read too
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    head = points[:5]
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    expected = {"outputs": session.run(None, {"point": head})[0].tolist()}
    return write_model(
        root,
        kind="onnx",
        format="onnx",
        files={"quarters.onnx": data},
        sample={"inputs": head.tolist()},
        expected=expected,
    )


if __name__ == "__main__":
    print(write(Path(sys.argv[1] if len(sys.argv) > 1 else "model")).root)
