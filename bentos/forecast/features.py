"""From a history to the numbers a tree sees: one row for each series, origin and horizon.

The *origin* is the last day that is known, the *horizon* how many steps after it the forecast is for. Nothing after the
origin is looked at, except what is planned or forecast for the target day (`Plan`). Training and serving call the same
function. Windows are cut out and summed one by one, so that a longer history never changes a feature by rounding.

Sales are divided by the *level*, the mean of the last weeks, and the model learns the ratio. So it carries over to
series of any size, follows a trend beyond what it has seen, and knows what to do with a new store or item.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bentos.forecast.data import Series

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cadence:
    """How often there is a value, and the windows that follow from it, in steps."""

    name: str
    season: int
    short: int
    level: int
    long: int
    year: int | None
    """Steps after which the year repeats with the same place in the season; None where the season is the year."""


DAILY = Cadence("daily", season=7, short=7, level=28, long=84, year=364)
WEEKLY = Cadence("weekly", season=52, short=8, level=52, long=156, year=None)
MONTHLY = Cadence("monthly", season=12, short=3, level=12, long=36, year=None)

NAMES = (
    "horizon",
    "place_in_season",
    "year_sin",
    "year_cos",
    "holiday",
    "holiday_next",
    "discount",
    "paid_ratio",
    "temperature",
    "temperature_change",
    "discount_recent",
    "temperature_recent",
    "last",
    "mean_short",
    "mean_long",
    "spread",
    "season_last",
    "season_mean",
    "year_ago",
    "year_trend",
    "store",
    "item",
)
CATEGORIES = ("store", "item")
LEAST_LEVEL = 0.05
"""Below this a series counts as one that sells nothing; keeps ratios finite."""
_REPEATS = 4


@dataclass(frozen=True)
class Plan:
    """What is known beforehand of the target days; each of length m, NaN where it is not known."""

    price: Floats
    discount: Floats
    holiday: Floats
    holiday_next: Floats
    temperature: Floats

    @classmethod
    def unknown(cls, rows: int) -> Plan:
        nothing = np.full(rows, np.nan)
        return cls(nothing, nothing, nothing, nothing, nothing)


def level(sales: Floats, origin: Ints, cadence: Cadence) -> Floats:
    """Mean of the last `cadence.level` values at each origin, at least LEAST_LEVEL; NaN where none is known."""
    return np.asarray(np.maximum(_mean(_window(sales, origin, cadence.level)), LEAST_LEVEL))


def matrix(
    series: Series,
    origin: Ints,
    horizon: Ints,
    plan: Plan,
    cadence: Cadence,
    codes: tuple[float, float] = (math.nan, math.nan),
) -> Floats:
    """Features, shape (m, len(NAMES)), of m pairs of origin and horizon. `codes` stand for store and item."""
    sales = series.sales
    base = level(sales, origin, cadence)
    place, sin, cos = _calendar(series.start, origin + horizon, cadence)
    paid = series.price * (1.0 - np.where(np.isnan(series.discount), 0.0, series.discount))
    temperature = _mean(_window(series.temperature, origin, cadence.short))
    back = -(-horizon // cadence.season) * cadence.season  # to the same place of the last season that is known
    same = origin + horizon - back
    seasons = _take(sales, same[:, None] - cadence.season * np.arange(_REPEATS)[None, :])
    columns = {
        "horizon": horizon.astype(np.float64),
        "place_in_season": place,
        "year_sin": sin,
        "year_cos": cos,
        "holiday": plan.holiday,
        "holiday_next": plan.holiday_next,
        "discount": plan.discount,
        "paid_ratio": plan.price
        * (1.0 - np.where(np.isnan(plan.discount), 0.0, plan.discount))
        / _mean(_window(paid, origin, cadence.level)),
        "temperature": plan.temperature,
        "temperature_change": plan.temperature - temperature,
        "discount_recent": _mean(_window(series.discount, origin, cadence.level)),
        "temperature_recent": temperature,
        "last": _take(sales, origin) / base,
        "mean_short": _mean(_window(sales, origin, cadence.short)) / base,
        "mean_long": _mean(_window(sales, origin, cadence.long)) / base,
        "spread": _deviation(_window(sales, origin, cadence.level)) / base,
        "season_last": seasons[:, 0] / base,
        "season_mean": _mean(seasons) / base,
        **_year(sales, origin, horizon, base, cadence),
        "store": np.full(len(origin), codes[0]),
        "item": np.full(len(origin), codes[1]),
    }
    return np.column_stack([columns[name] for name in NAMES])


def seasonal_naive(sales: Floats, origin: Ints, horizon: Ints, cadence: Cadence, repeats: int = 1) -> Floats:
    """The value at the same place of the last known season (Hyndman and Athanasopoulos, FPP3 §5.2), or the mean of the
    last `repeats` seasons; values that are missing are passed over."""
    same = origin + horizon - -(-horizon // cadence.season) * cadence.season
    values = _take(sales, same[:, None] - cadence.season * np.arange(max(repeats, 8))[None, :])
    if repeats > 1:
        return _mean(values[:, :repeats])
    first = np.argmax(~np.isnan(values), axis=1)
    return np.asarray(values[np.arange(len(values)), first])


def _year(sales: Floats, origin: Ints, horizon: Ints, base: Floats, cadence: Cadence) -> dict[str, Floats]:
    if cadence.year is None:
        nothing = np.full(len(origin), np.nan)
        return {"year_ago": nothing, "year_trend": nothing}
    # The week around the day a year before the target, beside the level of that time; always before the origin.
    middle = np.minimum(origin + horizon - cadence.year + 3, origin)
    then = np.maximum(_mean(_window(sales, origin - cadence.year, cadence.level)), LEAST_LEVEL)
    around = _mean(_window(sales, middle, cadence.season))
    return {"year_ago": around / then, "year_trend": base / then}


def _calendar(start: dt.date, target: Ints, cadence: Cadence) -> tuple[Floats, Floats, Floats]:
    """Place in the season, and the sine and cosine of the time of the year, of each target."""
    distinct, where = np.unique(target, return_inverse=True)
    places, turns = np.empty(len(distinct)), np.empty(len(distinct))
    for i, step in enumerate(distinct.tolist()):
        date = date_of(start, step, cadence)
        day = (date.timetuple().tm_yday - 1) / 365.25
        turns[i] = 2.0 * math.pi * day
        places[i] = {7: date.weekday(), 12: date.month - 1}.get(cadence.season, math.floor(day * cadence.season))
    return places[where], np.sin(turns)[where], np.cos(turns)[where]


def date_of(start: dt.date, step: int, cadence: Cadence) -> dt.date:
    """Date of the value number `step` of a series."""
    if cadence.season == 12:
        months = start.year * 12 + start.month - 1 + step
        return dt.date(months // 12, months % 12 + 1, 1)
    return start + dt.timedelta(days=step * (7 if cadence.season == 52 else 1))


def _window(values: Floats, end: Ints, length: int) -> Floats:
    """(m, length): the last `length` values up to and with each `end`; NaN before the start."""
    return _take(values, end[:, None] - np.arange(length)[None, :])


def _take(values: Floats, index: Ints) -> Floats:
    known = (index >= 0) & (index < len(values))
    return np.asarray(np.where(known, values[np.clip(index, 0, len(values) - 1)], np.nan))


def _mean(window: Floats) -> Floats:
    """Row means of what is known; NaN where nothing is."""
    known = ~np.isnan(window)
    count = known.sum(axis=1)
    total = np.where(known, window, 0.0).sum(axis=1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _deviation(window: Floats) -> Floats:
    return np.sqrt(np.maximum(_mean((window - _mean(window)[:, None]) ** 2), 0.0))


def codes_of(categories: Sequence[Sequence[str]], store: str, item: str) -> tuple[float, float]:
    """Numbers that stand for a store and an item in a model; NaN for those it has never seen."""
    store_code, item_code = (
        float(known.index(name)) if name in known else math.nan
        for known, name in zip(categories, (store, item), strict=True)
    )
    return store_code, item_code
