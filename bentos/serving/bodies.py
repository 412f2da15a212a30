"""How a task kind answers: the whole request body in, one JSON document out."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
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
    from starlette.responses import Response

    try:
        if inline:
            answer = predict(body)
        else:
            from anyio.to_thread import run_sync

            answer = await run_sync(predict, body)
        # lone surrogates can come in through JSON escapes; ASCII output sends them back as they came
        document = json.dumps(answer, allow_nan=False, separators=(",", ":"))
        return Response(document.encode(), media_type="application/json")
    except Problem as problem:
        return problem.response()
