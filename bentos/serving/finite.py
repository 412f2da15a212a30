"""Finds the number that is NaN or infinite in what a service returned, before it is written as JSON.

BentoML (1.4.40) and pydantic write such a number as `null` in most places (floats in objects, arrays, data frames),
where it can no longer be told from an honest `null`. So the gate looks at the value itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_watching: ContextVar[list[str] | None] = ContextVar("ekiben_not_finite", default=None)


@contextmanager
def watch() -> Iterator[list[str]]:
    """Calls of BentoML services in this context note where their answers are not finite."""
    _observe()
    found: list[str] = []
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


def place(value: Any, path: str = "") -> str | None:
    """The path of the first number that is NaN or infinite, or None. Takes all that BentoML can send as JSON."""
    if value is None or isinstance(value, str | bytes | bool | int):
        return None
    if isinstance(value, float):  # and numpy.float64
        return None if math.isfinite(value) else path or "body"
    if isinstance(value, Mapping):
        return _first(value.items(), path)
    if isinstance(value, list | tuple | set | frozenset):
        return next((found for i, v in enumerate(value) if (found := place(v, f"{path}[{i}]"))), None)
    if hasattr(value, "model_dump") and hasattr(value, "__dict__"):
        fields = {**value.__dict__, **(getattr(value, "model_extra", None) or {})}
        return place(fields["root"], path) if list(fields) == ["root"] else _first(fields.items(), path)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _first(((f.name, getattr(value, f.name)) for f in dataclasses.fields(value)), path)
    if hasattr(value, "iterrows") and hasattr(value, "columns"):
        return _first(((str(name), value.iloc[:, i].to_numpy()) for i, name in enumerate(value.columns)), path)
    if hasattr(value, "is_finite") and hasattr(value, "as_tuple"):  # decimal.Decimal
        return None if value.is_finite() else path or "body"
    if hasattr(value, "__array__"):
        return _in_array(value, path)
    return None


def _first(pairs: Any, path: str) -> str | None:
    return next((found for k, v in pairs if (found := place(v, f"{path}.{k}" if path else str(k)))), None)


def _in_array(value: Any, path: str) -> str | None:
    """NumPy arrays and scalars, pandas series, tensors."""
    import numpy as np

    try:
        array = np.asarray(value)
    except Exception:  # a picture, a tensor on a device: it says itself why it is no array
        return None
    if array.dtype.kind == "O":
        values = array.tolist()
        # pandas has NaN for a missing text too
        return None if array.ndim == 0 or any(isinstance(v, str) for v in array.flat) else place(values, path)
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return None
    at = "".join(f"[{int(i)}]" for i in np.argwhere(~np.isfinite(array))[0])
    return f"{path}{at}" or "body"


def _observe() -> None:
    """Let BentoML tell what it is about to send. Done once; a call outside of `watch` pays one look-up."""
    from _bentoml_sdk.io_models import IOMixin

    plain = IOMixin.to_http_response.__func__
    if getattr(plain, "ekiben_observed", False):
        return

    async def to_http_response(cls: Any, obj: Any, serde: Any) -> Any:
        found = _watching.get()
        if found is not None and (where := place(obj)):
            found.append(where)
        return await plain(cls, obj, serde)

    to_http_response.ekiben_observed = True  # type: ignore[attr-defined]
    IOMixin.to_http_response = classmethod(to_http_response)
