"""A real service as a process of its own, with a state folder of its own; environments are shared by the run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import lightgbm
import numpy as np
import psutil
import pytest

DEADLINE = 240  # seconds that anything may take on a busy machine


@dataclass
class Home:
    """A state folder, running or not, looked at from outside."""

    path: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    def start(self, *, program: list[str] | None = None, expect: bool = True, **settings: str) -> Home:
        """Start the service (or a program that becomes it) and wait until it says where it is."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("EKIBEN_")}
        environment |= {"EKIBEN_HOME": str(self.path), "EKIBEN_PORT": "0", "EKIBEN_MLFLOW": "false"}
        environment |= self.settings | {f"EKIBEN_{key.upper()}": value for key, value in settings.items()}
        (self.path / "url").unlink(missing_ok=True)
        with (self.path / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                program or [sys.executable, "-m", "build_service"],
                cwd=self.path, env=environment, stdout=log, stderr=log,
            )  # fmt: skip
        if expect:
            until(lambda: (self.path / "url").exists() or self.process is None or self.process.poll() is not None)
            assert (self.path / "url").exists(), self.log()
            self.url = (self.path / "url").read_text().strip()
        return self

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(DEADLINE)
            self.process = None

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(DEADLINE)
            self.process = None

    def log(self) -> str:
        return (self.path / "server.log").read_text(errors="replace")[-6000:]

    # --- the API ----------------------------------------------------------------------------------------------------

    def http(self, *, known: bool = True, **options: Any) -> httpx.Client:
        """A client of the service as its own user, who has the token of the state folder; or unknown to it."""
        own = self.path / "token"
        if known and own.exists():
            options["headers"] = {"authorization": f"Bearer {own.read_text().strip()}", **options.get("headers", {})}
        return httpx.Client(**{"base_url": self.url, "trust_env": False, "timeout": DEADLINE, **options})

    def get(self, path: str, status: int = 200, **options: Any) -> Any:
        return self.call("GET", path, status, **options)

    def post(self, path: str, status: int = 200, **options: Any) -> Any:
        return self.call("POST", path, status, **options)

    def call(self, method: str, path: str, status: int = 200, **options: Any) -> Any:
        with self.http() as client:
            response = client.request(method, path, **options)
        assert response.status_code == status, f"{response.status_code}: {response.text}\n{self.log()}"
        return response.json() if response.content else None

    def upload(
        self, content: bytes, filename: str = "churn.txt", *, status: int = 201, wait: int = DEADLINE, **fields: Any
    ) -> Any:
        """POST /models as a form; fields that are no text are sent as JSON."""
        form = {key: value if isinstance(value, str) else json.dumps(value) for key, value in fields.items()}
        return self.post(f"/models?wait={wait}", status, files={"file": (filename, content)}, data=form)

    def predict(self, name: str, rows: list[Any]) -> httpx.Response:
        with self.http() as client:
            return client.post(f"/inference/{name}/predict", json={"inputs": rows})

    def settled(self, name: str, *states: str) -> Any:
        """The deployment once it is in one of the states and nothing is on its way."""
        states = states or ("live",)

        def look() -> Any:
            row = self.get(f"/deployments/{name}")
            return row if row["state"] in states and (row["state"] != "live" or row["ready"]) else None

        return until(look, lambda: f"{self.get(f'/deployments/{name}')}\n{self.log()}")

    # --- what it left behind ----------------------------------------------------------------------------------------

    def objects(self) -> set[str]:
        """Folders of versions, and files that are under no final name."""
        root = self.path / "objects"
        kept = {path.name for path in (root / "models").glob("*")}
        return kept | {f"unfinished/{path.name}" for path in (root / ".unfinished").glob("*")}

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with contextlib.closing(sqlite3.connect(self.path / "ekiben.db", timeout=30)) as connection:
            return connection.execute(query).fetchall()

    def works(self) -> list[Path]:
        return [path for path in (self.path / "builds").glob("*/work") if any(path.iterdir())]

    def processes(self) -> list[psutil.Process]:
        """Every living process of this state folder besides the service itself."""
        found, here = [], str(self.path)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self.process is not None and process.pid == self.process.pid:
                    continue
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command, folder = process.cmdline(), process.cwd()
                if any(here in part for part in command) or folder.startswith(here):
                    found.append(process)
        return found


def until(condition: Callable[[], Any], why: Callable[[], str] = lambda: "it never happened") -> Any:
    """The first true value of the condition."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise AssertionError(why())


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., Any]:
    return until


Caches = dict[str, Path]


@pytest.fixture(scope="session")
def caches(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Caches:
    """Caches by content, never part of what a test looks at: environments are shared by all workers of the run."""
    made = {"environments": run_folder / "environments", "bentos": tmp_path_factory.mktemp("bentos")}
    for folder in made.values():
        folder.mkdir(exist_ok=True)
    return made


def _home(folder: Path, caches: Caches) -> Home:
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in caches.items():
        (folder / name).symlink_to(place)
    return Home(folder)


def _end(homes: list[Home]) -> None:
    for home in homes:
        home.kill()
    for home in homes:
        until(lambda home=home: not home.processes(), lambda home=home: f"orphans: {home.processes()}")


@pytest.fixture
def home(tmp_path: Path, caches: Caches) -> Iterator[Home]:
    """A state folder of this test's own; whatever runs in it is gone at the end, or the test fails."""
    made = _home(tmp_path / "home", caches)
    yield made
    _end([made])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, caches: Caches) -> Iterator[Home]:
    """A running service for the tests of one file that do not disturb each other."""
    made = _home(tmp_path_factory.mktemp("server") / "home", caches)
    made.start()
    yield made
    _end([made])


Model = Callable[..., bytes]


@pytest.fixture(scope="session")
def model() -> Model:
    """`model(seed, features=["age", …])`: the text of a small LightGBM booster; equal arguments give equal bytes."""
    made: dict[Any, bytes] = {}

    def train(
        seed: int = 1, features: tuple[str, ...] = ("age", "income", "visits"), objective: str = "binary"
    ) -> bytes:
        key = (seed, features, objective)
        if key not in made:
            rng = np.random.default_rng(seed)
            table = rng.normal(size=(200, len(features)))
            target = (table.sum(axis=1) + rng.normal(size=200) > 0).astype(float)
            data = lightgbm.Dataset(table, target, feature_name=list(features))
            settings = {"objective": objective, "verbose": -1, "seed": seed, "num_leaves": 7, "deterministic": True}
            made[key] = lightgbm.train(settings, data, 5).model_to_string().encode()
        return made[key]

    return train


@pytest.fixture(scope="session")
def rows() -> list[dict[str, float]]:
    rng = np.random.default_rng(7)
    return [dict(zip(("age", "income", "visits"), map(float, row), strict=True)) for row in rng.normal(size=(5, 3))]


@pytest.fixture(scope="session")
def outputs(model: Model, rows: list[dict[str, float]]) -> Callable[[int], list[float]]:
    """What a model gives for `rows` where it was trained."""

    def predict(seed: int = 1) -> list[float]:
        booster = lightgbm.Booster(model_str=model(seed).decode())
        return [float(value) for value in booster.predict(np.array([list(row.values()) for row in rows]))]

    return predict
