"""Values keep their type from a notebook's table, through JSON, to the steps of a scikit-learn model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, make_column_transformer
from sklearn.ensemble import VotingRegressor
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.feature_selection import SelectKBest, f_regression
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import FunctionTransformer, OneHotEncoder, OrdinalEncoder, StandardScaler, TargetEncoder
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from bentos.formats.skops import Model
from bentos.serving import ModelFolder, Problem, StartError, write_model
from ekiben import _export, _sample
from registry.formats import recognise
from registry.signature import check_sample

pytestmark = pytest.mark.filterwarnings("ignore")
BIG = 2**53
RNG = np.random.default_rng(0)


def _pushed(folder: Path, estimator: Any, sample: Any = None) -> tuple[Model, ModelFolder]:
    """The estimator as `ekiben.push` writes it and the service takes it, with its golden sample."""
    folder.mkdir(exist_ok=True)
    exported = _export.export(estimator, folder, sample)
    data = exported.files[0].read_bytes()
    found = recognise({"model.skops": len(data)}, lambda name: io.BytesIO(data))
    body, expected = json.loads(json.dumps([exported.sample, exported.expected], allow_nan=False))
    if body is not None and found.signature is not None:
        check_sample(found.signature, body)
    files = {"model.skops": data}
    written = write_model(folder / "model", kind="sklearn", format="skops", files=files, sample=body, expected=expected)
    return Model(written), written


def _served(folder: Path, estimator: Any, rows: Any) -> list[Any]:
    """Answers to a table by a model that was uploaded without a sample."""
    model, _ = _pushed(folder, estimator)
    return model.outputs(json.loads(json.dumps(_sample.rows(rows), allow_nan=False)))


def _same(folder: Path, estimator: Any, rows: Any) -> None:
    """The served model answers exactly what the estimator does: without a sample, and its own golden sample."""
    truth = _sample.outputs(estimator.predict(rows))
    assert _served(folder, estimator, rows) == truth
    model, written = _pushed(folder, estimator, rows)
    sample, expected = written.sample(), written.expected()
    assert sample is not None
    assert expected is not None
    assert model.outputs(**sample) == expected["outputs"]
    example = model.about.example
    assert example is not None
    json.dumps([example, model.about.input], allow_nan=False)
    assert len(model.outputs(example["inputs"])) == 1


def _problem(model: Model, row: Any) -> Problem:
    with pytest.raises(Problem) as raised:
        model.outputs([row])
    return raised.value


def _texts(missing: Any, rows: int = 60) -> pd.DataFrame:
    words = np.array(["a", "b", missing], dtype=object)[np.arange(rows) % 3]
    return pd.DataFrame({"c": pd.Series(words, dtype=object), "x": RNG.normal(size=rows)})


def _target(frame: pd.DataFrame) -> Any:
    """A number for each value of the first column, which no two of them share."""
    codes = {repr(value): code for code, value in enumerate(sorted(set(frame.iloc[:, 0].tolist()), key=repr))}
    return np.array([codes[repr(v)] * 2.0 for v in frame.iloc[:, 0].tolist()]) + np.arange(len(frame)) * 1e-3


ENCODERS = [
    OneHotEncoder(handle_unknown="ignore"),
    OneHotEncoder(),
    OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
    OrdinalEncoder(),
    TargetEncoder(random_state=0),
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=["onehot", "strict", "ordinal", "strict ordinal", "target"])
@pytest.mark.parametrize("missing", [None, np.nan], ids=["None", "NaN"])
def test_a_missing_category_is_the_one_that_the_encoder_was_fitted_with(
    tmp_path: Path, encoder: Any, missing: Any
) -> None:
    frame = _texts(missing)
    columns = make_column_transformer((encoder, ["c"]), ("passthrough", ["x"]))
    # trees, as an OrdinalEncoder passes NaN on
    estimator = make_pipeline(columns, DecisionTreeRegressor(random_state=0)).fit(frame, _target(frame))
    _same(tmp_path, estimator, frame)
    alone = [_served(tmp_path, estimator, frame[i : i + 1])[0] for i in range(6)]
    assert alone == [estimator.predict(frame[i : i + 1])[0] for i in range(6)]


@pytest.mark.parametrize("encoder", ENCODERS[::2] + ENCODERS[3:4], ids=["onehot", "ordinal", "target", "strict"])
@pytest.mark.parametrize("dtype", ["int64", "uint64", "object", "category"])
@pytest.mark.parametrize("named", [True, False], ids=["frame", "array"])
def test_whole_numbers_beyond_doubles_stay_apart(tmp_path: Path, encoder: Any, dtype: str, named: bool) -> None:
    numbers = pd.Series([BIG + i % 8 for i in range(64)], dtype="int64").astype(dtype)
    frame = pd.DataFrame({"id": numbers, "x": np.zeros(64, dtype="int64")})
    columns = make_column_transformer((encoder, [0]), ("passthrough", [1]))
    estimator = make_pipeline(columns, DecisionTreeRegressor(random_state=0))
    rows: Any = frame if named else frame.to_numpy(dtype="object" if dtype in ("object", "category") else dtype)
    target = np.arange(64) % 8
    if isinstance(encoder, TargetEncoder) and dtype == "object" and named:
        target = target * 1.5  # type: ignore[assignment]
    estimator.fit(rows, target)
    if not isinstance(encoder, TargetEncoder):
        assert estimator.predict(rows[:8]).tolist() == list(range(8))
    _same(tmp_path, estimator, rows[:8])


def test_a_gap_in_one_row_leaves_whole_numbers_of_the_others_as_they_are(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": np.arange(BIG, BIG + 8), "x": 0.0})
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["id"]), ("passthrough", ["x"]))
    estimator = make_pipeline(encoder, DecisionTreeRegressor(random_state=0)).fit(frame, np.arange(8))
    model, _ = _pushed(tmp_path, estimator)
    answers = model.outputs([{"id": BIG + 1, "x": 0}, {"id": None, "x": 0}, {"id": BIG + 3, "x": 0}])
    assert (answers[0], answers[2]) == (1.0, 3.0)
    unknown = estimator.predict(pd.DataFrame({"id": [-1], "x": [0.0]})).tolist()
    assert [answers[1]] == unknown
    assert model.outputs([{"id": 0.5, "x": 0}, {"id": 2**80, "x": 0}]) == unknown * 2


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("encoder", ENCODERS[1:3], ids=["strict", "ordinal"])
def test_dates_are_parsed_where_the_categories_are_dates(tmp_path: Path, unit: str, encoder: Any) -> None:
    days = pd.Series(pd.date_range("2024-01-01", periods=6).repeat(4)).astype(f"datetime64[{unit}]")
    frame = pd.DataFrame({"d": days, "x": RNG.normal(size=24)})
    columns = make_column_transformer((encoder, ["d"]), ("passthrough", ["x"]))
    estimator = make_pipeline(columns, DecisionTreeRegressor(random_state=0)).fit(frame, np.arange(24) // 4 * 10)
    _same(tmp_path, estimator, frame)
    model, _ = _pushed(tmp_path, estimator)
    same = ["2024-01-02", "2024-01-02T00:00", "2024-01-02 00:00:00", "2024-01-02T00:00:00.000000"]
    assert model.outputs([[day, 0] for day in same]) == [10.0] * 4
    for wrong in ("2024-01-02T00:00:00Z", "2024-01-02T02:00:00+02:00", "now", "", "2024-02-30", "02.01.2024", 5, True):
        assert _problem(model, {"d": wrong, "x": 0}).field == "inputs[0].d", wrong
    if unit == "ns":
        assert _problem(model, {"d": "9999-12-31", "x": 0}).field == "inputs[0].d"
    else:
        assert _problem(model, {"d": "2024-01-02T00:00:00.000000001", "x": 0}).field == "inputs[0].d"
    other = {"d": "2030-01-01", "x": 0}
    if encoder.handle_unknown == "error":
        assert _problem(model, other).field == "inputs[0].d"
    else:
        date = pd.DataFrame({"d": pd.to_datetime(["2030-01-01"]), "x": [0.0]})
        assert model.outputs([other]) == estimator.predict(date).tolist()


def test_an_array_of_dates_is_one_of_dates(tmp_path: Path) -> None:
    days = np.array(["2024-01-01", "2024-01-02", "2024-01-03"] * 4, dtype="datetime64[ns]").reshape(6, 2)
    estimator = make_pipeline(OrdinalEncoder(), DecisionTreeRegressor(random_state=0)).fit(days, np.arange(6))
    _same(tmp_path, estimator, days)


@pytest.mark.parametrize("dtype", ["bool", "object", "boolean"])
@pytest.mark.parametrize("gaps", [False, True], ids=["whole", "gaps"])
def test_booleans_stay_booleans(tmp_path: Path, dtype: Any, gaps: bool) -> None:
    if gaps and dtype == "bool":
        dtype = "object"
    values = [True, False, None] if gaps else [True, False, True]
    frame = pd.DataFrame({"b": pd.Series(values * 6, dtype=dtype), "x": RNG.normal(size=18)})
    columns = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["b"]), ("passthrough", ["x"]))
    estimator = make_pipeline(columns, LinearRegression()).fit(frame, _target(frame))
    _same(tmp_path, estimator, frame)
    model, _ = _pushed(tmp_path, estimator)
    assert model.outputs([[1, 0.5], [0, 0.5]]) == model.outputs([[True, 0.5], [False, 0.5]])
    assert _problem(model, ["true", 0.5]).field == "inputs[0].b"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_categories_of_short_floats_are_found(tmp_path: Path, dtype: str) -> None:
    frame = pd.DataFrame({"f": np.array([0.1, 0.2, 0.7] * 4, dtype=dtype), "x": 0.0})
    for encoder in (OneHotEncoder(), OneHotEncoder(handle_unknown="ignore")):
        columns = make_column_transformer((encoder, ["f"]), ("passthrough", ["x"]))
        estimator = make_pipeline(columns, DecisionTreeRegressor()).fit(frame, [1, 2, 3] * 4)
        _same(tmp_path, estimator, frame)
        model, _ = _pushed(tmp_path, estimator)
        assert model.outputs([[0.1, 0], [0.2, 0], [0.7, 0]]) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("missing", [None, np.nan], ids=["None", "NaN"])
@pytest.mark.parametrize("strategy", ["most_frequent", "constant"])
def test_an_imputer_of_texts_finds_the_gaps_that_it_looks_for(tmp_path: Path, missing: Any, strategy: Any) -> None:
    frame = _texts(missing)
    imputer = SimpleImputer(missing_values=missing, strategy=strategy)
    inner = make_pipeline(imputer, OneHotEncoder())
    columns = make_column_transformer((inner, ["c"]), ("passthrough", ["x"]))
    estimator = make_pipeline(columns, LinearRegression()).fit(frame, _target(frame))
    _same(tmp_path, estimator, frame)
    model, _ = _pushed(tmp_path, estimator)
    assert _problem(model, {"c": "never", "x": 0}).field == "inputs[0].c"


def test_none_that_an_imputer_of_nan_leaves_is_the_category_behind_it(tmp_path: Path) -> None:
    frame = _texts(None)
    inner = make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))
    columns = make_column_transformer((inner, ["c"]), ("passthrough", ["x"]))
    estimator = make_pipeline(columns, LinearRegression()).fit(frame, _target(frame))
    _same(tmp_path, estimator, frame)


def test_an_imputer_of_numbers_before_an_encoder_keeps_them_whole(tmp_path: Path) -> None:
    ids = np.array([BIG + i % 8 for i in range(64)])
    frame = pd.DataFrame({"id": ids, "k": ids % 5, "x": RNG.normal(size=64)})
    inner = make_pipeline(SimpleImputer(missing_values=-1, strategy="most_frequent"), OrdinalEncoder())
    columns = make_column_transformer((inner, ["id", "k"]), (StandardScaler(), ["id", "x"]))
    estimator = make_pipeline(columns, DecisionTreeRegressor(random_state=0)).fit(frame, np.arange(64) % 8)
    _same(tmp_path, estimator, frame)


def test_one_column_serves_steps_of_different_needs(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [BIG + i % 8 for i in range(64)], "b": [True, False] * 32, "x": RNG.normal(size=64)})
    columns = ColumnTransformer(
        [
            ("codes", OneHotEncoder(handle_unknown="ignore"), ["id", "b"]),
            ("scaled", make_pipeline(SimpleImputer(), StandardScaler()), ["id", "x"]),
            ("both", FeatureUnion([("o", OrdinalEncoder()), ("n", StandardScaler())]), ["id"]),
        ],
        remainder="passthrough",
    )
    estimator = make_pipeline(columns, Ridge()).fit(frame, np.arange(64) % 8)
    _same(tmp_path, estimator, frame)


@pytest.mark.parametrize("columns", [["c"], [0], slice(0, 1), slice("c", "c"), [True, False], [-2]], ids=repr)
def test_columns_are_found_however_they_are_named(tmp_path: Path, columns: Any) -> None:
    frame = _texts(None)
    steps = ColumnTransformer([("c", OneHotEncoder(), columns)], remainder="passthrough")
    estimator = make_pipeline(steps, LinearRegression()).fit(frame, _target(frame))
    _same(tmp_path, estimator, frame)


def test_types_are_found_inside_of_what_wraps_an_estimator(tmp_path: Path) -> None:
    frame = _texts(None)
    target = _target(frame)
    encoder = OneHotEncoder(handle_unknown="ignore")
    pipeline = make_pipeline(make_column_transformer((encoder, ["c"]), remainder="passthrough"), Ridge())
    nested = make_pipeline(
        ColumnTransformer([("all", make_column_transformer((encoder, ["c"]), remainder="passthrough"), ["x", "c"])]),
        Ridge(),
    )
    later = make_pipeline(
        make_column_transformer(("passthrough", ["x", "c"])),
        make_column_transformer((encoder, [1]), remainder="passthrough"),
        SelectKBest(f_regression, k=3),
        Ridge(),
    )
    for estimator in (
        GridSearchCV(pipeline, {"ridge__alpha": [0.1, 1.0]}, cv=2),
        VotingRegressor([("a", pipeline), ("b", nested)]),
        nested,
        later,
    ):
        _same(tmp_path, estimator.fit(frame, target), frame)
    logistic = make_pipeline(make_column_transformer((encoder, ["c"]), remainder="passthrough"), LogisticRegression())
    calibrated = CalibratedClassifierCV(logistic, cv=2).fit(frame, target > 2)
    assert _served(tmp_path, calibrated, frame) == calibrated.predict(frame).tolist()
    model, written = _pushed(tmp_path, calibrated, frame)
    sample, expected = written.sample(), written.expected()
    assert sample is not None
    assert expected is not None
    assert model.outputs(**sample) == expected["outputs"]


def test_a_column_of_texts_is_known_without_a_sample(tmp_path: Path) -> None:
    frame = pd.DataFrame({"t": ["good dog", "bad cat"] * 10, "x": RNG.normal(size=20)})
    columns = make_column_transformer((CountVectorizer(), "t"), ("passthrough", ["x"]))
    estimator = make_pipeline(columns, LogisticRegression()).fit(frame, [1, 0] * 10)
    assert _served(tmp_path, estimator, frame) == estimator.predict(frame).tolist()


def test_a_column_with_both_none_and_nan_is_refused_by_name(tmp_path: Path) -> None:
    frame = pd.DataFrame({"c": pd.Series(["a", None, np.nan] * 5, dtype=object), "x": 0.0})
    encoder = make_column_transformer((OneHotEncoder(), ["c"]), ("passthrough", ["x"]))
    estimator = make_pipeline(encoder, LinearRegression()).fit(frame, np.arange(15))
    with pytest.raises(StartError, match=r"'c'.*both None and NaN") as raised:
        _pushed(tmp_path, estimator)
    assert raised.value.code == "model_load_failed"
    assert raised.value.hint


@pytest.mark.parametrize(
    "values",
    [
        pd.to_timedelta([1, 2, 3], unit="s"),
        pd.Series([b"a", b"b", b"c"], dtype=object),
        np.array([0.1, 0.2, 0.3], dtype=np.longdouble),
    ],
    ids=["durations", "bytes", "long double"],
)
def test_categories_that_json_cannot_keep_are_refused_by_name(tmp_path: Path, values: Any) -> None:
    frame = pd.DataFrame({"odd": values, "x": 0.0})
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["odd"]), ("passthrough", ["x"]))
    with pytest.raises(StartError, match="'odd'") as raised:
        _pushed(tmp_path, make_pipeline(encoder, LinearRegression()).fit(frame, [1, 2, 3]))
    assert raised.value.code == "model_load_failed"


def test_a_number_that_a_double_rounds_is_refused_where_steps_may_tell_it_apart(tmp_path: Path) -> None:
    frame = pd.DataFrame({"n": np.arange(BIG, BIG + 6), "x": np.arange(6.0)})
    steps = make_column_transformer((FunctionTransformer(np.square), ["n"]), ("passthrough", ["x"]))
    model, _ = _pushed(tmp_path, make_pipeline(steps, LinearRegression()).fit(frame % 5, np.arange(6)))
    assert len(model.outputs([[BIG, 0]])) == 1
    assert _problem(model, [BIG + 1, 0]).field == "inputs[0].n"
    floats = pd.DataFrame({"n": frame["n"].astype("Int64"), "x": 0.0})  # scikit-learn takes such for doubles
    encoder = make_column_transformer((OneHotEncoder(handle_unknown="ignore"), ["n"]), ("passthrough", ["x"]))
    model, _ = _pushed(tmp_path, make_pipeline(encoder, LinearRegression()).fit(floats, np.arange(6)))
    assert _problem(model, [BIG + 1, 0]).field == "inputs[0].n"


def test_numbers_that_scikit_learn_itself_rounds_are_answered_as_it_does(tmp_path: Path) -> None:
    frame = pd.DataFrame({"n": np.arange(BIG, BIG + 64) * 3, "x": np.arange(64.0)})
    for estimator in (DecisionTreeRegressor(random_state=0), make_pipeline(StandardScaler(), Ridge())):
        _same(tmp_path, estimator.fit(frame, np.arange(64)), frame)
        _same(tmp_path, estimator.fit(frame[["n"]], np.arange(64)), frame[["n"]])


@pytest.mark.parametrize("estimator", [DecisionTreeClassifier(), KNeighborsClassifier(1)], ids=["tree", "neighbours"])
@pytest.mark.parametrize(
    "labels",
    [
        np.array([BIG + 1, BIG + 2, BIG + 3, 5]),
        np.array([2**64 - 1, 2**64 - 2, 1, 5], dtype="uint64"),
        np.array([True, False, True, False]),
        np.array(["2024-01-01", "2024-01-02", "2024-01-03T04:05:06.789", "2024-01-01"], dtype="datetime64[ns]"),
        np.array(["2024-01-01", "2024-01-02", "2024-01-03T04:05:06.789", "2024-01-01"], dtype="datetime64[us]"),
        np.array(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-01"], dtype="datetime64[D]"),
    ],
    ids=["int64", "uint64", "bool", "ns", "us", "days"],
)
def test_labels_come_back_as_they_are(tmp_path: Path, estimator: Any, labels: Any) -> None:
    data = np.arange(4.0).reshape(4, 1)
    model, _ = _pushed(tmp_path, estimator.fit(data, labels), data)
    answers = model.outputs(data.tolist())
    assert answers == _sample.outputs(labels) == _sample.outputs(estimator.predict(data))
    assert answers == json.loads(json.dumps(answers))
    if labels.dtype.kind == "M":
        assert np.array_equal(np.array(answers, dtype=labels.dtype), labels)
    else:
        assert answers == labels.tolist()
    assert json.loads(json.dumps(model.about.classes)) == sorted(set(answers))


@pytest.mark.parametrize("labels", [np.array([b"a", b"b"]), np.array([1, 2], dtype="timedelta64[s]")], ids=repr)
def test_labels_that_json_cannot_keep_are_refused(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(StartError, match="classes") as raised:
        _pushed(tmp_path, DecisionTreeClassifier().fit([[0.0], [1.0]], labels))
    assert raised.value.code == "model_load_failed"


CELLS: dict[str, st.SearchStrategy[Any]] = {
    "int64": st.integers(BIG - 4, BIG + 4) | st.integers(-(2**63), 2**63 - 1),
    "uint64": st.integers(2**64 - 4, 2**64 - 1) | st.integers(0, 3),
    "float64": st.sampled_from([0.1, 1.0, -2.5, np.nan]),
    "float32": st.sampled_from([0.1, 1.0, -2.5, np.nan]),
    "bool": st.booleans(),
    "str": st.sampled_from(["a", "B", "ä", "", "1", "None", "nan", np.nan]),
    "texts or None": st.sampled_from(["a", "B", "1", None]),
    "booleans or None": st.sampled_from([True, False, None]),
    "numbers or None": st.sampled_from([1, BIG, BIG + 1, None]),
    "datetime64[ns]": st.integers(-(2**55), 2**55),
    "datetime64[us]": st.integers(-(2**55), 2**55),
    "category": st.sampled_from(["x", "y", "z"]),
}


@st.composite
def tables(draw: st.DrawFn) -> tuple[pd.DataFrame, list[str]]:
    """A table with columns of mixed types that repeats its rows, and which of them are categories."""
    rows = draw(st.integers(6, 10))
    kinds = draw(st.lists(st.sampled_from(sorted(CELLS)), min_size=1, max_size=4))
    columns, encoded = {}, []
    for at, kind in enumerate(kinds):
        name = f"{kind} {at}"
        values = draw(st.lists(CELLS[kind], min_size=rows, max_size=rows))
        columns[name] = pd.Series(values, dtype="object" if " or " in kind else kind)
        if kind not in ("float64", "float32") or draw(st.booleans()):
            encoded.append(name)
    columns["plain"] = pd.Series(range(rows), dtype="float64")
    return pd.DataFrame(columns), encoded


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), encoder=st.sampled_from(ENCODERS), shuffle=st.randoms())
def test_any_table_is_answered_as_the_estimator_answers_it(
    tmp_path: Path, table: tuple[pd.DataFrame, list[str]], encoder: Any, shuffle: Any
) -> None:
    frame, encoded = table
    imputer = SimpleImputer(keep_empty_features=True)
    steps = ColumnTransformer([("c", encoder, encoded), ("n", imputer, ["plain"])], remainder=imputer)
    estimator = make_pipeline(steps, DecisionTreeRegressor(random_state=0)).fit(frame, np.arange(len(frame)) * 1.5)
    order = list(range(len(frame)))
    shuffle.shuffle(order)
    rows = frame.iloc[order]
    assert _served(tmp_path, estimator, rows) == estimator.predict(rows).tolist()
    assert _served(tmp_path, estimator, rows[:1]) == estimator.predict(rows[:1]).tolist()
