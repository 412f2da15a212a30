"""A model file as a forecaster: a checked request in, the next days out. Nothing of HTTP or BentoML here."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightgbm as lgb
import numpy as np
from numpy.typing import NDArray

from bentos.forecast import features
from bentos.forecast.data import Series
from bentos.forecast.features import DAILY, Plan
from bentos.serving.problems import Problem, StartError

Floats = NDArray[np.float64]

LEAST_DAYS = 28
"""Shorter histories are refused: the level of a series is the mean of four weeks."""
MAX_ROWS = 200_000
MAX_NAME = 200
_FIELDS = ("history", "horizon", "future")
_KEY = ("date", "store", "item")
_KNOWN = ("price", "discount", "holiday", "temperature")
_LAST_YEAR = 9000
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_BOUNDS: Mapping[str, tuple[float, float, str]] = {
    "sales": (0.0, 1e12, "a number of at least 0, or null where it is not known"),
    "price": (1e-9, 1e12, "a number above 0, or null"),
    "discount": (0.0, 0.99, "a share of the price from 0 to 0.99, such as 0.2 for 20 % off"),
    "holiday": (0.0, 1.0, "true or false, 1 or 0"),
    "temperature": (-100.0, 100.0, "degrees Celsius"),
}


@dataclass(frozen=True)
class Request:
    """Checked: series without gaps, and by series what is planned for each of the `horizon` days after its last."""

    series: tuple[Series, ...]
    plans: tuple[Plan, ...]
    horizon: int


class Forecaster:
    """A LightGBM model of the ratio of sales to their level, as `bentos.forecast.train` makes it.

    The file says which stores and items it knows (its categories) and how far it can look ahead (the range of its
    feature `horizon`). Safe to call from several threads. Raises StartError `model_load_failed` for another model.
    """

    def __init__(self, booster: lgb.Booster, longest: int) -> None:
        names = booster.feature_name()
        strange = [name for name in names if name not in features.NAMES]
        if strange or "horizon" not in names:
            wrong = f"it has the unknown features {', '.join(strange)}" if strange else "it has no feature horizon"
            raise StartError(
                "model_load_failed",
                f"this is no model of demand: {wrong}"[:500],
                "train it with `python -m bentos.forecast.train`, or upload it without kind=forecast",
            )
        named = [name for name in features.CATEGORIES if name in names]
        categories: list[list[str]] = booster.pandas_categorical or []
        if len(categories) != len(named):
            raise StartError(
                "model_load_failed",
                "the model file does not list its stores and items (its last line, pandas_categorical)",
                "upload the file as training wrote it",
            )
        by_name = dict(zip(named, categories, strict=True))
        self.categories = tuple(tuple(by_name.get(name, ())) for name in features.CATEGORIES)
        self.booster = booster
        self.longest = longest
        self._columns = [features.NAMES.index(name) for name in names]

    @classmethod
    def load(cls, path: Path) -> Forecaster:
        """Raises StartError `model_load_failed` for a file that is no such model."""
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartError(
                "model_load_failed", f"{path.name} cannot be read: {error}", "upload the file again"
            ) from error
        return cls.of(text)

    @classmethod
    def of(cls, text: str) -> Forecaster:
        """From the text of a model file. Raises StartError `model_load_failed`."""
        try:
            booster = lgb.Booster(model_str=text)
        except (lgb.basic.LightGBMError, ValueError) as error:
            hint = "save it with Booster.save_model and upload the file as it is"
            raise StartError("model_load_failed", f"this is no LightGBM model: {error}", hint) from error
        head = text.partition("\nTree=0")[0]
        infos = next((line for line in head.splitlines() if line.startswith("feature_infos=")), "feature_infos=")
        ranges = infos.removeprefix("feature_infos=").split(" ")
        names = booster.feature_name()
        place = names.index("horizon") if "horizon" in names and len(ranges) == len(names) else 0
        found = re.fullmatch(r"\[1:(\d+)\]", ranges[place])
        return cls(booster, int(found.group(1)) if found else 1)

    def answer(self, body: Any) -> dict[str, Any]:
        """The response body to a request body. Raises Problem naming the field that is wrong."""
        return self.forecast(self.parse(body))

    def forecast(self, request: Request) -> dict[str, Any]:
        """`{"forecast": [{"date", "store", "item", "sales"}, …]}`: series as in the request, their days in order."""
        steps = np.arange(1, request.horizon + 1)
        rows, levels = [], []
        for series, plan in zip(request.series, request.plans, strict=True):
            origin = np.full(request.horizon, len(series.sales) - 1)
            codes = features.codes_of(self.categories, series.store, series.item)
            rows.append(features.matrix(series, origin, steps, plan, DAILY, codes))
            levels.append(features.level(series.sales, origin, DAILY))
        # One thread: a request is too small to share out, and waiting threads would take the core from other requests.
        ratio = np.asarray(
            self.booster.predict(np.concatenate(rows)[:, self._columns], num_threads=1), dtype=np.float64
        )
        values = (ratio * np.concatenate(levels)).reshape(len(request.series), request.horizon)
        answer = []
        for series, sales in zip(request.series, values.tolist(), strict=True):
            for step, value in enumerate(sales):
                if not math.isfinite(value):
                    detail = f"the model gives no finite value for {series.store!r}, {series.item!r}"
                    raise Problem("prediction_not_finite", detail, field="history")
                date = features.date_of(series.start, len(series.sales) + step, DAILY)
                answer.append({"date": date.isoformat(), "store": series.store, "item": series.item, "sales": value})
        return {"forecast": answer}

    def parse(self, body: Any) -> Request:
        """Checks a request body. Raises Problem, which names the field that is wrong."""
        if not isinstance(body, dict):
            raise _wrong("body", body, "an object with history and horizon")
        for name in body:
            if name not in _FIELDS:
                hint = "known are " + ", ".join(_FIELDS)
                raise Problem("unknown_field", f"{name} is no field of a request", field=name, hint=hint)
        for name in ("history", "horizon"):
            if name not in body:
                raise Problem("missing_field", f"{name} is missing", field=name, hint="send history and horizon")
        horizon = self._horizon(body["horizon"])
        series, numbers = _history(body["history"])
        future = _future(body.get("future"), series, numbers, horizon)
        plans = tuple(_plan(rows, horizon) for rows in future)
        return Request(series, plans, horizon)

    def _horizon(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _wrong("horizon", value, f"a whole number of days from 1 to {self.longest}")
        if not 1 <= value <= self.longest:
            raise Problem(
                "bad_horizon",
                f"horizon is {_shown(value)}; this model was trained for 1 to {self.longest} days ahead",
                field="horizon",
                hint=f"send a horizon from 1 to {self.longest}, or train with a larger --horizon",
            )
        return value

    def example(self) -> dict[str, Any]:
        """A request of the right form: four weeks of one item."""
        days = [dt.date(2024, 1, 1) + dt.timedelta(days=day) for day in range(LEAST_DAYS)]
        store, item = (known[0] if known else name for known, name in zip(self.categories, _KEY[1:], strict=True))
        history = [{"date": day.isoformat(), "store": store, "item": item, "sales": 20.0} for day in days]
        return {"history": history, "horizon": min(7, self.longest)}

    def input_schema(self) -> dict[str, Any]:
        """JSON Schema of the request body."""
        name = {"type": "string", "minLength": 1, "maxLength": MAX_NAME}
        key = {"date": {"type": "string", "format": "date"}, "store": name, "item": name}
        regressors: dict[str, Any] = {
            "price": {"type": ["number", "null"], "exclusiveMinimum": 0},
            "discount": {"type": ["number", "null"], "minimum": 0, "maximum": 0.99},
            "holiday": {"type": ["number", "boolean", "null"]},
            "temperature": {"type": ["number", "null"], "description": "°C"},
        }
        sales = {"type": ["number", "null"], "minimum": 0}
        row = {"type": "object", "additionalProperties": False}
        return {
            "type": "object",
            "properties": {
                "history": {
                    "type": "array",
                    "description": f"Every day of each series, at least {LEAST_DAYS}; in any order",
                    "items": row | {"properties": key | {"sales": sales} | regressors, "required": [*_KEY, "sales"]},
                    "minItems": LEAST_DAYS,
                    "maxItems": MAX_ROWS,
                },
                "horizon": {"type": "integer", "minimum": 1, "maximum": self.longest},
                "future": {
                    "type": ["array", "null"],
                    "description": "What is planned or forecast for the days to come; leave out what is not known",
                    "items": row | {"properties": key | regressors, "required": list(_KEY)},
                    "maxItems": MAX_ROWS,
                },
            },
            "required": ["history", "horizon"],
            "additionalProperties": False,
        }

    def output_schema(self) -> dict[str, Any]:
        """JSON Schema of the response body."""
        properties = {
            "date": {"type": "string", "format": "date"},
            "store": {"type": "string"},
            "item": {"type": "string"},
            "sales": {"type": "number", "description": "expected sales of the day"},
        }
        row = {"type": "object", "properties": properties, "required": list(properties)}
        return {
            "type": "object",
            "properties": {"forecast": {"type": "array", "items": row}},
            "required": ["forecast"],
        }


@dataclass(frozen=True)
class Row:
    where: str
    date: dt.date
    key: tuple[str, str]
    values: Mapping[str, float]  # NaN where not known


def _history(rows: Any) -> tuple[tuple[Series, ...], dict[tuple[str, str], int]]:
    """The series of a history, and the number of each by store and item."""
    by_key: dict[tuple[str, str], list[Row]] = {}
    for row in _rows(rows, "history", ("sales", *_KNOWN), required=("sales",)):
        by_key.setdefault(row.key, []).append(row)
    if not by_key:
        hint = f"send every day of each series, at least {LEAST_DAYS} of them"
        raise Problem("no_history", "history is empty", field="history", hint=hint)
    series = tuple(_series(key, sorted(of, key=lambda row: row.date)) for key, of in by_key.items())
    return series, {key: number for number, key in enumerate(by_key)}


def _series(key: tuple[str, str], rows: Sequence[Row]) -> Series:
    store, item = key
    name = f"store {store!r}, item {item!r}"
    for before, after in pairwise(rows):
        if after.date == before.date:
            detail = f"{before.where} and {after.where} are both for {after.date}, {name}"
            raise Problem("duplicate_date", detail, field=f"{after.where}.date", hint="send one row a day and series")
        if (after.date - before.date).days > 1:
            missing = before.date + dt.timedelta(days=1)
            raise Problem(
                "missing_dates",
                f"{name} has no row for {missing}, between {before.date} and {after.date}",
                field=f"{after.where}.date",
                hint="send every day: sales 0 where nothing was sold, null where it is not known",
            )
    columns = {field: np.array([row.values[field] for row in rows]) for field in ("sales", *_KNOWN)}
    if len(rows) < LEAST_DAYS:
        raise Problem(
            "history_too_short",
            f"{name} has {len(rows)} days; at least {LEAST_DAYS} are needed",
            field="history",
            hint=f"send at least {LEAST_DAYS} days; a year and a month let the model see the season of the year",
        )
    if np.isnan(columns["sales"][-LEAST_DAYS:]).all():
        raise Problem(
            "history_too_short",
            f"{name} has no known sales in its last {LEAST_DAYS} days",
            field="history",
            hint="end the history at the last day with known sales",
        )
    return Series(store=store, item=item, start=rows[0].date, **columns)


def _future(
    rows: Any, series: Sequence[Series], numbers: Mapping[tuple[str, str], int], horizon: int
) -> list[dict[int, Row]]:
    """By series: the rows of the plan by step, 1 … horizon."""
    plans: list[dict[int, Row]] = [{} for _ in series]
    if rows is None:
        return plans
    for row in _rows(rows, "future", _KNOWN, required=()):
        if row.key not in numbers:
            detail = f"{row.where} is for store {row.key[0]!r}, item {row.key[1]!r}, which history does not have"
            hint = "send the history of this store and item, or leave the row out"
            raise Problem("unknown_series", detail, field=row.where, hint=hint)
        number = numbers[row.key]
        end = series[number].start + dt.timedelta(days=len(series[number].sales) - 1)
        step = (row.date - end).days
        if not 1 <= step <= horizon:
            first, last = end + dt.timedelta(days=1), end + dt.timedelta(days=horizon)
            detail = f"{row.where}.date is {row.date}; the forecast of this series is for {first} to {last}"
            hint = "history ends the day before the forecast begins; plans are for the days forecast"
            raise Problem("date_out_of_range", detail, field=f"{row.where}.date", hint=hint)
        if step in plans[number]:
            detail = f"{plans[number][step].where} and {row.where} are both for {row.date}"
            raise Problem("duplicate_date", detail, field=f"{row.where}.date", hint="send one row a day and series")
        plans[number][step] = row
    return plans


def _plan(rows: Mapping[int, Row], horizon: int) -> Plan:
    def column(name: str, shift: int = 0) -> Floats:
        steps = range(1 + shift, horizon + 1 + shift)
        return np.array([rows[step].values[name] if step in rows else math.nan for step in steps])

    return Plan(column("price"), column("discount"), column("holiday"), column("holiday", 1), column("temperature"))


def _rows(rows: Any, name: str, fields: Sequence[str], required: Sequence[str]) -> list[Row]:
    if not isinstance(rows, list):
        raise _wrong(name, rows, "a list of objects")
    if len(rows) > MAX_ROWS:
        detail = f"{name} has {len(rows)} rows; at most {MAX_ROWS} are taken at once"
        raise Problem("too_many_rows", detail, field=name, hint="send the series in several requests")
    return [parse_row(row, f"{name}[{index}]", fields, required) for index, row in enumerate(rows)]


def parse_row(row: Any, where: str, fields: Sequence[str], required: Sequence[str]) -> Row:
    """A checked row of a request or a table. Raises Problem, whose field begins with `where`."""
    if not isinstance(row, dict):
        raise _wrong(where, row, "an object with " + ", ".join((*_KEY, *required)))
    for name in (*_KEY, *required):
        if name not in row:
            raise Problem("missing_field", f"{where} has no {name}", field=f"{where}.{name}", hint=_hint(name))
    for name in row:
        if name not in fields and name not in _KEY:
            hint = "known are " + ", ".join((*_KEY, *fields))
            raise Problem("unknown_field", f"{where}.{name} is no field of a row", field=f"{where}.{name}", hint=hint)
    for name in ("store", "item"):
        text = row[name]
        if not isinstance(text, str) or not text or len(text) > MAX_NAME:
            raise _wrong(f"{where}.{name}", text, f"text of 1 to {MAX_NAME} characters")
    values = {name: _number(row.get(name), f"{where}.{name}", name) for name in fields}
    return Row(where, _date(row["date"], f"{where}.date"), (row["store"], row["item"]), values)


def _date(value: Any, where: str) -> dt.date:
    if not isinstance(value, str) or not _DATE.fullmatch(value):
        raise _wrong(where, value, "a date such as 2024-03-31", "bad_date")
    try:
        date = dt.date.fromisoformat(value)
    except ValueError:
        raise _wrong(where, value, "a day that exists, such as 2024-03-31", "bad_date") from None
    if date.year > _LAST_YEAR:
        raise _wrong(where, value, f"a date before the year {_LAST_YEAR + 1}", "bad_date")
    return date


def _number(value: Any, where: str, name: str) -> float:
    if value is None:
        return math.nan
    low, high, wanted = _BOUNDS[name]
    if isinstance(value, bool) and name != "holiday":
        raise _wrong(where, value, wanted)
    if not isinstance(value, int | float) or not low <= value <= high:  # also refuses NaN and infinity
        raise _wrong(where, value, wanted)
    return float(value)


def _hint(name: str) -> str:
    return "send null where it is not known" if name == "sales" else f"each row names its {name}"


def _wrong(where: str, value: Any, wanted: str, code: str = "invalid_field") -> Problem:
    return Problem(code, f"{where} is {_shown(value)}", field=where, hint=f"send {wanted}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer too long to write out
        return "a number with thousands of digits"
    return text if len(text) <= 80 else text[:77] + "…"
