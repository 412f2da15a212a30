"""Keras models are written so that the kind which serves them answers as they did in the user's process."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bentos.serving import golden, write_model
from bentos.serving.networks import tensorflow
from bentos.tensorflow.model import Model
from ekiben import ExportError
from ekiben._export import Exported, export
from registry.formats import recognise
from registry.signature import check_sample

tf = tensorflow()
keras = tf.keras


def _served(exported: Exported, tmp_path: Path) -> Any:
    """As the server does it: recognise the file, check the sample, load, predict, compare with what was expected."""
    (file,) = exported.files
    found = recognise({file.name: file.stat().st_size}, lambda _: io.BytesIO(file.read_bytes()))
    sample = json.loads(json.dumps(exported.sample, allow_nan=False))
    assert found.format == "keras-v3"
    assert found.signature is not None
    assert check_sample(found.signature, sample) == len(sample["inputs"])
    model = Model(write_model(tmp_path / "m", kind="tensorflow", format=found.format, files={file.name: file}))
    answer = {"outputs": model.outputs(sample["inputs"])}
    compared = golden.compare(exported.expected, answer, 1e-5, 1e-6)
    assert compared.difference is None
    assert compared.matched == len(sample["inputs"])
    return answer["outputs"]


def _several(dictionary: bool) -> Any:
    usage, plan = keras.Input((3,), name="usage"), keras.Input((1,), name="plan", dtype="string")
    coded = keras.layers.StringLookup(vocabulary=["basic", "pro"], output_mode="one_hot")(plan)
    joined = keras.layers.Concatenate()([usage, coded])
    inputs = {"plan": plan, "usage": usage} if dictionary else [usage, plan]
    outputs = [keras.layers.Dense(1, name="leaves")(joined), keras.layers.Dense(2, name="spends")(joined)]
    return keras.Model(inputs, dict(zip(("leaves", "spends"), outputs, strict=True)) if dictionary else outputs)


def test_a_chain_of_layers_takes_arrays_and_frames(tmp_path: Path) -> None:
    chain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3, "softmax")])
    rows = np.random.default_rng(0).normal(size=(6, 4))
    answers = _served(export(chain, tmp_path, rows), tmp_path)
    assert np.allclose(answers, chain.predict(rows, verbose=0), rtol=1e-5)
    framed = export(chain, tmp_path, pd.DataFrame(rows, columns=list("abcd")))
    assert framed.sample == {"inputs": rows.tolist()}, "one tensor has no columns of its own"
    assert _served(framed, tmp_path) == answers


@pytest.mark.parametrize("dictionary", [False, True])
def test_several_inputs_and_outputs_by_name(tmp_path: Path, dictionary: bool) -> None:
    model = _several(dictionary)
    usage = np.random.default_rng(1).normal(size=(3, 3)).round(3)
    plans = np.array(["pro", "basic", "other"])
    exported = export(model, tmp_path, {"usage": usage, "plan": plans})
    assert exported.sample == {
        "inputs": [{"usage": u, "plan": p} for u, p in zip(usage.tolist(), plans.tolist(), strict=True)]
    }
    answers = _served(exported, tmp_path)
    assert set(answers[0]) == {"leaves", "spends"}
    listed = export(model, tmp_path, exported.sample["inputs"])
    assert (listed.sample, listed.expected) == (exported.sample, exported.expected)
    with pytest.raises(ExportError, match="different numbers of rows"):
        export(model, tmp_path, {"usage": usage, "plan": plans[:2]})


def test_pictures(tmp_path: Path) -> None:
    network = keras.Sequential([keras.Input((8, 8, 3), dtype="uint8"), keras.layers.Rescaling(1 / 255),
                                keras.layers.Conv2D(2, 3), keras.layers.GlobalAveragePooling2D()])  # fmt: skip
    pictures = np.random.default_rng(2).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert len(_served(export(network, tmp_path, pictures), tmp_path)[0]) == 2


def test_without_a_sample_only_the_file_is_written(tmp_path: Path) -> None:
    exported = export(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]), tmp_path)
    assert (exported.sample, exported.expected) == (None, None)
    assert exported.files[0].name == "model.keras"


class Mine(keras.layers.Layer):  # type: ignore[misc]
    def call(self, values: Any) -> Any:
        return values


class Subclass(keras.Model):  # type: ignore[misc]
    def call(self, values: Any) -> Any:
        return values


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    inner = keras.Sequential([keras.Input((1,)), keras.layers.Lambda(lambda x: x)])
    cases = [
        (keras.Sequential([keras.layers.Dense(1)]), None, "not_fitted"),
        (Subclass(), None, "not_fitted"),
        (keras.Sequential([keras.Input((1,)), Mine()]), None, "cannot_export"),
        (keras.Sequential([keras.Input((1,)), inner]), None, "cannot_export"),
        (keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), [[1.0]], "bad_sample"),
    ]
    for model, sample, code in cases:
        with pytest.raises(ExportError) as caught:
            export(model, tmp_path, sample)
        assert caught.value.code == code
        assert caught.value.hint
        assert "Traceback" not in str(caught.value)
