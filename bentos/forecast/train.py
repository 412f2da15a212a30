"""Trains a forecaster of beverage demand: `python -m bentos.forecast.train`.

One gradient-boosted model forecasts every series and horizon directly ("global" and "direct" in the terms of
Januschowski et al., IJF 2020): a row is a series, an origin and a horizon. The loss is Poisson's with the log of the
level as offset, so the model learns the ratio of sales to their level; it is consistent for the mean of over-dispersed
counts too.

*Time split*: the last TEST_WINDOWS × horizon days are the test. No row whose target lies in them is trained on, and
forecasts are made at the start of each window with nothing later known but the plan, and the weather forecast of that
day.

*Unknown things*: in a share of the training rows the plan, the weather forecast, the regressors of the past, or the
names of store and item are left out at random, so that the model has learnt what to expect when a request leaves them
out.

*Registered sales*: with --database the series are those that `bentos.forecast.batch` keeps, without weather forecasts.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from bentos.forecast import data, features
from bentos.forecast.data import Panel, Series
from bentos.forecast.features import DAILY, MONTHLY, NAMES, WEEKLY, Cadence, Plan
from bentos.forecast.forecasting import LEAST_DAYS, Forecaster
from bentos.serving.model import ModelFolder
from bentos.training import command, plots
from bentos.training.command import positive
from bentos.training.gate import Gate
from bentos.training.outcome import Outcome, Progress, table

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

TEST_WINDOWS = 4
GATE = ("wape", "lower")
TOLERANCE = 0.002
"""Share of the sales by which the error may be larger than the live model's before a new one is held back."""
_PLANNED = ("holiday", "holiday_next", "discount", "paid_ratio", "temperature", "temperature_change")
_WEATHER = ("temperature", "temperature_change")
_PAST = ("paid_ratio", "discount_recent", "temperature_recent", "temperature_change")
# Shares of the training rows in which these are left out.
_LEFT_OUT = ((_PLANNED, 0.15), (_WEATHER, 0.10), (_PAST, 0.05), (features.CATEGORIES, 0.10))


@dataclass(frozen=True)
class Settings:
    """Of one training."""

    stores: int = 5
    days: int = 1200
    seed: int = 7
    horizon: int = 28
    rounds: int = 400
    learning_rate: float = 0.05
    leaves: int = 31
    per_origin: int = 4
    """Horizons drawn for each origin and series."""
    real: tuple[str, ...] = ("elnino", "co2")
    threads: int = 1
    """More are faster on a machine with nothing else to do, and many times slower on a busy one."""
    database: str | None = field(default=None, repr=False)
    """Registered sales in place of simulated ones: the last `days` days of every series. It may hold a password."""

    @classmethod
    def small(cls, seed: int = 7) -> Settings:
        """Seconds: for a demonstration and for tests."""
        return cls(stores=2, days=800, seed=seed, rounds=120, learning_rate=0.08, leaves=15, per_origin=2, real=())


@dataclass(frozen=True)
class Rows:
    """Features of m rows, what was sold on the target day (NaN where not known), and the level at the origin."""

    features: Floats
    sales: Floats
    level: Floats


def read(settings: Settings) -> Panel:
    """The data of these settings. Raises ValueError where the database does not work or has too few sales."""
    if settings.database is None:
        return data.make(settings.stores, settings.days, settings.seed)
    from sqlalchemy.exc import SQLAlchemyError

    from bentos.forecast.batch import sales
    from bentos.forecast.batch.tables import Database, trouble

    try:
        database = Database(settings.database)
        try:
            database.migrate()
            panel = sales.panel(database, settings.days)
        finally:
            database.close()
    except SQLAlchemyError as error:
        raise ValueError(trouble(error)) from error
    least = TEST_WINDOWS * settings.horizon + 4 * LEAST_DAYS
    if panel.length < least:
        raise ValueError(
            f"{panel.length} days of sales are registered; a horizon of {settings.horizon} needs {least}: the last "
            f"{TEST_WINDOWS * settings.horizon} are kept for the test"
        )
    return panel


def rows_at(panel: Panel, origin: Ints, horizon: Ints, cadence: Cadence, categories: Sequence[Sequence[str]]) -> Rows:
    """Rows of every series of the panel at the same origins and horizons; series by series."""
    parts = [_rows(panel, series, origin, horizon, cadence, categories) for series in panel.series]
    return Rows(
        np.concatenate([part.features for part in parts]),
        np.concatenate([part.sales for part in parts]),
        np.concatenate([part.level for part in parts]),
    )


def training_rows(panel: Panel, end: int, settings: Settings, categories: Sequence[Sequence[str]]) -> Rows:
    """Rows whose targets lie before day `end`, with some of what is known left out."""
    rng = np.random.default_rng(settings.seed)
    origin = np.repeat(np.arange(LEAST_DAYS - 1, end - 1), settings.per_origin)
    horizon = rng.integers(1, settings.horizon + 1, len(origin))
    horizon[0] = settings.horizon  # the range of this feature tells the service how far the model can look
    before = origin + horizon < end
    rows = rows_at(panel, origin[before], horizon[before], DAILY, categories)
    known = rows.features
    for names, share in _LEFT_OUT:
        known = _left_out(known, names, rng.random(len(known)) < share)
    return replace(rows, features=known)


def windows(end: int, horizon: int, count: int) -> tuple[Ints, Ints]:
    """Origins and horizons of `count` forecasts, one after the other, which end at day `end` (exclusive)."""
    starts = end - horizon * np.arange(count, 0, -1) - 1
    return np.repeat(starts, horizon), np.tile(np.arange(1, horizon + 1), count)


def fit(rows: Rows, settings: Settings, progress: Progress, what: str, categorical: bool = True) -> lgb.Booster:
    """Trains a booster. The same rows and settings give the same bytes."""
    usable = ~np.isnan(rows.sales) & ~np.isnan(rows.level)
    dataset = lgb.Dataset(
        rows.features[usable],
        rows.sales[usable],
        init_score=np.log(rows.level[usable]),
        feature_name=list(NAMES),
        categorical_feature=list(features.CATEGORIES) if categorical else [],
    )
    parameters: dict[str, Any] = {
        "objective": "poisson",
        "learning_rate": settings.learning_rate,
        "num_leaves": settings.leaves,
        "min_data_in_leaf": 50,
        "lambda_l2": 1.0,
        "feature_fraction": 0.8,
        "seed": settings.seed,
        "num_threads": settings.threads,
        "deterministic": True,
        "force_row_wise": True,
        "verbosity": -1,
    }
    with progress.rounds(what, settings.rounds) as report:
        return lgb.train(parameters, dataset, settings.rounds, callbacks=[report])


def rmse(actual: Floats, forecast: Floats) -> float:
    """Root mean squared error."""
    return float(np.sqrt(np.mean((actual - forecast) ** 2)))


def wape(actual: Floats, forecast: Floats) -> float:
    """Weighted absolute percentage error: Σ|error| / Σ|actual|, as a share."""
    return float(np.abs(actual - forecast).sum() / np.abs(actual).sum())


def measure(panel: Panel, booster: lgb.Booster, settings: Settings, categories: Sequence[Sequence[str]]) -> Scores:
    """Errors in the test windows, beside the naive forecasts and the true mean."""
    origin, horizon = windows(panel.length, settings.horizon, TEST_WINDOWS)
    rows = rows_at(panel, origin, horizon, DAILY, categories)
    everywhere = np.ones(len(rows.sales), dtype=np.bool_)
    blind = _left_out(rows.features, _PLANNED, everywhere)
    nameless = _left_out(rows.features, features.CATEGORIES, everywhere)

    def naive(repeats: int) -> Floats:
        each = [features.seasonal_naive(s.sales, origin, horizon, DAILY, repeats) for s in panel.series]
        return np.concatenate(each)

    forecasts = {
        "seasonal naive": naive(1),
        "mean of the last 4 same weekdays": naive(4),
        "model": rows.level * np.asarray(booster.predict(rows.features, num_threads=settings.threads)),
        "model, no plan and no weather": rows.level * np.asarray(booster.predict(blind, num_threads=settings.threads)),
        "model, stores and items unknown": rows.level
        * np.asarray(booster.predict(nameless, num_threads=settings.threads)),
    }
    if panel.mean:
        forecasts["the true mean"] = np.concatenate([mean[origin + horizon] for mean in panel.mean])
    return Scores.of(panel.name, _period(panel.series[0], origin, horizon, DAILY), rows.sales, forecasts)


def evaluate_real(name: str, settings: Settings, progress: Progress) -> Scores:
    """Trains on the first three quarters of a real series and forecasts one season ahead from each later origin."""
    series = data.real(name)
    cadence = {"elnino": MONTHLY, "co2": WEEKLY}[name]
    panel = Panel(name, (series,), {}, ())
    end, season = int(panel.length * 0.75), cadence.season
    steps = np.arange(1, season + 1)
    origin = np.repeat(np.arange(cadence.level - 1, end - 1), season)
    horizon = np.tile(steps, len(origin) // season)
    before = origin + horizon < end
    unknown: tuple[list[str], list[str]] = ([], [])
    rows = rows_at(panel, origin[before], horizon[before], cadence, unknown)
    own = replace(settings, leaves=7, rounds=300)
    booster = fit(rows, own, progress, name, categorical=False)
    origin = np.repeat(np.arange(end - 1, panel.length - season), season)
    horizon = np.tile(steps, len(origin) // season)
    rows = rows_at(panel, origin, horizon, cadence, unknown)
    naive = features.seasonal_naive(series.sales, origin, horizon, cadence)
    growth = series.sales[origin] - series.sales[origin - season]
    forecasts = {
        "seasonal naive": naive,
        "seasonal naive with drift": naive + np.where(np.isnan(growth), 0.0, growth),
        "mean of the last 4 seasons": features.seasonal_naive(series.sales, origin, horizon, cadence, 4),
        "model": rows.level * np.asarray(booster.predict(rows.features, num_threads=settings.threads)),
    }
    return Scores.of(name, _period(series, origin, horizon, cadence), rows.sales, forecasts)


def evaluate(folder: ModelFolder, settings: Settings) -> dict[str, float]:
    """The metrics of a saved model in the test windows of these settings, as its training logged them."""
    forecaster = Forecaster.load(folder.path())
    panel = read(settings)
    return measure(panel, forecaster.booster, settings, forecaster.categories).metrics()


_SHORT = {
    "model": "",
    "seasonal naive": "_seasonal_naive",
    "the true mean": "_true_mean",
    "seasonal naive with drift": "_naive_with_drift",
    "mean of the last 4 same weekdays": "_mean_of_4",
    "mean of the last 4 seasons": "_mean_of_4",
    "model, no plan and no weather": "_no_plan",
    "model, stores and items unknown": "_unknown_series",
}
"""Forecasts as the names of metrics end."""


@dataclass(frozen=True)
class Scores:
    """Forecasts beside what came, on the same days for all: those where every one of them is known."""

    name: str
    period: str
    actual: Floats
    forecasts: dict[str, Floats]

    @classmethod
    def of(cls, name: str, period: str, actual: Floats, forecasts: dict[str, Floats]) -> Scores:
        known = ~np.isnan(np.stack([actual, *forecasts.values()])).any(axis=0)
        return cls(name, period, actual[known], {name: values[known] for name, values in forecasts.items()})

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """RMSE and WAPE of every forecast; those of the model and the seasonal naive one first."""
        found = {}
        for name, short in _SHORT.items():
            if name in self.forecasts:
                found[f"{prefix}rmse{short}"] = rmse(self.actual, self.forecasts[name])
                found[f"{prefix}wape{short}"] = wape(self.actual, self.forecasts[name])
        return found

    def table(self) -> str:
        rows: list[list[str | float]] = [
            [name, rmse(self.actual, f), f"{100 * wape(self.actual, f):.2f} %"] for name, f in self.forecasts.items()
        ]
        return table([f"{self.name}, {self.period}", "RMSE", "WAPE"], rows, digits=3)


def train(settings: Settings, progress: Progress) -> tuple[Outcome, str]:
    """The whole way from a seed to a model, and the tables that say how good it is."""
    progress("reading the registered sales" if settings.database else f"simulating {settings.stores} stores")
    panel = read(settings)
    categories = [sorted({s.store for s in panel.series}), sorted({s.item for s in panel.series})]
    rows = training_rows(panel, panel.length - TEST_WINDOWS * settings.horizon, settings, categories)
    progress(f"{len(panel.series)} series, {len(rows.sales)} training rows of {len(NAMES)} features")
    booster = fit(rows, settings, progress, "demand")
    booster.pandas_categorical = categories  # so the model file itself says which numbers stand for which names
    scores = [measure(panel, booster, settings, categories)]
    metrics = scores[0].metrics()
    for name in settings.real:
        scores.append(evaluate_real(name, settings, progress))
        metrics |= scores[-1].metrics(f"{name}_")
    text = booster.model_to_string()
    sample = sample_request(panel, settings)
    outcome = Outcome(
        kind="forecast",
        format="lightgbm-text",
        files={"forecast.txt": text.encode()},
        sample=sample,
        expected=Forecaster.of(text).answer(sample),
        parameters={
            "stores": len(categories[0]),
            "days": panel.length,
            "seed": settings.seed,
            "horizon": settings.horizon,
            "rounds": settings.rounds,
            "learning_rate": settings.learning_rate,
            "num_leaves": settings.leaves,
            "per_origin": settings.per_origin,
            "test_days": TEST_WINDOWS * settings.horizon,
        },
        metrics=metrics,
        dataset=panel.name,
        dataset_digest=panel.digest,
    )
    return outcome, "\n\n".join(one.table() for one in scores)


def sample_request(panel: Panel, settings: Settings) -> dict[str, Any]:
    """Eight weeks of two series before the last test window, and the plan of the week after."""
    end = panel.length - settings.horizon
    days = min(7, settings.horizon)
    history: list[dict[str, Any]] = []
    future: list[dict[str, Any]] = []
    sold = [series for series in panel.series if not np.isnan(series.sales[end - LEAST_DAYS : end]).all()]
    for series in sold[:2]:
        forecasts = panel.temperature_forecast.get(series.store)
        for day in range(end - 56, end + days):
            date = features.date_of(series.start, day, DAILY)
            row: dict[str, Any] = {"date": date.isoformat(), "store": series.store, "item": series.item}
            plan: dict[str, Any] = {"price": _known(series.price[day]), "discount": _known(series.discount[day])}
            holiday = _known(series.holiday[day])
            plan |= {"holiday": None if holiday is None else bool(holiday)}
            if day < end:
                past = {"sales": _known(series.sales[day]), "temperature": _known(series.temperature[day])}
                history.append(row | plan | past)
            else:
                weather = None if forecasts is None else _known(forecasts[end - 1][day - end])
                future.append(row | plan | {"temperature": weather})
    return {"history": history, "horizon": days, "future": future}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.forecast.train",
        description="Train a forecaster of the demand of beverages by store, item and day on simulated sales, and "
        "compare it with the seasonal naive forecast; the method is also tried on two real public series. The result "
        "is a model folder, ready to upload.",
        epilog="Example: python -m bentos.forecast.train --small --register http://localhost:8000",
    )
    parser.add_argument("--stores", type=positive, help="stores, each sells eight drinks (default 5; 2 with --small)")
    parser.add_argument("--days", type=positive, help="days of history, at least 500 (default 1200; 800 with --small)")
    parser.add_argument("--horizon", type=positive, default=28, help=f"days ahead, at most {data.LEADS} (default 28)")
    parser.add_argument("--seed", type=int, default=7, help="same seed, same data, same model file (default 7)")
    parser.add_argument("--rounds", type=positive, help="trees (default 400; 120 with --small)")
    parser.add_argument(
        "--real",
        choices=("elnino", "co2", "both", "none"),
        help="real series to try the method on; they ship with statsmodels (default both; none with --small)",
    )
    parser.add_argument(
        "--database",
        metavar="URL",
        nargs="?",
        const="",
        help="train on the registered sales of this database (bentos.forecast.batch); without URL: of "
        "EKIBEN_FORECAST_DATABASE",
    )
    parser.add_argument(
        "--only-new",
        action="store_true",
        help="with --database and --register: train nothing where these very sales were trained on and decided about",
    )
    parser.add_argument("--threads", type=positive, default=1, help="for LightGBM, on an idle machine (default 1)")
    parser.add_argument("--small", action="store_true", help="a few seconds, for a first look")
    command.add_options(parser, Path(__file__).parent / "model")
    options = parser.parse_args(arguments)
    settings = Settings.small(options.seed) if options.small else Settings(seed=options.seed)
    real = {None: settings.real, "both": ("elnino", "co2"), "none": ()}.get(options.real, (options.real,))
    settings = replace(
        settings,
        stores=options.stores or settings.stores,
        days=options.days or settings.days,
        rounds=options.rounds or settings.rounds,
        horizon=options.horizon,
        real=real,
        threads=options.threads,
        database=options.database or (os.environ.get("EKIBEN_FORECAST_DATABASE") if options.database == "" else None),
    )
    if options.database == "" and settings.database is None:
        parser.error("--database has no URL, and EKIBEN_FORECAST_DATABASE is not set")
    if settings.database:
        settings = replace(settings, real=())
    if settings.days < 500:
        parser.error("--days must be at least 500: the model looks one year back, and the end is kept for the test")
    if settings.horizon > data.LEADS:
        parser.error(f"--horizon must be at most {data.LEADS}: the weather is forecast no further")
    progress = Progress.start(options.quiet)
    try:
        if options.only_new and settings.database and command.is_decided("forecast", read(settings).digest, options):
            print("no new sales since the last training")
            return 0
        outcome, shown = train(settings, progress)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is not installed; install it, or leave the real series out with --real none")
    print(shown)
    if not options.no_mlflow:
        names = {"seasonal naive": "wape_seasonal_naive", "model": "wape", "the true mean": "wape_true_mean"}
        known = {name: outcome.metrics[metric] for name, metric in names.items() if metric in outcome.metrics}
        picture = plots.bars(known, "WAPE, test windows (less is better)", "model")
        outcome = replace(outcome, plots={"wape.png": picture})
    gate = Gate(*GATE, TOLERANCE, lambda folder: evaluate(folder, settings))
    return command.finish(outcome, options, progress, gate)


def _rows(
    panel: Panel, series: Series, origin: Ints, horizon: Ints, cadence: Cadence, categories: Sequence[Sequence[str]]
) -> Rows:
    target = origin + horizon
    weather = panel.temperature_forecast.get(series.store)
    plan = Plan(
        price=_at(series.price, target),
        discount=_at(series.discount, target),
        holiday=_at(series.holiday, target),
        holiday_next=_at(series.holiday, target + 1),
        temperature=np.full(len(origin), np.nan) if weather is None else weather[origin, horizon - 1],
    )
    codes = features.codes_of(categories, series.store, series.item)
    return Rows(
        features=features.matrix(series, origin, horizon, plan, cadence, codes),
        sales=_at(series.sales, target),
        level=features.level(series.sales, origin, cadence),
    )


def _left_out(rows: Floats, names: Sequence[str], chosen: NDArray[np.bool_]) -> Floats:
    """The rows, with the named features unknown where `chosen`."""
    columns = np.array([name in names for name in NAMES])
    return np.where(chosen[:, None] & columns[None, :], np.nan, rows)


def _at(values: Floats, index: Ints) -> Floats:
    return np.asarray(np.where(index < len(values), values[np.minimum(index, len(values) - 1)], np.nan))


def _period(series: Series, origin: Ints, horizon: Ints, cadence: Cadence) -> str:
    target = origin + horizon
    first, last = (features.date_of(series.start, int(step), cadence) for step in (target.min(), target.max()))
    return f"{_day(first)} to {_day(last)}, {horizon.max()} steps ahead"


def _day(date: dt.date) -> str:
    return date.isoformat()


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


if __name__ == "__main__":
    raise SystemExit(main())
