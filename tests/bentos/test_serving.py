"""The parts that every kind shares, and the Bento that stands alone."""

from __future__ import annotations

import importlib
import json
import math
import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bentos.serving import Column, ModelFolder, Problem, StartError, Table, finite, write_model
from bentos.serving.golden import compare
from bentos.serving.problems import from_answer
from bentos.serving.settings import Settings
from bentos.serving.values import ValueType

BENTOS = Path(importlib.import_module("bentos").__file__ or "").parent
KINDS = ["lightgbm", "mlflow", "onnx", "sklearn", "tensorflow", "xgboost"]

numbers = st.floats(allow_nan=False, allow_infinity=False)
answers = st.recursive(
    st.none() | st.booleans() | numbers | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(answers)
def test_an_answer_equals_itself_after_a_trip_through_json(answer: Any) -> None:
    result = compare(answer, json.loads(json.dumps(answer)), 0, 0)
    assert result.difference is None
    assert result.matched == result.rows


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20), st.data())
def test_one_changed_row_is_counted_and_named(rows: list[float], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(rows) - 1))
    changed = [*rows[:at], rows[at] + abs(rows[at]) * 1e-3 + 1, *rows[at + 1 :]]
    result = compare({"outputs": rows}, {"outputs": changed}, 1e-5, 1e-6)
    assert (result.rows, result.matched) == (len(rows), len(rows) - 1)
    assert f"outputs[{at}]" in (result.difference or "")


def test_shapes_strings_and_the_rest_of_the_body_count() -> None:
    assert compare({"outputs": [1]}, {"outputs": [1, 2]}, 1, 1).difference
    assert compare({"outputs": [[1, 2]]}, {"outputs": [[1]]}, 1, 1).difference
    assert compare({"outputs": ["a"]}, {"outputs": ["b"]}, 1, 1).difference
    assert compare({"outputs": [True]}, {"outputs": [1]}, 1, 1).difference
    assert compare({"outputs": [1], "v": 1}, {"outputs": [1], "v": 9}, 0, 0).difference
    assert compare({"y": 1}, [1], 1, 1).difference


def test_whole_numbers_are_compared_exactly_as_labels_are() -> None:
    assert compare({"outputs": [100001]}, {"outputs": [100002]}, 1e-5, 1e-6).difference
    assert compare({"outputs": [2**53 + 1]}, {"outputs": [2**53]}, 1e-5, 1e-6).difference
    assert compare({"outputs": [3, 3.0]}, {"outputs": [3.0, 3]}, 0, 0).difference is None


def test_the_place_of_a_number_without_value_is_found() -> None:
    assert finite.place({"outputs": [1.0, [2.0, math.nan]]}) == "outputs[1][1]"
    assert finite.place({"a": {"b": -math.inf}}) == "a.b"
    assert finite.place({"outputs": [1, "NaN", None]}) is None


TABLE = Table((Column("age"), Column("plan", categories=("a", "b")), Column("size", nullable=False)))


@given(st.lists(st.tuples(st.none() | numbers, st.sampled_from(["a", "b", None]), numbers), min_size=1, max_size=5))
def test_records_and_arrays_make_the_same_matrix(rows: list[tuple[Any, Any, Any]]) -> None:
    arrays = TABLE.matrix([list(row) for row in rows])
    records = TABLE.matrix([dict(zip(("size", "plan", "age"), row[::-1], strict=True)) for row in rows])
    assert arrays.shape == (len(rows), 3)
    assert str(arrays.tolist()) == str(records.tolist())


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["age", "plan", "size"]), inner),
    max_leaves=8,
)


@given(st.lists(json_values, min_size=1, max_size=3))
def test_whatever_comes_in_is_a_matrix_or_a_problem_with_a_field(inputs: list[Any]) -> None:
    refused: Problem | None = None
    try:
        matrix = TABLE.matrix(inputs)
    except Problem as problem:
        refused = problem
    if refused is None:
        assert matrix.shape == (len(inputs), 3)
    else:
        assert refused.status == 422
        assert (refused.field or "").startswith("inputs[")


MIXED = Table(
    (
        Column("age"),
        Column("plan", categories=("a", "b", 3), type=ValueType.ANY),
        Column("word", type=ValueType.TEXT),
        Column("x", type=ValueType.ANY),
        Column("exact", exact=True),
        Column("short", dtype="float32"),
        Column("flag", type=ValueType.BOOLEAN),
        Column("day", type=ValueType.DATE, dtype="datetime64[us]"),
        Column("closed", categories=(1, 2.5), nullable=False),
    )
)
mixed_cells: st.SearchStrategy[Any] = st.sampled_from(
    [None, 1, 2.5, True, math.nan, math.inf, 2**53 + 1, 10**400, "a", "2024-01-31", []]
)
cells: st.SearchStrategy[Any] = st.sampled_from(
    [None, 1, 2.5, -0.0, True, math.nan, math.inf, 10**400, "a", "b", 3, "1", [], {}, [1]]
)


def _told(read: Any) -> str | tuple[str, str | None]:
    """What a reader of rows gives, or the code and field of its problem."""
    try:
        return str(read())
    except Problem as problem:
        return problem.code, problem.field


@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6), st.integers(0, 3), st.booleans())
def test_a_batch_is_taken_or_refused_as_its_rows_are(rows: list[tuple[Any, ...]], good: int, named: bool) -> None:
    batch: list[Any] = [[1, "a", 2]] * good + [list(row) for row in rows]
    if named:
        batch = [dict(zip(TABLE.names, row, strict=True)) for row in batch]
    singly = [_told(lambda row=row: TABLE.matrix([row]).tolist()[0]) for row in batch]
    refused = {(p[0], (p[1] or "").replace("[0]", f"[{i}]", 1)) for i, p in enumerate(singly) if isinstance(p, tuple)}
    whole = _told(lambda: TABLE.matrix(batch).tolist())
    assert whole in refused if refused else whole == str([*singly]).replace("'", "")


@given(st.lists(st.tuples(*[mixed_cells] * len(MIXED.columns)), min_size=1, max_size=3))
def test_columns_are_the_checked_rows_on_their_side(rows: list[tuple[Any, ...]]) -> None:
    batch = [list(row) for row in rows]
    columns = _told(lambda: [tuple(column) for column in MIXED.values(batch)])
    assert columns == _told(lambda: list(zip(*MIXED.records(batch), strict=True)))
    for at, column in enumerate(MIXED.columns):  # alone, as most rows of them all are refused
        alone = Table((column,))
        cells = [[row[at]] for row in batch]
        read = _told(lambda alone=alone, cells=cells: [tuple(each) for each in alone.values(cells)])
        assert read == _told(lambda alone=alone, cells=cells: list(zip(*alone.records(cells), strict=True)))


def test_a_model_folder_is_verified_file_by_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", kind="k", format=None, files={"a/b.txt": b"1", "c": b"2"}, sample={"x": 1})
    folder.verify(folder.digest)
    for name in ("files/a/b.txt", "sample.json"):
        kept = (tmp_path / "m" / name).read_bytes()
        (tmp_path / "m" / name).write_bytes(kept + b" ")
        with pytest.raises(StartError, match=name):
            folder.verify()
        (tmp_path / "m" / name).write_bytes(kept)
    (tmp_path / "m" / "files" / "c").unlink()
    with pytest.raises(StartError, match="files/c"):
        folder.verify()


def test_the_manifest_is_the_same_bytes_as_the_registry_writes(tmp_path: Path) -> None:
    canonical_json = importlib.import_module("registry.digest").canonical_json
    folder = write_model(tmp_path / "m", kind="k", format="f", files={"é": b"1"})
    data = (folder.root / "manifest.json").read_bytes()
    assert data == canonical_json(json.loads(data))


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", ""])
def test_a_manifest_cannot_point_outside_of_its_folder(tmp_path: Path, path: str) -> None:
    manifest = {"schema": "ekiben.manifest.v1", "kind": "k", "files": [{"path": path, "size": 1, "sha256": "0" * 64}]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StartError):
        ModelFolder.read(tmp_path)


@pytest.mark.parametrize("model", ["../x", "y", "", 3])
def test_a_manifest_names_one_of_its_files_as_the_model(tmp_path: Path, model: object) -> None:
    write_model(tmp_path / "m", kind="k", format="f", files={"a": b"1", "x": b"2"}, model="x")
    found = ModelFolder.read(tmp_path / "m")
    assert (found.model, found.model_file(), found.path().read_bytes()) == ("x", "x", b"2")
    body = json.loads((found.root / "manifest.json").read_bytes())
    (found.root / "manifest.json").write_text(json.dumps({**body, "model": model}))
    with pytest.raises(StartError, match="none of its files"):
        ModelFolder.read(found.root)


@given(st.integers(400, 599), st.binary(max_size=60) | json_values.map(lambda v: json.dumps(v).encode()))
def test_any_error_answer_becomes_a_problem(status: int, body: bytes) -> None:
    document = json.loads(from_answer(status, body, "POST", "/predict").body())
    assert {"type", "title", "status", "code", "detail"} <= set(document)
    assert 400 <= document["status"] < 600


def test_settings_have_the_documented_defaults() -> None:
    settings = Settings.from_environment({"EKIBEN_URL_PREFIX": "inference/churn/"})
    assert (settings.host, settings.port, settings.name, settings.version) == ("0.0.0.0", 3000, "model", "0")
    assert (settings.max_body_bytes, settings.request_seconds) == (64 << 20, 60)
    assert (settings.rtol, settings.atol, settings.prefix) == (1e-5, 1e-6, "/inference/churn")


@pytest.mark.parametrize("kind", KINDS)
def test_locks_are_hashed_universal_and_name_no_host(kind: str) -> None:
    lock = (BENTOS / kind / "requirements.txt").read_text()
    pinned = [line for line in lock.splitlines() if line and not line.startswith((" ", "#"))]
    assert all("==" in line for line in pinned)
    assert lock.count("--hash=sha256:") >= len(pinned)
    assert "://" not in lock
    assert "index-url" not in lock
    if kind in ("lightgbm", "xgboost", "onnx"):
        assert "scikit-learn" not in lock
        assert "pandas" not in lock


@pytest.mark.parametrize("kind", KINDS)
def test_the_sample_of_a_kind_is_that_of_its_example(kind: str, tmp_path: Path) -> None:
    folder = importlib.import_module(f"bentos.{kind}.example").write(tmp_path / "m")
    assert json.loads((BENTOS / kind / "sample.json").read_text()) == folder.sample()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_built_bento_stands_alone(kind: str, tmp_path: Path) -> None:
    """Built by plain `bentoml build`; served by an interpreter to which this repository is unknown."""
    model = importlib.import_module(f"bentos.{kind}.example").write(tmp_path / "model").root
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "BENTOML_HOME": str(tmp_path / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "True",
    }
    subprocess.run(
        [sys.executable, "-m", "bentoml", "build"], cwd=BENTOS / kind, env=environment, check=True, capture_output=True
    )
    store = tmp_path / "bentoml" / "bentos" / kind
    bento = store / (store / "latest").read_text()
    assert (bento / "src/bentos/serving/__main__.py").exists()
    assert (bento / "env/python/requirements.txt").read_text() == (BENTOS / kind / "requirements.txt").read_text()
    assert not list(bento.rglob("model"))
    # the venv's packages are put on the path as a folder: there .pth files, which would lead here, are not read
    base = Path(sys.base_prefix) / "bin" / Path(sysconfig.get_config_var("BINDIR") or "").joinpath("python3").name
    packages = next(p for p in site.getsitepackages() if p.endswith("site-packages"))
    check = (
        "import asyncio, json, sys; from _bentoml_impl.loader import load;"
        "service = load(sys.argv[1], standalone_load=True);"
        "import bentos.serving; assert bentos.serving.__file__.startswith(sys.argv[1]), bentos.serving.__file__;"
        "from bentos.serving import golden; from bentos.serving.about import Served; app = service.to_asgi()\n"
        "async def main():\n"
        "    async with app.router.lifespan_context(app):\n"
        "        from _bentoml_sdk.service import get_current_service\n"
        "        about = get_current_service().about\n"
        "        checked, _ = await golden.check(app, '/predict', about, Served())\n"
        "        print(json.dumps(checked.document()))\n"
        "asyncio.run(main())"
    )
    result = subprocess.run(
        [str(base), "-c", check, str(bento.resolve())],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": packages, "EKIBEN_MODEL_DIR": str(model)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1]) == {"verified": "expected", "rows": 5, "matched": 5}
