"""Every generic kind answers alike, wherever it runs: in process, under `bentoml serve`, and under the wrapper."""

from __future__ import annotations

import importlib
import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from bentos.serving.answers import MAX_ROWS

BENTOS = Path(importlib.import_module("bentos").__file__ or "").parent
BODY_LIMIT = 1 << 20


@dataclass(frozen=True)
class Kind:
    name: str
    service: str
    named: bool
    """Rows may be objects by column name, whose first column is a number and second a category."""
    missing: bool
    """null stands for a missing number."""
    classes: list[Any] | None


KINDS = [
    Kind("lightgbm", "LightGBM", True, True, [0, 1]),
    Kind("xgboost", "XGBoost", True, True, None),
    Kind("onnx", "Onnx", False, False, None),
    Kind("sklearn", "Sklearn", True, True, ["adelie", "chinstrap", "gentoo"]),
]
PLACES = ["process", "bentoml", "wrapper"]


@dataclass(frozen=True)
class Running:
    kind: Kind
    place: str
    client: httpx.Client
    model: Path

    @property
    def sample(self) -> dict[str, Any]:
        return json.loads((self.model / "sample.json").read_text())  # type: ignore[no-any-return]

    def post(self, body: Any, content_type: str = "application/json") -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.client.post("/predict", content=content, headers={"content-type": content_type})


@pytest.fixture(scope="module", params=[(k, p) for k in KINDS for p in PLACES], ids=lambda p: f"{p[0].name}-{p[1]}")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    kind, place = request.param
    root = tmp_path_factory.mktemp(kind.name)
    model = root / "model"
    importlib.import_module(f"bentos.{kind.name}.example").write(model)
    with {"process": _in_process, "bentoml": _bentoml_serve, "wrapper": _wrapper}[place](kind, model, root) as client:
        yield Running(kind, place, client, model)


@contextmanager
def _in_process(kind: Kind, model: Path, root: Path) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(model))
        service = getattr(importlib.import_module(f"bentos.{kind.name}.service"), kind.service)
        # Prometheus' registry is one per process, and takes each of BentoML's metrics once
        patch.setitem(service.config, "metrics", {"enabled": False})
        with TestClient(service.to_asgi(), raise_server_exceptions=False) as client:
            yield client


@contextmanager
def _bentoml_serve(kind: Kind, model: Path, root: Path) -> Iterator[httpx.Client]:
    port = _free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"BENTOML_HOME": str(root / "bentoml"), "EKIBEN_MODEL_DIR": str(model)}
    with _process(command, environment, BENTOS / kind.name, port, root) as client:
        yield client


@contextmanager
def _wrapper(kind: Kind, model: Path, root: Path) -> Iterator[httpx.Client]:
    port = _free_port()
    environment = {
        "EKIBEN_BENTO": str(BENTOS / kind.name),
        "EKIBEN_MODEL_DIR": str(model),
        "EKIBEN_MODEL_NAME": "shop",
        "EKIBEN_MODEL_VERSION": "7",
        "EKIBEN_HOST": "127.0.0.1",
        "EKIBEN_PORT": str(port),
        "EKIBEN_MAX_BODY_BYTES": str(BODY_LIMIT),
    }
    with _process([sys.executable, "-m", "bentos.serving"], environment, root, port, root) as client:
        yield client


@contextmanager
def _process(
    command: list[str], environment: dict[str, str], cwd: Path, port: int, root: Path
) -> Iterator[httpx.Client]:
    log = root / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, "BENTOML_DO_NOT_TRACK": "True", **environment},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            _wait(client, process, log)
            yield client
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            break
        try:
            if client.get("/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    pytest.fail(f"not ready:\n{log.read_text(errors='replace')[-4000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _problem(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["code"] == code, problem
    assert problem["status"] == status
    assert "Traceback" not in response.text
    assert "File " not in response.text
    return problem


def test_the_sample_gives_exactly_what_the_framework_predicts(running: Running) -> None:
    expected = json.loads((running.model / "expected.json").read_text())
    response = running.post(running.sample)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.json() == expected


def test_rows_may_be_arrays_in_column_order(running: Running) -> None:
    sample = running.sample["inputs"]
    schema = running.client.get("/metadata").json()["input"]["properties"]["inputs"]["items"]["anyOf"]
    if running.kind.named:
        names = list(schema[0]["properties"])
        arrays = [[row[name] for name in names] for row in sample]
    else:
        arrays = sample
        sample = [{"point": row} for row in sample]
    assert running.post({"inputs": arrays}).json() == running.post({"inputs": sample}).json()


def test_many_rows_are_answered_in_order(running: Running) -> None:
    inputs = running.sample["inputs"]
    once = running.post({"inputs": inputs}).json()["outputs"]
    many = running.post({"inputs": inputs * 40}).json()["outputs"]
    assert many == pytest.approx(once * 40, rel=1e-6) if isinstance(once[0], float) else len(many) == len(once) * 40


def test_the_golden_sample_can_be_asked_for(running: Running) -> None:
    body = running.client.get("/predict/test").json()
    assert (body["verified"], body["rows"], body["matched"]) == ("expected", 5, 5)
    assert body["input"] == running.sample
    assert len(body["output"]["outputs"]) == 5


def test_it_says_what_it_is(running: Running) -> None:
    body = running.client.get("/metadata").json()
    assert body["kind"] == running.kind.name
    assert body["digest"].startswith("sha256:")
    assert body["predict"] == "/predict"
    assert body["input"]["required"] == ["inputs"]
    assert running.client.get("/health").json()["status"] == "ok"
    if running.place == "wrapper":
        assert (body["name"], body["version"]) == ("shop", "7")
        assert body["checked"] == {"verified": "expected", "rows": 5, "matched": 5}


def test_classifiers_name_their_classes(running: Running) -> None:
    response = running.client.get("/label")
    if running.kind.classes is None:
        _problem(response, 404, "no_labels")
    else:
        assert response.json() == {"labels": running.kind.classes}


def test_the_documentation_shows_the_real_rows(running: Running) -> None:
    spec = running.client.get("/docs.json").json()
    body = spec["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]
    assert body["example"] == running.sample
    assert body["schema"] == running.client.get("/metadata").json()["input"]
    assert {"/health", "/metadata", "/predict/test"} <= set(spec["paths"])
    operation = spec["paths"]["/predict"]["post"]
    page = running.client.get("/docs")
    assert f'["operations", "{operation["tags"][0]}", "{operation["operationId"]}"]' in page.text  # opened at once
    assert page.headers["content-type"].startswith("text/html")
    assert running.client.get("/static_content/swagger-ui-bundle.js").status_code == 200


def test_probes_answer(running: Running) -> None:
    assert running.client.get("/livez").status_code == 200
    assert running.client.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        (b"{not json", 400, "invalid_json", "body"),
        (b'{"inputs": [{"\\ud800": 1}]}', 400, "invalid_json", "body"),
        (b"[" * 100_000, 400, "invalid_json", "body"),
        (b"\xff\xfe", 400, "invalid_json", "body"),
        (b"", 422, "missing_field", "inputs"),
        (b"[]", 422, "invalid_field", "body"),
        (b"{}", 422, "missing_field", "inputs"),
        (b'{"rows": [[1]]}', 422, "missing_field", "inputs"),
        (b'{"inputs": 3}', 422, "invalid_field", "inputs"),
        (b'{"inputs": {"a": 1}}', 422, "invalid_field", "inputs"),
        (b'{"inputs": []}', 422, "no_rows", "inputs"),
        (json.dumps({"inputs": [0] * (MAX_ROWS + 1)}).encode(), 422, "too_many_rows", "inputs"),
    ],
)
def test_bodies_that_are_no_rows_are_refused(running: Running, body: bytes, status: int, code: str, field: str) -> None:
    assert _problem(running.post(body), status, code)["field"] == field


@pytest.mark.parametrize("row", [None, 3, "text", True, [], [1] * 50, {}, {"nobody": 1}, [[1]], [{}]])
def test_rows_that_do_not_fit_name_the_row(running: Running, row: Any) -> None:
    inputs = [running.sample["inputs"][0], row]
    response = running.post({"inputs": inputs})
    assert response.status_code == 422, response.text
    problem = response.json()
    assert problem["field"].startswith("inputs[1]"), problem
    assert problem["code"] in {"invalid_row", "wrong_width", "wrong_shape", "missing_column"}
    assert "Traceback" not in response.text


def _with_first_value(running: Running, text: str) -> bytes:
    """The sample's first row with its first number replaced by a JSON text."""
    row = running.sample["inputs"][0]
    marked = {**row, next(iter(row)): "@"} if isinstance(row, dict) else ["@", *row[1:]]
    return json.dumps({"inputs": [marked]}).replace('"@"', text).encode()


@pytest.mark.parametrize("text", ['"31"', '"abc"', "[1]", "{}"])
def test_a_value_of_another_type_names_the_column(running: Running, text: str) -> None:
    problem = _problem(running.post(_with_first_value(running, text)), 422, "wrong_type")
    assert problem["field"] in _first_places(running)


@pytest.mark.parametrize("text", ["Infinity", "-Infinity", "1e999", "1" + "0" * 400])
def test_numbers_without_an_end_are_refused(running: Running, text: str) -> None:
    response = running.post(_with_first_value(running, text))
    assert response.status_code in (400, 422), response.text
    assert response.json()["code"] in {"not_finite", "wrong_type", "invalid_json"}


@pytest.mark.parametrize("text", ["null", "NaN"])
def test_missing_numbers_are_taken_or_named(running: Running, text: str) -> None:
    response = running.post(_with_first_value(running, text))
    if running.kind.name in ("lightgbm", "xgboost"):
        assert response.status_code == 200
        assert math.isfinite(response.json()["outputs"][0])
    elif running.kind.name == "onnx":
        assert _problem(response, 422, "wrong_type")["field"] == "inputs[0][0]"
    else:
        assert response.status_code == 200  # its imputer was fitted for it


def test_an_unknown_category_is_named_with_those_that_are_known(running: Running) -> None:
    if not running.kind.named:
        pytest.skip("this kind has no categories")
    row = dict(running.sample["inputs"][0])
    column = next(name for name, value in row.items() if isinstance(value, str))
    problem = _problem(running.post({"inputs": [{**row, column: "nowhere"}]}), 422, "unknown_category")
    assert problem["field"] == f"inputs[0].{column}"
    assert row[column] in problem["hint"]


def test_a_misspelt_column_is_guessed(running: Running) -> None:
    if not running.kind.named:
        pytest.skip("this kind has no columns")
    row = dict(running.sample["inputs"][0])
    first = next(iter(row))
    more = _problem(running.post({"inputs": [{**row, first + "s": 1}]}), 422, "unknown_column")
    assert more["field"] == f"inputs[0].{first}s"
    assert repr(first) in more["hint"]


def test_other_methods_and_paths_are_refused(running: Running) -> None:
    _problem(running.client.get("/predict"), 405, "method_not_allowed")
    _problem(running.client.put("/predict", json={}), 405, "method_not_allowed")
    _problem(running.client.post("/metadata"), 405, "method_not_allowed")
    _problem(running.client.get("/nowhere"), 404, "not_found")


@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "application/vnd.bentoml+pickle"],
)
def test_bodies_that_are_not_declared_as_json_are_refused(running: Running, media_type: str) -> None:
    _problem(running.post(running.sample, media_type), 415, "unsupported_media_type")


def test_a_huge_body_is_refused_by_the_wrapper(running: Running) -> None:
    if running.place != "wrapper":
        pytest.skip("BentoML alone has no bound")
    huge = b'{"inputs": [' + b" " * (BODY_LIMIT + 1) + b"]}"
    _problem(running.post(huge), 413, "body_too_large")
    chunked = running.client.post(
        "/predict", content=iter([huge[:1000], huge[1000:]]), headers={"content-type": "application/json"}
    )
    _problem(chunked, 413, "body_too_large")


def test_it_goes_on_answering_after_all_that(running: Running) -> None:
    expected = json.loads((running.model / "expected.json").read_text())
    assert running.post(running.sample).json() == expected


def _first_places(running: Running) -> set[str]:
    row = running.sample["inputs"][0]
    return {f"inputs[0].{next(iter(row))}"} if isinstance(row, dict) else {"inputs[0][0]"}
