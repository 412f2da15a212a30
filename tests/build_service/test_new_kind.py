"""docs/new-kind.md is literally true: its files are written, its commands are run, and the new kind is as any other."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from bentos.serving import ModelFolder
from registry.kinds import Kinds
from tests.bentos.conformance import Conformance, Running
from tests.bentos.kinds import Entry

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "new-kind.md"
OF_A_CHECKOUT = ("bentos", "builder_image", "build_service", "client", "registry", "scripts")
LAST = ".venv/bin/ekiben down"


def blocks() -> tuple[dict[str, str], list[str]]:
    """The page's files, by the path on the line before each, and its commands in their order."""
    files: dict[str, list[str]] = {}
    commands: list[str] = []
    name: str | None = None
    for line in PAGE.read_text().splitlines():
        if line.startswith("    "):
            (files.setdefault(name, []) if name is not None else commands).append(line[4:])
        elif not line and name is not None and name in files:
            files[name].append("")
        elif line:
            name = line[1:-1] if line.startswith("`bentos/") and line.endswith("`") and line.count("`") == 2 else None
    return {name: "\n".join(lines).strip("\n") + "\n" for name, lines in files.items()}, commands


@dataclass(frozen=True)
class Followed:
    """What was shown by each command, and where it runs."""

    checkout: Path
    url: str
    shown: dict[str, str]


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory, caches: dict[str, Path]) -> Iterator[Followed]:
    """A checkout in which the page was followed to its end but for `ekiben down`, which comes last."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in OF_A_CHECKOUT:
        unwanted = shutil.ignore_patterns("__pycache__", "model", "build")
        shutil.copytree(ROOT / name, checkout / name, ignore=unwanted)
    for name in ("pyproject.toml", "requirements.lock"):
        shutil.copyfile(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to(ROOT / ".venv")
    home = tmp_path_factory.mktemp("home")
    for name, place in caches.items():
        (home / name).symlink_to(place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("EKIBEN_")}
    # this checkout's packages go before those that .venv was made with
    environment |= {"PYTHONPATH": str(checkout), "HOME": str(home), "COLUMNS": "200"}
    environment |= {"EKIBEN_HOME": str(home), "EKIBEN_PORT": str(port), "EKIBEN_MLFLOW": "false"}
    environment |= {"UV_CACHE_DIR": _uv_cache()}

    def run(command: str) -> str:
        done = subprocess.run(
            ["sh", "-c", command], cwd=checkout, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        return done.stdout

    files, commands = blocks()
    assert commands[-1] == LAST
    shown = {commands[0]: run(commands[0])}
    for name, text in files.items():
        (checkout / name).write_text(text)
    try:
        for command in commands[1:-1]:
            shown[command] = run(command)
        yield Followed(checkout, f"http://127.0.0.1:{port}", shown)
    finally:
        run(LAST)


@pytest.fixture(scope="module")
def running(followed: Followed) -> Iterator[Running]:
    kind = Kinds.load(followed.checkout / "bentos").named("outlier")
    folder = ModelFolder.read(kind.dir / "model")
    url = f"{followed.url}/inference/outlier"
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
        yield Running(kind, Entry(), "local", folder, client, ("outlier", "1"), limit=64 << 20, metrics=404)


def test_it_takes_fewer_than_60_lines_of_ones_own() -> None:
    files, _ = blocks()
    lines = sum(len(text.splitlines()) for text in files.values())
    assert f"in {lines} lines" in PAGE.read_text()
    assert lines < 60
    assert set(files) == {
        f"bentos/outlier/{name}"
        for name in ("kind.toml", "service.py", "bentofile.yaml", "requirements.in", "example.py")
    }


def test_its_last_word_is_a_prediction_of_the_new_kind(followed: Followed) -> None:
    (said,) = [text for command, text in followed.shown.items() if "ekiben predict" in command]
    body = json.loads(said)
    (value,) = body["outputs"] if isinstance(body, dict) else body
    assert value == pytest.approx(6, abs=0.5)
    (pushed,) = [text for command, text in followed.shown.items() if "ekiben push" in command]
    assert "5/5 predictions match" in pushed


class TestNewKind(Conformance):
    """It offers what every kind offers."""


def _uv_cache() -> str:
    """uv's cache as it is without the HOME that the commands are given."""
    given = os.environ.get("UV_CACHE_DIR")
    return given or str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv")
