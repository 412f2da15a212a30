"""The kinds as the conformance suite meets them: found by their kind.toml, each with an entry in KINDS.

The suite runs in four places: `process` and `bentoml` (and `wrapper`, the program that the platforms start) in
tests/bentos/test_conformance.py, the local platform in tests/build_service/test_kinds.py, a Kubernetes in
tests/cluster/test_kinds.py. `make test` runs every kind in process and under `bentoml serve`, and the kinds of
EVERYWHERE in all places that need no cluster; `make test-all` runs every kind in all of these, `make e2e` every kind in
the cluster.
"""

from __future__ import annotations

import fcntl
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bentos.serving import ModelFolder
from registry.kinds import Kind, Kinds

BENTOS = Path(__file__).resolve().parents[2] / "bentos"

EVERYWHERE = ("ranker", "onnx")
"""A task kind and a generic one, both quick to import: what differs between the places shows on them."""


@dataclass(frozen=True)
class Rows:
    """A kind that takes `{"inputs": [row, …]}`; `named` says that a row may be an object by column name."""

    named: bool
    missing: bool = True
    """null stands for a missing number."""
    categories: bool = True


@dataclass(frozen=True)
class Entry:
    """What kind.toml does not say of the example model of a kind."""

    classes: Sequence[Any] | None = None
    """What /label answers; None: the model is no classifier."""
    rows: Rows | None = None


KINDS: Mapping[str, Entry] = {
    "cargo": Entry(classes=["background", "brick", "concrete", "ground", "wood"]),
    "forecast": Entry(),
    "image_search": Entry(),
    "lightgbm": Entry(classes=[0, 1], rows=Rows(named=True)),
    "mlflow": Entry(classes=[0, 1], rows=Rows(named=True)),
    "onnx": Entry(rows=Rows(named=False, missing=False, categories=False)),
    "ranker": Entry(),
    "sklearn": Entry(classes=["adelie", "chinstrap", "gentoo"], rows=Rows(named=True)),
    "tensorflow": Entry(),
    "text": Entry(classes=["ham", "spam"]),
    "transformers": Entry(classes=["complaint", "question", "thanks"]),
    "violation": Entry(classes=["animal", "violation"]),
    "xgboost": Entry(rows=Rows(named=True)),
}


def found() -> dict[str, Kind]:
    """Every kind that this checkout has, by name."""
    return {kind.name: kind for kind in Kinds.load(BENTOS).all}


def pairs(places: Sequence[str], always: Sequence[str] = (), names: Sequence[str] = EVERYWHERE) -> list[Any]:
    """A parameter `KIND-PLACE` for each. All but those of `names`, and those of the places `always`, bear the marker
    `thorough`: they are left to `make test-all` and, in the cluster, to `make e2e` where CI is content with `names`."""
    made = []
    for name in sorted(found().keys() & KINDS.keys()):  # one without an entry fails a test of its own
        for place in places:
            thorough = place not in always and name not in names
            made.append(pytest.param(f"{name}-{place}", marks=[pytest.mark.thorough] if thorough else []))
    return made


def takes_rows(pair: Any) -> bool:
    """Whether a parameter's kind takes rows."""
    return KINDS[str(pair).rpartition("-")[0]].rows is not None


def split(pair: str) -> tuple[Kind, Entry, str]:
    name, _, place = pair.rpartition("-")
    return found()[name], KINDS[name], place


def example(name: str, folder: Path) -> ModelFolder:
    """The kind's example model, made once in `folder` by whichever worker comes first."""
    place = folder / "examples" / name
    place.parent.mkdir(exist_ok=True)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "manifest.json").exists():
            importlib.import_module(f"bentos.{name}.example").write(place)
    return ModelFolder.read(place)


def deployment(kind: Kind) -> str:
    """The name under which the example is uploaded."""
    return f"{kind.name.replace('_', '-')}-example"


def form(kind: Kind, folder: ModelFolder) -> dict[str, str]:
    """The fields of an upload beside its files. A generic kind is not named: its files tell."""
    given = {"name": deployment(kind)} | ({} if kind.generic else {"kind": kind.name})
    for field in ("sample", "expected"):
        given[field] = (folder.root / f"{field}.json").read_text()
    return given


def files(folder: ModelFolder) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", (name, folder.path(name).read_bytes())) for name in folder.files]
