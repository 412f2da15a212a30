"""The kind xgboost beside XGBoost itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xgboost

from bentos.formats.xgboost import Model
from bentos.serving import Problem, StartError, write_model

RNG = np.random.default_rng(2)
ROWS = 300


def _model(tmp_path: Path, booster: xgboost.Booster, file: str = "model.json") -> Model:
    booster.save_model(str(tmp_path / file))
    files = {"model": tmp_path / file}  # no ending: the content tells
    return Model(write_model(tmp_path / "m", kind="xgboost", format="xgboost-json", files=files))


@pytest.mark.parametrize("file", ["model.json", "model.ubj"])
@pytest.mark.parametrize(
    "params",
    [
        {"objective": "reg:squarederror"},
        {"objective": "binary:logistic"},
        {"objective": "multi:softprob", "num_class": 3},
        {"objective": "multi:softmax", "num_class": 3},
        {"objective": "rank:ndcg"},
        {"objective": "reg:squarederror", "booster": "dart"},
        {"objective": "reg:squarederror", "booster": "gblinear"},
    ],
    ids=lambda p: p["objective"] + p.get("booster", ""),
)
def test_every_objective_gives_what_xgboost_gives(tmp_path: Path, params: dict[str, Any], file: str) -> None:
    data = RNG.normal(size=(ROWS, 4))
    label = (data[:, 0] > 0).astype(int)
    rows = xgboost.DMatrix(data, label, qid=np.repeat(range(30), 10) if "rank" in params["objective"] else None)
    booster = xgboost.train({"nthread": 1, **params}, rows, 8)
    model = _model(tmp_path, booster, file)
    assert model.outputs(data.tolist()) == booster.predict(xgboost.DMatrix(data)).tolist()


def test_categories_of_text_and_whole_numbers_are_taken_by_value(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "number": RNG.normal(size=ROWS),
            "word": pd.Categorical(RNG.choice(["zurich", "seoul", "x"], ROWS)),
            "count": pd.Categorical(RNG.choice([10, 2, 7], ROWS)),
        }
    )
    label = (frame["word"] == "x") * 2 + (frame["count"] == 7)
    booster = xgboost.train({"nthread": 1}, xgboost.DMatrix(frame, label, enable_categorical=True), 8)
    model = _model(tmp_path, booster)
    rows = frame.head(50).astype(object).to_dict("records")
    truth = booster.predict(xgboost.DMatrix(frame.head(50), enable_categorical=True))
    assert model.outputs(rows) == truth.tolist()
    with pytest.raises(Problem) as raised:
        model.outputs([{**rows[0], "word": "paris"}])
    assert raised.value.field == "inputs[0].word"


@pytest.mark.parametrize("words", [["zürich", "서울", "x"], ["b", "c", "éa"]], ids=str)
def test_category_names_that_xgboost_damages_are_refused_and_not_guessed(tmp_path: Path, words: list[str]) -> None:
    frame = pd.DataFrame({"word": pd.Categorical(words * 20)})
    booster = xgboost.train({"nthread": 1}, xgboost.DMatrix(frame, np.arange(60) % 3, enable_categorical=True), 2)
    with pytest.raises(StartError, match="not ASCII"):
        _model(tmp_path, booster)


def _stopped_early(data: Any, label: Any) -> xgboost.XGBRegressor:
    regressor = xgboost.XGBRegressor(n_estimators=200, early_stopping_rounds=3, n_jobs=1)
    regressor.fit(data[:200], label[:200], eval_set=[(data[200:], label[200:])], verbose=False)
    assert regressor.best_iteration + 1 < regressor.get_booster().num_boosted_rounds()
    return regressor


def test_a_booster_that_stopped_early_answers_as_its_own_predict(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 3))
    booster = _stopped_early(data, data[:, 0] + RNG.normal(size=ROWS)).get_booster()
    model = _model(tmp_path, booster)
    assert model.outputs(data.tolist()) == booster.predict(xgboost.DMatrix(data)).tolist()


def test_the_best_iteration_of_an_earlier_training_does_not_cut_the_model(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 3))
    label = 5 * data[:, 0] + RNG.normal(size=ROWS)
    first = _stopped_early(data, label).get_booster()
    first.set_attr(best_iteration="0")
    continued = xgboost.train({"nthread": 1}, xgboost.DMatrix(data, label), 100, xgb_model=first)
    assert continued.attr("best_iteration") == "0"
    model = _model(tmp_path, continued)
    assert model.outputs(data.tolist()) == continued.predict(xgboost.DMatrix(data)).tolist()
    assert "best_iteration 0" in model.about.caveats[0]


def test_an_estimator_that_mlflow_logged_stops_at_its_best_iteration(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 3))
    regressor = _stopped_early(data, data[:, 0] + RNG.normal(size=ROWS))
    regressor.save_model(tmp_path / "model.ubj")
    folder = write_model(tmp_path / "m", kind="mlflow", format="xgboost-ubj", files={"m": tmp_path / "model.ubj"})
    assert Model(folder, estimator=True).outputs(data.tolist()) == regressor.predict(data).tolist()


@pytest.mark.parametrize("booster", ["gbtree", "dart", "gblinear"])
def test_the_number_that_stands_for_a_missing_value_is_part_of_the_model(tmp_path: Path, booster: str) -> None:
    data = RNG.normal(size=(ROWS, 3))
    data[::3, 0] = -999
    label = np.where(data[:, 0] == -999, 10.0, data[:, 1])
    rows = xgboost.DMatrix(data, label, missing=-999)
    trained = xgboost.train({"nthread": 1, "booster": booster, "rate_drop": 0.1}, rows, 8)
    trained.set_attr(**{"ekiben.missing": "-999"})
    model = _model(tmp_path, trained)
    truth = trained.predict(xgboost.DMatrix(data, missing=-999)).tolist()
    assert model.outputs(data.tolist()) == truth
    assert model.outputs([[None if value == -999 else value for value in row] for row in data.tolist()]) == truth
    assert model.about.details["missing"] == -999


@pytest.mark.parametrize("text", ["", "none", "inf", "nan", "1e999"])
def test_a_missing_value_that_is_not_a_finite_number_is_refused(tmp_path: Path, text: str) -> None:
    data = RNG.normal(size=(ROWS, 2))
    booster = xgboost.train({"nthread": 1}, xgboost.DMatrix(data, data[:, 0]), 2)
    booster.set_attr(**{"ekiben.missing": text})
    with pytest.raises(StartError, match=r"ekiben\.missing"):
        _model(tmp_path, booster)


def test_numbers_beyond_float32_are_refused(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 2))
    model = _model(tmp_path, xgboost.train({"nthread": 1}, xgboost.DMatrix(data, data[:, 0]), 2))
    with pytest.raises(Problem) as raised:
        model.outputs([[0, 0], [0, 1e39]])
    assert (raised.value.code, raised.value.field) == ("not_finite", "inputs[1][1]")


@pytest.mark.parametrize("data", [b"", b"{}", b"{not", b'{"learner": 3}', b"tree\nversion=v4\n", b"\x80\x04pickle"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, data: bytes) -> None:
    folder = write_model(tmp_path / "m", kind="xgboost", format="xgboost-json", files={"x.json": data})
    with pytest.raises(StartError) as raised:
        Model(folder)
    assert raised.value.code == "model_load_failed"
    assert "x.json" in raised.value.message
