"""Forecasts as rows of the database: made by a model for every series, and compared with what came."""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from sqlalchemy import Connection, and_, case, func, select, tuple_

from bentos.forecast import features
from bentos.forecast.batch.sales import VALUES, last_day
from bentos.forecast.batch.tables import Database, evaluations, forecasts, sales, upsert
from bentos.forecast.features import DAILY
from bentos.forecast.forecasting import LEAST_DAYS

HISTORY = 420
"""Days of a series that a model is shown: a year, and the level of the year before."""
_PLANNED = ("price", "discount", "holiday")
_KEYS = 50  # series of one request and one transaction
_ROWS = 1000  # of one statement

Key = tuple[str, str]
Answer = Callable[[Mapping[str, Any]], tuple[dict[str, Any], str]]
"""The response body to a request body, and the name of the model that gave it."""


@dataclass(frozen=True)
class Done:
    """Of one run: series that were forecast now, that had been before, and that are too short or too old for it."""

    made: int = 0
    there: int = 0
    short: int = 0


def predict(database: Database, answer: Answer, model: str, horizon: int, say: Callable[[str], None]) -> Done:
    """Forecast the days after the last known one of each series, fifty series at a time.

    What `model` has already forecast from the same day is left as it is, so a run that was ended goes on where it was,
    and one without new sales does nothing.
    """
    done = Done()
    after: Key | None = None
    while keys := _series_after(database, after):
        after = keys[-1]
        with database.read() as connection:
            origins = _origins(connection, keys)
            ready = {key: day for key, day in origins.items() if not _is_there(connection, model, key, day, horizon)}
            requests = _requests(connection, ready, horizon)
        there = len(origins) - len(ready)
        short = len(keys) - there - len(requests)
        if requests:
            body = {
                "history": [row for one in requests for row in one.history],
                "horizon": horizon,
                "future": [row for one in requests for row in one.future],
            }
            response, by = answer(body)
            rows = _rows(response, requests, by, horizon)
            with database.write() as connection:
                for start in range(0, len(rows), _ROWS):
                    upsert(connection, forecasts, rows[start : start + _ROWS], "made")
        done = Done(done.made + len(requests), done.there + there, done.short + short)
        say(f"{done.made} series forecast, {done.there} were there, {done.short} too short")
    return done


def evaluate(database: Database, days: int) -> list[dict[str, Any]]:
    """Compare forecasts of the last `days` days with what came; the evaluations that hold now, newest first.

    The database adds up; errors are over all series, on the days whose sales are known by now.
    """
    error, naive = forecasts.c.sales - sales.c.sales, forecasts.c.seasonal_naive - sales.c.sales
    both = and_(sales.c.sales.is_not(None), forecasts.c.seasonal_naive.is_not(None))
    with database.read() as connection:
        last = last_day(connection)
    if last is None:
        return []
    totals = (
        select(
            forecasts.c.model,
            forecasts.c.origin,
            func.count().label("forecasts"),
            func.count(case((both, 1))).label("compared"),
            func.sum(case((both, error * error))).label("squares"),
            func.sum(case((both, func.abs(error)))).label("off"),
            func.sum(case((both, naive * naive))).label("naive_squares"),
            func.sum(case((both, func.abs(naive)))).label("naive_off"),
            func.sum(case((both, sales.c.sales))).label("sold"),
        )
        .select_from(
            forecasts.outerjoin(
                sales,
                and_(
                    sales.c.store == forecasts.c.store,
                    sales.c.item == forecasts.c.item,
                    sales.c.day == forecasts.c.day,
                ),
            )
        )
        .where(forecasts.c.origin > last - dt.timedelta(days=days))
        .group_by(forecasts.c.model, forecasts.c.origin)
        .order_by(forecasts.c.origin.desc(), forecasts.c.model)
    )
    with database.write() as connection:
        found = [_evaluation(row._asdict()) for row in connection.execute(totals)]
        for start in range(0, len(found), _ROWS):
            upsert(connection, evaluations, found[start : start + _ROWS], "evaluated")
    return found


@dataclass(frozen=True)
class _Request:
    """What is sent of one series, and what the same weekday says of its next days."""

    key: Key
    origin: dt.date
    history: Sequence[Mapping[str, Any]]
    future: Sequence[Mapping[str, Any]]
    naive: Sequence[float]


def _series_after(database: Database, after: Key | None) -> list[Key]:
    key = tuple_(sales.c.store, sales.c.item)
    query = select(sales.c.store, sales.c.item).distinct().order_by(sales.c.store, sales.c.item).limit(_KEYS)
    if after is not None:
        query = query.where(key > after)
    with database.read() as connection:
        return [(row.store, row.item) for row in connection.execute(query)]


def _origins(connection: Connection, keys: Sequence[Key]) -> dict[Key, dt.date]:
    """By series: its last day with known sales."""
    rows = connection.execute(
        select(sales.c.store, sales.c.item, func.max(sales.c.day))
        .where(tuple_(sales.c.store, sales.c.item).in_(keys), sales.c.sales.is_not(None))
        .group_by(sales.c.store, sales.c.item)
    )
    return {(store, item): day for store, item, day in rows}


def _is_there(connection: Connection, model: str, key: Key, origin: dt.date, horizon: int) -> bool:
    of = forecasts.c
    found = connection.execute(
        select(func.count()).where(of.model == model, of.origin == origin, of.store == key[0], of.item == key[1])
    ).scalar_one()
    return bool(found >= horizon)


def _requests(connection: Connection, origins: Mapping[Key, dt.date], horizon: int) -> list[_Request]:
    if not origins:
        return []
    first = min(origins.values()) - dt.timedelta(days=HISTORY)
    last = max(origins.values()) + dt.timedelta(days=horizon)
    rows = connection.execute(
        select(sales)
        .where(tuple_(sales.c.store, sales.c.item).in_(list(origins)), sales.c.day.between(first, last))
        .order_by(sales.c.store, sales.c.item, sales.c.day)
    )
    found = []
    for key, group in groupby(rows, lambda row: (row.store, row.item)):
        request = _request(key, origins[key], {row.day: row for row in group}, horizon)
        if request is not None:
            found.append(request)
    return found


def _request(key: Key, origin: dt.date, rows: Mapping[dt.date, Any], horizon: int) -> _Request | None:
    """None for a series that is too short. Days without a row are sent as unknown."""
    oldest = max(min(rows), origin - dt.timedelta(days=HISTORY - 1))
    days = [oldest + dt.timedelta(days=step) for step in range((origin - oldest).days + 1)]
    if len(days) < LEAST_DAYS:
        return None
    named = {"store": key[0], "item": key[1]}
    history = [
        {"date": day.isoformat(), **named, **{each: getattr(rows.get(day), each, None) for each in VALUES}}
        for day in days
    ]
    coming = [origin + dt.timedelta(days=step) for step in range(1, horizon + 1)]
    future = [
        {"date": day.isoformat(), **named, **{each: getattr(rows[day], each) for each in _PLANNED}}
        for day in coming
        if day in rows
    ]
    sold = np.array([math.nan if row["sales"] is None else row["sales"] for row in history], dtype=np.float64)
    steps = np.arange(1, horizon + 1)
    naive = features.seasonal_naive(sold, np.full(horizon, len(sold) - 1), steps, DAILY)
    return _Request(key, origin, history, future, naive.tolist())


def _rows(response: Mapping[str, Any], requests: Sequence[_Request], model: str, horizon: int) -> list[dict[str, Any]]:
    """Rows of the table from the answer to all of the requests."""
    asked = {one.key: one for one in requests}
    rows = []
    for said in response["forecast"]:
        one = asked[said["store"], said["item"]]
        day = dt.date.fromisoformat(said["date"])
        naive = one.naive[(day - one.origin).days - 1]
        rows.append(
            {
                "model": model, "origin": one.origin, "store": said["store"], "item": said["item"], "day": day,
                "sales": said["sales"], "seasonal_naive": None if math.isnan(naive) else naive,
            }
        )  # fmt: skip
    if len(rows) != len(requests) * horizon:
        raise ValueError(f"the model gave {len(rows)} forecasts for {len(requests)} series of {horizon} days")
    return rows


def _evaluation(row: Mapping[str, Any]) -> dict[str, Any]:
    def share(part: str, of: float | None, root: bool) -> float | None:
        if not row["compared"] or not of:
            return None
        return math.sqrt(row[part] / of) if root else float(row[part] / of)

    return {
        "model": row["model"],
        "origin": row["origin"],
        "forecasts": row["forecasts"],
        "compared": row["compared"],
        "rmse": share("squares", row["compared"], True),
        "wape": share("off", row["sold"], False),
        "rmse_seasonal_naive": share("naive_squares", row["compared"], True),
        "wape_seasonal_naive": share("naive_off", row["sold"], False),
    }
