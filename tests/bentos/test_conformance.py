"""Every kind answers alike: in process, under `bentoml serve`, and under the program that the platforms start."""

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
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from bentos.serving import ModelFolder
from bentos.serving.answers import MAX_ROWS
from registry.kinds import Kind
from tests.bentos import kinds
from tests.bentos.conformance import Conformance, Running, problem

BODY_LIMIT = 1 << 20
pytestmark = pytest.mark.timeout(600)  # a framework's import, twice, where other tests take the processors

PAIRS = kinds.pairs(["process", "bentoml", "wrapper"], always=["process", "bentoml"])


def test_every_kind_has_its_entry_and_every_entry_its_kind() -> None:
    assert set(kinds.KINDS) == set(kinds.found())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "running" in metafunc.fixturenames:
        taken = [pair for pair in PAIRS if metafunc.cls is not TestRows or kinds.takes_rows(pair.values[0])]
        metafunc.parametrize("running", taken, indirect=True, scope="module")


@pytest.fixture(scope="module")
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, run_folder: Path
) -> Iterator[Running]:
    kind, entry, place = kinds.split(request.param)
    folder = kinds.example(kind.name, run_folder)
    root = tmp_path_factory.mktemp(kind.name)
    if place == "process":
        # its metrics are off: Prometheus' registry is one per process, and takes each of BentoML's metrics once
        with _in_process(kind, folder) as client:
            yield Running(kind, entry, place, folder, client, metrics=None)
    elif place == "bentoml":
        with _bentoml_serve(kind, folder, root) as client:
            yield Running(kind, entry, place, folder, client)
    else:
        with _wrapper(kind, folder, root) as client:
            yield Running(kind, entry, place, folder, client, identity=("shop", "7"), limit=BODY_LIMIT)


@contextmanager
def _in_process(kind: Kind, folder: ModelFolder) -> Iterator[httpx.Client]:
    module, _, name = kind.service.partition(":")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EKIBEN_MODEL_DIR", str(folder.root))
        service = getattr(importlib.import_module(f"bentos.{kind.name}.{module}"), name)
        patch.setitem(service.config, "metrics", {"enabled": False})
        with TestClient(service.to_asgi(), raise_server_exceptions=False) as client:
            yield client


@contextmanager
def _bentoml_serve(kind: Kind, folder: ModelFolder, root: Path) -> Iterator[httpx.Client]:
    port = _free_port()
    command = [sys.executable, "-m", "bentoml", "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {"BENTOML_HOME": str(root / "bentoml"), "EKIBEN_MODEL_DIR": str(folder.root)}
    with _process(command, environment, kind.dir, port, root) as client:
        yield client


@contextmanager
def _wrapper(kind: Kind, folder: ModelFolder, root: Path) -> Iterator[httpx.Client]:
    port = _free_port()
    environment = {
        "EKIBEN_BENTO": str(kind.dir),
        "EKIBEN_MODEL_DIR": str(folder.root),
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
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
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
    for _ in range(6000):
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


class TestKinds(Conformance):
    pass


class TestRows:
    """Kinds that take `{"inputs": [row, …]}`."""

    def test_rows_may_be_arrays_in_column_order(self, running: Running) -> None:
        rows = running.sample["inputs"]
        if running.entry.rows.named:
            schema = running.get("/metadata").json()["input"]["properties"]["inputs"]["items"]["anyOf"]
            arrays = [[row[name] for name in schema[0]["properties"]] for row in rows]
            assert running.post({"inputs": arrays}).json() == running.post({"inputs": rows}).json()
        else:
            named = [{"point": row} for row in rows]
            assert running.post({"inputs": named}).json() == running.post({"inputs": rows}).json()

    def test_many_rows_are_answered_in_order(self, running: Running) -> None:
        inputs = running.sample["inputs"]
        once = running.post({"inputs": inputs}).json()["outputs"]
        many = running.post({"inputs": inputs * 40}).json()["outputs"]
        numbers = isinstance(once[0], float)
        assert many == pytest.approx(once * 40, rel=1e-6) if numbers else len(many) == len(once) * 40

    @pytest.mark.parametrize(
        ("body", "code", "field"),
        [
            (b"{}", "missing_field", "inputs"),
            (b'{"rows": [[1]]}', "missing_field", "inputs"),
            (b'{"inputs": 3}', "invalid_field", "inputs"),
            (b'{"inputs": {"a": 1}}', "invalid_field", "inputs"),
            (b'{"inputs": []}', "no_rows", "inputs"),
            (json.dumps({"inputs": [0] * (MAX_ROWS + 1)}).encode(), "too_many_rows", "inputs"),
        ],
        ids=["no fields", "another name", "a number", "an object", "no rows", "too many"],
    )
    def test_bodies_that_are_no_rows_are_refused(self, running: Running, body: bytes, code: str, field: str) -> None:
        assert problem(running.post(body), 422, code)["field"] == field

    @pytest.mark.parametrize("row", [None, 3, "text", True, [], [1] * 50, {}, {"nobody": 1}, [[1]], [{}]])
    def test_rows_that_do_not_fit_name_the_row(self, running: Running, row: Any) -> None:
        found = problem(running.post({"inputs": [running.sample["inputs"][0], row]}), 422)
        assert found["field"].startswith("inputs[1]"), found
        assert found["code"] in {"invalid_row", "wrong_width", "wrong_shape", "missing_column"}

    @pytest.mark.parametrize("text", ['"31"', '"abc"', "[1]", "{}"])
    def test_a_value_of_another_type_names_the_column(self, running: Running, text: str) -> None:
        assert problem(running.post(_with_first_value(running, text)), 422, "wrong_type")["field"] == _place(running)

    @pytest.mark.parametrize("text", ["null", "NaN"])
    def test_missing_numbers_are_taken_or_named(self, running: Running, text: str) -> None:
        answer = running.post(_with_first_value(running, text))
        if not running.entry.rows.missing:
            assert problem(answer, 422, "wrong_type")["field"] == _place(running)
            return
        assert answer.status_code == 200
        (value,) = answer.json()["outputs"]
        assert not isinstance(value, float) or math.isfinite(value)

    def test_an_unknown_category_is_named_with_those_that_are_known(self, running: Running) -> None:
        if not running.entry.rows.categories:
            pytest.skip("this kind's example has no categories")
        row = dict(running.sample["inputs"][0])
        column = next(name for name, value in row.items() if isinstance(value, str))
        found = problem(running.post({"inputs": [{**row, column: "nowhere"}]}), 422, "unknown_category")
        assert found["field"] == f"inputs[0].{column}"
        assert row[column] in found["hint"]

    def test_a_misspelt_column_is_guessed(self, running: Running) -> None:
        if not running.entry.rows.named:
            pytest.skip("this kind's example has no columns")
        row = dict(running.sample["inputs"][0])
        first = next(iter(row))
        more = problem(running.post({"inputs": [{**row, first + "s": 1}]}), 422, "unknown_column")
        assert more["field"] == f"inputs[0].{first}s"
        assert repr(first) in more["hint"]


def _with_first_value(running: Running, text: str) -> bytes:
    """The sample's first row with its first number replaced by a JSON text."""
    row = running.sample["inputs"][0]
    marked = {**row, next(iter(row)): "@"} if isinstance(row, dict) else ["@", *row[1:]]
    return json.dumps({"inputs": [marked]}).replace('"@"', text).encode()


def _place(running: Running) -> str:
    row = running.sample["inputs"][0]
    return f"inputs[0].{next(iter(row))}" if isinstance(row, dict) else "inputs[0][0]"
