"""HTTP/1.1 as uvicorn parses it, with what it does not say of a request and a problem document for what it refuses.

uvicorn's protocol classes are an interface of its own, so what is used of them here is tested over raw sockets
(`tests/build_service/test_raw_requests.py`).
"""

from __future__ import annotations

import json
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from registry.errors import UserError

TARGET = "ekiben.target"
"""Key of the scope: the request's target as it was sent. uvicorn itself ignores the authority of `GET http://HOST/`."""


class Protocol(HttpToolsProtocol):
    _in_body = False

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        # uvicorn would append the trailers of a body in chunks to the headers, which nothing has checked by then.
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_body = True
        cast(dict[str, Any], self.scope)[TARGET] = self.url
        super().on_headers_complete()

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
