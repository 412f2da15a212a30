"""The figures of the kinds' READMEs are those of a training, and `make train` says when they are not any more."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bentos.training.reference import FILE, Reference
from scripts import train

BENTOS = Path(__file__).resolve().parents[2] / "bentos"
KINDS = train.kinds()
NUMBER = re.compile(r"(\d+\.\d+)(?: %)?(?: ± \d+\.\d+)?")
HELD = Reference("data", {"seed": 7}, {"auc": 0.9, "auc_naive": 0.5, "rmse": 11.0}, {"*": 0.01, "rmse": 0.5})


def cells(readme: str) -> Iterator[tuple[str, str]]:
    """Row and number of every cell of the tables, without the deviation that follows it."""
    for line in readme.splitlines():
        if line.startswith("|"):
            first, *rest = [cell.strip().strip("*").strip() for cell in line.strip().strip("|").split("|")]
            yield from ((first, found[1]) for cell in rest if (found := NUMBER.fullmatch(cell)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_in_the_tables_of_a_readme_is_a_metric_of_its_training(kind: str) -> None:
    reference = Reference.read(BENTOS / kind)
    assert reference is not None
    found = list(cells((BENTOS / kind / "README.md").read_text()))
    assert len(found) > 5
    for row, number in found:
        digits = len(number.partition(".")[2])
        shown = {f"{share * value:.{digits}f}" for value in reference.metrics.values() for share in (1, 100)}
        assert number in shown, f"{row}: {number} is no metric of {kind}/{FILE}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_has_a_tolerance_that_could_be_missed(kind: str) -> None:
    reference = Reference.read(BENTOS / kind)
    assert reference is not None
    for name, value in reference.metrics.items():
        assert reference.allowed(name) > 0, name
        assert reference.differs(name, value + 2 * reference.allowed(name)), name


def test_a_metric_beyond_its_tolerance_is_told_and_so_are_one_that_is_gone_and_one_that_is_nan() -> None:
    same = train.Trained("kind", 1.0, 0, {"auc": 0.905, "auc_naive": 0.5, "rmse": 11.4}, HELD)
    assert same.differing() == []
    worse = replace(same, metrics={"auc": 0.88, "auc_naive": float("nan"), "new": 1.0})
    assert worse.differing() == ["rmse", "auc", "auc_naive", "new"]
    rows = [line.split() for line in train.report([worse]).splitlines()]
    assert ["kind", "auc", "0.8800", "0.9000", "differs"] in rows
    assert ["kind", "new", "1.0000", "new"] in rows


def test_another_training_is_not_compared(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    few = ["--small", "--stores", "1", "--days", "500", "--rounds", "10", "--quiet", "--no-mlflow"]
    assert train.main(["forecast", "--", *few, "--out", str(tmp_path / "model")]) == 0
    shown = capfd.readouterr().out
    assert "forecast: not the data or the parameters of its README" in shown
    assert "differs" not in shown


def test_what_is_kept_is_read_again_and_is_of_that_training_only(tmp_path: Path) -> None:
    HELD.renewed("other", {"seed": 8, "rate": 0.1}, {"auc": 0.123456789}).write(tmp_path)
    found = Reference.read(tmp_path)
    assert found is not None
    assert (found.metrics, found.tolerance) == ({"auc": 0.123457}, HELD.tolerance)
    assert found.is_of("other", {"rate": 0.1, "seed": 8})
    assert not found.is_of("other", {"seed": 7, "rate": 0.1})
    assert not found.is_of("data", {"rate": 0.1, "seed": 8})
    assert Reference.read(tmp_path / "none") is None
