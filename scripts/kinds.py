"""The tables of kinds: what each serves (from its kind.toml), and its figures (from benchmarks/report.json)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from registry.formats import FORMATS
from registry.kinds import Kind, Kinds

Report = Mapping[str, Mapping[str, Any]]


def table(root: Path) -> str:
    """For the user guide: the kinds, what they serve, and from which files."""
    lines = ["| kind | serves | files |", "| --- | --- | --- |"]
    for kind in _kinds(root):
        files = ", ".join(dict.fromkeys(FORMATS.get(name, name) for name in kind.formats))
        how = files if kind.generic else f"{files}; `kind={kind.name}`"
        lines.append(f"| [{kind.name}](../bentos/{kind.name}/README.md) | {kind.description} | {how} |")
    return "\n".join(lines) + "\n"


def figures(root: Path, entries: Iterable[Mapping[str, Any]]) -> str:
    """For the page of figures: every kind's, with and without batching where it has any."""
    report = {entry["figure"]: entry for entry in entries}
    lines = [
        "| kind | quality (baseline) | calls/s at 1, 16 connections | p50 / p99 at 1 | at 16 | ready | memory (PSS) "
        "| image: packages + code + model |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for kind in _kinds(root):
        quality, image = _quality(report, kind), _image(report, kind)
        served = report.get(f"models.{kind.name}.serving", {}).get("detail", {})
        lines.append(f"| {kind.name} | {quality} | {_speed(served)} | {_memory(served)} | {image} |")
        if "unbatched_per_second_16" in served:
            alone = {key.removeprefix("unbatched_"): value for key, value in served.items() if "unbatched_" in key}
            lines.append(f"| {kind.name}, no batching | | {_speed(alone)} | {_memory(alone)} | |")
    return "\n".join(lines) + "\n"


def _kinds(root: Path) -> tuple[Kind, ...]:
    found = Kinds.load(root / "bentos").all
    return tuple(sorted(found, key=lambda kind: (not kind.generic, kind.name)))


def _quality(report: Report, kind: Kind) -> str:
    entry = report.get(f"models.{kind.name}.quality", {})
    if entry.get("value") is None:
        return "the user's" if kind.generic else "not measured"
    detail = entry["detail"]
    return f"{detail['metric']} {entry['value']:g} ({detail['baseline']} {detail['baseline_value']:g})"


def _speed(served: Mapping[str, Any]) -> str:
    if not served:
        return "not measured | | "
    rates = f"{served['per_second_1']:g}, {served['per_second_16']:g}"
    times = (f"{served[f'p50_ms_{count}']:g} / {served[f'p99_ms_{count}']:g} ms" for count in (1, 16))
    return " | ".join([rates, *times])


def _memory(served: Mapping[str, Any]) -> str:
    return f"{served['ready_s']:g} s | {served['pss_mib']:g} MiB" if served else " | "


def _image(report: Report, kind: Kind) -> str:
    entry = report.get(f"models.{kind.name}.image", {})
    if entry.get("value") is None:
        return "not measured"
    layers = entry["detail"]["mib"]
    return " + ".join(f"{layers.get(name, 0):.3g}" for name in ("deps", "code", "model")) + " MiB"
