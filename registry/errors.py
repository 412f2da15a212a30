"""The one error shape of the server side.

EkibenError                 has a stable `code`, a `detail`, the offending `field` and a `hint`
├── UserError               the request or the model is at fault: 4xx, never retried
└── InfrastructureError     a disk, a network or another service is at fault: 5xx, retried with backoff
"""

from __future__ import annotations

from typing import Any

_LONGEST_DETAIL = 2000


class EkibenError(Exception):
    """An error that a user reads: what happened, to which thing, and what to do next."""

    status = 500

    def __init__(
        self, code: str, detail: str, *, field: str | None = None, hint: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail if len(detail) <= _LONGEST_DETAIL else detail[: _LONGEST_DETAIL - 1] + "…"
        self.field = field
        self.hint = hint
        if status is not None:
            self.status = status

    def problem(self) -> dict[str, Any]:
        """The RFC 9457 problem document; `field` and `hint` only where there is one."""
        body: dict[str, Any] = {
            "type": "about:blank",
            "title": self.code.replace("_", " "),
            "status": self.status,
            "code": self.code,
            "detail": self.detail,
        }
        if self.field is not None:
            body["field"] = self.field
        if self.hint is not None:
            body["hint"] = self.hint
        return body


class UserError(EkibenError):
    status = 422


class InfrastructureError(EkibenError):
    status = 503
