"""Bodies of requests that are small by their nature: read whole, within a bound on bytes and time, before anything
parses them. Uploads and parts of them are streamed, and have bounds of their own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from build_service.problems import problem_response
from registry.errors import UserError

LARGEST_BODY = 256 * 1024  # bytes; the largest are a version's labels
_STREAMED = re.compile(r"POST /models/?|PUT /uploads/[^/]+/parts/[^/]+/?")

Scope = MutableMapping[str, Any]
ASGI = Callable[[Scope, Any, Any], Awaitable[None]]


class SmallBodies:
    """An application whose requests' bodies have arrived when it sees them, but for those that are streamed."""

    def __init__(self, app: ASGI, seconds: float) -> None:
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or _STREAMED.fullmatch(f"{scope['method']} {scope['path']}") or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                messages = await _read(receive)
        except UserError as error:
            await problem_response(error)(scope, receive, send)
            return
        except TimeoutError:
            late = UserError(
                "body_timeout", f"The request's body did not arrive within {self._seconds:g} s.", status=408,
                hint="Send it again.",
            )  # fmt: skip
            await problem_response(late)(scope, receive, send)
            return

        async def again() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def _has_body(scope: Scope) -> bool:
    headers = {key.lower(): value for key, value in scope["headers"]}
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


async def _read(receive: Any) -> list[Any]:
    """The whole body as one message, or what came in its place."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return [message]
        body += message.get("body", b"")
        if len(body) > LARGEST_BODY:
            raise UserError(
                "body_too_large", f"The request's body is larger than {LARGEST_BODY} bytes.", status=413,
                hint="Models are sent to POST /models.",
            )  # fmt: skip
        if not message.get("more_body", False):
            return [{"type": "http.request", "body": bytes(body), "more_body": False}]
