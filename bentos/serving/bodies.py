"""How a task kind answers: the whole request body in, one JSON document out."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from bentos.serving.problems import Problem


class Body(BaseModel):
    """Any JSON object. A service takes `body: Body, /` and reads `body.model_extra`, so that it can name what is wrong.

    A plain `dict` would do, if BentoML did not answer 500 to a body that is no JSON when the type is not a model.
    """

    model_config = ConfigDict(extra="allow")


async def reply(predict: Callable[[Any], Mapping[str, Any]], body: Any, *, inline: bool) -> Any:
    """A Starlette response with the JSON of `predict(body)`, or the problem that it raised.

    `inline` says that the work is shorter than the hand-over to a thread; otherwise other requests do not wait for it.
    """

    async def answer() -> Mapping[str, Any]:
        if inline:
            return predict(body)
        from anyio.to_thread import run_sync

        return await run_sync(predict, body)

    return await respond(answer())


async def respond(answer: Awaitable[Mapping[str, Any]]) -> Any:
    """A Starlette response with the JSON of an answer that is waited for, or the problem that it raised."""
    from starlette.responses import Response

    try:
        # lone surrogates can come in through JSON escapes; ASCII output sends them back as they came
        document = json.dumps(await answer, allow_nan=False, separators=(",", ":"))
        return Response(document.encode(), media_type="application/json")
    except Problem as problem:
        return problem.response()


def check_names(fields: Collection[str], known: Collection[str]) -> None:
    """Raises Problem `unknown_field` for a field that is not known: a slip of the pen is not ignored in silence."""
    for name in fields:
        if name not in known:
            hint = "known are " + ", ".join(known)
            raise Problem("unknown_field", f"{name} is no field of a request", field=name[:100], hint=hint)


def whole_number(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    """A field that is a whole number, or its digits where it comes by a form or a query. Raises Problem."""
    value = fields.get(name, default)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 19:
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        detail = f"{name} is not a whole number from {low} to {high}"
        raise Problem("invalid_field", detail, field=name, hint=f"send {name} as a number such as {default}")
    return value
