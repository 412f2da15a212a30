"""The kind sklearn beside scikit-learn itself."""

from __future__ import annotations

import functools
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skops.io
from scipy.sparse import csr_matrix
from sklearn.compose import ColumnTransformer
from sklearn.datasets import make_classification
from sklearn.decomposition import NMF
from sklearn.ensemble import (
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    RandomForestRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler
from sklearn.svm import SVC

from bentos.formats.skops import Model
from bentos.serving import Problem, StartError, write_model

DATA, LABELS = make_classification(200, 5, random_state=0)


def _model(tmp_path: Path, estimator: Any, sample: Any = None) -> Model:
    skops.io.dump(estimator, tmp_path / "m.skops")
    return _open(tmp_path, sample)


def _open(tmp_path: Path, sample: Any = None) -> Model:
    files = {"m.skops": tmp_path / "m.skops"}
    return Model(write_model(tmp_path / "m", kind="sklearn", format="skops", files=files, sample=sample))


@pytest.mark.parametrize(
    "estimator",
    [
        LinearRegression(),
        LogisticRegression(),
        RandomForestClassifier(10, n_jobs=-1),
        RandomForestRegressor(10),
        GradientBoostingRegressor(n_estimators=10),
        HistGradientBoostingClassifier(max_iter=10),
        KNeighborsClassifier(),
        SVC(probability=False),
        MLPClassifier((5,), max_iter=20),
        GaussianProcessRegressor(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        make_pipeline(FunctionTransformer(np.tanh), LinearRegression()),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.filterwarnings("ignore")
def test_every_estimator_gives_what_scikit_learn_gives(tmp_path: Path, estimator: Any) -> None:
    estimator.fit(DATA, LABELS)
    model = _model(tmp_path, estimator)
    assert model.outputs(DATA.tolist()) == estimator.predict(DATA).tolist()
    if hasattr(estimator, "predict_proba"):
        assert model.outputs(DATA.tolist(), "predict_proba") == estimator.predict_proba(DATA).tolist()
    else:
        with pytest.raises(Problem, match="no method"):
            model.outputs(DATA.tolist(), "predict_proba")


@pytest.mark.parametrize("encoder", [OneHotEncoder(), OneHotEncoder(handle_unknown="ignore"), OrdinalEncoder()])
def test_a_column_transformer_gets_a_frame_with_its_names(tmp_path: Path, encoder: Any) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"n": rng.normal(size=100), "word": rng.choice(["a", "b"], 100), "k": rng.integers(0, 4, 100)})
    steps = ColumnTransformer(
        [("numbers", SimpleImputer(), ["n"]), ("words", encoder, ["word"]), ("codes", OneHotEncoder(), ["k"])]
    )
    pipeline = make_pipeline(steps, LinearRegression()).fit(frame, frame["n"] + (frame["word"] == "a"))
    model = _model(tmp_path, pipeline)
    rows = frame.to_dict("records")
    assert model.outputs(rows) == pipeline.predict(frame).tolist()
    assert model.outputs([list(row.values()) for row in rows]) == pipeline.predict(frame).tolist()
    json.dumps(model.about.input)  # nothing of NumPy is left in it
    unknown = [{**rows[0], "word": "never"}]
    if getattr(encoder, "handle_unknown", "error") == "ignore":
        assert len(model.outputs(unknown)) == 1
    else:
        with pytest.raises(Problem) as raised:
            model.outputs(unknown)
        assert raised.value.field == "inputs[0].word"


@pytest.mark.parametrize("columns", [[0, 1], [True, True, False], slice(0, 2), [-3, -2]], ids=str)
def test_columns_taken_by_number_mask_or_slice_are_numbers(tmp_path: Path, columns: Any) -> None:
    pipeline = make_pipeline(ColumnTransformer([("s", StandardScaler(), columns)]), LinearRegression())
    model = _model(tmp_path, pipeline.fit(DATA[:, :3], LABELS))
    rows = [*DATA[:, :2].T, DATA[:, 2]]
    assert model.outputs(np.array(rows).T.tolist()) == pipeline.predict(DATA[:, :3]).tolist()
    with pytest.raises(Problem) as raised:
        model.outputs([["far", 0, 0]])
    assert raised.value.field == "inputs[0][0]"


def test_texts_are_rows_too(tmp_path: Path) -> None:
    texts = ["good dog", "bad cat", "good cat", "bad dog"] * 5
    pipeline = make_pipeline(TfidfVectorizer(), MultinomialNB()).fit(texts, ["+", "-", "+", "-"] * 5)
    model = _model(tmp_path, pipeline)
    assert model.outputs(["good", "bad"]) == ["+", "-"]
    with pytest.raises(Problem) as raised:
        model.outputs(["good", 3])
    assert raised.value.field == "inputs[1]"


def test_a_missing_value_is_named_where_the_model_does_not_take_it(tmp_path: Path) -> None:
    model = _model(tmp_path, LinearRegression().fit(DATA, LABELS))
    with pytest.raises(Problem) as raised:
        model.outputs([DATA[0].tolist(), [1, 2, None, 4, 5]])
    assert (raised.value.code, raised.value.field) == ("missing_value", "inputs[1]")
    tolerant = _model(tmp_path, HistGradientBoostingClassifier(max_iter=5).fit(DATA, LABELS))
    assert len(tolerant.outputs([[1, 2, None, 4, 5]])) == 1


def test_types_outside_of_the_list_are_not_loaded(tmp_path: Path) -> None:
    step = FunctionTransformer(functools.partial(np.clip, a_min=0, a_max=1))
    skops.io.dump(make_pipeline(step, LinearRegression()).fit(DATA, LABELS), tmp_path / "m.skops")
    with pytest.raises(StartError, match="types that are not served") as raised:
        _open(tmp_path)
    assert raised.value.code == "model_load_failed"


def test_a_schema_that_names_a_function_of_the_system_is_refused(tmp_path: Path) -> None:
    skops.io.dump(FunctionTransformer(np.tanh), tmp_path / "good.skops")
    with zipfile.ZipFile(tmp_path / "good.skops") as archive:
        schema = archive.read("schema.json").decode()
    assert '"tanh"' in schema
    evil = schema.replace('"tanh"', '"system"').replace('"__module__": "numpy"', '"__module__": "posix"')
    evil = evil.replace("numpy._core._multiarray_umath", "posix")
    with zipfile.ZipFile(tmp_path / "m.skops", "w") as archive:
        archive.writestr("schema.json", evil)
    with pytest.raises(StartError, match=r"posix\.system"):
        _open(tmp_path)


def test_an_estimator_that_does_not_predict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="does not predict"):
        _model(tmp_path, StandardScaler().fit(DATA))


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x04pickle"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.skops").write_bytes(data)
    with pytest.raises(StartError) as raised:
        _open(tmp_path)
    assert raised.value.code == "model_load_failed"
    assert "m.skops" in raised.value.message


def _plain_rows(model: Model, method: str) -> list[Any]:
    return model.outputs(DATA[:4].tolist(), method)


def test_probabilities_of_several_outputs_are_sorted_by_row(tmp_path: Path) -> None:
    """scikit-learn lists them by output; four outputs and four rows looked like an answer."""
    targets = np.stack([LABELS, 1 - LABELS, DATA[:, 0] > 0, DATA[:, 1] > 0], axis=1).astype(int)
    estimator = MultiOutputClassifier(LogisticRegression()).fit(DATA, targets)
    model = _model(tmp_path, estimator)
    truth = [[part[0].tolist() for part in estimator.predict_proba(DATA[i : i + 1])] for i in range(4)]
    for answer, row in zip(_plain_rows(model, "predict_proba"), truth, strict=True):
        assert np.allclose(answer, row)
    assert model.about.details["rows_share_a_call"] == "request"


def test_sparse_predictions_are_rows(tmp_path: Path) -> None:
    targets = csr_matrix(np.stack([LABELS, 1 - LABELS], axis=1))
    estimator = OneVsRestClassifier(LogisticRegression()).fit(DATA, targets)
    assert not isinstance(estimator.predict(DATA[:1]), np.ndarray)
    assert _plain_rows(_model(tmp_path, estimator), "predict") == estimator.predict(DATA[:4]).toarray().tolist()


@pytest.mark.parametrize(
    "step",
    [
        FunctionTransformer(np.mean, kw_args={"axis": 0, "keepdims": True}),
        NMF(2, init="nndsvda", max_iter=2000),
    ],
    ids=["mean of all rows", "factorisation of all rows"],
)
def test_a_step_over_all_rows_is_asked_row_by_row(tmp_path: Path, step: Any) -> None:
    rows = np.abs(DATA)
    last = LinearRegression().fit(step.fit(rows).transform(rows)[:1].repeat(3, axis=0), [1.0, 2.0, 3.0])
    pipeline = Pipeline([("all", step), ("last", last)])
    model = _model(tmp_path, pipeline)
    assert model.about.details["rows_share_a_call"] == "row"
    alone = [pipeline.predict(rows[i : i + 1])[0] for i in range(4)]
    assert np.allclose(model.outputs(rows[:4].tolist()), alone)
