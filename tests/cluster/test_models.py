"""Models that fail, in each way there is, on the whole installation: upload, build Job, rollout, and the way back.

One project has every version: the first is good, and each later one fails in its own way. While they are tried, a
caller asks all the time; every answer must come from the first.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from build_service.kubernetes import names
from tests.cluster.projects import project
from tests.cluster.workloads import eventually
from tests.k8s.installation import HOST, Installation

MODEL, HANGS, LARGE = "own", "own-hangs", "own-large"
INPUTS, DOUBLED = [1.0, 2.0], {"outputs": [2.0, 4.0]}
SAMPLE = {"inputs": INPUTS}
PATIENCE = 400.0
"""Longer than EKIBEN_READY_SECONDS, with builds before it."""


class Callers:
    """Calls deployments all the time, as their users do; `first` is the version that must answer."""

    def __init__(self, installed: Installation, deployments: Sequence[str]) -> None:
        self.first = ""
        self.answers: Counter[tuple[str, int, str]] = Counter()
        self._installed, self._deployments = installed, deployments
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Callers:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def bad(self, deployment: str) -> list[tuple[str, int, str]]:
        """Answers that are none of the first version's."""
        return [each for each in self.answers if each[0] == deployment and each[1:] != (200, self.first)]

    def _run(self) -> None:
        headers = {"Host": HOST, "Authorization": f"Bearer {self._installed.token}"}
        with httpx.Client(base_url=self._installed.url, headers=headers, trust_env=False, timeout=60) as client:
            while not self._stop.wait(0.1):
                for name in self._deployments:
                    try:
                        answer = client.post(f"/inference/{name}/predict", json=SAMPLE)
                        found = (answer.status_code, answer.headers.get("ekiben-version", answer.text[:200]))
                    except httpx.HTTPError as error:
                        found = (0, repr(error))
                    self.answers[(name, *found)] += 1


@dataclass
class Own:
    """The project's versions by what they do, and who calls the first."""

    installed: Installation
    folder: Path
    callers: Callers
    versions: dict[str, int] = field(default_factory=dict)
    pods: dict[str, list[str]] = field(default_factory=dict)
    """UIDs of the first version's pods, by deployment, from before anything failed."""

    def push(self, what: str, deploy: bool = False, **does: str) -> None:
        file = project(self.folder / what, **does)
        made = self.installed.push(file, MODEL, sample=SAMPLE, deploy=str(deploy).lower())
        self.versions[what] = made["version"]

    def built(self, what: str) -> int:
        """The version's number, once it is built."""
        number = self.versions[what]

        def look() -> dict[str, Any] | None:
            found = self.installed.version(MODEL, number)
            assert found["state"] != "failed", found
            return found if found["state"] not in ("queued", "building") else None

        eventually(look, PATIENCE)
        return number

    def put(self, deployment: str, number: int, **values: Any) -> httpx.Response:
        wanted = {"model": MODEL, "version": number, **values}
        return self.installed.http.put(f"/deployments/{deployment}", json=wanted)

    def first(self, deployment: str) -> list[str]:
        """UIDs of the pods that serve the first version under a deployment."""
        selector = f"{names.DEPLOYMENT}={deployment},{names.VERSION}={self.versions['well']}"
        found = self.installed.cluster.get("pods", "-n", "ekiben-models", "-l", selector)["items"]
        return sorted(pod["metadata"]["uid"] for pod in found)

    def returned(self, deployment: str, number: int) -> dict[str, Any]:
        """The deployment, once that version was given up; everything is as it was before, and the reason is told."""

        def look() -> dict[str, Any] | None:
            found = self.installed.deployment(deployment)
            return found if found["state"] == "rolled_back" and tried(self.revisions(deployment), number) else None

        found = dict(eventually(look, PATIENCE))
        assert found["target"] == {"model": MODEL, "version": self.versions["well"]}
        assert found["ready"] == 1
        (revision,) = tried(self.revisions(deployment), number)
        assert (revision["state"], revision["reason"]) == ("rolled_back", found["reason"])
        told = [event for event in self.installed.events(deployment) if event["reason"] == "RolledBack"]
        about = [event for event in told if f"Revision {revision['revision']} " in event["message"]]
        assert len(about) == 1, told
        assert found["reason"] in about[0]["message"]
        assert about[0]["message"].endswith("keeps the traffic.")

        def only_the_first() -> bool:
            label = f"jsonpath={{.spec.template.metadata.labels.{names.VERSION.replace('.', chr(92) + '.')}}}"
            wanted = self.installed.cluster.kubectl("-n", "ekiben-models", "get", "deployment", deployment, "-o", label)
            return wanted == str(self.versions["well"]) and self.first(deployment) == self.pods[deployment]

        assert eventually(only_the_first)
        assert self.callers.bad(deployment) == []
        return found

    def revisions(self, deployment: str) -> list[dict[str, Any]]:
        return list(self.installed.call("GET", f"/deployments/{deployment}/revisions")["items"])


def tried(revisions: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    return [each for each in revisions if each["version"] == number]


@pytest.fixture(scope="module")
def own(installed: Installation, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Own]:
    deployments = (MODEL, HANGS, LARGE)
    for name in reversed(deployments):  # the last one has the versions
        installed.remove(name)
    made = Own(installed, tmp_path_factory.mktemp("own"), Callers(installed, deployments))
    made.push("well", deploy=True)
    first = made.built("well")
    installed.live(MODEL, first, seconds=PATIENCE)
    for name in (HANGS, LARGE):
        assert made.put(name, first).is_success
        installed.live(name, first)
    before = made.revisions(MODEL)
    assert made.put(MODEL, first).is_success
    assert made.revisions(MODEL) == before  # what is asked for again is the same build
    made.callers.first = str(first)
    made.pods = {name: made.first(name) for name in deployments}
    assert all(len(pods) == 1 for pods in made.pods.values())
    with made.callers:
        # what takes longest comes first
        made.push("hangs", start="time.sleep(100_000)")
        made.push("crashes", deploy=True, start='print("about to fall", flush=True); os._exit(7)')
        made.push("no number", outputs='[float("nan")] * len(inputs)')
        made.push("memory", start="self.hoard = [bytes([n % 255 + 1]) * (1 << 24) for n in range(1 << 10)]")
        made.put(HANGS, made.built("hangs"))
        made.put(LARGE, made.versions["hangs"], resources={"memory": "100Gi"})
        yield made
    for name in reversed(deployments):
        installed.remove(name)


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [
        ("crashes", "serving_crashed", ["ended with exit code 7", "about to fall"]),
        ("no number", "golden_sample_failed", ["the answer to the sample is not finite at outputs[0]"]),
        ("memory", "out_of_memory", ["more memory than its limit of 1Gi"]),
    ],
)
def test_the_first_version_goes_on_answering_and_the_reason_is_told(
    own: Own, what: str, code: str, words: list[str]
) -> None:
    number = own.built(what)
    if what != "crashes":  # that one was deployed by its upload
        assert own.put(MODEL, number).is_success
    found = own.returned(MODEL, number)
    assert found["code"] == code, found
    for each in words:
        assert each in found["reason"]
    view = own.installed.version(MODEL, number)
    assert (view["state"], view["reason"]) == ("rolled_back", found["reason"])


def test_a_version_that_no_node_has_room_for_says_what_is_missing_while_it_waits_and_when_it_is_given_up(
    own: Own,
) -> None:
    waiting = eventually(lambda: waits(own.installed.deployment(LARGE)), PATIENCE)
    assert waiting["code"] == "insufficient_memory"
    assert "100Gi" in waiting["reason"]
    found = own.returned(LARGE, own.versions["hangs"])
    assert found["code"] == "insufficient_memory"
    assert "100Gi" in found["reason"]


def waits(deployment: dict[str, Any]) -> dict[str, Any] | None:
    return deployment if deployment["reason"] else None


def test_a_version_that_hangs_is_given_up_at_its_deadline(own: Own) -> None:
    found = own.returned(HANGS, own.versions["hangs"])
    assert found["code"] == "ready_timeout"
    assert "was not ready within" in found["reason"]


def test_a_full_quota_is_told_and_a_gpu_that_nobody_has_is_refused_before_anything_is_built(own: Own) -> None:
    own.push("thrice", outputs="[3 * x for x in inputs]")
    number = own.built("thrice")
    quota = {
        "apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full", "namespace": "ekiben-models"},
        "spec": {"hard": {"pods": "0", "requests.nvidia.com/gpu": "0"}},
    }  # fmt: skip
    own.installed.cluster.apply(quota)
    try:
        refused = eventually(lambda: refusal(own, number))
        assert (refused.status_code, refused.json()["code"]) == (409, "insufficient_gpu")
        assert refused.json()["detail"].startswith("0 free of 1")
        assert own.put(MODEL, number).is_success
        found = own.returned(MODEL, number)
        assert found["code"] == "quota_exceeded"
        assert "'full'" in found["reason"]
        assert "pods=1" in found["reason"]
    finally:
        own.installed.cluster.kubectl("-n", "ekiben-models", "delete", "quota", "full")
    # with room again, the same version is taken
    own.callers.answers.clear()
    assert own.put(MODEL, number).is_success
    own.installed.live(MODEL, number)
    assert eventually(lambda: answered(own) == {"outputs": [3.0, 6.0]})
    assert {status for name, status, _ in own.callers.answers if name == MODEL} <= {200}


def answered(own: Own) -> Any:
    answer = own.installed.predict(MODEL, INPUTS)
    return answer.json() if answer.status_code == 200 else None


def refusal(own: Own, number: int) -> httpx.Response | None:
    """What a request for a GPU is answered; None while the service has not heard of the quota yet."""
    before = len(own.revisions(LARGE))
    answer = own.put(LARGE, number, resources={"gpu": "1"})
    if answer.is_success:
        return None
    assert len(own.revisions(LARGE)) == before
    return answer


def test_a_registry_that_asks_for_a_password_is_read_with_one_and_nothing_is_installed_twice(own: Own) -> None:
    """The deps layer of the first build is found by its key; there is an environment only to import the service in."""
    own.built("no number")
    said = eventually(lambda: stages(own, own.versions["no number"]))
    assert "already there" in said
    assert "installed" not in said


def stages(own: Own, number: int) -> list[str] | None:
    """What the steps of a version's build said of its deps layer, once the log has it."""
    build = own.installed.version(MODEL, number)["build"]
    lines = own.installed.http.get(f"/builds/{build}/logs").text.splitlines()
    said = [json.loads(line) for line in lines if line.startswith('{"stage"')]
    return [each["message"] for each in said if each["stage"] == "deps"] or None
