"""The ranker: better than popularity, near what can be learnt, and a service that says what is wrong."""

from __future__ import annotations

import copy
import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import lightgbm as lgb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from bentos.ranker import train as training
from bentos.ranker.features import matrix
from bentos.ranker.ranking import MAX_CANDIDATES, Ranker
from bentos.serving import ModelFolder, StartError
from bentos.training.outcome import Outcome, Progress

QUIET = Progress.start(quiet=True)


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return training.train(training.Settings.small(), QUIET)[0]


@pytest.fixture(scope="module")
def model(outcome: Outcome, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return outcome.write(tmp_path_factory.mktemp("ranker") / "model")


@pytest.fixture(scope="module")
def ranker(model: ModelFolder) -> Ranker:
    return Ranker.load(model.path())


@pytest.fixture(scope="module")
def client(model: ModelFolder) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(model.root))
        from bentos.ranker.service import Ranker as Service

        # Prometheus' registry is one per process, and takes each of BentoML's metrics once
        patch.setitem(Service.config, "metrics", {"enabled": False})
        with TestClient(Service.to_asgi(), raise_server_exceptions=False) as client:
            yield client


@pytest.fixture
def body(outcome: Outcome) -> dict[str, Any]:
    return copy.deepcopy(outcome.sample)


def test_the_learnt_order_beats_popularity_similarity_and_raw_clicks(outcome: Outcome) -> None:
    found = outcome.metrics
    assert found["ndcg_10"] > found["ndcg_10_popularity"] + 0.3
    assert found["ndcg_10"] > found["ndcg_10_similarity"] + 0.1
    assert found["ndcg_10"] > found["ndcg_10_biased_clicks"] + 0.04
    assert found["ndcg_10_random"] < found["ndcg_10_popularity"]


def test_the_learnt_order_is_near_the_true_one(outcome: Outcome) -> None:
    """Graded: of the way from random to perfect, at least two thirds; and near a model told the true grades."""
    found = outcome.metrics
    assert found["ndcg_10_oracle"] == pytest.approx(1.0)
    way = (found["ndcg_10"] - found["ndcg_10_random"]) / (1.0 - found["ndcg_10_random"])
    assert way > 0.67
    assert found["ndcg_10"] > found["ndcg_10_told_the_grades"] - 0.08
    assert found["spearman_utility"] > 0.7


def test_the_regression_variant_learns_too_and_keeps_its_own_model() -> None:
    outcome, _ = training.train(replace(training.Settings.small(), variant="regression", queries=1500), QUIET)
    assert outcome.metrics["ndcg_10"] == outcome.metrics["ndcg_10_regression"]
    assert outcome.metrics["ndcg_10"] > outcome.metrics["ndcg_10_biased_clicks"] + 0.04
    assert b"objective=poisson" in outcome.files["ranker.txt"]


def test_the_same_seed_gives_the_same_bytes() -> None:
    few = training.Settings(queries=400, rounds=20, min_leaf=50)
    first, second = (training.train(few, QUIET)[0] for _ in range(2))
    assert first.files == second.files
    assert first.sample == second.sample
    assert training.train(replace(few, seed=8), QUIET)[0].files != first.files


def test_a_click_makes_a_list_that_weighs_as_its_place_is_overlooked() -> None:
    from bentos.ranker.clicks import Log

    features = np.arange(12, dtype=np.float64).reshape(2, 3, 2)
    log = Log(
        np.array([[2, 0, 1], [0, 1, 2]]), np.array([[True, False, True], [False, False, False]]), np.zeros(2, int)
    )
    rows = training.click_lists(features, log, np.array([1.0, 0.5, 0.25]))
    assert rows.group is not None
    assert rows.group.tolist() == [3, 3]
    assert rows.label.tolist() == [0, 0, 1, 0, 1, 0]  # place 1 held candidate 2, place 3 candidate 1
    assert rows.weight.tolist() == [1, 1, 1, 4, 4, 4]
    pointwise = training.debiased_labels(features, log, np.array([1.0, 0.5, 0.25]))
    assert pointwise.label.tolist() == [0, 4, 1, 0, 0, 0]
    assert pointwise.weight.tolist() == [0.5, 0.25, 1, 1, 0.5, 0.25]


def test_the_service_answers_what_the_plain_booster_says(
    client: TestClient, model: ModelFolder, ranker: Ranker, body: dict[str, Any]
) -> None:
    booster = lgb.Booster(model_file=str(model.path()))
    scores = booster.predict(matrix(ranker.columns, ranker.parse(**body)))
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    ranking = answer.json()["ranking"]
    by_id = {entry["id"]: entry["score"] for entry in ranking}
    assert [by_id[c["id"]] for c in body["candidates"]] == list(np.asarray(scores))
    assert [e["score"] for e in ranking] == sorted(by_id.values(), reverse=True)


def test_the_golden_sample_matches(client: TestClient, outcome: Outcome, body: dict[str, Any]) -> None:
    assert client.post("/predict", json=body).json() == outcome.expected
    test = client.get("/predict/test").json()
    assert (test["verified"], test["matched"], test["rows"]) == ("expected", 20, 20)


def test_the_schema_and_features_are_in_the_metadata(client: TestClient, ranker: Ranker) -> None:
    said = client.get("/metadata").json()
    assert said["kind"] == "ranker"
    assert said["details"]["features"] == ranker.booster.feature_name()
    assert "similarity" in said["input"]["properties"]["candidates"]["items"]["required"]
    assert client.get("/label").status_code == 404


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_the_request_does_not_change_scores(seed: int, ranker: Ranker, outcome: Outcome) -> None:
    body = copy.deepcopy(outcome.sample)
    np.random.default_rng(seed).shuffle(body["candidates"])
    scores = {entry["id"]: entry["score"] for entry in ranker.answer(body)["ranking"]}
    assert scores == {entry["id"]: entry["score"] for entry in outcome.expected["ranking"]}


def test_a_candidate_alone_gets_the_score_it_gets_in_company(ranker: Ranker, outcome: Outcome) -> None:
    body = copy.deepcopy(outcome.sample)
    for candidate in body["candidates"]:
        alone = ranker.answer({**body, "candidates": [candidate]})["ranking"][0]
        assert alone in outcome.expected["ranking"]


def test_equal_candidates_stay_in_the_order_of_the_request(client: TestClient, body: dict[str, Any]) -> None:
    one = body["candidates"][0]
    body["candidates"] = [{**one, "id": name} for name in ("z", "a", "m")]
    assert [e["id"] for e in client.post("/predict", json=body).json()["ranking"]] == ["z", "a", "m"]


def test_an_unknown_user_and_unknown_values_are_fine(client: TestClient, body: dict[str, Any]) -> None:
    body["candidates"][0]["similarity"] = None
    for user in ({}, None, {"mobile": True}, {"taste_cute": None}):
        assert client.post("/predict", json={**body, "user": user}).status_code == 200
    del body["user"]
    assert client.post("/predict", json=body).status_code == 200


def test_the_most_candidates_are_ranked_and_one_more_is_refused(client: TestClient, body: dict[str, Any]) -> None:
    one = body["candidates"][0]
    many = [{**one, "id": str(i)} for i in range(MAX_CANDIDATES + 1)]
    assert len(client.post("/predict", json={**body, "candidates": many[:-1]}).json()["ranking"]) == MAX_CANDIDATES
    refused = client.post("/predict", json={**body, "candidates": many})
    assert (refused.status_code, refused.json()["code"]) == (422, "too_many_candidates")


BAD: dict[str, tuple[Any, str, str]] = {
    "no candidates": (lambda b: b.update(candidates=[]), "no_candidates", "candidates"),
    "candidates no list": (lambda b: b.update(candidates={"a": 1}), "invalid_field", "candidates"),
    "candidate no object": (lambda b: b["candidates"].append(7), "invalid_field", "candidates[20]"),
    "missing feature": (lambda b: b["candidates"][3].pop("likes"), "missing_field", "candidates[3].likes"),
    "missing id": (lambda b: b["candidates"][3].pop("id"), "missing_field", "candidates[3].id"),
    "missing tags": (lambda b: b["candidates"][0].pop("tags"), "missing_field", "candidates[0].tags"),
    "missing phrase": (lambda b: b.pop("phrase"), "missing_field", "phrase"),
    "missing candidates": (lambda b: b.pop("candidates"), "missing_field", "candidates"),
    "id no text": (lambda b: b["candidates"][1].update(id=7), "invalid_field", "candidates[1].id"),
    "unknown feature": (lambda b: b["candidates"][2].update(lykes=1), "unknown_field", "candidates[2].lykes"),
    "unknown field": (lambda b: b.update(usr={}), "unknown_field", "usr"),
    "unknown user field": (lambda b: b.update(user={"age": 3}), "unknown_field", "user.age"),
    "user no object": (lambda b: b.update(user="me"), "invalid_field", "user"),
    "text for a number": (lambda b: b["candidates"][0].update(likes="9"), "invalid_field", "candidates[0].likes"),
    "list for a number": (lambda b: b["candidates"][0].update(likes=[9]), "invalid_field", "candidates[0].likes"),
    "NaN": (lambda b: b["candidates"][0].update(likes=float("nan")), "invalid_field", "candidates[0].likes"),
    "infinity": (lambda b: b["candidates"][0].update(likes=float("-inf")), "invalid_field", "candidates[0].likes"),
    "beyond floats": (lambda b: b["candidates"][0].update(likes=10**400), "invalid_field", "candidates[0].likes"),
    "user NaN": (lambda b: b.update(user={"mobile": float("nan")}), "invalid_field", "user.mobile"),
    "tags no list": (lambda b: b["candidates"][0].update(tags="cat"), "invalid_field", "candidates[0].tags"),
    "tags of numbers": (lambda b: b["candidates"][0].update(tags=[1]), "invalid_field", "candidates[0].tags"),
    "duplicate id": (lambda b: b["candidates"].append(b["candidates"][4]), "duplicate_id", "candidates[20].id"),
    "phrase no text": (lambda b: b.update(phrase=3), "invalid_field", "phrase"),
    "empty phrase": (lambda b: b.update(phrase="  "), "empty_phrase", "phrase"),
    "endless phrase": (lambda b: b.update(phrase="cat " * 1000), "phrase_too_long", "phrase"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_and_the_field_is_named(name: str, client: TestClient, body: dict[str, Any]) -> None:
    change, code, field = BAD[name]
    change(body)
    answer = client.post("/predict", content=json.dumps(body), headers={"content-type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert answer.headers["content-type"].startswith("application/problem+json")
    problem = answer.json()
    assert (problem["code"], problem["field"]) == (code, field)
    assert problem["hint"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"cat"', b'{"phrase": "\\ud800"}', b"\xff\xfe"])
def test_a_body_that_is_no_request_is_refused(content: bytes, client: TestClient) -> None:
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500
    assert answer.json()["field"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(value=JSON, where=st.sampled_from(["phrase", "user", "candidates", "candidate", "feature", "tags", "id"]))
def test_no_input_whatever_is_a_server_error(value: Any, where: str, client: TestClient, outcome: Outcome) -> None:
    body = copy.deepcopy(outcome.sample)
    if where in body:
        body[where] = value
    elif where == "candidate":
        body["candidates"][0] = value
    else:
        body["candidates"][0]["likes" if where == "feature" else where] = value
    content = json.dumps(body).encode()
    answer = client.post("/predict", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 422), answer.text
    assert answer.status_code == 200 or answer.json()["field"]


def test_a_model_of_other_columns_is_served_by_its_own_names() -> None:
    rng = np.random.default_rng(0)
    features = rng.random((200, 3))
    data = lgb.Dataset(features, features[:, 0], feature_name=["stars", "user_age", "phrase_words"])
    booster = lgb.train({"objective": "regression", "verbosity": -1, "min_data_in_leaf": 5}, data, 10)
    ranker = Ranker(booster)
    rows = [{"id": "low", "stars": 0.1}, {"id": "high", "stars": 0.9}]
    found = ranker.answer({"phrase": "cat", "user": {"age": 0.4}, "candidates": rows})
    assert [entry["id"] for entry in found["ranking"]] == ["high", "low"]


def test_files_that_are_no_ranker_are_refused_with_a_reason(tmp_path: Path) -> None:
    text = tmp_path / "model.txt"
    text.write_text("tree\nversion=v4\n")
    with pytest.raises(StartError) as no_model:
        Ranker.load(text)
    assert no_model.value.code == "model_load_failed"
    rng = np.random.default_rng(0)
    data = lgb.Dataset(rng.random((90, 2)), rng.integers(0, 3, 90))
    booster = lgb.train({"objective": "multiclass", "num_class": 3, "verbosity": -1}, data, 3)
    booster.save_model(str(text))
    with pytest.raises(StartError, match="3 values a row"):
        Ranker.load(text)


def test_the_command_trains_writes_logs_and_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}"
    out = tmp_path / "model"
    arguments = ["--small", "--queries", "400", "--rounds", "20", "--out", str(out), "--tracking-uri", store]
    assert training.main(arguments) == 0
    printed = capsys.readouterr()
    assert "by popularity (likes)" in printed.out
    assert f"file=@{out / 'files' / 'ranker.txt'}" in printed.out
    assert "trees" in printed.err
    folder = ModelFolder.read(out)
    folder.verify()
    assert (folder.kind, folder.format, folder.files) == ("ranker", "lightgbm-text", ("ranker.txt",))

    from mlflow import MlflowClient

    runs = MlflowClient(store)
    experiment = runs.get_experiment_by_name("ekiben-ranker")
    assert experiment is not None
    (run,) = runs.search_runs([experiment.experiment_id])
    assert run.data.params["variant"] == "lambdamart"
    assert run.data.metrics["ndcg_10"] > run.data.metrics["ndcg_10_random"]
    assert run.data.tags["ekiben.digest"] == folder.digest
    assert [each.path for each in runs.list_artifacts(run.info.run_id, "plots")] == ["plots/ndcg_10.png"]
    assert run.inputs.dataset_inputs[0].dataset.digest
    got = runs.download_artifacts(run.info.run_id, "model/files/ranker.txt", str(tmp_path))
    assert Path(got).read_bytes() == folder.path().read_bytes()


def test_the_command_never_writes_over_something_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    arguments = ["--small", "--queries", "300", "--rounds", "5", "--out", str(tmp_path), "--no-mlflow", "--quiet"]
    assert training.main(arguments) == 2
    assert (tmp_path / "thesis.txt").read_text() == "mine"


class _Service(http.server.BaseHTTPRequestHandler):
    """A real HTTP server that keeps what it was sent, to see the upload as a service does."""

    seen: list[tuple[str, dict[str, str], bytes]]
    status: int

    def do_POST(self) -> None:
        length = int(self.headers["content-length"])
        type(self).seen.append((self.path, dict(self.headers.items()), self.rfile.read(length)))
        said = {"model": "ranker", "version": 1, "state": "live", "url": "http://x/inference/ranker/predict"}
        if self.status >= 400:
            said = {"code": "unauthorized", "detail": "this service needs a token", "hint": "set EKIBEN_TOKEN"}
        content = json.dumps(said).encode()
        self.send_response(self.status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""


@pytest.mark.parametrize("status", [201, 401])
def test_register_uploads_the_model_with_sample_expected_values_and_metrics(
    status: int, outcome: Outcome, model: ModelFolder
) -> None:
    from bentos.training.registration import RegistrationError, register

    handler = type("Handler", (_Service,), {"seen": [], "status": status})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            if status == 201:
                assert register(outcome, model, url, "secret")["state"] == "live"
            else:
                with pytest.raises(RegistrationError, match="needs a token"):
                    register(outcome, model, url, None)
        finally:
            server.shutdown()
            thread.join()
    ((path, headers, content),) = handler.seen
    assert httpx.URL(path).path == "/models"
    assert headers.get("authorization") == ("Bearer secret" if status == 201 else None)
    for field in (b'name="file"; filename="ranker.txt"', b'name="sample"', b'name="expected"', b'name="kind"'):
        assert field in content
    assert outcome.files["ranker.txt"] in content
    assert f'"ndcg_10": "{outcome.metrics["ndcg_10"]:.4f}"'.encode() in content


def test_register_says_when_nothing_listens(outcome: Outcome, model: ModelFolder) -> None:
    from bentos.training.registration import RegistrationError, register

    with pytest.raises(RegistrationError, match="cannot be reached"):
        register(outcome, model, "http://127.0.0.1:9", None)
