"""The body of a picture kind's request, in whichever of three ways it is sent.

    multipart/form-data      a file field `picture`, other fields as text
    application/json         an object with base64 in `picture`
    image/*, octet-stream    the picture itself; other fields in the query

A service that takes it as its only argument says with it that it takes all three (README of bentos/violation):

    @bentoml.api(route="/predict")
    async def predict(self, upload: Upload, /) -> dict[str, Any]:
        return await respond(self.model.answer(upload))
"""

from __future__ import annotations

import json
from typing import Any

from _bentoml_sdk.io_models import IODescriptor
from pydantic import PrivateAttr
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from bentos.serving.pictures import PICTURE as PICTURE
from bentos.serving.problems import Problem

MAX_BODY = 64 << 20
_MAX_FIELDS = 20
_MAX_FIELD = 40 << 20
"""Bytes of a text field: base64 of the largest picture fits."""


class Upload(IODescriptor):
    """A request that may carry a file. BentoML makes it by `from_http_request`; a service reads `fields()`."""

    _fields: dict[str, Any] = PrivateAttr(default_factory=dict)
    _problem: Problem | None = PrivateAttr(default=None)

    @classmethod
    async def from_http_request(cls, request: Request, serde: Any) -> Upload:
        upload = cls()
        try:
            upload._fields = await _read(request)
        except Problem as problem:  # BentoML would answer 500 to what is raised here
            upload._problem = problem
        return upload

    def fields(self) -> dict[str, Any]:
        """Files as bytes, fields of forms and queries as text, those of JSON as they are. Raises Problem."""
        if self._problem is not None:
            raise self._problem
        return self._fields


class _InMemory(MultiPartParser):
    """Starlette's parser writes files of more than a megabyte to disc, in the event loop."""

    spool_max_size = MAX_BODY


async def _read(request: Request) -> dict[str, Any]:
    essence = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if essence == "multipart/form-data":
        return await _form(request)
    body = b"".join([chunk async for chunk in _bounded(request)])
    if essence == "application/json" or essence.endswith("+json"):
        return _json(body)
    if not body:
        hint = "send a JPEG, PNG or WebP picture as the body"
        raise Problem("missing_field", f"{PICTURE} is missing: the body is empty", field=PICTURE, hint=hint)
    return {**dict(request.query_params), PICTURE: body}


async def _bounded(request: Request) -> Any:
    received = 0
    try:
        async for chunk in request.stream():
            received += len(chunk)
            if received > MAX_BODY:
                detail = f"the body is larger than {MAX_BODY} bytes"
                raise Problem("body_too_large", detail, field="body", hint="scale the picture down", status=413)
            yield chunk
    except ClientDisconnect as error:
        raise Problem("body_cut_off", "the body ended before it was whole", field="body", status=400) from error


async def _form(request: Request) -> dict[str, Any]:
    hint = f"send multipart/form-data with a file field {PICTURE}, as `curl -F {PICTURE}=@cat.jpg` does"
    parser = _InMemory(
        request.headers,
        _bounded(request),
        max_files=_MAX_FIELDS,
        max_fields=_MAX_FIELDS,
        max_part_size=_MAX_FIELD,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, LookupError, ValueError) as error:  # also: a header that cannot be parsed
        detail = f"the form cannot be read: {error}"
        raise Problem("invalid_form", detail, field="body", hint=hint, status=400) from error
    fields: dict[str, Any] = {}
    try:
        for name, value in form.multi_items():
            if name in fields:
                raise Problem("duplicate_field", f"{name} is there twice", field=name, hint="send each field once")
            fields[name] = await value.read() if isinstance(value, UploadFile) else value
    finally:
        await form.close()
    return fields


def _json(body: bytes) -> dict[str, Any]:
    hint = 'send a JSON object such as {"picture": "<base64>"}'
    try:
        parsed = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        detail = f"the body is not JSON: {str(error)[:200]}"
        raise Problem("invalid_json", detail, field="body", hint=hint, status=400) from error
    if not isinstance(parsed, dict):
        detail = f"the body is a {type(parsed).__name__}, not an object"
        raise Problem("invalid_field", detail, field="body", hint=hint)
    return parsed
