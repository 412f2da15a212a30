"""From the last byte of an upload to the first right answer, and twenty version changes under load: the real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks import load, parts
from benchmarks.figures import Figure, Measured, Sample
from benchmarks.load import Answers, Load, Version

_PATIENCE = 180.0  # seconds until a version must be live
_CHANGES = 20
_PAUSE = 0.005  # of the client that waits for a new version
_CALLERS = 4  # with connections kept alive; as many close theirs after each call


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
    try:
        seen = load.first_answer(_endpoint(service), version, answers, _PATIENCE, _PAUSE)
    except parts.Failed as error:
        now = parts.get_json(f"{service.url}/models/churn/versions/{version.number}")
        raise parts.Failed(f"{error}; it is {now['state']}: {now.get('reason')}") from None
    steps = _breakdown(service, version, seen.made["build"], seen.sent, seen.answered, seen.seen)
    return {"total": seen.seen - seen.sent, **steps}


def _endpoint(service: parts.Service) -> load.Endpoint:
    return load.Endpoint("127.0.0.1", service.port)


def _breakdown(
    service: parts.Service, version: Version, build: str, sent: float, answered: float, seen: float
) -> dict[str, float]:
    """The way in pieces that add up to the whole, from the times that build, platform and serving process note."""
    built = parts.get_json(f"{service.url}/builds/{build}")
    finished = parts.seconds(built["finished"])
    newest = max((service.home / "deployments" / "churn").glob("*.log"), key=lambda path: path.name)
    launched = int(newest.stem.split("-")[1]) / 1e9  # the platform names the log after the moment of the start
    lines = [json.loads(line) for line in newest.read_text().splitlines() if line.startswith("{")]
    marks = {line["message"].split(":")[0]: parts.seconds(line["time"]) for line in lines if "time" in line}
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


def version_changes(bench: parts.Bench) -> Measured:
    """Version after version goes live while eight clients call; every answer must be 200 and right for its version."""
    count = 2 if bench.quick else _CHANGES
    versions = _versions(bench, count + 1)
    answers = Answers(versions)
    with parts.service(bench.folder("home")) as service:
        _upload(service, "churn", versions[0], wait=True)
        calls = Load(_endpoint(service), answers, 2 * _CALLERS, pause=0.01)
        with calls.running():
            time.sleep(1)
            for version in versions[1:]:
                made = _upload(service, "churn", version, wait=True)
                parts.say(f"version {made['version']} live; {calls.calls} calls, {sum(calls.failures.values())} failed")
            time.sleep(2)
    unseen = [one.number for one in versions if not calls.versions[one.number]]
    if unseen:
        raise parts.Failed(f"versions {unseen} never answered")
    failed = sum(calls.failures.values())
    samples = [
        Sample(0, "ours", "calls", calls.calls, "calls"),
        Sample(0, "ours", "failed", failed, "calls"),
        *(Sample(0, "ours", f"version {key}", calls.versions[key], "calls") for key in sorted(calls.versions)),
    ]
    detail: dict[str, Any] = {"calls": calls.calls, "changes": count, "clients": 2 * _CALLERS}
    if failed:
        detail["failures"] = dict(calls.failures)
    return Measured(failed, detail, samples)


FIGURES: dict[Figure, Callable[[parts.Bench], Measured]] = {
    Figure(
        "serve.first_answer", "last uploaded byte to the first right answer of the new version", "s", 6, "lower"
    ): first_answer,
    Figure(
        "serve.failed_calls", "calls that failed during 20 version changes under load", "calls", 0, "lower"
    ): version_changes,
}
