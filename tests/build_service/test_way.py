"""The way of a model, from its bytes to an endpoint, and through its versions."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

Home = Any  # tests/build_service/conftest.py, which tests cannot import
Model = Callable[..., bytes]
Rows = list[dict[str, float]]


def test_a_file_goes_in_and_a_verified_endpoint_comes_out(
    server: Home, model: Model, rows: Rows, outputs: Callable[[int], list[float]]
) -> None:
    sample = {"inputs": rows, "outputs": outputs(1)}  # outputs inside the sample
    version = server.upload(model(1), "first.txt", sample=sample, labels={"auc": "0.91", "team": "growth"})
    assert (version["model"], version["version"], version["state"]) == ("first", 1, "live")
    assert version["kind"] == "lightgbm"
    assert version["checked"] == {"verified": "expected", "rows": 5, "matched": 5}
    assert version["labels"] == {"auc": "0.91", "team": "growth"}
    assert version["url"] == f"{server.url}/inference/first/predict"
    assert version["reason"] is None
    assert version["seconds"]["build"] is not None

    by_name, default = server.predict("first", rows), server.call("POST", "/inference/predict", json={"inputs": rows})
    assert by_name.status_code == 200
    assert by_name.json() == default
    assert by_name.json()["outputs"] == pytest.approx(outputs(1), rel=1e-9)
    assert (by_name.headers["ekiben-model"], by_name.headers["ekiben-version"]) == ("first", "1")
    assert by_name.headers["x-request-id"]

    assert server.get("/inference/first/predict/test")["verified"] == "expected"
    document = server.get("/inference/first/docs.json")
    assert [entry["url"] for entry in document["servers"]] == ["/inference/first"]
    assert server.get("/inference/first/metadata")["labels"]["team"] == "growth"
    with server.http() as client:
        assert "swagger" in client.get("/inference/first/docs").text.lower()
        assert client.get("/inference/first/metrics").status_code == 404


def test_the_same_content_again_is_the_same_version(server: Home, model: Model, rows: Rows) -> None:
    first = server.upload(model(2), "again.txt", sample=rows)
    before = server.objects()
    second = server.upload(model(2), "again.txt", status=200, sample=rows)
    assert (second["version"], second["digest"], second["build"]) == (1, first["digest"], first["build"])
    assert server.objects() == before
    assert len(server.get("/deployments/again/revisions")["items"]) == 1


def test_a_raw_body_is_an_upload_too(server: Home, model: Model, rows: Rows) -> None:
    query = {"filename": "raw.txt", "wait": "200", "sample": json.dumps(rows[:2])}
    version = server.post("/models", 201, params=query, content=model(3))
    assert (version["model"], version["state"], version["verified"]) == ("raw", "live", "sample")
    again = server.post("/models", 200, params=query, content=iter([model(3)[:100], model(3)[100:]]))  # chunked
    assert again["digest"] == version["digest"]


def test_a_version_rolls_with_no_failed_call_and_back_without_a_build(
    server: Home, model: Model, rows: Rows, outputs: Callable[[int], list[float]]
) -> None:
    server.upload(model(4), "rolled.txt", sample=rows)
    right = {"1": outputs(4), "2": outputs(5)}
    ended, failures, seen = threading.Event(), [], []

    def call() -> None:
        with server.http() as client:
            while not ended.is_set():
                try:
                    answer = client.post("/inference/rolled/predict", json={"inputs": rows})
                    number = answer.headers.get("ekiben-version", "?")
                    if answer.status_code != 200 or answer.json()["outputs"] != pytest.approx(right[number]):
                        failures.append(answer.text)
                    seen.append(number)
                except httpx.HTTPError as error:
                    failures.append(repr(error))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    try:
        second = server.upload(model(5), "rolled.txt", sample=rows)
        assert (second["version"], second["state"]) == (2, "live")
        builds = server.rows("SELECT id FROM builds")
        server.post("/deployments/rolled/rollback")
        deployment = server.settled("rolled")
    finally:
        ended.set()
        for caller in callers:
            caller.join()
    assert failures == []
    assert {"1", "2"} == set(seen)
    assert deployment["target"] == {"model": "rolled", "version": 1}
    assert server.predict("rolled", rows).headers["ekiben-version"] == "1"
    assert server.rows("SELECT id FROM builds") == builds

    revisions = server.get("/deployments/rolled/revisions")["items"]
    assert [(each["revision"], each["version"], each["state"], each["rollback_of"]) for each in revisions] == [
        (3, 1, "live", 2), (2, 2, "superseded", None), (1, 1, "superseded", None),
    ]  # fmt: skip
    stored = server.rows("SELECT number, build_id FROM revisions WHERE deployment = 'rolled' ORDER BY number")
    assert stored[0][1] == stored[2][1] != stored[1][1]
    story = [event["reason"] for event in reversed(server.get("/deployments/rolled/events")["items"])]
    assert story == ["Rolling", "Live", "Rolling", "Live", "RollbackAsked", "Rolling", "Live"]
    assert server.get("/models/rolled/versions/2")["state"] == "superseded"
    # and forward again, by its number
    again = server.post("/deployments/rolled/rollback", json={"revision": 2})
    assert again["wanted"] == {"model": "rolled", "version": 2}
    assert server.settled("rolled")["target"]["version"] == 2


def test_deploy_false_builds_and_serves_nothing(server: Home, model: Model) -> None:
    version = server.upload(model(6), "quiet.txt", deploy="false")
    assert version["state"] == "built"
    assert server.get("/deployments/quiet", 404)["code"] == "deployment_not_found"
    assert server.predict("quiet", [[1, 2, 3]]).json()["code"] == "deployment_not_found"
    made = server.call("PUT", "/deployments/quiet", json={"version": 1})
    assert made["state"] in ("pending", "rolling", "live")
    assert server.settled("quiet")["target"] == {"model": "quiet", "version": 1}


def test_a_second_model_does_not_take_over_the_default(home: Home, model: Model, rows: Rows) -> None:
    home.start()
    home.upload(model(1), "one.txt")
    home.upload(model(2), "two.txt")
    assert home.get("/deployments/one")["default"]
    assert not home.get("/deployments/two")["default"]
    with home.http() as client:
        answer = client.post("/inference/predict", json={"inputs": rows})
        assert answer.headers["ekiben-model"] == "one"
        home.call("PUT", "/deployments/two", json={"version": 1, "default": True})
        answer = client.post("/inference/predict", json={"inputs": rows})
        assert answer.headers["ekiben-model"] == "two"
        # without the default one, the other answers
        home.call("DELETE", "/deployments/two", 204)
        answer = client.post("/inference/predict", json={"inputs": rows})
        assert answer.headers["ekiben-model"] == "one"


def test_a_gpu_that_is_not_there_is_said_before_anything_rolls(server: Home) -> None:
    problem = server.call("PUT", "/deployments/first", 409, json={"version": 1, "resources": {"gpu": 1}})
    assert (problem["code"], problem["field"]) == ("insufficient_gpu", "resources.gpu")
    assert problem["detail"].startswith("0 free of 1")


def test_an_autoscaler_is_refused_on_one_machine(server: Home) -> None:
    body = {"version": 1, "autoscale": {"max": 3}}
    problem = server.call("PUT", "/deployments/first", 409, json=body)
    assert (problem["code"], problem["field"]) == ("autoscale_unsupported", "autoscale")
    body = {"version": 1, "replicas": 3, "autoscale": {"max": 3}}
    assert server.call("PUT", "/deployments/first", 422, json=body)["code"] == "bad_autoscale"
    assert server.get("/deployments/first")["autoscale"] is None


@pytest.mark.parametrize("body", [{"version": 1, "weights": 3}, {"version": 1, "resources": {"disk": "1Gi"}}])
def test_unknown_fields_of_a_deployment_are_refused(server: Home, body: dict[str, Any]) -> None:
    problem = server.call("PUT", "/deployments/first", 422, json=body)
    assert problem["code"] == "unknown_field"
    assert problem["field"].split(".")[-1] in ("weights", "disk")


def test_what_is_served_is_not_deleted_and_numbers_are_not_used_again(home: Home, model: Model, rows: Rows) -> None:
    home.start()
    home.upload(model(1), sample=rows)
    assert home.call("DELETE", "/models/churn/versions/1", 409)["code"] == "version_in_use"
    assert home.call("DELETE", "/models/churn", 409)["code"] == "version_in_use"
    home.upload(model(2), sample=rows)
    home.call("DELETE", "/models/churn/versions/1", 204)
    assert len(home.objects()) == 1
    assert home.get("/models/churn/versions/1", 404)["code"] == "version_not_found"
    assert home.post("/deployments/churn/rollback", 409)["code"] == "nothing_to_roll_back_to"
    assert home.post("/deployments/churn/rollback", 409, json={"revision": 1})["code"] == "version_deleted"
    again = home.upload(model(1), sample=rows)
    assert (again["version"], again["state"]) == (3, "live")
    home.call("DELETE", "/deployments/churn", 204)
    home.call("DELETE", "/models/churn", 204)
    assert home.objects() == set()
    assert home.get("/models")["items"] == []
    assert home.upload(model(1), sample=rows)["version"] == 4


def test_files_come_back_as_they_were_uploaded(server: Home, model: Model) -> None:
    server.upload(model(8), "kept.txt", deploy="false", wait=0)
    with server.http() as client:
        answer = client.get("/models/kept/versions/1/files/kept.txt")
    assert answer.content == model(8)
    assert answer.headers["content-length"] == str(len(model(8)))
    assert server.get("/models/kept/versions/1/files/other.txt", 404)["code"] == "file_not_found"


def test_who_leaves_is_not_ready_and_answers_until_proxies_have_heard(home: Home, until: Callable[..., Any]) -> None:
    home.start(leave_seconds="3600")
    assert home.process is not None
    home.process.send_signal(signal.SIGTERM)
    with home.http() as client:
        until(lambda: client.get("/readyz").status_code == 503)
        assert client.get("/models").status_code == 200
        assert client.get("/livez").status_code == 200
    home.stop()  # whoever asks again has no patience
