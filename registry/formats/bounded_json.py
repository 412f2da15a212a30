"""JSON documents inside of models, bounded in number of values and depth before anything parses them.

A document of a hundred megabytes compresses to a hundred kilobytes and becomes gigabytes of objects. What passes here
is parsed again by the process that serves the model, so the bounds hold for that one too. The caller bounds the size.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

from registry.errors import UserError

MOST_VALUES = 2_500_000
DEEPEST = 200

# A string that does not end reaches to the end of the text, so that it is not looked for again from each quote in it.
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
_EVERY = bytes(range(256))
_NOT_BRACKETS = bytes(set(_EVERY) - set(b"[]{}"))
_NOT_MARKS = bytes(set(_EVERY) - set(b"[{,:"))


def loads(text: bytes, what: str, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a document, as `json.loads` gives it. `what` names it in errors, as in "its config.json".

    UserError `upload_too_costly` where it has too many values or is nested too deeply, else ValueError where it is no
    JSON.
    """
    check(text, what)
    return json.loads(text.decode(), object_pairs_hook=pairs)


def check(text: bytes, what: str) -> None:
    """UserError `upload_too_costly` where the document has more than MOST_VALUES values and keys, or is nested more
    than DEEPEST deep. Runs in linear time; whether it is JSON is not looked at."""
    if len(text) <= DEEPEST:
        return
    plain = _STRING.sub(b"", text)
    values = len(plain.translate(None, _NOT_MARKS))  # each comma, colon and bracket begins a value or a key
    if values > MOST_VALUES:
        _refuse(f"{what} has more than {MOST_VALUES} values")
    if _is_deep(plain.translate(None, _NOT_BRACKETS)):
        _refuse(f"{what} is nested more than {DEEPEST} levels deep")


def _is_deep(brackets: bytes) -> bool:
    """Whether pairs remain after the innermost ones were taken away DEEPEST times; what does not pair is no JSON."""
    for _ in range(DEEPEST):
        fewer = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if not fewer or len(fewer) == len(brackets):
            return False
        brackets = fewer
    return True


def _refuse(what: str) -> NoReturn:
    raise UserError(
        "upload_too_costly",
        f"The model's description is too large: {what}.",
        field="file",
        hint="Save the model again without what predictions do not need, such as training history or vocabularies of "
        "words that are seldom.",
    )
