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
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from yarl import URL

from build_service import metrics
from build_service.headers import Rules, to_caller
from build_service.problems import of_database, problem_response
from build_service.remembered import Remembered
from build_service.routes import RouteTable, Upstream
from registry.errors import EkibenError, UserError
from registry.manifest import RESERVED, is_name

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

log = structlog.get_logger(__name__)

PREFIX = "/inference"
_CHUNK = 256 * 1024
_SMALL_BODY = 1024 * 1024  # bodies up to here are read whole, so that they can be handed to another process
_PATIENCE_SECONDS = 2.0  # how long a request waits for a process while a deployment changes over


class Router:
    """`default` is the name of the default deployment, `exists(name)` tells whether there is one of the name, and
    `pending(name)` gives the 503 for one without a process. The latter two may ask the database and run in threads.
    """

    def __init__(
        self,
        routes: RouteTable,
        *,
        default: Remembered[str | None],
        exists: Callable[[str], bool],
        pending: Callable[[str], EkibenError],
        body_limit: int,
        seconds: float,
        rules: Rules,
    ) -> None:
        self._routes, self._default, self._exists, self._pending = routes, default, exists, pending
        self._body_limit, self._seconds = body_limit, seconds
        self._rules = rules
        self._sessions: dict[Upstream | None, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        while self._sessions:
            _, session = self._sessions.popitem()
            await session.close()

    async def _session(self, upstream: Upstream) -> aiohttp.ClientSession:
        """The connections to a process: a session for each Unix socket, and one for all that is called by TCP."""
        key = None if upstream.socket is None else upstream
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = _new_session(upstream.socket)
            # A new process is often the end of an old one, whose connections are of no use any more.
            gone = [each for each in self._sessions if each is not None and not self._routes.uses(each)]
            for session_of_gone in [self._sessions.pop(each) for each in gone]:
                await session_of_gone.close()
        return session

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        deployment, status = "-", 500

        async def counted(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            deployment, path = await self._resolve(scope["path"])
            await self._forward(deployment, path, scope, receive, counted)
        except EkibenError as error:
            await problem_response(error)(scope, receive, counted)
        except OperationalError as error:  # asked only before anything is answered: which is the default, is there one
            await problem_response(of_database(error))(scope, receive, counted)
        except _ClientGone:
            status = 499  # nobody is there to be answered
        finally:
            metrics.INFERENCES.labels(deployment, str(status)).inc()
            metrics.INFERENCE_SECONDS.labels(deployment).observe(time.perf_counter() - started)

    async def _resolve(self, path: str) -> tuple[str, str]:
        """The deployment and the path to ask its processes for (always under its own prefix)."""
        rest = path[len(PREFIX) :].lstrip("/")
        first = rest.partition("/")[0]
        if is_name(first) and first not in RESERVED:
            if not self._routes.known(first) and not await run_in_threadpool(self._exists, first):
                raise UserError(
                    "deployment_not_found",
                    f"There is no deployment {first!r}.",
                    hint="GET /deployments lists them. Own routes of the default deployment: /inference/NAME/…",
                    status=404,
                )
            return first, path
        name = await self._default.get()
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
        declared = headers.get(b"content-length", b"")
        # With a transfer coding the length means nothing (RFC 9112, 6.3).
        length = int(declared) if declared.isdigit() and b"transfer-encoding" not in headers else None
        if length is not None and length > self._body_limit:
            raise _too_large(self._body_limit)
        inbound = _Inbound(receive, self._body_limit)
        body: bytes | None = None
        if (length is not None and length <= _SMALL_BODY) or (length is None and b"transfer-encoding" not in headers):
            try:
                async with asyncio.timeout(self._seconds):
                    body = b"".join([chunk async for chunk in inbound.chunks()])
            except TimeoutError:
                raise _body_timeout(self._seconds) from None
        query = scope.get("query_string", b"").decode("latin-1")
        raw_path = path if path != scope["path"] else scope.get("raw_path", path.encode()).decode("latin-1")
        target = _quote(raw_path) + (f"?{query}" if query else "")

        def passed(upstream: Upstream) -> list[tuple[str, str]]:
            return self._rules.to_model(
                scope["headers"],
                peer=client[0] if (client := scope.get("client")) else None,
                request_id=structlog.contextvars.get_contextvars().get("request_id", ""),
                has_length=length is not None,
                upstream_checks=upstream.socket is None,
            )

        used: Upstream | None = None
        give_up = time.monotonic() + _PATIENCE_SECONDS
        while True:
            upstream = self._routes.take(deployment, avoid=used)
            if upstream is None:
                if used is not None:  # the only process there is; give it another try
                    used = None
                if time.monotonic() > give_up or not self._routes.known(deployment):
                    raise await run_in_threadpool(self._pending, deployment)
                await asyncio.sleep(0.02)
                continue
            try:
                stream = body if body is not None else inbound.chunks()
                await self._exchange(upstream, target, scope["method"], passed(upstream), stream, inbound, send)
                return
            except aiohttp.ClientConnectorError:  # never handed over: another process may take it
                used = upstream
                if body is None or time.monotonic() > give_up:
                    raise await run_in_threadpool(self._pending, deployment) from None
            finally:
                self._routes.release(upstream)

    async def _exchange(
        self,
        upstream: Upstream,
        target: str,
        method: str,
        headers: list[tuple[str, str]],
        body: bytes | AsyncIterator[bytes],
        inbound: _Inbound,
        send: Send,
    ) -> None:
        session = await self._session(upstream)
        started = False
        watch: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(self._seconds) as bound:
                async with session.request(
                    method,
                    URL(f"http://{upstream.authority}{target}", encoded=True),
                    headers=headers,
                    data=body if body != b"" else None,
                    allow_redirects=False,
                    skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                ) as response:
                    out = to_caller(response.raw_headers)
                    await send({"type": "http.response.start", "status": response.status, "headers": out})
                    started = True
                    bound.reschedule(None)  # a stream may go on for as long as it likes
                    async for chunk in response.content.iter_chunked(_CHUNK):
                        await send({"type": "http.response.body", "body": chunk, "more_body": True})
                        if watch is None and inbound.ended and not response.content.at_eof():
                            # It goes on: a client that leaves must not keep the model streaming to nobody.
                            watch = asyncio.create_task(_end_when_gone(inbound, response))
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
            if inbound.error is not None and not started:
                raise inbound.error from None  # what cut the request is known better
            if inbound.gone or inbound.error is not None:
                raise _ClientGone from None
            if started:
                raise  # the answer is cut; closing the connection tells the client
            raise EkibenError(
                "upstream_lost",
                "The model's process ended while it worked on this request.",
                hint="Look at `ekiben logs`; the request can be sent again.",
                status=502,
            ) from error
        finally:
            if watch is not None:
                watch.cancel()


class _ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class _Inbound:
    """The request's body, and what became of the client. An error that cuts the body is kept in `error`, as it is
    raised inside the client library, which makes another one of it."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._limit = receive, limit
        self.ended = False
        self.gone = False
        self.error: Exception | None = None

    async def chunks(self) -> AsyncIterator[bytes]:
        seen = 0
        while not self.ended:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.gone, self.error = True, _ClientGone()
                raise self.error
            chunk = message.get("body", b"")
            seen += len(chunk)
            if seen > self._limit:
                self.error = _too_large(self._limit)
                raise self.error
            self.ended = not message.get("more_body", False)
            if chunk:
                yield chunk

    async def left(self) -> None:
        """Returns when the client has closed its connection; for when the body has ended."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone = True


async def _end_when_gone(inbound: _Inbound, response: aiohttp.ClientResponse) -> None:
    await inbound.left()
    response.close()


def _new_session(socket: str | None) -> aiohttp.ClientSession:
    # Shorter than the keep-alive of the serving processes, so that no connection is used as it is being closed.
    pool: dict[str, Any] = {"limit": 0, "keepalive_timeout": 15}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(**pool) if socket is None else aiohttp.UnixConnector(socket, **pool),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        trust_env=False,
    )


def _quote(path: str) -> str:
    return quote(path, safe="/%:@!$&'()*+,;=-._~")


def _body_timeout(seconds: float) -> UserError:
    return UserError(
        "body_timeout",
        f"The request's body did not arrive within {seconds:g} s.",
        hint="Send it again, or raise EKIBEN_INFERENCE_SECONDS.",
        status=408,
    )


def _too_large(limit: int) -> UserError:
    return UserError(
        "body_too_large",
        f"The request's body is larger than {limit} bytes.",
        hint="Send fewer rows, or raise EKIBEN_INFERENCE_BODY.",
        status=413,
    )
