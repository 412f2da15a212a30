"""Damaged models: recognition answers or refuses, whatever the bytes; a process that ends over one is counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz
from benchmarks.mutations import mutated
from bentos.lightgbm import example as lightgbm_example
from bentos.onnx import example as onnx_example
from bentos.transformers import example as transformers_example
from tests.registry.test_formats_neighbours import KERAS, zip_of

_TENSORS = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
MLMODEL = b"flavors:\n  lightgbm:\n    data: model.lgb\n"


def seeds(tmp_path: Path) -> list[fuzz.Seed]:
    made = []
    for module, kind, format in ((lightgbm_example, "lightgbm", "lightgbm-text"), (onnx_example, "onnx", "onnx")):
        folder = module.write(tmp_path / kind)
        made.append(fuzz.Seed(kind, format, {path: folder.path(path).read_bytes() for path in folder.files}))
    tensors = len(_TENSORS).to_bytes(8, "little") + _TENSORS + bytes(8)
    booster = next(iter(made[0].files.values()))
    return [
        *made,
        fuzz.Seed("mlflow", "mlflow", {"MLmodel": MLMODEL, "model.lgb": booster}),
        fuzz.Seed("transformers", "transformers-onnx", transformers_example.files()),
        fuzz.Seed("transformers", "safetensors", {"m.safetensors": tensors}),
        fuzz.Seed("tensorflow", "keras-v3", {"m.keras": zip_of(KERAS)}),
    ]


def test_recognition_of_damaged_models_answers_or_refuses(tmp_path: Path) -> None:
    for seed in seeds(tmp_path):
        outcomes: dict[str, int] = {}
        for number in range(200):
            outcome, _, _, said = fuzz.examine(seed, number)
            assert outcome in ("refused", "recognised"), (seed.format, number, said)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert set(outcomes) == {"refused", "recognised"}, seed.format  # the damage is neither nothing nor everything


def test_a_number_gives_the_same_damage_on_any_machine() -> None:
    files = {"a": b"abc" * 30, "b.zip": zip_of({"x.json": '{"k": [1, 2]}'}), "c.json": b'{"k": {"l": 1}}'}
    assert [mutated(files, n, "x") for n in range(40)] == [mutated(files, n, "x") for n in range(40)]
    assert len({tuple(sorted(mutated(files, n, "x").items())) for n in range(40)}) > 20


@pytest.mark.skipif(sys.platform != "linux", reason="children are confined by seccomp")
def test_a_child_goes_through_all_cases_and_is_counted(tmp_path: Path) -> None:
    tensors = len(_TENSORS).to_bytes(8, "little") + _TENSORS + bytes(8)
    fuzz.Seed("transformers", "safetensors", {"m.safetensors": tensors}).write(tmp_path / "seeds" / "safetensors")
    tally = fuzz.run("safetensors", tmp_path / "seeds", 30, tmp_path / "scratch")
    assert tally.outcomes.total() == 30
    assert not fuzz.BAD & set(tally.outcomes)
    assert json.loads((tmp_path / "seeds" / "safetensors" / "seed.json").read_text())["format"] == "safetensors"
    assert not (tmp_path / "scratch").exists()
