"""The embedded router: `/inference/…` to the serving processes of the local platform.

A plain ASGI application. Bodies stream both ways, connections to the processes are kept alive, and a request that
could not be handed over at all is given to another process; one that was handed over is never sent twice.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import quote

import aiohttp
import structlog
from yarl import URL

from build_service import metrics
from build_service.problems import problem_response
from build_service.routes import RouteTable, Upstream
from registry.errors import EkibenError, UserError
from registry.manifest import RESERVED, is_name

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = structlog.get_logger(__name__)

PREFIX = "/inference"
_HOP_BY_HOP = frozenset(
    (
        b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te",
        b"trailer", b"transfer-encoding", b"upgrade",
    )
)  # fmt: skip
# Set by this service itself on the way out.
_REPLACED = frozenset((b"date", b"server", b"x-request-id"))
_CHUNK = 256 * 1024
_SMALL_BODY = 1024 * 1024  # bodies up to here are read whole, so that they can be handed to another process
_PATIENCE_SECONDS = 2.0  # how long a request waits for a process while a deployment changes over


class Router:
    """`lookup(first segment or None)` gives the deployment's name, or None; `pending(name)` the 503 for it."""

    def __init__(
        self,
        routes: RouteTable,
        *,
        lookup: Callable[[str | None], str | None],
        pending: Callable[[str], EkibenError],
        body_limit: int,
        seconds: float,
    ) -> None:
        self._routes, self._lookup, self._pending = routes, lookup, pending
        self._body_limit, self._seconds = body_limit, seconds
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        # Shorter than the keep-alive of the serving processes, so that no connection is used as it is being closed.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        self._session = aiohttp.ClientSession(
            connector=connector,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
            trust_env=False,
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        deployment, status = "-", 500

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            deployment, path = self._resolve(scope["path"])
            await self._forward(deployment, path, scope, receive, counted)
        except EkibenError as error:
            await problem_response(error)(scope, receive, counted)
        finally:
            metrics.INFERENCES.labels(deployment, str(status)).inc()
            metrics.INFERENCE_SECONDS.labels(deployment).observe(time.perf_counter() - started)

    def _resolve(self, path: str) -> tuple[str, str]:
        """The deployment and the path to ask its processes for (always under its own prefix)."""
        rest = path[len(PREFIX) :].lstrip("/")
        first = rest.partition("/")[0]
        if is_name(first) and first not in RESERVED:
            name = self._lookup(first)
            if name is None:
                raise UserError(
                    "deployment_not_found",
                    f"There is no deployment {first!r}.",
                    hint="GET /deployments lists them. Own routes of the default deployment: /inference/NAME/…",
                    status=404,
                )
            return name, path
        name = self._lookup(None)
        if name is None:
            raise UserError(
                "no_default_deployment",
                "Nothing is deployed yet.",
                hint="POST a model file to /models, or: ekiben push FILE",
                status=404,
            )
        return name, f"{PREFIX}/{name}/{rest}"

    async def _forward(self, deployment: str, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {key.lower(): value for key, value in scope["headers"]}
        length = int(headers[b"content-length"]) if headers.get(b"content-length", b"").isdigit() else None
        if length is not None and length > self._body_limit:
            raise _too_large(self._body_limit)
        body: bytes | None = None
        if length is not None and length <= _SMALL_BODY:
            body = b"".join([chunk async for chunk in _body(receive, self._body_limit)])
        query = scope.get("query_string", b"").decode("latin-1")
        raw_path = path if path != scope["path"] else scope.get("raw_path", path.encode()).decode("latin-1")
        target = _quote(raw_path) + (f"?{query}" if query else "")
        passed = _request_headers(scope, length)

        used: Upstream | None = None
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            upstream = self._routes.take(deployment, avoid=used)
            if upstream is None:
                if used is not None:  # the only process there is; give it another try
                    used = None
                if time.monotonic() > give_up or not self._routes.known(deployment):
                    raise self._pending(deployment)
                await asyncio.sleep(0.02)
                continue
            try:
                stream = body if body is not None else _body(receive, self._body_limit)
                await self._exchange(upstream, target, scope["method"], passed, stream, receive, send)
                return
            except aiohttp.ClientConnectorError:  # never handed over: another process may take it
                used = upstream
                if body is None or time.monotonic() > give_up:
                    raise self._pending(deployment) from None
            finally:
                self._routes.release(upstream)

    async def _exchange(
        self,
        upstream: Upstream,
        target: str,
        method: str,
        headers: list[tuple[str, str]],
        body: bytes | AsyncIterator[bytes],
        receive: Receive,
        send: Send,
    ) -> None:
        assert self._session is not None, "start() comes first"
        started = False
        try:
            async with asyncio.timeout(self._seconds) as bound:
                async with self._session.request(
                    method,
                    _url(upstream, target),
                    headers=headers,
                    data=body if body != b"" else None,
                    allow_redirects=False,
                    skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                ) as response:
                    out = [
                        (key.lower(), value)
                        for key, value in response.raw_headers
                        if key.lower() not in _HOP_BY_HOP and key.lower() not in _REPLACED
                    ]
                    await send({"type": "http.response.start", "status": response.status, "headers": out})
                    started = True
                    bound.reschedule(None)  # a stream may go on for as long as it likes
                    async for chunk in response.content.iter_chunked(_CHUNK):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
        except aiohttp.ClientConnectorError:
            raise
        except TimeoutError:
            raise EkibenError(
                "inference_timeout",
                f"The model did not answer within {self._seconds:.0f} s.",
                hint="Send fewer rows, or raise EKIBEN_INFERENCE_SECONDS.",
                status=504,
            ) from None
        except aiohttp.ClientError as error:
            if started:
                raise  # the answer is cut; closing the connection tells the client
            raise EkibenError(
                "upstream_lost",
                "The model's process ended while it worked on this request.",
                hint="Look at `ekiben logs`; the request can be sent again.",
                status=502,
            ) from error


def _url(upstream: Upstream, target: str) -> URL:
    return URL(f"http://{upstream.host}:{upstream.port}{target}", encoded=True)


def _quote(path: str) -> str:
    return quote(path, safe="/%:@!$&'()*+,;=-._~")


def _request_headers(scope: Scope, length: int | None) -> list[tuple[str, str]]:
    headers = [
        (key.decode("latin-1"), value.decode("latin-1"))
        for key, value in scope["headers"]
        if key.lower() not in _HOP_BY_HOP and key.lower() != b"x-request-id"
    ]
    headers.append(("X-Request-ID", structlog.contextvars.get_contextvars().get("request_id", "")))
    client = scope.get("client")
    if client:
        headers.append(("X-Forwarded-For", client[0]))
    return headers


async def _body(receive: Receive, limit: int) -> AsyncIterator[bytes]:
    seen = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client went away")
        chunk = message.get("body", b"")
        seen += len(chunk)
        if seen > limit:
            raise _too_large(limit)
        if chunk:
            yield chunk
        if not message.get("more_body", False):
            return


def _too_large(limit: int) -> UserError:
    return UserError(
        "body_too_large",
        f"The request's body is larger than {limit} bytes.",
        hint="Send fewer rows, or raise EKIBEN_INFERENCE_BODY.",
        status=413,
    )
