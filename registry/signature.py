"""What a model takes and gives, as far as its file says so; samples and successors are checked against it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from registry.errors import UserError

Scalar = str | int | float | bool

DTYPES = ("number", "int", "bool", "string", "category", "unknown")
TASKS = ("regression", "binary", "multiclass", "ranking", "unknown")
_MOST_LISTED = 10


@dataclass(frozen=True)
class Column:
    """A named feature. `categories` are its levels in the model's order, where the model knows them.

    An object that stands for a row may leave out a column that is not `required`.
    """

    name: str
    dtype: str = "number"
    categories: tuple[Scalar, ...] | None = None
    required: bool = True

    def to_json(self) -> dict[str, Any]:
        body: dict[str, Any] = {"name": self.name, "dtype": self.dtype}
        if self.categories is not None:
            body["categories"] = list(self.categories)
        return body if self.required else {**body, "required": False}


@dataclass(frozen=True)
class Tensor:
    """A named tensor. `shape` has an int for a fixed axis and None or a symbol for a free one; None: rank unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": None if self.shape is None else list(self.shape)}


@dataclass(frozen=True)
class Signature:
    """Columns (tabular models) or tensors (ONNX) in, tensors out.

    `named` is False where the columns' names were made up by the library (`Column_0`, `f0`) and only their number
    counts. `n_features` is the width of a row, None where unknown. `classes` are what the outputs stand for.
    """

    columns: tuple[Column, ...] = ()
    named: bool = False
    n_features: int | None = None
    tensors: tuple[Tensor, ...] = ()
    outputs: tuple[Tensor, ...] = ()
    task: str = "unknown"
    classes: tuple[Scalar, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "columns": [column.to_json() for column in self.columns],
            "named": self.named,
            "n_features": self.n_features,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "outputs": [tensor.to_json() for tensor in self.outputs],
            "task": self.task,
            "classes": None if self.classes is None else list(self.classes),
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Signature:
        """The inverse of `to_json`, for what this service has stored itself."""

        def tensors(key: str) -> tuple[Tensor, ...]:
            return tuple(
                Tensor(item["name"], item["dtype"], None if item["shape"] is None else tuple(item["shape"]))
                for item in body[key]
            )

        columns = tuple(
            Column(
                item["name"],
                item["dtype"],
                tuple(item["categories"]) if "categories" in item else None,
                item.get("required", True),
            )
            for item in body["columns"]
        )
        classes = None if body["classes"] is None else tuple(body["classes"])
        return cls(
            columns, body["named"], body["n_features"], tensors("tensors"), tensors("outputs"), body["task"], classes
        )


def check_sample(signature: Signature, sample: Any) -> int:
    """The number of rows of a generic kind's sample `{"inputs": [row, …]}` that fits the signature.

    A row is an object by column (or tensor) name, or an array in the model's order. null is a missing value. A level
    that the model has not seen is let through, as the libraries treat it as missing; a value of another type is not.
    UserError `sample_does_not_fit` with a field like `sample.inputs[2].age`.
    """
    if not isinstance(sample, dict) or "inputs" not in sample:
        _misfit("sample", 'is no object with "inputs"', 'Write it as {"inputs": [row, …]}.')
    rows = sample["inputs"]
    if not isinstance(rows, list) or not rows:
        _misfit("sample.inputs", "is no list with at least one row", 'Write it as {"inputs": [row, …]}.')
    columns = _Columns(signature)
    for index, row in enumerate(rows):
        where = f"sample.inputs[{index}]"
        if signature.tensors:
            _check_tensor_row(signature, row, where)
        elif isinstance(row, dict):
            _check_record(signature, columns, row, where)
        elif isinstance(row, list):
            _check_array(signature, columns, row, where)
        elif signature.n_features is not None and signature.n_features != 1:
            _misfit(where, "is neither an object nor an array", "A row is an object by column name, or an array.")
    return len(rows)


class _Columns:
    """The columns as rows look them up. What is worked out here is so once for all rows: a model may have a million
    columns or levels, a sample as many rows, and their product would never end."""

    def __init__(self, signature: Signature) -> None:
        self.all = signature.columns
        self.places = {column.name: place for place, column in enumerate(self.all)}
        self.required = [place for place, column in enumerate(self.all) if column.required]
        self._texts: dict[str, frozenset[bool]] = {}

    def takes(self, column: Column, value: Any) -> bool:
        """Whether the value is of the sort of any of a category's levels."""
        if column.name not in self._texts:
            self._texts[column.name] = frozenset(isinstance(level, str) for level in column.categories or ())
        return isinstance(value, str) in self._texts[column.name]


def _check_record(signature: Signature, columns: _Columns, row: dict[str, Any], where: str) -> None:
    if not columns.all:
        if signature.n_features is not None and len(row) != signature.n_features:
            _misfit(
                where, f"has {len(row)} values, the model takes {signature.n_features}", "Give one value a feature."
            )
        return
    for name in row:
        if name not in columns.places:
            close = f"The model's columns are {_listed(list(columns.places))}."
            _misfit(f"{where}.{_short(name)}", "is no column of the model", close)
    missing = next((place for place in columns.required if columns.all[place].name not in row), len(columns.all))
    for place in sorted(columns.places[name] for name in row):
        if place > missing:
            break
        column = columns.all[place]
        _check_value(columns, column, row[column.name], f"{where}.{_short(column.name)}")
    if missing < len(columns.all):
        hint = "Give every column; null stands for a missing value."
        _misfit(f"{where}.{_short(columns.all[missing].name)}", "is missing", hint)


def _check_array(signature: Signature, columns: _Columns, row: list[Any], where: str) -> None:
    if signature.n_features is not None and len(row) != signature.n_features:
        names = f": {_listed([column.name for column in signature.columns])}" if signature.named else ""
        _misfit(
            where,
            f"has {len(row)} values, the model takes {signature.n_features}",
            f"Give one value a feature, in the model's order{names}.",
        )
    for index, column in enumerate(signature.columns[: len(row)]):
        _check_value(columns, column, row[index], f"{where}[{index}]")


def _check_value(columns: _Columns, column: Column, value: Any, where: str) -> None:
    if value is None or column.dtype == "unknown":
        return
    if isinstance(value, (dict, list)):
        _misfit(where, "is no single value", f"Give a {column.dtype}, or null where it is missing.")
    if column.dtype == "category":
        if column.categories and not columns.takes(column, value):
            levels = _listed([repr(level) for level in column.categories])
            _misfit(where, f"is a {_sort(value)}, the column's levels are not", f"Give one of {levels}.")
        return
    if column.dtype == "string":
        fits = isinstance(value, str)
    elif column.dtype == "bool":
        fits = isinstance(value, bool) or value in (0, 1)
    elif column.dtype == "int":
        fits = isinstance(value, (bool, int)) or (isinstance(value, float) and value.is_integer())
    else:
        fits = isinstance(value, (bool, int, float))
    if not fits:
        _misfit(where, f"is a {_sort(value)}, the model takes a {column.dtype}", f"Give a {column.dtype}, or null.")


def _check_tensor_row(signature: Signature, row: Any, where: str) -> None:
    known = {tensor.name: tensor for tensor in signature.tensors}
    if isinstance(row, dict):
        for name in row:
            if name not in known:
                hint = f"The model's inputs are {_listed(list(known))}."
                _misfit(f"{where}.{_short(name)}", "is no input of the model", hint)
        for name, tensor in known.items():
            if name not in row:
                _misfit(f"{where}.{_short(name)}", "is missing", "Give every input of the model.")
            _check_nested(row[name], tensor, _row_shape(tensor), f"{where}.{_short(name)}")
    elif len(known) == 1:
        tensor = signature.tensors[0]
        _check_nested(row, tensor, _row_shape(tensor), where)
    elif isinstance(row, list) and all(_row_shape(tensor) in ((), (1,)) for tensor in signature.tensors):
        if len(row) != len(known):
            _misfit(where, f"has {len(row)} values, the model has {len(known)} inputs", "Give one value an input.")
    else:
        hint = f"Write each row as an object with the inputs {_listed(list(known))}."
        _misfit(where, "does not name the model's inputs", hint)


def _row_shape(tensor: Tensor) -> tuple[int | str | None, ...] | None:
    """The shape of one row: the first axis is the batch."""
    return None if tensor.shape is None else tensor.shape[1:]


def _check_nested(value: Any, tensor: Tensor, shape: tuple[int | str | None, ...] | None, where: str) -> None:
    if shape is None:
        return
    if not shape or (shape == (1,) and not isinstance(value, list)):
        if isinstance(value, (dict, list)):
            _misfit(where, "is no single value", f"The input {_short(tensor.name)} takes a {tensor.dtype} a row.")
        if value is not None and isinstance(value, str) != (tensor.dtype == "string"):
            _misfit(where, f"is a {_sort(value)}, the model takes {tensor.dtype}", f"Give a {tensor.dtype}.")
        return
    if not isinstance(value, list):
        _misfit(where, f"is a {_sort(value)}, no array", f"A row has the shape {_shape(shape)}.")
    if isinstance(shape[0], int) and len(value) != shape[0]:
        _misfit(where, f"has {len(value)} values, the model takes {shape[0]}", f"A row has the shape {_shape(shape)}.")
    for index, item in enumerate(value):
        _check_nested(item, tensor, shape[1:], f"{where}[{index}]")


def check_compatible(old: Signature | None, new: Signature | None) -> None:
    """Nothing if callers of the old model can go on calling the new one: the same columns in the same order (rows may
    be sent as arrays), or as many anonymous features, or the same input tensors; and every old output still there.
    UserError `schema_incompatible` that lists what was removed, added and changed."""
    if old is None or new is None:
        return
    changes = [
        *_input_changes(old, new),
        *(f"output {_short(name)} removed" for name in _missing(old.outputs, new.outputs)),
        *_dtype_changes("output", old.outputs, new.outputs),
    ]
    if "unknown" not in (old.task, new.task) and old.task != new.task:
        changes.append(f"task changed from {old.task} to {new.task}")
    elif old.classes is not None and new.classes is not None and old.classes != new.classes:
        changes.append(f"classes changed from {_listed(list(old.classes))} to {_listed(list(new.classes))}")
    if changes:
        raise UserError(
            "schema_incompatible",
            f"Callers of the present version cannot call this one: {_listed(changes)}.",
            field="file",
            hint="Give the model another name, or push with --force (force=true) to replace the present version.",
        )


def _input_changes(old: Signature, new: Signature) -> list[str]:
    if bool(old.tensors) != bool(new.tensors):
        return [] if _unknown(old) or _unknown(new) else ["tensors in place of columns, or the other way round"]
    if old.tensors:
        changes = [f"input {_short(name)} removed" for name in _missing(old.tensors, new.tensors)]
        changes += [f"input {_short(name)} added" for name in _missing(new.tensors, old.tensors)]
        changes += _dtype_changes("input", old.tensors, new.tensors)
        shapes = {tensor.name: tensor.shape for tensor in old.tensors}
        for tensor in new.tensors:
            if tensor.name in shapes and not _accepts(tensor.shape, shapes[tensor.name]):
                was, now = _shape(shapes[tensor.name]), _shape(tensor.shape)
                changes.append(f"input {_short(tensor.name)} changed from {was} to {now}")
        return changes
    if old.named and new.named:
        have = {column.name: column for column in old.columns}
        want = {column.name: column for column in new.columns}
        changes = [f"column {_short(name)} removed" for name in have if name not in want]
        changes += [f"column {_short(name)} added" for name in want if name not in have]
        changes += [
            f"column {_short(name)} is required now"
            for name, column in have.items()
            if name in want and want[name].required and not column.required
        ]
        for name, column in want.items():
            before = have.get(name)
            if before is None or "unknown" in (before.dtype, column.dtype):
                continue
            if _sorts(before) != _sorts(column):
                changes.append(f"column {_short(name)} changed from {before.dtype} to {column.dtype}")
        if not changes and list(have) != list(want):
            # callers that send arrays would be answered wrongly without an error
            changes.append("columns in another order")
        return changes
    if old.n_features is not None and new.n_features is not None and old.n_features != new.n_features:
        return [f"{old.n_features} features became {new.n_features}"]
    if old.named and not new.named and new.n_features is not None:
        return ["the columns' names removed"]
    return []


def _unknown(signature: Signature) -> bool:
    return not signature.tensors and not signature.columns and signature.n_features is None


def _sorts(column: Column) -> tuple[str, frozenset[str]]:
    """What values a column takes; an int column takes what a number column takes as far as callers can tell."""
    if column.dtype == "category":
        return "category", frozenset(_sort(level) for level in column.categories or ())
    return ("number" if column.dtype in ("number", "int", "bool") else column.dtype), frozenset()


def _accepts(new: tuple[int | str | None, ...] | None, old: tuple[int | str | None, ...] | None) -> bool:
    """Whether every value of the old shape has the new shape."""
    if new is None:
        return True
    if old is None or len(old) != len(new):
        return False
    return all(not isinstance(wide, int) or wide == narrow for wide, narrow in zip(new, old, strict=True))


def _missing(have: Sequence[Tensor], lack: Sequence[Tensor]) -> list[str]:
    names = {tensor.name for tensor in lack}
    # an unknown list of outputs lacks nothing
    return [tensor.name for tensor in have if tensor.name not in names] if lack else []


def _dtype_changes(what: str, old: Sequence[Tensor], new: Sequence[Tensor]) -> list[str]:
    before = {tensor.name: tensor.dtype for tensor in old}
    return [
        f"{what} {_short(tensor.name)} changed from {before[tensor.name]} to {tensor.dtype}"
        for tensor in new
        if tensor.name in before and before[tensor.name] != tensor.dtype
    ]


def _sort(value: Any) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, (int, float)):
        return "number" if not isinstance(value, float) or math.isfinite(value) else "not finite number"
    if isinstance(value, str):
        return "string"
    return "array" if isinstance(value, list) else "object" if isinstance(value, dict) else "null"


def _short(name: str) -> str:
    text = "".join(character if character.isprintable() else "?" for character in name)
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(items: Sequence[Any]) -> str:
    shown = ", ".join(_short(str(item)) for item in items[:_MOST_LISTED])
    return shown if len(items) <= _MOST_LISTED else f"{shown} and {len(items) - _MOST_LISTED} more"


def _shape(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return "any shape"
    return "[" + ", ".join("?" if axis is None else _short(str(axis)) for axis in shape) + "]"


def _misfit(field: str, what: str, hint: str) -> NoReturn:
    raise UserError(
        "sample_does_not_fit", f"The sample does not fit the model: {field} {what}.", field=field, hint=hint
    )
