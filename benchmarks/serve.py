"""From the last byte of an upload to the first right answer, and twenty version changes under load: the real server."""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import models, parts
from benchmarks.figures import Figure, Measured, Sample

_PATIENCE = 180.0  # seconds until a version must be live
_CHANGES = 20
_CALLERS = 4  # with connections kept alive; as many close theirs after each call


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

    def form(self, name: str) -> tuple[bytes, str]:
        """(multipart body, content type) of its upload."""
        mark = "----ekiben-benchmark"
        fields = {"name": name, "sample": self.request.decode()}
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


def _versions(bench: parts.Bench, count: int) -> list[Version]:
    return [Version(number + 1, folder) for number, folder in enumerate(bench.models(count))]


def _upload(service: parts.Service, name: str, version: Version, wait: bool) -> dict[str, Any]:
    body, kind = version.form(name)
    path = f"{service.url}/models" + (f"?wait={_PATIENCE:.0f}" if wait else "")
    answer, _ = parts.post(path, body, **{"Content-Type": kind})
    found: dict[str, Any] = json.loads(answer)
    if wait and found["state"] != "live":
        raise parts.Failed(f"version {found['version']} is {found['state']}: {found.get('reason')}")
    if found["version"] != version.number:
        raise parts.Failed(f"the upload became version {found['version']}, not {version.number}")
    return found


def first_answer(bench: parts.Bench) -> Measured:
    """A client asks all the time; the clock runs from the last byte sent to the first answer of the new version."""
    versions = _versions(bench, bench.rounds(5) + 1)
    answers = Answers(versions)
    samples: list[Sample] = []
    with parts.service(bench.folder("home")) as service:
        parts.say("first version (its build installs the environment)")
        _upload(service, "churn", versions[0], wait=True)
        for number, version in enumerate(versions[1:]):
            time.sleep(1)  # the old process has gone
            steps = _one(service, version, answers)
            parts.say(f"round {number + 1}: " + ", ".join(f"{name} {value:.2f} s" for name, value in steps.items()))
            samples += [Sample(number, "ours", name, value, "s") for name, value in steps.items()]
    names = list(dict.fromkeys(sample.what for sample in samples))
    detail = {name: median(one.value for one in samples if one.what == name) for name in names}
    total = detail.pop("total")
    return Measured(total, {"median_s": {name: round(value, 3) for name, value in detail.items()}}, samples)


def _one(service: parts.Service, version: Version, answers: Answers) -> dict[str, float]:
    body, kind = version.form("churn")
    seen = threading.Event()
    stop = threading.Event()
    at = [0.0]
    wrong: list[str] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
        while not stop.is_set():
            connection.request("POST", "/inference/churn/predict", answers.request, _JSON)
            response = connection.getresponse()
            content = response.read()
            if response.headers.get("Ekiben-Version") == str(version.number):
                at[0] = time.time()
                if not answers.right(version.number, content):
                    wrong.append(content[:200].decode(errors="replace"))
                seen.set()
                return
            time.sleep(0.005)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
        connection.putrequest("POST", "/models")
        connection.putheader("Content-Type", kind)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        connection.send(body)
        sent = time.time()
        response = connection.getresponse()
        made = json.loads(response.read())
        if response.status != 201:
            raise parts.Failed(f"the upload was answered {response.status}: {made.get('detail')}")
        answered = time.time()
        if not seen.wait(_PATIENCE):
            now = parts.get_json(f"{service.url}/models/churn/versions/{version.number}")
            raise parts.Failed(f"version {version.number} never answered: it is {now['state']}: {now.get('reason')}")
    finally:
        stop.set()
        thread.join(60)
    if wrong:
        raise parts.Failed(f"the first answer of version {version.number} was wrong: {wrong[0]}")
    return {"total": at[0] - sent, **_breakdown(service, version, made["build"], sent, answered, at[0])}


def _breakdown(
    service: parts.Service, version: Version, build: str, sent: float, answered: float, seen: float
) -> dict[str, float]:
    """The way in pieces that add up to the whole, from the times that build, platform and serving process note."""
    built = parts.get_json(f"{service.url}/builds/{build}")
    finished = _seconds(built["finished"])
    newest = max((service.home / "deployments" / "churn").glob("*.log"), key=lambda path: path.name)
    launched = int(newest.stem.split("-")[1]) / 1e9  # the platform names the log after the moment of the start
    lines = [json.loads(line) for line in newest.read_text().splitlines() if line.startswith("{")]
    marks = {line["message"].split(":")[0]: _seconds(line["time"]) for line in lines if "time" in line}
    golden = next((at for message, at in marks.items() if message.startswith("golden sample")), seen)
    ready = next((at for message, at in marks.items() if " is ready on " in message), seen)
    steps = {
        "upload finished": answered - sent,
        "build": finished - answered,
        "decision to start": launched - finished,
        "process start, model load, golden sample": golden - launched,
        "listening": ready - golden,
        "probe and switch": seen - ready,
    }
    inside = {f"builder: {stage['stage']}": stage["seconds"] for stage in built["stages"]}
    loading = [(message, at) for message, at in marks.items() if message.startswith(("loading", "loaded", "imported"))]
    return {**steps, **inside, **{f"serving: {message}": at - launched for message, at in loading}}


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


class Load:
    """Clients that call without a pause, half on connections kept alive, half on new ones, and judge every answer."""

    def __init__(self, service: parts.Service, answers: Answers) -> None:
        self._service, self._answers = service, answers
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.calls = 0
        self.failures: Counter[str] = Counter()
        self.versions: Counter[int] = Counter()
        self._threads = [threading.Thread(target=self._call, args=(n % 2 == 0,)) for n in range(2 * _CALLERS)]

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

    def _call(self, kept: bool) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._service.port, timeout=60)
        headers = _JSON if kept else {**_JSON, "Connection": "close"}
        while not self._stop.is_set():
            problem, version = None, 0
            try:
                connection.request("POST", "/inference/churn/predict", self._answers.request, headers)
                response = connection.getresponse()
                content = response.read()
                version = int(response.headers.get("Ekiben-Version") or 0)
                if response.status != 200:
                    problem = f"status {response.status}"
                elif not self._answers.right(version, content):
                    problem = f"wrong answer of version {version}"
            except (OSError, http.client.HTTPException) as error:
                problem = type(error).__name__
                connection.close()
            with self._lock:
                self.calls += 1
                self.versions[version] += problem is None
                if problem is not None:
                    self.failures[problem] += 1
            time.sleep(0.01)


def version_changes(bench: parts.Bench) -> Measured:
    """Version after version goes live while eight clients call; every answer must be 200 and right for its version."""
    count = 2 if bench.quick else _CHANGES
    versions = _versions(bench, count + 1)
    answers = Answers(versions)
    with parts.service(bench.folder("home")) as service:
        _upload(service, "churn", versions[0], wait=True)
        load = Load(service, answers)
        with load.running():
            time.sleep(1)
            for version in versions[1:]:
                made = _upload(service, "churn", version, wait=True)
                parts.say(f"version {made['version']} live; {load.calls} calls, {sum(load.failures.values())} failed")
            time.sleep(2)
    unseen = [one.number for one in versions if not load.versions[one.number]]
    if unseen:
        raise parts.Failed(f"versions {unseen} never answered")
    failed = sum(load.failures.values())
    samples = [
        Sample(0, "ours", "calls", load.calls, "calls"),
        Sample(0, "ours", "failed", failed, "calls"),
        *(Sample(0, "ours", f"version {key}", load.versions[key], "calls") for key in sorted(load.versions)),
    ]
    detail: dict[str, Any] = {"calls": load.calls, "changes": count, "clients": 2 * _CALLERS}
    if failed:
        detail["failures"] = dict(load.failures)
    return Measured(failed, detail, samples)


_JSON = {"Content-Type": "application/json"}

FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "serve.first_answer", "last uploaded byte to the first right answer of the new version", "s", 6, "lower"
    ): first_answer,
    Figure(
        "serve.failed_calls", "calls that failed during 20 version changes under load", "calls", 0, "lower"
    ): version_changes,
}
