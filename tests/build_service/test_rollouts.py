"""Deployments while something happens to them: changed, replaced, deleted, crashed, called badly."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]
Until = Callable[..., Any]


def serving(home: Home, name: str) -> list[psutil.Process]:
    found = []
    for process in home.processes():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("EKIBEN_URL_PREFIX") == f"/inference/{name}":
                found.append(process)
    return found


def test_replicas_and_resources_change_without_a_new_revision(
    server: Home, model: Model, rows: Rows, until: Until
) -> None:
    server.upload(model(1), "scaled.txt", sample=rows)
    first = serving(server, "scaled")[0].pid
    server.call("PUT", "/deployments/scaled", json={"version": 1, "replicas": 2})
    until(lambda: server.get("/deployments/scaled")["ready"] == 2)
    assert first in {process.pid for process in serving(server, "scaled")}
    server.call("PUT", "/deployments/scaled", json={"version": 1, "replicas": 1, "resources": {"memory": "3Gi"}})
    until(lambda: len(serving(server, "scaled")) == 1)
    deployment = server.get("/deployments/scaled")
    assert (deployment["replicas"], deployment["ready"], deployment["resources"]) == (1, 1, {"memory": "3Gi"})
    assert deployment["revision"] == 1
    assert server.predict("scaled", rows).status_code == 200
    # a bound that is too small holds at once for what runs already, and the reason is told
    server.call("PUT", "/deployments/scaled", json={"version": 1, "resources": {"memory": "10Mi"}})
    crashed = until(lambda: [e for e in server.get("/deployments/scaled/events")["items"] if e["reason"] == "Crashed"])
    assert "memory" in crashed[0]["message"]
    assert until(lambda: server.get("/deployments/scaled")["code"]) == "out_of_memory"
    server.call("PUT", "/deployments/scaled", json={"version": 1, "resources": {"memory": "3Gi"}})
    until(lambda: server.get("/deployments/scaled")["ready"] == 1 and not server.get("/deployments/scaled")["code"])
    assert server.predict("scaled", rows).status_code == 200


def test_a_process_that_dies_is_started_again(server: Home, model: Model, rows: Rows, until: Until) -> None:
    server.upload(model(1), "mortal.txt", sample=rows)
    for _ in range(2):
        killed = serving(server, "mortal")[0].pid
        os.kill(killed, signal.SIGKILL)
        until(lambda killed=killed: [p for p in serving(server, "mortal") if p.pid != killed])
        until(lambda: server.predict("mortal", rows).status_code == 200)
    reasons = [event["reason"] for event in server.get("/deployments/mortal/events")["items"]]
    assert reasons.count("Crashed") >= 1
    assert server.get("/deployments/mortal")["state"] == "live"


def test_rollback_while_rolling_keeps_what_is_live(server: Home, model: Model, rows: Rows) -> None:
    server.upload(model(1), "undecided.txt", sample=rows)
    server.upload(model(2), "undecided.txt", sample=rows, wait=0)
    server.post("/deployments/undecided/rollback")
    deployment = server.settled("undecided")
    assert deployment["target"] == {"model": "undecided", "version": 1}
    assert deployment["wanted"] == deployment["target"]
    states = [each["state"] for each in server.get("/deployments/undecided/revisions")["items"]]
    assert states.count("live") == 1
    assert "rolling" not in states
    assert server.predict("undecided", rows).headers["ekiben-version"] == "1"


def test_replace_stops_the_old_before_it_starts_the_new_and_returns_to_it(
    server: Home, model: Model, rows: Rows, until: Until
) -> None:
    server.upload(model(1), "large.txt", sample=rows)
    server.upload(model(2), "large.txt", sample=rows, deploy="false")
    server.upload(model(3), "large.txt", sample=rows, expected=[9.0] * 5, deploy="false")
    most, ended = 0, threading.Event()

    def count() -> None:
        nonlocal most
        while not ended.is_set():
            most = max(most, len(serving(server, "large")))

    counting = threading.Thread(target=count)
    counting.start()
    try:
        server.call("PUT", "/deployments/large", json={"version": 2, "strategy": "replace"})
        assert until(lambda: server.predict("large", rows).headers.get("ekiben-version") == "2")
        server.settled("large")
        server.call("PUT", "/deployments/large", json={"version": 3, "strategy": "replace"})
        deployment = server.settled("large", "rolled_back")
        until(lambda: server.predict("large", rows).headers.get("ekiben-version") == "2")
    finally:
        ended.set()
        counting.join()
    assert most == 1
    assert deployment["code"] == "golden_sample_failed"


def test_delete_while_rolling_and_make_again(server: Home, model: Model, rows: Rows, until: Until) -> None:
    server.upload(model(1), "phoenix.txt", sample=rows)
    server.upload(model(2), "phoenix.txt", sample=rows, wait=0)
    server.call("DELETE", "/deployments/phoenix", 204)
    assert server.predict("phoenix", rows).status_code == 404
    until(lambda: not serving(server, "phoenix"), lambda: str(serving(server, "phoenix")))
    until(lambda: server.predict("phoenix", rows).status_code == 404)
    assert server.get("/models/phoenix/versions/1")["state"] != "live"
    server.call("PUT", "/deployments/phoenix", json={"version": 1})
    assert server.settled("phoenix")["target"]["version"] == 1
    revisions = server.get("/deployments/phoenix/revisions")["items"]
    assert [each["state"] for each in revisions].count("live") == 1
    until(lambda: len(serving(server, "phoenix")) == 1)


def test_a_build_that_failed_for_the_machine_is_tried_anew_when_asked_again(home: Home, model: Model) -> None:
    """The second time finds the machine mended, and not the first time's failure."""
    home.start(build_attempts="1")
    (home.path / "bentos").unlink()
    (home.path / "bentos").write_text("no folder")
    failed = home.upload(model(1))
    assert failed["state"] == "failed"
    (home.path / "bentos").unlink()
    again = home.upload(model(1), status=200)
    assert again["version"] == 1
    assert again["state"] == "live", again


def test_caches_that_were_deleted_are_built_again(home: Home, model: Model, rows: Rows, until: Until) -> None:
    home.start()
    home.upload(model(1), sample=rows)
    home.stop()
    (home.path / "bentos").unlink()
    home.start()
    until(lambda: home.predict("churn", rows).status_code == 200, home.log)
    assert len(home.rows("SELECT id FROM builds")) == 1
    shutil.rmtree(home.path / "bentos")


def test_followers_of_logs_do_not_hold_up_the_service(server: Home, model: Model, rows: Rows, until: Until) -> None:
    server.upload(model(1), "watched.txt", sample=rows)
    version = server.upload(model(6), "watched2.txt", sample=rows, wait=0)
    connections = []
    try:
        for _ in range(60):
            connection = socket.create_connection(("127.0.0.1", urlsplit(server.url).port))
            request = "GET /deployments/watched/logs?follow=true HTTP/1.1\r\nHost: localhost\r\n\r\n"
            connection.sendall(request.encode())
            connections.append(connection)
        for connection in connections:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        with server.http(timeout=20) as client:
            for _ in range(20):
                assert client.get("/models").status_code == 200
                assert client.post("/inference/watched/predict", json={"inputs": rows}).status_code == 200
            build = client.get(version["logs"] + "?follow=true", timeout=240)  # waits for a build that is queued; ends
        assert build.status_code == 200
        # its process has ended; the control loop sees that in a moment
        until(lambda: server.get(f"/builds/{version['build']}")["state"] == "succeeded")
        assert server.get(f"/builds/{version['build']}")["attempts"] == 1
    finally:
        for connection in connections:
            connection.close()
    # the clients have left: nobody keeps the log files open
    process = psutil.Process(server.process.pid)
    until(lambda: not [file for file in process.open_files() if file.path.endswith(".log") and "deploy" in file.path])


def test_a_followed_log_goes_on_through_a_rollout_and_a_crash_until_the_deployment_is_deleted(
    server: Home, model: Model, rows: Rows, until: Until
) -> None:
    server.upload(model(1), "followed.txt", sample=rows)
    seen: list[str] = []

    def follow() -> None:
        with (
            server.http(timeout=None) as client,
            client.stream("GET", "/deployments/followed/logs?follow=true") as answer,
        ):
            for line in answer.iter_lines():
                seen.append(line)

    follower = threading.Thread(target=follow)
    follower.start()
    until(lambda: [line for line in seen if "golden sample" in line], lambda: str(seen))
    server.upload(model(2), "followed.txt", sample=rows)
    until(lambda: [line for line in seen if line.startswith("==> revision 2, ")], lambda: str(seen))
    until(lambda: len(serving(server, "followed")) == 1)
    before = serving(server, "followed")[0].pid
    os.kill(before, signal.SIGKILL)
    until(lambda: server.predict("followed", rows).status_code == 200)
    until(lambda: len([line for line in seen if line.startswith("==> revision 2, ")]) == 2, lambda: str(seen))
    assert follower.is_alive()
    server.call("DELETE", "/deployments/followed", 204)
    follower.join(60)
    assert not follower.is_alive(), "there is nothing left to follow"


def test_bodies_of_calls_are_bounded_however_they_come(server: Home, model: Model, rows: Rows, home: Home) -> None:
    home.start(inference_body="100000")
    home.upload(model(1), sample=rows)
    with home.http() as client:
        url, json_type = "/inference/churn/predict", {"content-type": "application/json"}
        declared = client.post(url, content=b" " * 100001, headers=json_type)
        assert (declared.status_code, declared.json()["code"]) == (413, "body_too_large")
        chunked = client.post(url, content=(b" " * 10000 for _ in range(20)), headers=json_type)
        assert (chunked.status_code, chunked.json()["code"]) == (413, "body_too_large")
        pieces = iter([b'{"inputs": [{"age": 1, "income": 2, ', b'"visits": 3}]}'])
        assert client.post(url, content=pieces, headers=json_type).status_code == 200
        both = {"content-type": "application/json", "connection": "x-private", "x-private": "1"}
        assert client.post(url, json={"inputs": rows}, headers=both).status_code == 200


def test_large_bodies_stream_through(server: Home, model: Model, rows: Rows) -> None:
    server.upload(model(1), "wide.txt", sample=rows)
    many = (rows * 4000)[:20000]
    answer = server.predict("wide", many)
    assert answer.status_code == 200, answer.text[:500]
    assert len(answer.json()["outputs"]) == 20000


def test_clients_that_leave_are_no_errors_of_the_service(home: Home, model: Model, rows: Rows, until: Until) -> None:
    home.start()
    home.upload(model(1), sample=rows)
    address = ("127.0.0.1", urlsplit(home.url).port)
    for head in (b"Content-Length: 1000\r\n\r\n{", b"Transfer-Encoding: chunked\r\n\r\n5\r\n{\"inp\r\n",
                 b"Content-Length: 9000000\r\n\r\n{"):  # fmt: skip
        for path in (b"/inference/churn/predict", b"/models?name=a"):
            with socket.create_connection(address) as connection:
                connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\n" + head)
    assert home.predict("churn", rows).status_code == 200
    until(lambda: len(home.objects()) == 1)
    home.stop()
    assert "Traceback" not in home.log()
    assert '"level": "error"' not in home.log()


def test_other_methods_say_what_there_is(server: Home) -> None:
    with server.http() as client:
        answer = client.patch("/models")
        assert (answer.status_code, answer.json()["code"]) == (405, "method_not_allowed")
        assert answer.headers["allow"]
        assert client.head("/models").content == b""
        assert client.get("/nothing/here").json()["code"] == "not_found"
        for path in (f"/models/a/versions/{10**30}", "/models/a/versions/0", "/models/a/versions/x"):
            assert 400 <= client.get(path).status_code < 500
        large = client.put("/deployments/a", json={"version": 10**30})
        assert large.status_code == 422


def test_a_model_that_is_not_there_yet_says_so(home: Home, model: Model) -> None:
    home.start()
    with home.http() as client:
        nothing = client.post("/inference/predict", json={"inputs": []})
        assert (nothing.status_code, nothing.json()["code"]) == (404, "no_default_deployment")
        home.upload(model(1), wait=0)
        answer = client.post("/inference/churn/predict", json={"inputs": []})
        if answer.status_code != 200 and answer.status_code != 422:
            assert (answer.status_code, answer.json()["code"]) == (503, "deployment_pending")
            assert answer.headers["retry-after"]
            assert "build" in answer.json()["detail"]


def test_a_stop_while_something_runs_ends_everything(home: Home, model: Model, rows: Rows, until: Until) -> None:
    home.start()
    home.upload(model(1), sample=rows)
    home.upload(model(2), sample=rows, wait=0)
    home.stop()
    until(lambda: not home.processes())
    assert home.rows("SELECT count(*) FROM versions") == [(2,)]
    home.start()
    until(lambda: home.predict("churn", rows).headers.get("ekiben-version") == "2", home.log)
    assert isinstance(home.predict("churn", rows), httpx.Response)
