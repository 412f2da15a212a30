"""The thin ASGI layer around BentoML's application: what BentoML cannot learn at run time.

It strips the URL prefix, checks tokens and withholds them from the model, names the version in every answer, bounds
size and time, and turns errors into problem+json. It is plain ASGI: a request that is fine pays for one closure and a
timer.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import time

from bentos.serving.about import SCOPE_KEY, Served
from bentos.serving.problems import App, Message, Problem, Receive, Scope, Send, send_problem, translated
from bentos.serving.settings import Settings
from bentos.serving.tokens import TokensFile

_PROBES = frozenset({"/livez", "/readyz"})
_OPEN_INSIDE = frozenset({"/livez", "/readyz", "/healthz", "/metrics", "/metadata"})
_CREDENTIALS = frozenset({b"authorization", b"proxy-authorization", b"cookie"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TWO_HOSTS = Problem("malformed_request", "The request has two headers 'host'.", hint="Send one.", status=400)
_logger = logging.getLogger("ekiben.request")


class Wrapper:
    """The application that uvicorn runs."""

    def __init__(self, app: App, settings: Settings, served: Served) -> None:
        self.app = app
        self.settings = settings
        self.served = served
        self._headers = [
            (b"ekiben-model", served.name.encode("latin-1", "replace")),
            (b"ekiben-version", served.version.encode("latin-1", "replace")),
        ]
        self._prefixes = settings.prefixes
        self._withheld = _CREDENTIALS - settings.pass_headers
        self.leaving = False
        self._tokens = TokensFile(settings.tokens_file) if settings.tokens_file is not None else None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":  # no kind has one; refusing keeps the token check whole
                await send({"type": "websocket.close", "code": 1008})
            return
        started = time.monotonic()
        length: bytes | None = None
        authorization = b""
        request_id = b""
        forwarded_for = b""
        hosts = 0
        # A new list: uvicorn appends the trailers of a body in chunks to the one that it made.
        headers: list[tuple[bytes, bytes]] = []
        for key, value in scope["headers"]:
            if key == b"content-length":
                length = value
            elif key == b"authorization":
                authorization = value
            elif key == b"x-request-id" and _REQUEST_ID.fullmatch(value):
                request_id = value
            elif key == b"x-forwarded-for":
                forwarded_for = value
            elif key == b"host":
                hosts += 1
            # To frameworks that know no difference between _ and - it is the same name.
            if key.replace(b"_", b"-") not in self._withheld:
                headers.append((key, value))
        scope["headers"] = headers
        if scope.get("client") is None and forwarded_for:
            # A Unix socket has no address of a caller. Only the router can reach it, and says last who called.
            scope["client"] = (forwarded_for.rpartition(b",")[2].strip().decode("latin-1"), 0)
        if not request_id:
            request_id = os.urandom(8).hex().encode()
        exchange = _Exchange(send, [*self._headers, (b"x-request-id", request_id)])
        scope[SCOPE_KEY] = self.served
        inside = True
        path: str = scope["path"]
        for prefix in self._prefixes:
            rest = path[len(prefix) :]
            if path.startswith(prefix) and (not rest or rest[0] == "/"):
                inside = False
                path = rest or "/"
                scope["path"] = path
                scope["raw_path"] = path.encode("utf-8", "surrogateescape")
                break
        refusal = self._refusal(path, inside, length, authorization) if hosts < 2 else (_TWO_HOSTS, [])
        if refusal is not None:
            problem, headers = refusal
            await send_problem(exchange.send, problem, headers)
            self._log(scope, exchange, request_id, started)
            return
        limit = self.settings.max_body_bytes
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                if received > limit:
                    # whoever reads the body sees a caller that has gone away; the caller is told why
                    await exchange.finish(_too_large(limit))
                    return {"type": "http.disconnect"}
            return message

        seconds = self.settings.request_seconds
        timer = asyncio.get_running_loop().call_later(seconds, self._expire, exchange, seconds)
        try:
            await self.app(scope, bounded, translated(exchange.send, scope))
        except Exception:
            _logger.exception("%s %s failed, request %s", scope["method"], path, request_id.decode())
            hint = "the reason is in the log of the deployment"
            problem = Problem("prediction_failed", "the model could not answer this request", hint=hint, status=500)
            await exchange.finish(problem)
        finally:
            timer.cancel()
        self._log(scope, exchange, request_id, started)

    def _refusal(
        self, path: str, inside: bool, length: bytes | None, authorization: bytes
    ) -> tuple[Problem, list[tuple[bytes, bytes]]] | None:
        if self.leaving and path == "/readyz":
            return Problem("leaving", "this process is about to end", status=503), []
        if path == "/metrics" and not inside:
            return Problem("not_found", "there is nothing at /metrics", status=404), []
        if self._guarded(path, inside) and not self._authorized(authorization):
            hint = "send the header Authorization: Bearer TOKEN"
            problem = Problem("unauthorized", "this model needs a valid token", hint=hint, status=401)
            return problem, [(b"www-authenticate", b"Bearer")]
        if length is not None and (not length.isdigit() or int(length[:20]) > self.settings.max_body_bytes):
            return _too_large(self.settings.max_body_bytes), [(b"connection", b"close")]
        return None

    def _guarded(self, path: str, inside: bool) -> bool:
        """Probes, and metrics and metadata without a prefix, are for the platform, which holds no token."""
        if (not self.settings.token_digests and self._tokens is None) or path in _PROBES:
            return False
        return not (inside and path in _OPEN_INSIDE)

    def _authorized(self, authorization: bytes) -> bool:
        scheme, _, token = authorization.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        presented = hashlib.sha256(token.strip()).digest()
        # every digest is compared, so that the time tells nothing about which of them came near
        valid = (*self.settings.token_digests, *(self._tokens.digests() if self._tokens is not None else ()))
        return any([hmac.compare_digest(presented, known) for known in valid])  # noqa: C419

    def _expire(self, exchange: _Exchange, seconds: float) -> None:
        # the prediction may sit in a thread that cannot be stopped: answer now, and drop what it says later
        problem = Problem(
            "timeout", f"the model did not answer within {seconds:g} s", hint="send fewer rows", status=504
        )
        task = asyncio.get_running_loop().create_task(exchange.finish(problem))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _log(self, scope: Scope, exchange: _Exchange, request_id: bytes, started: float) -> None:
        if exchange.status >= 500 or _logger.isEnabledFor(logging.INFO):
            _logger.log(
                logging.ERROR if exchange.status >= 500 else logging.INFO,
                "%s %s %d",
                scope["method"],
                scope["path"],
                exchange.status,
                extra={
                    "request": request_id.decode(),
                    "version": self.served.version,
                    "model": self.served.name,
                    "seconds": round(time.monotonic() - started, 6),
                },
            )


class _Exchange:
    """One answer: adds our headers, and after `finish` ignores what the application still says."""

    __slots__ = ("_finished", "_headers", "_send", "status")

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self._headers = headers
        self._finished = False
        self.status = 0

    async def send(self, message: Message) -> None:
        if self._finished:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message.get("headers", ()), *self._headers]}
        await self._send(message)

    async def finish(self, problem: Problem) -> None:
        """Answer with a problem if nothing was answered yet; an answer under way is cut off where it is."""
        if self._finished:
            return
        if self.status == 0:
            await send_problem(self.send, problem, [(b"connection", b"close")])
        self._finished = True


def _too_large(limit: int) -> Problem:
    return Problem(
        "body_too_large",
        f"the body is larger than {limit} bytes",
        field="body",
        hint="send fewer rows at once",
        status=413,
    )
