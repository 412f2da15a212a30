"""Trains a detector of pictures without an animal: `python -m bentos.violation.train`.

A small convolutional network learns on most of the pictures. On a validation split that it has not seen, its logits
are divided by the temperature that makes its probabilities most likely, and the threshold is chosen by
`calibration.RULE`. All figures are of the test pictures, which had no part in any of this, and of the network as it is
served: from its file.
"""

from __future__ import annotations

import argparse
import base64
import io
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bentos.serving.model import ModelFolder, write_model
from bentos.serving.pictures import PICTURE
from bentos.training import cifar10, command
from bentos.training.command import positive
from bentos.training.gate import Gate
from bentos.training.keras_files import keras_bytes, start
from bentos.training.outcome import Outcome, Progress, table
from bentos.violation import calibration, learning
from bentos.violation.data import Data, Labelled, drawn, of_cifar10
from bentos.violation.detector import ABOUT, NETWORK, Decision, Detector
from bentos.violation.learning import Recipe

GATE = ("auc", "higher")
TOLERANCE = 0.003
"""Area under the curve that a new model may lose: about what another seed changes."""
_FORMAT = "keras-v3"


@dataclass(frozen=True)
class Settings:
    """Of one training."""

    seed: int = 7
    source: str = "auto"
    """Where CIFAR-10 comes from (cifar10.SOURCES), or `drawn`."""
    pictures: int = 45_000
    """To train on; of CIFAR-10 the rest of the 50,000 validates."""
    recipe: Recipe = field(default=Recipe((32, 48, 64, 64, 96), epochs=12, batch=128, rate=4e-3))

    @classmethod
    def small(cls, seed: int = 7) -> Settings:
        """Seconds, and no network: drawn pictures."""
        return cls(seed, "drawn", 1500, Recipe((8, 12, 16, 16, 24), epochs=6, batch=32, rate=1e-2))


def data_of(settings: Settings, progress: Progress) -> Data:
    """Raises cifar10.DataError."""
    if settings.source == "drawn":
        return drawn(settings.pictures, settings.seed)
    return of_cifar10(settings.source, 50_000 - settings.pictures, settings.seed, progress)


def train(settings: Settings, progress: Progress) -> tuple[Outcome, str]:
    """The whole way from a seed to a model, and the table that says how good it is. Raises cifar10.DataError."""
    data = data_of(settings, progress)
    progress(f"{data.name}: {len(data.train.violations)} pictures to train on, {len(data.test.violations)} to test on")
    start(settings.seed)
    model = learning.network(settings.recipe)
    with progress.bar("learning", learning.steps_of(data.train, settings.recipe)) as advance:
        learning.learn(model, data.train, settings.recipe, settings.seed, advance)
    known = data.validation
    temperature = calibration.temperature(learning.logits(model, known.pictures), known.violations)
    before = _sigmoid(learning.logits(model, data.test.pictures))
    file = keras_bytes(learning.calibrated(model, temperature))
    progress(f"temperature {temperature:.3f}")

    with tempfile.TemporaryDirectory(prefix="ekiben-violation-") as scratch:
        undecided = Decision(0.5, calibration.RULE, temperature)
        detector = _saved(Path(scratch), {NETWORK: file, ABOUT: undecided.to_bytes()})
    line = calibration.threshold(_probabilities(detector, known), known.violations)
    detector = replace(detector, decision=replace(undecided, threshold=line))
    after = _probabilities(detector, data.test)
    sample = {PICTURE: base64.b64encode(_png(data.test.pictures[0])).decode()}
    request = detector.parse(sample)
    progress("fitting the baseline")
    metrics = measure(detector, data.test, after) | beside(data, before)
    outcome = Outcome(
        kind="violation",
        format=_FORMAT,
        files={NETWORK: file, ABOUT: detector.decision.to_bytes()},
        model=NETWORK,
        sample=sample,
        expected=detector.document(request, detector.probabilities(request.pixels)),
        parameters={
            "seed": settings.seed,
            "pictures": len(data.train.violations),
            "validation_pictures": len(known.violations),
            "widths": " ".join(map(str, settings.recipe.widths)),
            "parameters": detector.network.parameters,
            "epochs": settings.recipe.epochs,
            "batch": settings.recipe.batch,
            "learning_rate": settings.recipe.rate,
            "weight_decay": settings.recipe.decay,
            "threshold_rule": calibration.RULE,
        },
        metrics=metrics,
        dataset=data.name,
        dataset_digest=data.digest,
        plots={"reliability.png": calibration.plot(before, after, data.test.violations)},
    )
    return outcome, report(metrics, data)


def measure(detector: Detector, test: Labelled, probabilities: NDArray[np.float64]) -> dict[str, float]:
    """How good the probabilities and the decisions of a detector are."""
    line = detector.decision.threshold
    return {
        "auc": calibration.auc(probabilities, test.violations),
        "brier": calibration.brier(probabilities, test.violations),
        "calibration_error": calibration.calibration_error(probabilities, test.violations),
        **calibration.at_threshold(probabilities, test.violations, line),
        "threshold": line,
        "temperature": detector.decision.temperature,
    }


def beside(data: Data, uncalibrated: NDArray[np.float64]) -> dict[str, float]:
    """The same figures of what the detector is compared with."""
    truth = data.test.violations
    prior = np.full(len(truth), data.train.violations.mean())
    found: dict[str, float] = {}
    for name, probabilities in (
        ("prior", prior),
        ("colours", learning.baseline(data.train, data.test)),
        ("uncalibrated", uncalibrated),
    ):
        found[f"auc_{name}"] = calibration.auc(probabilities, truth)
        found[f"brier_{name}"] = calibration.brier(probabilities, truth)
        found[f"calibration_error_{name}"] = calibration.calibration_error(probabilities, truth)
    return found


def evaluate(folder: ModelFolder, settings: Settings) -> dict[str, float]:
    """The metrics of a saved model on the held-out pictures of these settings, as its training logged them."""
    detector = Detector.load(folder)
    test = data_of(settings, Progress.start(quiet=True)).test
    return measure(detector, test, _probabilities(detector, test))


def report(metrics: dict[str, float], data: Data) -> str:
    """The table of a training."""
    names = {"prior": "the share of violations", "colours": "logistic regression on colours"}
    names |= {"uncalibrated": "network, as trained"}
    rows: list[list[str | float]] = [
        [title, *(metrics[f"{figure}_{name}"] for figure in ("auc", "brier", "calibration_error"))]
        for name, title in names.items()
    ]
    rows.append(["network, calibrated", metrics["auc"], metrics["brier"], metrics["calibration_error"]])
    shown = table([f"{len(data.test.violations)} test pictures", "ROC-AUC", "Brier", "calibration error"], rows)
    return (
        f"{shown}\n\nat the threshold {metrics['threshold']:.4f}, {metrics['recall']:.1%} of the violations are found; "
        f"{metrics['precision']:.1%} of what is called a violation is one;\n"
        f"{metrics['false_alarms']:.1%} of the animal pictures are called a violation"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bentos.violation.train",
        description="Train a detector of pictures without an animal on CIFAR-10, calibrate it, choose its threshold, "
        "and compare it on held-out pictures with simpler ones. The result is a model folder, ready to upload.",
        epilog="Example: python -m bentos.violation.train --small --register http://localhost:8000",
    )
    cifar10.add_option(parser)
    parser.add_argument("--seed", type=int, default=7, help="same seed, same data, same model file (default 7)")
    parser.add_argument("--epochs", type=positive, help="how often every picture is seen (default 12; 6 with --small)")
    parser.add_argument("--small", action="store_true", help="a few seconds on drawn pictures, for a first look")
    command.add_options(parser, Path(__file__).parent / "model")
    options = parser.parse_args(arguments)
    settings = Settings.small(options.seed) if options.small else Settings(options.seed)
    settings = replace(
        settings,
        source=options.data or settings.source,
        recipe=replace(settings.recipe, epochs=options.epochs or settings.recipe.epochs),
    )
    progress = Progress.start(options.quiet)
    try:
        outcome, shown = train(settings, progress)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 2
    print(shown)
    gate = Gate(*GATE, TOLERANCE, lambda folder: evaluate(folder, settings))
    return command.finish(outcome, options, progress, gate)


def _saved(root: Path, files: dict[str, bytes]) -> Detector:
    return Detector.load(write_model(root / "model", kind="violation", format=_FORMAT, files=files))


def _probabilities(detector: Detector, split: Labelled) -> NDArray[np.float64]:
    return detector.probabilities(split.pictures).astype(np.float64)


def _sigmoid(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * (1 + np.tanh(values / 2)))


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    raise SystemExit(main())
