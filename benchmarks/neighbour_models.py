"""Models of which many do not answer row by row: for the figure of benchmarks/neighbours.py and its tests.

Each is made from a seed, with rows and what the model itself answers to one of them alone.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS = 5
_WIDTH = 4


@dataclass(frozen=True)
class Case:
    """`alone` gives the outputs of the model for one row, whole; it raises where the model does not take the row."""

    name: str
    kind: str
    format: str
    files: Mapping[str, bytes]
    rows: Sequence[Any]
    alone: Callable[[Any], list[Any]]


# --- ONNX --------------------------------------------------------------------------------------------------------


class _Graph:
    """Collects nodes; each call gives the name of its first output."""

    def __init__(self) -> None:
        from onnx import helper

        self.helper = helper
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def __call__(self, operator: str, *inputs: Any, outputs: Sequence[str] = (), **attributes: Any) -> str:
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        given = list(outputs) or [f"v{len(self.nodes)}"]
        self.nodes.append(self.helper.make_node(operator, names, given, **attributes))
        return given[0]

    def constant(self, value: Any) -> str:
        from onnx import numpy_helper

        array = np.asarray(value)
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name


Shape = Sequence[Any] | None
Build = Callable[[_Graph, "np.random.Generator"], str | tuple[str, ...]]


def _matrix(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.normal(size=shape).astype(np.float32)


def _onnx(
    name: str,
    rng: np.random.Generator,
    build: Build,
    gives: Sequence[Shape | str],
    takes: Shape = ("N", _WIDTH),
    rows: Sequence[Any] | None = None,
    opset: int = 17,
    scalar: bool = False,
) -> Case:
    import onnxruntime
    from onnx import TensorProto, helper

    graph = _Graph()
    built = build(graph, rng)
    names = [built] if isinstance(built, str) else list(built)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, takes)]
    if scalar:
        inputs.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, []))
    outputs = []
    for at, shape in enumerate(gives):
        kind = TensorProto.FLOAT
        if shape == "sequence":
            inner = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
            outputs.append(helper.make_value_info(names[at], helper.make_sequence_type_proto(inner)))
            continue
        if isinstance(shape, tuple) and shape and shape[0] == "int":
            kind, shape = TensorProto.INT64, shape[1:]
        outputs.append(helper.make_tensor_value_info(names[at], kind, shape))
    proto = helper.make_graph(graph.nodes, "g", inputs, outputs, graph.constants)
    model = helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    )
    model.ir_version = 9
    data = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    def alone(row: Any) -> list[Any]:
        value = row["x"] if scalar else row
        feed = {"x": np.asarray([[float("nan") if v is None else v for v in np.ravel(value)]], np.float32)}
        feed["x"] = feed["x"].reshape(1, *np.shape(value))
        if scalar:
            feed["t"] = np.asarray(row["t"], np.float32)
        found: list[Any] = session.run(None, feed)
        return found

    if rows is None:
        shape = [size if isinstance(size, int) else _WIDTH for size in (takes or ("N", _WIDTH))[1:]]
        rows = [np.round(rng.normal(size=shape), 3).tolist() for _ in range(_ROWS)]
        if scalar:
            rows = [{"x": row, "t": float(at)} for at, row in enumerate(rows)]
    return Case(name, "onnx", "onnx", {"model.onnx": data}, rows, alone)


def _found(graph: _Graph) -> str:
    """Where a value is above a bound: as many as there are."""
    return graph("Transpose", graph("NonZero", graph("Greater", "x", 0.5)), outputs=["found"], perm=[1, 0])


def _normalised(graph: _Graph, axis: int) -> str:
    centred = graph("Sub", "x", graph("ReduceMean", "x", axes=[axis], keepdims=1))
    spread = graph("ReduceMean", graph("Mul", centred, centred), axes=[axis], keepdims=1)
    return graph("Div", centred, graph("Sqrt", graph("Add", spread, 0.1)))


def _count(graph: _Graph) -> str:
    return graph("Gather", graph("Shape", "x"), np.int64(0))


def _mlp(graph: _Graph, rng: np.random.Generator) -> str:
    hidden = graph("Relu", graph("Gemm", "x", _matrix(rng, _WIDTH, 8), _matrix(rng, 8)))
    return graph("Softmax", graph("MatMul", hidden, _matrix(rng, 8, 3)), axis=1)


def _attention(graph: _Graph, rng: np.random.Generator) -> str:
    count = graph("Unsqueeze", _count(graph), np.array([0]))
    shape = graph("Concat", count, np.array([2, 2]), axis=0)
    parts = graph("Reshape", "x", shape)
    scores = graph("Softmax", graph("MatMul", parts, graph("Transpose", parts, perm=[0, 2, 1])), axis=-1)
    return graph("Reshape", graph("MatMul", scores, parts), np.array([0, -1]))


def _lstm(graph: _Graph, rng: np.random.Generator) -> str:
    turned = graph("Transpose", "x", perm=[1, 0, 2])
    weights, memory = _matrix(rng, 1, 12, 2), _matrix(rng, 1, 12, 3)
    graph("LSTM", turned, weights, memory, outputs=["all", "last"], hidden_size=3)
    return graph("Squeeze", "last", np.array([0]))


def _rolled(graph: _Graph) -> str:
    first = graph("Slice", "x", np.array([0]), np.array([1]), np.array([0]))
    rest = graph("Slice", "x", np.array([1]), np.array([2**31]), np.array([0]))
    return graph("Concat", rest, first, axis=0)


def _numbered(graph: _Graph) -> str:
    numbers = graph("Range", np.int64(0), _count(graph), np.int64(1))
    return graph("Add", "x", graph("Unsqueeze", graph("Cast", numbers, to=1), np.array([1])))


def _trained_norm(graph: _Graph) -> str:
    ones, zeros = np.ones(_WIDTH), np.zeros(_WIDTH)
    outputs = ["normed", "mean", "var"]
    return graph("BatchNormalization", "x", ones, zeros, zeros, ones, outputs=outputs, training_mode=1)


def _norm(graph: _Graph, rng: np.random.Generator) -> str:
    values = [_matrix(rng, _WIDTH) for _ in range(3)]
    return graph("BatchNormalization", "x", *values, np.abs(_matrix(rng, _WIDTH)) + 0.1)


def _by_size(graph: _Graph) -> str:
    from onnx import TensorProto, helper

    def branch(factor: float) -> Any:
        output = f"b{int(factor)}"
        made = helper.make_tensor("f", TensorProto.FLOAT, [], [factor])
        nodes = [
            helper.make_node("Constant", [], [f"{output}f"], value=made),
            helper.make_node("Mul", ["x", f"{output}f"], [output]),
        ]
        return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)])

    many = graph("Greater", _count(graph), np.int64(2))
    return graph("If", many, then_branch=branch(2.0), else_branch=branch(1.0))


def _top_of_all(graph: _Graph) -> str:
    graph("TopK", "x", graph("Unsqueeze", _count(graph), np.array([0])), outputs=["sorted", "places"], axis=0)
    return "sorted"


def _best(graph: _Graph) -> tuple[str, ...]:
    graph("TopK", "x", np.array([2]), outputs=["best", "places"], axis=1)
    return "best", "places"


def _unique(graph: _Graph) -> str:
    return graph("Unique", "x", axis=0)


def _quantised(graph: _Graph, rng: np.random.Generator) -> str:
    graph("DynamicQuantizeLinear", "x", outputs=["q", "scale", "point"])
    weights = rng.integers(-100, 100, (_WIDTH, 3)).astype(np.int8)
    product = graph("Cast", graph("MatMulInteger", "q", weights, "point"), to=1)
    return graph("Mul", product, "scale")


def _trees(graph: _Graph) -> str:
    return graph(
        "TreeEnsembleRegressor", "x", domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2],
        nodes_featureids=[0, 0, 0], nodes_modes=["BRANCH_LT", "LEAF", "LEAF"], nodes_values=[0.5, 0.0, 0.0],
        nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0], nodes_missing_value_tracks_true=[1, 0, 0],
        target_treeids=[0, 0], target_nodeids=[1, 2], target_ids=[0, 0], target_weights=[10.0, 20.0],
    )  # fmt: skip


def _onnx_cases() -> dict[str, Callable[[np.random.Generator], Case]]:
    row, n = ("N", _WIDTH), "N"
    simple: dict[str, tuple[Build, Sequence[Shape | str]]] = {
        "mlp": (_mlp, [("N", 3)]),
        "mlp unnamed": (_mlp, [(None, 3)]),
        "norm": (_norm, [row]),
        "norm in training": (lambda g, r: _trained_norm(g), [row]),
        "normalised over the rows": (lambda g, r: _normalised(g, 0), [row]),
        "normalised over the columns": (lambda g, r: _normalised(g, 1), [row]),
        "softmax over the rows": (lambda g, r: g("Softmax", "x", axis=0), [row]),
        "softmax of old, over all": (lambda g, r: g("Softmax", g("Reshape", "x", np.array([1, -1]))), [(1, "M")]),
        "cumulated": (lambda g, r: g("CumSum", "x", np.int64(0)), [row]),
        "less the first": (lambda g, r: g("Sub", "x", g("Gather", "x", np.array([0]), axis=0)), [row]),
        "by their number": (lambda g, r: g("Div", "x", g("Cast", _count(g), to=1)), [row]),
        "by their size": (lambda g, r: _by_size(g), [row]),
        "numbered": (lambda g, r: _numbered(g), [row]),
        "over the largest": (lambda g, r: g("Div", "x", g("ReduceMax", g("Abs", "x"), keepdims=0)), [row]),
        "a rare signal": (
            lambda g, r: g("Add", "x", g("Cast", g("Greater", g("ReduceMax", "x", keepdims=0), 1e9), to=1)),
            [row],
        ),
        "sorted": (lambda g, r: _top_of_all(g), [row]),
        "reversed": (
            lambda g, r: g("Slice", "x", np.array([-1]), np.array([-(2**31)]), np.array([0]), np.array([-1])),
            [row],
        ),
        "rolled": (lambda g, r: _rolled(g), [row]),
        "boxes": (lambda g, r: _found(g), [("int", "boxes", 2)]),
        "boxes under a wrong name": (lambda g, r: _found(g), [("int", n, 2)]),
        "boxes unnamed": (lambda g, r: _found(g), [("int", None, 2)]),
        "turned": (lambda g, r: g("Transpose", "x", perm=[1, 0]), [(_WIDTH, "N")]),
        "each with each": (lambda g, r: g("MatMul", "x", g("Transpose", "x", perm=[1, 0])), [("N", "N")]),
        "mean of all": (lambda g, r: g("ReduceMean", "x", axes=[0], keepdims=1), [(1, _WIDTH)]),
        "mean of all, flat": (lambda g, r: g("ReduceMean", "x", axes=[0], keepdims=0), [(_WIDTH,)]),
        "mean of each": (lambda g, r: g("ReduceMean", "x", axes=[1], keepdims=0), [("N",)]),
        "the largest of all": (lambda g, r: g("ArgMax", "x", axis=0, keepdims=0), [("int", _WIDTH)]),
        "one of all": (lambda g, r: g("ReduceSum", "x", keepdims=0), [()]),
        "best columns": (lambda g, r: _best(g), [("N", 2), ("int", "N", 2)]),
        "a value and boxes": (lambda g, r: (g("Neg", "x"), _found(g)), [row, ("int", "boxes", 2)]),
        "different rows": (lambda g, r: _unique(g), [("M", _WIDTH)]),
        "chosen rows": (
            lambda g, r: g("Compress", "x", g("Greater", g("ReduceMax", "x", axes=[1], keepdims=0), 0.5), axis=0),
            [("M", _WIDTH)],
        ),
        "a sequence": (lambda g, r: g("SplitToSequence", "x", axis=0), ["sequence"]),
        "quantised": (_quantised, [("N", 3)]),
        "attention": (_attention, [("N", "C")]),
        "mixed by a reshape": (
            lambda g, r: g(
                "Reshape", g("Softmax", g("Reshape", "x", np.array([1, -1])), axis=1), np.array([-1, _WIDTH])
            ),
            [row],
        ),
        "trees": (lambda g, r: _trees(g), [("N", 1)]),
    }  # fmt: skip
    made: dict[str, Callable[[np.random.Generator], Case]] = {
        name: (lambda rng, name=name, build=build, gives=gives: _onnx(name, rng, build, gives))
        for name, (build, gives) in simple.items()
    }
    one = (1, _WIDTH)
    made |= {
        "one row a call": lambda r: _onnx("one row a call", r, _norm, [one], takes=one),
        "boxes, one row a call": lambda r: _onnx(
            "boxes, one row a call", r, lambda g, _: _found(g), [("int", "boxes", 2)], takes=one
        ),
        "turned, of any width": lambda r: _onnx(
            "turned, of any width", r, lambda g, _: g("Transpose", "x", perm=[1, 0]), [("K", "N")], takes=("N", "K")
        ),
        "turned, as wide as rows": lambda r: _onnx(
            "turned, as wide as rows", r, lambda g, _: g("Transpose", "x", perm=[1, 0]), [(None, None)],
            takes=(None, None), rows=[[1.0, 2.0], [3.0, 4.0]],
        ),
        "time first": lambda r: _onnx(
            "time first", r, lambda g, _: g("Transpose", "x", perm=[1, 0, 2]), [(3, "N", 2)], takes=("N", 3, 2)
        ),
        "time first within": lambda r: _onnx("time first within", r, _lstm, [("N", 3)], takes=("N", 3, 2)),
        "numbers": lambda r: _onnx("numbers", r, lambda g, _: g("Neg", "x"), [("N",)], takes=("N",)),
        "unranked": lambda r: _onnx(
            "unranked", r, lambda g, _: g("Neg", "x"), [None], takes=None, rows=[[1.0, 2.0], [3.0, 4.0]]
        ),
        "a scalar beside": lambda r: _onnx(
            "a scalar beside", r, lambda g, _: g("Mul", "x", "t"), [row], scalar=True
        ),
        "missing values": lambda r: _onnx(
            "missing values", r, lambda g, _: _trees(g), [("N", 1)],
            rows=[[None, 0, 0, 0], [0.0, 0, 0, 0], [1.0, 0, 0, 0]],
        ),
    }  # fmt: skip
    return made


# --- scikit-learn ------------------------------------------------------------------------------------------------


def _sklearn(name: str, rng: np.random.Generator, make: Callable[..., Any], **how: Any) -> Case:
    import skops.io

    several, texts, positive = how.get("several", 0), how.get("texts", False), how.get("positive", False)
    data: Any = rng.normal(size=(60, _WIDTH))
    data = np.abs(data) if positive else data
    numbers = data @ rng.normal(size=_WIDTH)
    if several:
        target: Any = np.stack([numbers > cut for cut in np.linspace(-0.5, 0.5, several)], axis=1).astype(int)
    else:
        target = (numbers > 0).astype(int)
    if texts:
        data = [" ".join(rng.choice(["a1", "b2", "c3", "d4"], 5)) for _ in range(60)]
    estimator = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(data, target)
    rows = list(data[:_ROWS]) if texts else np.asarray(data)[:_ROWS].round(3).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "model.skops")
        skops.io.dump(estimator, path)
        files = {"model.skops": path.read_bytes()}

    def alone(row: Any) -> list[Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = estimator.predict([row] if texts else np.asarray([row], float))
        return [found.toarray() if hasattr(found, "toarray") else np.asarray(found)]

    return Case(name, "sklearn", "skops", files, rows, alone)


def _sklearn_cases() -> dict[str, Callable[[np.random.Generator], Case]]:
    from sklearn import (
        cluster,
        compose,
        cross_decomposition,
        decomposition,
        ensemble,
        feature_extraction,
        impute,
        linear_model,
        multiclass,
        multioutput,
        naive_bayes,
        neighbors,
        neural_network,
        pipeline,
        preprocessing,
        svm,
        tree,
    )  # fmt: skip

    def piped(*steps: Any) -> Any:
        return pipeline.make_pipeline(*steps)

    function = preprocessing.FunctionTransformer
    logistic, ridge = linear_model.LogisticRegression, linear_model.Ridge
    makes: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "logistic": (lambda: piped(preprocessing.StandardScaler(), logistic()), {}),
        "ridge of several": (ridge, {"several": 3}),
        "as many outputs as rows": (lambda: multioutput.MultiOutputClassifier(tree.DecisionTreeClassifier()),
                                    {"several": _ROWS}),
        "several labels": (lambda: multiclass.OneVsRestClassifier(logistic()), {"several": 3}),
        "a chain": (lambda: multioutput.ClassifierChain(logistic()), {"several": 3}),
        "a network": (lambda: neural_network.MLPClassifier((5,), max_iter=20), {"several": 2}),
        "a factorisation": (
            lambda: piped(decomposition.NMF(2, init="nndsvda", max_iter=50), ridge()),
            {"positive": True},
        ),
        "clusters": (lambda: cluster.KMeans(3, n_init=1), {}),
        "outliers": (lambda: ensemble.IsolationForest(n_estimators=5), {}),
        "novelty": (lambda: neighbors.LocalOutlierFactor(novelty=True), {}),
        "one class": (svm.OneClassSVM, {}),
        "imputed": (lambda: piped(impute.KNNImputer(), neighbors.KNeighborsClassifier()), {}),
        "logarithms": (lambda: piped(function(np.log1p), ridge()), {"positive": True}),
        "frames": (
            lambda: piped(preprocessing.StandardScaler(), ridge()).set_output(transform="pandas"), {},
        ),
        "partial least squares": (lambda: cross_decomposition.PLSRegression(2), {"several": 2}),
        "columns": (
            lambda: piped(compose.make_column_transformer((preprocessing.StandardScaler(), [0, 1])), logistic()), {},
        ),
        "texts": (
            lambda: piped(feature_extraction.text.TfidfVectorizer(), naive_bayes.MultinomialNB()), {"texts": True},
        ),
    }  # fmt: skip
    return {
        name: (lambda rng, name=name, make=make, how=how: _sklearn(name, rng, make, **how))
        for name, (make, how) in makes.items()
    }


# --- TensorFlow --------------------------------------------------------------------------------------------------


def _tensorflow(
    name: str, rng: np.random.Generator, call: Callable[[Any, Any], Any], takes: Sequence[int | None] = (None, _WIDTH)
) -> Case:
    from bentos.serving.networks import tensorflow

    tf = tensorflow()
    weights = tf.constant(_matrix(rng, _WIDTH, 3))
    module = tf.Module()
    module.weights = tf.Variable(weights)
    module.count = tf.Variable(0.0)
    signature = [tf.TensorSpec(list(takes), tf.float32, name="x")]
    function = tf.function(lambda x: {"y": call(module, x)}, input_signature=signature, autograph=False)
    module.call = function
    with tempfile.TemporaryDirectory() as scratch:
        tf.saved_model.save(module, scratch, signatures={"serving_default": function})
        files = {
            f"saved/{path.relative_to(scratch).as_posix()}": path.read_bytes()
            for path in sorted(Path(scratch).rglob("*"))
            if path.is_file()
        }
    shape = [size or _WIDTH for size in takes[1:]]
    rows = [np.round(rng.normal(size=shape), 3).tolist() for _ in range(_ROWS)]

    def alone(row: Any) -> list[Any]:
        return [function(tf.constant([row], tf.float32))["y"].numpy()]

    return Case(name, "tensorflow", "tensorflow-savedmodel", files, rows, alone)


def _tensorflow_cases() -> dict[str, Callable[[np.random.Generator], Case]]:
    from bentos.serving.networks import tensorflow

    tf = tensorflow()
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "dense": lambda m, x: tf.nn.softmax(x @ m.weights),
        "less the mean": lambda m, x: x - tf.reduce_mean(x, 0, keepdims=True),
        "less the first": lambda m, x: x - x[:1],
        "boxes": lambda m, x: tf.where(x > 0.5),
        "turned": lambda m, x: tf.transpose(x),
        "reversed": lambda m, x: tf.reverse(x, [0]),
        "cumulated": lambda m, x: tf.cumsum(x, 0),
        "chosen rows": lambda m, x: tf.boolean_mask(x, tf.reduce_max(x, 1) > 0.5),
        "by their number": lambda m, x: x / tf.cast(tf.shape(x)[0], tf.float32),
        "a rare signal": lambda m, x: x + tf.cast(tf.reduce_any(x > 1e9), tf.float32),
        "each with each": lambda m, x: x @ tf.transpose(x),
        "mixed by a reshape": lambda m, x: tf.reshape(tf.nn.softmax(tf.reshape(x, [1, -1])), [-1, _WIDTH]),
        "one of all": lambda m, x: tf.reduce_sum(x),
        "remembered": lambda m, x: x + m.count.assign_add(1.0),
    }
    return {name: (lambda rng, name=name, call=call: _tensorflow(name, rng, call)) for name, call in calls.items()} | {
        "time first": lambda rng: _tensorflow("time first", rng, lambda m, x: tf.transpose(x, [1, 0, 2]), (None, 3, 2))
    }


def families(kind: str) -> dict[str, Callable[[np.random.Generator], Case]]:
    """By name, what makes a model of a kind from a generator of numbers."""
    return {"onnx": _onnx_cases, "sklearn": _sklearn_cases, "tensorflow": _tensorflow_cases}[kind]()


def cases(count: int, seed: int = 0) -> Iterator[Case]:
    """That many models, the families of all kinds in turn."""
    made = [(kind, name, make) for kind in ("onnx", "sklearn", "tensorflow") for name, make in families(kind).items()]
    for number in range(count):
        _, _, make = made[number % len(made)]
        yield make(np.random.default_rng([seed, number]))
