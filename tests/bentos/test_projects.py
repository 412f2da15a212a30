"""A user's own project under the wrapper: what it answers, what it declares, where it lies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import BaseModel

from bentos.serving import declared, finite, write_model

HEAD = """
import os, typing as t
import bentoml, numpy as np, pandas as pd
from pydantic import BaseModel

class Score(BaseModel):
    y: float
    note: t.Optional[str] = None

@bentoml.service
class Scorer:
    @bentoml.api
    def predict(self, x: float) -> {type}:
        return {value}
"""

UNFINITE = {
    "float": ("float", "float('nan')", "body"),
    "dict": ("dict", "{'y': float('nan')}", "y"),
    "infinity": ("dict", "{'y': float('inf')}", "y"),
    "minus-infinity": ("t.Dict[str, float]", "{'y': float('-inf')}", "y"),
    "list": ("t.List[float]", "[1.0, float('nan')]", "[1]"),
    "records": ("dict", "{'outputs': [{'y': 1.0}, {'y': float('nan')}]}", "outputs[1].y"),
    "array": ("np.ndarray", "np.array([[1.0], [np.inf]])", "[1][0]"),
    "scalar": ("t.Dict[str, t.Any]", "{'y': np.float64('nan')}", "y"),
    "frame": ("pd.DataFrame", "pd.DataFrame({'y': [1.0, None]})", "y[1]"),
    "model": ("Score", "Score(y=float('nan'))", "y"),
    "models": ("t.List[Score]", "[Score(y=float('nan'))]", "[0].y"),
}


def _project(root: Path, type: str, value: str, sample: Any = None, expected: Any = None) -> dict[str, str]:
    root.mkdir(parents=True, exist_ok=True)
    (root / "bentofile.yaml").write_text("service: service:Scorer\n")
    (root / "service.py").write_text(HEAD.replace("{type}", type).replace("{value}", value))
    model = write_model(
        root.parent / (root.name + "-model"),
        kind="project",
        format=None,
        files={"w": b"1"},
        sample=sample if sample is not None else {"x": 1},
        expected=expected,
    ).root
    return {"EKIBEN_BENTO": str(root), "EKIBEN_MODEL_DIR": str(model)}


@pytest.mark.parametrize(("type", "value", "place"), UNFINITE.values(), ids=UNFINITE)
def test_a_project_whose_answer_is_not_finite_does_not_start(
    starting: Any, tmp_path: Path, type: str, value: str, place: str
) -> None:
    served = starting(_project(tmp_path / "p", type, value))
    assert served.exit_code() == 10
    failure = served.failure()
    assert failure["code"] == "golden_sample_failed"
    assert f"not finite at {place}" in failure["message"]


def test_a_service_that_fails_on_its_sample_says_why(starting: Any, tmp_path: Path) -> None:
    served = starting(_project(tmp_path / "p", "dict", "{'y': {}['plan']}"))
    assert served.exit_code() == 10
    assert served.failure()["message"] == "the sample made the service fail: KeyError: 'plan'"


@pytest.mark.parametrize("expected", [{"y": None}, {"y": 1.0}])
def test_expected_values_do_not_excuse_it(starting: Any, tmp_path: Path, expected: Any) -> None:
    served = starting(_project(tmp_path / "p", "dict", "{'y': float('nan')}", expected=expected))
    assert served.exit_code() == 10
    assert "not finite at y" in served.failure()["message"]


def test_an_honest_null_passes_where_it_is_expected(starting: Any, tmp_path: Path) -> None:
    environment = _project(tmp_path / "p", "dict", "{'y': None, 'z': x}", expected={"y": None, "z": 1})
    client = starting(environment).ready().client
    assert client.get("/metadata").json()["verified"] == "expected"
    assert client.get("/predict/test").json()["output"] == {"y": None, "z": 1.0}


def test_a_null_where_a_number_is_expected_does_not_start(starting: Any, tmp_path: Path) -> None:
    served = starting(_project(tmp_path / "p", "dict", "{'y': None}", expected={"y": 3}))
    assert served.exit_code() == 10
    assert "y is None, expected 3" in served.failure()["message"]


class _Pair(BaseModel):
    a: float
    b: dict[str, float] = {}


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (_Pair(a=1, b={"c": float("inf")}), "b.c"),
        (_Pair(a=1), None),
        ((1, [2, {"a": np.float32("nan")}]), "[1][1].a"),
        (np.array([1, 2]), None),
        (np.array([None, float("nan")], dtype=object), "[1]"),
        (np.array(["nan"]), None),
        (pd.Series([1.0, np.nan]), "[1]"),
        (pd.DataFrame({"a": ["x", None], "b": [1, 2]}), None),
        ("NaN", None),
        (b"x", None),
        (None, None),
        (True, None),
        (10**400, None),
    ],
    ids=str,
)
def test_the_place_is_found_in_whatever_a_service_may_return(value: Any, place: str | None) -> None:
    assert finite.place(value) == place


# what it declares


DECLARING = """
import os
import bentoml

SEEN = os.environ.get("GREETING"), os.environ.get("LANGUAGE_OF_SERVICE")

@bentoml.service(envs=[{"name": "LATER", "value": "soon"}, {"name": "EKIBEN_MODEL_NAME", "value": "mine"},
                       {"name": "PATH", "value": "/nowhere"}])
class Scorer:
    @bentoml.api
    def predict(self, x: float) -> dict:
        return {"import": SEEN, "later": os.environ.get("LATER"), "path": os.environ["PATH"],
                "build": os.environ.get("BUILD_ONLY")}
"""


def _declaring(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "service.py").write_text(DECLARING)
    (root / "bentofile.yaml").write_text(
        "service: service:Scorer\nenvs:\n"
        "  - {name: GREETING, value: hello}\n  - {name: LANGUAGE_OF_SERVICE, value: de}\n"
        "  - {name: BUILD_ONLY, value: secret, stage: build}\n  - {name: PYTHONPATH, value: /nowhere}\n"
    )


def _held(answer: Mapping[str, Any]) -> None:
    assert answer["import"] == ["hello", "de"]
    assert (answer["later"], answer["build"]) == ("soon", None)
    assert answer["path"] == os.environ["PATH"]


def test_declared_variables_are_set_before_a_project_is_imported(starting: Any, tmp_path: Path) -> None:
    _declaring(tmp_path / "p")
    served = starting({"EKIBEN_BENTO": str(tmp_path / "p"), "EKIBEN_MODEL_NAME": "right"}).ready()
    response = served.client.post("/predict", json={"x": 1})
    _held(response.json())
    assert response.headers["ekiben-model"] == "right"
    assert "EKIBEN_MODEL_NAME" in served.log.read_text()


def test_declared_variables_of_a_built_bento_are_set(starting: Any, tmp_path: Path) -> None:
    _declaring(tmp_path / "p")
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path / "home"), "BENTOML_DO_NOT_TRACK": "True"}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "bentoml", "build", "--output", "tag"]
    done = subprocess.run(command, cwd=tmp_path / "p", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    bento = next((tmp_path / "home" / "bentos").glob("*/*/bento.yaml")).parent
    _held(starting({"EKIBEN_BENTO": str(bento)}).ready().client.post("/predict", json={"x": 1}).json())


@pytest.mark.parametrize("name", ["PATH", "PYTHONPATH", "PYTHONHOME", "LD_PRELOAD", "LD_LIBRARY_PATH", "EKIBEN_PORT"])
def test_variables_that_choose_the_code_are_left_alone(name: str) -> None:
    environ = {name: "kept"}
    assert declared.apply({name: "changed", "OTHER": "1"}, environ) == [name]
    assert environ == {name: "kept", "OTHER": "1"}


# where it lies


def test_a_project_below_a_hidden_folder_is_served(starting: Any, tmp_path: Path) -> None:
    root = tmp_path / ".hidden" / "bentos" / "p"
    environment = _project(root, "dict", "{'y': x}", expected={"y": 1})
    (root / "requirements.txt").write_text("numpy\n")
    service = (root / "service.py").read_text()
    image = '@bentoml.service(image=bentoml.images.Image().requirements_file("requirements.txt"))'
    (root / "service.py").write_text(service.replace("@bentoml.service", image))
    client = starting(environment).ready().client
    assert client.post("/predict", json={"x": 2}).json() == {"y": 2}
