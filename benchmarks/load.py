"""Clients that call an endpoint and know the right answer of each version: one that waits for a version's first
answer, and many that call all the time."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import models, parts

_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Endpoint:
    """Where a service answers, and what its calls bear."""

    host: str
    port: int
    name: str = "churn"
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def predict(self) -> str:
        return f"/inference/{self.name}/predict"

    def connect(self, seconds: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=seconds)


@dataclass(frozen=True)
class Version:
    """A small model of the same schema as the others, with the answer that it alone gives."""

    number: int
    folder: Path

    @property
    def file(self) -> Path:
        return self.folder / "files" / str(models.manifest_of(self.folder)["files"][0]["path"])

    @property
    def request(self) -> bytes:
        return (self.folder / "sample.json").read_bytes()

    def form(self, name: str, **more: str) -> tuple[bytes, str]:
        """(multipart body, content type) of its upload."""
        mark = "----ekiben-benchmark"
        fields = {"name": name, "sample": self.request.decode(), **more}
        fields["expected"] = (self.folder / "expected.json").read_text()
        body = b"".join(
            f'--{mark}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        )
        head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="churn.txt"\r\n\r\n'
        body += head.encode() + self.file.read_bytes() + f"\r\n--{mark}--\r\n".encode()
        return body, f"multipart/form-data; boundary={mark}"


class Answers:
    """The right answer to one request, by version number; all versions are asked the first one's sample."""

    def __init__(self, versions: list[Version]) -> None:
        import lightgbm
        import numpy
        import pandas

        self.request = versions[0].request
        rows = json.loads(self.request)["inputs"]
        self._known = {}
        for one in versions:
            booster = lightgbm.Booster(model_file=str(one.file))
            table = pandas.DataFrame(rows, columns=booster.feature_name())
            table["plan"] = pandas.Categorical(table["plan"], categories=["basic", "pro", "team"])
            self._known[one.number] = numpy.asarray(booster.predict(table, num_threads=1)).tolist()
        distinct = {tuple(round(value, 9) for value in values) for values in self._known.values()}
        if len(distinct) != len(versions):
            raise parts.Failed("two of the models give the same answers: nobody could tell which version answered")

    def right(self, version: int, body: bytes) -> bool:
        try:
            given = json.loads(body)["outputs"]
            expected = self._known[version]
            return len(given) == len(expected) and all(
                abs(one - other) < 1e-9 for one, other in zip(given, expected, strict=True)
            )
        except (ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class Arrival:
    """When the last byte of an upload was sent, when it was answered, and when the new version first answered."""

    sent: float
    answered: float
    seen: float
    made: Mapping[str, Any]


def first_answer(endpoint: Endpoint, version: Version, answers: Answers, patience: float, pause: float) -> Arrival:
    """Upload a version while a client asks all the time, `pause` seconds after each answer. Wall-clock times."""
    body, kind = version.form(endpoint.name)
    seen, stop = threading.Event(), threading.Event()
    at = [0.0]
    wrong: list[str] = []

    def ask() -> None:
        connection = endpoint.connect(30)
        while not stop.is_set():
            connection.request("POST", endpoint.predict, answers.request, {**_JSON, **endpoint.headers})
            response = connection.getresponse()
            content = response.read()
            if response.headers.get("Ekiben-Version") == str(version.number):
                at[0] = time.time()
                if not answers.right(version.number, content):
                    wrong.append(content[:200].decode(errors="replace"))
                seen.set()
                return
            time.sleep(pause)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        connection = endpoint.connect(60)
        connection.putrequest("POST", "/models", skip_host="Host" in endpoint.headers)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **endpoint.headers}.items():
            connection.putheader(name, value)
        connection.endheaders()
        connection.send(body)
        sent = time.time()
        response = connection.getresponse()
        made = json.loads(response.read())
        answered = time.time()
        if response.status != 201:
            raise parts.Failed(f"the upload was answered {response.status}: {made.get('detail')}")
        if not seen.wait(patience):
            raise parts.Failed(f"version {version.number} did not answer within {patience:.0f} s")
    finally:
        stop.set()
        thread.join(60)
    if wrong:
        raise parts.Failed(f"the first answer of version {version.number} was wrong: {wrong[0]}")
    return Arrival(sent, answered, at[0], made)


class Load:
    """Clients that judge every answer, half on connections kept alive, half on new ones. Each waits `pause` seconds
    after an answer, or, with a `period`, calls once in so many seconds whatever the last call took."""

    def __init__(
        self, endpoint: Endpoint, answers: Answers, clients: int, *, pause: float = 0.0, period: float = 0.0
    ) -> None:
        self._endpoint, self._answers, self._pause, self._period = endpoint, answers, pause, period
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.calls = 0
        self.failures: Counter[str] = Counter()
        self.versions: Counter[int] = Counter()
        self.seconds: list[float] = []  # of each call
        self._threads = [threading.Thread(target=self._call, args=(n,)) for n in range(clients)]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)

    def _call(self, number: int) -> None:
        connection = self._endpoint.connect(60)
        kept = {**_JSON, **self._endpoint.headers}
        headers = kept if number % 2 == 0 else {**kept, "Connection": "close"}
        due = time.monotonic() + self._period * number / len(self._threads)
        while not self._stop.is_set():
            began = time.monotonic()
            problem, version = None, 0
            try:
                connection.request("POST", self._endpoint.predict, self._answers.request, headers)
                response = connection.getresponse()
                content = response.read()
                version = int(response.headers.get("Ekiben-Version") or 0)
                if response.status != 200:
                    problem = f"status {response.status}: {content[:120].decode(errors='replace').strip()}"
                elif not self._answers.right(version, content):
                    problem = f"wrong answer of version {version}"
            except (OSError, http.client.HTTPException) as error:
                problem = type(error).__name__
                connection.close()
            with self._lock:
                self.calls += 1
                self.seconds.append(time.monotonic() - began)
                self.versions[version] += problem is None
                if problem is not None:
                    self.failures[problem] += 1
            due = max(due + self._period, time.monotonic())
            time.sleep(due - time.monotonic() if self._period and due > time.monotonic() else self._pause)
