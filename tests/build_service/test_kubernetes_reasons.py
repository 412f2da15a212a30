"""Statuses as a real cluster (1.34) wrote them, and what a user is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from build_service.kubernetes import reasons

STATUSES = Path(__file__).with_name("statuses")


def recorded(title: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((STATUSES / f"{title}.json").read_text())
    return found


def finding(status: dict[str, Any], failed_pulls: int | None = None) -> reasons.Finding | None:
    count = status["failed_pulls"] if failed_pulls is None else failed_pulls
    pulls = {pod["metadata"]["uid"]: count for pod in status["pods"]}
    return reasons.of_rollout(status["deployment"], status["pods"], pulls)


@pytest.mark.parametrize(
    ("title", "patience", "words"),
    [
        ("golden_sample_failed", 0.0, "row 0: 0.7 was expected, 0.2 came"),
        ("out_of_memory", 0.0, "its limit of 64Mi"),
        ("serving_crashed", 0.0, "ended with exit code 3"),
        ("image_not_found", 0.0, "the registry does not have it"),
        ("registry_unreachable", None, "does not reach the registry"),
        ("insufficient_memory", None, "No node has 900Gi of memory free"),
        ("insufficient_gpu", None, "0 free of 1 (nvidia.com/gpu)"),
        (
            "quota_exceeded",
            10.0,
            "requests.memory=3Gi asked for, requests.memory=0 in use, requests.memory=1Gi allowed",
        ),
        ("limit_exceeded", 0.0, "maximum memory usage per Container is 1Gi, but limit is 3Gi"),
        ("pod_security", 0.0, "allowPrivilegeEscalation != false"),
    ],
)
def test_what_a_cluster_says_is_told_in_words_of_ours(title: str, patience: float | None, words: str) -> None:
    found = finding(recorded(title))
    assert found is not None
    assert found.failure.code == title
    assert words in found.failure.message
    assert found.patience == patience
    assert found.failure.hint or title in ("golden_sample_failed", "serving_crashed")


def test_a_route_that_its_gateway_does_not_take_is_told() -> None:
    (route,) = recorded("route_refused")["routes"]
    found = reasons.of_routes([route])
    assert found is not None
    assert found.code == "route_refused"
    assert "The Gateway ekiben/ekiben does not take the route gated: NotAllowedByListeners" in found.message
    route["metadata"]["generation"] += 1  # what was said is of the route before
    assert reasons.of_routes([route]) is None


def test_one_failed_pull_is_no_end_yet() -> None:
    found = finding(recorded("image_not_found"), failed_pulls=1)
    assert found is not None
    assert found.patience is None


def test_a_registry_that_says_no_is_another_thing_than_one_that_has_not() -> None:
    status = recorded("image_not_found")
    waiting = status["pods"][0]["status"]["containerStatuses"][0]["state"]["waiting"]
    waiting["message"] = "failed to authorize: failed to fetch oauth token: unexpected status: 401 Unauthorized"
    found = finding(status)
    assert found is not None
    assert found.failure.code == "image_unauthorized"


def test_a_first_end_without_a_known_reason_may_have_been_an_accident() -> None:
    status = recorded("serving_crashed")
    container = status["pods"][0]["status"]["containerStatuses"][0]
    container["state"], container["restartCount"] = {"running": {}}, 1
    found = finding(status)
    assert found is not None
    assert found.patience is None


def test_a_pod_that_only_starts_has_no_reason() -> None:
    status = recorded("serving_crashed")
    container = status["pods"][0]["status"]["containerStatuses"][0]
    container |= {"state": {"waiting": {"reason": "ContainerCreating"}}, "lastState": {}, "restartCount": 0}
    assert finding(status) is None


def test_the_last_crash_is_the_one_that_is_told() -> None:
    pods = recorded("serving_crashed")["pods"] + recorded("golden_sample_failed")["pods"]
    crash = reasons.last_crash(pods)
    assert crash is not None
    assert crash.code == "serving_crashed"
    assert reasons.last_crash([]) is None


# --- builds -----------------------------------------------------------------------------------------------------------


def build_pod(step: str, terminated: dict[str, Any], **status: Any) -> dict[str, Any]:
    entry = {"name": step, "state": {"terminated": terminated}}
    part = "containerStatuses" if step == "assemble" else "initContainerStatuses"
    spec = {"containers": [{"name": step, "resources": {"limits": {"memory": "4096Mi"}}}]}
    return {"metadata": {"uid": "1"}, "spec": spec, "status": {"phase": "Failed", part: [entry], **status}}


@pytest.mark.parametrize(("code", "user"), [(2, True), (3, False), (4, True)])
def test_a_step_of_a_build_speaks_for_itself(code: int, user: bool) -> None:
    words = json.dumps({"stage": "resolve", "code": "unresolvable", "message": "no such package", "hint": "look"})
    pod = build_pod("fetch", {"exitCode": code, "reason": "Error", "message": words})
    failure = reasons.of_build({}, pod, seconds=60)
    assert (failure.code, failure.message, failure.stage) == ("unresolvable", "no such package", "resolve")
    assert failure.user is user


@pytest.mark.parametrize(
    ("code", "setting"),
    [
        ("registry_unauthorized", "EKIBEN_REGISTRY_PUSH_SECRET"),
        ("registry_certificate", "EKIBEN_CA_CONFIGMAP"),
        ("registry_speaks_http", "EKIBEN_REGISTRY_INSECURE"),
    ],
)
def test_a_hint_of_the_command_line_becomes_one_about_settings(code: str, setting: str) -> None:
    words = json.dumps({"stage": "push", "code": code, "message": "said no", "hint": "log in first: docker login HOST"})
    pod = build_pod("assemble", {"exitCode": 2, "reason": "Error", "message": words})
    assert setting in str(reasons.of_build({}, pod, seconds=60).hint)


def test_ends_of_a_build_that_say_nothing_are_told_apart() -> None:
    memory = reasons.of_build({}, build_pod("fetch", {"exitCode": 137, "reason": "OOMKilled"}), seconds=60)
    assert (memory.code, memory.user) == ("build_out_of_memory", True)
    assert "4096Mi" in memory.message
    late = build_pod("assemble", {"exitCode": 137, "reason": "Error"}, reason="DeadlineExceeded")
    assert reasons.of_build({}, late, seconds=60).code == "build_timeout"
    full = build_pod("fetch", {"exitCode": 137}, reason="Evicted", message="Usage of EmptyDir volume exceeds the limit")
    evicted = reasons.of_build({}, full, seconds=60)
    assert (evicted.code, evicted.user) == ("build_evicted", False)
    lost = reasons.of_build({"status": {"conditions": [{"type": "Failed", "message": "gone"}]}}, None, seconds=60)
    assert (lost.code, lost.user) == ("build_crashed", False)


@given(st.recursive(st.none() | st.booleans() | st.text(max_size=8), lambda inner: st.lists(inner, max_size=2)))
def test_whatever_a_model_leaves_in_its_termination_log_is_survived(said: Any) -> None:
    status = recorded("golden_sample_failed")
    status["pods"][0]["status"]["containerStatuses"][0]["state"]["terminated"]["message"] = json.dumps(said)
    found = finding(status)
    assert found is not None
    assert found.failure.code == "golden_sample_failed"  # by its exit code


def evicted(message: str, **status: Any) -> dict[str, Any]:
    """A pod as a kubelet leaves it; the words are those of its eviction manager."""
    return {
        "metadata": {"uid": message},
        "status": {"phase": "Failed", "reason": "Evicted", "message": message, "startTime": "2026-01-01T00:00:00Z"}
        | status,
    }


OWN = [
    'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi". ',
    'Container model exceeded its local ephemeral storage limit "1280Mi". ',
    "Pod ephemeral local storage usage exceeds the total limit of containers 1280Mi. ",
]
SHORT = (
    "The node was low on resource: ephemeral-storage. Threshold quantity: 10Gi, available: 1Gi. Container model was "
    "using 2Gi, request is 128Mi, has larger consumption of ephemeral-storage. "
)
READY = {"metadata": {"uid": "next"}, "status": {"conditions": [{"type": "Ready", "status": "True"}]}}


@pytest.mark.parametrize("message", OWN)
def test_a_model_that_wrote_too_much_is_told_its_own_limit(message: str) -> None:
    once = reasons.of_rollout({}, [evicted(message)], {})
    assert once is not None
    assert (once.failure.code, once.failure.user, once.patience) == ("out_of_disk", True, None)
    assert message.strip() in once.failure.message
    assert "EKIBEN_MODEL_DISK" in str(once.failure.hint)
    again = reasons.of_rollout({}, [evicted(message), evicted(message)], {})
    assert again is not None
    assert again.patience == 0.0
    assert reasons.of_rollout({}, [evicted(message), READY], {}) is None  # it stays in the list, and was replaced
    failure = reasons.of_build({}, evicted(message), seconds=60)
    assert (failure.code, failure.user) == ("build_out_of_disk", True)
    assert "EKIBEN_BUILD_DISK" in str(failure.hint)


def test_a_node_that_is_short_of_disk_is_no_fault_of_the_model() -> None:
    found = reasons.of_rollout({}, [evicted(SHORT), evicted(SHORT)], {})
    assert found is not None
    assert (found.failure.code, found.failure.user, found.patience) == ("evicted", False, None)
    assert "low on resource: ephemeral-storage" in found.failure.message
    assert reasons.of_build({}, evicted(SHORT), seconds=60).code == "build_evicted"


def test_an_eviction_of_what_is_live_counts_as_an_end_with_its_reason() -> None:
    pod = evicted(OWN[0])
    assert reasons.ends(pod) == 1
    assert reasons.ends(READY) == 0
    failure = reasons.last_crash([READY, pod])
    assert failure is not None
    assert failure.code == "out_of_disk"
