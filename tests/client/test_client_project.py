"""`ekiben init` writes a project around a model file without ever loading the file."""

from __future__ import annotations

import bz2
import gzip
import pickle
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import lightgbm
import numpy as np
import pytest
import xgboost
import yaml
from sklearn.linear_model import LinearRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ekiben import UsageError, _project


class Mine(LinearRegression):  # type: ignore[misc]
    """A class of the user's own script."""


def pipeline() -> Any:
    return make_pipeline(StandardScaler(), LinearRegression()).fit(np.array([[1.0], [2.0]]), [2.0, 4.0])


def served(folder: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the written service answers, run as BentoML would import it."""
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "service", raising=False)
    import importlib

    module = importlib.import_module("service")
    try:
        model = module.Model.inner()
        answer: dict[str, Any] = module.Model.inner.predict.func(model, rows)
    finally:
        sys.modules.pop("service", None)
    return list(answer["outputs"])


@pytest.mark.parametrize(
    "form", ["joblib", "joblib.compressed", "pickle", "pickle.protocol2", "lightgbm", "xgboost", "onnx", "skops"]
)
def test_the_written_service_answers_as_the_model_does(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [[1.0], [3.0]]
    expected: Any = [2.0, 6.0]
    if form == "joblib":
        joblib.dump(pipeline(), file := tmp_path / "m.joblib")
    elif form == "joblib.compressed":
        joblib.dump(pipeline(), file := tmp_path / "m.joblib", compress=3)
    elif form == "pickle":
        (file := tmp_path / "m.pkl").write_bytes(pickle.dumps(pipeline()))
    elif form == "pickle.protocol2":
        (file := tmp_path / "m.pkl").write_bytes(pickle.dumps(pipeline(), protocol=2))
    elif form == "lightgbm":
        data = np.arange(100.0).reshape(-1, 1)
        booster = lightgbm.train({"verbose": -1}, lightgbm.Dataset(data, data[:, 0]), 3)
        booster.save_model(file := tmp_path / "m.txt")
        expected = booster.predict(np.array(rows)).tolist()
    elif form == "xgboost":
        data = np.arange(100.0).reshape(-1, 1)
        model = xgboost.XGBRegressor(n_estimators=3).fit(data, data[:, 0])
        model.save_model(file := tmp_path / "m.json")
        expected = model.predict(np.array(rows)).tolist()
    elif form == "onnx":
        from onnx import TensorProto, helper, save

        shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, 1]) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", shapes[:1], shapes[1:])
        onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        onnx_model.ir_version = 8
        save(onnx_model, file := tmp_path / "m.onnx")
        expected = [[-1.0], [-3.0]]
    else:
        from skops import io

        io.dump(pipeline(), file := tmp_path / "m.skops")
    made = _project.write(file, tmp_path / "project")
    assert made.files == ("service.py", "bentofile.yaml", "requirements.txt", file.name)
    assert (made.folder / file.name).read_bytes() == file.read_bytes()
    bentofile = yaml.safe_load((made.folder / "bentofile.yaml").read_text())
    assert bentofile["service"] == "service:Model"
    assert file.name in bentofile["include"]
    assert np.allclose(served(made.folder, rows, monkeypatch), expected)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_requirements_are_the_versions_of_the_packages_that_a_pickle_names(
    protocol: int, pack: Any, tmp_path: Path
) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(pack(pickle.dumps(pipeline(), protocol=protocol)))
    lines = (_project.write(file, tmp_path / "p").folder / "requirements.txt").read_text().splitlines()
    assert f"scikit-learn=={version('scikit-learn')}" in lines
    assert f"numpy=={version('numpy')}" in lines
    assert not any(line.startswith("xgboost") for line in lines)


def test_a_file_that_would_run_code_when_loaded_is_not_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    file = tmp_path / "trap.pkl"
    file.write_bytes(pickle.dumps(Trap()))
    _project.write(file, tmp_path / "p")
    assert not (tmp_path / "sprung").exists()


def test_classes_of_the_users_own_modules_are_told(tmp_path: Path) -> None:
    content = pickle.dumps(Mine().fit([[1.0], [2.0]], [1, 2]))
    for module, said in ((b"__main__", "__main__"), (b"features", "copy features.py into the project")):
        old = Mine.__module__.encode()
        assert old in content
        file = tmp_path / f"{module.decode()}.pkl"
        replaced = content.replace(bytes([len(old)]) + old, bytes([len(module)]) + module)
        file.write_bytes(replaced)
        notes = _project.write(file, tmp_path / f"p-{module.decode()}").notes
        assert any(said in note for note in notes), notes


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("notes.md", b"# hello", "unknown_format"),
        ("empty.joblib", b"", "empty_file"),
        ("service.py", b"tree\n", "bad_name"),
    ],
)
def test_what_is_no_model_is_refused_and_leaves_nothing(name: str, content: bytes, code: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        _project.write(file, tmp_path / "p")
    assert caught.value.code == code
    assert not (tmp_path / "p").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_bytes(b"tree\n")
    with pytest.raises(UsageError) as caught:
        _project.write(tmp_path / "m.txt", tmp_path)
    assert caught.value.code == "folder_exists"


def test_any_file_name_gives_valid_yaml_and_python(tmp_path: Path) -> None:
    file = tmp_path / """a "quoted" {name}: it's #1.txt"""
    file.write_bytes(b"tree\n")
    made = _project.write(file, tmp_path / "p")
    compile((made.folder / "service.py").read_text(), "service.py", "exec")
    assert made.files[-1] == "a-quoted-name-it-s-1.txt"
    assert made.files[-1] in yaml.safe_load((made.folder / "bentofile.yaml").read_text())["include"]
