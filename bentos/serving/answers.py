"""How a generic kind answers: `{"inputs": [row, …]}` → `{"outputs": [value, …]}`."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from inspect import iscoroutinefunction
from typing import Any

from bentos.serving.problems import Problem
from bentos.serving.row_proof import Sharing

MAX_ROWS = 50_000
_INLINE_ROWS = 64
"""Up to here a prediction is shorter than the hand-over to a thread; above, other requests must not wait for it."""
_INLINE_CALLS = 4
"""The same of rows that take one call each."""


Outputs = Callable[[list[Any]], list[Any] | Awaitable[list[Any]]]


async def answer(outputs: Outputs, inputs: list[Any], sharing: Sharing = Sharing.REQUEST) -> Any:
    """A Starlette response with one output per input row, or a problem that names the row and column.

    `outputs` may be asynchronous, where a model collects the rows of several requests. `sharing`: how many calls of the
    model a request takes.
    """
    from starlette.responses import Response

    try:
        check_rows(inputs)
        inline = _INLINE_CALLS if sharing is Sharing.ROW else _INLINE_ROWS
        values = await outputs(inputs) if iscoroutinefunction(outputs) else await aside(outputs, inputs, inline)
        if len(values) != len(inputs):  # an answer must never be taken for that of another row
            detail = f"the model answered {len(values)} values for {len(inputs)} rows"
            hint = "serve a model that answers one value per row, or a project that sorts its answers by row"
            raise Problem("prediction_failed", detail, hint=hint, status=500)
        return Response(encode(values), media_type="application/json")
    except Problem as problem:
        return problem.response()


async def aside(outputs: Callable[[list[Any]], Any], inputs: list[Any], inline: int = _INLINE_ROWS) -> Any:
    """`outputs(inputs)`, in a thread where that is long enough for others to notice."""
    if len(inputs) <= inline:
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
