"""What a SavedModel could make TensorFlow do, with graphs that TensorFlow wrote, and what ordinary ones need."""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from registry.errors import UserError
from registry.formats import Recognised, recognise
from registry.formats.tensorflow_graph import operators

os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow")
tf = importlib.import_module("tensorflow")
keras = importlib.import_module("keras")
saved_model_pb2 = importlib.import_module("tensorflow.core.protobuf.saved_model_pb2")

TEXT = [tf.TensorSpec([None], tf.string, name="x")]
NUMBERS = [tf.TensorSpec([None, 3], tf.float32, name="x")]


def save(folder: Path, function: Callable[..., Any], specs: list[Any], module: Any = None) -> Path:
    """The folder of a SavedModel with one signature."""
    module = module or tf.Module()
    module.serve = tf.function(function, input_signature=specs, autograph=False)
    tf.saved_model.save(module, str(folder / "m"), signatures={"serving_default": module.serve})
    return folder / "m"


def files_of(folder: Path) -> dict[str, bytes]:
    return {f"m/{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def see(files: dict[str, bytes]) -> Recognised:
    return recognise({name: len(data) for name, data in files.items()}, lambda name: io.BytesIO(files[name]))


def refused(files: dict[str, bytes]) -> UserError:
    with pytest.raises(UserError) as raised:
        see(files)
    return raised.value


def changed(folder: Path, change: Callable[[Any], None]) -> dict[str, bytes]:
    """The files of a SavedModel whose MetaGraph was changed."""
    body = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    change(body.meta_graphs[0])
    return {**files_of(folder), "m/saved_model.pb": body.SerializeToString()}


def function_of(graph: Any, operator: str) -> Any:
    """The function that has the operator in its body."""
    return next(f for f in graph.graph_def.library.function if any(n.op == operator for n in f.node_def))


def with_vocabulary(folder: Path) -> Path:
    """A table from a file, which TensorFlow copies into assets/."""
    (folder / "words.txt").write_text("a\nb\n")
    module = tf.Module()
    start = tf.lookup.TextFileInitializer(
        str(folder / "words.txt"),
        tf.string,
        tf.lookup.TextFileIndex.WHOLE_LINE,
        tf.int64,
        tf.lookup.TextFileIndex.LINE_NUMBER,
    )
    module.table = tf.lookup.StaticVocabularyTable(start, 1)
    module.weights = tf.Variable([1.0, 2.0, 3.0])
    return save(folder, lambda x: {"y": tf.gather(module.weights, module.table.lookup(x))}, TEXT, module)


def table_from(path: Any) -> Any:
    """Lines of a file by their numbers, in a table of one call."""
    table = tf.raw_ops.HashTableV2(key_dtype=tf.int64, value_dtype=tf.string, shared_name="t")
    fill = tf.raw_ops.InitializeTableFromTextFileV2(
        table_handle=table, filename=path, key_index=-1, value_index=-2, vocab_size=-1, delimiter="\t"
    )
    with tf.control_dependencies([fill] if fill is not None else []):
        return tf.raw_ops.LookupTableFindV2(table_handle=table, keys=tf.constant([0], tf.int64), default_value="")


# attacks: each was accepted while operators were refused by name


@pytest.mark.parametrize(
    "given",
    [lambda x: x[0], lambda x: tf.constant("/etc/passwd")],
    ids=["from the request", "a constant"],
)
def test_a_table_from_a_file_of_a_callers_or_the_graphs_choosing_is_refused(tmp_path, given):
    folder = save(tmp_path, lambda x: {"y": table_from(given(x))}, TEXT)
    error = refused(files_of(folder))
    assert error.code == "saved_model_files"
    assert "InitializeTable" in error.detail or "file" in error.detail


def test_a_table_whose_path_comes_through_functions_of_functions_is_refused(tmp_path):
    inner = tf.function(table_from, input_signature=[tf.TensorSpec([], tf.string)])
    outer = tf.function(lambda path: inner(path), input_signature=[tf.TensorSpec([], tf.string)], autograph=False)
    folder = save(tmp_path, lambda x: {"y": outer(x[0])}, TEXT)
    assert refused(files_of(folder)).code == "saved_model_files"


def test_a_graph_within_a_text_is_refused(tmp_path):
    hidden = tf.Graph()
    with hidden.as_default():
        tf.raw_ops.WriteFile(filename="written", contents="x")
    text = hidden.as_graph_def().SerializeToString()
    folder = save(tmp_path, lambda x: {"y": x}, TEXT)

    def hide(graph: Any) -> None:
        body = function_of(graph, "Identity")
        made = body.node_def.add(name="made", op="Const")
        made.attr["dtype"].type = tf.string.as_datatype_enum
        made.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(text))
        body.node_def.add(name="run", op="DatasetFromGraph", input=["made:output:0"])

    error = refused(changed(folder, hide))
    assert error.code == "refused_operator"
    assert "DatasetFromGraph (node run)" in error.detail
    assert "data pipeline" in error.hint


def write_file(x: Any) -> Any:
    with tf.control_dependencies([tf.raw_ops.WriteFile(filename="written", contents=x[0])]):
        return tf.identity(x)


def save_variables(x: Any) -> Any:
    save_ = tf.raw_ops.SaveV2(prefix=x[0], tensor_names=["a"], shape_and_slices=[""], tensors=[tf.constant(1.0)])
    with tf.control_dependencies([save_]):
        return tf.identity(x)


def restore_variables(x: Any) -> Any:
    return tf.raw_ops.RestoreV2(prefix=x[0], tensor_names=["a"], shape_and_slices=[""], dtypes=[tf.float32])[0]


def abort(x: Any) -> Any:
    with tf.control_dependencies([tf.raw_ops.Abort(error_msg="end")]):
        return tf.identity(x)


@pytest.mark.parametrize(
    "attack", [write_file, save_variables, restore_variables, abort], ids=lambda each: each.__name__
)
@pytest.mark.parametrize("nested", [False, True], ids=["in the signature", "in a function of a branch of a loop"])
def test_what_writes_reads_or_ends_the_process_is_refused_wherever_it_is(tmp_path, attack, nested):
    def deep(x: Any) -> Any:
        inner = tf.function(attack, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
        branch = tf.cond(tf.size(x) > 5, lambda: tf.size(inner(x)), lambda: tf.size(x))
        return tf.while_loop(
            lambda i: i < 3, lambda i: i + tf.cond(i > 1, lambda: tf.size(inner(x)), lambda: 1), [branch]
        )[0]

    folder = save(tmp_path, lambda x: {"y": deep(x) if nested else attack(x)}, TEXT)
    assert refused(files_of(folder)).code == "refused_operator"


@pytest.mark.parametrize(
    "operator",
    [
        "PyFunc", "EagerPyFunc", "ReadFile", "WriteFile", "MatchingFiles", "PrintV2", "TFRecordDatasetV2",
        "DatasetFromGraph",
        "ImmutableConst", "DebugIdentityV2", "DecodeProtoV2", "XlaCallModule", "XlaLaunch", "RpcCall", "_Recv",
        "RemoteCall",
        "SymbolicGradient", "SummaryWriter", "GenerateVocabRemapping", "LoadAndRemapMatrix", "Save", "SaveSlices",
        "Abort",
        "AudioSummaryV2", "QueueDequeueV2", "ReaderReadV2", "CollectiveReduce", "TRTEngineOp", "MlirPassthroughOp",
        "SimpleMLInferenceOpWithHandle", "AnyOperatorOfTheFuture",
    ],
)  # fmt: skip
def test_an_operator_that_is_not_on_the_list_is_refused_even_in_a_function_that_nothing_calls(tmp_path, operator):
    def hide(graph: Any) -> None:
        made = graph.graph_def.library.function.add()
        made.signature.name = "nothing_calls_it"
        made.node_def.add(name="n", op=operator)

    error = refused(changed(plain(tmp_path), hide))
    assert error.code == "refused_operator"
    assert operator in error.detail


def plain(folder: Path) -> Path:
    weights = tf.Variable([[1.0], [2.0], [3.0]])
    module = tf.Module()
    module.weights = weights
    return save(folder, lambda x: {"y": x @ weights}, NUMBERS, module)


def test_calling_the_savers_functions_is_refused(tmp_path):
    def call(operator: str) -> Callable[[Any], None]:
        def change(graph: Any) -> None:
            saver = function_of(graph, operator).signature.name
            body = function_of(graph, "StatefulPartitionedCall")
            made = body.node_def.add(name="made", op="StatefulPartitionedCall", input=["x"])
            made.attr["f"].func.name = saver

        return change

    folder = plain(tmp_path)
    for operator in ("RestoreV2", "SaveV2"):
        error = refused(changed(folder, call(operator)))
        assert error.code == "refused_operator"

    def by_list(graph: Any) -> None:
        """Named as an attribute of a name in a list, which only a careful walk finds."""
        saver = function_of(graph, "SaveV2").signature.name
        body = function_of(graph, "StatefulPartitionedCall")
        made = body.node_def.add(name="made", op="Case")
        outer = made.attr["branches"].list.func.add(name=body.signature.name)
        outer.attr["g"].func.name = "other"
        outer.attr["g"].func.attr["h"].list.func.add(name=saver)

    assert refused(changed(folder, by_list)).code == "refused_operator"

    def replaceable(graph: Any) -> None:
        for operator in ("RestoreV2", "StatefulPartitionedCall"):
            function_of(graph, operator).attr["api_implements"].s = b"same"

    assert refused(changed(folder, replaceable)).code == "refused_operator"

    def named_as_an_operator(graph: Any) -> None:
        function_of(graph, "SaveV2").signature.name = "Identity"

    assert refused(changed(folder, named_as_an_operator)).code == "invalid_model"


@pytest.mark.parametrize("name", ["../variables/variables.index", "/etc/passwd", "..", "", "a/../../x", "absent.txt"])
def test_an_asset_is_a_plain_name_of_a_file_of_the_upload(tmp_path, name):
    folder = with_vocabulary(tmp_path)
    assert see(files_of(folder)).format == "tensorflow-savedmodel"

    def point(graph: Any) -> None:
        graph.asset_file_def[0].filename = name

    assert refused(changed(folder, point)).code == "saved_model_files"


def test_only_an_asset_may_be_bound_to_what_opens_a_file(tmp_path):
    folder = with_vocabulary(tmp_path)

    def constant(graph: Any) -> None:
        objects = graph.object_graph_def
        place = next(i for i, each in enumerate(objects.nodes) if each.HasField("asset"))
        objects.nodes[place].constant.operation = "Const"  # of a oneof: it is no asset then

    def replaced_later(graph: Any) -> None:
        """The object's path would be set to another object once it was made."""
        objects = graph.object_graph_def
        asset = next(each for each in objects.nodes if each.HasField("asset"))
        asset.children.add(node_id=0, local_name="_path")

    def unbound(graph: Any) -> None:
        objects = graph.object_graph_def
        name = function_of(graph, "InitializeTableFromTextFileV2").signature.name
        del objects.concrete_functions[name].bound_inputs[:]

    def from_the_end(graph: Any) -> None:
        """Python counts from the end where a number is negative."""
        objects = graph.object_graph_def
        name = function_of(graph, "InitializeTableFromTextFileV2").signature.name
        objects.concrete_functions[name].bound_inputs[0] = -1

    for change in (constant, replaced_later, unbound, from_the_end):
        assert refused(changed(folder, change)).code == "saved_model_files", change.__name__


def test_several_metagraphs_or_several_savedmodels_are_refused(tmp_path):
    folder = plain(tmp_path)
    body = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
    body.meta_graphs.add().CopyFrom(body.meta_graphs[0])
    assert refused({**files_of(folder), "m/saved_model.pb": body.SerializeToString()}).code == "several_models"
    files = files_of(folder)
    # by parts a-b comes after a; as a text before it: which one is meant must not depend on that
    both = {**{f"a/{k[2:]}": v for k, v in files.items()}, **{f"a-b/{k[2:]}": v for k, v in files.items()}}
    assert refused(both).code == "several_models"


def test_a_field_that_is_another_one_for_tensorflows_parser_is_refused(tmp_path):
    """Parsers keep 32 bits of a key: one with more would hide a MetaGraph here and show it there."""
    folder = plain(tmp_path)
    body = (folder / "saved_model.pb").read_bytes()
    files = {**files_of(folder), "m/saved_model.pb": body + b"\x92\x80\x80\x80\x10\x00"}  # 1 << 32 | 2 << 3 | 2
    assert refused(files).code == "invalid_model"


# TensorFlow 1, where the nodes of the graph themselves are run


def of_version_1(folder: Path, attack: str = "") -> Path:
    v1 = tf.compat.v1
    with v1.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.string, [None], name="x")
        (folder / "words.txt").write_text("a\nb\n")
        asset = tf.constant(str(folder / "words.txt"))
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, asset)
        source = x[0] if attack == "from the request" else tf.constant("/x") if attack == "a constant" else asset
        table = tf.raw_ops.HashTableV2(key_dtype=tf.string, value_dtype=tf.int64)
        fill = tf.raw_ops.InitializeTableFromTextFileV2(
            table_handle=table, filename=source, key_index=-2, value_index=-1, vocab_size=-1, delimiter="\t"
        )
        weights = v1.get_variable("w", [3], initializer=v1.ones_initializer(), use_resource=True)
        found = tf.raw_ops.LookupTableFindV2(table_handle=table, keys=x, default_value=tf.constant(2, tf.int64))
        y = tf.gather(weights, found)
        if attack == "a signature that fills it":
            with v1.control_dependencies([fill]):
                y = tf.identity(y)
        if attack == "a signature that restores":
            y = tf.raw_ops.RestoreV2(prefix=x[0], tensor_names=["w"], shape_and_slices=[""], dtypes=[tf.float32])[0]
        session.run(v1.global_variables_initializer())
        builder = v1.saved_model.Builder(str(folder / "m"))
        start = fill
        if attack == "a start that restores":
            start = v1.group(fill, tf.raw_ops.RestoreV2(
                prefix=tf.constant("/x"), tensor_names=["w"], shape_and_slices=[""], dtypes=[tf.float32]))  # fmt: skip
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            signature_def_map={"serving_default": v1.saved_model.predict_signature_def({"x": x}, {"y": y})},
            assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
            main_op=start,
        )
        builder.save()
    return folder / "m"


def test_a_savedmodel_of_version_1_is_accepted(tmp_path):
    found = see(files_of(of_version_1(tmp_path)))
    assert found.signature is not None
    assert [tensor.name for tensor in found.signature.tensors] == ["x"]


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        ("from the request", "saved_model_files"),
        ("a constant", "saved_model_files"),
        ("a signature that fills it", "saved_model_files"),
        ("a signature that restores", "refused_operator"),
        ("a start that restores", "refused_operator"),
    ],
)
def test_a_savedmodel_of_version_1_reaches_no_other_files_either(tmp_path, attack, code):
    assert refused(files_of(of_version_1(tmp_path, attack))).code == code


# what people save


def _pictures(x: Any) -> Any:
    def one(text: Any) -> Any:
        picture = tf.io.decode_image(text, channels=3, expand_animations=False)
        return tf.image.resize(tf.cast(picture, tf.float32) / 255.0, (8, 8))

    return {"y": tf.reduce_mean(tf.map_fn(one, x, fn_output_signature=tf.float32), [1, 2, 3])}


def _words(x: Any) -> Any:
    words = tf.strings.split(tf.strings.lower(tf.strings.regex_replace(x, "[^a-z ]", "")))
    return {"y": tf.cast(words.row_lengths(), tf.float32), "z": tf.strings.reduce_join(words.to_tensor(), axis=-1)}


def _examples(x: Any) -> Any:
    found = tf.io.parse_example(x, {"a": tf.io.FixedLenFeature([3], tf.float32), "b": tf.io.VarLenFeature(tf.int64)})
    return {"y": found["a"] + tf.cast(tf.sparse.reduce_sum(found["b"], axis=1, keepdims=True), tf.float32)}


def _loop(x: Any) -> Any:
    step = tf.while_loop(lambda i, s: i < 4, lambda i, s: (i + 1, tf.sin(s) + tf.linalg.norm(s)), [0, x])
    return {"y": tf.cond(tf.reduce_sum(step[1]) > 0, lambda: tf.signal.rfft(x), lambda: tf.signal.rfft(-x))}


@pytest.mark.parametrize(
    ("function", "specs"),
    [(_pictures, TEXT), (_words, TEXT), (_examples, TEXT), (_loop, NUMBERS)],
    ids=["pictures", "words", "records", "loop"],
)
def test_signatures_with_preprocessing_are_accepted(tmp_path, function, specs):
    assert see(files_of(save(tmp_path, function, specs))).format == "tensorflow-savedmodel"


def test_tables_that_change_are_accepted(tmp_path):
    module = tf.Module()
    module.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    module.table.insert(tf.constant(["a"]), tf.constant([1], tf.int64))
    folder = save(tmp_path, lambda x: {"y": module.table.lookup(x)}, TEXT, module)
    assert see(files_of(folder)).format == "tensorflow-savedmodel"


def test_an_exported_network_is_accepted(tmp_path):
    layers = keras.layers
    plan, series = keras.Input((1,), name="plan", dtype="string"), keras.Input((5, 3), name="series")
    words = layers.TextVectorization(vocabulary=["a", "b"], output_sequence_length=4)(plan)
    joined = layers.Concatenate()([
        layers.GlobalAveragePooling1D()(layers.Embedding(10, 3)(words)),
        layers.StringLookup(vocabulary=["a"], output_mode="multi_hot")(plan),
        layers.Bidirectional(layers.LSTM(3))(series),
        layers.GlobalMaxPooling1D()(layers.MultiHeadAttention(2, 2)(series, series)),
        layers.Flatten()(layers.BatchNormalization()(layers.Conv1D(2, 3)(series))),
    ])  # fmt: skip
    model = keras.Model([plan, series], layers.Dense(2, activation="softmax")(layers.Dropout(0.5)(joined)))
    model.export(str(tmp_path / "m"), verbose=False)
    assert see(files_of(tmp_path / "m")).format == "tensorflow-savedmodel"


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_export_and_the_file_of_every_layer_are_accepted(tmp_path):
    from scripts.keras_layers import called, layers

    refused_: dict[str, str] = {}
    left: list[str] = []
    for place, (layer, specs) in enumerate(layers()):
        inputs = [keras.Input(spec.shape[1:], dtype=spec.dtype.name) for spec in specs]
        try:
            model = keras.Model(inputs, called(layer, inputs))
        except ValueError:  # Keras 3.15 cannot make a network of Equalization: its output would be its input
            left.append(type(layer).__name__)
            continue
        model.export(str(tmp_path / str(place)), verbose=False)
        model.save(tmp_path / "m.keras")
        try:
            see(files_of(tmp_path / str(place)))
            see({"m.keras": (tmp_path / "m.keras").read_bytes()})
        except UserError as error:
            refused_[f"{layer.name}-{place}"] = error.detail
    assert refused_ == {}
    assert len(left) <= 3, left


@pytest.mark.thorough
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_list_of_operators_is_what_the_generator_writes():
    from scripts import tensorflow_operators

    assert tensorflow_operators.operators() == sorted(operators())
