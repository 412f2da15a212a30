"""The columns that MLflow's signature names: rows of them are checked, and put as the model's own file wants them."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bentos import serving
from bentos.serving.schema import closest, inputs_schema

_WHOLE = {"integer": 31, "long": 63}
_TOO_LARGE = math.ldexp(2 - 2**-24, 127)  # from here on 32 bits round to infinity
_TYPES = {"boolean": "boolean", "integer": "integer", "long": "integer", "float": "number", "double": "number"}


@dataclass(frozen=True)
class Column:
    """`type` is MLflow's; a row may leave out what is not `required`, which then is missing (null)."""

    name: str
    type: str
    required: bool

    def json_schema(self) -> dict[str, Any]:
        plain = _TYPES.get(self.type, "string" if self.type in ("string", "datetime") else None)
        return {} if plain is None else {"type": [plain, "null"]}

    def like(self, value: Any) -> Any:
        """A value that fits, near to one of the model's file, which may know nothing of whole numbers."""
        if self.type in _WHOLE and type(value) is float:
            return round(value)
        return bool(value) if self.type == "boolean" else value

    def read(self, value: Any) -> Any:
        """The value that MLflow's own server would hand to the model: a `float` has 32 bits, `long` no fraction."""
        if value is None or value != value:
            return None
        if self.type == "float":
            return struct.unpack("<f", struct.pack("<f", value))[0]
        if self.type in _WHOLE:
            return int(value)
        return bool(value) if self.type == "boolean" else value

    def fault(self, value: Any) -> str | None:
        """What is wrong with a value, or None. null is left to the model, which knows whether it takes it."""
        if value is None or value != value:  # NaN is as missing as null
            return None
        if self.type == "string":
            return None if type(value) is str else "not a string"
        if self.type == "boolean":
            return None if type(value) is bool or value in (0, 1) else "not true or false"
        if self.type in _WHOLE:
            if type(value) is float and value.is_integer():
                value = int(value)
            if type(value) not in (int, bool):
                return "not a whole number"
            bits = _WHOLE[self.type]
            return None if -(1 << bits) <= value < 1 << bits else f"outside of the range of {self.type}"
        if self.type in ("float", "double"):
            if type(value) not in (int, float, bool):
                return "not a number"
            return None if self.type == "double" or abs(value) < _TOO_LARGE else "too large for a float"
        return "not a date" if self.type == "datetime" and type(value) is not str else None


@dataclass(frozen=True)
class Signature:
    columns: tuple[Column, ...]

    @classmethod
    def read(cls, given: Any) -> Signature | None:
        """MLmodel's `signature`, where it has columns with names; tensors are known better by the model's file."""
        with suppress(ValueError, KeyError, TypeError, RecursionError, AttributeError):
            listed = json.loads(given["inputs"])
            columns = tuple(Column(c["name"], str(c["type"]), c.get("required") is not False) for c in listed)
            plain = all(isinstance(c.name, str) and c.type != "tensor" for c in columns)
            if columns and plain and len({c.name for c in columns}) == len(columns):
                return cls(columns)
        return None

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    def rows(self, inputs: Sequence[Any]) -> list[list[Any]]:
        """The values of each row in the order of the columns. Raises Problem naming the row and column."""
        return [self._row(row, i) for i, row in enumerate(inputs)]

    def input_schema(self, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """JSON schema of a request body; `known` is what the model's file says of a column, such as its levels."""
        each = {column.name: dict(known.get(column.name) or column.json_schema()) for column in self.columns}
        record = {
            "type": "object",
            "title": "by name",
            "properties": each,
            "required": [column.name for column in self.columns if column.required],
            "additionalProperties": False,
        }
        width = len(self.columns)
        array = {"type": "array", "title": "by position", "minItems": width, "maxItems": width}
        return inputs_schema({"anyOf": [record, {**array, "prefixItems": list(each.values())}]})

    def _row(self, row: Any, i: int) -> list[Any]:
        hint = f"the columns are: {', '.join(self.names)}"[:1000]
        if type(row) is dict:
            for column in self.columns:
                if column.required and column.name not in row:
                    other = next((name for name in row if name not in self.names), None)
                    guess = f"; did you mean {other!r}?" if other and closest(other, [column.name]) else ""
                    detail = f"inputs[{i}] has no column {column.name!r}{guess}"
                    raise _problem("missing_column", detail, f"inputs[{i}].{column.name}", hint)
            unknown = next((name for name in row if name not in self.names), None)
            if unknown is not None:
                detail = f"the model has no column {unknown!r}"
                meant = closest(unknown, self.names)
                hint = f"did you mean {meant!r}?" if meant else hint
                raise _problem("unknown_column", detail, f"inputs[{i}].{unknown}", hint)
            values = [row.get(name) for name in self.names]
        elif type(row) is list:
            if len(row) != len(self.columns):
                detail = f"inputs[{i}] has {len(row)} values; the model has {len(self.columns)} columns"
                raise _problem("wrong_width", detail, f"inputs[{i}]", hint)
            values = row
        elif len(self.columns) == 1:
            values = [row]
        else:
            detail = f"inputs[{i}] is neither an object by column name nor an array"
            raise _problem("invalid_row", detail, f"inputs[{i}]", hint)
        for column, value in zip(self.columns, values, strict=True):
            if said := column.fault(value):
                place = f"inputs[{i}].{column.name}"
                raise _problem("wrong_type", f"{place} is {said}", place, f"the model takes a {column.type}")
        return [column.read(value) for column, value in zip(self.columns, values, strict=True)]


def _problem(code: str, detail: str, field: str, hint: str) -> serving.Problem:
    return serving.Problem(code, detail[:1500], field=field[:300], hint=hint)
