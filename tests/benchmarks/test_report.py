"""The report of figures: its shape, what is written into it, and the README's table that is made from it."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kinds, run
from benchmarks.figures import RAW, REPORT, ROOT, Figure, Measured, Sample, entry, merge, significant, write_raw
from scripts import generated

TARGETS = {
    "build.weights_only_vs_bentoml_warm": ("higher", 15),
    "build.weights_only_vs_bentoml_fresh": ("higher", 50),
    "build.cold_vs_bentoml": ("higher", 3.5),
    "image.size_vs_bentoml": ("lower", 0.45),
    "layer.layout_vs_copy": ("lower", 1.5),
    "layer.registry_vs_curl": ("lower", 1.3),
    "build.memory_5gb": ("lower", 512),
    "image.same_digest": ("higher", 1),
    "upload.memory_2gb": ("lower", 64),
    "upload.speed_vs_copy": ("higher", 0.5),
    "uploads.api_p99_attacked": ("lower", 3),
    "uploads.memory_attacked": ("lower", 128),
    "uploads.ordinary": ("lower", 1.3),
    "uploads.fuzz_crashes": ("lower", 0),
    "uploads.fuzz_hangs": ("lower", 0),
    "uploads.fuzz_written": ("lower", 0),
    "uploads.fuzz_load_ends": ("lower", None),
    "uploads.neighbours": ("lower", 0),
    "serve.first_answer": ("lower", 6),
    "serve.failed_calls": ("lower", 0),
    "cluster.first_answer": ("lower", 10),
    "cluster.failed_calls": ("lower", 0),
    "cluster.second_pull_bytes": ("lower", 0),
    "cluster.api_p99_busy": ("lower", 300),
    "cluster.reconcile_p99": ("lower", 5),
    "cluster.service_memory": ("lower", 500),
}
FIGURE = Figure("serve.first_answer", "first answer", "s", 6, "lower")


def report() -> list[dict[str, Any]]:
    if not REPORT.exists():
        pytest.skip("there is no report yet (make bench)")
    found: list[dict[str, Any]] = json.loads(REPORT.read_text())
    return found


def test_every_figure_that_was_asked_for_is_measured_against_its_target() -> None:
    figures = [one for families in run.VERBS.values() for found in families.values() for one in found]
    assert {one.name: (one.better, one.target) for one in figures if not one.name.startswith("models.")} == TARGETS
    assert len({one.title for one in figures}) == len(figures)


def test_each_command_of_a_figure_is_a_verb_of_the_makefile() -> None:
    verbs = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {f"bench-{verb}" for verb in run.VERBS} | {"bench"} <= verbs


def test_every_kind_has_its_figures_and_every_task_its_quality_by_what_its_release_depends_on() -> None:
    named = {one.name: one for one in kinds.FIGURES}
    for folder in sorted(each.parent for each in (ROOT / "bentos").glob("*/kind.toml")):
        wanted = {f"models.{folder.name}.{what}" for what in ("serving", "image")}
        if (folder / "train.py").exists():
            wanted.add(f"models.{folder.name}.quality")
            gate = re.search(r'^GATE\b.*?= \("(\w+)", "(\w+)"\)', (folder / "train.py").read_text(), re.MULTILINE)
            asked = kinds.QUALITY[folder.name]
            assert gate is not None, folder.name
            assert gate.groups() == (asked.metric, asked.better), folder.name
        assert {name for name in named if name.startswith(f"models.{folder.name}.")} == wanted
    assert named["models.violation.quality"].target == 0.97


def test_the_committed_report_has_every_figure_once_in_the_stable_order() -> None:
    """Those of a kind that is new are missing until they are measured."""
    known = {item["figure"] for item in report()}
    assert [item["figure"] for item in report()] == [
        name for name in run.ORDER if name in known or not name.startswith("models.")
    ]


def test_every_entry_says_what_was_measured_where_when_and_with_which_command() -> None:
    figures = [one for families in run.VERBS.values() for found in families.values() for one in found]
    asked = {one.name: (one.better, one.target) for one in figures}
    for item in report():
        assert item["issue"] == {"cluster": 2, "models": 3, "uploads": 4}.get(item["figure"].partition(".")[0], 1)
        assert (item["better"], item["target"]) == asked[item["figure"]]
        assert item["command"].startswith("make bench-")
        assert re.fullmatch(r"\d+ cores, \d+ GiB, \w+ \w+", item["machine"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", item["date"])
        if item["value"] is None:
            assert item["why"]
        else:
            assert isinstance(item["value"], int | float)
            assert "why" not in item


def test_every_measured_entry_has_its_raw_values() -> None:
    for item in report():
        if item["value"] is None:
            continue
        with (ROOT / item["raw"]).open(newline="") as rows:
            mine = [row for row in csv.DictReader(rows) if row["figure"] == item["figure"]]
        assert mine, item["figure"]
        assert all(float(row["value"]) >= 0 for row in mine)


def test_report_and_raw_values_name_no_place_of_the_machine_they_came_from() -> None:
    for file in [REPORT, *RAW.glob("*.csv")]:
        if file.exists():
            assert not re.search(r"/(?:root|home|tmp|work)/|https?://", file.read_text()), file


def test_a_figure_that_could_not_be_measured_is_null_with_the_reason() -> None:
    found = entry(FIGURE, "serve", "2026-01-31", None, "faketime not installed", "benchmarks/raw/serve.csv")
    assert found["value"] is None
    assert found["why"] == "faketime not installed"
    assert found["raw"] is None


def test_one_figure_that_fails_does_not_keep_the_others_from_being_measured() -> None:
    def broken(bench: Any) -> Measured:
        raise RuntimeError("the registry\nended")

    assert run._attempt(None, broken) == (None, "RuntimeError: the registry ended")  # type: ignore[arg-type]
    fine = Measured(1.0)
    assert run._attempt(None, lambda bench: fine) == (fine, None)  # type: ignore[arg-type]


def test_measuring_some_figures_again_keeps_the_others_and_the_order(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    merge(file, [{"figure": "b", "value": 1}, {"figure": "c", "value": 1}], ["a", "b", "c"])
    merge(file, [{"figure": "c", "value": 2}, {"figure": "a", "value": 2}], ["a", "b", "c"])
    assert json.loads(file.read_text()) == [
        {"figure": "a", "value": 2},
        {"figure": "b", "value": 1},
        {"figure": "c", "value": 2},
    ]
    merge(file, [], ["c", "a"])  # a figure that is no longer asked for leaves the report
    assert [item["figure"] for item in json.loads(file.read_text())] == ["c", "a"]


def test_raw_values_of_figures_that_were_not_measured_again_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "raw" / "serve.csv"
    write_raw(file, {name: Measured(1, {}, [Sample(0, "ours", "total", 1, "s")]) for name in ("a", "b")}, [])
    write_raw(file, {"b": Measured(2, {}, [Sample(0, "ours", "total", 2.5, "s")])}, ["a"])
    lines = file.read_text().splitlines()
    assert lines == ["figure,round,side,what,value,unit", "a,0,ours,total,1,s", "b,0,ours,total,2.5,s"]


@pytest.mark.parametrize(("value", "shown"), [(21.345, 21.3), (0.41234, 0.412), (1234.5, 1230), (0.0, 0), (1.0, 1)])
def test_values_have_three_digits(value: float, shown: float) -> None:
    assert significant(value) == shown


def test_the_readmes_table_has_a_row_for_every_entry_with_its_target_and_command() -> None:
    table = generated._figures()
    for item in report():
        if item["figure"].startswith("models."):
            continue
        (row,) = [line for line in table.splitlines() if line.startswith(f"| {item['title']} |")]
        assert f"`{item['command']}`" in row
        assert ("not measured" in row) == (item["value"] is None)
