"""HTTP/1.1 as uvicorn parses it, with what it does not say of a request and a problem document for what it refuses.

uvicorn's protocol classes are an interface of its own, so what is used of them here is tested over raw sockets
(`tests/build_service/test_raw_requests.py`).
"""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from registry.errors import UserError

TARGET = "ekiben.target"
"""Key of the scope: the request's target as it was sent. uvicorn itself ignores the authority of `GET http://HOST/`."""


class Protocol(HttpToolsProtocol):
    head_seconds = 30.0
    """Time in which the head of a request has to come; uvicorn itself would wait for ever."""

    _in_body = False
    _head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_body = False
        if self._head_due is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        # uvicorn would append the trailers of a body in chunks to the headers, which nothing has checked by then.
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body = True
        self._head_came()
        cast(dict[str, Any], self.scope)[TARGET] = self.url
        super().on_headers_complete()

    def _await_head(self) -> None:
        self._head_due = self.loop.call_later(self.head_seconds, self._give_up)

    def _head_came(self) -> None:
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _give_up(self) -> None:
        # While an answer is under way, it is this side that does not read on.
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_head()
        else:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        error = UserError(
            "malformed_request",
            "The request is not well-formed HTTP/1.1.",
            hint="Send one Host, one Content-Length or Transfer-Encoding: chunked, and a target such as /models.",
            status=400,
        )
        body = json.dumps(error.problem()).encode()
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        )
        self.transport.write(head + body)
        self.transport.close()
