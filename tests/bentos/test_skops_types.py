"""What recognition accepts is loaded and served: an upload that passed must not fail for want of trust."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import skops.io
from sklearn.calibration import CalibratedClassifierCV
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.datasets import make_classification
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    StackingClassifier,
    VotingRegressor,
)
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    OrdinalEncoder,
    PowerTransformer,
    SplineTransformer,
    StandardScaler,
    TargetEncoder,
)
from sklearn.svm import SVC
from skops.io.exceptions import UnsupportedTypeException

from bentos.formats.skops import Model, trusted
from bentos.serving import StartError, write_model
from registry.errors import UserError
from registry.formats import Recognised, recognise
from registry.formats.skops import accepted

DATA, LABELS = make_classification(80, 5, random_state=0)
FRAME = pd.DataFrame(DATA, columns=[f"f{i}" for i in range(5)])
MIXED = FRAME.assign(city=np.where(LABELS > 0, "oslo", "rome"), plan=np.tile(["a", "b"], 40))


def _columns() -> ColumnTransformer:
    return ColumnTransformer(
        [
            ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["f0", "f1"]),
            ("words", OneHotEncoder(handle_unknown="ignore"), ["city", "plan"]),
        ],
        remainder="passthrough",
    )


ESTIMATORS: dict[str, tuple[Any, Any]] = {
    "grid-search": (GridSearchCV(SVC(), {"C": [1, 2]}, cv=2), DATA),
    "grid-search-of-pipeline": (
        GridSearchCV(make_pipeline(_columns(), LogisticRegression()), {"logisticregression__C": [1.0]}, cv=2),
        MIXED,
    ),
    "randomized-search": (RandomizedSearchCV(KNeighborsClassifier(), {"n_neighbors": [1, 3]}, n_iter=1, cv=2), DATA),
    "pipeline": (make_pipeline(StandardScaler(), LogisticRegression()), FRAME),
    "columns-onehot": (make_pipeline(_columns(), RandomForestClassifier(5)), MIXED),
    "columns-ordinal": (
        make_pipeline(
            ColumnTransformer([("o", OrdinalEncoder(), ["city"])], remainder="drop"), HistGradientBoostingClassifier()
        ),
        MIXED,
    ),
    "target-encoder": (
        make_pipeline(ColumnTransformer([("t", TargetEncoder(cv=2), ["city"])]), LogisticRegression()),
        MIXED,
    ),
    "transformed-target": (TransformedTargetRegressor(LinearRegression()), DATA),
    "hist-gradient-boosting": (HistGradientBoostingClassifier(max_iter=5), DATA),
    "hist-gradient-boosting-poisson": (HistGradientBoostingRegressor(loss="poisson", max_iter=5), DATA),
    "svc": (SVC(), DATA),
    "kmeans": (KMeans(3, n_init=1), DATA),
    "forest": (RandomForestClassifier(5), FRAME),
    "isolation-forest": (IsolationForest(n_estimators=5), DATA),
    "calibrated-sigmoid": (CalibratedClassifierCV(LogisticRegression(), cv=2), DATA),
    "calibrated-isotonic": (CalibratedClassifierCV(RandomForestClassifier(3), method="isotonic", cv=2), DATA),
    "ufunc": (make_pipeline(FunctionTransformer(np.tanh), LinearRegression()), DATA),
    "ufunc-with-inverse": (make_pipeline(FunctionTransformer(np.log1p, np.expm1), LinearRegression()), np.abs(DATA)),
    "power-and-splines": (make_pipeline(PowerTransformer(), SplineTransformer(), LinearRegression()), DATA),
    "union": (make_pipeline(FeatureUnion([("s", StandardScaler()), ("k", KNNImputer())]), SGDClassifier()), DATA),
    "stacking": (StackingClassifier([("l", LogisticRegression())], LogisticRegression(), cv=2), DATA),
    "voting": (VotingRegressor([("l", LinearRegression())]), DATA),
    "texts": (make_pipeline(TfidfVectorizer(), LogisticRegression()), ["good dog", "bad cat"] * 40),
}


def _recognised(data: bytes) -> Recognised:
    return recognise({"model.skops": len(data)}, lambda path: io.BytesIO(data))


def _model(data: bytes, root: Path) -> Model:
    return Model(write_model(root, kind="sklearn", format="skops", files={"model.skops": data}))


def _rows(data: Any) -> list[Any]:
    rows: list[Any] = data.to_dict("records") if isinstance(data, pd.DataFrame) else np.asarray(data).tolist()
    return rows


def test_there_is_one_list() -> None:
    assert trusted() == frozenset(accepted()), "run: python -m registry.formats.skops > bentos/formats/trusted.json"


@pytest.mark.parametrize(("estimator", "data"), ESTIMATORS.values(), ids=ESTIMATORS)
def test_what_is_accepted_is_served(tmp_path: Path, estimator: Any, data: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(data, LABELS)
        file = skops.io.dumps(estimator)
        assert _recognised(file).format == "skops"
        model = _model(file, tmp_path / "m")
        assert model.outputs(_rows(data)) == estimator.predict(data).tolist()
    json.dumps(model.about.input)


def _own_function(values: Any) -> Any:
    return values * 2


def test_a_function_of_ones_own_is_refused_at_both_ends(tmp_path: Path) -> None:
    file = skops.io.dumps(make_pipeline(FunctionTransformer(_own_function), LinearRegression()).fit(DATA, LABELS))
    with pytest.raises(UserError) as raised:
        _recognised(file)
    assert raised.value.code == "skops_untrusted_type"
    assert "_own_function" in str(raised.value)
    assert "ekiben init" in (raised.value.hint or "")
    with pytest.raises(StartError, match="_own_function"):
        _model(file, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_estimator_of_scikit_learn_that_is_accepted_is_served(tmp_path: Path) -> None:
    from inspect import Parameter, signature

    from sklearn.utils import all_estimators

    positive, both = np.abs(DATA), np.stack([LABELS, LABELS], 1)
    served = 0
    for name, kind in all_estimators():
        given: dict[str, Any] = {}
        wanted = [p.name for p in signature(kind).parameters.values() if p.default is Parameter.empty]
        classifies = "Class" in name
        for parameter, value in {
            "estimator": LogisticRegression(),
            "estimators": [("l", LogisticRegression() if classifies else LinearRegression())],
            "param_grid": {"C": [1]},
            "param_distributions": {"C": [1.0]},
            "steps": [("l", LogisticRegression())],
        }.items():
            if parameter in wanted:
                given[parameter] = value
        if set(wanted) - set(given) or not hasattr(kind, "predict"):
            continue
        estimator = kind(**given)
        try:
            estimator.fit(positive, LABELS)
        except Exception:
            try:
                estimator.fit(positive, both)
            except Exception:  # needs other data than a table of numbers
                continue
        try:
            file = skops.io.dumps(estimator)
        except UnsupportedTypeException:  # skops itself cannot write it
            continue
        try:
            _recognised(file)
        except (UserError, NotImplementedError):
            continue
        if hasattr(estimator, "predict"):
            outputs = _model(file, tmp_path / "m").outputs(positive.tolist())
            assert np.array_equal(np.asarray(outputs), np.asarray(estimator.predict(positive))), name
            served += 1
    assert served > 80
