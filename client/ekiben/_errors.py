"""What can go wrong, as exceptions that a notebook can catch and a terminal can print.

EkibenError              carries `code`, `message`, `hint`, `field` and, where a server answered, `status`
├── UsageError           the arguments cannot be used; nothing was sent
│   └── ExportError      a model or a sample cannot be written in a form that can be served
├── StartError           `ekiben up` could not start the server
├── Unreachable          no server answers at the address
├── ApiError             the server refused or failed
│   ├── Unauthorized     401, 403: the token is missing, wrong, or may not do this
│   ├── NotFound         404
│   ├── Conflict         409, 412
│   ├── Invalid          any other 4xx
│   └── ServerFault      5xx
├── VersionFailed        the version was taken, but its build or its roll-out failed; `version` holds it
├── RolloutFailed        a deployment did not take its new revision; `deployment` holds it
└── StillWorking         the time to wait is over; the work goes on, and `known` holds what is known
"""

from __future__ import annotations

from typing import Any

_LONGEST_BODY = 500


class EkibenError(Exception):
    """What happened, to which thing, and what to do next."""

    code = "error"
    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        hint: str | None = None,
        field: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.hint = hint
        self.field = field
        self.status = status

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" + (f" ({self.hint})" if self.hint else "")

    def problem(self) -> dict[str, Any]:
        """The error as JSON: code, detail, and field, hint, status where they are known."""
        known = {"code": self.code, "detail": self.message, "field": self.field, "hint": self.hint}
        return {name: value for name, value in {**known, "status": self.status}.items() if value is not None}


class UsageError(EkibenError):
    code = "usage"
    exit_code = 2


class ExportError(UsageError):
    code = "cannot_export"
    exit_code = 1


class StartError(EkibenError):
    code = "cannot_start"


class Unreachable(EkibenError):
    code = "unreachable"


class ApiError(EkibenError):
    code = "refused"


class Unauthorized(ApiError):
    code = "unauthorized"


class NotFound(ApiError):
    code = "not_found"


class Conflict(ApiError):
    code = "conflict"


class Invalid(ApiError):
    code = "invalid"


class ServerFault(ApiError):
    code = "server_fault"


class VersionFailed(EkibenError):
    """A version whose state is failed or rolled_back; `reason` of the server is the message."""

    code = "version_failed"

    def __init__(self, message: str, *, version: dict[str, Any], code: str | None = None, hint: str | None = None):
        super().__init__(message, code=code, hint=hint)
        self.version = version


class RolloutFailed(EkibenError):
    """A deployment whose state is failed or rolled_back; what was live before still serves."""

    code = "rollout_failed"

    def __init__(self, message: str, *, deployment: dict[str, Any], code: str | None = None, hint: str | None = None):
        super().__init__(message, code=code, hint=hint)
        self.deployment = deployment


class StillWorking(EkibenError):
    """Not done within the time to wait; nothing was cancelled. `known` is the version, deployment or build so far."""

    code = "still_working"

    def __init__(self, message: str, *, known: dict[str, Any], hint: str | None = None):
        super().__init__(message, hint=hint)
        self.known = known


def from_answer(status: int, body: bytes, what: str) -> ApiError:
    """The exception for an HTTP answer: of its problem document, else of the status and a little of the body."""
    import json

    kind = _kind(status)
    try:
        problem: Any = json.loads(body)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        text = " ".join(body[:_LONGEST_BODY].decode("utf-8", "replace").split())
        message = f"{what} was answered with status {status}" + (f": {text}" if text else "")
        advice = "the answer is not from Ekiben; is the address right, or does a proxy stand between?"
        return kind(message, status=status, hint=advice)
    detail = problem.get("detail") or problem.get("title") or problem.get("error") or f"status {status}"
    hint, field, code = problem.get("hint"), problem.get("field"), problem.get("code")
    if hint is None and status == 401:
        hint = "give a token: ekiben login URL --token TOKEN, or EKIBEN_TOKEN"
    return kind(
        detail if isinstance(detail, str) else json.dumps(detail)[:_LONGEST_BODY],
        code=code if isinstance(code, str) else None,
        hint=hint if isinstance(hint, str) else None,
        field=field if isinstance(field, str) else None,
        status=status,
    )


def _kind(status: int) -> type[ApiError]:
    if status in (401, 403):
        return Unauthorized
    if status == 404:
        return NotFound
    if status in (409, 412):
        return Conflict
    return ServerFault if status >= 500 else Invalid
