"""Rows in, tensors out: a row is an object by input name, or the value itself where the model has one input.

Errors name the row and the place in it, such as `inputs[3].picture[0][7]`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from bentos.serving.problems import Problem
from bentos.serving.schema import inputs_schema

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOATS = {"float16": 65504.0, "float32": 3.4028234663852886e38, "float64": math.inf}
INTEGERS = frozenset({"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"})
DTYPES = frozenset({*FLOATS, *INTEGERS, "bool", "string"})
"""What a row of JSON can fill: NumPy's names, and `string`."""


@dataclass(frozen=True)
class Tensor:
    """An input of a model.

    `shape` is that of one row, without the batch: None for an axis of any size, None for the whole where the model
    takes any. `batched`: the model's first axis is the rows; else it takes one row a call. `missing`: null is taken
    as NaN, which the model knows what to do with.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    batched: bool = True
    missing: bool = False

    @property
    def scalar(self) -> bool:
        """One value a row: a column of a table."""
        return self.shape in ((), (1,))

    def json_schema(self) -> dict[str, Any]:
        """Of one row. A tensor of any shape is anything that JSON can nest."""
        if self.shape is None:
            return {}
        return value_schema(self.dtype, () if self.scalar else self.shape, self.missing)

    def example(self) -> Any:
        value: Any = {"string": "", "bool": False}.get(self.dtype, 0)
        for size in () if self.scalar else reversed(self.shape or ()):
            value = [value] * (1 if size is None else size)
        return value


@dataclass(frozen=True)
class Tensors:
    """The inputs of a model, in its order."""

    all: tuple[Tensor, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.all)

    @property
    def batched(self) -> bool:
        return all(tensor.batched for tensor in self.all)

    @property
    def free(self) -> bool:
        """Rows may differ in size."""
        return any(t.shape is None or None in t.shape for t in self.all)

    def cells(self, inputs: Sequence[Any]) -> list[Sequence[Any]]:
        """The values of each row, one for each tensor. Raises Problem where a row is not made so."""
        return [self._cells(row, i) for i, row in enumerate(inputs)]

    def arrays(self, rows: Sequence[Sequence[Any]], first: int = 0) -> dict[str, NDArray[Any]]:
        """Tensors by name, the rows stacked (without a batch: of the one row); `first` is the number of the first row.

        Texts are an array of objects. Raises Problem naming the row and the place in it that does not fit.
        """
        return {t.name: self._array(t, [row[at] for row in rows], first) for at, t in enumerate(self.all)}

    def input_schema(self) -> dict[str, Any]:
        """JSON schema of a request body."""
        return inputs_schema(self.row_schema())

    def row_schema(self) -> dict[str, Any]:
        record = {
            "type": "object",
            "properties": {t.name: t.json_schema() for t in self.all},
            "required": list(self.names),
            "additionalProperties": False,
        }
        return {"anyOf": [self.all[0].json_schema(), record]} if len(self.all) == 1 else record

    def example_row(self) -> Any:
        values = [t.example() for t in self.all]
        return values[0] if len(values) == 1 else dict(zip(self.names, values, strict=True))

    def _cells(self, row: Any, i: int) -> Sequence[Any]:
        if type(row) is dict:
            for name in self.names:
                if name not in row:
                    raise _problem("missing_column", f"inputs[{i}] has no {name!r}", f"inputs[{i}].{name}", self._hint)
            unknown = next((k for k in row if k not in self.names), None)
            if unknown is not None:
                detail = f"the model has no input {unknown!r}"
                raise _problem("unknown_column", detail, f"inputs[{i}].{unknown}", self._hint)
            return [row[name] for name in self.names]
        if len(self.all) == 1:
            return [row]
        if type(row) is not list or not all(t.scalar for t in self.all):
            hint = f"send an object with the inputs: {', '.join(self.names)}"
            raise _problem("invalid_row", f"inputs[{i}] is not an object by input name", f"inputs[{i}]", hint)
        if len(row) != len(self.all):
            detail = f"inputs[{i}] has {len(row)} values; the model has {len(self.all)} inputs"
            raise _problem("wrong_width", detail, f"inputs[{i}]", self._hint)
        return row

    @property
    def _hint(self) -> str:
        return f"the inputs are: {', '.join(self.names)}"[:1000]

    def _array(self, tensor: Tensor, values: list[Any], first: int) -> NDArray[Any]:
        import numpy as np

        if tensor.shape == (1,):
            # a column of a table: `3` and `[3]` are the same
            values = [v if type(v) is list else [v] for v in values]
        array = _fitting(tensor, values)
        if array is None:
            wrong = _checker(tensor)
            hint = self._single_hint
            for i, value in enumerate(values, start=first):
                place = f"inputs[{i}].{tensor.name}" if len(self.all) > 1 else f"inputs[{i}]"
                _check(value, tensor.shape, wrong, place, hint)
            try:
                array = np.array(values, dtype=_numpy(tensor.dtype))
            except (ValueError, TypeError, OverflowError) as error:
                array = None
                cause: Exception | None = error
            else:
                cause = None
            # rows of texts of unequal length become an array of lists, without an error
            if array is None or (tensor.dtype == "string" and any(type(v) is list for v in array.flat)):
                detail = f"the rows do not make one tensor {tensor.name!r}: their shapes differ"
                raise _problem("wrong_shape", detail, "inputs", "send rows of equal shape together") from cause
        return array if tensor.batched else array[0, ...]

    @property
    def _single_hint(self) -> str | None:
        """What a row is where an input has no axis for the rows."""
        names = [tensor.name for tensor in self.all if not tensor.batched]
        if not names or len(self.all) == 1:
            return None
        shown = json.dumps(self.example_row())[:300]
        listed = ", ".join(names)[:200]
        return f"every row has its own {listed}, as the model takes one in a call; send rows such as {shown}"


def value_schema(dtype: str, shape: Sequence[int | None], missing: bool = False) -> dict[str, Any]:
    """JSON schema of a tensor's value."""
    if dtype in FLOATS:
        schema: dict[str, Any] = {"type": ["number", "null"] if missing else "number"}
    else:
        schema = {"type": {"string": "string", "bool": "boolean"}.get(dtype, "integer")}
    for size in reversed(shape):
        bounds = {} if size is None else {"minItems": size, "maxItems": size}
        schema = {"type": "array", "items": schema, **bounds}
    return schema


def _numpy(dtype: str) -> str:
    return "object" if dtype == "string" else dtype


def _fitting(tensor: Tensor, values: list[Any]) -> NDArray[Any] | None:
    """The whole batch as a tensor where a few passes in NumPy show that it fits; None where it needs a closer look.

    A picture has 150,000 values: looking at each of them in Python would take longer than the model.
    """
    import numpy as np

    if tensor.dtype == "string":
        return None
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        return None
    sizes = array.shape[1:]
    if tensor.shape is not None and (
        len(sizes) != len(tensor.shape) or any(w not in (None, s) for s, w in zip(sizes, tensor.shape, strict=True))
    ):
        return None
    if tensor.dtype in FLOATS:
        fits = array.dtype.kind in "iuf" and bool((np.abs(array) <= FLOATS[tensor.dtype]).all())
        fits = fits and bool(np.isfinite(array).all())
    elif tensor.dtype in INTEGERS:
        limits = np.iinfo(tensor.dtype)
        fits = array.dtype.kind in "iu" and (
            array.size == 0 or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)
        )
    else:
        fits = array.dtype.kind == "b"
    return array.astype(_numpy(tensor.dtype)) if fits else None


def _checker(tensor: Tensor) -> Callable[[Any], str | None]:
    """A function that says what is wrong with one value for a tensor of this type, or None."""
    plain = _plain_checker(tensor.dtype)
    if not tensor.missing or tensor.dtype not in FLOATS:
        return plain
    return lambda value: None if value is None or (type(value) is float and math.isnan(value)) else plain(value)


def _plain_checker(dtype: str) -> Callable[[Any], str | None]:
    if dtype == "string":
        return lambda value: None if type(value) is str else "not a string"
    if dtype == "bool":
        return lambda value: None if value in (0, 1) and type(value) in (bool, int) else "not true or false"
    if dtype in INTEGERS:
        bits = int(dtype.lstrip("uint"))
        low, high = (0, 2**bits) if dtype[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1))

        def integer(value: Any) -> str | None:
            if type(value) is float and value.is_integer():
                value = int(value)
            if type(value) not in (int, bool):
                return "not a whole number"
            return None if low <= value < high else f"outside of the range of {dtype}"

        return integer
    largest = FLOATS[dtype]

    def number(value: Any) -> str | None:
        if type(value) is float:
            return None if -largest <= value <= largest and abs(value) != math.inf else _not_number(value, dtype)
        if type(value) not in (int, bool):
            return "not a number"
        return None if abs(value) <= min(largest, 1.7976931348623157e308) else f"too large for {dtype}"

    return number


def _not_number(value: float, dtype: str) -> str | None:
    if math.isnan(value):
        return "missing"
    return "not finite" if math.isinf(value) else f"too large for {dtype}"


def _check(
    value: Any,
    shape: tuple[int | None, ...] | None,
    wrong: Callable[[Any], str | None],
    place: str,
    hint: str | None = None,
) -> None:
    """Walk one row of a tensor. Raises Problem naming the first element that does not fit."""
    if shape is None:
        if type(value) is list:
            for at, item in enumerate(value):
                _check(item, None, wrong, f"{place}[{at}]", hint)
            return
        shape = ()
    if not shape:
        if said := wrong(value):
            raise _problem("not_finite" if said == "not finite" else "wrong_type", f"{place} is {said}", place, hint)
        return
    if type(value) is not list:
        raise _problem("wrong_shape", f"{place} is not an array", place, f"its shape is {_shown(shape)}")
    if shape[0] is not None and len(value) != shape[0]:
        detail = f"{place} has {len(value)} values; the model takes {shape[0]}"
        raise _problem("wrong_width", detail, place, f"its shape is {_shown(shape)}")
    for at, item in enumerate(value):
        _check(item, shape[1:], wrong, f"{place}[{at}]", hint)


def _shown(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"


def _problem(code: str, detail: str, field: str, hint: str | None = None) -> Problem:
    return Problem(code, detail[:1500], field=field[:300], hint=hint)
