from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import joblib
import lightgbm
import numpy as np
import onnx
import pandas as pd
import pytest
import skops.io
import xgboost
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import GradientBoostingRegressor, HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, StandardScaler

from registry.errors import UserError
from registry.formats import FORMATS, Recognised, choose_kind, recognise, skops_types
from registry.kinds import Kind, Kinds
from registry.signature import Column, Tensor

ROWS = 120


def frame() -> tuple[pd.DataFrame, np.ndarray]:
    random = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "age": random.integers(18, 80, ROWS),
            "income": random.normal(50, 10, ROWS),
            "plan": pd.Categorical(random.choice(["free", "pro", "team"], ROWS)),
            "const": 0.0,
            "code": pd.Categorical(random.choice([1, 5, 9], ROWS)),
        }
    )
    return table, (table.age + table.income > 95).astype(int).to_numpy()


def see(files: dict[str, bytes] | bytes, name: str = "model.bin") -> Recognised:
    files = {name: files} if isinstance(files, bytes) else files
    return recognise({path: len(data) for path, data in files.items()}, lambda path: io.BytesIO(files[path]))


def refused(files: dict[str, bytes] | bytes, name: str = "model.bin") -> UserError:
    with pytest.raises(UserError) as error:
        see(files, name)
    assert error.value.hint
    return error.value


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """Real models made by the real libraries, by name."""
    return Made(tmp_path_factory.mktemp("models")).get


class Made:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kept: dict[str, bytes] = {}

    def get(self, name: str) -> bytes:
        if name not in self._kept:
            self._kept[name] = getattr(self, name.replace(".", "_").replace("-", "_"))()
        return self._kept[name]

    def _saved(self, save: Callable[[str], object], name: str) -> bytes:
        path = self._folder / name
        save(str(path))
        return path.read_bytes()

    def _lightgbm(self, objective: str, **more: object) -> lightgbm.Booster:
        table, target = frame()
        labels = np.arange(ROWS) % 3 if objective == "multiclass" else target
        group = [10] * (ROWS // 10) if objective == "lambdarank" else None
        parameters = {"objective": objective, "verbose": -1, "num_leaves": 7, **more}
        return lightgbm.train(parameters, lightgbm.Dataset(table, labels, group=group), 3)

    def lightgbm_binary(self) -> bytes:
        return self._saved(self._lightgbm("binary").save_model, "m.txt")

    def lightgbm_multiclass(self) -> bytes:
        return self._saved(self._lightgbm("multiclass", num_class=3).save_model, "m.txt")

    def lightgbm_lambdarank(self) -> bytes:
        return self._saved(self._lightgbm("lambdarank").save_model, "m.txt")

    def lightgbm_array(self) -> bytes:
        table, target = frame()
        data = lightgbm.Dataset(table[["age", "income"]].to_numpy(float), target)
        return self._saved(lightgbm.train({"verbose": -1}, data, 2).save_model, "m.txt")

    def _xgboost(self, parameters: dict[str, object], suffix: str) -> bytes:
        table, target = frame()
        labels = np.arange(ROWS) % 3 if "num_class" in parameters else target
        data = xgboost.DMatrix(table, labels, enable_categorical=True)
        return self._saved(xgboost.train({"max_depth": 3, **parameters}, data, 3).save_model, "m" + suffix)

    def xgboost_json(self) -> bytes:
        return self._xgboost({"objective": "binary:logistic"}, ".json")

    def xgboost_ubj(self) -> bytes:
        return self._xgboost({"objective": "multi:softprob", "num_class": 3}, ".ubj")

    def xgboost_dart(self) -> bytes:
        return self._xgboost({"booster": "dart", "objective": "reg:squarederror"}, ".ubj")

    def xgboost_linear(self) -> bytes:
        table, target = frame()
        data = xgboost.DMatrix(table[["age", "income"]].to_numpy(float), target)
        return self._saved(xgboost.train({"booster": "gblinear"}, data, 2).save_model, "m.json")

    def pipeline(self) -> bytes:
        table, target = frame()
        columns = ColumnTransformer([("n", StandardScaler(), ["age", "income"]), ("c", OneHotEncoder(), ["plan"])])
        model = make_pipeline(columns, RandomForestClassifier(3)).fit(table, np.where(target == 1, "yes", "no"))
        return skops.io.dumps(model)

    def linear(self) -> bytes:
        table, target = frame()
        return skops.io.dumps(LinearRegression().fit(table[["age", "income"]].to_numpy(float), target))

    def onnx(self) -> bytes:
        return onnx_model().SerializeToString()

    def safetensors(self) -> bytes:
        header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
        return struct.pack("<Q", len(header)) + header + bytes(24)

    def keras(self) -> bytes:
        return keras_file({"module": "keras.layers", "class_name": "Dense", "config": {}, "registered_name": None})


def onnx_model(**more: object) -> onnx.ModelProto:
    weights = numpy_helper.from_array(np.ones((4, 2), np.float32), "W")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["X", "W"], ["Y"])],
        "g",
        [
            helper.make_tensor_value_info("X", TensorProto.FLOAT, ["batch", 4]),
            # models of old exporters name their weights as inputs too
            helper.make_tensor_value_info("W", TensorProto.FLOAT, [4, 2]),
        ],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [None, 2])],
        [weights],
    )
    return helper.make_model(graph, **more)


def keras_file(layer: dict[str, object]) -> bytes:
    config = {"module": "keras", "class_name": "Sequential", "config": {"layers": [layer]}, "registered_name": None}
    return zip_of(
        {"config.json": json.dumps(config), "metadata.json": '{"keras_version": "3.8.0"}', "model.weights.h5": "HDF"}
    )


def zip_of(files: dict[str, str | bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return out.getvalue()


ALL = [
    "lightgbm_binary", "lightgbm_multiclass", "lightgbm_lambdarank", "lightgbm_array", "xgboost_json", "xgboost_ubj",
    "xgboost_dart", "xgboost_linear", "pipeline", "linear", "onnx", "safetensors", "keras",
]  # fmt: skip


# LightGBM


def test_lightgbm_says_its_columns_levels_and_task(made):
    found = see(made("lightgbm_binary"))
    assert found.format == "lightgbm-text"
    assert found.signature is not None
    assert found.signature.columns == (
        Column("age"),
        Column("income"),
        Column("plan", "category", ("free", "pro", "team")),
        Column("const"),
        Column("code", "category", (1, 5, 9)),
    )
    assert found.signature.named
    assert (found.signature.n_features, found.signature.task, found.signature.classes) == (5, "binary", (0, 1))
    multi = see(made("lightgbm_multiclass")).signature
    assert multi is not None
    assert (multi.task, multi.classes) == ("multiclass", (0, 1, 2))
    rank = see(made("lightgbm_lambdarank")).signature
    assert rank is not None
    assert rank.task == "ranking"


def test_lightgbm_trained_on_an_array_has_columns_without_names(made):
    signature = see(made("lightgbm_array")).signature
    assert signature is not None
    assert not signature.named
    assert signature.n_features == 2


def test_lightgbm_of_a_model_string_without_pandas_line_is_complete(made):
    # as the command line program and R save it
    data = made("lightgbm_array")
    assert see(data[: data.index(b"\npandas_categorical")]).format == "lightgbm-text"


def test_lightgbm_constant_category_keeps_its_levels(tmp_path):
    table, target = frame()
    table["one"] = pd.Categorical(["same"] * ROWS)
    table = table.drop(columns="const")
    booster = lightgbm.train({"verbose": -1, "objective": "binary"}, lightgbm.Dataset(table, target), 2)
    booster.save_model(str(tmp_path / "m.txt"))
    signature = see((tmp_path / "m.txt").read_bytes()).signature
    assert signature is not None
    assert signature.columns[-1] == Column("one", "category", ("same",))


def test_lightgbm_cut_anywhere_after_its_first_line_is_truncated(made):
    data = made("lightgbm_binary")
    end = data.index(b"\npandas_categorical")
    for size in [*range(5, end, 37), *range(end - 40, end - 1), *range(end + 2, len(data) - 1)]:
        assert refused(data[:size]).code in ("truncated_model", "invalid_model"), data[size - 30 : size]
    assert refused(data[: len(data) // 2]).code == "truncated_model"
    assert refused(data[: data.index(b"end of trees") + 5]).code == "truncated_model"


def test_lightgbm_with_windows_line_ends_or_a_byte_order_mark_is_refused_before_it_ends_a_process(made):
    data = made("lightgbm_binary")
    assert refused(data.replace(b"\n", b"\r\n")).code == "text_converted"
    assert refused(b"\xef\xbb\xbf" + data).code == "text_converted"


def test_lightgbm_with_tree_sizes_that_lie_is_refused(made):
    data = made("lightgbm_binary")
    at = data.index(b"tree_sizes=") + len(b"tree_sizes=")
    assert refused(data[:at] + b"1" + data[at:]).code in ("invalid_model", "truncated_model")


@pytest.mark.parametrize(
    ("key", "change"),
    [
        (b"left_child=", b"left_child=1000000 "),
        (b"left_child=", b"left_child=-1000000 "),
        (b"right_child=", b"right_child=0 "),
        (b"split_feature=", b"split_feature=-1 "),
        (b"split_feature=", b"split_feature=99999 "),
        (b"num_leaves=", b"num_leaves=1"),
        (b"num_cat=", b"num_cat=7"),
        (b"leaf_value=", b"leaf_value=1 2 "),
        (b"leaf_value=", b"leaf="),
        (b"decision_type=", b"decision_type=x "),
    ],
)
def test_lightgbm_whose_tree_points_out_of_bounds_is_refused(made, key, change):
    data = made("lightgbm_binary")
    start = data.index(b"Tree=0\n")
    end = data.index(b"Tree=1\n")
    tree = data[start:end]
    head, _, tail = tree.partition(key)
    # replaces the first value where the change ends with a space, so that the number of values stays
    forged = head + change + (tail.partition(b" ")[2] if change.endswith(b" ") else tail)
    sizes = data[:start].replace(b"tree_sizes=%d " % len(tree), b"tree_sizes=%d " % len(forged))
    assert refused(sizes + forged + data[end:]).code == "invalid_model"


# XGBoost


def test_xgboost_says_its_columns_levels_and_task(made):
    for name, form in (("xgboost_json", "xgboost-json"), ("xgboost_ubj", "xgboost-ubj")):
        found = see(made(name))
        assert found.format == form
        assert found.signature is not None
        assert found.signature.columns[:3] == (
            Column("age", "int"),
            Column("income", "number"),
            Column("plan", "category", ("free", "pro", "team")),
        )
        assert found.signature.columns[4] == Column("code", "category", (1, 5, 9))
        assert found.signature.n_features == 5
    binary, multi = see(made("xgboost_json")).signature, see(made("xgboost_ubj")).signature
    assert binary is not None
    assert multi is not None
    assert (binary.task, multi.task, multi.classes) == ("binary", "multiclass", (0, 1, 2))


@pytest.mark.parametrize("suffix", [".json", ".ubj"])
@pytest.mark.parametrize("levels", [["zürich", "서울", "x"], ["b", "c", "éa"], ["aé", "b", "cd"]], ids=str)
def test_xgboost_category_names_that_saving_cut_are_refused(tmp_path, levels, suffix):
    table = pd.DataFrame({"age": np.arange(60.0), "city": pd.Categorical(levels * 20)})
    booster = xgboost.train({}, xgboost.DMatrix(table, np.arange(60) % 3, enable_categorical=True), 2)
    booster.save_model(tmp_path / f"m{suffix}")
    error = refused((tmp_path / f"m{suffix}").read_bytes())
    assert error.code == "damaged_categories"
    assert "city" in error.detail
    assert "ASCII" in error.hint


def test_xgboost_dart_and_linear_models_are_known(made):
    dart, linear = see(made("xgboost_dart")).signature, see(made("xgboost_linear")).signature
    assert dart is not None
    assert linear is not None
    assert dart.columns[2].categories == ("free", "pro", "team")
    assert (linear.named, linear.n_features, linear.task) == (False, 2, "regression")


def test_xgboost_cut_anywhere_is_truncated(made):
    for name in ("xgboost_json", "xgboost_ubj"):
        data = made(name)
        for size in range(40, len(data) - 1, max(1, len(data) // 60)):
            assert refused(data[:size]).code == "truncated_model", (name, size)


def test_xgboost_json_with_spaces_and_text_in_strings_is_read(made):
    body = json.loads(made("xgboost_json"))
    body["learner"]["attributes"] = {"note": 'quotes " and \\ and { [ ] }'}
    assert see(json.dumps(body, indent=2).encode()).format == "xgboost-json"


def test_other_json_is_unknown():
    assert refused(b'{"a": [1, 2, {"b": null}]}').code == "unknown_format"
    assert refused(b"{").code == "unknown_format"


# ONNX


def test_onnx_says_its_inputs_without_its_weights(made):
    found = see(made("onnx"))
    assert found.format == "onnx"
    assert found.signature is not None
    assert [tensor.to_json() for tensor in found.signature.tensors] == [
        {"name": "X", "dtype": "float32", "shape": ["batch", 4]}
    ]
    assert [tensor.to_json() for tensor in found.signature.outputs] == [
        {"name": "Y", "dtype": "float32", "shape": [None, 2]}
    ]
    assert found.signature.n_features == 4


def external(location: str, **more: str) -> bytes:
    model = onnx_model()
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        entry = weights.external_data.add()
        entry.key, entry.value = key, value
    return model.SerializeToString()


def test_onnx_external_data_inside_the_upload_is_fine():
    found = see({"m/model.onnx": external("w.bin", offset="0", length="32"), "m/w.bin": bytes(32)})
    assert (found.format, found.path) == ("onnx", "m/model.onnx")


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../w.bin", "sub/w.bin", "..", "", "w.bin\0", "C:w.bin", "a\\b", "other.bin", "model.onnx"],
)
def test_onnx_external_data_outside_the_upload_is_refused(location):
    error = refused({"model.onnx": external(location), "w.bin": bytes(32), "sub/w.bin": bytes(32)})
    assert error.code == "onnx_external_data"


def test_onnx_external_data_past_the_end_of_its_file_is_refused():
    for more in ({"offset": "1", "length": "32"}, {"length": "33"}, {"offset": "-1"}, {"length": "9" * 30}):
        assert refused({"model.onnx": external("w.bin", **more), "w.bin": bytes(32)}).code == "onnx_external_data"


def test_onnx_external_data_deep_in_a_subgraph_is_found():
    inner = onnx.load_from_string(external("/etc/passwd")).graph
    condition = helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=onnx_model().graph)
    constant = helper.make_node("Constant", [], ["k"], value=inner.initializer[0])
    for node in (condition, constant):
        model = onnx_model()
        model.graph.node.append(node)
        assert refused(model.SerializeToString()).code == "onnx_external_data"
        function = helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 18)])
        assert refused(onnx_model(functions=[function]).SerializeToString()).code == "onnx_external_data"


def test_onnx_operators_that_load_code_or_files_are_refused():
    model = onnx_model()
    model.graph.node.append(helper.make_node("EPContext", [], ["z"], domain="com.microsoft"))
    assert refused(model.SerializeToString()).code == "onnx_operator_refused"


def test_onnx_operators_of_a_library_that_a_model_cannot_bring_are_refused():
    model = onnx_model()
    model.graph.node.append(helper.make_node("Detokenize", [], ["z"], domain="ai.onnx.contrib"))
    error = refused(model.SerializeToString())
    assert (error.code, "ai.onnx.contrib" in error.detail) == ("onnx_operator_refused", True)
    function = helper.make_function("ai.onnx.contrib", "Detokenize", [], ["z"], [], [helper.make_opsetid("", 18)])
    model.functions.append(function)
    assert see(model.SerializeToString()).format == "onnx", "a function of its own is walked, not loaded from elsewhere"


def test_onnx_that_onnx_runtime_would_read_as_its_own_format_is_refused():
    """A file named .ort, or with these bytes there, is read as another format, which nothing here looked at."""
    model = onnx_model()
    data = model.SerializeToString()
    assert refused({"model.ort": data}).code == "onnx_ort_format"
    model.producer_name = "ORTM"
    data = model.SerializeToString()
    assert data[4:8] == b"ORTM"
    assert refused(data).code == "onnx_ort_format"


def test_onnx_with_a_field_that_is_another_one_for_protobufs_parser_is_refused():
    data = onnx_model().SerializeToString() + b"\xba\x80\x80\x80\x10\x00"  # 1 << 32 | 7 << 3 | 2
    assert refused(data).code == "invalid_model"


def test_onnx_cut_within_its_graph_is_truncated(made):
    data = made("onnx")
    for size in range(12, len(data) - 20):
        assert refused(data[:size]).code in ("truncated_model", "unknown_format", "invalid_model")
    assert refused(data[: len(data) // 2]).code == "truncated_model"


def test_onnx_of_gigabytes_is_looked_at_without_reading_its_weights(tmp_path):
    # a sparse file of 3 GB stands for the weights
    model = onnx_model()
    model.graph.ClearField("initializer")
    graph = model.graph.SerializeToString()
    big = 3 << 30

    def field(number: int, length: int) -> bytes:
        out = bytes([number << 3 | 2])
        while length > 127:
            out, length = out + bytes([length & 127 | 128]), length >> 7
        return out + bytes([length])

    tensor = b"\x42\x01W" + field(9, big)
    initializer = field(5, len(tensor) + big) + tensor
    model.ClearField("graph")
    path = tmp_path / "big.onnx"
    with path.open("wb") as out:
        out.write(model.SerializeToString() + field(7, len(graph) + len(initializer) + big) + graph + initializer)
        out.truncate(out.tell() + big)
    count = 0

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:  # type: ignore[override]
            nonlocal count
            data = super().read(size)
            count += len(data)
            return data

    found = recognise([("big.onnx", path.stat().st_size)], lambda name: Counting(path))  # type: ignore[arg-type, return-value]
    assert found.format == "onnx"
    assert count < 1 << 20


# skops


def test_skops_says_its_columns_and_classes(made):
    found = see(made("pipeline"))
    assert found.format == "skops"
    assert found.signature is not None
    assert [column.name for column in found.signature.columns] == ["age", "income", "plan", "const", "code"]
    assert (found.signature.task, found.signature.classes) == ("binary", ("no", "yes"))
    linear = see(made("linear")).signature
    assert linear is not None
    assert (linear.columns, linear.n_features, linear.task) == ((), 2, "regression")


@pytest.mark.parametrize(
    "model",
    [
        GridSearchCV(LogisticRegression(), {"C": [0.1, 1.0]}, cv=2),
        HistGradientBoostingClassifier(max_iter=3),
        GradientBoostingRegressor(n_estimators=3),
        KNeighborsClassifier(3),
        make_pipeline(FunctionTransformer(np.log1p), LogisticRegression()),
    ],
    ids=lambda model: type(model).__name__,
)
def test_skops_of_usual_estimators_is_accepted(model):
    table, target = frame()
    found = see(skops.io.dumps(model.fit(np.abs(table[["age", "income"]].to_numpy(float)), target)))
    assert found.format == "skops"
    assert found.signature is not None
    assert found.signature.n_features == 2


def test_every_skops_type_of_the_list_is_a_thing_of_scikit_learn_or_scipy():
    for name in skops_types.OBJECTS | skops_types.LOSSES | skops_types.FUNCTIONS:
        assert name.startswith(("sklearn.", "scipy."))


def local_step(values):  # type: ignore[no-untyped-def]
    return values


def test_skops_with_a_type_that_is_not_on_the_list_is_refused_by_name():
    table, target = frame()
    numbers = table[["age", "income"]].to_numpy(float)
    error = refused(
        skops.io.dumps(make_pipeline(FunctionTransformer(local_step), LogisticRegression()).fit(numbers, target))
    )
    assert error.code == "skops_untrusted_type"
    assert "local_step" in error.detail


NODE = {
    "__class__": "LinearRegression",
    "__module__": "sklearn.linear_model._base",
    "__loader__": "ObjectNode",
    "content": None,
}


@pytest.mark.parametrize(
    "node",
    [
        {"__class__": "system", "__module__": "os", "__loader__": "FunctionNode"},
        {"__class__": "methodcaller", "__module__": "operator", "__loader__": "OperatorFuncNode", "attrs": {}},
        {"__class__": "partial", "__module__": "functools", "__loader__": "PartialNode", "content": {}},
        {"__class__": "eval", "__module__": "builtins", "__loader__": "TypeNode"},
        {"__class__": "LinearRegression", "__module__": "sklearn.linear_model._base", "__loader__": "MethodNode"},
        {"__class__": "LinearRegression", "__module__": "sklearn.linear_model._base", "__loader__": "NewNode"},
        {"__class__": "str", "__module__": "builtins", "__loader__": "ConstructorFromReduceNode", "content": {}},
        {
            "__class__": "Generator", "__module__": "numpy.random._generator", "__loader__": "RandomGeneratorNode",
            "content": {
                "bit_generator": {
                    "__class__": "dict", "__module__": "builtins", "__loader__": "DictNode",
                    "content": {
                        "bit_generator": {
                            "__class__": "str", "__module__": "builtins", "__loader__": "JsonNode", "content": '"seed"',
                        }
                    },
                }
            },
        },
    ],
)  # fmt: skip
def test_skops_nodes_that_call_what_the_file_names_are_refused(node):
    for place in ("content", "anything"):
        schema = {**NODE, place: node, "protocol": 2}
        assert refused(zip_of({"schema.json": json.dumps(schema)})).code == "skops_untrusted_type"


def test_skops_that_opens_files_which_a_request_names_is_refused():
    def made(source: str) -> bytes:
        words = CountVectorizer().fit(["aa bb", "bb cc"])
        words.set_params(input=source)
        return skops.io.dumps(make_pipeline(words, LogisticRegression().fit(np.eye(3)[:2], [0, 1])))

    assert see(made("content")).format == "skops"
    for source in ("filename", "file"):
        assert refused(made(source)).code == "skops_reads_files"


def test_skops_nodes_of_one_number_say_the_same():
    """skops takes the first node of a number for all others: what was checked in the second would not be loaded."""
    schema = json.loads(
        zipfile.ZipFile(io.BytesIO(skops.io.dumps(CountVectorizer().fit(["aa bb"])))).read("schema.json")
    )
    attributes = schema["content"]["content"]
    attributes["encoding"] = {**attributes["input"], "content": '"filename"'}  # comes first, and is no input
    schema["content"]["content"] = dict(sorted(attributes.items()))
    assert refused(zip_of({"schema.json": json.dumps(schema)})).code == "invalid_model"


def test_skops_with_two_answers_to_one_question_is_refused():
    schema = json.dumps({**NODE, "protocol": 2})
    double = schema[:-1] + ', "__loader__": "FunctionNode"}'
    assert refused(zip_of({"schema.json": double})).code in ("invalid_model", "skops_untrusted_type")


def test_skops_with_a_pickled_array_is_refused():
    out = io.BytesIO()
    np.save(out, np.array([{}], object), allow_pickle=True)
    for content in (out.getvalue(), pickle.dumps([1])):
        data = zip_of({"schema.json": json.dumps({**NODE, "protocol": 2}), "1.npy": content})
        assert refused(data).code == "pickle_refused"


@pytest.mark.parametrize(
    "array", ["split_gain", "internal_value", "internal_weight", "internal_count", "leaf_weight", "leaf_count"]
)
def test_a_tree_one_of_whose_optional_arrays_is_short_is_refused(made, array):
    """LightGBM ends its process over it."""
    text = made("lightgbm-binary").decode()
    start = text.index(f"\n{array}=")
    end = text.index("\n", start + 1)
    cut = text.rindex(" ", start, end)
    body = text[:cut] + " " * (end - cut) + text[end:]  # of the same length: tree_sizes still fit
    fault = refused(body.encode())
    assert fault.code == "invalid_model"
    assert array in fault.detail


# others


def test_safetensors_and_keras_are_known(made):
    assert see(made("safetensors")).format == "safetensors"
    assert see(made("keras")).format == "keras-v3"


def test_safetensors_cut_or_lying_is_refused(made):
    data = made("safetensors")
    assert refused(data[:-1]).code == "truncated_model"
    assert refused(data[:30]).code == "truncated_model"
    assert refused(data + b"x").code == "invalid_model"
    assert refused(data.replace(b"[0, 24]", b"[0, 23]")).code == "invalid_model"


@pytest.mark.parametrize(
    "layer",
    [
        {"module": "keras.layers", "class_name": "Lambda", "config": {}, "registered_name": None},
        {"class_name": "__lambda__", "config": {"value": "…"}},
        {"module": "os", "class_name": "system", "config": {}},
        {"module": "keras_evil", "class_name": "Dense", "config": {}},
        {"module": "keras.utils", "class_name": "get_file", "config": {"origin": "http://127.0.0.1/"}},
        {"module": "keras.src.utils.file_utils", "class_name": "get_file", "config": {}},
        {"module": "keras.layers.__init__", "class_name": "Dense", "config": {}},
        {"module": "builtins", "class_name": "eval", "config": {}},
        {
            "module": "keras.layers",
            "class_name": "StringLookup",
            "config": {"vocabulary": "/etc/passwd", "invert": True},
        },
        {"module": "keras.layers", "class_name": "TextVectorization", "config": {"idf_weights": "/etc/passwd"}},
        {"module": None, "class_name": "Mine", "registered_name": "pkg>Mine", "config": {}},
    ],
)
def test_keras_with_code_inside_is_refused(layer):
    assert refused(keras_file(layer)).code == "keras_lambda"


def test_keras_says_its_inputs_and_its_several_outputs():
    def given(name: str, shape: list[int | None], dtype: object) -> dict[str, object]:
        config = {"name": name, "batch_shape": shape, "dtype": dtype}
        return {"module": "keras.layers", "class_name": "InputLayer", "config": config, "registered_name": None}

    def model(layers: list[dict[str, object]], class_name: str, **more: object) -> Recognised:
        config = {"module": "keras", "class_name": class_name, "config": {"layers": layers, **more}}
        return see(zip_of({"config.json": json.dumps(config), "metadata.json": '{"keras_version": "3.8.0"}',
                           "model.weights.h5": "HDF"}))  # fmt: skip

    chain = model([given("keras_tensor_41", [2, 3], {"class_name": "DTypePolicy", "config": {"name": "float32"}})],
                  "Sequential").signature  # fmt: skip
    assert chain is not None
    assert chain.tensors == (Tensor("input", "float32", (None, 3)),), "a name that counts on is no name"
    several = model(
        [given("age", [None, 1], "float32"), given("text", [None], "string")],
        "Functional",
        input_layers=[["text", 0, 0], ["age", 0, 0]],
        output_layers={"yes": ["d1", 0, 0], "no": ["d2", 0, 0]},
    ).signature
    assert several is not None
    assert several.tensors == (Tensor("text", "string", (None,)), Tensor("age", "float32", (None, 1)))
    assert [output.name for output in several.outputs] == ["yes", "no"]
    assert model([], "Sequential").signature is None, "it was never built"


def field(number: int, value: bytes | int) -> bytes:
    """A field of a protobuf message."""

    def varint(value: int) -> bytes:
        value &= (1 << 64) - 1
        out = b""
        while value > 0x7F:
            out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
        return out + bytes([value])

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def saved_model(operators: list[str], name: bytes = b"serving_default", inside: str = "graph") -> dict[str, bytes]:
    def tensor(key: bytes, dtype: int, *sizes: int) -> bytes:
        shape = b"".join(field(2, field(1, size)) for size in sizes)
        return field(1, key) + field(2, field(1, key + b":0") + field(2, dtype) + field(3, shape))

    nodes = [field(1, b"n%d" % i) + field(2, each.encode()) for i, each in enumerate(operators)]
    graph = b"".join(field(1, node) for node in nodes)
    if inside == "function":
        graph = field(2, field(1, b"".join(field(3, node) for node in nodes)))
    inputs = field(1, tensor(b"b", 7, -1)) + field(1, tensor(b"a", 1, -1, 3))
    signature = field(1, name) + field(2, inputs + field(2, tensor(b"y", 9, -1, 2)))
    own = field(1, b"__saved_model_init_op") + field(2, b"")
    return {
        "m/saved_model.pb": field(1, 1) + field(2, field(2, graph) + field(5, signature) + field(5, own)),
        "m/variables/variables.index": b"i",
        "m/variables/variables.data-00000-of-00001": b"d",
    }


def test_a_savedmodel_says_its_signature():
    files = saved_model(["MatMul", "Relu"])
    found = see(files)
    assert (found.format, found.path) == ("tensorflow-savedmodel", "m/saved_model.pb")
    assert found.signature is not None
    assert found.signature.tensors == (Tensor("a", "float32", (None, 3)), Tensor("b", "string", (None,)))
    assert found.signature.outputs == (Tensor("y", "int64", (None, 2)),)
    assert see(saved_model(["MatMul"], b"only_one")).signature is not None
    whole = files.pop("m/variables/variables.data-00000-of-00001")
    assert refused(files).code == "truncated_model"
    files["m/variables/variables.data-00000-of-00001"] = whole
    files["m/saved_model.pb"] = files["m/saved_model.pb"][:-5]
    assert refused(files).code == "truncated_model"


@pytest.mark.parametrize("operator", ["PyFunc", "EagerPyFunc", "ReadFile", "WriteFile", "PrintV2", "TFRecordDatasetV2"])
@pytest.mark.parametrize("inside", ["graph", "function"])
def test_a_savedmodel_that_reaches_out_of_itself_is_refused(operator, inside):
    error = refused(saved_model(["MatMul", operator], inside=inside))
    assert error.code == "refused_operator"
    assert operator in error.detail


def test_a_savedmodel_without_a_function_to_call_is_refused():
    files = saved_model(["MatMul"])
    files["m/saved_model.pb"] = field(1, 1) + field(2, field(2, b""))
    assert refused(files).code == "no_signature"


@pytest.mark.parametrize(
    "files",
    [
        {"bentofile.yaml": b"service: x:Y\n", "model.pkl": pickle.dumps({})},
        {"pyproject.toml": b'[tool.bentoml.build]\nservice = "x:Y"\n', "x.py": b""},
        {"service.py": b"import bentoml\n\n@bentoml.service\nclass S: ...\n", "m.txt": b"?"},
        {"app.py": b"import bentoml\nimage = bentoml.images.Image(python_version='3.11')\n"},
    ],
)
def test_projects_are_known_by_their_text(files):
    found = see(files)
    assert (found.format, found.kind) == ("bento-project", "project")


def test_a_python_file_without_a_service_is_no_project():
    assert (
        refused({"train.py": b"import bentoml\nprint(1)\n", "pyproject.toml": b"not toml ["}).code == "unknown_format"
    )


# pickles


class Sentinel:
    """Unpickling this would leave a trace."""

    def __reduce__(self):  # type: ignore[no-untyped-def]
        return os.mkdir, ("unpickled-by-mistake",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_refused_whatever_its_name_and_never_loaded(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused(pickle.dumps([Sentinel()], protocol), "model.txt")
    assert error.code == "pickle_refused"
    assert "ekiben init --from FILE" in (error.hint or "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compress", [0, 3, ("gzip", 3), ("zlib", 3), ("bz2", 3), ("xz", 3)])
def test_joblib_files_are_refused_with_the_way_out(compress, tmp_path):
    table, target = frame()
    model = LogisticRegression().fit(table[["age", "income"]].to_numpy(float), target)
    joblib.dump(model, tmp_path / "m.joblib", compress=compress)
    error = refused((tmp_path / "m.joblib").read_bytes())
    assert error.code == "pickle_refused"
    assert "skops" in (error.hint or "")


def test_a_list_of_words_beside_a_model_is_no_pickle(made):
    words = b"cat\ndog\nquail\np1\nposix\nmkdir\np0\nsystem\n"
    assert see({"m.txt": made("lightgbm_binary"), "labels.txt": words}).path == "m.txt"


def test_other_protobuf_files_are_not_called_damaged_onnx():
    core_ml = b"\x08\x05\x12\x04abcd\xc2\x0c\x01x"
    assert refused(core_ml).code == "unknown_format"


def test_a_lightgbm_pickle_is_told_how_to_save_text():
    table, target = frame()
    model = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(table, target)
    assert "save_model" in (refused(pickle.dumps(model)).hint or "")


def test_a_zip_of_a_pickle_and_a_torch_file_are_refused():
    data = pickle.dumps({"weights": [1.0]})
    assert refused(zip_of({"model.bin": data})).code == "pickle_refused"
    error = refused(zip_of({"archive/data.pkl": data, "archive/version": "3", "archive/data/0": "x"}))
    assert error.code == "pickle_refused"
    assert "ONNX" in (error.hint or "").upper()


# the whole upload


def test_an_empty_file_and_an_empty_upload():
    assert refused(b"").code == "empty_file"
    assert refused({}).code == "empty_upload"


@pytest.mark.parametrize(
    "data", [b"hello", b"\0" * 5000, os.urandom(5000), b"PK\x05\x06" + bytes(18), b"CBM1xxxx", b"<html>"]
)
def test_unknown_content_is_refused_with_the_list_of_formats(data):
    error = refused(data)
    assert error.code == "unknown_format"
    assert all(name in (error.hint or "") for name in FORMATS.values())


def test_companion_files_do_no_harm_and_two_models_are_refused(made):
    found = see(
        {"churn.txt": made("lightgbm_binary"), "README.md": b"# Churn", "labels.json": b'{"0": "stays"}', "e": b""}
    )
    assert (found.format, found.path) == ("lightgbm-text", "churn.txt")
    assert refused({"a.txt": made("lightgbm_binary"), "b.onnx": made("onnx")}).code == "several_models"
    assert refused({"a.txt": made("lightgbm_binary"), "b": pickle.dumps([1])}).code == "pickle_refused"


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(ALL),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=3), st.integers(0, 3)), max_size=6),
    st.floats(0, 1),
    st.booleans(),
)
def test_a_mutated_model_raises_nothing_but_a_user_error(made, name, changes, keep, cut):
    forged = bytearray(made(name))
    for at, content, removed in changes:
        place = at % len(forged)
        forged[place : place + removed] = content
    data = bytes(forged[: int(len(forged) * keep)] if cut else forged)
    try:
        assert see(data).format in FORMATS
    except UserError as error:
        assert error.hint  # noqa: PT017


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from(
            [
                b"tree\n",
                b"{",
                b'{"learner":{',
                b"{L\0\0\0\0\0\0\0\x07learner{",
                b"\x08\x07",
                b"PK\x03\x04",
                b"\x80\x04",
                b"\x08\x01\x12",
            ]
        ).flatmap(lambda start: st.binary(max_size=200).map(lambda rest: start + rest)),
    ),
    st.sampled_from(["model", "saved_model.pb", "pyproject.toml", "service.py"]),
)
def test_arbitrary_bytes_raise_nothing_but_a_user_error(data, name):
    try:
        see(data, name)
    except UserError as error:
        assert error.hint  # noqa: PT017


# kinds


def kind(name: str, generic: bool, *formats: str) -> Kind:
    return Kind(name, name, name, generic, formats, "service:S", (), ">=3.11", "cpu", "/predict", "512Mi", Path(name))


KINDS = Kinds(
    (kind("lightgbm", True, "lightgbm-text"), kind("onnx", True, "onnx"), kind("ranker", False, "lightgbm-text"))
)


def test_the_kind_is_found_from_the_content_or_asked_for():
    found = Recognised("lightgbm-text", "m.txt")
    assert choose_kind(found, KINDS) == "lightgbm"
    assert choose_kind(found, KINDS, "ranker") == "ranker"
    assert choose_kind(Recognised("bento-project", "bentofile.yaml", kind="project"), KINDS) == "project"
    assert choose_kind(Recognised("bento-project", "bentofile.yaml", kind="project"), KINDS, "project") == "project"


@pytest.mark.parametrize(
    ("form", "requested", "code"),
    [
        ("lightgbm-text", "onnx", "kind_does_not_fit"),
        ("lightgbm-text", "project", "kind_does_not_fit"),
        ("bento-project", "lightgbm", "kind_does_not_fit"),
        ("lightgbm-text", "rankre", "unknown_kind"),
        ("safetensors", None, "format_without_kind"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(form, requested, code):
    with pytest.raises(UserError) as error:
        choose_kind(Recognised(form, "m"), KINDS, requested)
    assert error.value.code == code
    assert error.value.hint
