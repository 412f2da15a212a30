"""Keras networks of pictures: what is loaded is what was saved, and what cannot be served is refused with words."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bentos.serving import StartError
from bentos.serving.networks import Network, tensorflow
from bentos.training import keras_files

tensorflow()
import keras  # noqa: E402
from keras import layers  # noqa: E402


def network(side: int = 8, dtype: str = "uint8", last: Any = None) -> Any:
    pictures = keras.Input((side, side, 3), dtype=dtype)
    x = layers.Rescaling(1 / 255)(pictures)
    x = layers.Conv2D(4, 3, activation="relu")(x)
    x = layers.Conv2D(4, 3, activation="relu")(x)
    return keras.Model(pictures, (last or layers.GlobalAveragePooling2D())(x))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    keras_files.start(1)
    model = network()
    path = tmp_path_factory.mktemp("networks") / "n.keras"
    path.write_bytes(keras_files.keras_bytes(model))
    return model, path


def test_answers_are_keras_own_whatever_comes_together(saved: tuple[Any, Path]) -> None:
    model, path = saved
    loaded = Network.load(path, most=4)
    assert (loaded.height, loaded.width, loaded.shape) == (8, 8, (4,))
    assert loaded.parameters == model.count_params()
    pictures = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)
    wanted = np.asarray(keras.ops.convert_to_numpy(model(pictures)))
    for count in range(1, 12):
        answers = loaded.run(pictures[:count])
        assert answers.dtype == np.float32
        assert answers == pytest.approx(wanted[:count], abs=1e-6)


def test_the_same_weights_are_the_same_file(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    assert keras_files.keras_bytes(model) == path.read_bytes()
    keras_files.start(1)  # another network with other addresses
    assert keras_files.keras_bytes(network()) == path.read_bytes()
    model.save(tmp_path / "plain.keras")
    with zipfile.ZipFile(tmp_path / "plain.keras") as plain, zipfile.ZipFile(path) as canonical:
        assert sorted(plain.namelist()) == sorted(canonical.namelist())
        assert plain.read("model.weights.h5") == canonical.read("model.weights.h5")
    keras_files.start(2)
    assert keras_files.keras_bytes(network()) != path.read_bytes()


def lambda_layer() -> Any:
    return layers.Lambda(lambda x: x[:, 0, 0, :])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: network(dtype="float32"), "float32"),
        (lambda: network(side=None), "[None, None, None, 3]"),  # type: ignore[arg-type]
        (lambda: network(last=lambda_layer()), "cannot be loaded by Keras"),
    ],
)
def test_what_cannot_be_served_is_refused(make: Callable[[], Any], said: str, tmp_path: Path) -> None:
    path = tmp_path / "n.keras"
    make().save(path)
    with pytest.raises(StartError) as refused:
        Network.load(path)
    assert refused.value.code == "model_load_failed"
    assert said in refused.value.message
    assert "uint8" in (refused.value.hint or "")


def test_two_outputs_and_damage_are_refused(saved: tuple[Any, Path], tmp_path: Path) -> None:
    model, path = saved
    keras.Model(model.inputs, [*model.outputs, *model.outputs]).save(tmp_path / "two.keras")
    with pytest.raises(StartError, match="2 outputs"):
        Network.load(tmp_path / "two.keras")
    (tmp_path / "cut.keras").write_bytes(path.read_bytes()[:-200])
    with pytest.raises(StartError, match="cannot be loaded"):
        Network.load(tmp_path / "cut.keras")


def _less_the_mean(x: Any) -> Any:
    means = layers.GlobalAveragePooling2D()(x)
    return means - keras.ops.mean(means, axis=0, keepdims=True)


def test_pictures_that_change_one_another_go_one_by_one(saved: tuple[Any, Path], tmp_path: Path) -> None:
    _, path = saved
    assert Network.load(path, most=4).sharing == {"rows_share_a_call": "requests"}
    model = network(last=_less_the_mean)
    model.save(tmp_path / "n.keras")
    loaded = Network.load(tmp_path / "n.keras", most=4)
    assert (loaded.most, loaded.sharing["rows_share_a_call"]) == (1, "row")
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    assert loaded.run(pictures) == pytest.approx(np.zeros((3, 4)), abs=1e-6)
