"""What a library's `predict` returns, as one JSON value per row: arrays, a list per output, sparse, frames."""

from __future__ import annotations

from typing import Any

from bentos.serving.row_proof import Miscounted
from bentos.serving.values import date_text


def listed(values: Any, rows: int) -> list[Any]:
    """One value per row. Raises Miscounted where there is another number, or where it cannot be known which is whose.

    A list of matrices has one for each output of the model, as scikit-learn's MultiOutputClassifier gives them: the
    answer to a row is the list of its rows in each, whether or not there are as many outputs as rows.
    """
    import numpy as np

    if isinstance(values, list) and values and all(getattr(each, "ndim", 0) >= 2 for each in values):
        return [list(each) for each in zip(*(listed(each, rows) for each in values), strict=True)]
    if isinstance(values, list):
        if any(getattr(each, "ndim", 0) for each in values):
            raise Miscounted(-1, rows)
        return _counted([plain(each) for each in values], rows)
    if hasattr(values, "tocsr"):  # a sparse matrix or array of SciPy
        values = values.tocsr().toarray()
    elif hasattr(values, "iloc"):  # of pandas
        values = values.to_numpy()
    array = np.asarray(values)
    if not array.ndim:
        raise Miscounted(-1, rows)
    if array.dtype.kind == "M":
        array = _dated(array)
    found = array.tolist()
    return _counted([plain(each) for each in found] if array.dtype.kind == "O" else found, rows)


def plain(value: Any) -> Any:
    """Arrays and scalars of NumPy within lists as JSON values."""
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return value


def _dated(array: Any) -> Any:
    """Dates in ISO 8601."""
    import numpy as np

    texts = np.empty(array.size, object)
    texts[:] = [None if value != value else date_text(value) for value in array.flat]
    return texts.reshape(array.shape)


def _counted(values: list[Any], rows: int) -> list[Any]:
    if len(values) != rows:
        raise Miscounted(len(values), rows)
    return values
