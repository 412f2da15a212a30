"""Rows that a model is tried with at start: those of its sample, others near to them, and extremes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bentos.serving.problems import Problem
from bentos.serving.schema import Column, Table
from bentos.serving.tensors import FLOATS, Tensor, Tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Row = tuple[NDArray[Any], ...]

ROWS = 6
_SIZES = (4, 1, 32, 224)
"""Of axes that the model leaves free, where no sample shows one; the first that the model takes counts."""
_TEXTS = ("a text", "another text of some more words", "words", "a", "", "what else could be said of it 2 3")
_LARGE = 1e4
"""How many times larger than an ordinary value an extreme one is."""


@dataclass(frozen=True)
class Trials:
    """Rows of equal shape: an array for each input, without the batch."""

    rows: tuple[Row, ...]
    extremes: tuple[Row, ...]


def of_tensors(tensors: Tensors, sample: Any, takes: Callable[[Row], bool]) -> Trials:
    """Rows for these inputs, near to those of a sample if there is one. `takes` says whether the model takes a row."""
    shown = _shown(tensors, sample)
    if shown:
        return _near(tensors, shown)
    found = Trials((), ())
    for size in _SIZES:
        found = _near(tensors, [tuple(_blank(tensor, size) for tensor in tensors.all)])
        if any(takes(row) for row in found.rows) or not tensors.free:
            break
    return found


def of_table(table: Table | None, sample: Any) -> tuple[list[Any], list[Any]]:
    """Rows of a table's columns, and extremes, as a request has them; without a table, texts."""
    import numpy as np

    given = sample.get("inputs") if isinstance(sample, dict) else None
    shown = [row for row in given if isinstance(row, list | dict | str)][: 4 * ROWS] if isinstance(given, list) else []
    if table is None:
        return [*dict.fromkeys(each for each in shown if isinstance(each, str)), *_TEXTS][:ROWS], []
    cells = []
    for row in shown:
        with suppress(Problem):
            table.records([row])
            cells.append([row[name] for name in table.names] if isinstance(row, dict) else list(row))
    cells = cells or [[column.first() for column in table.columns]]
    rng = np.random.default_rng(0)
    columns = [[row[at] for row in cells] for at in range(len(table.columns))]
    rows = [row for at, row in enumerate(cells) if row not in cells[:at]][: ROWS // 2]
    while len(rows) < ROWS:
        rows.append([_cell(column, seen, rng) for column, seen in zip(table.columns, columns, strict=True)])
    extremes = [
        [_extreme_cell(cell, factor) if c.numeric else cell for c, cell in zip(table.columns, rows[-1], strict=True)]
        for factor in (None, _LARGE, -_LARGE)
    ]
    return rows, extremes


def _extreme_cell(value: Any, factor: float | None) -> Any:
    return None if factor is None else factor * (1 + abs(value)) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and value == value


def _cell(column: Column, seen: list[Any], rng: Any) -> Any:
    """A value of a column near to those seen."""
    if column.categories:
        return column.categories[int(rng.integers(0, len(column.categories)))]
    numbers = [each for each in seen if _is_number(each)]
    if column.numeric and numbers:
        low, high = min(numbers), max(numbers)
        moved = numbers[int(rng.integers(0, len(numbers)))] + ((high - low) or 1.0) * rng.normal()
        return round(moved) if all(type(each) is int for each in numbers) else float(moved)
    return seen[int(rng.integers(0, len(seen)))]


def _shown(tensors: Tensors, sample: Any) -> list[Row]:
    """Rows of the sample, those of the first one's shape."""
    rows = sample.get("inputs") if isinstance(sample, dict) else None
    found: list[Row] = []
    for row in rows[: 4 * ROWS] if isinstance(rows, list) else []:
        try:
            feed = tensors.arrays(tensors.cells([row]))
        except Problem:  # the golden sample will be refused with words
            continue
        made = tuple(feed[tensor.name][0, ...] if tensor.batched else feed[tensor.name] for tensor in tensors.all)
        if not found or _shapes(made) == _shapes(found[0]):
            found.append(made)
    return found


def _shapes(row: Row) -> list[tuple[int, ...]]:
    import numpy as np

    return [np.shape(each) for each in row]


def _blank(tensor: Tensor, size: int) -> NDArray[Any]:
    import numpy as np

    shape = (size,) if tensor.shape is None else tuple(size if each is None else each for each in tensor.shape)
    if tensor.dtype == "string":
        return np.full(shape, "", object)
    return np.zeros(shape, tensor.dtype)


def _near(tensors: Tensors, shown: Sequence[Row]) -> Trials:
    import numpy as np

    rng = np.random.default_rng(0)
    columns = [np.stack([np.asarray(each) for each in values]) for values in zip(*shown, strict=True)]
    rows = list(_distinct(shown))[: ROWS // 2]
    while len(rows) < ROWS:
        start = len(rows) % len(shown)
        rows.append(
            tuple(_other(t, column, column[start, ...], rng) for t, column in zip(tensors.all, columns, strict=True))
        )
    extremes = []
    if any(tensor.dtype in FLOATS for tensor in tensors.all):
        for factor in (np.nan, _LARGE, -_LARGE):
            extremes.append(tuple(_extreme(t, each, factor) for t, each in zip(tensors.all, rows[-1], strict=True)))
    return Trials(tuple(rows), tuple(extremes))


def _distinct(rows: Sequence[Row]) -> Iterator[Row]:
    import numpy as np

    kept: list[Row] = []
    for row in rows:
        if not any(all(np.array_equal(a, b) for a, b in zip(row, other, strict=True)) for other in kept):
            kept.append(row)
            yield row


def _other(tensor: Tensor, column: NDArray[Any], value: NDArray[Any], rng: Any) -> NDArray[Any]:
    """A value near to one that was shown: drawn from those seen where it is not a float."""
    import numpy as np

    if tensor.dtype in FLOATS:
        spread = np.nanstd(column.astype(np.float64)) or 1.0
        limit = FLOATS[tensor.dtype]
        moved = np.clip(value.astype(np.float64) + spread * rng.normal(size=value.shape), -limit, limit)
        return np.asarray(moved, tensor.dtype)
    if tensor.dtype == "string":
        seen = [each for each in dict.fromkeys(column.ravel().tolist()) if each] or ["a", "b"]
        return np.array([seen[at] for at in rng.integers(0, len(seen), value.size)], object).reshape(value.shape)
    numbers = np.unique(column)
    return np.asarray(rng.choice(numbers if len(numbers) > 1 else [0, 1], size=value.shape), tensor.dtype)


def _extreme(tensor: Tensor, value: NDArray[Any], factor: float) -> NDArray[Any]:
    import numpy as np

    if tensor.dtype not in FLOATS:
        return value
    limit = min(FLOATS[tensor.dtype], 1e30) / 2
    large = np.clip(factor * (1 + np.abs(value.astype(np.float64))), -limit, limit)
    return np.asarray(large, tensor.dtype)
