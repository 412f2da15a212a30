"""The golden sample: a request that the model must answer before anybody else may ask.

Comparison is pure; `call` and `check` run the request through the real application, in process.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bentos.serving import finite
from bentos.serving.about import SCOPE_KEY, About, Checked, Served
from bentos.serving.problems import App, Message, Scope, StartError


@dataclass(frozen=True)
class Comparison:
    """Rows compared and matched; `difference` says what is wrong first, or is None."""

    rows: int
    matched: int
    difference: str | None


def rows_of(body: Any) -> tuple[str, list[Any]] | None:
    """Where the rows of a response body are: its path and list; None when the body is one answer."""
    if isinstance(body, list):
        return "", body
    if isinstance(body, dict):
        if isinstance(body.get("outputs"), list):
            return "outputs", body["outputs"]
        lists = [(k, v) for k, v in body.items() if isinstance(v, list)]
        if len(lists) == 1:
            return str(lists[0][0]), lists[0][1]
    return None


def compare(expected: Any, actual: Any, rtol: float, atol: float) -> Comparison:
    """Compare two response bodies: equal shape, strings and whole numbers; floats with |a - e| <= atol + rtol * |e|."""
    where = rows_of(expected)
    found = rows_of(actual)
    if where is None or found is None or where[0] != found[0]:
        difference = _difference(expected, actual, "body", rtol, atol)
        return Comparison(1, 0 if difference else 1, difference)
    name, rows = where
    answers = found[1]
    if len(rows) != len(answers):
        said = f"{len(answers)} values instead of {len(rows)} in {name or 'body'}"
        return Comparison(len(rows), 0, said)
    differences = [
        _difference(e, a, f"{name}[{i}]", rtol, atol) for i, (e, a) in enumerate(zip(rows, answers, strict=True))
    ]
    first = next((d for d in differences if d), None)
    if first is None and isinstance(expected, dict):
        first = _difference({**expected, name: []}, {**actual, name: []}, "body", rtol, atol)
    return Comparison(len(rows), differences.count(None), first)


async def call(app: App, path: str, body: Any, served: Served | None = None) -> tuple[int, Any]:
    """POST a JSON body through an ASGI application. Gives the status and the parsed answer (text if not JSON)."""
    payload = json.dumps(body).encode()
    scope: Scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [
            (b"host", b"localhost"),
            (b"content-type", b"application/json"),
            (b"content-length", str(len(payload)).encode()),
        ],
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
    }
    if served is not None:
        scope[SCOPE_KEY] = served
    sent = False
    status = 500
    chunks: list[bytes] = []

    async def receive() -> Message:
        nonlocal sent
        if sent:
            return {"type": "http.disconnect"}
        sent = True
        return {"type": "http.request", "body": payload, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            chunks.append(bytes(message.get("body", b"")))

    await app(scope, receive, send)
    answer = b"".join(chunks)
    try:
        return status, json.loads(answer)
    except ValueError:
        return status, answer.decode("utf-8", "replace")


async def check(app: App, route: str | None, about: About, served: Served) -> tuple[Checked, Any]:
    """Predict the sample (or, without one, the synthetic example) and judge the answer.

    Gives what was shown and the answer itself. Raises StartError `golden_sample_failed` when the application refuses
    the sample, or answers something that is not finite, not of the right shape, or not what was expected.
    """
    folder = about.folder
    sample = folder.sample() if folder else None
    expected = folder.expected() if folder else None
    verified = "expected" if expected is not None else "sample"
    if sample is None:
        sample, expected, verified = about.example, None, "synthetic"
    if sample is None or route is None:
        return Checked(), None
    with finite.watch() as seen, _last_exception() as raised:
        status, answer = await call(app, route, sample, served)
    what = "the synthetic example made from the model's schema" if verified == "synthetic" else "the sample"
    if status >= 400:
        said = answer.get("detail", answer) if isinstance(answer, dict) else answer
        if status >= 500 and raised:  # BentoML keeps the reason for its log
            said = f"{type(raised[-1]).__name__}: {raised[-1]}"[:1000]
            hint = "the log of the deployment has the whole story; call the model with the same rows where it was made"
            raise StartError("golden_sample_failed", f"{what} made the service fail: {said}", hint)
        hint = "send a sample that is a body for the predict route, such as " + json.dumps(about.example)[:300]
        raise StartError("golden_sample_failed", f"{what} was refused with status {status}: {said}", hint)
    if place := finite.place(answer) or next(iter(seen), None):
        message = f"the answer to {what} is not finite at {place}"
        raise StartError("golden_sample_failed", message, "check the model with the same rows where it was trained")
    _check_count(sample, answer, what)
    if expected is None:
        found = rows_of(answer)
        rows = len(found[1]) if found else 1
        return Checked(verified, rows, rows), answer
    result = compare(expected, answer, served.rtol, served.atol)
    if result.difference:
        raise StartError(
            "golden_sample_failed",
            f"{result.matched} of {result.rows} predictions match the expected values: {result.difference} "
            f"(tolerance {served.rtol:g} relative, {served.atol:g} absolute)",
            _cause(about),
        )
    return Checked("expected", result.rows, result.matched), answer


def _cause(about: About) -> str:
    """A hint at what made the answers differ from the expected values."""
    known = list(about.caveats)
    if why := about.details.get("why_alone"):
        known.append(
            f"each row is predicted in a call of its own ({why}): make the expected values from one row at a time"
        )
    return "; ".join(known) or (
        "the model does not predict here what it predicted where the expected values were made; "
        "check versions, column order and preprocessing"
    )


@contextlib.contextmanager
def _last_exception() -> Iterator[list[BaseException]]:
    """The exceptions that are logged meanwhile, the last one last."""
    raised: list[BaseException] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None:
                raised.append(record.exc_info[1])

    keep = Keep()
    logging.getLogger().addHandler(keep)
    try:
        yield raised
    finally:
        logging.getLogger().removeHandler(keep)


def _check_count(sample: Any, answer: Any, what: str) -> None:
    if not (isinstance(sample, dict) and isinstance(answer, dict)):
        return
    inputs, outputs = sample.get("inputs"), answer.get("outputs")
    if isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) != len(outputs):
        message = f"{what} has {len(inputs)} rows, the answer {len(outputs)} values"
        raise StartError("golden_sample_failed", message, "the model must answer one value per row")


def _difference(expected: Any, actual: Any, path: str, rtol: float, atol: float) -> str | None:
    if isinstance(expected, bool) or isinstance(actual, bool):
        return None if expected is actual else f"{path} is {actual!r}, expected {expected!r}"
    # two whole numbers are labels or counts: 100001 is not 100002
    if (
        isinstance(expected, float | int)
        and isinstance(actual, float | int)
        and float in (type(expected), type(actual))
    ):
        if abs(actual - expected) <= atol + rtol * abs(expected):
            return None
        return f"{path} is {actual!r}, expected {expected!r}"
    if isinstance(expected, list) and isinstance(actual, list):
        if len(expected) != len(actual):
            return f"{path} has {len(actual)} values, expected {len(expected)}"
        pairs = [(e, a, f"{path}[{i}]") for i, (e, a) in enumerate(zip(expected, actual, strict=True))]
    elif isinstance(expected, dict) and isinstance(actual, dict):
        if expected.keys() != actual.keys():
            return f"{path} has the fields {sorted(actual)}, expected {sorted(expected)}"
        pairs = [(expected[k], actual[k], f"{path}.{k}") for k in expected]
    else:
        return None if expected == actual else f"{path} is {actual!r}, expected {expected!r}"
    return next((found for e, a, p in pairs if (found := _difference(e, a, p, rtol, atol))), None)
