"""The made-up demand has the structure that bentos.forecast.data writes down, and features never look ahead."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bentos.forecast import data, features
from bentos.forecast.features import DAILY, MONTHLY, NAMES, WEEKLY, Cadence, Plan


@pytest.fixture(scope="module")
def panel() -> data.Panel:
    return data.make(stores=6, days=1100, seed=3)


def _of(panel: data.Panel, item: str) -> list[int]:
    return [number for number, series in enumerate(panel.series) if series.item == item]


def test_the_same_seed_gives_the_same_panel_and_another_seed_another() -> None:
    assert data.make(1, 120, 1).digest == data.make(1, 120, 1).digest
    assert data.make(1, 120, 1).digest != data.make(1, 120, 2).digest


def test_sales_are_counts_more_spread_than_poisson_as_the_dispersion_says(panel: data.Panel) -> None:
    sales = np.concatenate([series.sales for series in panel.series])
    mean = np.concatenate(panel.mean)
    assert (sales >= 0).all()
    assert (sales == np.round(sales)).all()
    assert sales.mean() == pytest.approx(mean.mean(), rel=0.01)
    # Var = mean + mean² / k, so k is found again from the squares
    k = (mean**2).sum() / ((sales - mean) ** 2 - mean).sum()
    assert k == pytest.approx(data.DISPERSION, rel=0.05)


def test_a_lower_price_sells_more_by_the_elasticity_of_the_item(panel: data.Panel) -> None:
    """Regression of log mean on log paid price within each series, season and shocks averaging out."""
    for drink in data.DRINKS:
        found = []
        for number in _of(panel, drink.name):
            series = panel.series[number]
            log_mean = np.log(panel.mean[number]) - 0.15 * (series.discount > 0)
            paid = np.log(series.price * (1 - series.discount))
            # compare each promotion week with the week before it, same weekdays
            for day in np.flatnonzero((series.discount[7:] > 0) & (series.discount[:-7] == 0)) + 7:
                if series.holiday[[day, day - 7]].any() or paid[day] == paid[day - 7]:
                    continue
                found.append((log_mean[day] - log_mean[day - 7]) / (paid[day] - paid[day - 7]))
        assert np.median(found) == pytest.approx(drink.elasticity, abs=0.25)


def test_coffee_is_for_workdays_and_beer_for_the_weekend(panel: data.Panel) -> None:
    weekday = np.arange(panel.length) % 7  # the first day is a Monday
    for item, sign in (("coffee", -1), ("beer", 1)):
        sales = np.mean([panel.series[number].sales for number in _of(panel, item)], axis=0)
        assert sign * (sales[weekday == 5].mean() - sales[weekday == 1].mean()) > 0.2 * sales.mean()


def test_a_weather_forecast_gets_worse_with_its_lead_and_holds_no_answer(panel: data.Panel) -> None:
    for store, forecast in panel.temperature_forecast.items():
        came = next(series.temperature for series in panel.series if series.store == store)
        error = [np.std(forecast[: -lead - 1, lead - 1] - came[lead:-1]) for lead in (1, 5, 14)]
        assert error[0] < error[1] < error[2]
        assert error[0] > 0.2


def test_the_real_series_are_those_of_statsmodels() -> None:
    nino, co2 = data.real("elnino"), data.real("co2")
    assert (len(nino.sales), nino.start, nino.sales[0]) == (732, dt.date(1950, 1, 1), 23.11)
    assert (len(co2.sales), co2.start, co2.sales[0]) == (2284, dt.date(1958, 3, 29), 316.1)
    with pytest.raises(ValueError, match="elnino and co2"):
        data.real("nile")


@settings(max_examples=25, deadline=None)
@given(origin=st.integers(27, 900), horizon=st.integers(1, 28), seed=st.integers(0, 99))
def test_nothing_after_the_origin_changes_a_feature(origin: int, horizon: int, seed: int, panel: data.Panel) -> None:
    """The future of sales, prices, discounts, holidays and weather is shuffled, and later days are cut off."""
    series = panel.series[seed % len(panel.series)]
    rng = np.random.default_rng(seed)
    plan = Plan(*(np.array([value]) for value in (2.0, 0.1, 0.0, 1.0, 15.0)))
    at = (np.array([origin]), np.array([horizon]))

    def shuffled(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values[: origin + 1], rng.permutation(values[origin + 1 :]) + 7])

    names = ("sales", "price", "discount", "holiday", "temperature")
    other = replace(series, **{name: shuffled(getattr(series, name)) for name in names})
    short = replace(series, **{name: getattr(series, name)[: origin + 1] for name in names})
    first = features.matrix(series, *at, plan, DAILY, (0, 1))
    np.testing.assert_array_equal(first, features.matrix(other, *at, plan, DAILY, (0, 1)))
    np.testing.assert_array_equal(first, features.matrix(short, *at, plan, DAILY, (0, 1)))
    for one in (other, short):
        np.testing.assert_array_equal(
            features.level(series.sales, at[0], DAILY), features.level(one.sales, at[0], DAILY)
        )
        np.testing.assert_array_equal(
            features.seasonal_naive(series.sales, *at, DAILY), features.seasonal_naive(one.sales, *at, DAILY)
        )


def test_features_of_many_rows_are_those_of_each_alone(panel: data.Panel) -> None:
    origin, horizon = np.arange(40, 700, 13), np.arange(51) % 28 + 1
    together = features.matrix(panel.series[0], origin, horizon, Plan.unknown(51), DAILY)
    for i in (0, 17, 50):
        alone = features.matrix(panel.series[0], origin[[i]], horizon[[i]], Plan.unknown(1), DAILY)
        np.testing.assert_array_equal(together[[i]], alone)


def test_features_of_a_worked_example() -> None:
    """Sales count the days, so each mean can be done in the head."""
    count = np.arange(100, dtype=np.float64)
    ones = np.ones(100)
    series = data.Series("s", "i", dt.date(2024, 1, 1), count, ones * 2, ones * 0, ones * 0, ones * 20)
    plan = Plan(np.array([3.0]), np.array([0.5]), np.array([1.0]), np.array([0.0]), np.array([25.0]))
    row = features.matrix(series, np.array([99]), np.array([10]), plan, DAILY, (4, np.nan))[0]
    found = dict(zip(NAMES, row.tolist(), strict=True))
    base = np.arange(72, 100).mean()
    assert features.level(count, np.array([99]), DAILY)[0] == base
    assert found["place_in_season"] == dt.date(2024, 4, 19).weekday()  # day 109
    assert found["last"] == 99 / base
    assert found["mean_short"] == 96 / base
    assert found["season_last"] == 95 / base  # day 109 − 14, the last same weekday that is known
    assert found["season_mean"] == np.mean([95, 88, 81, 74]) / base
    assert found["paid_ratio"] == 3.0 * 0.5 / 2.0
    assert found["temperature_change"] == 5.0
    assert (found["store"], np.isnan(found["item"]), np.isnan(found["year_ago"])) == (4, True, True)


@pytest.mark.parametrize("cadence", [DAILY, WEEKLY, MONTHLY])
def test_the_seasonal_naive_forecast_repeats_the_last_season(cadence: Cadence) -> None:
    season = np.random.default_rng(0).random(cadence.season)
    sales = np.tile(season, 4)
    horizon = np.arange(1, 2 * cadence.season + 1)
    origin = np.full(len(horizon), len(sales) - 1)
    np.testing.assert_array_equal(features.seasonal_naive(sales, origin, horizon, cadence), np.tile(season, 2))


def test_months_and_weeks_are_counted_as_the_calendar_does() -> None:
    assert features.date_of(dt.date(1950, 11, 1), 3, MONTHLY) == dt.date(1951, 2, 1)
    assert features.date_of(dt.date(2024, 2, 26), 1, WEEKLY) == dt.date(2024, 3, 4)
    assert features.date_of(dt.date(2024, 2, 28), 2, DAILY) == dt.date(2024, 3, 1)
