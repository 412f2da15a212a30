"""Model objects are written so that the written file predicts what the object predicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest
import xgboost
from sklearn.compose import make_column_transformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from ekiben import ExportError
from ekiben._export import export


@pytest.fixture(scope="module")
def table() -> tuple[pd.DataFrame, pd.Series]:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "age": rng.integers(18, 80, 300).astype(float),
            "spend": rng.normal(50, 20, 300),
            "plan": pd.Categorical(rng.choice(["free", "pro", "team"], 300)),
        }
    )
    frame.loc[::7, "spend"] = np.nan
    target = (frame["age"] + frame["plan"].cat.codes * 10 > 55).astype(int)
    return frame, target


def rows(exported: Any) -> pd.DataFrame:
    """The sample as a server gets it: parsed from JSON."""
    return pd.DataFrame(json.loads(json.dumps(exported.sample, allow_nan=False))["inputs"])


def test_a_lightgbm_classifier_with_categories_and_missing_values(table: Any, tmp_path: Path) -> None:
    frame, target = table
    model = lightgbm.LGBMClassifier(n_estimators=5, verbose=-1).fit(frame, target)
    exported = export(model, tmp_path, frame[:20])
    served = lightgbm.Booster(model_file=str(exported.files[0]))
    sent = rows(exported)
    sent["plan"] = pd.Categorical(sent["plan"], categories=["free", "pro", "team"])
    assert exported.expected is not None
    assert np.allclose(served.predict(sent), exported.expected["outputs"], rtol=1e-12)
    assert np.allclose(exported.expected["outputs"], model.predict_proba(frame[:20])[:, 1], rtol=1e-12)


def test_a_lightgbm_booster_stops_at_its_best_iteration(table: Any, tmp_path: Path) -> None:
    frame, target = table
    data = lightgbm.Dataset(frame[["age", "spend"]], target)
    booster = lightgbm.train({"verbose": -1, "objective": "binary"}, data, 20)
    booster.best_iteration = 3
    exported = export(booster, tmp_path, frame[["age", "spend"]][:10])
    served = lightgbm.Booster(model_file=str(exported.files[0]))
    assert served.num_trees() == 3
    assert exported.expected is not None
    assert np.allclose(served.predict(rows(exported)), exported.expected["outputs"])


@pytest.mark.parametrize("wrapped", [True, False])
def test_xgboost(wrapped: bool, table: Any, tmp_path: Path) -> None:
    frame, target = table
    numbers = frame[["age", "spend"]]
    model: Any = xgboost.XGBClassifier(n_estimators=5).fit(numbers, target)
    model = model if wrapped else model.get_booster()
    exported = export(model, tmp_path, numbers[:15])
    served = xgboost.Booster(model_file=exported.files[0])
    assert exported.expected is not None
    assert np.allclose(served.predict(xgboost.DMatrix(rows(exported))), exported.expected["outputs"], rtol=1e-6)


def test_xgboost_trained_on_names_predicts_an_array_sample(table: Any, tmp_path: Path) -> None:
    frame, target = table
    model = xgboost.XGBRegressor(n_estimators=3).fit(frame[["age", "spend"]], target)
    exported = export(model, tmp_path, frame[["age", "spend"]].to_numpy()[:5])
    assert exported.sample is not None
    assert isinstance(exported.sample["inputs"][0], list)
    assert exported.expected is not None
    assert np.allclose(model.predict(frame[["age", "spend"]][:5]), exported.expected["outputs"])


def _stopped_early(frame: pd.DataFrame, target: Any, **more: Any) -> xgboost.XGBRegressor:
    model = xgboost.XGBRegressor(n_estimators=100, early_stopping_rounds=2, **more)
    noise = np.random.default_rng(1).normal(size=len(frame))
    model.fit(frame[:200], target[:200] + noise[:200], eval_set=[(frame[200:], target[200:] + noise[200:])], verbose=0)
    assert model.best_iteration + 1 < model.get_booster().num_boosted_rounds()
    return model


@pytest.mark.parametrize("booster", ["gbtree", "dart"])
def test_an_xgboost_estimator_that_stopped_early_is_written_as_it_predicts(
    booster: str, table: Any, tmp_path: Path
) -> None:
    frame = table[0][["age", "spend"]]
    model = _stopped_early(frame, table[1], booster=booster, rate_drop=0.2 if booster == "dart" else None)
    exported = export(model, tmp_path, frame[:20])
    served = xgboost.Booster(model_file=exported.files[0])
    assert exported.expected is not None
    assert exported.expected["outputs"] == model.predict(frame[:20]).tolist()
    assert served.predict(xgboost.DMatrix(rows(exported))).tolist() == exported.expected["outputs"]
    assert model.get_booster().num_boosted_rounds() > served.num_boosted_rounds(), "the user's own is as it was"


def test_a_booster_that_stopped_early_is_written_whole(table: Any, tmp_path: Path) -> None:
    frame = table[0][["age", "spend"]]
    booster = _stopped_early(frame, table[1]).get_booster()
    exported = export(booster, tmp_path, frame[:20])
    assert exported.expected is not None
    assert exported.expected["outputs"] == booster.predict(xgboost.DMatrix(frame[:20])).tolist()
    assert xgboost.Booster(model_file=exported.files[0]).num_boosted_rounds() == booster.num_boosted_rounds()


@pytest.mark.parametrize("missing", [0, -999.0])
def test_what_an_xgboost_estimator_takes_for_missing_goes_into_the_file(
    missing: float, table: Any, tmp_path: Path
) -> None:
    frame = table[0][["age", "spend"]].fillna(missing)
    model = xgboost.XGBRegressor(n_estimators=5, missing=missing).fit(frame, table[1])
    exported = export(model, tmp_path, frame[:20])
    served = xgboost.Booster(model_file=exported.files[0])
    assert float(served.attr("ekiben.missing") or "nan") == missing
    assert model.get_booster().attr("ekiben.missing") is None
    assert exported.expected is not None
    assert exported.expected["outputs"] == model.predict(frame[:20]).tolist()


def test_a_missing_that_is_not_a_number_is_refused(table: Any, tmp_path: Path) -> None:
    model = xgboost.XGBRegressor(n_estimators=2).fit(table[0][["age"]], table[1])
    model.missing = "?"
    with pytest.raises(ExportError, match="missing"):
        export(model, tmp_path)


def test_an_absent_entry_of_a_sparse_row_is_missing_for_xgboost(tmp_path: Path) -> None:
    import scipy.sparse

    data = scipy.sparse.random(200, 4, 0.5, format="csr", random_state=0)
    label = np.asarray(data.sum(axis=1)).ravel()
    model = xgboost.XGBRegressor(n_estimators=5).fit(data, label)
    exported = export(model, tmp_path, data[:20])
    assert exported.expected is not None
    assert exported.expected["outputs"] == model.predict(data[:20]).tolist()
    assert exported.sample is not None
    assert any(None in row for row in exported.sample["inputs"])
    served = xgboost.Booster(model_file=exported.files[0])
    again = served.predict(xgboost.DMatrix(np.array(exported.sample["inputs"], dtype=float)))
    assert again.tolist() == exported.expected["outputs"]


def test_an_absent_entry_of_a_sparse_row_is_zero_for_other_libraries(tmp_path: Path) -> None:
    import scipy.sparse

    data = scipy.sparse.random(200, 4, 0.5, format="csr", random_state=0)
    model = LogisticRegression().fit(data, np.arange(200) % 2)
    exported = export(model, tmp_path, data[:20])
    assert exported.sample is not None
    assert exported.sample["inputs"] == data[:20].toarray().tolist()


def test_a_sparse_sample_too_large_to_be_written_out_is_refused(tmp_path: Path) -> None:
    import scipy.sparse

    data = scipy.sparse.random(3000, 4000, 0.001, format="csr", random_state=0)
    with pytest.raises(ExportError, match="3000 rows of 4000 columns"):
        export(LogisticRegression(), tmp_path, data)


def test_a_sklearn_pipeline_with_strings(table: Any, tmp_path: Path) -> None:
    from skops import io

    frame, target = table
    frame = frame[["age", "plan"]].astype({"plan": object})
    model = make_pipeline(
        make_column_transformer((StandardScaler(), ["age"]), (OneHotEncoder(), ["plan"])), LogisticRegression()
    ).fit(frame, target)
    exported = export(model, tmp_path, frame[:10])
    served = io.load(exported.files[0], trusted=io.get_untrusted_types(file=exported.files[0]))
    assert exported.expected is not None
    assert exported.sample is not None
    assert exported.sample["method"] == "predict_proba"
    sent = pd.DataFrame(exported.sample["inputs"])
    assert np.allclose(served.predict_proba(sent), exported.expected["outputs"])


def test_onnx_is_written_as_it_is(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    shape = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 2])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, 2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [shape], [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    exported = export(model, tmp_path, [[1.0, -2.0]])
    assert onnx.load(exported.files[0]) == model
    assert exported.sample == {"inputs": [[1.0, -2.0]]}
    assert exported.expected == {"outputs": [[1.0, 0.0]]}
    framed = export(model, tmp_path, pd.DataFrame({"a": [1.0], "b": [-2.0]}))
    assert framed.sample == exported.sample, "a frame for one tensor has its rows there"


def test_onnx_with_an_output_of_one_column_is_expected_as_it_is_served(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    from bentos.formats.onnx import Model
    from bentos.serving import write_model

    weights = helper.make_tensor("w", TensorProto.FLOAT, [2, 1], [1.0, 2.0])
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, size]) for n, size in (("x", 2), ("y", 1))]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", infos[:1], infos[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    exported = export(model, tmp_path, [[1.0, 2.0], [3.0, 4.0]])
    files = {"model.onnx": exported.files[0]}
    served = Model(write_model(tmp_path / "m", kind="onnx", format="onnx", files=files))
    assert exported.sample is not None
    assert exported.expected == {"outputs": served.outputs(exported.sample["inputs"])}


def test_without_a_sample_nothing_is_predicted(table: Any, tmp_path: Path) -> None:
    frame, target = table
    model = lightgbm.LGBMRegressor(n_estimators=2, verbose=-1).fit(frame, target)
    exported = export(model, tmp_path)
    assert exported.sample is None
    assert exported.expected is None


@pytest.mark.parametrize(
    ("model", "sample", "code"),
    [
        (lightgbm.LGBMClassifier(), None, "not_fitted"),
        (xgboost.XGBClassifier(), None, "not_fitted"),
        (LogisticRegression(), [[1.0]], "not_fitted"),
        ({"a": "dict"}, None, "unknown_model"),
        (LogisticRegression().fit([[0.0], [1.0]], [0, 1]), [[1.0, 2.0]], "bad_sample"),
        (LogisticRegression().fit([[0.0], [1.0]], [0, 1]), [], "bad_sample"),
    ],
)
def test_what_cannot_be_exported_says_why(model: Any, sample: Any, code: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path, sample)
    assert caught.value.code == code
    assert caught.value.hint
    assert "Traceback" not in str(caught.value)
