"""Types of the values of a column, and how a JSON value becomes one of them without a loss."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

LARGEST_EXACT = 2**53
"""Up to here each whole number is a double of its own."""


class ValueType(StrEnum):
    NUMBER = "number"
    BOOLEAN = "boolean"
    TEXT = "text"
    DATE = "date"
    ANY = "any"
    """A number, a boolean or a text: the model does not look at it, or its file does not say which it takes."""


class UnfitError(Exception):
    """A value that a column does not take: a problem's code, what the column takes instead, and a hint."""

    def __init__(self, code: str, expected: str, hint: str | None = None) -> None:
        super().__init__(expected)
        self.code = code
        self.expected = expected
        self.hint = hint


def reader(kind: ValueType, dtype: str = "float64", exact: bool = False) -> Callable[[Any], Any]:
    """Return a function that reads a JSON value other than null. It raises UnfitError.

    `dtype` is NumPy's name of the type that the model was fitted on, which decides for short floats and for dates.
    `exact` refuses whole numbers that a double rounds.
    """
    if kind is ValueType.DATE:
        return lambda value: date(value, dtype)
    if kind is ValueType.NUMBER:
        if dtype in ("float16", "float32"):
            return lambda value: _short(number(value, exact), dtype)
        return lambda value: number(value, exact)
    return {ValueType.BOOLEAN: boolean, ValueType.TEXT: text}.get(kind, plain)


def number(value: Any, exact: bool = False) -> Any:
    """Return a finite number as it is. Raises UnfitError."""
    if type(value) not in (int, float, bool):
        raise UnfitError("wrong_type", "not a number")
    try:
        rounded = float(value)
    except OverflowError:
        rounded = math.inf
    if math.isinf(rounded):
        raise UnfitError("not_finite", "not a finite number", "send a finite number, or null where it is missing")
    if exact and not held(value):
        hint = "send a number that a double holds; train the model with identifiers as text"
        raise UnfitError("not_exact", "which the model cannot tell from its neighbours: a double rounds it", hint)
    return value


def held(value: Any) -> bool:
    """Return whether a finite number is a double without being rounded."""
    return type(value) is not int or -LARGEST_EXACT <= value <= LARGEST_EXACT or int(float(value)) == value


def boolean(value: Any) -> bool:
    """Return true or false; 1 and 0 are the same. Raises UnfitError."""
    if type(value) in (bool, int, float) and value in (0, 1):
        return bool(value)
    raise UnfitError("wrong_type", "not true or false")


def text(value: Any) -> str:
    """Return a text as it is. Raises UnfitError."""
    if type(value) is not str:
        raise UnfitError("wrong_type", "not a string")
    return value


def plain(value: Any) -> Any:
    """Return any single value as it is. Raises UnfitError."""
    if type(value) in (int, float):
        return number(value)
    if type(value) not in (bool, str):
        raise UnfitError("wrong_type", "not a single value")
    return value


# the extended format of ISO 8601, without a zone; NumPy alone reads "now" and shifts zones to UTC as well
_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[T ]\d\d(?::\d\d(?::\d\d(?:\.\d{1,9})?)?)?)?", re.ASCII)
_ZONE = re.compile(r"[T ].*(?:[Zz]|[+-]\d\d(?::?\d\d)?)$")


def date(value: Any, dtype: str) -> np.datetime64:
    """Return a date or time of the type `dtype`, such as `datetime64[us]`. Raises UnfitError."""
    import numpy as np

    hint = 'send it in ISO 8601 without a time zone, such as "2024-01-31" or "2024-01-31T12:00:00"'
    if type(value) is not str:
        raise UnfitError("wrong_type", "not a date", hint)
    if not _DATE.fullmatch(value):
        zoned = _DATE.match(value) and _ZONE.search(value)
        expected = "a time with a zone, and the model was fitted on times without one" if zoned else "not a date"
        raise UnfitError("wrong_type", expected, hint)
    try:
        given = np.datetime64(value)
        read = given.astype(dtype)
        # what leaves the range of a unit is not refused by every NumPy, but comes back as another date
        kept = read == given and read.astype("datetime64[Y]") == given.astype("datetime64[Y]")
    except (ValueError, OverflowError) as error:
        raise UnfitError("wrong_type", f"not a date: {error}", hint) from error
    if not kept:
        raise UnfitError("not_exact", f"which {dtype}, the type of the column, does not hold", hint)
    return read


def date_text(value: np.datetime64) -> str:
    """Return a date in ISO 8601 with as many digits of its second as it needs (none, 6 or 9), as Python writes it."""
    whole, point, fraction = str(value).partition(".")
    digits = fraction.rstrip("0")
    return whole + (point + digits.ljust(6 if len(digits) <= 6 else 9, "0") if digits else "")


def _short(value: Any, dtype: str) -> float:
    import numpy as np

    with np.errstate(over="ignore"):
        read = float(np.dtype(dtype).type(value))
    if math.isinf(read):
        raise UnfitError("not_finite", f"too large for {dtype}", "send a smaller number, or null where it is missing")
    return read
