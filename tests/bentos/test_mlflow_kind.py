"""The kind mlflow: folders that MLflow itself writes are recognised, served as their libraries answer, or refused."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import mlflow.lightgbm
import mlflow.onnx
import mlflow.pyfunc
import mlflow.sklearn
import mlflow.xgboost
import numpy as np
import pandas as pd
import pytest
import xgboost
from mlflow.models import ModelSignature, infer_signature
from mlflow.types.schema import ColSpec, Schema
from onnx import TensorProto, helper
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

from bentos.mlflow.model import Model
from bentos.serving import ModelFolder, Problem, StartError, write_model
from ekiben import _sample
from registry.errors import UserError
from registry.formats import Recognised, recognise
from registry.signature import Column, check_sample

FRAME = pd.DataFrame({"my age": np.arange(40.0), "n": np.arange(40) % 7})
TARGET = (FRAME["my age"] + FRAME["n"] > 22).astype(int)
ROWS = FRAME[10:14].to_dict("records")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., dict[str, bytes]]:
    """Calls a flavour's save_model; gives the files of the folder, in a folder of their own as an archive has it."""
    count = iter(range(100))

    def save(flavour: Any, model: Any, **more: Any) -> dict[str, bytes]:
        folder = tmp_path / f"saved-{next(count)}"
        flavour.save_model(model, folder, pip_requirements=["numpy"], **more)
        return {f"churn/{p.relative_to(folder).as_posix()}": p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    return save


def _see(files: dict[str, bytes]) -> Recognised:
    return recognise({name: len(data) for name, data in files.items()}, lambda name: io.BytesIO(files[name]))


def _refused(files: dict[str, bytes]) -> UserError:
    with pytest.raises(UserError) as raised:
        _see(files)
    return raised.value


def _folder(tmp_path: Path, files: dict[str, bytes]) -> ModelFolder:
    return write_model(tmp_path / "m", kind="mlflow", format="mlflow", files=files)


def _problem(model: Model, row: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        model.outputs([row])
    return raised.value


def _booster() -> lightgbm.Booster:
    return lightgbm.train({"verbose": -1, "objective": "binary"}, lightgbm.Dataset(FRAME, TARGET), 3)


def test_of_two_folders_the_one_that_was_recognised_is_served(saved: Any, tmp_path: Path) -> None:
    """By its path as text `a-b/…` comes before `a/…`, by its parts after it."""
    twice = lightgbm.train(
        {"verbose": -1, "objective": "binary", "learning_rate": 0.5}, lightgbm.Dataset(FRAME, TARGET), 3
    )
    files: dict[str, bytes] = {}
    for name, booster in (("a-b", _booster()), ("a", twice)):
        made = saved(mlflow.lightgbm, booster)
        text = made.pop("churn/model.lgb")
        files |= {path.replace("churn/", f"{name}/"): data for path, data in made.items()}
        files[f"{name}/model.lgb"] = text
    assert _refused(files).code == "several_models"
    found = _see({path: data for path, data in files.items() if path != "a/model.lgb"})
    assert found.path == "a-b/MLmodel"
    named = write_model(tmp_path / "n", kind="mlflow", format="mlflow", files=files, model=found.path)
    rows = [{name.replace(" ", "_"): value for name, value in row.items()} for row in ROWS]
    assert Model(named).outputs(rows) == pytest.approx(_booster().predict(FRAME[10:14]).tolist())
    with pytest.raises(StartError, match="2 of them could be its mlflow model"):
        Model(_folder(tmp_path, files))


def test_a_booster_is_served_by_the_columns_of_its_signature(saved: Any, tmp_path: Path) -> None:
    booster = _booster()  # which calls the column my_age
    signature = infer_signature(FRAME, booster.predict(FRAME))
    files = saved(mlflow.lightgbm, booster, signature=signature, input_example=FRAME[:3])
    found = _see(files)
    assert (found.format, found.path) == ("mlflow", "churn/MLmodel")
    assert found.signature is not None
    assert found.signature.columns == (Column("my age", "number"), Column("n", "int"))
    assert check_sample(found.signature, found.example) == 3
    model = Model(_folder(tmp_path, files))
    truth = booster.predict(FRAME[10:14]).tolist()
    assert model.outputs(ROWS) == truth
    assert model.outputs([list(row.values()) for row in ROWS]) == truth
    assert model.outputs([dict(reversed(row.items())) for row in ROWS]) == truth
    assert model.about.classes == [0, 1]
    assert len(model.outputs(model.about.example["inputs"])) == 1
    assert _problem(model, {"my age": 1.0, "n": 1.5}).field == "inputs[0].n"
    assert _problem(model, {"my age": "1", "n": 1}).field == "inputs[0].my age"
    assert _problem(model, {"my age": 1.0}).code == "missing_column"
    assert _problem(model, {"my age": 1.0, "n": 1, "x": 0}).code == "unknown_column"
    assert _problem(model, [1.0]).code == "wrong_width"


def test_columns_that_are_not_required_may_be_left_out(saved: Any, tmp_path: Path) -> None:
    booster = _booster()
    schema = Schema([ColSpec("double", "my age", required=False), ColSpec("long", "n")])
    files = saved(mlflow.lightgbm, booster, signature=ModelSignature(schema))
    known = _see(files).signature
    assert known is not None
    assert check_sample(known, {"inputs": [{"n": 3}, {"my age": None, "n": 3}]}) == 2
    model = Model(_folder(tmp_path, files))
    missing = booster.predict(pd.DataFrame({"my age": [np.nan], "n": [3]})).tolist()
    assert model.outputs([{"n": 3}]) == model.outputs([{"my age": None, "n": 3}]) == missing
    assert model.about.input is not None
    (record, _) = model.about.input["properties"]["inputs"]["items"]["anyOf"]
    assert record["required"] == ["n"]


@pytest.mark.parametrize("form", ["ubj", "json"])
def test_xgboost_in_both_formats(saved: Any, tmp_path: Path, form: str) -> None:
    booster = xgboost.train({"objective": "binary:logistic"}, xgboost.DMatrix(FRAME.to_numpy(), TARGET), 3)
    files = saved(mlflow.xgboost, booster, model_format=form, signature=infer_signature(FRAME))
    assert _see(files).format == "mlflow"
    model = Model(_folder(tmp_path, files))  # trained on an array: the signature alone has names
    truth = booster.predict(xgboost.DMatrix(FRAME[10:14].to_numpy())).tolist()
    assert model.outputs(ROWS) == truth
    assert _problem(model, {"f0": 1, "f1": 1}).code == "missing_column"


def test_scikit_learn_answers_by_the_method_it_was_logged_with(saved: Any, tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(FRAME, TARGET)
    files = saved(mlflow.sklearn, estimator, serialization_format="skops", signature=infer_signature(FRAME))
    assert Model(_folder(tmp_path, files)).outputs(ROWS) == estimator.predict(FRAME[10:14]).tolist()
    files = saved(mlflow.sklearn, estimator, serialization_format="skops", pyfunc_predict_fn="predict_proba")
    model = Model(_folder(tmp_path, files))
    assert model.outputs(ROWS) == estimator.predict_proba(FRAME[10:14]).tolist()
    assert model.about.input is not None
    assert set(model.about.input["properties"]) == {"inputs"}


def test_a_model_of_texts(saved: Any, tmp_path: Path) -> None:
    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(["good dog", "bad cat"] * 20, [1, 0] * 20)
    signature = ModelSignature(Schema([ColSpec("string", "text")]))
    files = saved(mlflow.sklearn, estimator, serialization_format="skops", signature=signature)
    assert _see(files).format == "mlflow"
    model = Model(_folder(tmp_path, files))
    assert model.outputs([{"text": "good"}, ["bad"], "good"]) == [1, 0, 1]
    assert _problem(model, {"text": 3}).field == "inputs[0].text"


def test_onnx_takes_its_tensor_or_the_columns_of_a_frame(saved: Any, tmp_path: Path) -> None:
    shape = ("x", TensorProto.FLOAT, [None, 2]), ("y", TensorProto.FLOAT, [None, 2])
    infos = [helper.make_tensor_value_info(*each) for each in shape]
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", infos[:1], infos[1:])
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    network.ir_version = 9
    array = np.ones((2, 2), np.float32)
    files = saved(mlflow.onnx, network, signature=infer_signature(array, array), input_example=array)
    found = _see(files)
    assert found.example == {"inputs": [[1, 1], [1, 1]]}
    model = Model(_folder(tmp_path, files))
    assert model.outputs([[1, 2]]) == [[-1, -2]]
    framed = Model(_folder(tmp_path, saved(mlflow.onnx, network, signature=infer_signature(FRAME.astype(float)))))
    assert framed.outputs([{"n": 2, "my age": 1}]) == [[-1, -2]]


class Doubler(mlflow.pyfunc.PythonModel):
    def predict(self, context: Any, model_input: list[float], params: Any = None) -> list[float]:
        return [2 * each for each in model_input]


def test_flavours_that_are_code_are_refused_with_the_way_out(saved: Any, tmp_path: Path) -> None:
    estimator = LogisticRegression().fit(FRAME, TARGET)
    for form in ("cloudpickle", "pickle"):
        error = _refused(saved(mlflow.sklearn, estimator, serialization_format=form))
        assert error.code == "pickle_refused"
        assert "serialization_format='skops'" in str(error.hint)
    wrapped = lightgbm.LGBMClassifier(n_estimators=2, verbose=-1).fit(FRAME, TARGET)
    error = _refused(saved(mlflow.lightgbm, wrapped))
    assert error.code == "skops_untrusted_type"
    assert "model.booster_" in str(error.hint)
    mlflow.pyfunc.save_model(tmp_path / "own", python_model=Doubler(), pip_requirements=["numpy"])
    own = {p.name: p.read_bytes() for p in (tmp_path / "own").iterdir() if p.is_file()}
    assert _refused(own).code == "mlflow_flavour"
    (tmp_path / "mine.py").write_text("")
    signature = infer_signature(FRAME)
    error = _refused(saved(mlflow.lightgbm, _booster(), code_paths=[str(tmp_path / "mine.py")], signature=signature))
    assert error.code == "mlflow_flavour"
    assert "code of its own" in error.detail


def _changed(files: dict[str, bytes], change: Callable[[dict[str, Any]], Any]) -> dict[str, bytes]:
    import yaml

    body = yaml.safe_load(files["churn/MLmodel"])
    change(body)
    return {**files, "churn/MLmodel": yaml.safe_dump(body).encode()}


def test_what_mlmodel_says_is_checked(saved: Any, tmp_path: Path) -> None:
    files = saved(mlflow.lightgbm, _booster(), signature=infer_signature(FRAME))
    away = _changed(files, lambda body: body["flavors"]["lightgbm"].update(data="../model.lgb"))
    assert _refused(away).code == "mlflow_flavour"
    with pytest.raises(StartError, match="not there"):
        Model(_folder(tmp_path, away))
    other = _changed(files, lambda body: body["flavors"].update(xgboost=body["flavors"].pop("lightgbm")))
    assert _refused(other).code == "mlflow_flavour", "the file is not what the flavour says"
    wide = json.dumps([{"type": "double", "name": name, "required": True} for name in "abc"])
    more = _changed(files, lambda body: body["signature"].update(inputs=wide))
    assert _refused(more).code == "mlflow_flavour"
    with pytest.raises(StartError, match="3 columns"):
        Model(_folder(tmp_path, more))
    lines = ["a: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    endless = "\n".join([*lines, "flavors: {lightgbm: {data: *a29}}", "mlflow_version: *a29"])
    assert _refused({**files, "churn/MLmodel": endless.encode()}).code == "mlflow_flavour"
    with pytest.raises(StartError, match="not there"):
        Model(_folder(tmp_path, {**files, "churn/MLmodel": endless.encode()}))
    for text in (
        b"{[",
        b"a: !!int ''",
        b"a: !!timestamp x",
        b"a: !!python/object/apply:os.system ['true']",
        b"[" * 5000,
        b"x: " + b"y" * (2 << 20),
    ):
        assert _refused({**files, "churn/MLmodel": text}).code == "invalid_model"
        with pytest.raises(StartError, match="MLmodel"):
            Model(_folder(tmp_path, {**files, "churn/MLmodel": text}))


def test_values_of_a_signature_keep_their_type(saved: Any, tmp_path: Path) -> None:
    rows = 60
    ids = np.array([2**53 + i % 8 for i in range(rows)])
    frame = pd.DataFrame(
        {
            "id": ids,
            "word": pd.Series(np.array(["a", "b", None], dtype=object)[np.arange(rows) % 3], dtype=object),
            "day": pd.Series(pd.date_range("2024-01-01", periods=6).repeat(10)).astype("datetime64[ns]"),
            "short": np.array([0.1, 0.2, 0.7], dtype="float32")[np.arange(rows) % 3],
            "yes": np.arange(rows) % 2 == 0,
        }
    )
    columns = make_column_transformer((OneHotEncoder(), list(frame.columns)))
    pipeline = make_pipeline(columns, Ridge()).fit(frame, np.arange(rows))
    typed = [("long", "id"), ("string", "word"), ("datetime", "day"), ("float", "short"), ("boolean", "yes")]
    signature = ModelSignature(Schema([ColSpec(kind, name, required=name != "word") for kind, name in typed]))
    files = saved(mlflow.sklearn, pipeline, signature=signature, serialization_format="skops")
    assert _see(files).format == "mlflow"
    model = Model(_folder(tmp_path, files))
    asked = json.loads(json.dumps(_sample.rows(frame)))
    assert model.outputs(asked) == pipeline.predict(frame).tolist()
    by_hand = {"id": 2**53 + 1, "day": "2024-01-01", "short": 0.2, "yes": 1}  # word is left out, so None
    same = frame[1:2].assign(word=pd.Series([None], dtype=object, index=[1]), yes=True)
    assert model.outputs([by_hand]) == pipeline.predict(same).tolist()
    for field, wrong in (("id", 1.5), ("day", "2024-01-01T00:00:00Z"), ("day", 5), ("short", 1e39), ("yes", 2)):
        assert _problem(model, {**by_hand, field: wrong}).field == f"inputs[0].{field}"


def test_levels_of_lightgbm_are_found_whatever_their_type(saved: Any, tmp_path: Path) -> None:
    rows = 400
    ids, flags = np.array([2**53, 2**53 + 1, 2**53 + 2]), np.array([True, False])
    frame = pd.DataFrame(
        {"id": pd.Categorical(ids[np.arange(rows) % 3]), "flag": pd.Categorical(flags[np.arange(rows) % 2])}
    )
    frame.loc[::7, "id"] = None
    target = np.arange(rows) % 3 + 10.0 * (np.arange(rows) % 2) + 100.0 * (np.arange(rows) % 7 == 0)
    booster = lightgbm.train({"verbose": -1, "min_data_per_group": 1}, lightgbm.Dataset(frame, target), 5)
    model = Model(_folder(tmp_path, saved(mlflow.lightgbm, booster)))
    asked = json.loads(json.dumps(_sample.rows(frame[:12])))
    assert model.outputs(asked) == booster.predict(frame[:12]).tolist()
    assert len(set(model.outputs(asked))) > 6
