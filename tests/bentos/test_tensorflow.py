"""The kind tensorflow beside TensorFlow and Keras themselves, on networks made here."""

from __future__ import annotations

import asyncio
import importlib
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from bentos.serving import ModelFolder, Problem, StartError, write_model
from bentos.serving.networks import tensorflow
from bentos.tensorflow.model import Model
from bentos.tensorflow.network import operators
from registry.errors import UserError
from registry.formats import Recognised, recognise
from registry.formats.tensorflow_graph import operators as accepted

tf = tensorflow()
keras = importlib.import_module("keras")


def _keras(tmp_path: Path, model: Any, name: str = "m.keras") -> ModelFolder:
    tmp_path.mkdir(exist_ok=True)
    model.save(tmp_path / "saved.keras")
    files = {name: tmp_path / "saved.keras"}
    return write_model(tmp_path / "m", kind="tensorflow", format="keras-v3", files=files)


def _saved(tmp_path: Path, save: Any) -> ModelFolder:
    save(str(tmp_path / "saved"))
    files = {p.relative_to(tmp_path).as_posix(): p for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    return write_model(tmp_path / "m", kind="tensorflow", format="tensorflow-savedmodel", files=files)


def _recognised(folder: ModelFolder) -> Recognised:
    """As the upload of these files is seen."""
    return recognise(
        {name: folder.path(name).stat().st_size for name in folder.files},
        lambda name: io.BytesIO(folder.path(name).read_bytes()),
    )


def _agree(folder: ModelFolder, model: Model) -> None:
    """What the upload was told the model takes is what the service takes."""
    known = _recognised(folder).signature
    assert known is not None
    taken = [(t.name, t.dtype, (None, *(t.shape or ()))) for t in model.network.inputs.all]
    assert [(t.name, t.dtype, t.shape) for t in known.tensors] == taken
    if known.outputs:
        assert sorted(o.name for o in known.outputs) == sorted(o.name for o in model.network.outputs)


def _refused(model: Model, *rows: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        model.outputs(list(rows))
    return raised.value


def _dense() -> Any:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(2)])


def _several() -> Any:
    keras.utils.set_random_seed(2)
    usage, plan = keras.Input((3,), name="usage"), keras.Input((1,), name="plan", dtype="string")
    age = keras.Input((), name="age", dtype="int32")
    coded = keras.layers.StringLookup(vocabulary=["basic", "프로"], output_mode="one_hot")(plan)
    years = keras.ops.cast(keras.ops.reshape(age, (-1, 1)), "float32")
    joined = keras.layers.Concatenate()([usage, coded, years])
    outputs = {"leaves": keras.layers.Dense(1, activation="sigmoid")(joined), "spends": keras.layers.Dense(2)(joined)}
    return keras.Model([usage, plan, age], outputs)


ROW = {"usage": [0.5, -1.0, 2.0], "plan": "프로", "age": 31}


def test_a_chain_of_layers_takes_plain_rows(tmp_path: Path) -> None:
    chain = _dense()
    folder = _keras(tmp_path, chain)
    model = Model(folder)
    _agree(folder, model)
    rows = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    assert np.allclose(model.outputs(rows.tolist()), chain(rows, training=False).numpy(), rtol=1e-6)
    assert model.about.output is not None
    assert model.about.output["properties"]["outputs"]["items"] == {
        "type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2,
    }  # fmt: skip
    assert _refused(model, [0, 0, 0], [0, 1]).field == "inputs[1]"
    assert _refused(model, [0, 0, "1"]).field == "inputs[0][2]"
    assert _refused(model, [0, 0, None]).code == "wrong_type"
    assert _refused(model, [0, 0, float("inf")]).code == "not_finite"
    assert _refused(model, [0, 0, 1e39]).code == "wrong_type"
    assert _refused(model, 7).code == "wrong_shape"


def test_a_file_of_another_name_is_the_same_model(tmp_path: Path) -> None:
    assert Model(_keras(tmp_path, _dense(), "churn.bin")).about.format == "keras-v3"


def test_several_inputs_and_outputs_go_by_their_names(tmp_path: Path) -> None:
    network = _several()
    folder = _keras(tmp_path, network)
    model = Model(folder)
    _agree(folder, model)
    feed = [tf.constant([ROW["usage"]]), tf.constant([["프로"]]), tf.constant([31])]
    truth = {name: value.numpy()[0].tolist() for name, value in network(feed, training=False).items()}
    other = {**ROW, "plan": "basic"}
    answers = model.outputs([ROW, other, {**ROW, "plan": ["프로"]}])
    assert answers[0] == answers[2]
    assert answers[0] != answers[1]
    for name, value in truth.items():
        assert answers[0][name] == pytest.approx(value, rel=1e-6)
    assert _refused(model, ROW, {**ROW, "age": 31.5}).field == "inputs[1].age"
    assert _refused(model, {**ROW, "age": 2**31}).code == "wrong_type"
    assert _refused(model, {**ROW, "plan": 3}).field == "inputs[0].plan[0]"
    assert _refused(model, {"usage": [0, 0, 0], "age": 1}).field == "inputs[0].plan"
    assert _refused(model, {**ROW, "more": 1}).code == "unknown_column"
    assert _refused(model, [0, "basic", 1]).code == "invalid_row"


def test_an_exported_savedmodel_answers_as_the_network_it_came_from(tmp_path: Path) -> None:
    network = _several()
    folder = _saved(tmp_path, lambda place: network.export(place, verbose=False))
    model = Model(folder)
    _agree(folder, model)
    assert model.about.details["signature"] == "serving_default"
    expected = Model(_keras(tmp_path, network)).outputs([ROW])[0]
    (answer,) = model.outputs([ROW])
    for name, value in expected.items():
        assert answer[name] == pytest.approx(value, rel=1e-5)


class Texts(tf.Module):  # type: ignore[misc]
    """Texts and lists of any length in; a text and a number out."""

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, name="text"),
            tf.TensorSpec([None, None], tf.int64, name="marks"),
        ]
    )
    def __call__(self, text: Any, marks: Any) -> dict[str, Any]:
        points = tf.gather(tf.constant([0.0, 1.0, 10.0]), marks)
        return {"upper": tf.strings.upper(text, "utf-8"), "sum": tf.reduce_sum(points, 1)}


class Lines(tf.Module):  # type: ignore[misc]
    @tf.function(input_signature=[tf.TensorSpec([1, 2], tf.float32, name="x")])
    def __call__(self, x: Any) -> Any:
        return -x


def test_texts_and_rows_of_different_lengths(tmp_path: Path) -> None:
    folder = _saved(tmp_path, lambda place: _save_module(Texts(), place))
    model = Model(folder)
    _agree(folder, model)
    rows = [{"text": "olá 👍", "marks": [1, 2]}, {"text": "שלום", "marks": [2]}, {"text": "", "marks": [0, 0, 1]}]
    assert [(a["upper"], a["sum"]) for a in model.outputs(rows)] == [("OLÁ 👍", 11), ("שלום", 10), ("", 1)]
    problem = _refused(model, {"text": "a", "marks": [7]})
    assert (problem.code, problem.field) == ("prediction_refused", "inputs[0]")
    assert _refused(model, {"text": "a", "marks": [[1]]}).field == "inputs[0].marks[0]"


def _save_module(module: Any, place: str) -> None:
    tf.saved_model.save(module, place, signatures={"serving_default": module.__call__})


def test_a_fixed_batch_of_one_is_asked_row_by_row(tmp_path: Path) -> None:
    model = Model(_saved(tmp_path, lambda place: _save_module(Lines(), place)))
    assert model.outputs([[1, 2], [3, 4]]) == [[-1, -2], [-3, -4]]


def test_nothing_is_traced_after_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(_keras(tmp_path, _dense()))

    def traced(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was traced again")

    monkeypatch.setattr(keras.Sequential, "call", traced)
    for count in (1, 2, 7, 200):
        assert len(model.outputs([[0, 1, 2]] * count)) == count


def test_an_index_that_a_layer_does_not_know_is_named(tmp_path: Path) -> None:
    words = keras.Input((4,), dtype="int32")
    model = Model(_keras(tmp_path, keras.Model(words, keras.layers.Embedding(9, 2)(words))))
    assert len(model.outputs([[1, 2, 0, 8]])[0]) == 4
    problem = _refused(model, [1, 2, 0, 99])
    assert problem.code == "prediction_refused"
    assert "99 is not in [0, 9)" in problem.detail


def test_texts_may_be_made_into_numbers_by_the_model(tmp_path: Path) -> None:
    """The words lie in the file as an asset of its own, and an axis of any length is between the layers."""
    words = keras.layers.TextVectorization(max_tokens=20, output_sequence_length=4)
    words.adapt(["a good dog", "a bad cat"])
    text = keras.Input((), dtype="string", name="text")
    network = keras.Model(text, keras.layers.GlobalAveragePooling1D()(keras.layers.Embedding(20, 3)(words(text))))
    folder = _keras(tmp_path, network)
    model = Model(folder)
    _agree(folder, model)
    rows = ["good dog", "猫 👍"]
    assert np.allclose(model.outputs(rows), network(tf.constant(rows), training=False).numpy(), rtol=1e-6)
    assert model.outputs([{"text": "good dog"}]) == model.outputs(["good dog"])


def test_requests_that_run_together_are_answered_each_alone(tmp_path: Path) -> None:
    model = Model(_saved(tmp_path, lambda place: _save_module(Texts(), place)))
    requests = [[{"text": f"t{i}", "marks": [1] * (1 + i % 3)}] * (1 + i % 4) for i in range(20)]
    requests[7] = [{"text": "bad", "marks": [9]}]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(model.together(rows) for rows in requests), return_exceptions=True)

    answers = asyncio.run(all_at_once())
    assert isinstance(answers[7], Problem)
    assert answers[7].code == "prediction_refused"
    for at, (rows, answer) in enumerate(zip(requests, answers, strict=True)):
        if at != 7:
            assert [each["sum"] for each in answer] == [len(row["marks"]) for row in rows]
            assert [each["upper"] for each in answer] == [f"T{at}"] * len(rows)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    """An upload of it is refused; a folder that came another way does not start either."""
    code = keras.layers.Lambda(lambda x: setattr(__import__("sys"), "ekiben_was_run", True) or x)
    folder = _keras(tmp_path, keras.Sequential([keras.Input((1,)), code]))
    del sys.ekiben_was_run  # type: ignore[attr-defined]  # building it ran it, here where it was made
    with pytest.raises(UserError, match="lambda"):
        _recognised(folder)
    with pytest.raises(StartError) as raised:
        Model(folder)
    assert raised.value.code == "model_load_failed"
    assert not hasattr(sys, "ekiben_was_run")


def test_an_operator_that_is_not_listed_does_not_start(tmp_path: Path) -> None:
    """A folder that came another way than by an upload."""
    module = tf.Module()
    read = tf.function(lambda x: {"y": tf.io.read_file(x[0])}, input_signature=[tf.TensorSpec([None], tf.string)])
    module.serve = read
    folder = _saved(tmp_path, lambda place: tf.saved_model.save(module, place, signatures=module.serve))
    with pytest.raises(StartError, match="ReadFile") as raised:
        Model(folder)
    assert raised.value.code == "model_load_failed"


def test_the_list_of_operators_is_that_of_uploads() -> None:
    assert operators() == accepted()


@pytest.mark.parametrize("how", ["a link", "an external data set", "a virtual data set"])
def test_weights_that_point_to_another_file_are_not_read(tmp_path: Path, how: str) -> None:
    _keras(tmp_path, _dense())
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as file:
        file["0"] = np.ones((3, 4), np.float32)
    with zipfile.ZipFile(tmp_path / "saved.keras") as whole:
        members = {name: whole.read(name) for name in whole.namelist()}
    weights = io.BytesIO(members["model.weights.h5"])
    with h5py.File(weights, "r+") as file:
        found: list[str] = []
        file.visititems(lambda name, item: found.append(name) if getattr(item, "shape", None) == (3, 4) else None)
        del file[found[0]]
        if how == "a link":
            file[found[0]] = h5py.ExternalLink(str(secret), "0")
        elif how == "an external data set":
            file.create_dataset(found[0], (3, 4), np.float32, external=[(str(secret), 0, 48)])
        else:
            layout = h5py.VirtualLayout((3, 4), np.float32)
            layout[:] = h5py.VirtualSource(str(secret), "0", (3, 4))
            file.create_virtual_dataset(found[0], layout)
    members["model.weights.h5"] = weights.getvalue()
    with zipfile.ZipFile(tmp_path / "changed.keras", "w") as changed:
        for name, data in members.items():
            changed.writestr(name, data)
    files = {"m.keras": tmp_path / "changed.keras"}
    with pytest.raises(StartError) as raised:
        Model(write_model(tmp_path / "n", kind="tensorflow", format="keras-v3", files=files))
    assert raised.value.code == "model_load_failed"


def test_a_keras_model_that_mlflow_saved_is_served_as_it_is(tmp_path: Path) -> None:
    mlflow = importlib.import_module("mlflow.keras")
    chain = _dense()
    mlflow.save_model(chain, str(tmp_path / "logged"), pip_requirements=["keras"])
    files = {p.relative_to(tmp_path).as_posix(): p for p in (tmp_path / "logged").rglob("*") if p.is_file()}
    folder = write_model(tmp_path / "m", kind="tensorflow", format="keras-v3", files=files)
    found = _recognised(folder)
    assert (found.format, found.path) == ("keras-v3", "logged/data/model.keras")
    model = Model(folder)
    _agree(folder, model)
    assert np.allclose(model.outputs([[1, 2, 3]]), chain(np.array([[1.0, 2.0, 3.0]])).numpy(), rtol=1e-6)


def test_what_was_never_built_or_is_damaged_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="does not say what it takes"):
        Model(_keras(tmp_path, keras.Sequential([keras.layers.Dense(1)])))
    folder = _keras(tmp_path, _dense())
    data = folder.path().read_bytes()
    for broken in (data[: len(data) // 2], b"", b"PK\x03\x04"):
        folder.path().write_bytes(broken)
        with pytest.raises(StartError, match=r"m\.keras"):
            Model(folder)
    saved = _saved(tmp_path, lambda place: _save_module(Lines(), place))
    path = next(saved.path(name) for name in saved.files if name.endswith("saved_model.pb"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StartError, match="SavedModel"):
        Model(saved)


class Called(tf.Module):  # type: ignore[misc]
    """A function of rows of two numbers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.count = tf.Variable(0.0)
        signature = [tf.TensorSpec([None, 2], tf.float32, name="x")]
        self.function = tf.function(lambda x: function(self, x), input_signature=signature, autograph=False)


def _called(tmp_path: Path, function: Any) -> Model:
    module = Called(function)
    signatures = {"serving_default": module.function}
    return Model(_saved(tmp_path, lambda place: tf.saved_model.save(module, place, signatures=signatures)))


@pytest.mark.parametrize(
    ("function", "row", "truth"),
    [
        (lambda _, x: x - tf.reduce_mean(x, 0, keepdims=True), [1, 3], [0, 0]),
        (lambda _, x: tf.where(x > 0.5), [1, 0], [[0, 0]]),
        (lambda _, x: tf.transpose(x), [1, 3], [[1], [3]]),
        (lambda _, x: tf.reverse(x, [0]), [1, 3], [1, 3]),
        (lambda _, x: x + tf.cast(tf.reduce_any(x > 1e9), tf.float32), [1, 3], [1, 3]),
    ],
    ids=["normalised", "boxes", "turned", "reversed", "a rare signal"],
)
def test_no_request_is_answered_with_what_another_asked(tmp_path: Path, function: Any, row: Any, truth: Any) -> None:
    """Rows of several requests went into one call: one caller got another's finds."""
    model = _called(tmp_path, function)
    assert model.about.details["rows_share_a_call"] == "row"
    others = [[float(i), -float(i)] for i in range(8)]

    async def all_at_once() -> list[Any]:
        return await asyncio.gather(*(model.together([each]) for each in [*others, row, *others]))

    answers = asyncio.run(all_at_once())
    assert answers[len(others)] == [truth]
    assert answers[: len(others)] == answers[len(others) + 1 :]


def test_a_model_that_remembers_its_calls_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="depends on the calls before"):
        _called(tmp_path, lambda module, x: x + module.count.assign_add(1.0))


def test_layers_that_answer_each_row_by_itself_share_calls(tmp_path: Path) -> None:
    loop = keras.Sequential([keras.Input((3, 2)), keras.layers.LSTM(2), keras.layers.Dense(1)])
    assert Model(_keras(tmp_path, loop)).about.details["rows_share_a_call"] == "requests"
    steps = keras.Input((3, 2))
    mixed = keras.Model(steps, keras.layers.Softmax(axis=-3)(keras.layers.LSTM(2, return_sequences=True)(steps)))
    assert Model(_keras(tmp_path / "mixed", mixed)).about.details["rows_share_a_call"] == "row"
