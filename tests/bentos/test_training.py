"""What all training programs share: progress, the gate, labels, and `make train`."""

from __future__ import annotations

import importlib
import io
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from bentos.serving import ModelFolder
from bentos.training import outcome as outcomes
from bentos.training.gate import Gate
from bentos.training.outcome import Outcome, Progress
from scripts import train

ROOT = Path(__file__).resolve().parents[2]


def evaluated(_: ModelFolder) -> Mapping[str, float]:
    raise AssertionError("a decision evaluates nothing")


@pytest.mark.parametrize(
    ("better", "value", "live", "holds"),
    [
        ("higher", 0.90, 0.90, True),
        ("higher", 0.90, 0.95, False),
        ("higher", 0.94, 0.95, True),  # within the tolerance
        ("higher", 0.99, 0.95, True),
        ("lower", 0.90, 0.90, True),
        ("lower", 0.95, 0.90, False),
        ("lower", 0.91, 0.90, True),
        ("lower", 0.50, 0.90, True),
        ("higher", math.nan, 0.9, False),
        ("lower", 0.9, math.nan, False),
        ("lower", math.inf, 0.9, False),
        ("higher", 0.1, None, True),  # nothing is live
        ("higher", math.nan, None, False),
    ],
)
def test_a_gate_holds_where_the_new_model_is_not_worse(
    better: str, value: float, live: float | None, holds: bool
) -> None:
    decision = Gate("auc", better, 0.02, evaluated).decide(value, live, None if live is None else 4)
    assert decision.holds is holds
    assert decision.labels["gate.decision"] == ("released" if holds else "held back")
    assert decision.labels["gate.value"] == repr(value)
    assert ("released" in str(decision)) is holds
    assert all(len(key) <= 63 and len(text) <= 255 for key, text in decision.labels.items())


def test_a_gate_knows_which_way_is_better() -> None:
    with pytest.raises(ValueError, match="higher and lower"):
        Gate("auc", "up", 0.0, evaluated)


def outcome(**values: Any) -> Outcome:
    known: dict[str, Any] = {
        "kind": "image_search", "format": "keras-v3", "files": {"model.bin": b"x"}, "sample": {}, "expected": {},
        "parameters": {}, "metrics": {}, "dataset": "made up", "dataset_digest": "ab" * 32,
    }  # fmt: skip
    return Outcome(**{**known, **values})


def test_a_version_bears_the_first_metrics_and_leads_back_to_its_data_and_run() -> None:
    made = outcome(metrics={f"metric_{n}": n / 7 for n in range(200)}, run="0" * 32)
    labels = made.labels
    assert labels["metric_3"] == "0.4286"
    assert labels["dataset"] == "ab" * 8
    assert labels["mlflow.run_id"] == "0" * 32
    assert len(labels) == outcomes.MOST_LABELS + 3
    assert len(labels) + len(Gate("m", "lower", 0.0, evaluated).decide(1.0, None).labels) <= 64
    assert outcome().labels == {"dataset": "ab" * 8}


def test_the_name_of_a_model_may_be_the_name_of_an_endpoint() -> None:
    assert outcome().name == "image-search"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def counted(progress: Progress, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.bar("epochs", 20, "batches") as advance:
        for _ in range(10):
            advance(2)
    return stream.getvalue()


def test_progress_is_a_bar_on_a_terminal_and_four_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = counted(Progress.start(), io.StringIO(), monkeypatch).splitlines()
    assert [line.partition("epochs: ")[2] for line in lines] == [
        "6 of 20 batches", "10 of 20 batches", "16 of 20 batches", "20 of 20 batches",
    ]  # fmt: skip
    shown = counted(Progress.start(), Terminal(), monkeypatch)
    assert "epochs: 100%" in shown
    assert "20/20" in shown
    assert "\r" in shown
    for stream in (io.StringIO(), Terminal()):
        assert counted(Progress.start(quiet=True), stream, monkeypatch) == ""


def test_every_kind_with_a_training_program_can_be_chosen() -> None:
    assert {"ranker", "forecast"} <= set(train.kinds())
    assert "training" not in train.kinds()


@pytest.mark.parametrize("word", ["lightgbm", "nothing"])
def test_a_kind_that_cannot_be_trained_is_told(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        train.main([word])
    assert left.value.code == 2
    assert f"{word} has no training program; there are" in capsys.readouterr().err


def test_one_kind_that_fails_does_not_keep_the_others_from_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # the ranker knows no --stores
    few = ["--small", "--stores", "1", "--days", "500", "--rounds", "10", "--quiet", "--no-mlflow"]
    assert train.main(["ranker", "forecast", "--", *few, "--out", str(tmp_path / "model")]) == 1
    table = capfd.readouterr().out.rpartition("\n\n")[2]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert ["ranker", "failed", "(exit", "2)", "–"] in rows
    metrics = {row[1]: float(row[2]) for row in rows if row[0] == "forecast"}
    assert metrics["wape"] < metrics["wape_seasonal_naive"]


def test_what_is_served_needs_nothing_of_training() -> None:
    code = "import sys; import bentos.ranker.service; assert 'bentos.training' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["violation", "image_search"])
@pytest.mark.parametrize("epochs", ["-1", "0", "many"])
def test_a_number_of_epochs_that_is_none_is_refused_before_anything_is_fetched(
    kind: str, epochs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program = importlib.import_module(f"bentos.{kind}.train")
    with pytest.raises(SystemExit) as left:
        program.main(["--epochs", epochs])
    assert left.value.code == 2
    assert "--epochs" in capsys.readouterr().err
