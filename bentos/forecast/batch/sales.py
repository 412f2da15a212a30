"""Sales as rows of the database: written down from a CSV file, read as the series that a training works with."""

from __future__ import annotations

import csv
import datetime as dt
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, func, select

from bentos.forecast import data
from bentos.forecast.batch.tables import Database, sales, upsert
from bentos.forecast.data import Panel, Series
from bentos.forecast.forecasting import parse_row

VALUES = ("sales", "price", "discount", "holiday", "temperature")
_KEY = ("date", "store", "item")
_CHUNK = 500  # rows of one transaction: an SQLite statement takes 32,766 values
_FETCH = 2000
_SIMULATED_DAYS = 3650

Row = Mapping[str, Any]


def register(database: Database, rows: Iterable[Row]) -> tuple[int, int]:
    """Write rows `{"date", "store", "item", "sales", …}`; how many there were, and how many were new or changed.

    A value that is missing or null takes nothing away that is known, so a plan may come before the sales or after.
    Every 500 rows are a transaction: what was written stays when a later row is wrong. Raises Problem, naming its line.
    """
    seen = changed = 0
    numbered = enumerate(rows, 2)  # the first line of a file is its head
    while chunk := list(islice(numbered, _CHUNK)):
        found: dict[tuple[str, str, dt.date], dict[str, Any]] = {}
        for line, row in chunk:
            parsed = parse_row(dict(row), f"line {line}", VALUES, ())
            key = (*parsed.key, parsed.date)
            known = {name: value for name, value in parsed.values.items() if not math.isnan(value)}
            found[key] = {**found.get(key, dict.fromkeys(VALUES)), **known}
        written = [{"store": store, "item": item, "day": day, **values} for (store, item, day), values in found.items()]
        with database.write() as connection:
            changed += upsert(connection, sales, written, "changed", keep_known=True)
        seen += len(chunk)
    return seen, changed


def of_csv(stream: TextIO) -> Iterator[Row]:
    """Rows of a CSV file whose head names the columns: date, store, item, and of VALUES what there is."""
    for row in csv.DictReader(stream):
        yield {
            name: (text if name in _KEY else _number(text)) for name, text in row.items() if name is not None and text
        }


def simulated(database: Database, days: int, stores: int, seed: int) -> Iterator[Row]:
    """Made-up sales of the `days` days after the last one that is known, and the plan of the four weeks after them.

    The last known day comes again, since who wrote it may have been ended in its middle.
    """
    with database.read() as connection:
        last = last_day(connection)
    panel = data.make(stores, _SIMULATED_DAYS, seed)
    known = 0 if last is None else (last - data.START).days
    end = known + days + (last is not None)
    for day in range(known, min(end + data.LEADS, panel.length)):
        for series in panel.series:
            row: dict[str, Any] = {"date": (data.START + dt.timedelta(days=day)).isoformat()}
            row |= {"store": series.store, "item": series.item, "price": float(series.price[day])}
            row |= {"discount": float(series.discount[day]), "holiday": float(series.holiday[day])}
            if day < end:
                row |= {"sales": float(series.sales[day]), "temperature": float(series.temperature[day])}
            yield row


def last_day(connection: Connection) -> dt.date | None:
    """The newest day with known sales, of any series."""
    found: dt.date | None = connection.execute(
        select(func.max(sales.c.day)).where(sales.c.sales.is_not(None))
    ).scalar_one()
    return found


def panel(database: Database, days: int) -> Panel:
    """The last `days` days of every series, as a training takes them; there are no weather forecasts among them.

    Raises ValueError where nothing is registered.
    """
    with database.read() as connection:
        last = last_day(connection)
        if last is None:
            raise ValueError("no sales are registered: python -m bentos.forecast.batch register --csv FILE")
        oldest: dt.date = connection.execute(select(func.min(sales.c.day))).scalar_one()
        start = max(oldest, last - dt.timedelta(days=days - 1))
        length = (last - start).days + 1
        rows = connection.execution_options(yield_per=_FETCH).execute(
            select(sales).where(sales.c.day.between(start, last)).order_by(sales.c.store, sales.c.item, sales.c.day)
        )
        found = [
            _series(store, item, start, length, group)
            for (store, item), group in groupby(rows, lambda row: (row.store, row.item))
        ]
    known = tuple(series for series in found if not np.isnan(series.sales).all())
    return Panel("registered sales", known, {}, ())


def _series(store: str, item: str, start: dt.date, length: int, rows: Iterable[Any]) -> Series:
    """A series from its rows; days without a row are unknown."""
    columns: dict[str, NDArray[np.float64]] = {name: np.full(length, np.nan) for name in VALUES}
    for row in rows:
        for name in VALUES:
            value = getattr(row, name)
            if value is not None:
                columns[name][(row.day - start).days] = value
    return Series(store=store, item=item, start=start, **columns)


def _number(text: str) -> Any:
    """A number; what is none stays text, so that the check of the row can show it."""
    try:
        return float(text)
    except ValueError:
        return {"true": True, "false": False}.get(text.strip().lower(), text)
