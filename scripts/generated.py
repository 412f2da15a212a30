"""Files that are made by a program: locks, the OpenAPI document, lists of errors and settings, the table of figures.

python -m scripts.generated --write    make them again
python -m scripts.generated --check    fail if one is not current
python -m scripts.generated --locks    resolve every lock again, with today's newest versions; --locks KIND: of one kind
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scripts import errors, kinds, settings

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "benchmarks" / "report.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", action="store_true")
    choice.add_argument("--check", action="store_true")
    choice.add_argument("--locks", nargs="*", metavar="KIND")
    arguments = parser.parse_args()
    if arguments.locks is not None:
        for target, argv in locks():
            if arguments.locks and target.parent.name not in arguments.locks:
                continue
            print(f"resolving {target.relative_to(ROOT)} …", flush=True)
            subprocess.run([*argv, "--upgrade", "--output-file", str(target)], cwd=ROOT, check=True)
        return 0
    stale = []
    for path, text in _documents():
        if not path.exists() or path.read_text() != text:
            stale.append(path)
            if arguments.write:
                path.write_text(text)
    if arguments.write:
        for path in stale:
            print(f"wrote {path.relative_to(ROOT)}")
        return 0
    stale += list(_stale_locks())
    for path in stale:
        print(f"{path.relative_to(ROOT)} is not current: run `make openapi` (or `make lock` for a lock)")
    return 1 if stale else 0


def uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    return str(beside) if beside.exists() else (shutil.which("uv") or "uv")


def locks() -> Iterator[tuple[Path, list[str]]]:
    """Each lock and the command that makes it. No lock names the index that it was resolved with."""
    common = [
        uv(), "pip", "compile", "--quiet", "--universal", "--generate-hashes", "--python-version", "3.11",
        "--no-header", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links", "--no-emit-package", "ekiben",
    ]  # fmt: skip
    yield (
        ROOT / "requirements.lock",
        [*common, "pyproject.toml", "client/pyproject.toml", "--group", "pyproject.toml:dev"],
    )
    for source in sorted((ROOT / "containerfiles").glob("*.in")):
        # Our own images hold the versions that the tests ran with.
        ours = [] if source.stem == "mlflow" else ["--constraint", "requirements.lock"]
        yield source.with_suffix(".txt"), [*common, str(source.relative_to(ROOT)), *ours]
    for source in sorted((ROOT / "bentos").glob("*/requirements.in")):
        yield source.with_suffix(".txt"), [*common, str(source.relative_to(ROOT))]


def _stale_locks() -> Iterator[Path]:
    """Locks that do not satisfy their inputs any more: resolving again, with the lock's pins, would change them."""
    for target, argv in locks():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, target.name)
            if target.exists():
                shutil.copyfile(target, copy)
            subprocess.run([*argv, "--output-file", str(copy)], cwd=ROOT, check=True)
            if not target.exists() or copy.read_bytes() != target.read_bytes():
                yield target


def _documents() -> Iterator[tuple[Path, str]]:
    document = subprocess.run(
        [sys.executable, "-m", "build_service", "--openapi"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    yield ROOT / "docs" / "openapi.json", document
    yield ROOT / "docs" / "errors.md", errors.document(ROOT)
    yield ROOT / "docs" / "settings.md", settings.document()
    yield _with_table(ROOT / "README.md", "figures", _figures())
    yield _with_table(ROOT / "docs" / "guide.md", "kinds", kinds.table(ROOT))
    yield _with_table(ROOT / "benchmarks" / "README.md", "models", kinds.figures(ROOT, _report()))


def _with_table(page: Path, name: str, table: str) -> tuple[Path, str]:
    """A page whose table between <!-- NAME --> and <!-- /NAME --> is made here."""
    place = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return page, place.sub(lambda found: found[1] + table + found[2], page.read_text())


def _report() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(REPORT.read_text()) if REPORT.exists() else []
    return found


def _figures() -> str:
    """The table of benchmarks/report.json but for the kinds', which have one of their own."""
    rows = ["| figure | measured | target | command |", "| --- | --- | --- | --- |"]
    for entry in _report():
        if entry["figure"].startswith("models."):
            continue
        better = "≥" if entry["better"] == "higher" else "≤"
        unit = "" if entry["unit"] in ("x", "") else f" {entry['unit']}"
        times = " ×" if entry["unit"] == "x" else unit
        value = f"not measured: {entry['why']}" if entry["value"] is None else f"{entry['value']:g}{times}"
        target = "" if entry["target"] is None else f"{better} {entry['target']:g}{times}"
        rows.append(f"| {entry.get('title', entry['figure'])} | {value} | {target} | `{entry['command']}` |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
