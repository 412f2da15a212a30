"""The README's first screen is literally true: its commands are read from the page and run."""

from __future__ import annotations

import json
import re
import shlex
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import lightgbm
import numpy as np
import pytest

if TYPE_CHECKING:
    from tests.client.conftest import Running

README = Path(__file__).parents[2] / "README.md"
FEATURES = 24


def first_screen() -> list[tuple[str, list[str]]]:
    """Each command of the first screen, with the lines that it shows."""
    found: list[tuple[str, list[str]]] = []
    for line in README.read_text().splitlines():
        if line.startswith("    $ ekiben "):
            found.append((line[6:].partition("#")[0].strip(), []))
        elif found and line.startswith("    "):
            found[-1][1].append(line.strip())
        elif found:
            return found
    raise AssertionError("the README has no first screen")


def churn(folder: Path, seed: int, rounds: int) -> lightgbm.Booster:
    random = np.random.default_rng(seed)
    rows = random.normal(size=(400, FEATURES))
    booster = lightgbm.train(
        {"objective": "binary", "verbose": -1, "seed": seed, "num_threads": 1},
        lightgbm.Dataset(rows, (rows[:, 0] + rows[:, 1] > 0).astype(int)),
        rounds,
    )
    (folder / "rows.json").write_text(
        json.dumps({"inputs": rows[:5].tolist(), "outputs": booster.predict(rows[:5]).tolist()})
    )
    return booster


class Caller(threading.Thread):
    """Calls an endpoint until it is told to stop; every answer that is not 200 is a failure."""

    def __init__(self, url: str, body: object) -> None:
        super().__init__(daemon=True)
        self.url, self.body = url, body
        self.ended = threading.Event()
        self.answers: dict[str, int] = {}
        self.failures: list[str] = []

    def run(self) -> None:
        with httpx.Client(trust_env=False, timeout=30) as client:
            while not self.ended.is_set():
                try:
                    answer = client.post(self.url, json=self.body)
                    answer.raise_for_status()
                    version = answer.headers["ekiben-version"]
                    self.answers[version] = self.answers.get(version, 0) + 1
                except httpx.HTTPError as error:
                    self.failures.append(repr(error))


@pytest.mark.slow
def test_the_first_screen_is_literally_true(server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    churn(tmp_path, seed=2, rounds=30).save_model("churn-v2.txt")
    churn(tmp_path, seed=1, rounds=20).save_model("churn.txt")
    commands = first_screen()
    assert len(commands) == 3

    def run(index: int) -> list[str]:
        command, shown = commands[index]
        done = server.ekiben(*shlex.split(command)[1:])
        assert done.returncode == 0, done.stderr
        if shown:
            assert [timeless(line) for line in done.stdout.splitlines()] == [
                timeless(line.replace("http://localhost:8000", server.url)) for line in shown
            ]
        return shown

    assert run(0), "the first command shows what it prints"
    rows = json.loads((tmp_path / "rows.json").read_text())["inputs"]
    caller = Caller(f"{server.url}/inference/churn/predict", {"inputs": rows})
    caller.start()
    run(1)
    builds = httpx.get(f"{server.url}/builds", trust_env=False).json()["items"]
    run(2)
    caller.ended.set()
    caller.join()
    assert not caller.failures
    assert set(caller.answers) == {"1", "2"}
    assert httpx.get(f"{server.url}/builds", trust_env=False).json()["items"] == builds, "nothing is rebuilt"


def timeless(line: str) -> str:
    return re.sub(r"\d+(\.\d+)? s\b", "N s", line)
