"""The kind lightgbm beside LightGBM itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest

from bentos.formats.lightgbm import Model
from bentos.serving import Problem, StartError, write_model
from bentos.serving.answers import answer

RNG = np.random.default_rng(1)
ROWS = 300


def _model(tmp_path: Path, booster: lightgbm.Booster, sample: Any = None) -> Model:
    booster.save_model(str(tmp_path / "model.txt"))
    files = {"model.txt": tmp_path / "model.txt"}
    return Model(write_model(tmp_path / "m", kind="lightgbm", format="lightgbm-text", files=files, sample=sample))


def _train(data: Any, label: Any, **params: Any) -> lightgbm.Booster:
    group = params.pop("group", None)
    settings = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 5, **params}
    return lightgbm.train(settings, lightgbm.Dataset(data, label, group=group), 10)


@pytest.mark.parametrize(
    "params",
    [
        {"objective": "regression"},
        {"objective": "binary"},
        {"objective": "multiclass", "num_class": 3},
        {"objective": "lambdarank", "group": [30] * 10},
        {"objective": "poisson"},
    ],
    ids=lambda p: p["objective"],
)
def test_every_objective_gives_what_lightgbm_gives(tmp_path: Path, params: dict[str, Any]) -> None:
    data = RNG.normal(size=(ROWS, 4))
    label = (data[:, 0] > 0).astype(int) + (2 if params.get("num_class") else 0) * (data[:, 1] > 1)
    label = np.minimum(label, params.get("num_class", 2) - 1)
    booster = _train(data, label, **params)
    model = _model(tmp_path, booster)
    data[3, 2] = np.nan
    rows = [[None if np.isnan(v) else v for v in row] for row in data.tolist()]
    assert model.outputs(rows) == booster.predict(data).tolist()
    expected = {"binary": [0, 1], "multiclass": [0, 1, 2]}.get(params["objective"])
    assert model.about.classes == expected


def test_pandas_categories_are_coded_without_pandas(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "number": RNG.normal(size=ROWS),
            "word": pd.Categorical(RNG.choice(["b", "a", "c"], ROWS)),
            "count": pd.Categorical(RNG.choice([10, 2, 7], ROWS)),
            "flag": pd.Categorical(RNG.choice([True, False], ROWS)),
        }
    )
    label = (frame["word"] == "a") * 2 + (frame["count"] == 7) + frame["flag"].astype(int)
    booster = _train(frame, label, objective="regression")
    model = _model(tmp_path, booster)
    rows = frame.head(50).astype(object).to_dict("records")
    assert model.outputs(rows) == booster.predict(frame.head(50)).tolist()
    assert model.outputs([{**rows[0], "word": None}])[0] == pytest.approx(
        booster.predict(frame.head(1).assign(word=pd.Categorical([None], categories=["a", "b", "c"])))[0]
    )
    with pytest.raises(Problem) as raised:
        model.outputs([{**rows[0], "count": 3}])
    assert (raised.value.code, raised.value.field) == ("unknown_category", "inputs[0].count")


def test_ordered_categories_are_placed_with_the_help_of_the_sample(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {
            "plan": pd.Categorical(RNG.choice(["x", "y"], ROWS)),
            "size": pd.Categorical(RNG.choice(["s", "m", "l"], ROWS), categories=["s", "m", "l"], ordered=True),
            "number": RNG.normal(size=ROWS),
        }
    )
    booster = _train(frame, frame["size"].cat.codes + (frame["plan"] == "x"), objective="regression")
    sample = {"inputs": frame.head(3).astype(object).to_dict("records")}
    model = _model(tmp_path, booster, sample)
    rows = frame.head(50).astype(object).to_dict("records")
    assert model.outputs(rows) == booster.predict(frame.head(50)).tolist()
    with pytest.raises(StartError, match="does not tell which they are"):
        _model(tmp_path, booster)


def test_a_model_without_column_names_takes_arrays_only(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 2))
    model = _model(tmp_path, _train(data, data[:, 0], objective="regression"))
    assert model.about.example == {"inputs": [[pytest.approx(0, abs=5), pytest.approx(0, abs=5)]]}
    with pytest.raises(Problem) as raised:
        model.outputs([{"Column_0": 1, "Column_1": 2}])
    assert raised.value.code == "invalid_row"


def test_a_large_batch_does_not_hold_up_the_loop(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 2))
    booster = _train(data, data[:, 0], objective="regression")
    model = _model(tmp_path, booster)
    seen: list[str] = []

    async def both() -> None:
        batch = asyncio.create_task(answer(lambda rows: (seen.append("batch"), model.outputs(rows))[1], data.tolist()))
        await asyncio.sleep(0)
        seen.append("loop")
        response = await batch
        assert response.status_code == 200

    asyncio.run(both())
    assert "loop" in seen


@pytest.mark.parametrize("text", ["", "tree\n", "not a model", '{"learner": {}}'])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path / "m", kind="lightgbm", format="lightgbm-text", files={"x.txt": text.encode()})
    with pytest.raises(StartError) as raised:
        Model(folder)
    assert raised.value.code == "model_load_failed"
    assert "x.txt" in raised.value.message


def test_files_that_the_parameters_name_are_not_opened(tmp_path: Path) -> None:
    data = RNG.normal(size=(ROWS, 4))
    booster = _train(data, data[:, 0], objective="regression")
    booster.save_model(str(tmp_path / "plain.txt"))
    text = (tmp_path / "plain.txt").read_text()
    output = tmp_path / "written"
    for name, value in {
        "forcedsplits_filename": "/absent/splits", "forcedbins_filename": "/absent/bins", "data": "/absent/data",
        "machine_list_filename": "/absent/machines", "machines": "127.0.0.1:9", "num_machines": "2",
        "input_model": "/absent/model", "output_model": str(output), "output_result": str(output),
    }.items():  # fmt: skip
        lines = [line for line in text.split("\n") if not line.startswith(f"[{name}:")]
        text = "\n".join(lines).replace("\nparameters:\n", f"\nparameters:\n[{name}: {value}]\n")
    assert text.count("/absent/") == 5
    (tmp_path / "named.txt").write_text(text)
    files = {"model.txt": tmp_path / "named.txt"}
    model = Model(write_model(tmp_path / "m", kind="lightgbm", format="lightgbm-text", files=files))
    assert model.outputs(data.tolist()) == booster.predict(data).tolist()
    assert not output.exists()
