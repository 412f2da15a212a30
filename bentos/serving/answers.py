"""How a generic kind answers: `{"inputs": [row, …]}` → `{"outputs": [value, …]}`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction
from typing import Any

from bentos.serving.problems import Problem

MAX_ROWS = 50_000
_INLINE_ROWS = 64
"""Up to here a prediction is shorter than the hand-over to a thread; above, other requests must not wait for it."""


Outputs = Callable[[list[Any]], list[Any] | Awaitable[list[Any]]]


async def answer(outputs: Outputs, inputs: list[Any]) -> Any:
    """A Starlette response with one output per input row, or a problem that names the row and column.

    `outputs` may be asynchronous, where a model collects the rows of several requests.
    """
    from starlette.responses import Response

    try:
        check_rows(inputs)
        values = await outputs(inputs) if iscoroutinefunction(outputs) else await aside(outputs, inputs)
        return Response(encode(values), media_type="application/json")
    except Problem as problem:
        return problem.response()


async def aside(outputs: Callable[[list[Any]], Any], inputs: list[Any]) -> Any:
    """`outputs(inputs)`, in a thread where that is long enough for others to notice."""
    if len(inputs) <= _INLINE_ROWS:
        return outputs(inputs)
    from anyio.to_thread import run_sync

    return await run_sync(outputs, inputs)


def check_rows(inputs: list[Any]) -> None:
    if not inputs:
        raise Problem("no_rows", "inputs is empty", field="inputs", hint="send at least one row")
    if len(inputs) > MAX_ROWS:
        detail = f"inputs has {len(inputs)} rows; at most {MAX_ROWS} are predicted at once"
        raise Problem("too_many_rows", detail, field="inputs", hint="send them in several requests")


def encode(values: list[Any]) -> bytes:
    """`{"outputs": …}` as JSON. Floats are written so that they read back as exactly the same number."""
    try:
        return json.dumps({"outputs": values}, allow_nan=False, separators=(",", ":")).encode()
    except ValueError as error:
        from bentos.serving import finite

        row = next((i for i, v in enumerate(values) if finite.place(v)), 0)
        raise Problem(
            "prediction_not_finite",
            f"the model gives no finite value for row {row}",
            field=f"inputs[{row}]",
            hint="look for numbers far outside of what the model was trained on",
        ) from error
