"""`python -m bentos.serving` as the platform starts it: real processes, real projects, real sockets."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from bentos.serving import write_model

BENTOS = Path(importlib.import_module("bentos").__file__ or "").parent

PROJECT = """
import asyncio, os, time
from pathlib import Path
import bentoml
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

GATE = Path(os.environ.get("GATE", "/nonexistent"))

async def health(request):
    return JSONResponse({"mine": True})

@bentoml.service
@bentoml.asgi_app(Starlette(routes=[Route("/health", health)]))
class Doubler:
    @bentoml.api
    async def predict(self, x: float) -> dict:
        return {"y": x * 2}

    @bentoml.api
    def heard(self, ctx: bentoml.Context) -> dict:
        return {"headers": dict(ctx.request.headers), "client": ctx.request.client.host}

    @bentoml.api
    def crash(self) -> dict:
        raise RuntimeError("secret of the project")

    @bentoml.api
    def wait(self) -> dict:
        while not GATE.exists():
            time.sleep(0.01)
        return {"waited": True}

    @bentoml.api
    def busy(self) -> dict:
        Path(str(GATE) + ".started").touch()
        return self.wait.local()
"""


@pytest.fixture(scope="module")
def churn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = (
        importlib.import_module("bentos.lightgbm.example").write(tmp_path_factory.mktemp("churn") / "model").root
    )
    return root


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    (root / "service.py").write_text(PROJECT)
    (root / "bentofile.yaml").write_text("service: service:Doubler\n")
    return root


def _lightgbm(model: Path, **more: str) -> dict[str, str]:
    return {"EKIBEN_BENTO": str(BENTOS / "lightgbm"), "EKIBEN_MODEL_DIR": str(model), **more}


def _copy(model: Path, target: Path, **changed: Any) -> Path:
    """The example model again, with another file, sample or expected values."""
    parts = {
        "files": {"churn.txt": model / "files" / "churn.txt"},
        "sample": json.loads((model / "sample.json").read_text()),
        "expected": json.loads((model / "expected.json").read_text()),
        **changed,
    }
    return write_model(target, kind="lightgbm", format="lightgbm-text", **parts).root


def _problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["code"] == code
    return body


# the start


def test_a_changed_file_ends_the_start_with_11(starting: Any, churn: Path, tmp_path: Path) -> None:
    model = _copy(churn, tmp_path / "model")
    with (model / "files" / "churn.txt").open("ab") as stream:
        stream.write(b"\n")
    served = starting(_lightgbm(model))
    assert served.exit_code() == 11
    assert served.failure()["code"] == "digest_mismatch"
    assert "churn.txt" in served.failure()["message"]


def test_another_version_than_asked_for_ends_the_start_with_11(starting: Any, churn: Path) -> None:
    served = starting(_lightgbm(churn, EKIBEN_MODEL_DIGEST="sha256:" + "0" * 64))
    assert served.exit_code() == 11
    assert served.failure()["code"] == "digest_mismatch"


def test_wrong_predictions_end_the_start_with_10_and_say_how_many(starting: Any, churn: Path, tmp_path: Path) -> None:
    expected = json.loads((churn / "expected.json").read_text())
    expected["outputs"][3] += 0.1
    served = starting(_lightgbm(_copy(churn, tmp_path / "model", expected=expected)))
    assert served.exit_code() == 10
    failure = served.failure()
    assert failure["code"] == "golden_sample_failed"
    assert "4 of 5 predictions match" in failure["message"]
    assert "outputs[3]" in failure["message"]


def test_the_tolerance_is_a_setting(starting: Any, churn: Path, tmp_path: Path) -> None:
    expected = json.loads((churn / "expected.json").read_text())
    expected["outputs"][3] += 0.1
    model = _copy(churn, tmp_path / "model", expected=expected)
    served = starting(_lightgbm(model, EKIBEN_GOLDEN_ATOL="0.2")).ready()
    assert served.client.get("/metadata").json()["checked"] == {"verified": "expected", "rows": 5, "matched": 5}


def test_a_sample_that_does_not_fit_ends_the_start_with_10(starting: Any, churn: Path, tmp_path: Path) -> None:
    served = starting(_lightgbm(_copy(churn, tmp_path / "model", sample={"inputs": [{"age": 3}]}, expected=None)))
    assert served.exit_code() == 10
    assert "no column" in served.failure()["message"]
    assert '"plan"' in served.failure()["hint"]


def test_a_file_that_is_no_model_ends_the_start_with_12(starting: Any, churn: Path, tmp_path: Path) -> None:
    served = starting(_lightgbm(_copy(churn, tmp_path / "model", files={"churn.txt": b"tree\nnot really\n"})))
    assert served.exit_code() == 12
    assert served.failure()["code"] == "model_load_failed"
    assert "churn.txt" in served.failure()["message"]


def test_a_service_that_cannot_be_imported_ends_the_start_with_13(starting: Any, churn: Path, tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "bentofile.yaml").write_text("service: service:Nothing\n")
    served = starting({"EKIBEN_BENTO": str(tmp_path)})
    assert served.exit_code() == 13
    assert "nowhere_to_be_found" in served.failure()["message"]


def test_a_taken_port_ends_the_start_with_1(starting: Any, churn: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        served = starting(_lightgbm(churn, EKIBEN_PORT=str(taken.getsockname()[1])))
        assert served.exit_code() == 1
    assert served.failure()["code"] == "port_unavailable"


def test_a_bad_setting_is_named(starting: Any, churn: Path) -> None:
    served = starting(_lightgbm(churn, EKIBEN_REQUEST_SECONDS="soon"))
    assert served.exit_code() == 1
    assert "EKIBEN_REQUEST_SECONDS" in served.failure()["message"]


def test_without_a_sample_a_synthetic_row_is_predicted(starting: Any, churn: Path, tmp_path: Path) -> None:
    served = starting(_lightgbm(_copy(churn, tmp_path / "model", sample=None, expected=None))).ready()
    assert served.client.get("/metadata").json()["checked"] == {"verified": "synthetic", "rows": 1, "matched": 1}
    assert served.client.get("/predict/test").json()["verified"] == "synthetic"


# one running version, called in many ways


@pytest.fixture(scope="module")
def running(churn: Path, wrapper: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    tokens = ",".join(hashlib.sha256(t).hexdigest() for t in (b"first", b"second"))
    served = wrapper(
        tmp_path_factory.mktemp("running"),
        _lightgbm(
            churn,
            EKIBEN_MODEL_NAME="churn",
            EKIBEN_MODEL_VERSION="3",
            EKIBEN_MODEL_METADATA='{"labels": {"team": "a"}, "metrics": {"auc": 0.8}}',
            EKIBEN_URL_PREFIX="/inference/churn/",
            EKIBEN_INFERENCE_TOKEN_SHA256=tokens,
        ),
    ).start()
    try:
        yield served.ready()
    finally:
        served.stop()


TOKEN = {"authorization": "Bearer second"}


def test_the_prefix_is_stripped_and_unprefixed_paths_are_served_too(running: Any, churn: Path) -> None:
    sample, expected = (json.loads((churn / f"{n}.json").read_text()) for n in ("sample", "expected"))
    for path in ("/inference/churn/predict", "/predict"):
        assert running.client.post(path, json=sample, headers=TOKEN).json() == expected
    _problem(running.client.get("/inference/churnish/health", headers=TOKEN), 404, "not_found")
    spec = running.client.get("/inference/churn/docs.json", headers=TOKEN).json()
    assert spec["servers"] == [{"url": "/inference/churn"}]
    assert "/metrics" not in spec["paths"]  # not routed there


def test_of_two_prefixes_the_longer_is_stripped_first(starting: Any, churn: Path) -> None:
    served = starting(_lightgbm(churn, EKIBEN_URL_PREFIX="/inference,/inference/churn")).ready()
    for path in ("/inference/churn/health", "/inference/health", "/health"):
        assert served.client.get(path).status_code == 200, path
    _problem(served.client.get("/inference/other/health"), 404, "not_found")
    assert served.client.get("/inference/docs.json").json()["servers"] == [{"url": "/inference/churn"}]


def test_tokens_of_a_file_hold_as_soon_as_it_is_written(starting: Any, churn: Path, tmp_path: Path) -> None:
    file = tmp_path / "sha256"
    served = starting(_lightgbm(churn, EKIBEN_INFERENCE_TOKENS_FILE=str(file), EKIBEN_URL_PREFIX="/inference")).ready()

    def answer(path: str = "/health") -> int:
        status: int = served.client.get(path, headers={"authorization": "Bearer late"}).status_code
        return status

    assert answer() == 401  # no file, no way in
    assert served.client.get("/metadata").status_code == 200  # without a prefix it is the platform's
    assert served.client.get("/inference/metadata").status_code == 401
    file.write_text(hashlib.sha256(b"late").hexdigest() + "\n")
    while answer() != 200:
        time.sleep(0.05)
    file.unlink()
    while answer() != 401:
        time.sleep(0.05)


def test_every_answer_names_its_version(running: Any) -> None:
    for path in ("/livez", "/health", "/inference/churn/metadata", "/nowhere", "/predict"):
        response = running.client.get(path, headers=TOKEN)
        assert (response.headers["ekiben-model"], response.headers["ekiben-version"]) == ("churn", "3")
        assert response.headers["x-request-id"]
    unauthorized = running.client.get("/health")
    assert unauthorized.headers["ekiben-version"] == "3"


def test_a_given_request_id_is_kept_and_a_strange_one_is_not(running: Any) -> None:
    kept = running.client.get("/livez", headers={"x-request-id": "abc-1"})
    assert kept.headers["x-request-id"] == "abc-1"
    replaced = running.client.get("/livez", headers={"x-request-id": "a b"})
    assert replaced.headers["x-request-id"] != "a b"


def test_calls_need_one_of_the_tokens(running: Any) -> None:
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic second"},
        {"authorization": "Bearer"},
    ):
        response = running.client.get("/inference/churn/metadata", headers=headers)
        _problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    for token in ("first", "second"):
        assert running.client.get("/metadata", headers={"authorization": f"bearer {token}"}).status_code == 200


def test_probes_and_metrics_need_no_token_but_metrics_stay_inside(running: Any) -> None:
    assert running.client.get("/readyz").status_code == 200
    assert "bentoml" in running.client.get("/metrics").text
    for path in ("/inference/churn/metrics", "/inference/churn/%6detrics", "/inference/churn//metrics"):
        assert running.client.get(path, headers=TOKEN).status_code == 404


def test_labels_and_metrics_come_from_the_environment(running: Any) -> None:
    body = running.client.get("/metadata", headers=TOKEN).json()
    assert (body["labels"], body["metrics"]) == ({"team": "a"}, {"auc": 0.8})


def test_a_body_that_is_declared_too_large_is_refused_before_it_is_read(running: Any) -> None:
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(
            b"POST /predict HTTP/1.1\r\nhost: x\r\nauthorization: Bearer first\r\n"
            b"content-type: application/json\r\ncontent-length: 99999999999\r\n\r\n"
        )
        assert raw.recv(65536).startswith(b"HTTP/1.1 413")


# the user's own project


def test_a_project_gets_what_it_lacks_and_keeps_what_it_has(starting: Any, project: Path) -> None:
    client = starting({"EKIBEN_BENTO": str(project)}).ready().client
    assert client.post("/predict", json={"x": 2}).json() == {"y": 4}
    assert client.get("/health").json() == {"mine": True}
    body = client.get("/metadata").json()
    assert (body["kind"], body["verified"]) == ("project", "none")
    assert body["input"]["properties"]["x"]["type"] == "number"
    assert "hint" in _problem(client.get("/predict/test"), 404, "no_sample")
    assert "/predict" in client.get("/docs.json").json()["paths"]
    wrong = _problem(client.post("/predict", json={"x": "a"}), 422, "invalid_field")
    assert wrong["field"] == "x"
    crashed = client.post("/crash", json={})
    _problem(crashed, 500, "prediction_failed")
    assert "secret" not in crashed.text


def test_a_project_is_held_to_its_sample(starting: Any, project: Path, tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", kind="project", format=None, files={"w.bin": b"1"}, sample={"x": 2}, expected={"y": 5}
    ).root
    served = starting({"EKIBEN_BENTO": str(project), "EKIBEN_MODEL_DIR": str(model)})
    assert served.exit_code() == 10
    assert "body.y is 4.0, expected 5" in served.failure()["message"]


def test_a_project_that_answers_nan_does_not_start(starting: Any, tmp_path: Path) -> None:
    (tmp_path / "bentofile.yaml").write_text("service: service:Bad\n")
    (tmp_path / "service.py").write_text(
        "import bentoml\n@bentoml.service\nclass Bad:\n    @bentoml.api\n"
        "    def score(self, x: float) -> float:\n        return float('nan')\n"
    )
    model = write_model(tmp_path / "m", kind="project", format=None, files={"w": b"1"}, sample={"x": 1}).root
    served = starting({"EKIBEN_BENTO": str(tmp_path), "EKIBEN_MODEL_DIR": str(model)})
    assert served.exit_code() == 10
    assert "not finite" in served.failure()["message"]


def test_a_model_that_answers_too_late_is_answered_for(starting: Any, project: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    served = starting({"EKIBEN_BENTO": str(project), "EKIBEN_REQUEST_SECONDS": "0.2", "GATE": str(gate)}).ready()
    late = served.client.post("/wait", json={})
    _problem(late, 504, "timeout")
    gate.touch()
    assert served.client.post("/predict", json={"x": 1}).json() == {"y": 2}


# the end


def test_sigterm_lets_a_running_request_finish(starting: Any, project: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    served = starting({"EKIBEN_BENTO": str(project), "GATE": str(gate)}).ready()
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(served.client.post("/busy", json={})))
    caller.start()
    _until(Path(str(gate) + ".started").exists)
    served.process.send_signal(signal.SIGTERM)
    _until(lambda: not _accepts(served.port))
    gate.touch()
    caller.join(60)
    assert answers[0].json() == {"waited": True}
    assert served.exit_code() == 0


def test_who_leaves_is_not_ready_and_answers_until_it_was_heard(starting: Any, churn: Path) -> None:
    served = starting(_lightgbm(churn, EKIBEN_LEAVE_SECONDS="3600")).ready()
    served.process.send_signal(signal.SIGTERM)
    _until(lambda: served.client.get("/readyz").status_code == 503)
    with httpx.Client(base_url=served.client.base_url, timeout=60, trust_env=False) as newcomer:
        assert newcomer.get("/predict/test").status_code == 200
        assert newcomer.get("/livez").status_code == 200
    served.process.send_signal(signal.SIGTERM)  # whoever asks again has no patience
    assert served.exit_code() == 0


def test_the_process_ends_when_its_parent_is_gone(starting: Any, churn: Path) -> None:
    mine, theirs = os.pipe()
    served = starting(_lightgbm(churn, EKIBEN_LIFELINE_FD=str(mine)), pass_fds=(mine,))
    os.close(mine)
    served.ready()
    os.close(theirs)
    assert served.exit_code() == -signal.SIGKILL


def test_an_inherited_socket_is_served(starting: Any, churn: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        served = starting(_lightgbm(churn, EKIBEN_SOCKET_FD=str(listener.fileno())), pass_fds=(listener.fileno(),))
        # the kernel holds the call until the process is ready: nothing is refused
        response = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=120, trust_env=False)
    assert response.status_code == 200
    served.process.send_signal(signal.SIGTERM)
    assert served.exit_code() == 0


def test_a_unix_socket_is_served_and_the_router_says_who_called(starting: Any, project: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = str(Path(folder, "s"))
        listener.bind(path)
        given = {"EKIBEN_BENTO": str(project), "EKIBEN_SOCKET_FD": str(listener.fileno())}
        served = starting(given, pass_fds=(listener.fileno(),))
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://localhost", timeout=120) as client:
            while True:
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                assert served.process.poll() is None, served.log.read_text()
                time.sleep(0.02)
            heard = client.post("/heard", json={}, headers={"X-Forwarded-For": "192.0.2.1, 192.0.2.2"}).json()
        assert heard["client"] == "192.0.2.2"


SECRETS = {
    "Authorization": "Bearer secret-of-the-caller",
    "Proxy-Authorization": "Basic secret-of-the-caller",
    "Cookie": "session=secret-of-the-caller",
    "Proxy_Authorization": "secret-of-the-caller",
}


def test_credentials_of_a_caller_do_not_reach_the_model(starting: Any, project: Path) -> None:
    token = hashlib.sha256(b"secret-of-the-caller").hexdigest()
    checks = starting({"EKIBEN_BENTO": str(project), "EKIBEN_INFERENCE_TOKEN_SHA256": token})
    open_to_all = starting({"EKIBEN_BENTO": str(project)})
    for served in (checks, open_to_all):
        answer = served.ready().client.post("/heard", json={}, headers={**SECRETS, "X-Api-Key": "of the project"})
        assert answer.status_code == 200, answer.text
        assert "secret-of-the-caller" not in answer.text
        assert answer.json()["headers"]["x-api-key"] == "of the project"
        _problem(served.client.post("/crash", json={}, headers=SECRETS), 500, "prediction_failed")
        assert "secret-of-the-caller" not in served.log.read_text()


def test_a_request_with_two_hosts_is_refused(starting: Any, project: Path) -> None:
    served = starting({"EKIBEN_BENTO": str(project)}).ready()
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:  # httpx does not send two
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n")
        head, _, body = connection.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert json.loads(body)["code"] == "malformed_request"


def test_chosen_credentials_are_passed_on(starting: Any, project: Path) -> None:
    served = starting({"EKIBEN_BENTO": str(project), "EKIBEN_PASS_HEADERS": "Authorization, cookie"}).ready()
    heard = served.client.post("/heard", json={}, headers=SECRETS).json()["headers"]
    assert heard["authorization"] == SECRETS["Authorization"]
    assert heard["cookie"] == SECRETS["Cookie"]
    assert "proxy-authorization" not in heard
    wrong = starting({"EKIBEN_BENTO": str(project), "EKIBEN_PASS_HEADERS": "x-api-key"})
    assert wrong.exit_code() == 1
    assert wrong.failure()["code"] == "bad_setting"


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def _until(condition: Any) -> None:
    while not condition():
        time.sleep(0.01)
