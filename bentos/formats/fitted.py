"""What a fitted scikit-learn estimator knows of the columns that it was fitted on: their types, categories and gaps.

JSON has one kind of number and one null, pandas and NumPy have many. The steps of a pipeline keep what they saw at
fitting: an encoder its categories in their own type, an imputer the missing value that it looks for. `features` follows
each column to the steps that see its values, and puts together what they know.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from bentos import serving
from bentos.serving.values import UnfitError, ValueType, date_text, held

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DEEPEST = 50
"""Steps inside of steps that are followed."""


@dataclass(frozen=True)
class Feature:
    """A column as requests name it, and as the model's first steps take it.

    `dtype` is None where the model does not keep it: then the values are doubles, as the estimator makes them itself.
    `none`: a missing value is None, else NaN (a date: NaT).
    """

    column: serving.Column
    dtype: np.dtype[Any] | None = None
    none: bool = False
    used: bool = True

    @property
    def plain(self) -> bool:
        """Whether its values are doubles, which many columns can be read as at once."""
        simple = self.column.type is ValueType.NUMBER and self.column.categories is None and not self.column.exact
        return simple and self.dtype is None

    def array(self, values: Sequence[Any]) -> NDArray[Any]:
        """Return values, read by the column (None: missing), as an array of the type that the column had at fitting.

        An array of objects takes what that type has no place for: a gap between whole numbers, a number among booleans.
        """
        import numpy as np

        dtype = self.dtype or np.dtype(float)
        if self.column.type is ValueType.ANY and str in set(map(type, values)):
            dtype = np.dtype(object)  # a column that the model drops, or whose type its file does not say
        if dtype.kind == "f":
            return np.array(values, dtype=dtype)
        if dtype.kind == "M":
            return np.array([np.datetime64("NaT") if v is None else v for v in values], dtype=dtype)
        if dtype.kind == "b" and set(map(type, values)) == {bool}:
            return np.array(values, dtype=bool)
        if dtype.kind in "iu":
            values = [int(v) if type(v) is float and v.is_integer() else v for v in values]
            if set(map(type, values)) <= {int, bool}:
                try:
                    return np.array(values, dtype="int64" if dtype.kind == "i" else "uint64")
                except OverflowError:
                    pass
            elif all(v is None or held(v) for v in values):
                return np.array(values, dtype=float)
        missing = None if self.none else math.nan
        objects = np.empty(len(values), dtype=object)
        objects[:] = [missing if v is None or v != v else v for v in values]
        return objects


def features(estimator: Any, names: Sequence[str] | None, width: int, shown: set[int], file: str) -> list[Feature]:
    """Return what each of `width` columns is; `shown` are those that a sample shows as text.

    Raises StartError `model_load_failed` for a column whose values JSON cannot keep.
    """
    found = _Uses.of(estimator, width)
    made = []
    for at, uses in enumerate(found):
        name = names[at] if names is not None else f"x{at}"
        try:
            made.append(_feature(name, uses, at in shown))
        except ValueError as error:
            hint = "convert the column before fitting, such as to text or numbers with one kind of missing value"
            raise serving.StartError("model_load_failed", f"Column {name!r} of {file} {error}.", hint) from error
    return made


def array(known: Sequence[Feature], columns: Sequence[Sequence[Any]]) -> NDArray[Any] | None:
    """Return columns of values as the array that the model was fitted on; None where one array cannot keep them."""
    import numpy as np

    types = {feature.dtype for feature in known if feature.dtype is not None}
    dtype = next(iter(types), np.dtype(float))
    if len(types) > 1 or dtype.kind in "OU":
        return None
    arrays = [
        replace(feature, dtype=dtype).array(values)
        if feature.used or str not in set(map(type, values))
        else np.zeros(len(values), dtype)  # dropped by the model, and an array of numbers has no place for texts
        for feature, values in zip(known, columns, strict=True)
    ]
    return np.column_stack(arrays) if len({each.dtype for each in arrays}) == 1 else None


@dataclass(frozen=True)
class _Use:
    """What one step knows about a column that it takes.

    `alone`: `dtype` is of the column itself, not of an array that it shares with others. `values` are categories and
    the like, `likely` those of an imputer, which are its own choice. `none` and `nan` say which missing values there
    were at fitting. `levels`: others are refused. `fault` is what JSON cannot keep.
    """

    dtype: np.dtype[Any] | None = None
    alone: bool = True
    values: tuple[Any, ...] = ()
    likely: tuple[Any, ...] = ()
    none: bool = False
    nan: bool = False
    filled: bool = False
    levels: tuple[Any, ...] | None = None
    text: bool = False
    opaque: bool = False
    fault: str | None = None


@dataclass(frozen=True)
class _Cell:
    """A column of a step's input whose values are those of a column of the model's input."""

    at: int
    alone: bool = True
    filled: tuple[Any, ...] | None = None
    """The missing values that an imputer before this step has filled."""


_Cells = list[_Cell | None]


@dataclass
class _Uses:
    """Collects the uses of each column, from the first step to the last that sees its values."""

    found: list[list[_Use]]
    depth: int = field(default=0)

    @classmethod
    def of(cls, estimator: Any, width: int) -> list[list[_Use]]:
        uses = cls([[] for _ in range(width)])
        uses.walk(estimator, [_Cell(at) for at in range(width)])
        return uses.found

    def walk(self, step: Any, cells: _Cells) -> _Cells | None:
        """Follow the columns through a step. Returns its output's columns, None for one that it made; None: unknown."""
        if isinstance(step, str):
            return [] if step == "drop" else cells
        if self.depth >= _DEEPEST:
            return None
        self.depth += 1
        try:
            return self._step(step, cells)
        finally:
            self.depth -= 1

    def _step(self, step: Any, cells: _Cells) -> _Cells | None:
        if hasattr(step, "steps"):
            return self._pipeline(step, cells)
        if hasattr(step, "transformers_"):
            return self._columns(step, cells)
        if hasattr(step, "transformer_list"):
            return self._union(step, cells)
        if hasattr(step, "categories_"):
            return self._encoder(step, cells)
        if hasattr(step, "statistics_") and hasattr(step, "missing_values"):
            return self._imputer(step, cells)
        if hasattr(step, "get_support"):
            return self._selection(step, cells)
        # a TransformedTargetRegressor has both too, of its targets
        if hasattr(step, "inverse_func") and hasattr(step, "func") and not hasattr(step, "regressor_"):
            if step.func is None:
                return cells
            return self._use(cells, _Use(opaque=True))
        if hasattr(step, "build_analyzer"):
            return self._use(cells, _Use(text=True))
        if hasattr(step, "missing_values"):
            return self._use(cells, _Use(none=step.missing_values is None))
        wrapped = list(_wrapped(step, len(cells)))
        for inner, places in wrapped:
            more = getattr(inner, "n_features_in_", 0) - len(places)  # a chain adds the answers of its first links
            self.walk(inner, [*(cells[at] for at in places), *[None] * more])
        if not wrapped or any(map(_is_tree, getattr(step, "estimators_", None) or ())):
            self._use(cells, _Use())  # it takes numbers, and makes doubles of them itself
        return None

    def _use(self, cells: _Cells, use: _Use) -> _Cells | None:
        """Note a use of each column by a step whose output has none of their values."""
        for cell in cells:
            if cell is not None:
                self.found[cell.at].append(use)
        return None

    def _pipeline(self, step: Any, cells: _Cells) -> _Cells | None:
        seen: _Cells | None = cells
        for _, inner in step.steps:
            if inner is not None and seen is not None:
                seen = self.walk(inner, seen)
        return seen

    def _columns(self, step: Any, cells: _Cells) -> _Cells | None:
        if len(cells) != step.n_features_in_:
            return self._use(cells, _Use())
        names = [str(name) for name in getattr(step, "feature_names_in_", ())]
        outputs: dict[str, _Cells] = {}
        for name, inner, columns in step.transformers_:
            at = _positions(columns, len(cells), names)
            if at is None:
                self._use(cells, _Use())
                continue
            taken = [cells[place] for place in at]
            made = self.walk(inner, taken)
            places = step.output_indices_.get(name, slice(0, 0))
            count = places.stop - places.start
            outputs[name] = made if made is not None and len(made) == count else [None] * count
        ordered = sorted(outputs, key=lambda name: int(step.output_indices_.get(name, slice(0, 0)).start))
        return [cell and _Cell(cell.at, False, cell.filled) for name in ordered for cell in outputs[name]]

    def _union(self, step: Any, cells: _Cells) -> _Cells | None:
        made = [self.walk(inner, cells) for _, inner in step.transformer_list]
        if any(each is None for each in made):
            return None
        return [cell and _Cell(cell.at, False, cell.filled) for each in made for cell in each or ()]

    def _encoder(self, step: Any, cells: _Cells) -> _Cells | None:
        if len(step.categories_) != len(cells):
            return self._use(cells, _Use())
        # a TargetEncoder has no such setting: it answers what it does not know by the mean of all
        closed = getattr(step, "handle_unknown", "ignore") == "error"
        for cell, categories in zip(cells, step.categories_, strict=True):
            if cell is not None:
                self.found[cell.at].append(_of_categories(cell, categories, closed))
        return None

    def _imputer(self, step: Any, cells: _Cells) -> _Cells | None:
        statistics = step.statistics_.tolist()
        if len(statistics) != len(cells):
            return self._use(cells, _Use())
        dtype = getattr(step, "_fit_dtype", None)  # of SimpleImputer alone; another imputer takes numbers
        kept = getattr(step, "strategy", "mean") in ("most_frequent", "constant")  # the others make doubles
        indicator = getattr(step, "indicator_", None)
        gaps = set() if indicator is None else set(indicator.features_.tolist())
        missing = step.missing_values
        for at, (cell, value) in enumerate(zip(cells, statistics, strict=True)):
            if cell is not None:
                use = _Use(
                    dtype=dtype if kept else None,
                    alone=cell.alone and len(cells) == 1,
                    likely=() if value is None or value != value else (value,),
                    none=missing is None,
                    nan=missing is not None and missing != missing and at in gaps,
                    filled=True,
                )
                self.found[cell.at].append(use)
        made: _Cells = []
        for cell, value in zip(cells, statistics, strict=True):
            if value is None or value == value or step.keep_empty_features:  # else the column is left out
                made.append(cell and _Cell(cell.at, False, (missing,)))
        return [*made, *[None] * len(gaps)]

    def _selection(self, step: Any, cells: _Cells) -> _Cells | None:
        self._use(cells, _Use())
        support = step.get_support().tolist()
        if len(support) != len(cells):
            return None
        left = [cell for cell, selected in zip(cells, support, strict=True) if selected]
        if hasattr(step, "predict"):  # RFE asks its estimator about what is left
            self.walk(step.estimator_, left)
        return left


def _wrapped(step: Any, width: int) -> Iterator[tuple[Any, Sequence[int]]]:
    """The fitted estimators that see the rows as `step` gets them, each with the places of the columns that it sees."""
    every = range(width)
    single = [getattr(step, name, None) for name in ("best_estimator_", "regressor_")]
    if type(step).__name__ == "FrozenEstimator":
        single.append(step.estimator)
    calibrated = [each.estimator for each in getattr(step, "calibrated_classifiers_", ())]
    several = getattr(step, "estimators_", None)
    if several is None:
        single.append(getattr(step, "estimator_", None))
    listed = list(several) if isinstance(several, list) else []
    subsets = getattr(step, "estimators_features_", None)
    for at, inner in enumerate([*single, *calibrated, *listed]):
        if inner is None or isinstance(inner, str) or _is_tree(inner):
            continue
        seen = every if subsets is None else subsets[at - len(single) - len(calibrated)].tolist()
        yield inner, [place for place in seen if place < width]


def _is_tree(step: Any) -> bool:
    """Whether it takes numbers alone. A forest has hundreds of them."""
    return type(step).__module__.startswith("sklearn.tree.")


def _positions(columns: Any, width: int, names: Sequence[str]) -> list[int] | None:
    """Where a transformer's columns are, given by name or number, as a slice or mask; None where that is not clear."""
    places = {name: at for at, name in enumerate(names)}
    if isinstance(columns, slice):
        if isinstance(columns.start, str) or isinstance(columns.stop, str):  # by name, the last one is included
            first = places.get(columns.start, 0)
            last = places.get(columns.stop, width - 1)
            return list(range(first, last + 1, columns.step or 1))
        return list(range(width))[columns]
    if isinstance(columns, str) or hasattr(columns, "__index__"):
        columns = [columns]
    try:
        listed = list(columns)
    except TypeError:
        return None
    if listed and all(type(column).__name__.startswith("bool") for column in listed):
        return [at for at, taken in enumerate(listed) if taken] if len(listed) == width else None
    found = []
    for column in listed:
        place: Any = places.get(column) if isinstance(column, str) else column
        if not hasattr(place, "__index__") or not -width <= place < width:
            return None
        found.append(int(place) % width)
    return found


def _of_categories(cell: _Cell, categories: NDArray[Any], closed: bool) -> _Use:
    import numpy as np

    dtype = categories.dtype
    plain = (np.bool_, np.integer, np.floating, np.str_)
    listed: list[Any] = [c.item() if isinstance(c, plain) else c for c in categories]
    present = [c for c in listed if c is not None and c == c]
    odd = next((c for c in present if type(c) not in (bool, int, float, str)), None)
    fault = None
    if dtype.kind == "M":
        present = [date_text(c) for c in present]
    elif dtype.kind not in "biufOU":
        fault = f"has categories of the type {dtype}, which JSON cannot keep"
    elif odd is not None:
        fault = f"has categories of the type {type(odd).__name__}, which JSON cannot keep"
    elif dtype.kind == "f" and dtype.itemsize < 8:
        present = [float(str(c)) for c in categories if c == c]  # as one writes them; to be rounded when they are read
    values = tuple(present)
    marks = tuple(mark for mark in cell.filled or () if type(mark) in (bool, int, float, str) and mark == mark)
    return _Use(
        dtype=dtype,
        alone=cell.alone and cell.filled is None,
        values=values,
        none=any(c is None for c in listed),
        nan=any(c is not None and c != c for c in listed),
        levels=(*values, *marks) if closed else None,
        fault=fault,
    )


_EXAMPLES = {ValueType.TEXT: "", ValueType.BOOLEAN: False, ValueType.DATE: "2024-01-31"}


def _feature(name: str, uses: Sequence[_Use], shown: bool) -> Feature:
    """Put together what the steps know. ValueError says what is wrong with the column."""
    import numpy as np

    if not uses:
        return Feature(serving.Column(name, type=ValueType.ANY), used=False)
    fault = next((use.fault for use in uses if use.fault), None)
    if fault:
        raise ValueError(fault)
    none, nan = any(use.none for use in uses), any(use.nan for use in uses)
    if none and nan:
        raise ValueError("was fitted with both None and NaN for missing values, and JSON has one null")
    dtype, alone = _dtype(uses)
    kind = _type(uses, dtype, shown)
    if dtype is None and kind is ValueType.TEXT:
        dtype = np.dtype(object)
    doubles = dtype is None or dtype.kind == "f"
    column = serving.Column(
        name,
        type=kind,
        dtype="float64" if dtype is None else str(dtype),
        # scikit-learn rounds most numbers itself, but functions may tell them apart, and one identifier is not another
        exact=doubles and (any(use.opaque for use in uses) or (alone and dtype is not None)),
    )
    values = [value for use in uses for value in use.values if _reads(column, value)]
    closed = [use.levels for use in uses if use.levels is not None]
    levels = tuple(v for v in closed[0] if all(v in each for each in closed)) if closed else ()
    if not all(_reads(column, level) for level in levels):
        levels = ()  # a step before has changed their type, and the step itself will refuse what it does not know
    column = replace(
        column,
        categories=levels or None,
        nullable=not levels or none or nan or any(use.filled for use in uses),
        example=values[0] if values else _EXAMPLES.get(kind, 0.0),
    )
    return Feature(column, dtype, none)


def _reads(column: serving.Column, value: Any) -> bool:
    try:
        column.read(value)
    except UnfitError:
        return False
    return True


def _dtype(uses: Sequence[_Use]) -> tuple[np.dtype[Any] | None, bool]:
    """The type that a column had at fitting, and whether it is its own or that of an array that it was part of."""
    import numpy as np

    for alone in (True, False):
        known = {use.dtype for use in uses if use.dtype is not None and use.alone == alone}
        if known:
            return (known.pop() if len(known) == 1 else np.dtype(object)), alone
    return None, False


def _type(uses: Sequence[_Use], dtype: np.dtype[Any] | None, shown: bool) -> ValueType:
    if any(use.text for use in uses):
        return ValueType.TEXT
    if dtype is not None and dtype.kind in "bM":
        return ValueType.BOOLEAN if dtype.kind == "b" else ValueType.DATE
    if dtype is not None and dtype.kind in "iuf":
        return ValueType.NUMBER
    values = [value for use in uses for value in use.values] or [value for use in uses for value in use.likely]
    kinds = {type(value) for value in values}
    if kinds and kinds <= {str}:
        return ValueType.TEXT
    if kinds and kinds <= {bool}:
        return ValueType.BOOLEAN
    if kinds and kinds <= {bool, int, float}:
        return ValueType.NUMBER
    if shown:
        return ValueType.TEXT
    return ValueType.NUMBER if dtype is None else ValueType.ANY
