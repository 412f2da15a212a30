"""Who may come in: browser safety and tokens, before anything else sees a request.

A web page can post a form to localhost and a DNS name can be rebound to it, so even on loopback the Host must be one of
ours and writes with a foreign Origin are refused. On loopback reading, uploads of data and inference need no token;
everything else does, and elsewhere every request does.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import shlex
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import OperationalError

from build_service.authority import Authority, check_framing, check_target, host_of, same_origin
from build_service.http_protocol import TARGET
from build_service.problems import of_database, problem_response
from build_service.remembered import Remembered
from registry.errors import EkibenError, UserError

ASGI = Callable[[MutableMapping[str, Any], Any, Any], Awaitable[None]]

log = structlog.get_logger(__name__)

AUTHORIZED = "ekiben.authorized"
"""Key of the scope: whether the request carries a valid token."""

_LOOPBACK_HOSTS = frozenset(("localhost", "127.0.0.1", "[::1]"))
_SAFE_METHODS = frozenset(("GET", "HEAD", "OPTIONS"))
_OTHER_SITES = frozenset((b"cross-site", b"same-site"))
_OPEN_PATHS = frozenset(("/livez", "/readyz"))  # probes carry no token
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LONGEST_HEADERS = 32 * 1024
_LONGEST_PATH = 8 * 1024


@dataclass(frozen=True)
class Policy:
    """`hosts`: names besides loopback's that may stand in Host. `cors`: origins that may call /inference."""

    hosts: frozenset[str]
    cors: frozenset[str]
    tokens: Remembered[frozenset[str]]  # SHA-256 of valid tokens
    inference_open: bool = False  # /inference needs none in any case
    token_file: Path | None = None  # on loopback: where its user finds a token; reading, data and inference need none


class Guard:
    def __init__(self, app: ASGI, policy: Policy) -> None:
        self._app, self._policy = app, policy

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # no websockets yet
            await send({"type": "websocket.close", "code": 1003})
            return
        # A copy: what is checked here is what everybody behind sees.
        scope["headers"] = [(key.lower(), value) for key, value in scope["headers"]]
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        inference = scope["path"] == "/inference" or scope["path"].startswith("/inference/")
        origin = headers.get(b"origin", b"").decode("latin-1")
        cors = self._cors_headers(origin) if inference else []
        status, started = 0, time.perf_counter()

        async def answer(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {
                    **message,
                    "headers": [*message["headers"], (b"x-request-id", request_id.encode()), *cors],
                }
            await send(message)

        try:
            await self._check(scope, headers, origin, inference)
        except EkibenError as error:
            await problem_response(error)(scope, receive, answer)
        except OperationalError as error:  # it knows the tokens
            await problem_response(of_database(error))(scope, receive, answer)
        else:
            if cors and scope["method"] == "OPTIONS":
                await answer({"type": "http.response.start", "status": 204, "headers": []})
                await answer({"type": "http.response.body", "body": b""})
            else:
                await self._app(scope, receive, answer)
        if not inference or status >= 500:
            log.info(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                seconds=round(time.perf_counter() - started, 4),
            )

    async def _check(
        self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes], origin: str, inference: bool
    ) -> None:
        if sum(len(key) + len(value) for key, value in scope["headers"]) > _LONGEST_HEADERS:
            raise UserError("headers_too_large", "The request's headers are too large.", status=431)
        if len(scope.get("raw_path") or b"") + len(scope.get("query_string") or b"") > _LONGEST_PATH:
            raise UserError("path_too_long", "The request's path is too long.", status=414)
        check_framing(scope["headers"], scope.get("http_version", "1.1"))
        host = host_of(scope["headers"])
        check_target(scope.get(TARGET, b"/"), host)
        self._check_host(host, scope["path"])
        # Browsers name the page's origin; where they do not, they say at least that it is another one.
        foreign = not same_origin(origin, host) if origin else headers.get(b"sec-fetch-site") in _OTHER_SITES
        allowed = inference and origin in self._policy.cors
        if foreign and not allowed and scope["method"] not in _SAFE_METHODS:
            raise UserError(
                "foreign_origin",
                f"A page of {(origin or 'another site')[:100]!r} may not write to this service.",
                hint="Inference from web pages: name the origin in EKIBEN_CORS_ORIGINS.",
                status=403,
            )
        # A browser asks beforehand, and without a token, whether a page may call at all.
        preflight = allowed and scope["method"] == "OPTIONS"
        opened = preflight or scope["path"] in _OPEN_PATHS or (inference and self._policy.inference_open)
        if opened or (inference and self._policy.token_file is not None):
            return
        scope[AUTHORIZED] = await self._authorized(headers.get(b"authorization"))
        if scope[AUTHORIZED]:
            return
        if self._policy.token_file is None:
            raise UserError(
                "unauthorized",
                "This service needs a valid token.",
                hint="Send Authorization: Bearer TOKEN, or: ekiben login URL",
                status=401,
            )
        if not _is_of_data(scope["method"], scope["path"]):
            what = f"{scope['method'][:20]} {scope['path'][:100]} changes or deletes what others rely on"
            raise needs_token(what, self._policy.token_file)

    def _check_host(self, host: Authority | None, path: str) -> None:
        # Probes come to the address of a pod, or name none; they read nothing.
        if path in _OPEN_PATHS or (host is not None and host.name in self._policy.hosts | _LOOPBACK_HOSTS):
            return
        if host is None:
            raise UserError(
                "bad_host", "The request names no Host.", field="Host",
                hint="Send one Host, such as localhost:8000.", status=400,
            )  # fmt: skip
        raise UserError(
            "foreign_host",
            f"The Host {host.name[:100]!r} is not one of this service.",
            hint="Call it by localhost, or name the host in EKIBEN_ALLOWED_HOSTS.",
            status=421,
        )

    async def _authorized(self, authorization: bytes | None) -> bool:
        scheme, _, token = (authorization or b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(token.strip().encode()).hexdigest()
        # Every digest is compared, so that the time says nothing about them.
        return any([hmac.compare_digest(digest, valid) for valid in await self._policy.tokens.get()])  # noqa: C419

    def _cors_headers(self, origin: str) -> list[tuple[bytes, bytes]]:
        if not origin or origin not in self._policy.cors:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
            (b"access-control-allow-headers", b"content-type, authorization"),
            (b"access-control-expose-headers", b"ekiben-model, ekiben-version, x-request-id"),
            (b"vary", b"Origin"),
        ]


def needs_token(what: str, file: Path) -> UserError:
    """Return the error of a request without the token of this machine; `what` says why it needs one."""
    return UserError(
        "unauthorized",
        f"{what}, so it needs this service's token, on this machine too.",
        hint="`ekiben` reads the token by itself, as the user who started the service. With curl: "
        f'-H "Authorization: Bearer $(cat {shlex.quote(str(file))})"',
        status=401,
    )


def _is_of_data(method: str, path: str) -> bool:
    """Whether a request reads, or sends data of a model. What an upload to /models holds is looked at there."""
    sends = path == "/models" and method == "POST"
    return method in _SAFE_METHODS or sends or path == "/uploads" or path.startswith("/uploads/")
