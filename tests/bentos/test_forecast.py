"""The forecaster: better than the seasonal naive forecast, and a service that says what is wrong."""

from __future__ import annotations

import copy
import datetime as dt
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from bentos.forecast import data, features
from bentos.forecast import train as training
from bentos.forecast.features import DAILY, NAMES
from bentos.forecast.forecasting import Forecaster
from bentos.serving import ModelFolder, StartError
from bentos.training.outcome import Outcome, Progress

QUIET = Progress.start(quiet=True)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return training.train(training.Settings.small(), QUIET)[0]


@pytest.fixture(scope="module")
def model(outcome: Outcome, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return outcome.write(tmp_path_factory.mktemp("forecast") / "model")


@pytest.fixture(scope="module")
def forecaster(model: ModelFolder) -> Forecaster:
    return Forecaster.load(model.path())


@pytest.fixture(scope="module")
def client(model: ModelFolder) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(model.root))
        from bentos.forecast.service import Forecast as Service

        # Prometheus' registry is one per process, and takes each of BentoML's metrics once
        patch.setitem(Service.config, "metrics", {"enabled": False})
        with TestClient(Service.to_asgi(), raise_server_exceptions=False) as client:
            yield client


@pytest.fixture
def body(outcome: Outcome) -> dict[str, Any]:
    return copy.deepcopy(outcome.sample)


def test_the_forecast_beats_the_seasonal_naive_one_and_nears_the_true_mean(outcome: Outcome) -> None:
    found = outcome.metrics
    for name in ("rmse", "wape"):
        assert found[name] < 0.75 * found[f"{name}_seasonal_naive"]
        assert found[f"{name}_true_mean"] < found[name] < 1.25 * found[f"{name}_true_mean"]


@pytest.mark.parametrize(("name", "share"), [("elnino", 0.8), ("co2", 0.6)])
def test_the_method_beats_the_seasonal_naive_forecast_on_a_real_series(name: str, share: float) -> None:
    scores = training.evaluate_real(name, training.Settings(), QUIET)
    found = scores.metrics()
    assert found["rmse"] < share * found["rmse_seasonal_naive"]
    assert found["wape"] < share * found["wape_seasonal_naive"]
    rivals = [training.rmse(scores.actual, f) for name, f in scores.forecasts.items() if name != "model"]
    assert found["rmse"] < min(rivals)


def test_the_same_seed_gives_the_same_bytes() -> None:
    few = replace(training.Settings.small(), stores=1, days=500, rounds=20)
    first, second = (training.train(few, QUIET)[0] for _ in range(2))
    assert first.files == second.files
    assert first.sample == second.sample
    assert training.train(replace(few, seed=8), QUIET)[0].files != first.files


def test_no_training_row_has_its_target_in_the_test_period() -> None:
    """The sales of the test period are replaced by nonsense; the training rows stay the same to the bit."""
    small = training.Settings.small()
    panel = data.make(1, 500, 1)
    end = 400
    nonsense = [replace(s, sales=np.concatenate([s.sales[:end], s.sales[end:] * 1000 + 5])) for s in panel.series]
    categories = [["store 1"], [d.name for d in data.DRINKS]]
    first = training.training_rows(panel, end, small, categories)
    second = training.training_rows(replace(panel, series=tuple(nonsense)), end, small, categories)
    np.testing.assert_array_equal(first.features, second.features)
    np.testing.assert_array_equal(first.sales, second.sales)
    origin, _ = training.windows(500, 28, 3)
    assert origin.min() == 500 - 3 * 28 - 1


def test_the_service_answers_what_the_plain_booster_says(
    client: TestClient, model: ModelFolder, forecaster: Forecaster, body: dict[str, Any]
) -> None:
    booster = lgb.Booster(model_file=str(model.path()))
    request = forecaster.parse(body)
    expected: list[float] = []
    for series, plan in zip(request.series, request.plans, strict=True):
        steps = np.arange(1, request.horizon + 1)
        origin = np.full(len(steps), len(series.sales) - 1)
        codes = features.codes_of(forecaster.categories, series.store, series.item)
        rows = features.matrix(series, origin, steps, plan, DAILY, codes)
        expected += list(np.asarray(booster.predict(rows)) * series.sales[-28:].mean())
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose([row["sales"] for row in answer.json()["forecast"]], expected, rtol=1e-12)


def test_serving_sees_the_features_that_training_saw(forecaster: Forecaster) -> None:
    """A request cut out of the panel gives, to the bit, the rows that evaluation works out from the whole panel."""
    small = training.Settings.small()
    panel = data.make(small.stores, small.days, small.seed)
    body = training.sample_request(panel, small)
    request = forecaster.parse(body)
    end = panel.length - small.horizon
    steps = np.arange(1, request.horizon + 1)
    whole = training.rows_at(panel, np.full(len(steps), end - 1), steps, DAILY, forecaster.categories)
    for number, (series, plan) in enumerate(zip(request.series, request.plans, strict=True)):
        origin = np.full(len(steps), len(series.sales) - 1)
        codes = features.codes_of(forecaster.categories, series.store, series.item)
        served = features.matrix(series, origin, steps, plan, DAILY, codes)
        seen = whole.features[number * len(steps) : (number + 1) * len(steps)]
        for name in set(NAMES) - {
            "mean_long",
            "year_ago",
            "year_trend",
            "holiday_next",
        }:  # these look further back or on
            np.testing.assert_array_equal(served[:, NAMES.index(name)], seen[:, NAMES.index(name)], err_msg=name)


def test_the_golden_sample_matches(client: TestClient, outcome: Outcome, body: dict[str, Any]) -> None:
    assert client.post("/predict", json=body).json() == outcome.expected
    test = client.get("/predict/test").json()
    assert (test["verified"], test["matched"], test["rows"]) == ("expected", 14, 14)


def test_the_metadata_tell_what_the_model_knows(client: TestClient) -> None:
    said = client.get("/metadata").json()
    assert said["details"]["stores"] == ["store 1", "store 2"]
    assert "sparkling wine" in said["details"]["items"]
    assert said["input"]["properties"]["horizon"]["maximum"] == said["details"]["longest_horizon"] == 28


def test_the_days_follow_the_history_and_series_keep_their_order(client: TestClient, body: dict[str, Any]) -> None:
    rows = client.post("/predict", json=body).json()["forecast"]
    last = dt.date.fromisoformat(max(row["date"] for row in body["history"]))
    expected = [(last + dt.timedelta(days=step)).isoformat() for step in range(1, 8)]
    assert [row["date"] for row in rows] == expected * 2
    first = (body["history"][0]["store"], body["history"][0]["item"])
    assert [(row["store"], row["item"]) for row in rows[:7]] == [first] * 7


def test_rows_may_come_in_any_order(client: TestClient, outcome: Outcome, body: dict[str, Any]) -> None:
    def sales(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
        return {(row["store"], row["item"], row["date"]): row["sales"] for row in rows}

    rng = np.random.default_rng(1)
    rng.shuffle(body["history"])
    rng.shuffle(body["future"])
    assert sales(client.post("/predict", json=body).json()["forecast"]) == sales(outcome.expected["forecast"])


def test_a_series_alone_gets_the_forecast_it_gets_in_company(client: TestClient, body: dict[str, Any]) -> None:
    both = client.post("/predict", json=body).json()["forecast"]
    item = body["history"][0]["item"]
    alone = {name: [row for row in body[name] if row["item"] == item] for name in ("history", "future")}
    answer = client.post("/predict", json={**alone, "horizon": body["horizon"]}).json()["forecast"]
    assert answer == [row for row in both if row["item"] == item]


def test_a_shorter_horizon_is_the_beginning_of_a_longer_one(client: TestClient, body: dict[str, Any]) -> None:
    del body["future"]
    long = client.post("/predict", json={**body, "horizon": 28}).json()["forecast"]
    short = client.post("/predict", json={**body, "horizon": 3}).json()["forecast"]
    assert short[:3] == long[:3]
    assert short[3:] == long[28:31]


def test_a_planned_discount_raises_the_forecast(client: TestClient, body: dict[str, Any]) -> None:
    plain = client.post("/predict", json=body).json()["forecast"]
    for row in body["future"]:
        row["discount"] = 0.3
    cheaper = client.post("/predict", json=body).json()["forecast"]
    assert sum(row["sales"] for row in cheaper) > 1.15 * sum(row["sales"] for row in plain)


def test_a_new_store_and_item_and_missing_values_are_forecast_near_their_level(
    client: TestClient, body: dict[str, Any]
) -> None:
    """Only date, store, item and sales are needed; some sales may be unknown."""
    history = [{k: row[k] for k in ("date", "store", "item", "sales")} for row in body["history"]]
    for row in history:
        row["store"], row["item"] = "a new one", "kvass of " + row["item"]
    history[20]["sales"] = None
    answer = client.post("/predict", json={"history": history, "horizon": 7})
    assert answer.status_code == 200, answer.text
    first = [row["sales"] for row in history[:56] if row["sales"] is not None]
    forecast = [row["sales"] for row in answer.json()["forecast"][:7]]
    assert 0.6 < np.mean(forecast) / np.mean(first[-28:]) < 1.6


def test_an_item_that_sold_nothing_is_forecast_near_nothing(client: TestClient, body: dict[str, Any]) -> None:
    for row in body["history"]:
        row["sales"] = 0
    assert all(0 <= row["sales"] < 1 for row in client.post("/predict", json=body).json()["forecast"])


def test_twice_the_sales_are_twice_the_forecast(client: TestClient, body: dict[str, Any]) -> None:
    once = client.post("/predict", json=body).json()["forecast"]
    for row in body["history"]:
        row["sales"] *= 2
    twice = client.post("/predict", json=body).json()["forecast"]
    np.testing.assert_allclose([r["sales"] for r in twice], [2 * r["sales"] for r in once], rtol=1e-9)


def test_series_that_end_on_different_days_each_go_on_from_their_own(client: TestClient, body: dict[str, Any]) -> None:
    del body["future"]
    item, last = body["history"][0]["item"], max(row["date"] for row in body["history"])
    body["history"] = [row for row in body["history"] if not (row["item"] == item and row["date"] == last)]
    rows = client.post("/predict", json=body).json()["forecast"]
    assert rows[0]["date"] == last
    assert rows[7]["date"] > last


def _first(body: dict[str, Any], **values: Any) -> None:
    body["history"][0].update(values)


def _plan(body: dict[str, Any], **values: Any) -> None:
    body["future"][0].update(values)


BAD: dict[str, tuple[Callable[[dict[str, Any]], Any], str, str]] = {
    "no history": (lambda b: b.update(history=[]), "no_history", "history"),
    "history missing": (lambda b: b.pop("history"), "missing_field", "history"),
    "horizon missing": (lambda b: b.pop("horizon"), "missing_field", "horizon"),
    "history no list": (lambda b: b.update(history={}), "invalid_field", "history"),
    "row no object": (lambda b: b["history"].insert(0, 5), "invalid_field", "history[0]"),
    "unknown field": (lambda b: b.update(horizons=3), "unknown_field", "horizons"),
    "unknown column": (lambda b: _first(b, discnt=0.1), "unknown_field", "history[0].discnt"),
    "missing date": (lambda b: b["history"][2].pop("date"), "missing_field", "history[2].date"),
    "missing store": (lambda b: b["history"][2].pop("store"), "missing_field", "history[2].store"),
    "missing sales": (lambda b: b["history"][2].pop("sales"), "missing_field", "history[2].sales"),
    "horizon 0": (lambda b: b.update(horizon=0), "bad_horizon", "horizon"),
    "horizon negative": (lambda b: b.update(horizon=-3), "bad_horizon", "horizon"),
    "horizon too far": (lambda b: b.update(horizon=29), "bad_horizon", "horizon"),
    "horizon endless": (lambda b: b.update(horizon=10**4000), "bad_horizon", "horizon"),
    "horizon a fraction": (lambda b: b.update(horizon=1.5), "invalid_field", "horizon"),
    "horizon true": (lambda b: b.update(horizon=True), "invalid_field", "horizon"),
    "date no text": (lambda b: _first(b, date=20240101), "bad_date", "history[0].date"),
    "date of no calendar": (lambda b: _first(b, date="2024-02-30"), "bad_date", "history[0].date"),
    "date the other way": (lambda b: _first(b, date="31.03.2024"), "bad_date", "history[0].date"),
    "date without dashes": (lambda b: _first(b, date="20240331"), "bad_date", "history[0].date"),
    "date at the end of time": (lambda b: _first(b, date="9999-12-31"), "bad_date", "history[0].date"),
    "date of other digits": (lambda b: _first(b, date="٢٠٢٤-01-01"), "bad_date", "history[0].date"),
    "a gap": (lambda b: b["history"].pop(30), "missing_dates", "history[30].date"),
    "a date twice": (lambda b: b["history"].insert(3, b["history"][2]), "duplicate_date", "history[3].date"),
    "store a number": (lambda b: _first(b, store=1), "invalid_field", "history[0].store"),
    "item empty": (lambda b: _first(b, item=""), "invalid_field", "history[0].item"),
    "sales negative": (lambda b: _first(b, sales=-1), "invalid_field", "history[0].sales"),
    "sales text": (lambda b: _first(b, sales="7"), "invalid_field", "history[0].sales"),
    "sales NaN": (lambda b: _first(b, sales=float("nan")), "invalid_field", "history[0].sales"),
    "sales endless": (lambda b: _first(b, sales=float("inf")), "invalid_field", "history[0].sales"),
    "sales beyond floats": (lambda b: _first(b, sales=10**400), "invalid_field", "history[0].sales"),
    "price 0": (lambda b: _first(b, price=0), "invalid_field", "history[0].price"),
    "discount in per cent": (lambda b: _first(b, discount=20), "invalid_field", "history[0].discount"),
    "holiday 2": (lambda b: _first(b, holiday=2), "invalid_field", "history[0].holiday"),
    "too short": (lambda b: b.update(history=b["history"][:27], future=[]), "history_too_short", "history"),
    "nothing known": (lambda b: [r.update(sales=None) for r in b["history"]], "history_too_short", "history"),
    "plan no list": (lambda b: b.update(future="none"), "invalid_field", "future"),
    "plan with sales": (lambda b: _plan(b, sales=3), "unknown_field", "future[0].sales"),
    "plan for nobody": (lambda b: _plan(b, store="nowhere"), "unknown_series", "future[0]"),
    "plan for the past": (lambda b: _plan(b, date="2020-01-01"), "date_out_of_range", "future[0].date"),
    "plan too far": (lambda b: _plan(b, date="2030-01-01"), "date_out_of_range", "future[0].date"),
    "plan twice": (lambda b: b["future"].insert(1, b["future"][0]), "duplicate_date", "future[1].date"),
    "plan NaN": (lambda b: _plan(b, temperature=float("nan")), "invalid_field", "future[0].temperature"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_the_field_is_named(name: str, forecaster: Forecaster, body: dict[str, Any]) -> None:
    from bentos.serving import Problem

    change, code, field = BAD[name]
    change(body)
    with pytest.raises(Problem) as refused:
        forecaster.answer(body)
    problem = refused.value.document()
    assert (problem["status"], problem["code"], problem["field"]) == (422, code, field)
    assert problem["hint"]


@pytest.mark.parametrize("name", ["no history", "horizon endless", "sales NaN", "a gap", "date at the end of time"])
def test_the_service_passes_problems_on(name: str, client: TestClient, body: dict[str, Any]) -> None:
    change, code, field = BAD[name]
    change(body)
    content = (
        json.dumps(body)
        if name != "horizon endless"
        else json.dumps({**body, "horizon": 7}).replace('"horizon": 7', '"horizon": 1' + "0" * 3999)
    )
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert answer.json()["field"] in (field, "body")
    assert answer.json()["code"] in (code, "invalid_json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe"])
def test_a_body_that_is_no_request_is_refused(content: bytes, client: TestClient) -> None:
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["field"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_PLACES = ["history", "horizon", "future", "row", "date", "store", "sales", "price", "plan"]


@settings(max_examples=150, deadline=None)
@given(value=JSON, where=st.sampled_from(_PLACES))
def test_no_input_whatever_is_a_server_error(value: Any, where: str, client: TestClient, outcome: Outcome) -> None:
    body = copy.deepcopy(outcome.sample)
    if where in body:
        body[where] = value
    elif where == "row":
        body["history"][0] = value
    elif where == "plan":
        body["future"][0] = value
    else:
        body["history"][0][where] = value
    content = json.dumps(body).encode()
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 422), answer.text
    assert answer.status_code == 200 or answer.json()["field"]


def test_files_that_are_no_forecaster_are_refused_with_a_reason(tmp_path: Path, outcome: Outcome) -> None:
    text = tmp_path / "model.txt"
    text.write_text("tree\nversion=v4\n")
    with pytest.raises(StartError) as no_model:
        Forecaster.load(text)
    assert no_model.value.code == "model_load_failed"
    rng = np.random.default_rng(0)
    lgb.train({"verbosity": -1}, lgb.Dataset(rng.random((90, 2)), rng.random(90)), 3).save_model(str(text))
    with pytest.raises(StartError, match="no model of demand"):
        Forecaster.load(text)
    head, _, _ = outcome.files["forecast.txt"].decode().partition("pandas_categorical")
    text.write_text(head + "pandas_categorical:[]\n")
    with pytest.raises(StartError, match="stores and items"):
        Forecaster.load(text)


def test_the_command_trains_writes_and_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model"
    arguments = ["--small", "--stores", "1", "--days", "500", "--rounds", "20", "--no-mlflow", "--out", str(out)]
    assert training.main(arguments) == 0
    printed = capsys.readouterr()
    assert "seasonal naive" in printed.out
    assert f"file=@{out / 'files' / 'forecast.txt'}" in printed.out
    folder = ModelFolder.read(out)
    folder.verify()
    assert (folder.kind, folder.format, folder.files) == ("forecast", "lightgbm-text", ("forecast.txt",))


@pytest.mark.parametrize(
    "arguments", [["--days", "100"], ["--horizon", "40"], ["--stores", "0"], ["--real", "sunspots"]]
)
def test_the_command_refuses_what_cannot_work(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        training.main(["--small", *arguments])
    assert left.value.code == 2
    assert arguments[0] in capsys.readouterr().err
