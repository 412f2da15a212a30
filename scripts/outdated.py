"""List what is out of date in the locks.

python -m scripts.outdated

Prints, for each package, what `make lock` would change and in which locks, and what is older than the newest release
although `make lock` would not change it, with the requirement that holds it back. Exits with 1 if `make lock` would
change anything. Asks the package index that uv is configured for.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from scripts.generated import ROOT, locks, uv

_PIN = re.compile(r"^(?P<name>[A-Za-z0-9._-]+)==(?P<version>[^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True, order=True)
class Change:
    """A package whose version changes from `old` to `new` (comma separated where a lock has several by marker)."""

    name: str
    old: str
    new: str


@dataclass(frozen=True, order=True)
class HeldBack:
    """An installed package that is older than `newest`; `by` are the requirements that exclude it."""

    name: str
    version: str
    newest: str
    by: tuple[str, ...]


def pins(lock: str) -> dict[str, str]:
    """Return the versions of a lock by package name; several versions of one package are sorted and joined."""
    found: dict[str, set[str]] = {}
    for match in _PIN.finditer(lock):
        found.setdefault(canonicalize_name(match["name"]), set()).add(match["version"])
    return {name: ", ".join(sorted(versions, key=Version)) for name, versions in found.items()}


def changes(old: str, new: str) -> list[Change]:
    """Return what differs between two locks, added and removed packages included ("absent")."""
    before, after = pins(old), pins(new)
    return [
        Change(name, before.get(name, "absent"), after.get(name, "absent"))
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]


def held_back(outdated: Iterable[Mapping[str, str]], requirers: Mapping[str, Iterable[str]]) -> list[HeldBack]:
    """Return the packages that a requirement keeps from their newest release.

    `outdated` holds objects with name, version and latest_version; `requirers` the requirements of each installed
    distribution, by "name version".
    """
    parsed = {
        requirer: [one for one in map(Requirement, needs) if one.marker is None or one.marker.evaluate({"extra": ""})]
        for requirer, needs in requirers.items()
    }
    found = []
    for each in outdated:
        name = canonicalize_name(each["name"])
        by = sorted(
            f"{requirer} ({need.name}{need.specifier})"
            for requirer, needs in parsed.items()
            for need in needs
            if canonicalize_name(need.name) == name and not need.specifier.contains(each["latest_version"])
        )
        found.append(HeldBack(name, each["version"], each["latest_version"], tuple(by)))
    return sorted(found)


def main() -> int:
    moved: dict[Change, list[str]] = {}
    for target, argv in locks():
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, target.name)
            shutil.copyfile(target, copy)
            subprocess.run([*argv, "--upgrade", "--output-file", str(copy)], cwd=ROOT, check=True)
            for change in changes(target.read_text(), copy.read_text()):
                moved.setdefault(change, []).append(str(target.relative_to(ROOT)))
    for change, places in sorted(moved.items()):
        where = places[0] if len(places) == 1 else f"{places[0]} and {len(places) - 1} more"
        print(f"{change.name} {change.old} → {change.new} by `make lock` in {where}")
    changing = {change.name for change in moved}
    for held in held_back(_installed_outdated(), _requirements()):
        if held.name not in changing:
            reason = "held back by " + ", ".join(held.by) if held.by else "held back by the resolution as a whole"
            print(f"{held.name} {held.version}, newest {held.newest}: {reason}")
    if not moved:
        print("`make lock` would change nothing.")
    return 1 if moved else 0


def _installed_outdated() -> list[dict[str, str]]:
    """Return the packages of this environment, which holds requirements.lock, that have a newer release."""
    argv = [uv(), "pip", "list", "--outdated", "--format", "json", "--python", sys.executable]
    listed: list[dict[str, str]] = json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)
    return listed


def _requirements() -> dict[str, list[str]]:
    return {f"{one.metadata['Name']} {one.version}": one.requires or [] for one in metadata.distributions()}


if __name__ == "__main__":
    sys.exit(main())
