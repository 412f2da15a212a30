"""Errors on the wire: one shape, RFC 9457 problem+json, for whatever goes wrong anywhere in the service."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from registry.errors import EkibenError

log = structlog.get_logger(__name__)


def problem_response(error: EkibenError, headers: dict[str, str] | None = None) -> Response:
    extra = dict(headers or {})
    if error.status in (429, 503):
        extra.setdefault("Retry-After", "5" if error.status == 429 else "1")
    if error.status == 401:
        extra.setdefault("WWW-Authenticate", 'Bearer realm="ekiben"')
    return JSONResponse(error.problem(), status_code=error.status, media_type="application/problem+json", headers=extra)


def of_database(error: OperationalError) -> EkibenError:
    """What is told of a database that is away or full."""
    full = "disk is full" in str(error.orig)
    return EkibenError(
        "disk_full" if full else "database_unavailable",
        "The disk of the database is full." if full else "The database does not answer at the moment.",
        hint="Free some space, then try again." if full else "Try again; the service's log has the details.",
        status=507 if full else 503,
    )


def install(app: FastAPI) -> None:
    """The handlers that turn every error into a problem."""

    @app.exception_handler(EkibenError)
    async def ekiben_error(request: Request, error: EkibenError) -> Response:
        return problem_response(error)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        # Nobody reads this; it says that nothing is wrong with the service.
        return problem_response(EkibenError("upload_cut", "The client went away.", hint="Send it again.", status=400))

    @app.exception_handler(OperationalError)
    async def database_error(request: Request, error: OperationalError) -> Response:
        log.error("the database failed", path=request.url.path, error=str(error.orig))
        return problem_response(of_database(error))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        source, *path = where
        field = ".".join(path) or source
        unknown = first["type"] == "extra_forbidden"
        return problem_response(
            EkibenError(
                "unknown_field" if unknown else "invalid_request",
                f"{field}: {'is not a field of this request' if unknown else first['msg']}.",
                field=field,
                hint="The request's fields are at /docs.",
                status=422,
            )
        )

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        phrase = HTTPStatus(error.status_code).phrase
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        detail = {
            404: f"There is nothing at {request.url.path}.",
            405: f"{request.method} is not possible at {request.url.path}.",
        }.get(error.status_code, str(error.detail or phrase))
        headers: dict[str, Any] = dict(error.headers or {})
        return problem_response(
            EkibenError(code, detail, hint="All endpoints are at /docs.", status=error.status_code), headers
        )

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.exception("unexpected error", path=request.url.path)
        return problem_response(
            EkibenError(
                "internal_error",
                "Something went wrong in the service; its log has the details.",
                hint="Look at the service's log, and report it with the request that caused it.",
                status=500,
            )
        )
