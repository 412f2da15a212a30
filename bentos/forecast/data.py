"""Demand of beverages, made up with a known structure, and real public series.

*The made-up demand* of item i in store s on day t is negative binomial: its mean is the exponential of a sum, and its
variance is mean + mean² / DISPERSION (over-dispersed, as real counts are). The sum:

    level        log of 8 to 60 a day: size of the store + popularity of the item
    trend        −10 % to +15 % a year, by item
    week         a profile of seven days by item (coffee on workdays, beer at the weekend) and a flatter one by store
    year         a sine of one year, by item: cold drinks peak in summer, hot ones in winter
    price        elasticity (−0.8 to −2.4, by item) × log(price / usual price); a list price changes a few times a year
    promotion    a discount of 10 to 30 % for a week at a time acts through the price, plus 0.15 for being on display
    holiday      by item, −0.5 (coffee at the office) to +0.6 (sparkling wine); half as much on the day before
    weather      by item × (temperature − the usual of the day) / 10 °C, and a heat effect on cold drinks over 25 °C
    shocks       an autocorrelated effect of each store (ρ = 0.9, sd 0.08): roadworks, festivals

*What a forecaster may know*: price, discount and holidays are planned; the weather of the coming days is a forecast,
whose error grows with its lead and which has no skill left after twelve days (`Panel.temperature_forecast`). The
weather that came is used for the past only.

*Real series* ship with statsmodels: `elnino`, mean monthly temperature of the Pacific's surface, 1950–2010 (public
domain; source: NOAA), and `co2`, weekly mean of carbon dioxide at Mauna Loa, 1958–2001 (public domain; source: Keeling
and Whorf, Scripps Institution of Oceanography).
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

START = dt.date(2022, 1, 3)  # a Monday
DISPERSION = 12.0
LEADS = 28
"""Days ahead for which a weather forecast is made."""


@dataclass(frozen=True)
class Drink:
    """How the demand of one item behaves; see the head of this module."""

    name: str
    price: float
    popularity: float  # added to the log level
    trend: float  # a year, log
    elasticity: float
    week: tuple[float, ...]  # Monday … Sunday, log
    season: float  # amplitude of the year, log; positive: summer
    holiday: float
    warmth: float  # per 10 °C
    heat: float  # per 10 °C over 25 °C


_OFFICE = (0.20, 0.20, 0.18, 0.16, 0.10, -0.35, -0.49)
_WEEKEND = (-0.35, -0.30, -0.22, -0.05, 0.35, 0.45, 0.12)
_EVEN = (-0.05, -0.06, -0.04, 0.0, 0.08, 0.10, -0.03)
DRINKS = (
    Drink("coffee", 3.2, 0.5, 0.04, -0.8, _OFFICE, -0.12, -0.50, -0.06, 0.0),
    Drink("tea", 2.6, 0.0, 0.02, -0.9, _OFFICE, -0.30, -0.20, -0.12, 0.0),
    Drink("cola", 1.8, 0.4, -0.04, -1.8, _EVEN, 0.15, 0.15, 0.10, 0.15),
    Drink("water", 1.0, 0.6, 0.06, -1.2, _EVEN, 0.20, 0.05, 0.14, 0.35),
    Drink("juice", 2.9, 0.1, -0.02, -1.6, _EVEN, 0.05, 0.10, 0.02, 0.10),
    Drink("beer", 1.5, 0.5, 0.0, -2.0, _WEEKEND, 0.25, 0.35, 0.16, 0.20),
    Drink("cider", 2.2, -0.3, 0.12, -2.2, _WEEKEND, 0.30, 0.30, 0.16, 0.20),
    Drink("sparkling wine", 8.9, -0.4, 0.08, -2.4, _WEEKEND, -0.05, 0.60, 0.0, 0.0),
)


@dataclass(frozen=True)
class Series:
    """Daily (or weekly, monthly) values of one item in one store. Missing values are NaN. All arrays have length n."""

    store: str
    item: str
    start: dt.date
    sales: Floats
    price: Floats
    discount: Floats  # 0 … 1, share of the price
    holiday: Floats  # 0 or 1
    temperature: Floats  # °C, as it came


@dataclass(frozen=True)
class Panel:
    """Several series of the same days, and the weather forecasts."""

    name: str
    series: tuple[Series, ...]
    temperature_forecast: Mapping[str, Floats]
    """By store: (n, LEADS); row t holds what was forecast on day t for the days t + 1 … t + LEADS."""
    mean: tuple[Floats, ...]
    """By series: the true mean of every day, which no forecast can beat. Made-up data only; never a feature."""

    @property
    def length(self) -> int:
        return len(self.series[0].sales)

    @property
    def digest(self) -> str:
        """SHA-256 of all values, in hex."""
        digest = hashlib.sha256(self.name.encode())
        for one in self.series:
            digest.update(f"\n{one.store}\n{one.item}\n{one.start}\n".encode())
            for values in (one.sales, one.price, one.discount, one.holiday, one.temperature):
                digest.update(np.ascontiguousarray(values).tobytes())
        for store in sorted(self.temperature_forecast):
            digest.update(np.ascontiguousarray(self.temperature_forecast[store]).tobytes())
        return digest.hexdigest()


def make(stores: int, days: int, seed: int) -> Panel:
    """`stores` shops that sell DRINKS over `days` days. The same seed gives the same panel."""
    rng = np.random.default_rng(seed)
    dates = [START + dt.timedelta(days=day) for day in range(days)]
    weekday = np.array([date.weekday() for date in dates])
    year = np.array([(date.timetuple().tm_yday - 1) / 365.25 for date in dates])
    holiday = np.array([float(is_holiday(date)) for date in dates])
    eve = np.append(holiday[1:], float(is_holiday(START + dt.timedelta(days=days))))
    series: list[Series] = []
    means: list[Floats] = []
    forecasts: dict[str, Floats] = {}
    for number in range(stores):
        store = f"store {number + 1}"
        usual = 11.0 - 10.0 * np.cos(2 * np.pi * (year - 0.055))  # coldest about 20 January
        temperature = np.round(usual + _autocorrelated(rng, days, 0.75, 3.0), 1)
        forecasts[store] = _weather_forecasts(rng, temperature, usual)
        shock = _autocorrelated(rng, days, 0.9, 0.08)
        size = rng.normal(0.0, 0.35)
        local_week = rng.normal(0.0, 0.06, 7)[weekday]
        for drink in DRINKS:
            price, discount = _prices(rng, drink.price, days)
            paid = price * (1.0 - discount)
            mean = np.exp(
                2.9
                + size
                + drink.popularity
                + rng.normal(0.0, 0.15)
                + drink.trend * np.arange(days) / 365.25
                + np.array(drink.week)[weekday]
                + local_week
                - drink.season * np.cos(2 * np.pi * (year - 0.055))
                + drink.elasticity * np.log(paid / drink.price)
                + 0.15 * (discount > 0)
                + drink.holiday * np.maximum(holiday, 0.5 * eve)
                + drink.warmth * (temperature - usual) / 10.0
                + drink.heat * np.maximum(temperature - 25.0, 0.0) / 10.0
                + shock
            )
            sales = rng.poisson(rng.gamma(DISPERSION, mean / DISPERSION)).astype(np.float64)
            means.append(mean)
            series.append(Series(store, drink.name, START, sales, price, discount, holiday, temperature))
    return Panel("simulated beverage demand", tuple(series), forecasts, tuple(means))


def is_holiday(date: dt.date) -> bool:
    """Fixed days only, so that the data can be written down: New Year, 1 May, 3 October, Christmas, New Year's Eve."""
    return (date.month, date.day) in {(1, 1), (5, 1), (10, 3), (12, 25), (12, 26), (12, 31)}


def real(name: str) -> Series:
    """A public series that ships with statsmodels: `elnino` (monthly) or `co2` (weekly; gaps stay missing)."""
    if name == "elnino":
        from statsmodels.datasets import elnino

        frame = elnino.load_pandas().data
        values = frame.drop(columns="YEAR").to_numpy(dtype=np.float64).ravel()
        start = dt.date(int(frame["YEAR"].iloc[0]), 1, 1)
    elif name == "co2":
        from statsmodels.datasets import co2  # type: ignore[import-untyped,unused-ignore]

        frame = co2.load_pandas().data
        values = frame["co2"].to_numpy(dtype=np.float64)
        start = frame.index[0].date()
    else:
        raise ValueError(f"no real series is named {name!r}; there are elnino and co2")
    nothing = np.full(len(values), np.nan)
    return Series(name, name, start, values, nothing, nothing, nothing, nothing)


def _prices(rng: np.random.Generator, usual: float, days: int) -> tuple[Floats, Floats]:
    """List price, changed every four months or so by a few per cent, and a promotion every six weeks or so."""
    price, discount = np.empty(days), np.zeros(days)
    day, now = 0, usual
    while day < days:
        length = int(rng.integers(80, 160))
        price[day : day + length] = round(now, 2)
        now = float(np.clip(now * np.exp(rng.normal(0.01, 0.04)), usual * 0.85, usual * 1.2))
        day += length
    day = int(rng.integers(0, 42))
    while day < days:
        discount[day : day + 7] = round(float(rng.choice([0.1, 0.15, 0.2, 0.25, 0.3])), 2)
        day += 7 + int(rng.integers(21, 56))
    return price, discount


def _weather_forecasts(rng: np.random.Generator, temperature: Floats, usual: Floats) -> Floats:
    days = len(temperature)
    leads = np.arange(1, LEADS + 1)
    target = np.minimum(np.arange(days)[:, None] + leads[None, :], days - 1)
    # A forecast drifts towards what is usual, as its error grows: its spread stays that of the weather.
    trust = np.clip(1.0 - leads / 12.0, 0.0, 1.0)
    error = rng.normal(size=(days, LEADS)) * np.minimum(0.35 * leads, 4.0) * np.sqrt(np.maximum(trust, 0.0))
    return np.asarray(np.round(usual[target] + trust * (temperature - usual)[target] + error, 1))


def _autocorrelated(rng: np.random.Generator, length: int, rho: float, deviation: float) -> Floats:
    noise = rng.normal(0.0, deviation * np.sqrt(1.0 - rho * rho), length)
    values = np.empty(length)
    values[0] = rng.normal(0.0, deviation)
    for i in range(1, length):
        values[i] = rho * values[i - 1] + noise[i]
    return values
