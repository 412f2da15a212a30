"""The kind onnx beside ONNX Runtime itself, on graphs made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from bentos.formats.onnx import Model
from bentos.serving import Problem, StartError, write_model


def _graph(nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: list[Any] | None = None) -> Any:
    infos = [[helper.make_tensor_value_info(*i) for i in part] for part in (inputs, outputs)]
    graph = helper.make_graph(nodes, "g", *infos, constants or [])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 9
    return model


def _model(tmp_path: Path, graph: Any) -> Model:
    data = graph if isinstance(graph, bytes) else graph.SerializeToString()
    return Model(write_model(tmp_path / "m", kind="onnx", format="onnx", files={"m.onnx": data}))


def _refused(model: Model, row: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        model.outputs([row])
    return raised.value


def test_a_table_of_named_columns_of_several_types(tmp_path: Path) -> None:
    node = helper.make_node
    graph = _graph(
        [
            node("Cast", ["age"], ["a"], to=TensorProto.FLOAT),
            node("Add", ["a", "pay"], ["sum"]),
            node("Identity", ["plan"], ["same"]),
        ],
        [
            ("age", TensorProto.INT64, [None, 1]),
            ("pay", TensorProto.FLOAT, [None, 1]),
            ("plan", TensorProto.STRING, [None, 1]),
        ],
        [("sum", TensorProto.FLOAT, [None, 1]), ("same", TensorProto.STRING, [None, 1])],
    )
    model = _model(tmp_path, graph)
    row = {"age": 31, "pay": 0.5, "plan": "프로"}
    truth = {"sum": [31.5], "same": ["프로"]}
    assert model.outputs([row, [31, 0.5, "프로"], {"age": [31.0], "pay": [0.5], "plan": ["프로"]}]) == [truth] * 3
    assert _refused(model, {**row, "age": 31.5}).field == "inputs[0].age[0]"
    assert _refused(model, {**row, "age": 2**63}).code == "wrong_type"
    assert _refused(model, {**row, "plan": 3}).field == "inputs[0].plan[0]"
    assert _refused(model, {**row, "pay": "1"}).code == "wrong_type"
    assert _refused(model, {"age": 1, "pay": 1}).field == "inputs[0].plan"
    assert _refused(model, {**row, "more": 1}).code == "unknown_column"
    assert _refused(model, [1, 2]).code == "wrong_width"


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "uint64", "bool"])
def test_every_number_type_is_converted_and_bounded(tmp_path: Path, kind: str) -> None:
    code = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = _graph([helper.make_node("Identity", ["x"], ["y"])], [("x", code, [None, 2])], [("y", code, [None, 2])])
    model = _model(tmp_path, graph)
    row = [True, False] if kind == "bool" else [1, 0]
    assert model.outputs([row, row]) == [row, row]
    too_much = {"float16": 1e5, "float32": 1e39, "bool": 2}.get(kind, 1e999 if kind == "float64" else 2**70)
    assert _refused(model, [row[0], too_much]).field == "inputs[0][1]"


def test_pictures_keep_their_shape(tmp_path: Path) -> None:
    graph = _graph(
        [helper.make_node("ReduceMean", ["picture"], ["mean"], axes=[1, 2, 3], keepdims=0)],
        [("picture", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [("mean", TensorProto.FLOAT, ["n"])],
    )
    model = _model(tmp_path, graph)
    pictures = np.random.default_rng(0).random((2, 3, 4, 4)).astype(np.float32)
    truth = onnxruntime.InferenceSession(graph.SerializeToString()).run(None, {"picture": pictures})[0]
    assert model.outputs(pictures.tolist()) == truth.tolist()
    ragged = pictures[0].tolist()
    ragged[2][1] = [0.0]
    problem = _refused(model, ragged)
    assert (problem.code, problem.field) == ("wrong_width", "inputs[0][2][1]")


def test_labels_and_maps_of_probabilities_become_json(tmp_path: Path) -> None:
    weights = [1.0, -1.0]
    graph = _graph(
        [
            helper.make_node(
                "LinearClassifier",
                ["x"],
                ["label", "raw"],
                domain="ai.onnx.ml",
                coefficients=[-w for w in weights] + weights,
                intercepts=[0.0, 0.0],
                classlabels_strings=["no", "yes"],
                post_transform="SOFTMAX",
            ),
            helper.make_node("ZipMap", ["raw"], ["odds"], domain="ai.onnx.ml", classlabels_strings=["no", "yes"]),
        ],
        [("x", TensorProto.FLOAT, [None, 2])],
        [("label", TensorProto.STRING, [None])],
    )
    maps = helper.make_sequence_type_proto(
        helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    )
    graph.graph.output.append(helper.make_value_info("odds", maps))
    model = _model(tmp_path, graph)
    outputs = model.outputs([[2.0, 0.0], [0.0, 2.0]])
    assert [o["label"] for o in outputs] == ["yes", "no"]
    assert [sorted(o["odds"]) for o in outputs] == [["no", "yes"]] * 2
    assert outputs[0]["odds"]["yes"] == pytest.approx(0.982, abs=1e-3)
    assert model.about.classes == ["no", "yes"]


def test_a_fixed_batch_of_one_is_asked_row_by_row(tmp_path: Path) -> None:
    graph = _graph(
        [helper.make_node("Neg", ["x"], ["y"])],
        [("x", TensorProto.FLOAT, [1, 2])],
        [("y", TensorProto.FLOAT, [1, 2])],
    )
    assert _model(tmp_path, graph).outputs([[1, 2], [3, 4]]) == [[-1, -2], [-3, -4]]
    graph.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8
    graph.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 8
    with pytest.raises(StartError, match="exactly 8 rows"):
        _model(tmp_path, graph)


def test_an_index_that_the_model_does_not_know_is_refused(tmp_path: Path) -> None:
    table = numpy_helper.from_array(np.eye(3, dtype=np.float32), "table")
    graph = _graph(
        [helper.make_node("Gather", ["table", "word"], ["vector"])],
        [("word", TensorProto.INT64, [None])],
        [("vector", TensorProto.FLOAT, [None, 3])],
        [table],
    )
    model = _model(tmp_path, graph)
    assert model.outputs([0, 2]) == [[1, 0, 0], [0, 0, 1]]
    assert _refused(model, 7).code == "prediction_refused"


def test_external_data_is_read_from_the_same_folder(tmp_path: Path) -> None:
    weights = np.arange(4096, dtype=np.float32).reshape(2, 2048)
    graph = _graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", TensorProto.FLOAT, [None, 2])],
        [("y", TensorProto.FLOAT, [None, 2048])],
        [numpy_helper.from_array(weights, "w")],
    )
    onnx.save_model(graph, tmp_path / "big.onnx", save_as_external_data=True, location="big.bin", size_threshold=0)
    files = {"big.onnx": tmp_path / "big.onnx", "big.bin": tmp_path / "big.bin"}
    model = Model(write_model(tmp_path / "m", kind="onnx", format="onnx", files=files))
    assert model.outputs([[0, 1]]) == [weights[1].tolist()]


def test_the_file_that_the_manifest_names_is_loaded_whatever_it_is_called(tmp_path: Path) -> None:
    def adds(value: float) -> bytes:
        constant = numpy_helper.from_array(np.array([value], np.float32), "c")
        node = helper.make_node("Add", ["x", "c"], ["y"])
        ends = [("x", TensorProto.FLOAT, [None, 1])], [("y", TensorProto.FLOAT, [None, 1])]
        return bytes(_graph([node], *ends, [constant]).SerializeToString())

    files = {"a.bin": adds(1), "evil.onnx": adds(2)}
    named = write_model(tmp_path / "m", kind="onnx", format="onnx", files=files, model="a.bin")
    assert Model(named).outputs([[0]]) == [[1]]
    # versions from before the manifest said so: the only one that it can be, or none
    old = write_model(tmp_path / "n", kind="onnx", format="onnx", files={**files, "evil.ONNX": adds(3)})
    with pytest.raises(StartError, match=r"2 of them could be its onnx model: evil\.ONNX, evil\.onnx"):
        Model(old)
    old = write_model(tmp_path / "o", kind="onnx", format="onnx", files={"b.bin": b"data", "b.onnx": adds(2)})
    assert old.model is None
    assert Model(old).outputs([[0]]) == [[2]]


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x09\x12\x00"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(StartError) as raised:
        _model(tmp_path, data)
    assert raised.value.code == "model_load_failed"
    assert "m.onnx" in raised.value.message


def test_a_file_is_read_as_onnx_whatever_its_name_says(tmp_path: Path) -> None:
    """ONNX Runtime would take .ort for its own format, which no upload was checked as."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10, producer_name="ORTM")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    folder = write_model(tmp_path / "m", kind="onnx", format="onnx", files={"m.ort": tmp_path / "m.onnx"})
    assert Model(folder).outputs([[1, -1]]) == [[1.0, 0.0]]


def _found() -> list[Any]:
    """Where a value is above a half: as many places as there are."""
    node = helper.make_node
    return [
        node("Greater", ["x", "bound"], ["above"]),
        node("NonZero", ["above"], ["places"]),
        node("Transpose", ["places"], ["found"], perm=[1, 0]),
    ]


def _detector(rows: int | str) -> Any:
    inputs = [("x", TensorProto.FLOAT, [rows, 4])]
    outputs = [("found", TensorProto.INT64, ["boxes", 2])]
    return _graph(_found(), inputs, outputs, [numpy_helper.from_array(np.float32(0.5), "bound")])


@pytest.mark.parametrize("rows", [1, "N"])
def test_what_a_detector_finds_in_a_row_is_one_list(tmp_path: Path, rows: int | str) -> None:
    """The nesting changed with the number of finds, and rows answered with the finds of others."""
    model = _model(tmp_path, _detector(rows))
    assert model.about.details["rows_share_a_call"] == "row"
    for row, found in [([0, 0, 0, 0], []), ([0, 0, 0, 1], [[0, 3]]), ([1, 0, 0, 1], [[0, 0], [0, 3]])]:
        assert model.outputs([row]) == [found]
    assert model.outputs([[1, 0, 0, 1], [0, 0, 0, 0]]) == [[[0, 0], [0, 3]], []]


@pytest.mark.parametrize("names", [("N", "K"), (None, None)])
def test_a_first_axis_that_is_not_the_rows_is_no_answer_to_them(tmp_path: Path, names: tuple[Any, Any]) -> None:
    graph = _graph(
        [helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])],
        [("x", TensorProto.FLOAT, list(names))],
        [("y", TensorProto.FLOAT, list(names[::-1]))],
    )
    model = _model(tmp_path, graph)
    assert model.outputs([[1, 2], [3, 4]]) == [[[1], [2]], [[3], [4]]]  # two columns by chance, like the rows
    assert model.outputs([[1, 2, 3], [4, 5, 6]]) == [[[1], [2], [3]], [[4], [5], [6]]]


def _trees(missing: int) -> Any:
    node = helper.make_node(
        "TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml", n_targets=1,
        nodes_treeids=[0, 0, 0], nodes_nodeids=[0, 1, 2], nodes_featureids=[0, 0, 0], nodes_values=[0.5, 0.0, 0.0],
        nodes_modes=["BRANCH_LT", "LEAF", "LEAF"], nodes_truenodeids=[1, 0, 0], nodes_falsenodeids=[2, 0, 0],
        nodes_missing_value_tracks_true=[missing, 0, 0], target_treeids=[0, 0], target_nodeids=[1, 2],
        target_ids=[0, 0], target_weights=[10.0, 20.0],
    )  # fmt: skip
    return _graph([node], [("x", TensorProto.FLOAT, ["N", 2])], [("y", TensorProto.FLOAT, ["N", 1])])


def test_a_missing_value_goes_where_trees_send_it(tmp_path: Path) -> None:
    model = _model(tmp_path, _trees(missing=1))
    assert model.outputs([[None, 0], [float("nan"), 0], [0.9, None]]) == [[10], [10], [20]]
    assert model.tensors.row_schema()["anyOf"][0]["items"] == {"type": ["number", "null"]}
    assert model.about.details["rows_share_a_call"] == "request"
    assert _refused(_model(tmp_path / "none", _trees(missing=0)), [None, 0]).code == "wrong_type"


def test_a_scalar_beside_the_rows_comes_with_each_row(tmp_path: Path) -> None:
    def graph(shape: list[Any]) -> Any:
        inputs = [("x", TensorProto.FLOAT, shape), ("t", TensorProto.FLOAT, [])]
        return _graph([helper.make_node("Mul", ["x", "t"], ["y"])], inputs, [("y", TensorProto.FLOAT, shape)])

    model = _model(tmp_path, graph(["N", 2]))
    assert model.outputs([{"x": [1, 2], "t": 3}, {"x": [1, 2], "t": 4}]) == [[3, 6], [4, 8]]
    model = _model(tmp_path / "one", graph(["N"]))
    assert model.outputs([{"x": 1, "t": 3}, {"x": 2, "t": 3}]) == [3, 6]
    problem = _refused(model, {"x": [1, 2], "t": 3})
    assert (problem.code, problem.field) == ("wrong_type", "inputs[0].x")
    assert "every row has its own t" in (problem.hint or "")


def test_an_input_of_any_shape_is_no_scalar(tmp_path: Path) -> None:
    graph = _graph(
        [helper.make_node("Neg", ["x"], ["y"])], [("x", TensorProto.FLOAT, None)], [("y", TensorProto.FLOAT, None)]
    )
    model = _model(tmp_path, graph)
    assert model.outputs([[1, 2]]) == [[-1, -2]]
    assert model.outputs([3, [[4]]]) == [-3, [[-4]]]


def test_a_sequence_is_the_answer_to_one_row(tmp_path: Path) -> None:
    graph = _graph(
        [helper.make_node("SplitToSequence", ["x"], ["parts"], axis=1)], [("x", TensorProto.FLOAT, ["N", 2])], []
    )
    tensors = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph.graph.output.append(helper.make_value_info("parts", tensors))
    assert _model(tmp_path, graph).outputs([[1, 2], [3, 4]]) == [[[[1]], [[2]]], [[[3]], [[4]]]]


def test_a_network_that_draws_at_random_is_asked_row_by_row_and_says_so(tmp_path: Path) -> None:
    graph = _graph(
        [helper.make_node("RandomNormalLike", ["x"], ["noise"]), helper.make_node("Add", ["x", "noise"], ["y"])],
        [("x", TensorProto.FLOAT, ["N", 2])],
        [("y", TensorProto.FLOAT, ["N", 2])],
    )
    details = _model(tmp_path, graph).about.details
    assert (details["rows_share_a_call"], details["random"]) == ("row", True)


def test_a_network_that_is_trained_further_by_its_calls_is_refused(tmp_path: Path) -> None:
    ones, zeros = numpy_helper.from_array(np.ones(2, np.float32), "o"), numpy_helper.from_array(np.zeros(2, "f4"), "z")
    node = helper.make_node("BatchNormalization", ["x", "o", "z", "z", "o"], ["y", "mean", "var"], training_mode=1)
    graph = _graph([node], [("x", TensorProto.FLOAT, ["N", 2])], [("y", TensorProto.FLOAT, ["N", 2])], [ones, zeros])
    with pytest.raises(StartError, match="depends on the calls before"):
        _model(tmp_path, graph)
