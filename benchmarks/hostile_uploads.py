"""Hostile uploads to the running service: how the API answers meanwhile, how much memory they take, and what the bounds
cost an ordinary upload."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import socket
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks import parts
from benchmarks.figures import Figure, Measured, Sample, middle

_ASKED = ("/models", "/deployments", "/kinds", "/models/ordinary")
_PERIOD = 0.02  # seconds between two calls of one client of the API
_CLIENTS = 4
_PAUSE = 0.5  # seconds for which an attacker rests after an answer, so that there are as many attacks as answers allow
_SLOW_SENDERS = 8
_MODEL_BYTES = 2 * parts.MIB


# --- the attacks ------------------------------------------------------------------------------------------------------


def json_bomb() -> bytes:
    """A skops file of some 100 kB whose schema.json is 100 million bytes of nested lists."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr("schema.json", b'{"__loader__":[' + b"[]," * (33 * parts.MIB) + b"[]]}")
    return out.getvalue()


def pax_tar() -> bytes:
    """A tar of some 100 kB with nothing but global headers, each of which sets thousands of facts."""
    facts = tarfile.TarInfo.create_pax_global_header({f"k{number}": "" for number in range(90_000)})
    return gzip.compress(facts * 100, 6)


def parts_form(count: int = 10_500) -> tuple[bytes, str]:
    """(body, media type) of a form with so many small files."""
    mark = "ekiben"
    body = b"".join(
        f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="f{number}"\r\n\r\nx\r\n'.encode()
        for number in range(count)
    )
    return body + f"--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


class Attack:
    """Clients that send hostile uploads all the time; what they were answered is counted."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stop = threading.Event()
        self.answers: Counter[str] = Counter()
        form, kind = parts_form()
        sent: list[tuple[str, bytes, str]] = [
            ("/models?filename=bomb.skops&name=bomb", json_bomb(), "application/octet-stream"),
            ("/models?filename=pax.tar.gz&name=pax", pax_tar(), "application/octet-stream"),
            ("/models", form, kind),
        ]
        self._threads = [threading.Thread(target=self._send, args=each, daemon=True) for each in sent for _ in (1, 2)]
        self._threads += [threading.Thread(target=self._drip, daemon=True) for _ in range(_SLOW_SENDERS)]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(120)

    def _send(self, path: str, body: bytes, kind: str) -> None:
        while not self._stop.is_set():
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=100)
            try:
                connection.request("POST", path, body, {"Content-Type": kind})
                answer = json.loads(connection.getresponse().read())
                self.answers[str(answer.get("code", "accepted"))] += 1
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.answers[type(error).__name__] += 1  # the service may hang up on what it refuses
            finally:
                connection.close()
            self._stop.wait(_PAUSE)

    def _drip(self) -> None:
        """A body that comes a byte a second."""
        while not self._stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port)) as connection:
                connection.sendall(
                    b"POST /models?filename=slow.txt&name=slow HTTP/1.1\r\nHost: localhost\r\n"
                    b"Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\n"
                )
                while not self._stop.wait(1):
                    connection.sendall(b"x")


# --- who else wants something -----------------------------------------------------------------------------------------


@dataclass
class Asking:
    """Clients of the API that ask at a steady rate, and how long each answer took."""

    port: int
    seconds: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    def ask(self, during: float) -> None:
        end = time.monotonic() + during
        threads = [threading.Thread(target=self._client, args=(number, end)) for number in range(_CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _client(self, number: int, end: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        count = number
        while (began := time.monotonic()) < end:
            try:
                connection.request("GET", _ASKED[count % len(_ASKED)])
                response = connection.getresponse()
                response.read()
                if response.status != 200:
                    self.failures[str(response.status)] += 1
            except (OSError, http.client.HTTPException) as error:
                self.failures[type(error).__name__] += 1
                connection.close()
            taken = time.monotonic() - began
            self.seconds.append(taken)
            count += 1
            time.sleep(max(0.0, _PERIOD - taken))
        connection.close()

    def p99(self) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


# --- figures ----------------------------------------------------------------------------------------------------------


def _attacked(bench: parts.Bench) -> tuple[list[Sample], dict[str, Any]]:
    """Measured once for two figures: the API's answers in quiet and under attack, and the service's memory."""

    def make() -> tuple[list[Sample], dict[str, Any]]:
        during = 5.0 if bench.quick else 30.0
        samples: list[Sample] = []
        answers: Counter[str] = Counter()
        asked = 0
        with parts.service(bench.folder("home")) as service:
            _send_ordinary(service, "ordinary", _model(bench, 0))
            for number in range(bench.rounds(3)):
                quiet = Asking(service.port)
                quiet.ask(during)
                before = parts.resident(service.pid)
                attack, busy = Attack(service.port), Asking(service.port)
                own, tree = parts.Peak(service.pid, tree=False), parts.Peak(service.pid, tree=True)
                with own as peak, tree, attack.running():
                    time.sleep(1)
                    busy.ask(during)
                if failed := quiet.failures + busy.failures:
                    raise parts.Failed(f"the API did not answer all: {dict(failed)}")
                answers += attack.answers
                asked += len(busy.seconds)
                samples += [
                    Sample(number, "quiet", "p99", quiet.p99(), "s"),
                    Sample(number, "attacked", "p99", busy.p99(), "s"),
                    Sample(number, "attacked", "slowest", max(busy.seconds), "s"),
                    Sample(number, "attacked", "memory growth", max(0, peak.bytes - before), "bytes"),
                    Sample(number, "attacked", "memory of the service and its children", tree.bytes, "bytes"),
                ]
                parts.say(
                    f"round {number + 1}: p99 {quiet.p99() * 1e3:.1f} → {busy.p99() * 1e3:.1f} ms; {dict(answers)}"
                )
        return samples, {"calls": asked, "hostile": dict(sorted(answers.items()))}

    found: tuple[list[Sample], dict[str, Any]] = bench.part("hostile uploads", make)
    return found


def answers(bench: parts.Bench) -> Measured:
    """p99 of lists that the API gives, under attack over in quiet."""
    samples, detail = _attacked(bench)
    quiet, busy = middle(samples, "quiet", "p99"), middle(samples, "attacked", "p99")
    return Measured(busy / quiet, {"quiet_ms": quiet * 1e3, "attacked_ms": busy * 1e3, **detail}, samples)


def memory(bench: parts.Bench) -> Measured:
    """Growth of the service's process over its size before the attack: the largest of the rounds."""
    samples, _ = _attacked(bench)
    growth = max(one.value for one in samples if one.what == "memory growth")
    tree = max(one.value for one in samples if one.what.startswith("memory of"))
    return Measured(growth / parts.MIB, {"with_children_mib": tree / parts.MIB}, samples)


def ordinary(bench: parts.Bench) -> Measured:
    """An upload of a LightGBM model of 2 MB to the service, beside one that examines it in its own process."""
    samples: list[Sample] = []
    with (
        parts.service(bench.folder("home")) as bounded,
        parts.service(bench.folder("before"), module="benchmarks.in_process") as before,
    ):
        for service in (bounded, before):
            _send_ordinary(service, "first", _model(bench, 1))  # what is imported at the first upload
        for number in range(4 if bench.quick else 60):
            for side, service in (("bounded", bounded), ("in process", before)):
                seconds = _send_ordinary(service, f"m{number}", _model(bench, 2 + number))
                samples.append(Sample(number, side, "upload", seconds, "s"))
    ours, other = middle(samples, "bounded", "upload"), middle(samples, "in process", "upload")
    return Measured(ours / other, {"bounded_ms": ours * 1e3, "in_process_ms": other * 1e3}, samples)


def _model(bench: parts.Bench, number: int) -> bytes:
    """A LightGBM model of 2 MB, other bytes for each number: the same content again would not be a new version."""
    found: bytes = bench.part("a model of 2 MB", _train)
    return found + b"\n" * (number + 1)  # blank lines may follow


def _train() -> bytes:
    import lightgbm
    import numpy

    random = numpy.random.default_rng(5)
    table = random.normal(size=(4000, 20))
    booster = lightgbm.train(
        {"objective": "binary", "num_leaves": 63, "verbose": -1, "num_threads": 1, "seed": 5},
        lightgbm.Dataset(table, table[:, 0] + random.normal(size=4000) > 0),
        num_boost_round=260,
    )
    text = booster.model_to_string().encode()
    if not 0.7 * _MODEL_BYTES <= len(text) <= 1.5 * _MODEL_BYTES:
        raise parts.Failed(f"the model has {len(text)} bytes")
    return text


def _send_ordinary(service: parts.Service, name: str, model: bytes) -> float:
    """Seconds until the upload was answered; it is not deployed, and its build is cancelled."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=120)
    began = time.perf_counter()
    connection.request("POST", f"/models?filename={name}.txt&name={name}&deploy=false", model,
                       {"Content-Type": "application/octet-stream"})  # fmt: skip
    response = connection.getresponse()
    answer = json.loads(response.read())
    seconds = time.perf_counter() - began
    connection.close()
    if response.status != 201:
        raise parts.Failed(f"an ordinary upload was answered {response.status}: {answer.get('detail')}")
    parts.cancel_builds(service)
    return seconds


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "uploads.api_p99_attacked", "p99 of the API's answers during hostile uploads, over that in quiet",
        "x", 3, "lower", 4,
    ): answers,
    Figure(
        "uploads.memory_attacked", "growth of the server's memory during hostile uploads", "MiB", 128, "lower", 4,
    ): memory,
    Figure(
        "uploads.ordinary", "upload of a LightGBM model of 2 MB, beside one examined in the server's own process",
        "x", 1.3, "lower", 4,
    ): ordinary,
}  # fmt: skip
