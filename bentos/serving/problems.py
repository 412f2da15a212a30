"""Errors as callers and platforms read them.

Problem      a request is at fault (or, rarely, the model's answer to it): RFC 9457 problem+json
StartError   the process cannot start serving: written to the termination log; the code decides the exit code
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MEDIA_TYPE = b"application/problem+json"
_LONGEST_DETAIL = 2000
_LONGEST_ERROR_BODY = 1 << 20
_DOCS = "the routes and their bodies are described at docs"

EXIT_CODES = {
    "golden_sample_failed": 10,
    "digest_mismatch": 11,
    "model_load_failed": 12,
    "service_import_failed": 13,
}


class StartError(Exception):
    """A start that cannot succeed. `code` is stable; `exit_code` is 10 to 13, or 1 for anything else."""

    def __init__(self, code: str, message: str, hint: str | None = None) -> None:
        # the first line is what people see of it under `bentoml serve`
        super().__init__(f"{message} ({hint})" if hint else message)
        self.code = code
        self.message = message[:_LONGEST_DETAIL]
        self.hint = hint

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.code, 1)

    def record(self) -> dict[str, str | None]:
        return {"code": self.code, "message": self.message, "hint": self.hint}


class Problem(Exception):
    """An answer that names what is wrong, in which field, and what to do next."""

    def __init__(
        self, code: str, detail: str, *, field: str | None = None, hint: str | None = None, status: int = 422
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail if len(detail) <= _LONGEST_DETAIL else detail[: _LONGEST_DETAIL - 1] + "…"
        self.field = field
        self.hint = hint
        self.status = status

    def document(self) -> dict[str, Any]:
        """The problem document; `field` and `hint` only where there is one."""
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

    def body(self) -> bytes:
        # lone surrogates can come in through JSON escapes; they must not turn an answer into a crash
        return json.dumps(self.document(), ensure_ascii=False).encode("utf-8", "backslashreplace")

    def response(self) -> Any:
        """As a Starlette response, which BentoML passes on as it is."""
        from starlette.responses import Response

        return Response(self.body(), status_code=self.status, media_type=MEDIA_TYPE.decode())


async def send_problem(send: Send, problem: Problem, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """Answer an ASGI request with a problem."""
    body = problem.body()
    own = [(b"content-type", MEDIA_TYPE), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": problem.status, "headers": own + (headers or [])})
    await send({"type": "http.response.body", "body": body})


class Problems:
    """ASGI layer: error answers of BentoML, Starlette or the user's code become problem+json, without stack traces.

    With `json_only` it refuses a POST whose body is not declared to be JSON: BentoML would otherwise take forms and
    pickle-like formats, and a web page could post to a server on localhost without asking. `uploads` lets forms with
    files and pictures in as well: a page can send one, but a prediction changes nothing, and it cannot read the answer.
    """

    def __init__(self, app: App, json_only: bool = False, uploads: bool = False) -> None:
        self.app = app
        self.json_only = json_only
        self.uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if self.json_only and scope["method"] == "POST":
            media_type = next((v for k, v in scope["headers"] if k == b"content-type"), b"application/json")
            essence = media_type.split(b";", 1)[0].strip().lower()
            if not (_is_json(essence) or (self.uploads and _is_upload(essence))):
                await send_problem(send, unsupported_media_type(essence.decode("latin-1"), self.uploads))
                return
        await self.app(scope, receive, translated(send, scope))


def translated(send: Send, scope: Scope) -> Send:
    """A `send` that holds an error answer back until it is whole, and sends it as a problem."""
    held: Message | None = None
    body = b""

    async def translating(message: Message) -> None:
        nonlocal held, body
        if message["type"] == "http.response.start":
            if message["status"] < 400 or _media_type(message) == MEDIA_TYPE:
                await send(message)
            else:
                held = message
            return
        if held is None or message["type"] != "http.response.body":
            await send(message)
            return
        if len(body) < _LONGEST_ERROR_BODY:
            body += message.get("body", b"")
        if not message.get("more_body", False):
            start, held = held, None
            problem = from_answer(start["status"], body, scope["method"], scope["path"])
            kept = [(k, v) for k, v in start["headers"] if k.lower() not in (b"content-type", b"content-length")]
            await send_problem(send, problem, kept)

    return translating


def from_answer(status: int, body: bytes, method: str, path: str) -> Problem:
    """The problem that stands for an error answer of BentoML or Starlette."""
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    if isinstance(parsed, list) and len(parsed) == 1:  # BentoML wraps some of its errors in a list
        parsed = parsed[0]
    if isinstance(parsed, dict) and isinstance(parsed.get("detail"), list) and status in (400, 422):
        return _from_validation(parsed["detail"], status)
    said = parsed.get("error") if isinstance(parsed, dict) else None
    if status == 404:
        return Problem("not_found", f"there is nothing at {path}", hint=_DOCS, status=404)
    if status == 405:
        return Problem("method_not_allowed", f"{path} does not take {method}", hint=_DOCS, status=405)
    if status == 413:
        return Problem("body_too_large", "the body is too large", status=413)
    if status == 415:
        return unsupported_media_type("the given media type")
    if status == 504:
        return Problem("timeout", "the model did not answer in time", hint="send fewer rows", status=504)
    if status >= 500:
        hint = "the reason is in the log of the deployment"
        return Problem("prediction_failed", "the model could not answer this request", hint=hint, status=status)
    return Problem("invalid_request", str(said) if said else f"refused with status {status}", status=status)


def unsupported_media_type(given: str, uploads: bool = False) -> Problem:
    hint = "send JSON with the header content-type: application/json"
    if uploads:
        hint += ", multipart/form-data with a file, or a picture as image/jpeg, image/png or image/webp"
    instead = "not as JSON, a form with a file, or a picture" if uploads else "not as JSON"
    return Problem("unsupported_media_type", f"the body is declared as {given}, {instead}", hint=hint, status=415)


def _is_json(essence: bytes) -> bool:
    return essence == b"application/json" or essence.endswith(b"+json")


def _is_upload(essence: bytes) -> bool:
    return essence in (b"multipart/form-data", b"application/octet-stream") or essence.startswith(b"image/")


def _from_validation(errors: list[Any], status: int) -> Problem:
    first = next((e for e in errors if isinstance(e, dict)), {})
    field = _path_of(first.get("loc") or ())
    message = str(first.get("msg", "the body does not fit"))
    match first.get("type"):
        case "json_invalid":
            hint = 'send a JSON object such as {"inputs": [[1, 2]]}'
            return Problem("invalid_json", message, field="body", hint=hint, status=400)
        case "missing":
            return Problem("missing_field", f"{field} is missing", field=field, hint=_DOCS, status=422)
        case "extra_forbidden":
            return Problem("unknown_field", f"{field} is no field of a request", field=field, hint=_DOCS, status=422)
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return Problem(
        "invalid_field", f"{field or 'body'}: {message}{more}", field=field or "body", hint=_DOCS, status=422
    )


def _path_of(loc: Any) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else (f".{part}" if path else str(part))
    return path


def _media_type(message: Message) -> bytes:
    for key, value in message.get("headers", ()):
        if key.lower() == b"content-type":
            return bytes(value.split(b";", 1)[0].strip().lower())
    return b""
