"""Tables of the user's own process as JSON rows, and answers back as tables.

A row is an object by column name, or an array where there are no names. Missing values (NaN, NaT, None, pandas.NA) are
null, timestamps ISO 8601, NumPy numbers plain numbers, categories their values. What JSON cannot keep is refused.
Nothing here imports pandas or NumPy: a value tells by its type what it is, so a process without them pays nothing.
"""

from __future__ import annotations

import datetime
import decimal
import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ekiben._errors import ExportError

_MOST_ENTRIES = 10_000_000  # of a sparse matrix that is written out


def body(data: Any) -> dict[str, Any]:
    """The request body for tables and lists of rows; a dict is taken as a body already (task kinds have their own)."""
    if isinstance(data, dict):
        return {str(name): _value(value, str(name)) for name, value in data.items()}
    return {"inputs": rows(data)}


def rows(data: Any) -> list[Any]:
    """Rows of a pandas or polars frame, a NumPy array, a torch tensor, or a list of rows.

    Raises ExportError for what has no rows, for infinities (JSON has none) and for values without a JSON form.
    """
    if _is(data, "pandas", "DataFrame"):
        return _pandas_rows(data)
    if _is(data, "pandas", "Series") or _is(data, "polars", "Series"):
        return [_value(value, str(data.name or "sample")) for value in data.to_list()]
    if _is(data, "polars", "DataFrame"):
        return [{name: _value(value, name) for name, value in row.items()} for row in data.to_dicts()]
    if _is(data, "numpy", "ndarray"):
        if data.ndim == 0:
            raise ExportError(
                "a single number is not a list of rows", code="bad_sample", field="sample", hint="pass [row]"
            )
        return [_value(value, "sample") for value in _listed(data)]
    if _is(data, "torch", "Tensor"):
        return rows(data.detach().cpu().numpy())
    if is_sparse(data):
        raise ExportError(
            "a sparse matrix has no JSON rows",
            code="bad_sample",
            field="sample",
            hint="pass X[:100].toarray(); for XGBoost, to which an absent entry is missing, an array with NaN",
        )
    if _is(data, "xgboost", "DMatrix"):
        raise ExportError(
            f"a {type(data).__name__} does not give its rows back",
            code="bad_sample",
            field="sample",
            hint="pass the frame or array that it was made from; if missing=-999 was given, say so in the model: "
            "booster.set_attr(**{'ekiben.missing': '-999'})",
        )
    if isinstance(data, (list, tuple)):
        return [_value(value, "sample") for value in data]
    raise ExportError(
        f"{type(data).__module__}.{type(data).__qualname__} has no rows that can be sent",
        code="bad_sample",
        field="sample",
        hint="pass a pandas DataFrame, a NumPy array or a list of rows",
    )


def is_sparse(data: Any) -> bool:
    """Return whether `data` is a matrix or array of scipy.sparse."""
    return hasattr(data, "tocsr") or hasattr(data, "todense")


def dense(data: Any, *, xgboost: bool) -> Any:
    """Return a sparse matrix [rows, columns] as an array. An absent entry is 0, and for XGBoost a missing value (NaN).

    Raises ExportError where the array would have more than 10 million entries.
    """
    numpy = importlib.import_module("numpy")
    if data.shape[0] * data.shape[1] > _MOST_ENTRIES:
        raise ExportError(
            f"the sparse matrix has {data.shape[0]} rows of {data.shape[1]} columns, which JSON would write in full",
            code="bad_sample",
            field="sample",
            hint=f"pass at most {_MOST_ENTRIES // data.shape[1]} rows: X[:{_MOST_ENTRIES // data.shape[1]}]",
        )
    if not xgboost:
        return data.toarray()
    entries = data.tocoo()
    made = numpy.full(data.shape, numpy.nan)
    made[entries.row, entries.col] = entries.data
    return made


def records(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of arrays by name, as a model with several inputs takes them.

    Raises ExportError where they have different numbers of rows.
    """
    listed = {str(name): rows(values) for name, values in columns.items()}
    if len({len(values) for values in listed.values()}) > 1:
        counts = ", ".join(f"{name}: {len(values)}" for name, values in listed.items())
        raise ExportError(
            f"the arrays of the sample have different numbers of rows ({counts})", code="bad_sample", field="sample"
        )
    return [dict(zip(listed, each, strict=True)) for each in zip(*listed.values(), strict=True)]


def is_frame(data: Any) -> bool:
    return _is(data, "pandas", "DataFrame")


def fit(frame: Any, columns: Sequence[str] | None, named: bool) -> Any:
    """A pandas frame with its columns named as the model names them.

    A model trained on arrays has no names, so that only the order counts; LightGBM writes `_` for a space in a name.
    """
    if not named:
        return frame.set_axis(range(frame.shape[1]), axis=1)
    known = set(columns or ())
    renamed = {
        name: changed
        for name in frame.columns
        if isinstance(name, str) and name not in known and (changed := re.sub(r"\s", "_", name)) in known
    }
    return frame.rename(columns=renamed) if renamed else frame


def outputs(values: Any) -> list[Any]:
    """Predictions of a model in the user's process as the JSON list that `{"outputs": …}` holds."""
    return rows(values)


def like(data: Any, values: list[Any]) -> Any:
    """Answers in the form of the question: a frame gives a Series or DataFrame on its index, an array an array."""
    if _is(data, "numpy", "ndarray") or is_sparse(data):
        numpy = importlib.import_module("numpy")

        if _numeric(values) and not _rounded(values):
            return numpy.array([_nan(value) for value in values])
        return (
            numpy.array(values)
            if all(isinstance(value, str) for value in values)
            else numpy.array(values, dtype=object)
        )
    if _is(data, "pandas", "DataFrame") or _is(data, "pandas", "Series"):
        pandas = importlib.import_module("pandas")

        if values and all(isinstance(value, (list, dict)) for value in values):
            return pandas.DataFrame([_nan(value) for value in values], index=data.index)
        if _numeric(values) and not _rounded(values):
            return pandas.Series([_nan(value) for value in values], index=data.index)
        return pandas.Series(values, index=data.index, dtype=object if _rounded(values) else None)
    return values


def count(data: Any) -> int | None:
    """How many rows a table has, None for a request body."""
    if is_sparse(data):
        return int(data.shape[0])
    return None if isinstance(data, dict) else len(data)


def part(data: Any, start: int, stop: int) -> Any:
    return (
        data.iloc[start:stop] if _is(data, "pandas", "DataFrame") or _is(data, "pandas", "Series") else data[start:stop]
    )


def _pandas_rows(frame: Any) -> list[Any]:
    names = list(frame.columns)
    if len({str(name) for name in names}) != len(names):
        raise ExportError(
            "two columns have the same name", code="bad_sample", field="sample", hint="rename one of them"
        )
    # By position, so that the dtype of each column is kept: frame.values would make everything an object.
    columns = [[_value(v, str(name)) for v in frame.iloc[:, at].tolist()] for at, name in enumerate(names)]
    if names == list(range(len(names))):
        return [list(row) for row in zip(*columns, strict=True)]
    keys = [str(name) for name in names]
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(value: Any, place: str) -> Any:
    if value is None or isinstance(value, (bool, str, int)):
        return _plain(value)
    if isinstance(value, float):
        if math.isnan(value):
            return None
        if math.isinf(value):
            raise ExportError(
                f"{place} holds an infinity, which JSON cannot carry",
                code="bad_sample",
                field=place,
                hint="replace it: X.replace([numpy.inf, -numpy.inf], numpy.nan)",
            )
        return float(value)
    if isinstance(value, dict):
        return {str(name): _value(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_value(item, place) for item in value]
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return None if str(value) == "NaT" else value.isoformat()
    if isinstance(value, decimal.Decimal):
        whole = value.is_finite() and value == value.to_integral_value() and int(value) != float(value)
        return int(value) if whole else _value(float(value), place)  # else a float would round it
    kind = type(value)
    if kind.__module__.startswith("pandas") and kind.__name__ in ("NAType", "NaTType"):
        return None
    if kind.__module__ == "numpy":
        if kind.__name__ == "datetime64":
            return _date(value)
        if kind.__name__ != "timedelta64":
            plain = _listed(value)  # an array or a scalar
            if type(plain) is not kind:  # NumPy has no plain form for a long double
                return _value(plain, place)
    if _is(value, "pandas", "DataFrame") or _is(value, "pandas", "Series"):
        return rows(value)
    raise ExportError(
        f"{place} holds a {kind.__module__}.{kind.__qualname__}, which has no JSON form",
        code="bad_sample",
        field=place,
        hint="convert the column to numbers, strings or timestamps",
    )


def _listed(array: Any) -> Any:
    """The values of an array or scalar as plain lists; dates as texts, which NumPy else gives as counts or as dates."""
    if array.dtype.kind in "mM":
        flat = [_value(value, "sample") for value in array.reshape(-1)]
        return _shaped(flat, array.shape)
    return array.tolist()


def _shaped(flat: list[Any], shape: Sequence[int]) -> Any:
    for size in reversed(shape[1:]):
        flat = [flat[start : start + size] for start in range(0, len(flat), size)] if size else []
    return flat


def _date(value: Any) -> str | None:
    """A numpy.datetime64 as datetime and pandas write it: a second has no decimals, or 6, or 9."""
    whole, point, fraction = str(value).partition(".")
    digits = fraction.rstrip("0")
    if whole == "NaT":
        return None
    return whole + (point + digits.ljust(6 if len(digits) <= 6 else 9, "0") if digits else "")


def _plain(value: Any) -> Any:
    # str and int subclasses (numpy.str_, IntEnum) become the plain type, so that json writes them the usual way.
    if value is None or isinstance(value, bool):
        return value
    return str(value) if isinstance(value, str) else int(value)


def _numeric(values: Iterable[Any]) -> bool:
    for value in values:
        if isinstance(value, list):
            if not _numeric(value):
                return False
        elif value is not None and not isinstance(value, (int, float)):
            return False
    return True


_LARGEST_EXACT = 2**53  # of the whole numbers that are a float without being rounded


def _rounded(values: Iterable[Any]) -> bool:
    """Whether one array would make floats of whole numbers that floats cannot hold."""
    large = any(isinstance(value, int) and abs(value) > _LARGEST_EXACT for value in values)
    return large and any(value is None or isinstance(value, float) for value in values)


def _nan(value: Any) -> Any:
    if isinstance(value, list):
        return [_nan(item) for item in value]
    return math.nan if value is None else value


def _is(value: Any, package: str, name: str) -> bool:
    return any(c.__module__.split(".", 1)[0] == package and c.__name__ == name for c in type(value).__mro__)
