"""Rows in, a matrix out: records by column name, or arrays, checked against the model's own signature.

Errors name the field, such as `inputs[3].age`.
"""

from __future__ import annotations

import difflib
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from operator import itemgetter, ne
from typing import TYPE_CHECKING, Any

from bentos.serving.problems import Problem
from bentos.serving.values import LARGEST_EXACT, UnfitError, ValueType, reader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_NUMBERS = {int, float, bool, type(None)}
_TEXTS = {str, type(None)}
_KINDS: Mapping[ValueType, set[Any]] = {
    ValueType.NUMBER: _NUMBERS,
    ValueType.BOOLEAN: {bool, type(None)},
    ValueType.TEXT: _TEXTS,
    ValueType.ANY: _NUMBERS | _TEXTS,
}
_SHORT = ("float16", "float32")


@dataclass(frozen=True)
class Column:
    """One input of a model: one of some categories (JSON values, in the order of their codes), or any of a type."""

    name: str
    categories: tuple[Any, ...] | None = None
    nullable: bool = True
    example: Any = 0.0
    type: ValueType = ValueType.NUMBER
    dtype: str = "float64"
    """NumPy's name of the type that the model was fitted on."""
    exact: bool = False
    """A whole number that a double rounds is refused."""

    @cached_property
    def read(self) -> Callable[[Any], Any]:
        """From a JSON value other than null to one of the column. Raises UnfitError."""
        return reader(self.type, self.dtype, self.exact)

    @cached_property
    def levels(self) -> frozenset[Any] | None:
        """The categories as `read` gives them."""
        return None if self.categories is None else frozenset(map(self.read, self.categories))

    @cached_property
    def codes(self) -> dict[Any, float]:
        return {value: float(code) for code, value in enumerate(self.categories or ())}

    @cached_property
    def codes_or_missing(self) -> dict[Any, float]:
        return {**self.codes, None: math.nan}

    @property
    def numeric(self) -> bool:
        """Any number may be in it."""
        return self.categories is None and self.type is ValueType.NUMBER

    def first(self) -> Any:
        """A value that fits."""
        return self.categories[0] if self.categories else self.example

    def json_schema(self) -> dict[str, Any]:
        if self.type is ValueType.DATE:
            about = "ISO 8601 without a time zone, such as 2024-01-31T12:00:00"
            return {"type": ["string", "null"] if self.nullable else "string", "description": about}
        if self.categories is not None:
            allowed = [*self.categories, None] if self.nullable else list(self.categories)
            return {"enum": allowed}
        if self.type is ValueType.ANY:
            return {"type": ["number", "string", "boolean", "null"]}
        plain = {ValueType.TEXT: "string", ValueType.BOOLEAN: "boolean"}.get(self.type, "number")
        return {"type": [plain, "null"] if self.nullable else plain}


@dataclass(frozen=True)
class Table:
    """The columns of a model, in its order. `named`: rows may be objects by column name (arrays always may)."""

    columns: tuple[Column, ...]
    named: bool = True
    largest: float = field(default=math.inf)
    """Largest magnitude the model's number type holds (float32: 3.4e38); larger numbers are refused."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.columns)

    @cached_property
    def _name_set(self) -> frozenset[str]:
        return frozenset(self.names)

    @cached_property
    def _pick(self) -> Callable[[Any], Sequence[Any]]:
        if len(self.names) == 1:
            name = self.names[0]
            return lambda row: (row[name],)
        return itemgetter(*self.names)

    @cached_property
    def _coded(self) -> tuple[tuple[int, Column], ...]:
        return tuple((i, c) for i, c in enumerate(self.columns) if c.categories is not None)

    @property
    def _mixed(self) -> bool:
        return any(c.categories is not None or c.type is not ValueType.NUMBER for c in self.columns)

    @cached_property
    def _required(self) -> tuple[int, ...]:
        return tuple(i for i, c in enumerate(self.columns) if not c.nullable)

    def matrix(self, inputs: Sequence[Any]) -> NDArray[np.float64]:
        """Rows as float64 [rows, columns]; categories as their codes, missing values as NaN. Raises Problem."""
        import numpy as np

        matrix = self._matrix_at_once(inputs)
        if matrix is None:
            values = [self._numbers(row, i) for i, row in enumerate(inputs)]
            try:
                matrix = np.array(values, dtype=np.float64)
            except OverflowError as error:
                raise self._first_overflow(values) from error
        # one pass over the matrix finds out whether any cell needs a closer look
        if self._required or self.largest < math.inf or not np.isfinite(matrix).all():
            self._check_extremes(matrix)
        return matrix

    def values(self, inputs: Sequence[Any]) -> list[Sequence[Any]]:
        """Return the values column by column, each as the column's type has it; None where missing. Raises Problem."""
        cells = self._cells(inputs)
        if cells is not None:
            width = len(self.columns)
            columns = [_read(column, cells[at::width]) for at, column in enumerate(self.columns)]
            read = [values for values in columns if values is not None]
            if len(read) == width:
                return read
        return list(zip(*self.records(inputs), strict=True))

    def records(self, inputs: Sequence[Any]) -> list[list[Any]]:
        """Return the rows, their values in column order as `values` gives them. Raises Problem."""
        rows = []
        for i, row in enumerate(inputs):
            cells = zip(self.columns, self._row(row, i), strict=True)
            rows.append([self._value(value, column, i) for column, value in cells])
        return rows

    def _value(self, value: Any, column: Column, i: int) -> Any:
        place = self._place(i, column)
        if value is None or value != value:  # NaN is as missing as null
            if not column.nullable:
                detail = f"{place} is missing, and the model was fitted on no missing value there"
                raise Problem("missing_value", detail, field=place, hint="send a value")
            return None
        try:
            read = column.read(value)
        except UnfitError as unfit:
            detail = f"{place} is {_kind_of(value)}, {unfit.expected}"
            raise Problem(unfit.code, detail, field=place, hint=unfit.hint) from unfit
        if column.levels is not None and read not in column.levels:
            raise self._unknown(value, column, i)
        return read

    def _cells(self, inputs: Sequence[Any]) -> list[Any] | None:
        """All cells, row after row, where the rows have the right width and names; None where one needs a closer look.

        This and what builds on it looks at a batch in a few passes in C. Python's own walk from cell to cell, which
        finds the field that is wrong, takes ten times as long.
        """
        kinds = set(map(type, inputs))
        if not kinds <= {dict, list} or set(map(len, inputs)) != {len(self.columns)}:
            return None
        try:
            if kinds == {list}:
                return list(chain.from_iterable(inputs))
            if kinds == {dict} and self.named:
                return list(chain.from_iterable(map(self._pick, inputs)))
        except KeyError:
            pass
        return None

    def _matrix_at_once(self, inputs: Sequence[Any]) -> NDArray[np.float64] | None:
        import numpy as np

        cells = self._cells(inputs)
        if cells is None:
            return None
        width = len(self.columns)
        try:
            for at, column in self._coded:
                cells[at::width] = map(column.codes_or_missing.__getitem__, cells[at::width])
            try:
                # takes numbers only, unlike NumPy, which reads text
                flat = np.frombuffer(array("d", cells), dtype=np.float64)
            except TypeError:
                if not _NUMBERS.issuperset(map(type, cells)):
                    return None
                flat = np.array(cells, dtype=np.float64)
        except (KeyError, TypeError, OverflowError):
            return None
        return flat.reshape(len(inputs), width)

    def _row(self, row: Any, i: int) -> Sequence[Any]:
        if type(row) is dict:
            values = self._record(row, i)
        elif type(row) is list:
            if len(row) != len(self.columns):
                detail = f"inputs[{i}] has {len(row)} values; the model has {len(self.columns)} columns"
                raise Problem("wrong_width", detail, field=f"inputs[{i}]", hint=self._columns_hint())
            values = row
        else:
            hint = "a row is an object by column name, or an array" if self.named else "a row is an array"
            raise Problem("invalid_row", f"inputs[{i}] is {_kind_of(row)}", field=f"inputs[{i}]", hint=hint)
        return values

    def _numbers(self, row: Any, i: int) -> Sequence[Any]:
        values = self._row(row, i)
        if self._coded:
            values = list(values)
            for at, column in self._coded:
                values[at] = self._code(values[at], column, i)
        if not _NUMBERS.issuperset(map(type, values)):
            for column, value in zip(self.columns, values, strict=True):
                if type(value) not in _NUMBERS:
                    detail = f"{self._place(i, column)} is {_kind_of(value)}, not a number"
                    raise Problem("wrong_type", detail, field=self._place(i, column))
        return values

    def _record(self, row: dict[str, Any], i: int) -> Sequence[Any]:
        if not self.named:
            hint = "the model has no column names: send arrays"
            raise Problem("invalid_row", f"inputs[{i}] is an object", field=f"inputs[{i}]", hint=hint)
        if len(row) != len(self.columns) or not self._name_set.issuperset(row):
            missing = next((c.name for c in self.columns if c.name not in row), None)
            unknown = next((k for k in row if k not in self._name_set), None)
            if missing is not None:
                guess = f"; did you mean {unknown!r}?" if unknown and closest(unknown, [missing]) else ""
                detail = f"inputs[{i}] has no column {missing!r}{guess}"
                hint = "send every column; null stands for a missing value"
                raise Problem("missing_column", detail, field=f"inputs[{i}].{missing}", hint=hint)
            close = closest(str(unknown), self.names)
            hint = f"did you mean {close!r}?" if close else self._columns_hint()
            detail = f"the model has no column {unknown!r}"
            raise Problem("unknown_column", detail, field=f"inputs[{i}].{unknown}", hint=hint)
        return self._pick(row)

    def _code(self, value: Any, column: Column, i: int) -> float:
        if value is None or (type(value) is float and math.isnan(value)):
            return math.nan
        try:
            return column.codes[value]
        except (KeyError, TypeError):
            raise self._unknown(value, column, i) from None

    def _unknown(self, value: Any, column: Column, i: int) -> Problem:
        shown = ", ".join(repr(c) for c in (column.categories or ())[:20])
        detail = f"{self._place(i, column)} is {_shown(value)}, which the model was not trained with"
        return Problem("unknown_category", detail, field=self._place(i, column), hint=f"known values: {shown}")

    def _check_extremes(self, matrix: NDArray[np.float64]) -> None:
        import numpy as np

        large = np.isinf(matrix) | (np.abs(matrix) > self.largest)
        if large.any():
            row, at = (int(n) for n in np.argwhere(large)[0])
            place = self._place(row, self.columns[at])
            detail = f"{place} is {float(matrix[row, at]):g}, which is not a number the model can take"
            raise Problem("not_finite", detail, field=place, hint="send a finite number, or null where it is missing")
        if self._required:
            missing = np.isnan(matrix[:, self._required])
            if missing.any():
                row, which = (int(n) for n in np.argwhere(missing)[0])
                place = self._place(row, self.columns[self._required[which]])
                detail = f"{place} is missing, and the model takes no missing values"
                raise Problem("missing_value", detail, field=place, hint="send a number")

    def _first_overflow(self, values: Sequence[Sequence[Any]]) -> Problem:
        for i, row in enumerate(values):
            for column, value in zip(self.columns, row, strict=True):
                try:
                    float(value if value is not None else 0)
                except OverflowError:
                    place = self._place(i, column)
                    return Problem("not_finite", f"{place} is too large for a number", field=place)
        return Problem("not_finite", "a number is too large", field="inputs")

    def _place(self, i: int, column: Column) -> str:
        return f"inputs[{i}].{column.name}" if self.named else f"inputs[{i}][{self.columns.index(column)}]"

    def _columns_hint(self) -> str:
        shown = ", ".join(self.names[:40]) + (", …" if len(self.names) > 40 else "")
        return f"the columns are: {shown}" if self.named else f"send {len(self.columns)} numbers"

    def row_schema(self) -> dict[str, Any]:
        """JSON schema of one row."""
        array = {
            "type": "array",
            "title": "by position",
            "minItems": len(self.columns),
            "maxItems": len(self.columns),
            **({"prefixItems": [c.json_schema() for c in self.columns]} if self._mixed else {"items": _any_of(self)}),
        }
        if not self.named:
            return array
        record = {
            "type": "object",
            "title": "by name",
            "properties": {c.name: c.json_schema() for c in self.columns},
            "required": list(self.names),
            "additionalProperties": False,
        }
        return {"anyOf": [record, array]}

    def input_schema(self) -> dict[str, Any]:
        """JSON schema of a request body."""
        return inputs_schema(self.row_schema())

    def example_row(self) -> Any:
        """A row that fits: the first category, or the column's example."""
        values = [c.first() for c in self.columns]
        return dict(zip(self.names, values, strict=True)) if self.named else values


def inputs_schema(row: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of `{"inputs": [row, …]}`."""
    return {
        "type": "object",
        "properties": {"inputs": {"type": "array", "minItems": 1, "items": row}},
        "required": ["inputs"],
        "additionalProperties": False,
    }


def outputs_schema(value: dict[str, Any]) -> dict[str, Any]:
    """JSON schema of `{"outputs": [value, …]}`."""
    return {
        "type": "object",
        "properties": {"outputs": {"type": "array", "items": value}},
        "required": ["outputs"],
    }


def _read(column: Column, values: Sequence[Any]) -> Sequence[Any] | None:
    """Return the values as the column's type has them; None where only a closer look can tell what is wrong."""
    kinds = set(map(type, values))
    if float in kinds and any(map(ne, values, values)):
        values = [None if v != v else v for v in values]  # NaN is as missing as null
        kinds.add(type(None))
    try:
        if column.type is ValueType.DATE or column.dtype in _SHORT:
            values = [None if v is None else column.read(v) for v in values]
        elif not kinds <= _KINDS[column.type] or (not column.nullable and type(None) in kinds):
            return None
        elif not kinds.isdisjoint((int, float)):
            if any(math.isinf(v) for v in values if type(v) in (int, float)):
                return None
            if column.exact and any(type(v) is int and abs(v) > LARGEST_EXACT for v in values):
                return None
        if column.levels is not None and not column.levels >= set(values) - {None}:
            return None
    except (UnfitError, OverflowError, TypeError):
        return None
    return values


def _any_of(table: Table) -> dict[str, Any]:
    return {"type": ["number", "null"]} if all(c.nullable for c in table.columns) else {"type": "number"}


def closest(word: str, among: Sequence[str]) -> str | None:
    """The name that was perhaps meant."""
    found = difflib.get_close_matches(word[:100], among, n=1)
    return found[0] if found else None


def _kind_of(value: Any) -> str:
    if isinstance(value, str):
        return f"the string {_shown(value)}"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    return {type(None): "null", bool: "true or false"}.get(type(value), _shown(value))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
