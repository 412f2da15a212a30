"""Follows the rows of a request through a graph of operators, to prove that no operator mixes them.

An abstract interpretation: every tensor is one of

    Rows    its slices along `axis` are those of the rows, each made from its own row alone
    Fixed   the same whatever rows come, such as weights
    Sizes   whole numbers of a shape, in which ROWS stands for the number of rows
    None    anything else: rows may be mixed

The functions here are what operators do to such values; bentos/formats/onnx_rows.py and bentos/tensorflow/graph_rows.py
name the operators. An operator that is not known gives None, so a mistake by omission costs speed, never an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final

ROWS: Final = "rows"
"""An entry of Sizes: the number of rows."""
BLOCKS: Final = "blocks"
"""An entry of Sizes: the number of rows times a whole number that is the same however many rows come."""
OTHER: Final = "other"
"""An entry of Sizes: a number that depends on the number of rows in another manner."""
_COUNTS = frozenset({ROWS, BLOCKS, OTHER})

Entry = int | float | str | None
"""A known number, ROWS, BLOCKS, OTHER, or None: not known, and the same however many rows come."""


@dataclass(frozen=True)
class Fixed:
    dims: tuple[int | None, ...] | None = None
    values: tuple[Entry, ...] | None = None
    """The elements in their order, of small tensors."""


@dataclass(frozen=True)
class Sizes:
    values: tuple[Entry, ...]
    scalar: bool = False


@dataclass(frozen=True)
class Rows:
    """`blocks`: `axis` is 0 and holds as many consecutive entries for each row, such as its tokens."""

    rank: int
    axis: int = 0
    blocks: bool = False


Value = Fixed | Sizes | Rows | None


def names(text: str) -> frozenset[str]:
    """Operators, separated by spaces."""
    return frozenset(text.split())


def entries(value: Value) -> tuple[Entry, ...] | None:
    """The known elements of a small tensor."""
    return None if value is None or isinstance(value, Rows) else value.values


def whole(value: Value) -> tuple[int, ...] | None:
    """Elements that are all known whole numbers, such as axes."""
    found = entries(value)
    if found is None or not all(isinstance(each, int) for each in found):
        return None
    return tuple(int(each) for each in found if each is not None)


def sized(values: Iterable[Entry], scalar: bool = False) -> Value:
    """Fixed where no entry depends on the number of rows."""
    listed = tuple(values)
    if not _COUNTS.isdisjoint(listed):
        return Sizes(listed, scalar)
    return Fixed(() if scalar else (len(listed),), listed)


def shape_of(value: Value) -> Value:
    if isinstance(value, Rows):
        count: Entry = BLOCKS if value.blocks else ROWS
        return Sizes(tuple(count if at == value.axis else None for at in range(value.rank)))
    if isinstance(value, Fixed) and value.dims is not None:
        return sized(value.dims)
    return sized((len(value.values),)) if isinstance(value, Sizes) and not value.scalar else None


def same(values: Sequence[Value]) -> Value:
    """What an operator gives that keeps the shape of its first input and takes nothing else but constants."""
    if not values or not all(isinstance(each, Fixed) for each in values[1:]):
        return None
    first = values[0]
    return Fixed(first.dims) if isinstance(first, Fixed) else (first if isinstance(first, Rows) else None)


def elementwise(values: Sequence[Value]) -> Value:
    """NumPy's broadcasting: the rows must be on one axis from the right, where every constant has the size 1."""
    rows = [each for each in values if isinstance(each, Rows)]
    fixed = [each for each in values if isinstance(each, Fixed)]
    if len(rows) + len(fixed) != len(values) or not values:
        return None
    if not rows:
        return Fixed(broadcast([each.dims for each in fixed]))
    behind = {each.rank - each.axis for each in rows}
    if len(behind) != 1:
        return None
    (place,) = behind
    if not all(_is_one(each.dims, place) for each in fixed):
        return None
    rank = max([each.rank for each in rows] + [len(each.dims or ()) for each in fixed])
    blocks = any(each.blocks for each in rows)
    if blocks and rank != place:
        return None
    return Rows(rank, rank - place, blocks)


def broadcast(shapes: Sequence[tuple[int | None, ...] | None]) -> tuple[int | None, ...] | None:
    if any(shape is None for shape in shapes):
        return None
    listed = [shape for shape in shapes if shape is not None]
    rank = max(map(len, listed), default=0)
    found: list[int | None] = []
    for at in range(rank):
        sizes = {shape[at - rank + len(shape)] for shape in listed if at - rank + len(shape) >= 0} - {1}
        found.append(1 if not sizes else sizes.pop() if len(sizes) == 1 else None)
    return tuple(found)


def _is_one(dims: tuple[int | None, ...] | None, behind: int) -> bool:
    """Whether a constant has the size 1, or no axis, `behind` axes from the right."""
    if dims is None:
        return False
    return len(dims) < behind or dims[len(dims) - behind] == 1


def arithmetic(left: Value, right: Value, operator: str) -> Value:
    """Add, Sub, Mul or Div of whole numbers of shapes."""
    pairs = _paired(left, right)
    if pairs is None:
        return None
    scalar = _scalar(left) and _scalar(right)
    return sized((_calculated(a, b, operator) for a, b in pairs), scalar)


def _calculated(a: Entry, b: Entry, operator: str) -> Entry:
    neutral = 0 if operator in ("Add", "Sub") else 1
    if b == neutral and not isinstance(b, bool):
        return a
    if a == neutral and operator in ("Add", "Mul"):
        return b
    if isinstance(a, str) or isinstance(b, str):
        counts = [each for each in (a, b) if isinstance(each, str)]
        return BLOCKS if operator == "Mul" and len(counts) == 1 and counts[0] != OTHER else OTHER
    if isinstance(a, int) and isinstance(b, int):
        if operator == "Div":
            return int(a / b) if b else None
        return {"Add": a + b, "Sub": a - b, "Mul": a * b}[operator]
    return None


def product(value: Value) -> Value:
    """Of all entries."""
    found = entries(value)
    if found is None:
        return None
    result: Entry = 1
    for each in found:
        result = _calculated(result, each, "Mul")
    return sized((result,), scalar=True)


def equal(left: Value, right: Value) -> Value:
    """Where two vectors of sizes are equal, as 1 and 0; the number of rows is never negative."""
    pairs = _paired(left, right)
    if pairs is None:
        return None
    found: list[Entry] = []
    for a, b in pairs:
        if isinstance(a, int) and isinstance(b, int):
            found.append(int(a == b))
        elif not {ROWS, BLOCKS}.isdisjoint((a, b)) and any(isinstance(each, int) and each < 0 for each in (a, b)):
            found.append(0)
        else:
            found.append(OTHER if isinstance(a, str) or isinstance(b, str) else None)
    return sized(found, _scalar(left) and _scalar(right))


def chosen(condition: Value, yes: Value, no: Value) -> Value:
    """`Where` of vectors of sizes."""
    tests, first, second = entries(condition), entries(yes), entries(no)
    if tests is None or first is None or second is None:
        return None
    length = max(len(tests), len(first), len(second))
    if any(len(each) not in (1, length) for each in (tests, first, second)):
        return None
    tests, first, second = (each * length if len(each) == 1 else each for each in (tests, first, second))
    found: list[Entry] = []
    for test, a, b in zip(tests, first, second, strict=True):
        if isinstance(test, int):
            found.append(a if test else b)
        else:
            counted = isinstance(test, str) or not _COUNTS.isdisjoint((a, b))
            found.append(a if a == b else OTHER if counted else None)
    return sized(found)


def _scalar(value: Value) -> bool:
    return value.scalar if isinstance(value, Sizes) else isinstance(value, Fixed) and value.dims == ()


def _paired(left: Value, right: Value) -> list[tuple[Entry, Entry]] | None:
    a, b = entries(left), entries(right)
    if a is None or b is None:
        return None
    length = max(len(a), len(b))
    if len(a) not in (1, length) or len(b) not in (1, length):
        return None
    return list(zip(a * length if len(a) == 1 else a, b * length if len(b) == 1 else b, strict=True))


def axis_of(axis: int, rank: int) -> int:
    return axis + rank if axis < 0 else axis


def along(value: Value, axis: int) -> Value:
    """An operator that works along one axis, such as a softmax or a cumulative sum."""
    if isinstance(value, Rows):
        return value if axis_of(axis, value.rank) != value.axis else None
    return Fixed(value.dims) if isinstance(value, Fixed) else None


def from_axis(value: Value, axis: int) -> Value:
    """An operator that works along all axes from `axis` on, such as a layer normalisation."""
    if isinstance(value, Rows):
        return value if value.axis < axis_of(axis, value.rank) else None
    return Fixed(value.dims) if isinstance(value, Fixed) else None


def reduced(value: Value, axes: Sequence[int] | None, keep: bool) -> Value:
    """None as `axes`: all."""
    if isinstance(value, Fixed):
        return Fixed()
    if not isinstance(value, Rows) or axes is None:
        return None
    gone = {axis_of(axis, value.rank) for axis in axes}
    if value.axis in gone:
        return None
    if keep:
        return value
    return replace(value, rank=value.rank - len(gone), axis=value.axis - sum(axis < value.axis for axis in gone))


def transposed(value: Value, order: Sequence[int] | None) -> Value:
    """None as `order`: reversed."""
    if isinstance(value, Fixed):
        if value.dims is None:
            return Fixed()
        order = range(len(value.dims))[::-1] if order is None else order
        return Fixed(tuple(value.dims[at] for at in order)) if len(order) == len(value.dims) else None
    if not isinstance(value, Rows):
        return None
    order = list(range(value.rank))[::-1] if order is None else list(order)
    if sorted(order) != list(range(value.rank)):
        return None
    axis = order.index(value.axis)
    return None if value.blocks and axis != 0 else replace(value, axis=axis)


def squeezed(value: Value, axes: Sequence[int] | None) -> Value:
    """Without `axes` all of size 1 go, which may be that of the rows."""
    found = entries(value)
    if found is not None and len(found) == 1:
        return sized(found, scalar=True)
    if isinstance(value, Fixed):
        return Fixed()
    return None if axes is None else reduced(value, axes, keep=False)


def unsqueezed(value: Value, axes: Sequence[int]) -> Value:
    found = entries(value)
    if found is not None and _scalar(value):
        return sized(found)
    if isinstance(value, Fixed):
        if value.dims is None:
            return Fixed()
        left = iter(value.dims)
        rank = len(value.dims) + len(axes)
        new = {axis_of(axis, rank) for axis in axes}
        return Fixed(tuple(1 if at in new else next(left, None) for at in range(rank)))
    if not isinstance(value, Rows):
        return None
    rank = value.rank + len(axes)
    new = {axis_of(axis, rank) for axis in axes}
    kept = [at for at in range(rank) if at not in new]
    if len(kept) != value.rank:
        return None
    axis = kept[value.axis]
    return None if value.blocks and axis != 0 else replace(value, rank=rank, axis=axis)


def reshaped(value: Value, shape: Value, free: bool, keeps_zero: bool = False) -> Value:
    """Rows that come first in memory stay consecutive where the new first axis is a multiple of their number.

    Where it takes what is left (-1), a row alone must fill a whole number of entries: not known of rows that may differ
    in size (`free`), and else shown by any row that is predicted alone. `keeps_zero`: 0 stands for the size before, as
    in ONNX.
    """
    sizes = entries(shape)
    if sizes is None:
        return None
    if isinstance(value, Sizes):
        return sized(value.values, scalar=not sizes)
    if isinstance(value, Fixed):
        dims = tuple(each if isinstance(each, int) and each > 0 else None for each in sizes)
        return Fixed(dims, value.values) if _COUNTS.isdisjoint(sizes) else None
    if value is None or not sizes:
        return None
    rank = len(sizes)
    if keeps_zero and value.axis < rank and all(each == 0 for each in sizes[: value.axis + 1]):
        return replace(value, rank=rank)
    if value.axis != 0:
        return None
    if sizes[0] == ROWS:
        return Rows(rank)
    return Rows(rank, blocks=True) if sizes[0] == BLOCKS or (sizes[0] == -1 and not free) else None


def expanded(value: Value, shape: Value) -> Value:
    """Broadcast to a shape."""
    sizes = entries(shape)
    if sizes is None or OTHER in sizes or BLOCKS in sizes:
        return None
    at = [place for place, each in enumerate(sizes) if each == ROWS]
    if isinstance(value, Rows):
        rank = max(value.rank, len(sizes))
        axis = rank - (value.rank - value.axis)
        given = axis - rank + len(sizes)
        fits = given < 0 or sizes[given] in (ROWS, 1)
        if not fits or any(place != given for place in at) or (value.blocks and axis != 0):
            return None
        return replace(value, rank=rank, axis=axis)
    if not isinstance(value, Fixed):
        return None
    if not at:
        return Fixed(broadcast([value.dims, tuple(each if isinstance(each, int) else None for each in sizes)]))
    if len(at) != 1 or not _is_one(value.dims, len(sizes) - at[0]):
        return None
    return Rows(len(sizes), at[0]) if len(value.dims or ()) <= len(sizes) else None


def filled(shape: Value) -> Value:
    """A constant of a shape."""
    sizes = entries(shape)
    if sizes is None or OTHER in sizes or BLOCKS in sizes or sizes.count(ROWS) > 1:
        return None
    if ROWS in sizes:
        return Rows(len(sizes), sizes.index(ROWS))
    return Fixed(tuple(each if isinstance(each, int) else None for each in sizes))


def joined(values: Sequence[Value], axis: int) -> Value:
    """A concatenation."""
    listed = [entries(each) for each in values]
    if all(each is not None for each in listed) and not any(isinstance(each, Fixed) and each.dims and len(each.dims) > 1
                                                             for each in values):  # fmt: skip
        return sized(entry for each in listed if each is not None for entry in each)
    if all(isinstance(each, Fixed) for each in values):
        return Fixed()
    if not all(isinstance(each, Rows) for each in values):
        return None
    (kind, *others) = {each for each in values if isinstance(each, Rows)}
    return along(kind, axis) if not others else None


def sliced(value: Value, axes: Sequence[int]) -> Value:
    """A part along some axes, which is taken by constants."""
    if isinstance(value, Fixed):
        return Fixed()
    if not isinstance(value, Rows):
        return None
    return None if value.axis in {axis_of(axis, value.rank) for axis in axes} else value


def gathered(data: Value, places: Value, axis: int) -> Value:
    """NumPy's `take`: an embedding, or columns by number."""
    known, at = entries(data), whole(places)
    if known is not None and at is not None and not (isinstance(data, Fixed) and len(data.dims or (0,)) > 1):
        if any(not -len(known) <= each < len(known) for each in at):
            return None
        return sized((known[each] for each in at), scalar=_scalar(places))
    if isinstance(data, Fixed) and isinstance(places, Fixed):
        return Fixed()
    if isinstance(data, Fixed) and isinstance(places, Rows):
        if data.dims is None:
            return None
        axis = axis_of(axis, len(data.dims))
        rank = len(data.dims) - 1 + places.rank
        return None if places.blocks and axis != 0 else Rows(rank, axis + places.axis, places.blocks)
    if isinstance(data, Rows) and isinstance(places, Fixed) and places.dims is not None:
        axis = axis_of(axis, data.rank)
        if axis == data.axis:
            return None
        more = len(places.dims) - 1
        moved = data.axis if data.axis < axis else data.axis + more
        return None if data.blocks and moved != 0 else replace(data, rank=data.rank + more, axis=moved)
    return None


def multiplied(left: Value, right: Value) -> Value:
    """A product of matrices, as NumPy's `matmul`."""
    if isinstance(left, Fixed) and isinstance(right, Fixed):
        return Fixed()
    if isinstance(left, Rows) and isinstance(right, Fixed):
        if left.rank < 2 or left.axis > left.rank - 2 or right.dims is None or not right.dims:
            return None
        # a stack of constant matrices is broadcast against the axes before the last two
        behind = left.rank - left.axis
        if len(right.dims) > 2 and (behind == 2 or not _is_one(right.dims, behind) or len(right.dims) > left.rank):
            return None
        return left if len(right.dims) > 1 else replace(left, rank=left.rank - 1)
    if isinstance(left, Fixed) and isinstance(right, Rows):
        if right.rank < 3 or right.axis > right.rank - 3 or left.dims is None or len(left.dims) != 2:
            return None
        return right
    if isinstance(left, Rows) and isinstance(right, Rows):
        behind = left.rank - left.axis
        if behind < 3 or behind != right.rank - right.axis or left.rank != right.rank:
            return None
        return replace(left, blocks=left.blocks or right.blocks)
    return None


def contracted(equation: str, values: Sequence[Value]) -> Value:
    """An Einstein sum, such as `abc,cd->abd`."""
    takes, arrow, gives = equation.replace(" ", "").partition("->")
    terms = takes.split(",")
    if not arrow or "." in equation or len(terms) != len(values):
        return None
    if all(isinstance(each, Fixed) for each in values):
        return Fixed()
    labels = set()
    for term, value in zip(terms, values, strict=True):
        if isinstance(value, Rows):
            if len(term) != value.rank or len(set(term)) != len(term):
                return None
            labels.add(term[value.axis])
        elif not isinstance(value, Fixed):
            return None
    (label, *others) = labels
    fixed = any(label in term for term, value in zip(terms, values, strict=True) if isinstance(value, Fixed))
    if others or fixed or gives.count(label) != 1:
        return None
    if any(term.count(label) != 1 for term, value in zip(terms, values, strict=True) if isinstance(value, Rows)):
        return None
    blocks = any(each.blocks for each in values if isinstance(each, Rows))
    return None if blocks and gives[0] != label else Rows(len(gives), gives.index(label), blocks)


def repeated(value: Value, multiples: Value) -> Value:
    """A tensor laid side by side several times along its axes."""
    counts = entries(multiples)
    if counts is None:
        return None
    if isinstance(value, Rows):
        return value if len(counts) == value.rank and counts[value.axis] == 1 else None
    if not isinstance(value, Fixed):
        return None
    if _COUNTS.isdisjoint(counts):
        return Fixed()
    if counts.count(ROWS) != 1 or BLOCKS in counts or OTHER in counts:
        return None
    axis = counts.index(ROWS)
    alone = value.dims is not None and len(value.dims) == len(counts) and value.dims[axis] == 1
    return Rows(len(counts), axis) if alone else None
