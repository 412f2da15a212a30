"""Trains on monday, then again on monday and a few pictures of tuesday: `python -m bentos.cargo.train`.

A network is trained on monday's pictures. On tuesday, when the camera is at fault, it does worse; a label costs a
person's time, so only a *budget* of tuesday's pictures gets one. bentos.cargo.rounds compares ways to choose them, and
bentos.cargo.selection says what the conformal ones are. What is kept is the network retrained with the largest budget,
chosen from the whole pool.
"""

from __future__ import annotations

import argparse
import base64
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bentos.cargo import classifier, data, learning, report, rounds, store
from bentos.cargo.data import Data, Pictures, Sizes
from bentos.cargo.textures import MATERIALS
from bentos.serving.model import ModelFolder, write_model
from bentos.serving.networks import Network
from bentos.training import command, keras_files
from bentos.training.command import positive
from bentos.training.gate import Gate
from bentos.training.outcome import Outcome, Progress

GATE = ("accuracy_tuesday", "higher")
TOLERANCE = 0.02
"""Accuracy that a new model may lose: of 1,000 held-out pictures, the standard error of a difference is about 0.01."""

_STORED = 5
"""Pictures that come with the version, so that `image_path` can be tried without a store."""


@dataclass(frozen=True)
class Settings:
    """Of one training."""

    seed: int = 7
    sizes: Sizes = field(default_factory=Sizes)
    width: int = 16
    steps: int = 2400
    rate: float = 2e-3
    retrain_steps: int = 100
    retrain_rate: float = 1e-3
    budgets: tuple[int, ...] = (20, 50, 100, 200, 400)
    rounds: tuple[int, ...] = (5, 5, 5, 3, 3)
    """Repetitions of each budget."""
    method: str = "l2"
    """Of choosing for the model that is kept."""
    pictures: Path | None = None
    """Folder of pictures with lists, as bentos.cargo.data writes it; None: they are drawn."""

    @classmethod
    def small(cls, seed: int = 7) -> Settings:
        """Seconds instead of minutes: for a demonstration and for tests."""
        return cls(
            seed=seed,
            sizes=Sizes(400, 100, 100, 100, 100),
            width=8,
            steps=300,
            rate=4e-3,
            retrain_steps=20,
            budgets=(10, 30),
            rounds=(1, 1),
        )


def train(settings: Settings, progress: Progress) -> tuple[Outcome, str]:
    """The whole way from a seed to a model, and the table that says how good it is."""
    keras_files.start(settings.seed)
    progress("reading the pictures" if settings.pictures else "drawing the pictures")
    pictures = held(settings)
    trainer = learning.Trainer(learning.build(settings.seed, settings.width))
    with progress.bar("monday", settings.steps) as done:
        draw = learning.from_one(pictures.parts["monday-train"])
        trainer.run(draw, settings.steps, settings.rate, settings.seed, done)
    retrainer = rounds.Retrainer(trainer, trainer.weights, pictures, settings.retrain_steps, settings.retrain_rate)
    found = rounds.compare(retrainer, settings.budgets, settings.rounds, settings.seed, progress)

    pool = pictures.parts["tuesday-pool"]
    trainer.weights = retrainer.start
    answers = tuple(trainer.answers(pictures.parts[name].images) for name in ("monday-calibration", "tuesday-pool"))
    chosen = retrainer.choose(settings.method, pool, answers, settings.budgets[-1], settings.seed)
    retrainer.retrain(pool.some(chosen), settings.seed)
    files = model_files(keras_files.keras_bytes(trainer.network), pictures.parts["monday-test"])
    with tempfile.TemporaryDirectory() as scratch:
        saved = write_model(Path(scratch, "model"), kind="cargo", format="keras-v3", files=files)
        served = classifier.Classifier.load(saved)
        metrics = measure(served.network, pictures) | report.metrics(found)
        image = pictures.parts["monday-test"].images[1]
        expected = served.document(served.network.run(image[None])[0])
    outcome = Outcome(
        kind="cargo",
        format="keras-v3",
        files=files,
        model=classifier.NETWORK,
        sample={"picture": base64.b64encode(data.png(image)).decode()},
        expected=expected,
        parameters={
            "seed": settings.seed,
            "width": settings.width,
            "steps": settings.steps,
            "rate": settings.rate,
            "retrain_steps": settings.retrain_steps,
            "retrain_rate": settings.retrain_rate,
            "batch": learning.BATCH,
            "method": settings.method,
            "budget": settings.budgets[-1],
            "rounds": max(settings.rounds),
        },
        metrics=metrics,
        dataset="own pictures" if settings.pictures else "drawn pictures of a hold",
        dataset_digest=pictures.digest(),
        plots={"selections.png": report.plot(found)},
    )
    return outcome, f"{report.tables(found)}\n\n{kept(metrics, settings)}"


def held(settings: Settings, names: Sequence[str] = data.PARTS) -> Data:
    """The pictures of these settings, or some parts of them."""
    if settings.pictures is not None:
        return data.read(settings.pictures, names)
    return data.make(settings.sizes, settings.seed, names)


def model_files(network: bytes, pictures: Pictures) -> dict[str, bytes]:
    """The files of a version: the network, what its outputs mean, and a few pictures to name by `image_path`."""
    files = {classifier.NETWORK: network, classifier.ABOUT: classifier.about_bytes(MATERIALS)}
    for image, path in list(zip(pictures.images, pictures.paths, strict=True))[:_STORED]:
        files[f"{store.OWN_FOLDER}/{path}"] = data.png(image)
    return files


def evaluate(folder: ModelFolder, settings: Settings) -> dict[str, float]:
    """The metrics of a saved model on the held-out pictures of these settings, as its training logged them."""
    return measure(classifier.Classifier.load(folder).network, held(settings, ("monday-test", "tuesday-test")))


def measure(network: Network, pictures: Data) -> dict[str, float]:
    """Accuracy on held-out pictures of both days, by corruption too, beside the most frequent material's share."""
    monday, tuesday = pictures.parts["monday-test"], pictures.parts["tuesday-test"]
    right = network.run(tuesday.images).argmax(axis=1) == tuesday.labels
    corruptions = np.array(tuesday.corruptions)
    return {
        "accuracy_tuesday": float(right.mean()),
        "accuracy_monday": float((network.run(monday.images).argmax(axis=1) == monday.labels).mean()),
        "accuracy_prior": float(np.bincount(tuesday.labels).max() / len(tuesday)),
        **{f"accuracy_tuesday_{name}": float(right[corruptions == name].mean()) for name in sorted(set(corruptions))},
    }


def kept(metrics: dict[str, float], settings: Settings) -> str:
    """What the model that is kept can do."""
    parts = ", ".join(
        f"{name} {100 * metrics[f'accuracy_tuesday_{name}']:.1f}"
        for name in data.CORRUPTIONS
        if f"accuracy_tuesday_{name}" in metrics
    )
    return (
        f"kept: retrained with {settings.budgets[-1]} pictures of the whole pool, chosen by {settings.method}: "
        f"tuesday {100 * metrics['accuracy_tuesday']:.1f} % ({parts}), monday {100 * metrics['accuracy_monday']:.1f} %"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.cargo.train",
        description="Train a network that tells the material in a hold on monday's pictures, and retrain it on monday "
        "and a selection of tuesday's, chosen at random and by conformal prediction. The result is a model folder, "
        "ready to upload, and a table that compares the selections.",
        epilog="Example: python -m bentos.cargo.train --small --register http://localhost:8000",
    )
    parser.add_argument("--seed", type=int, default=7, help="same seed, same pictures, same model file (default 7)")
    parser.add_argument(
        "--method", choices=rounds.METHODS, help=f"of choosing for the model that is kept (default {Settings().method})"
    )
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="pictures with lists, as python -m bentos.cargo.data writes them"
    )
    parser.add_argument("--rounds", type=positive, help="repetitions of each budget (default 5 to 3; 1 with --small)")
    parser.add_argument("--small", action="store_true", help="a few seconds, for a first look")
    command.add_options(parser, Path(__file__).parent / "model")
    options = parser.parse_args(arguments)
    settings = Settings.small(options.seed) if options.small else Settings(seed=options.seed)
    repeated = settings.rounds if options.rounds is None else (options.rounds,) * len(settings.budgets)
    settings = replace(settings, method=options.method or settings.method, pictures=options.pictures, rounds=repeated)
    progress = Progress.start(options.quiet)
    try:
        outcome, shown = train(settings, progress)
    except data.PicturesError as error:
        parser.error(str(error))
    print(shown)
    gate = Gate(*GATE, TOLERANCE, lambda folder: evaluate(folder, settings))
    return command.finish(outcome, options, progress, gate)


if __name__ == "__main__":
    raise SystemExit(main())
