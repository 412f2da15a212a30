"""Every kind: quality of its trained model beside a baseline, speed and memory of one worker, its image by layer."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from benchmarks import builder, parts
from benchmarks.figures import ROOT, Absent, Figure, Measured, Sample
from bentos.serving import ModelFolder
from bentos.serving.golden import compare
from registry.kinds import Kind, Kinds

BENTOS = ROOT / "bentos"
CONNECTIONS = (1, 16)
_READY_SECONDS = 120.0
_UNITS = {"per_second": "calls/s", "_ms": "ms", "_mib": "MiB", "ready_s": "s"}


@dataclass(frozen=True)
class Quality:
    """The metric that a kind's release depends on (GATE of its train.py), and the baseline among its metrics."""

    metric: str
    baseline: str
    better: Any = "higher"
    target: float | None = None


QUALITY = {
    "cargo": Quality("accuracy_tuesday", "accuracy_tuesday_before"),
    "forecast": Quality("wape", "wape_seasonal_naive", "lower"),
    "image_search": Quality("precision_10", "precision_10_raw_pixels"),
    "ranker": Quality("ndcg_10", "ndcg_10_popularity"),
    "text": Quality("auc", "auc_tfidf"),
    "violation": Quality("auc", "auc_colours", target=0.97),
}


def quality(kind: Kind) -> Callable[[parts.Bench], Measured]:
    """The figure of the training run that made bentos/KIND/model, as it was logged."""
    asked = QUALITY[kind.name]

    def measure(bench: parts.Bench) -> Measured:
        folder = trained(kind)
        if folder is None:
            raise Absent(f"bentos/{kind.name}/model is no logged model of a training (make train)")
        metrics = logged(kind, folder)
        value, baseline = metrics[asked.metric], metrics[asked.baseline]
        detail = {"metric": asked.metric, "baseline": asked.baseline, "baseline_value": baseline}
        samples = [Sample(0, "ours", name, metric, "") for name, metric in sorted(metrics.items()) if metric >= 0]
        return Measured(value, detail, samples)

    return measure


def trained(kind: Kind) -> ModelFolder | None:
    """The model in the kind's folder, where a training run logged exactly that; an example is none."""
    if kind.name not in QUALITY or not (kind.dir / "model" / "manifest.json").exists():
        return None
    folder = ModelFolder.read(kind.dir / "model")
    return folder if logged(kind, folder) else None


def logged(kind: Kind, folder: ModelFolder) -> dict[str, float]:
    """The metrics of the run that logged this model; none where there is no such run."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    home = Path(os.environ.get("EKIBEN_HOME") or "~/.ekiben").expanduser()
    if not (home / "mlflow.db").exists():
        return {}
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(f"ekiben-{kind.name}")
    if experiment is None:
        return {}
    wanted = f"tags.`ekiben.digest` = '{folder.digest}'"
    runs = client.search_runs([experiment.experiment_id], wanted, max_results=1)
    return dict(runs[0].data.metrics) if runs else {}


def model(bench: parts.Bench, kind: Kind) -> tuple[ModelFolder, str]:
    """The model that is served, and what it is: the trained one where `make train` left it, else the example."""
    found = trained(kind)
    if found is not None:
        return found, "trained"

    def make() -> ModelFolder:
        place = bench.folder(f"{kind.name}-example")
        parts.run([sys.executable, "-m", f"bentos.{kind.name}.example", place])
        return ModelFolder.read(place)

    made = bench.part(f"{kind.name}-example", make)
    assert isinstance(made, ModelFolder)
    return made, "example"


def batches(kind: Kind) -> bool:
    """Whether the kind runs several requests at once (bentos.serving.batches)."""
    return any("Batches(" in file.read_text() for file in kind.dir.glob("*.py"))


@dataclass(frozen=True)
class Worker:
    port: int
    process: psutil.Process
    ready: float
    """Seconds from the start of the process to the first 200 of /readyz."""


@contextlib.contextmanager
def worker(bench: parts.Bench, kind: Kind, folder: ModelFolder, batching: bool) -> Iterator[Worker]:
    """One process of the program that the platforms start, with the packages of this environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    env = parts.environment(EKIBEN_BENTO=str(kind.dir), EKIBEN_MODEL_DIR=str(folder.root), EKIBEN_HOST="127.0.0.1")
    env |= {"EKIBEN_PORT": str(port)} | ({} if batching else {"EKIBEN_BATCH": "1"})
    place = bench.folder("worker")
    place.mkdir()
    with (place / "log").open("wb") as log:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "bentos.serving"], cwd=place, env=env, stdout=log, stderr=log,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        while not _ready(port):
            if process.poll() is not None or time.perf_counter() - started > _READY_SECONDS:
                raise parts.Failed(f"{kind.name} is not ready: {(place / 'log').read_text(errors='replace')[-600:]}")
            time.sleep(0.01)
        yield Worker(port, psutil.Process(process.pid), time.perf_counter() - started)
    finally:
        parts.end(process)


def _ready(port: int) -> bool:
    try:
        return parts.status(f"http://127.0.0.1:{port}/readyz") == 200
    except OSError:
        return False


def serving(kind: Kind) -> Callable[[parts.Bench], Measured]:
    """Calls with the golden sample at 1 and at 16 connections, in turns with batching and without."""

    def measure(bench: parts.Bench) -> Measured:
        folder, which = model(bench, kind)
        sides = ["ours", "unbatched"] if batches(kind) else ["ours"]
        samples = [
            one
            for number in range(bench.rounds(3))
            for side in sides
            for one in _round(bench, kind, folder, number, side)
        ]
        detail: dict[str, Any] = {"model": which}
        for side in sides:
            for what in dict.fromkeys(one.what for one in samples):
                key = what if side == "ours" else f"{side}_{what}"
                detail[key] = median(one.value for one in samples if (one.side, one.what) == (side, what))
        return Measured(detail[f"per_second_{CONNECTIONS[-1]}"], detail, samples)

    return measure


def _round(bench: parts.Bench, kind: Kind, folder: ModelFolder, number: int, side: str) -> Iterator[Sample]:
    seconds, warm = (1.0, 0.5) if bench.quick else (5.0, 1.0)
    with worker(bench, kind, folder, batching=side == "ours") as one:
        _is_right(one, kind, folder)
        found = {"ready_s": one.ready}
        for connections in CONNECTIONS:
            argv = [one.port, kind.predict, folder.root / "sample.json", connections, seconds, warm]
            said, _ = parts.run([sys.executable, "-m", "benchmarks.closed_loop", *map(str, argv)])
            measured = json.loads(said)
            found |= {f"{name}_{connections}": measured[name] for name in ("per_second", "p50_ms", "p99_ms")}
        memory = one.process.memory_full_info()
        found |= {"rss_mib": memory.rss / parts.MIB, "pss_mib": memory.pss / parts.MIB}
    parts.say(f"{kind.name}, {side}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    for name, value in found.items():
        yield Sample(number, side, name, value, next(unit for part, unit in _UNITS.items() if part in name))


def _is_right(one: Worker, kind: Kind, folder: ModelFolder) -> None:
    content = (folder.root / "sample.json").read_bytes()
    answer, _ = parts.post(
        f"http://127.0.0.1:{one.port}{kind.predict}", content, **{"Content-Type": "application/json"}
    )
    result = compare(folder.expected(), json.loads(answer), 1e-5, 1e-6)
    if result.difference:
        raise parts.Failed(f"{kind.name} answers its sample wrong: {result.difference}")


def image(kind: Kind) -> Callable[[parts.Bench], Measured]:
    """The stored bytes of each layer; kinds with one lock share the layer of their packages."""

    def measure(bench: parts.Bench) -> Measured:
        folder, which = model(bench, kind)
        cache = bench.part("models-cache", lambda: bench.folder("models-cache"))
        output = bench.folder("image")
        output.mkdir()
        built = builder.build(
            bench.folder("build"),
            folder.root,
            cache,
            bench.base,
            bench.kinds,
            kind=kind.name,
            output=output / "image.tar",
        )
        parts.remove(output)
        layers: dict[str, float] = {}
        for layer in built.result["image"]["layers"]:  # the base may be several
            layers[layer["name"]] = layers.get(layer["name"], 0.0) + layer["size"] / parts.MIB
        samples = [Sample(0, "ours", name, size, "MiB") for name, size in layers.items()]
        detail = {"model": which, "mib": {name: round(size, 3) for name, size in layers.items()}}
        return Measured(sum(layers.values()), detail, samples)

    return measure


def _figures() -> dict[Figure, Callable[[parts.Bench], Measured]]:
    made: dict[Figure, Callable[[parts.Bench], Measured]] = {}
    for kind in Kinds.load(BENTOS).all:
        if (asked := QUALITY.get(kind.name)) is not None:
            title = f"{kind.name}: {asked.metric} of the trained model"
            made[Figure(f"models.{kind.name}.quality", title, "", asked.target, asked.better, 3)] = quality(kind)
        title = f"{kind.name}: calls that one worker answers at {CONNECTIONS[-1]} connections"
        made[Figure(f"models.{kind.name}.serving", title, "calls/s", None, "higher", 3)] = serving(kind)
        title = f"{kind.name}: image as stored"
        made[Figure(f"models.{kind.name}.image", title, "MiB", None, "lower", 3)] = image(kind)
    return made


FIGURES = _figures()
