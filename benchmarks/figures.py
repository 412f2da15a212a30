"""What is measured, and the report that it goes into (the shape is in docs and in tests/benchmarks)."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "report.json"
RAW = ROOT / "benchmarks" / "raw"


class Absent(Exception):
    """A figure cannot be measured here; the message says what is missing."""


@dataclass(frozen=True)
class Figure:
    name: str
    title: str
    unit: str
    target: float | None
    """None: none was asked for, the figure is there to be known."""
    better: Literal["higher", "lower"]
    issue: int = 1


@dataclass(frozen=True)
class Sample:
    """One value of one round: `side` is ours or what it is compared with, `what` the thing measured."""

    round: int
    side: str
    what: str
    value: float
    unit: str


@dataclass(frozen=True)
class Measured:
    """A figure's value, the medians it is made of, and every single value behind them."""

    value: float
    detail: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()


def middle(samples: Iterable[Sample], side: str, what: str) -> float:
    return median(sample.value for sample in samples if (sample.side, sample.what) == (side, what))


def entry(figure: Figure, verb: str, date: str, measured: Measured | None, why: str | None, raw: str) -> dict[str, Any]:
    """One object of the report; `why` is there exactly when the value is null."""
    found: dict[str, Any] = {
        "figure": figure.name,
        "title": figure.title,
        "issue": figure.issue,
        "value": None if measured is None else significant(measured.value),
        "unit": figure.unit,
        "target": figure.target,
        "better": figure.better,
        "command": f"make bench-{verb}",
        "machine": machine(),
        "date": date,
        "raw": None if measured is None else raw,
    }
    if measured is None:
        found["why"] = why or "not measured"
    elif measured.detail:
        found["detail"] = {
            key: significant(value) if isinstance(value, float) else value for key, value in measured.detail.items()
        }
    return found


def significant(value: float) -> float:
    """Three digits: more would not come out again."""
    rounded = float(f"{value:.3g}")
    return int(rounded) if rounded.is_integer() else rounded


def machine() -> str:
    gibibytes = round(psutil.virtual_memory().total / 2**30)
    return f"{os.cpu_count()} cores, {gibibytes} GiB, {platform.system()} {platform.machine()}"


def merge(report: Path, entries: Iterable[Mapping[str, Any]], order: Sequence[str]) -> None:
    """Put entries into the report in place of earlier ones of the same figure; the order is always the same."""
    known = {item["figure"]: item for item in json.loads(report.read_text())} if report.exists() else {}
    known |= {item["figure"]: dict(item) for item in entries}
    listed = [known[name] for name in order if name in known]
    draft = report.with_suffix(".tmp")
    draft.write_text(json.dumps(listed, indent=1, ensure_ascii=False) + "\n")
    os.replace(draft, report)


def write_raw(file: Path, measured: Mapping[str, Measured], others: Sequence[str]) -> None:
    """All samples of a family; those of `others`, figures of the family that were not measured now, are kept."""
    kept: list[dict[str, str]] = []
    if file.exists():
        with file.open(newline="") as rows:
            kept = [row for row in csv.DictReader(rows) if row["figure"] in others]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["figure", "round", "side", "what", "value", "unit"])
        writer.writerows([row[key] for key in ("figure", "round", "side", "what", "value", "unit")] for row in kept)
        for name, found in measured.items():
            for one in found.samples:
                writer.writerow([name, one.round, one.side, one.what, f"{one.value:.6g}", one.unit])
